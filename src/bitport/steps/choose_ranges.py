"""Hold the ranges that were asked for against plain min-max: what suits most networks clips what some need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..errors import BitportError
from ..graph import Graph
from ..plan import Plan, TensorPlan
from ..plan.constants import settle
from ._base import Context
from ._judge import output_error, parted, samples_in
from .calibrate import measure_ranges, room_for_biases
from .quantize import fit_weights

PLAIN = "minmax"
SAMPLES = 256  # the last quarter of them judges
NEAR = 1e-3  # 30 dB: from here on the ranges are good enough to be left alone
TRIED = {"weights": "weight", "activations": "measured"}  # what → the source of its ties


@dataclass(frozen=True)
class Options:
    """Knobs of `choose_ranges`.

    batches: how many calibration batches ranges are measured on; None: all.
    """

    batches: int | None = None


def run(graph: Graph, plan: Plan, context: Context, options: Options) -> tuple[Graph, Plan]:
    """Try min-max for the weights, and then for the activations, where another estimator was asked for.

    The plan with the smallest error of the simulated outputs on samples held back is kept.
    Raises GraphError before `calibrate`.
    """
    for tie in plan.measured().values():
        tie.parameters()
    others = {tie.source for tie in plan.ties.values() if _is_estimated(tie)}
    candidates = {what: source for what, source in TRIED.items() if source in others}
    if not plan.quantized or not candidates:
        return graph, plan
    real = context.original(graph, plan)
    _, held = parted(context.calibration, graph, SAMPLES)
    best = output_error(graph, plan, real, context.arithmetic, held)
    if best <= NEAR:
        return graph, plan
    for what, source in candidates.items():
        scratch = replace(context, notes=[], tried=[])
        try:
            found = _with_minmax(graph, plan, scratch, source, options.batches)
        except BitportError as error:
            _tell(context, what, "left out", f"its values can't be stored: {error}")
            continue
        after = output_error(graph, found, real, context.arithmetic, held)
        outcome = "kept" if after < best else "left out"
        found_out = f"error of the simulated outputs {best:.3g} as asked, {after:.3g} with it"
        _tell(context, what, outcome, f"{found_out}, on {samples_in(held)} samples held back")
        if after < best:
            best, plan = after, found
    return graph, plan


def _is_estimated(tie: TensorPlan) -> bool:
    """Whether another estimator than min-max was asked for; a range that was given in numbers is no estimate."""
    given = isinstance(tie.range, Mapping) and tie.range.get("use") == "fixed"
    return tie.range != PLAIN and not given


def _tell(context: Context, what: str, outcome: str, reason: str) -> None:
    context.tried.append({"what": f"min-max for {what}", "outcome": outcome, "reason": reason})


def _with_minmax(graph: Graph, plan: Plan, context: Context, source: str, batches: int | None) -> Plan:
    ties = {name: tie for name, tie in plan.ties.items() if tie.source == source and _is_estimated(tie)}
    changed = plan.with_ties({name: replace(tie, range=PLAIN) for name, tie in ties.items()})
    if source == "measured":
        return measure_ranges(graph, changed, context, batches)
    return settle(room_for_biases(graph, settle(fit_weights(graph, changed, context)), None))
