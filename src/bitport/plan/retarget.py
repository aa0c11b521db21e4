"""The same integers on another runtime: a plan keeps its formats and parameters, and its kernels get other names."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch

from ..graph import Graph
from ..rules import Mode, Ruleset
from .model import NodePlan, Plan, TensorPlan


def retargeted(plan: Plan, graph: Graph, rules: Ruleset) -> Plan:
    """What a runtime with other rules would run the plan with.

    An operator that they have no row for keeps its kernel, which the runtime then can't be found to run.
    """
    nodes = {name: _renamed(todo, name, graph, rules) for name, todo in plan.nodes.items()}
    return replace(plan, target=rules.name, nodes=nodes)


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
