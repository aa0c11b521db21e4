"""Write the Plan: which edges become integers of which format, by the target's rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..errors import RecipeError
from ..graph import Graph
from ..numerics.codes import fit
from ..numerics.quantize import qparams
from ..numerics.ranges import (
    Histogram,
    choose_symmetry,
    choose_symmetry_of_weights,
    weight_losses,
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
    changed = {
        name: _fitted(graph, tie, context) for name, tie in plan.ties.items() if tie.source == "weight"
    }
    return graph, plan.with_ties(changed)


def _fitted(graph: Graph, tie: TensorPlan, context: Context) -> TensorPlan:
    """A weight's tie with its parameters."""
    fmt, weights = tie.format, [graph.tensor(member).detach() for member in tie.members]
    if len(weights) > 1 and fmt.is_int:
        if tie.choose:
            every = Histogram()
            for part in weights:
                every.update(part)
            fmt = choose_symmetry(every, fmt, tie.range)
        scale, zero_point = qparams(*weights_range(weights, fmt, tie.range), fmt)
        return replace(tie, format=fmt, choose=False, scale=scale, zero_point=zero_point)
    weight = weights[0] if len(weights) == 1 else torch.cat([w.reshape(-1) for w in weights])
    if tie.choose:
        fmt = choose_symmetry_of_weights(weight, fmt, tie.range)
    grid = fit(weight, fmt, tie.range)
    scale = grid.scale
    if is_plain(fmt):
        minimum, maximum = weight_ranges(weight, fmt, tie.range)
        losses = weight_losses(weight, fmt, minimum, maximum, scale)
        context.notes.extend(_lossy(" and ".join(tie.members[:2]), weight.numel(), *losses))
        empty = (minimum == 0) & (maximum == 0)
        # zeros fit any scale, but their bias is stored on it as well: a coarse one would round it away
        scale = torch.where(empty, FINE_SCALE, scale)
    return replace(tie, format=fmt, choose=False, scale=scale, zero_point=grid.zero_point, table=grid.table)


def _lossy(name: str, values: int, clipped: int, flushed: int, channel: int) -> list[str]:
    """What to say of a weight that its range doesn't suit: one far outlier is enough."""
    notes = []
    if clipped:
        notes.append(f"{clipped} of {values} values of {name!r} lie far outside its range and are clipped")
    if flushed:
        notes.append(
            f"{flushed} values of {name!r} in channel {channel} become 0, because others there are far larger: "
            'repair them, or give its weights range = "percentile"'
        )
    return notes
