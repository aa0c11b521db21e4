"""Norms over the last axis, whether a module, one operator, or RMSNorm spelled out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from .graph import Graph
from .match import Op
from .pairs import is_gain

SIZES = ("shape", "const")  # they look at a tensor's size


@dataclass(frozen=True)
class Norm:
    """A norm whose gain and bias, if any, are stored.

    Attributes:
        name: of the node that a scale of its channels would be called by.
        source: the tensor that it reads.
        out: the node whose value leaves it.
        inner: its nodes that read the source: itself, or where it is spelled out, several.
        centred: it takes the mean away.
        gain, bias: dotted names.
    """

    name: str
    source: fx.Node
    out: fx.Node
    inner: frozenset[fx.Node]
    centred: bool
    gain: str | None = None
    bias: str | None = None


def find_norms(graph: Graph) -> list[Norm]:
    """All norms over the last axis, in network order."""
    found = []
    for node in graph.nodes():
        op = graph.op(node)
        if op.kind in ("layer_norm", "rms_norm"):
            source, *own = op.operands
            stored = all(operand is None or operand.tensor is not None for operand in own)
            if (
                source is not None
                and source.node is not None
                and stored
                and len(op.attrs["normalized_shape"]) == 1
            ):
                gain, bias = (_tensor(op, slot) for slot in (1, 2))
                centred = op.kind == "layer_norm"
                name = graph.name(node)
                found.append(Norm(name, source.node, node, frozenset([node]), centred, gain, bias))
        elif op.kind == "mul":
            spelled = _spelled(graph, node, op)
            if spelled is not None:
                found.append(spelled)
    return found


def _tensor(op: Op, slot: int) -> str | None:
    operand = op.operands[slot] if len(op.operands) > slot else None
    return None if operand is None else operand.tensor


def _spelled(graph: Graph, node: fx.Node, op: Op) -> Norm | None:
    """x · rsqrt(mean(x²) + ε) and the gain behind it: RMSNorm as language models write it out."""
    operands = [o.node for o in op.operands if o is not None and o.node is not None]
    if len(operands) != 2:
        return None
    for source, factor in (operands, operands[::-1]):
        square = _squared(graph, source, factor)
        if square is None:
            continue
        readers = [user for user in node.users if user.op == "output" or graph.op(user).kind not in SIZES]
        behind = readers[0] if len(readers) == 1 and readers[0].op != "output" else None
        if behind is None or not is_gain(graph, behind, graph.op(behind)):
            return Norm(graph.name(node), source, node, frozenset([node, square]), False)
        gain = next(o.tensor for o in graph.op(behind).operands if o is not None and o.tensor is not None)
        return Norm(graph.name(behind), source, behind, frozenset([node, square]), False, gain)
    return None


def _squared(graph: Graph, source: fx.Node, factor: fx.Node) -> fx.Node | None:
    """The node x² that the factor rsqrt(mean(x²) + ε) of a source over its last axis is made of."""
    shape, node = graph.shape(source), factor
    for kind in ("rsqrt", "add_scalar", "mean", "square"):
        if not node.op.startswith("call") or len(node.users) != 1 or shape is None:
            return None
        op = graph.op(node)
        first = op.operands[0].node if op.operands and op.operands[0] is not None else None
        if kind == "square":
            twice = op.kind == "mul" and all(o is not None and o.node is source for o in op.operands)
            power = op.kind == "pow" and op.attrs.get("exponent") == 2
            return node if first is source and (twice or power or op.kind == "other:square") else None
        if op.kind != kind or first is None:
            return None
        if kind == "mean" and (op.attrs["dim"] != (len(shape) - 1,) or not op.attrs["keepdim"]):
            return None
        node = first
    return None
