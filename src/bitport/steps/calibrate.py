"""Measure activation ranges: one float pass over the calibration data, nothing kept but histograms."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import fx

from ..errors import DataError
from ..graph import Graph
from ..graph.reading import constant_names
from ..numerics.quantize import qparams, raise_weight_scale_for_bias, requantized_qparams
from ..numerics.ranges import Histogram, choose_symmetry, estimate
from ..numerics.scales import stored
from ..plan import GIVEN, Plan, TensorPlan
from ..plan.constants import settle
from ._base import Context
from .quantize import fit_weights

KEPT = "the scale that the network came with"
RAISED = "larger scales of weights"
MANY_BAD = 0.01  # beyond this share of non-finite values the data, not a stray sample, is at fault


@dataclass(frozen=True)
class Options:
    """Knobs of `calibrate`. batches: use only the first so many (None: all)."""

    batches: int | None = None


def run(graph: Graph, plan: Plan, context: Context, options: Options) -> tuple[Graph, Plan]:
    """Observe every measured tie, choose its range, settle what follows from it.

    Where the plan leaves it open (`choose`), a tie becomes symmetric or not, whichever errs less.

    Raises DataError when activations are mostly NaN or infinite.
    """
    return graph, measure_ranges(graph, plan, context, options.batches)


def measure_ranges(graph: Graph, plan: Plan, context: Context, batches: int | None = None) -> Plan:
    """The plan with the ranges of a graph's activations, and what follows from them. Raises as `run`."""
    histograms = observe(graph, plan, context, batches)
    changed: dict[str, TensorPlan] = {}
    chosen: Counter[bool] = Counter()
    estimators: Counter[str] = Counter()
    for name, tie in plan.measured().items():
        histogram, fmt = histograms[name], tie.format
        if tie.choose:
            fmt = choose_symmetry(histogram, fmt, tie.range)
            chosen[fmt.symmetric] += 1
        given = tie.given_in(graph)
        if given is None:
            minimum, maximum = estimate(histogram, fmt, tie.range)
            scale, zero_point = qparams(
                torch.tensor(minimum, dtype=torch.float64), torch.tensor(maximum, dtype=torch.float64), fmt
            )
        else:
            scale, zero_point = requantized_qparams(*given, fmt)
        by = str(tie.range if isinstance(tie.range, str) else dict(tie.range))
        if tie.range == GIVEN:
            by = "minmax, having no scale of their own" if given is None else KEPT
        estimators[by] += 1
        changed[name] = replace(tie, format=fmt, scale=scale, zero_point=zero_point, choose=False)
    for name, number in sorted(estimators.items()):
        reason = f"{number} tensors by {name}" + (
            f", on {context.calibration.role} data" if name != KEPT else ""
        )
        context.tried.append({"what": "ranges of activations", "outcome": "measured", "reason": reason})
    if chosen:
        reason = f"{chosen[True]} tensors symmetric, {chosen[False]} asymmetric, each by its expected error"
        context.tried.append({"what": "symmetric ranges", "outcome": "measured", "reason": reason})
    return settle(room_for_biases(graph, settle(plan.with_ties(changed)), context))


def observe(graph: Graph, plan: Plan, context: Context, batches: int | None = None) -> dict[str, Histogram]:
    """Histogram of every measured tie over the calibration data (constants of a tie included).

    Each batch is one update of it, whose extremes include those of the constants, as they meet in every batch.
    """
    histograms = {name: Histogram() for name in plan.measured()}
    if not histograms:
        return histograms
    fixed: dict[str, Histogram] = {}  # the constants of ties, counted once
    of_batch: dict[str, Histogram] = {}
    spoilt: list[str] = []  # of one batch: where NaN was seen, in network order
    constants = constant_names(graph)
    tie_of: dict[str, list[str]] = {}
    for name, tie in plan.measured().items():
        for member in tie.members:
            if member in constants:
                fixed.setdefault(name, Histogram()).update(graph.tensor(member).detach())
            else:
                tie_of.setdefault(member, []).append(name)

    def look(node: fx.Node, value: Any) -> Any:
        wanted = tie_of.get(graph.name(node), ())
        found = value.cpu() if wanted else value
        for name in wanted:
            seen = of_batch.setdefault(name, Histogram())
            before = seen.nonfinite
            seen.update(found)
            if seen.nonfinite > before and bool(torch.isnan(found).any()):
                spoilt.append(graph.name(node))
        return value

    graph.gm.eval()
    run = context.float_pass(graph)
    with context.progress.task("calibrating", batches) as task, torch.no_grad():
        dropped: list[tuple[int, str]] = []
        read = 0
        for batch in islice(context.calibration, batches):
            of_batch.clear()
            spoilt.clear()
            run(batch.inputs, look)
            if spoilt:
                dropped.append((read, spoilt[0]))
            else:
                for name, histogram in of_batch.items():
                    always = fixed.get(name, Histogram())
                    if not histograms[name].updates:
                        histogram = histogram.merge(always)
                    histograms[name] = histograms[name].merge(histogram.as_one_update(always))
            read += 1
            task.advance(1)
    for name, histogram in fixed.items():
        if not histograms[name].updates:
            histograms[name] = histograms[name].merge(histogram)
    _tell_dropped(dropped, read, context)
    for name, histogram in histograms.items():
        bad, seen = histogram.nonfinite, histogram.count + histogram.nonfinite
        if bad > MANY_BAD * seen:
            raise DataError(
                f"{bad} of {seen} values of {name!r} are NaN or infinite on the calibration data: "
                "check its preprocessing, or the network in float"
            )
        if bad:
            context.notes.append(
                f"{bad} of {seen} values of {name!r} were NaN or infinite and left out of its range"
            )
    return histograms


def _tell_dropped(dropped: list[tuple[int, str]], read: int, context: Context) -> None:
    """Batches with NaN among their activations: noted while they are few. Raises DataError beyond 1 %."""
    if not dropped:
        return
    first, where = dropped[0]
    said = (
        f"{len(dropped)} of {read} calibration batches give NaN activations, first batch {first} in {where!r}"
    )
    if len(dropped) > MANY_BAD * read:
        raise DataError(f"{said}: check the data's preprocessing, or the network in float", batch=first)
    context.notes.append(f"{said}; they were left out of all ranges")


def room_for_biases(graph: Graph, plan: Plan, context: Context | None) -> Plan:
    """Raise a weight's scale where its bias would not fit into 32 bits (tiny weights, large bias).

    Without a context nothing is told of it.
    """
    changed: dict[str, TensorPlan] = {}
    for edge, name in plan.edges.items():
        tie = plan.ties[name]
        if tie.source != "bias":
            continue
        x_name, w_name = tie.of
        x_scale, _ = plan.ties[x_name].parameters()
        weight = changed.get(w_name, plan.ties[w_name])
        w_scale, _ = weight.parameters()
        sums = _largest_sum(graph, plan.ties[x_name], weight, w_scale.numel())
        raised = raise_weight_scale_for_bias(graph.tensor(edge.producer).detach(), x_scale, w_scale, sums)
        if not torch.equal(raised, w_scale):
            raised = stored(raised, weight.format.scale, up=True)
            changed[w_name] = replace(weight, scale=raised)
            if context is not None:
                context.notes.append(raised_note(w_name))
    if changed and context is not None:
        reason = f"the biases of {len(changed)} tensors would not fit into 32 bits"
        context.tried.append({"what": RAISED, "outcome": "kept", "reason": reason})
    return plan.with_ties(changed)


def raised_note(weight: str) -> str:
    """What is told of a weight whose scale grew for its bias."""
    return f"the scale of {weight!r} was raised so that its bias fits into 32 bits"


def _largest_sum(graph: Graph, x: TensorPlan, weight: TensorPlan, scales: int) -> int:
    """A bound on the magnitude of a layer's integer sums, whatever its data and weights."""
    values = graph.tensor(weight.members[0]).numel()
    channels = graph.tensor(weight.members[0]).shape[0] if scales == 1 else scales
    terms = values // max(1, channels)
    return terms * (x.format.high - x.format.low) * max(-weight.format.low, weight.format.high)


def supersede(graph: Graph, plan: Plan, context: Context, fresh: Context) -> None:
    """What was told of a plan's ranges goes with them; what `fresh` was told of those in their place comes instead."""
    if context.notes:  # else there is nothing to look for
        old = replace(context, notes=[], tried=[])
        fit_weights(graph, plan, old)
        gone = {*old.notes, *map(raised_note, plan.ties)}
        context.notes[:] = [note for note in context.notes if note not in gone]
    context.notes += [note for note in fresh.notes if note not in context.notes]
    again = {RAISED, *(row["what"] for row in fresh.tried)}
    context.tried[:] = [row for row in context.tried if row["what"] not in again]
    context.tried += fresh.tried
