"""The same integers on another runtime: a plan keeps its formats and parameters, and its kernels get other names."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from ..graph import Graph
from ..rules import Mode, Ruleset
from .model import NodePlan, Plan


def retargeted(plan: Plan, graph: Graph, rules: Ruleset) -> Plan:
    """What a runtime with other rules would run the plan with.

    An operator that they have no row for keeps its kernel, which the runtime then can't be found to run.
    """
    nodes = {name: _renamed(todo, name, graph, rules) for name, todo in plan.nodes.items()}
    return replace(plan, target=rules.name, nodes=nodes)


def _renamed(todo: NodePlan, name: str, graph: Graph, rules: Ruleset) -> NodePlan:
    if todo.kernel is None:
        return todo
    node = graph.node(name)
    row, _ = rules.match(graph, node, graph.op(node), cast(Mode, todo.mode or "static"))
    return todo if row is None else replace(todo, kernel=row.kernel)
