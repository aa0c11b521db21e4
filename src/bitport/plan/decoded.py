"""A plan's weights without its integers: stored as narrow as they are, and decoded for float kernels."""

from __future__ import annotations

from dataclasses import replace

from ..graph import Graph
from ..rules import Ruleset
from .model import NodePlan, Plan


def decoded(plan: Plan, graph: Graph, rules: Ruleset, reason: str) -> Plan:
    """The plan with float activations everywhere; weights that the runtime can store keep their codes.

    reason: what is told of operators that were in integers.
    """
    nodes: dict[str, NodePlan] = {}
    for name, todo in plan.nodes.items():
        if todo.kernel is None or todo.mode is not None:
            nodes[name] = replace(todo, absorbed_by=None)
            continue
        node = graph.node(name)
        weights = [tie for edge, tie in plan.edges.items() if edge.consumer == name and _is_weight(plan, tie)]
        fmt = plan.ties[weights[0]].format if weights else None
        row, _ = rules.match(graph, node, graph.op(node), "weights", fmt) if weights else (None, None)
        nodes[name] = (
            NodePlan(reason=reason) if row is None else NodePlan(row.kernel, role=row.role, mode="weights")
        )
    # what was quantized for float kernels before stays that
    edges = {
        edge: tie
        for edge, tie in plan.edges.items()
        if nodes[edge.consumer].mode is not None
        and (_is_weight(plan, tie) or plan.node(edge.consumer).mode is not None)
    }
    ties = {tie: plan.ties[tie] for tie in edges.values()}
    return replace(plan, nodes=nodes, edges=edges, ties=ties).checked()


def _is_weight(plan: Plan, tie: str) -> bool:
    return plan.ties[tie].source == "weight"
