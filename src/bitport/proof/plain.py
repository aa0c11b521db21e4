"""The result against plain rounding: the same formats, ranges as wide as the data or as the network came with them.

A method that does worse than that is broken, whatever its name: such a result is not published. The ranges are taken
here, apart from the steps that are judged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import BitportError
from ..graph import Graph
from ..graph.reading import constant_names
from ..numerics.codes import fit
from ..numerics.error import ErrorStats, finite
from ..numerics.quantize import qparams, requantized_qparams
from ..plan import Plan, TensorPlan
from ..plan.constants import settle
from ..records import absent
from ..simulate import Arithmetic, Simulator

SAMPLES = 64
# A range that clips trades a few far errors for many near ones, which outputs that average repay with up to a third of
# their decibels (measured: 46 → 35 dB at 8 bits, 12 → 8 dB at 2); a broken path loses far more.
ALLOWED_DB, ALLOWED_SHARE = 6.0, 0.3
EXACT_DB = (
    46.0  # what plain rounding without any error counts for, as of weights that lie on their grid already
)
TOLD_DB = 3.0  # from here on the difference is worth a hint


def plain_record(
    reference: Graph,
    graph: Graph,
    plan: Plan,
    arithmetic: Arithmetic,
    batches: Iterable[Sequence[Tensor]],
    calibration: Iterable[Sequence[Tensor]] | None = None,
) -> dict[str, Any]:
    """The `plain` section of a measurement.

    Args:
        reference: the float network, folded, with its original weights.
        graph, plan: the compressed network.
        batches: inputs to compare on; the first `SAMPLES` samples are used.
        calibration: inputs to take ranges from, likewise; default: the same ones.

    Returns: `sqnr_db` of the float outputs against the result's error and `plain_sqnr_db` against that of plain
        rounding, both simulated (null where there is no error), and `holds`.
    """
    few = _few(batches)
    record: dict[str, Any] = {"samples": sum(len(inputs[0]) if inputs[0].dim() else 1 for inputs in few)}
    seen = few if calibration is None else _few(calibration)
    with torch.no_grad():
        floats = [reference.run(*inputs) for inputs in few]
        found = _error(Simulator(graph, plan, arithmetic), few, floats)
        try:
            plain = _error(Simulator(reference, _plain(reference, plan, seen), arithmetic), few, floats)
        except BitportError as error:  # a bias, say, that only fits because a step made room for it
            absent(record, "plain_sqnr_db", f"plain rounding isn't possible here: {error}")
            return {**record, "sqnr_db": finite(found), "holds": True}
    return {
        **record,
        "sqnr_db": finite(found),
        "plain_sqnr_db": finite(plain),
        "holds": _holds(found, plain),
    }


def _holds(found: float, plain: float) -> bool:
    """Whether a result (dB) is near enough to plain rounding. NaN, of outputs that aren't numbers, never is."""
    if math.isnan(found) or math.isnan(plain):
        return math.isnan(plain)
    wanted = EXACT_DB if plain == math.inf else plain
    return found >= wanted - max(ALLOWED_DB, ALLOWED_SHARE * wanted)


def hint(record: Mapping[str, Any]) -> list[str]:
    """What to tell of a result that is further from float than plain rounding is."""
    found, plain = record.get("sqnr_db"), record.get("plain_sqnr_db")
    if found is None or plain is None or found >= plain - TOLD_DB:
        return []
    return [
        f"plain rounding would be nearer to the float outputs ({plain:.1f} dB against {found:.1f} dB): try "
        'range = "minmax", or effort = "balanced", which rounds for the outputs'
    ]


def _few(batches: Iterable[Sequence[Tensor]]) -> list[Sequence[Tensor]]:
    few: list[Sequence[Tensor]] = []
    seen = 0
    for inputs in batches:
        few.append(inputs)
        seen += len(inputs[0]) if inputs[0].dim() else 1
        if seen >= SAMPLES:
            break
    return few


def _error(simulator: Simulator, few: list[Sequence[Tensor]], floats: list[tuple[Tensor, ...]]) -> float:
    stats = ErrorStats()
    for inputs, real in zip(few, floats, strict=True):
        for wanted, found in zip(real, simulator.run(inputs), strict=True):
            if wanted.is_floating_point():
                stats.update(wanted, found)
    return stats.sqnr_db


def _plain(reference: Graph, plan: Plan, few: list[Sequence[Tensor]]) -> Plan:
    ends = _extremes(reference, plan, few)
    changed: dict[str, TensorPlan] = {}
    for name, tie in plan.ties.items():
        if tie.source == "weight":
            weights = [reference.tensor(member).detach() for member in tie.members]
            weight = weights[0] if len(weights) == 1 else torch.cat([w.reshape(-1) for w in weights])
            grid = fit(weight, tie.format, "minmax")
            changed[name] = replace(tie, scale=grid.scale, zero_point=grid.zero_point, table=grid.table)
        elif tie.source == "measured" and name in ends:
            given = tie.given_in(reference)
            scale, zero_point = (
                qparams(*ends[name], tie.format) if given is None else requantized_qparams(*given, tie.format)
            )
            changed[name] = replace(tie, scale=scale, zero_point=zero_point)
    return settle(plan.with_ties(changed))


def _extremes(reference: Graph, plan: Plan, few: list[Sequence[Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """The smallest and the largest value of every measured tie."""
    ties: dict[str, list[str]] = {}
    found: dict[str, tuple[Tensor, Tensor]] = {}
    constants = constant_names(reference)

    def add(tie: str, value: Tensor) -> None:
        finite = value[torch.isfinite(value)].double()
        if finite.numel():
            low, high = torch.aminmax(finite)
            before = found.get(tie, (low, high))
            found[tie] = (torch.minimum(low, before[0]), torch.maximum(high, before[1]))

    for name, tie in plan.measured().items():
        for member in tie.members:
            if member in constants:
                add(name, reference.tensor(member).detach())
            else:
                ties.setdefault(member, []).append(name)

    def look(node: fx.Node, value: Any) -> None:
        for tie in ties.get(reference.name(node), ()):
            add(tie, value)

    for inputs in few:
        reference.run(*inputs, on_value=look)
    return found
