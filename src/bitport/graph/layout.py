"""Permutes that cancel: each sinks towards the outputs, through operators that do the same in any order of axes.

Networks whose tensors are channels last turn them around each convolution. Between two of those a permute that sinks
meets its inverse, and both are gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from .editing import insert
from .graph import Graph
from .match import Call, op_name

aten = torch.ops.aten
PERMUTES = ("permute", "transpose", "swapaxes", "swapdims", "t", "numpy_T", "mT")
SIZED = ("mean", "sum", "amax", "amin")  # over axes
ALONG = (
    "softmax",
    "_softmax",
    "log_softmax",
    "_log_softmax",
    "slice",
    "narrow",
    "repeat_interleave",
    "flip",
    "roll",
)
DROPOUTS = (nn.Dropout, nn.AlphaDropout)
POINTWISE = torch.Tag.pointwise
UNTAGGED = ("hardswish", "log_sigmoid", "to", "_to_copy", "rsub")  # pointwise all the same


def cancel_permutes(graph: Graph) -> None:
    """Rewrites a graph in place; its outputs stay what they are."""
    for node in graph.nodes():
        if node._erased:
            continue
        if _order(graph, node) is not None:
            _merge(graph, node)
        elif node.op == "call_function" and op_name(node) == "sym_size":
            _size(graph, node)
        else:
            _sink(graph, node)
    graph.gm.graph.eliminate_dead_code()
    graph.gm.recompile()
    graph.propagate()


def _order(graph: Graph, node: Any) -> tuple[int, ...] | None:
    """Which axis of its source each axis of a permute is; None for other nodes."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or op_name(node) not in PERMUTES:
        return None
    dims = graph.op(node).attrs.get("dims")
    return None if dims is None else tuple(dims)


def _merge(graph: Graph, node: fx.Node) -> None:
    """A permute of a permute is one, or none."""
    source, order = node.args[0], _order(graph, node)
    assert isinstance(source, fx.Node) and order is not None
    before = _order(graph, source)
    if before is not None:
        order = tuple(before[axis] for axis in order)
        source = source.args[0]
        assert isinstance(source, fx.Node)
    if order == tuple(range(len(order))):
        node.replace_all_uses_with(source)
        graph.gm.graph.erase_node(node)
    elif before is not None:
        node.target, node.args, node.kwargs = aten.permute.default, (source, list(order)), {}


def _size(graph: Graph, node: fx.Node) -> None:
    order = _order(graph, node.args[0])
    if order is not None and isinstance(node.args[0], fx.Node) and isinstance(node.args[1], int):
        node.args = (node.args[0].args[0], order[node.args[1]])


def _sink(graph: Graph, node: fx.Node) -> None:
    order = next((o for o in (_order(graph, n) for n in node.all_input_nodes) if o is not None), None)
    if order is None or not isinstance(node.meta.get("val"), Tensor):
        return
    if node.op == "call_module":
        if type(graph.gm.get_submodule(str(node.target))) in DROPOUTS:
            _through(graph, node, order, order)
    elif POINTWISE in getattr(node.target, "tags", ()) or op_name(node) in UNTAGGED:
        _through(graph, node, order, order)
    else:
        _by_axis(graph, node, order)


def _by_axis(graph: Graph, node: fx.Node, order: tuple[int, ...]) -> None:
    """Operators that name axes name those of the permute's source instead."""
    name, call = op_name(node), Call(node)
    names = list(call.args)
    after = order
    given: dict[str, Any] = {}
    if name in SIZED and call["dim"] is not None:
        axes = call.dim(call["dim"])
        axes = (axes,) if isinstance(axes, int) else tuple(axes)
        given["dim"] = [order[axis] for axis in axes]
        if not call["keepdim"]:
            kept = [axis for i, axis in enumerate(order) if i not in axes]
            after = tuple(sorted(kept).index(axis) for axis in kept)
    elif name in ALONG and "dim" in names and isinstance(call["dim"], int):
        given["dim"] = order[call.dim(call["dim"])]
    elif name in ("cat", "concat") and isinstance(call["tensors"], list | tuple):
        given["dim"] = order[call["dim"] % len(order)]
    elif name in ("pad", "constant_pad_nd") and all(isinstance(size, int) for size in call["pad"]):
        pads = call["pad"]
        pairs = {order[-1 - i]: pads[2 * i : 2 * i + 2] for i in range(len(pads) // 2)}
        lowest = min(pairs)
        if call["mode"] not in (None, "constant"):
            return  # others take the last axes only
        given["pad"] = [
            size for axis in range(len(order) - 1, lowest - 1, -1) for size in pairs.get(axis, (0, 0))
        ]
    else:
        return
    _through(graph, node, order, after, given)


def _through(
    graph: Graph,
    node: fx.Node,
    order: Sequence[int],
    after: Sequence[int],
    given: dict[str, Any] | None = None,
) -> None:
    """The node reads what its permutes read, and is permuted itself. Unchanged where an operand is in another order."""
    instead: dict[fx.Node, Any] = {}
    for source in node.all_input_nodes:
        value = source.meta.get("val")
        if _order(graph, source) == tuple(order):
            instead[source] = source.args[0]
        elif isinstance(value, Tensor) and value.dim():
            turned = _turned(graph, node, source, order)
            if turned is None:
                return
            instead[source] = turned
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: instead.get(n, n))
    for name, value in (given or {}).items():
        place = list(Call(node).args).index(name)
        if place < len(args):
            args = (*args[:place], value, *args[place + 1 :])
        else:
            kwargs = {**kwargs, name: value}
    identity = tuple(after) == tuple(range(len(after)))
    if not identity:
        behind = node.next
        permuted = insert(
            graph, behind, aten.permute.default, (node, list(after)), f"{graph.name(node)}.permute"
        )
        permuted.meta["bitport_path"] = node.meta.get("bitport_path", "")
        permuted.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(permuted, delete_user_cb=lambda user: user is not permuted)
        back = [list(after).index(axis) for axis in range(len(after))]
        node.meta["val"] = node.meta["val"].permute(back)
    node.args, node.kwargs = args, kwargs


def _turned(graph: Graph, node: fx.Node, constant: fx.Node, order: Sequence[int]) -> fx.Node | None:
    """A stored tensor in the order of the permute's source; None where it isn't stored, or can't be turned."""
    rank = constant.meta["val"].dim()
    if constant.op != "get_attr" or rank > len(order):
        return None
    name = f"{graph.name(node)}.turned"
    value = constant.meta["val"]
    shape = [1] * (len(order) - rank) + [int(size) for size in value.shape]
    back = [list(order).index(axis) for axis in range(len(order))]
    with torch.no_grad():
        wide = insert(graph, node, aten.reshape.default, (constant, shape), name)
        wide.meta["val"] = value.reshape(shape)
        turned = insert(graph, node, aten.permute.default, (wide, back), name)
        turned.meta["val"] = wide.meta["val"].permute(back)
    return turned
