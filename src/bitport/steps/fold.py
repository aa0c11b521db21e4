"""Bring the float network to the form that is quantized: BatchNorm folded, constants computed, attention split."""

from __future__ import annotations

from dataclasses import dataclass

from ..graph import Graph
from ..graph.simplify import simplify
from ..plan import Plan
from ..rules import Ruleset
from ._base import Context


@dataclass(frozen=True)
class Options:
    """`fold` has no knobs."""


def run(graph: Graph, plan: Plan, context: Context, options: Options) -> tuple[Graph, Plan]:
    """Rewrite `graph`; its outputs in eval mode stay what they were (to float rounding)."""
    fold(graph, context.rules)
    context.remember_folded(graph)
    return graph, plan


def fold(graph: Graph, rules: Ruleset) -> None:
    """The same without a plan, in place: a network that is compared with a folded one takes this form as well."""
    graph.gm.eval()
    simplify(graph, phases=rules.computes("conv") and not rules.computes("conv_transpose"))
