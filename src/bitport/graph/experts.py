"""Products of experts as one layer: `bitport::expert_linear`.

A mixture of experts sorts its rows by expert and multiplies each group by one matrix of a stack. Stored as a Linear of
all experts, [experts · outputs, inputs], such a stack has one scale per expert and output like any other weight.

Letters: S rows, K inputs, N outputs, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from .editing import insert, replace
from .graph import Graph
from .match import op_name
from .products import readers

_LIBRARY = torch.library.Library("bitport", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("expert_linear(Tensor x, Tensor weight, Tensor ends) -> Tensor")  # type: ignore[no-untyped-call]


def rows_of(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) for cumulative ends [E]."""
    start = 0
    for expert, end in enumerate(ends.tolist()):
        yield expert, slice(start, max(start, int(end)))
        start = max(start, int(end))


def expert_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows up to ends[e] meet the e-th group of rows of the weight; rows behind the last end become 0.

    x: [S, K], rows sorted by expert; weight: [E·N, K]; ends: [E] integers. Returns [S, N].
    """
    stack = weight.reshape(ends.shape[0], -1, weight.shape[1])
    out = x.new_zeros(x.shape[0], stack.shape[1])
    for expert, rows in rows_of(ends):
        out[rows] = x[rows] @ stack[expert].T
    return out


def _shape_only(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0] // ends.shape[0])


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight, ends = ctx.saved_tensors
    stack = weight.reshape(ends.shape[0], -1, weight.shape[1])
    of_x, of_stack = torch.zeros_like(x), torch.zeros_like(stack)
    for expert, rows in rows_of(ends):
        of_x[rows] = grad[rows] @ stack[expert]
        of_stack[expert] = grad[rows].T @ x[rows]
    return of_x, of_stack.flatten(0, 1), None


_LIBRARY.impl("expert_linear", expert_linear, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("bitport::expert_linear", _shape_only, lib=_LIBRARY)
torch.library.register_autograd("bitport::expert_linear", _backward, setup_context=_keep, lib=_LIBRARY)
EXPERT_LINEAR = torch.ops.bitport.expert_linear.default


def spell_experts(graph: Graph) -> None:
    """Grouped products with a constant stack [E, K, N] → `expert_linear`; the stack is stored under its own name."""
    stored: dict[tuple[str, bool], fx.Node] = {}
    for node in graph.nodes():
        op = graph.op(node)
        if op.kind != "grouped_mm" or len(op.operands) != 3 or any(o is None for o in op.operands):
            continue
        x, stack, ends = (operand.node for operand in op.operands if operand is not None)
        assert x is not None and stack is not None and ends is not None
        turned = _turned(stack)
        source = stack if turned is None else turned
        if source.op != "get_attr" or source.meta["val"].dim() != 3:
            continue
        key = (str(source.target), turned is not None)
        if key not in stored:
            stored[key] = _stored(graph, source, turned is not None)
        replace(
            graph,
            node,
            insert(graph, node, EXPERT_LINEAR, (x, stored[key], ends), graph.name(node)),
        )


def _turned(stack: fx.Node) -> fx.Node | None:
    """The stack [E, N, K] whose transpose this is."""
    if stack.op != "call_function" or op_name(stack) not in ("transpose", "swapaxes", "mT"):
        return None
    source = stack.args[0]
    axes = sorted(int(a) % 3 for a in stack.args[1:3] if isinstance(a, int)) or [1, 2]
    return source if isinstance(source, fx.Node) and axes == [1, 2] else None


def _stored(graph: Graph, source: fx.Node, turned: bool) -> fx.Node:
    dotted = str(source.target)
    value = graph.tensor(dotted).detach()
    flat = (value if turned else value.transpose(1, 2)).reshape(-1, value.shape[2 if turned else 1])
    name = f"{dotted.replace('.', '_')}_experts"
    if readers(graph, graph.tensor(dotted)) == 1:
        graph.set_tensor(dotted, flat.contiguous())
        name = dotted
    else:
        graph.gm.register_parameter(name, torch.nn.Parameter(flat.contiguous()))
    with graph.gm.graph.inserting_before(source):
        node = graph.gm.graph.get_attr(name)
    node.meta["val"] = source.meta["val"].new_empty(flat.shape)
    return node
