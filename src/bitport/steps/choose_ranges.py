"""Hold the ranges that were asked for against others: what suits most networks clips what some need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..errors import BitportError
from ..graph import Graph
from ..plan import Plan
from ..plan.constants import settle
from ._base import Context
from ._judge import Judge, parted, samples_in
from .calibrate import measure_ranges, room_for_biases, supersede
from .quantize import fit_weights

PLAIN = "minmax"
SAMPLES = 256  # the last quarter of them judges
NEAR = 1e-3  # 30 dB: from here on the ranges are good enough to be left alone
# what → the source of its ties, and the estimator that is tried
TRIED = {
    "min-max for weights": ("weight", PLAIN),
    "squared error for weights": ("weight", "mse"),
    "min-max for activations": ("measured", PLAIN),
}


@dataclass(frozen=True)
class Options:
    """Knobs of `choose_ranges`.

    batches: how many calibration batches ranges are measured on; None: all.
    """

    batches: int | None = None


def run(graph: Graph, plan: Plan, context: Context, options: Options) -> tuple[Graph, Plan]:
    """Try other estimators for the weights, and then min-max for the activations, where another one was asked for.

    Min-max is plain rounding's, so that nothing is worse than that on samples held back; weights in groups are often
    asked for with it, and gain by the smallest squared error where they are narrow. The plan with the smallest error of
    the simulated outputs on samples held back is kept.

    Raises GraphError before `calibrate`.
    """
    for tie in plan.measured().values():
        tie.parameters()
    candidates = {what: how for what, how in TRIED.items() if _others(plan, *how)}
    if not plan.quantized or not candidates:
        return graph, plan
    real = context.original(graph, plan)
    _, held = parted(context.calibration, graph, SAMPLES)
    judge = Judge(real, context.arithmetic, held)
    best = judge.error(graph, plan)
    if best <= NEAR:
        return graph, plan
    for what, how in candidates.items():
        scratch = replace(context, notes=[], tried=[])
        try:
            found = _with(graph, plan, scratch, *how, options.batches)
        except BitportError as error:
            _tell(context, what, "left out", f"its values can't be stored: {error}")
            continue
        after = judge.error(graph, found)
        outcome = "kept" if after < best else "left out"
        found_out = f"error of the simulated outputs {best:.3g} as asked, {after:.3g} with it"
        _tell(context, what, outcome, f"{found_out}, on {samples_in(held)} samples held back")
        if after < best:
            supersede(graph, plan, context, scratch)
            best, plan = after, found
    return graph, plan


def _others(plan: Plan, source: str, estimator: str) -> list[str]:
    """Ties of integers whose range another estimator finds; a range that was given in numbers is no estimate."""
    found = []
    for name, tie in plan.ties.items():
        given = isinstance(tie.range, Mapping) and tie.range.get("use") == "fixed"
        if tie.source == source and tie.range != estimator and tie.format.is_int and not given:
            found.append(name)
    return found


def _tell(context: Context, what: str, outcome: str, reason: str) -> None:
    context.tried.append({"what": what, "outcome": outcome, "reason": reason})


def _with(
    graph: Graph, plan: Plan, context: Context, source: str, estimator: str, batches: int | None
) -> Plan:
    names = _others(plan, source, estimator)
    changed = plan.with_ties({name: replace(plan.ties[name], range=estimator) for name in names})
    if source == "measured":
        return measure_ranges(graph, changed, context, batches)
    return settle(room_for_biases(graph, settle(fit_weights(graph, changed, context)), context))
