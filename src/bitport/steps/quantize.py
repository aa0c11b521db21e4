"""Write the Plan: which edges become integers of which format, by the target's rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..errors import FormatError, RecipeError, WeightsError
from ..formats import Format
from ..graph import Graph
from ..numerics.codes import Grid, fit
from ..numerics.losses import losses
from ..numerics.quantize import qparams
from ..numerics.ranges import (
    Histogram,
    choose_symmetry,
    choose_symmetry_of_weights,
    weight_ranges,
    weights_range,
)
from ..plan import Plan, TensorOptions, TensorPlan, decide
from ..plan.constants import is_plain
from ._base import Context


@dataclass(frozen=True)
class Options:
    """Knobs of `quantize`.

    weights: format, granularity ("global", "tensor", "channel" or "group"), group, range, symmetric.
    activations: format, range, symmetric, dynamic, granularity ("tensor" or "global").
    """

    weights: Mapping[str, Any] = field(default_factory=dict)
    activations: Mapping[str, Any] = field(default_factory=dict)


FINE_SCALE = 2.0**-20  # of weights that are all zero; `calibrate` raises it where a bias needs more room
WEIGHTS = TensorOptions(format="int8", range="minmax")
ACTIVATIONS = TensorOptions(format="int8", range="mse")


def run(graph: Graph, plan: Plan, context: Context, options: Options) -> tuple[Graph, Plan]:
    """Decide the plan and take the ranges of weights, which need no data.

    Raises RecipeError when nothing in the network can be quantized on this target.
    """
    plan = decide(
        graph,
        context.rules,
        weights=WEIGHTS.changed(options.weights),
        activations=ACTIVATIONS.changed(options.activations),
        overrides=context.overrides,
    )
    if not plan.quantized:
        reasons = sorted({n.reason for n in plan.nodes.values() if n.reason})
        raise RecipeError(
            f"nothing to do: no operator of this network can run in integers ({'; '.join(reasons)})"
        )
    return graph, fit_weights(graph, plan, context)


def fit_weights(graph: Graph, plan: Plan, context: Context) -> Plan:
    """The plan with the ranges of a graph's weights; what they lose is noted.

    Raises FormatError, WeightsError naming the weight that its format can't hold.
    """
    changed = {
        name: _fitted(graph, tie, context) for name, tie in plan.ties.items() if tie.source == "weight"
    }
    return plan.with_ties(changed)


def _fitted(graph: Graph, tie: TensorPlan, context: Context) -> TensorPlan:
    """A weight's tie with its parameters. Raises FormatError, WeightsError naming the weight."""
    weights = {member: graph.tensor(member).detach() for member in tie.members}
    name = " and ".join(tie.members[:2])
    try:
        fmt, grid = _grid(list(weights.values()), tie)
    except (FormatError, WeightsError) as error:
        raise type(error)(f"{name}: {error}") from error
    for member, weight in weights.items():
        context.notes.extend(_lossy(member, weight, grid))
    scale = grid.scale
    if is_plain(fmt) and fmt.scale == "float32" and len(weights) == 1:
        # zeros fit any scale, but their bias is stored on it as well: a coarse one would round it away
        minimum, maximum = weight_ranges(next(iter(weights.values())), fmt, tie.range)
        scale = torch.where((minimum == 0) & (maximum == 0), FINE_SCALE, scale)
    return replace(tie, format=fmt, choose=False, scale=scale, zero_point=grid.zero_point, table=grid.table)


def _grid(weights: list[torch.Tensor], tie: TensorPlan) -> tuple[Format, Grid]:
    """What stores one weight, or several with one scale."""
    fmt = tie.format
    if len(weights) > 1 and fmt.is_int and fmt.scale == "float32":
        if tie.choose:
            every = Histogram()
            for part in weights:
                every.update(part)
            fmt = choose_symmetry(every, fmt, tie.range)
        return fmt, Grid(fmt, *qparams(*weights_range(weights, fmt, tie.range), fmt))
    weight = weights[0] if len(weights) == 1 else torch.cat([w.reshape(-1) for w in weights])
    if tie.choose:
        fmt = choose_symmetry_of_weights(weight, fmt, tie.range)
    return fmt, fit(weight, fmt, tie.range)


def _lossy(name: str, weight: torch.Tensor, grid: Grid) -> list[str]:
    """What to say of a weight that its range doesn't suit: one far outlier is enough."""
    found, fmt, notes = losses(weight, grid), grid.format, []
    if found.clipped:
        notes.append(
            f"{found.clipped} of {weight.numel()} values of {name!r} lie far outside its range and are clipped, "
            f"{100 * found.mass:.3g} % of the sum of its magnitudes"
        )
    if found.lost:
        groups = grid.scale.shape[1] if grid.scale.ndim == 2 else 1
        where = f" in channel {found.row // groups}" if grid.scale.ndim else ""
        become = "are lost" if fmt.kind == "codebook" else "become 0"
        why = "because others there are far larger: repair them, or "
        if found.all:
            why = f"being too small for {'its scales' if grid.scale.ndim or not fmt.unscaled else fmt}: "
        remedy = (
            "keep it in float32" if found.all or fmt.unscaled else 'give its weights range = "percentile"'
        )
        notes.append(f"{found.lost} values of {name!r}{where} {become}, {why}{remedy}")
    return notes
