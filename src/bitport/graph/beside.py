"""A thin product beside a Linear layer: y = layer(x) + up(down(x)), which those that read the layer get.

The layer keeps its node and its name; beside it stand `<layer>_low_rank.down`, `.up` (modules, Linear without bias) and
`.sum`. Modules, because that is what a saved graph is read back as.

Legend: O outputs, K inputs, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from ..errors import GraphError
from .editing import insert
from .graph import Graph
from .reading import made_by

PARTS = ("down", "up", "sum")


class Names(NamedTuple):
    """What the three operators beside a layer are called."""

    down: str
    up: str
    sum: str

    @property
    def tensors(self) -> tuple[str, str]:
        """The two parameters, [r, K] and [O, r]."""
        return f"{self.down}.weight", f"{self.up}.weight"


def names_beside(layer: str) -> Names:
    """The names of what stands beside a layer, whether it is there or not."""
    return Names(*(f"{layer.replace('#', '_')}_low_rank.{part}" for part in PARTS))


def is_free(graph: Graph, layer: str) -> bool:
    """Whether nothing has the names yet that `put_beside` would give."""
    taken = {graph.name(node) for node in graph.nodes()} | {name for name, _ in graph.gm.named_parameters()}
    return not taken & {*names_beside(layer), *names_beside(layer).tensors}


def weights_of(graph: Graph, layer: str) -> tuple[int, int]:
    """(O, K) of a Linear layer that a product can stand beside. Raises GraphError where there is none of that name."""
    op = graph.op(graph.node(layer))
    source, weight = (op.operands[0], op.operands[1]) if op.kind == "linear" else (None, None)
    if source is None or source.node is None or weight is None or weight.tensor is None:
        raise GraphError(f"{layer}: nothing can stand beside it: it is no Linear with weights of its own")
    outputs, inputs = graph.tensor(weight.tensor).shape
    return outputs, inputs


def put_beside(graph: Graph, products: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Put a product beside each of some layers, in place.

    Args:
        products: layer → (down [r, K], up [O, r]), float32.

    Raises:
        GraphError: a layer is no Linear, has such a product already, or one of another shape.
    """
    for layer, (down, up) in products.items():
        shape = weights_of(graph, layer)
        if not is_free(graph, layer):
            raise GraphError(f"{layer}: something stands beside it already")
        if (up.shape[0], down.shape[1]) != shape or up.shape[1] != down.shape[0]:
            raise GraphError(
                f"{layer}: a product of {tuple(up.shape)} and {tuple(down.shape)} doesn't fit weights of {shape}"
            )
        _put(graph, graph.node(layer), down, up)
    if products:
        graph.gm.recompile()
        graph.propagate()


def _put(graph: Graph, node: fx.Node, down: Tensor, up: Tensor) -> None:
    called, behind, source = names_beside(graph.name(node)), node.next, made_by(graph.op(node), 0)
    thin = _module(graph, behind, called.down, source, down, node)
    wide = _module(graph, behind, called.up, thin, up, node)
    total = insert(graph, behind, torch.ops.aten.add.Tensor, (node, wide), called.sum)
    total.meta["bitport_path"] = node.meta.get("bitport_path", "")
    node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)


def _module(
    graph: Graph, before: fx.Node, name: str, source: fx.Node, value: Tensor, like: fx.Node
) -> fx.Node:
    outputs, inputs = value.shape
    layer = nn.Linear(inputs, outputs, bias=False, device="meta")
    layer.weight = nn.Parameter(value.detach().float().contiguous())
    layer.train(graph.gm.training)
    if not graph.gm.add_submodule(name, layer):
        raise GraphError(f"{name}: a tensor of the network has the name of a module that was to be put there")
    with graph.gm.graph.inserting_before(before):
        node = graph.gm.graph.call_module(name, (source,))
    node.meta["bitport_name"] = name
    node.meta["bitport_path"] = like.meta.get("bitport_path", "")
    return node
