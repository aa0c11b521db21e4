"""The same integers on another runtime: a plan keeps its formats and parameters, and its kernels get other names."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch

from ..errors import TargetError
from ..graph import Edge, Graph
from ..graph.reading import producer_name
from ..rules import Free, Mode, Ruleset
from .model import NodePlan, Plan, TensorPlan


def retargeted(plan: Plan, graph: Graph, rules: Ruleset) -> Plan:
    """What a runtime with other rules would run the plan with.

    An operator that they have no integer kernel for, or one whose kernel wants more integers than the plan has around
    it, is computed in float, from the same integers.

    Raises TargetError, naming a layer, where the runtime holds no weights or activations of its formats.
    """
    _check_formats(plan, rules)
    nodes = {name: _renamed(todo, name, graph, rules) for name, todo in plan.nodes.items()}
    for name, todo in plan.nodes.items():
        reason = _objection(todo, name, plan, graph, rules)
        if reason is not None:
            nodes[name] = NodePlan(reason=reason, role=todo.role)
            if todo.absorbs is not None:
                nodes[todo.absorbs] = NodePlan(reason=reason)
    return replace(plan, target=rules.name, nodes=nodes)


def saturating(plan: Plan, rules: Ruleset) -> list[str]:
    """Layers whose weights are so large that sums of products could saturate on this processor."""
    limit = rules.weight_limit
    return [] if limit is None else [
        edge.consumer
        for edge, tie in plan.edges.items()
        if plan.ties[tie].source == "weight"
        and plan.node(edge.consumer).kernel is not None
        and plan.node(edge.consumer).mode != "weights"
        and plan.ties[tie].format.high > limit
    ]  # fmt: skip


def _check_formats(plan: Plan, rules: Ruleset) -> None:
    for edge, key in plan.edges.items():
        todo, tie = plan.node(edge.consumer), plan.ties[key]
        fmt, why = tie.format, None
        if tie.source == "weight":
            if todo.kernel is not None and todo.role != "move":
                why = rules.weights_objection(fmt, cast(Mode, todo.mode or "static"), str(fmt))
        elif tie.source != "bias":
            why = rules.activations_objection(fmt, str(fmt), dynamic=tie.source == "dynamic")
        if why is not None:
            raise TargetError(f"{edge.consumer}: {why}: compress the network for {rules.name}")


def _objection(todo: NodePlan, name: str, plan: Plan, graph: Graph, rules: Ruleset) -> str | None:
    """Why an integer kernel of these rules can't take what the plan hands to it, or give what is read of it."""
    if todo.kernel is None or todo.mode is not None or todo.role not in ("compute", "elementwise"):
        return None
    node = graph.node(name)
    op = graph.op(node)
    row, why = rules.match(graph, node, op, "static")
    if row is None:
        return why or rules.reasons.get(op.kind) or f"{rules.name} has no integer kernel for {op.kind}"
    for slot, operand in enumerate(op.operands):
        if operand is None or operand.node is None or not isinstance(row.operand(slot), Free):
            continue
        read = Edge(producer_name(graph, operand), name, slot) in plan.edges
        fused = (
            operand.node.op in ("call_function", "call_module") and graph.op(operand.node).kind in row.fuses
        )
        if not read and not fused:
            return f"{rules.name} takes integers alone, and the plan has operand {slot} as floats"
    if not row.float_output and plan.tie_of(todo.absorbs or name) is None:
        return f"{rules.name} has no {row.kernel} from integers to floats, and the plan leaves its result as floats"
    return None


def with_signed_weights(plan: Plan) -> Plan:
    """The same numbers with weights' codes around 0, as runtimes want them whose kernels take no others."""
    return replace(plan, ties={name: _signed(tie) for name, tie in plan.ties.items()})


def _signed(tie: TensorPlan) -> TensorPlan:
    fmt = tie.format
    if tie.source != "weight" or not fmt.is_int or fmt.low < 0 or tie.zero_point is None:
        return tie
    offset = fmt.zero_point if fmt.symmetric else 2 ** (fmt.bits - 1)
    moved = replace(fmt, low=fmt.low - offset, high=fmt.high - offset)
    return replace(tie, format=moved, zero_point=(tie.zero_point - offset).to(torch.int32))


def _renamed(todo: NodePlan, name: str, graph: Graph, rules: Ruleset) -> NodePlan:
    if todo.kernel is None:
        return todo
    node = graph.node(name)
    row, _ = rules.match(graph, node, graph.op(node), cast(Mode, todo.mode or "static"))
    return todo if row is None else replace(todo, kernel=row.kernel)
