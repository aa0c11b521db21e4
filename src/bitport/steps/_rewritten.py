"""A network with other weights that computes the same: held against what it was made of, the better kept."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import BitportError
from ..graph import Graph
from ..numerics.error import ErrorStats
from ..plan import Plan
from ._base import Context
from ._judge import Inputs, Judge
from .calibrate import measure_ranges, supersede
from .quantize import fit_weights

Finish = Callable[[Graph, Plan, Context], tuple[Graph, Plan]]
SAMPLES = 256  # to learn from and to judge by, a quarter of them
SAME = 1e-4  # relative; float32 rounds each weight once more


def nearer(
    what: str,
    graph: Graph,
    plan: Plan,
    moved: Graph,
    recorded: Plan,
    reference: Graph,
    context: Context,
    judged: Sequence[Inputs],
    *,
    batches: int | None = None,
    where: str = "",
    worthless: float = math.inf,
    finish: Finish | None = None,
) -> tuple[Graph, Plan]:
    """The rewritten network with its ranges measured again, or the old one: whichever errs less. `tried` says so.

    Args:
        what: what the change is called.
        graph, plan: as they were.
        moved: the network rewritten.
        recorded: the old plan with what was done recorded in it.
        reference: the float network that both are compared with.
        judged: batches that the change hasn't seen.
        batches: how many to measure ranges on, as `calibrate` has it.
        where: said behind the figures.
        worthless: with an error of this much or more before, the change is kept without being nearer.
        finish: makes of each of the two what is compared, in its place, of a graph that it may change.
    """
    change = relative_change(graph, moved, judged[0])
    if not change <= SAME:
        tell(context, what, "left out", f"float32 can't hold it: outputs would change by {change:.1e}")
        return graph, plan
    moved.given = {}  # its activations are other ones
    scratch = replace(context, notes=[], tried=[])
    judge = Judge(reference, context.arithmetic, judged)

    def error_of(candidate: Graph, planned: Plan) -> float:
        if finish is not None:
            candidate, planned = finish(candidate.clone(), planned, replace(context, notes=[], tried=[]))
        return judge.error(candidate, planned)

    try:
        before = error_of(graph, plan)
        fresh = measure_ranges(moved, fit_weights(moved, recorded, scratch), scratch, batches)
        after = error_of(moved, fresh)
    except BitportError as error:
        tell(context, what, "left out", f"its weights or activations can't be stored: {error}")
        return graph, plan
    found = (
        f"error of the simulated outputs {before:.3g} without, {after:.3g} with it, on calibration data held back"
        + where
    )
    if not after < before and before < worthless:
        tell(context, what, "left out", found)
        return graph, plan
    supersede(graph, plan, context, scratch)
    tell(context, what, "kept", found)
    if after < before:
        context.notes.append(f"{what} lowered the output error from {before:.3g} to {after:.3g}")
    return moved, fresh


def relative_change(graph: Graph, moved: Graph, inputs: Sequence[Tensor]) -> float:
    """‖moved − float‖ / ‖float‖ over all float outputs."""
    stats = ErrorStats()
    with torch.no_grad():
        for real, found in zip(graph.run(*inputs), moved.run(*inputs), strict=True):
            if real.is_floating_point():
                stats.update(real, found)
    return 0.0 if stats.noise == 0 else (stats.noise / stats.signal) ** 0.5 if stats.signal else float("inf")


def tell(context: Context, what: str, outcome: str, reason: str) -> None:
    context.tried.append({"what": what, "outcome": outcome, "reason": reason})


def reasons(refused: Mapping[str, str], where: str, none: str) -> str:
    """The most frequent reasons of what was refused, by name, each with the first that has it.

    where: what a reason is told with, `{}` for the name. none: said where nothing was refused.
    """
    if not refused:
        return none
    kinds = Counter(_kind(why) for why in refused.values()).most_common(3)
    firsts = (next((n, why) for n, why in refused.items() if _kind(why) == kind) for kind, _ in kinds)
    return "; ".join(f"{where.format(name)} {why}" for name, why in firsts)


def _kind(why: str) -> str:
    return why.partition(") ")[2] or why
