"""Small questions about a graph that planners and steps ask."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import fx

from .graph import Graph
from .match import Op, Operand


def placeholders(graph: Graph) -> list[fx.Node]:
    """The input nodes, in order."""
    return list(graph.gm.graph.find_nodes(op="placeholder"))


def output_slots(graph: Graph, node: fx.Node) -> list[int]:
    """Indices of the flat outputs that a node makes."""
    return [index for index, value in enumerate(graph.output_nodes()) if value is node]


def type_name(graph: Graph, node: fx.Node) -> str:
    """What an override's `type` matches: the module class (`Conv2d`), or the aten operator (`add`)."""
    if node.op == "call_module":
        return type(graph.gm.get_submodule(str(node.target))).__name__
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "__name__", packet))


def constant_names(graph: Graph) -> frozenset[str]:
    """Dotted names of all parameters and buffers, tied ones under each of their names."""
    parameters = graph.gm.named_parameters(remove_duplicate=False)
    buffers = graph.gm.named_buffers(remove_duplicate=False)
    return frozenset(name for name, _ in (*parameters, *buffers))


def uses_of(graph: Graph) -> Counter[int]:
    """How many operands and outputs each parameter or buffer is, by its identity: under whatever name it is tied."""
    names = constant_names(graph)
    return Counter(id(graph.tensor(edge.producer)) for edge in graph.edges() if edge.producer in names)


def first_name(graph: Graph, tensor: str) -> str:
    """The first of the dotted names that a parameter or buffer is tied under."""
    value = graph.tensor(tensor)
    parameters = graph.gm.named_parameters()
    return next((name for name, known in (*parameters, *graph.gm.named_buffers()) if known is value), tensor)


def producer_name(graph: Graph, operand: Operand) -> str:
    """Who makes an operand, as an `Edge` names it: a parameter's dotted name, or a node's name."""
    if operand.tensor is not None:
        return operand.tensor
    assert operand.node is not None
    return graph.name(operand.node)


def present(op: Op, slot: int) -> Operand:
    """The operand in a slot that its kind always fills."""
    operand = op.operands[slot]
    assert operand is not None
    return operand


def made_by(op: Op, slot: int) -> fx.Node:
    """The node that makes the operand of a slot."""
    operand = present(op, slot)
    assert operand.node is not None
    return operand.node


def value_users(node: fx.Node, ops: Mapping[fx.Node, Op]) -> list[fx.Node]:
    """Users of a tensor's values (not of its sizes); the graph's output counts as one."""
    return [user for user in node.users if user not in ops or ops[user].kind not in ("shape", "const")]


def is_float(node: fx.Node) -> bool:
    """Whether a node's value is a tensor of floats."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()
