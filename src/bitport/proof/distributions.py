"""Where the numbers of each tensor lie, and what its range cuts off: weights and activations as small histograms.

Weights are the float network's own, with the scales that a step moved between them; activations come from a float
pass over the first evaluation samples, so that what is clipped there is what the range, chosen on other data, really
costs. Streams: only counts are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ..data import Source
from ..formats import Format
from ..graph import Graph
from ..graph.reading import constant_names
from ..numerics.arithmetic import along, grouped
from ..numerics.histogram import Histogram
from ..plan import Plan, TensorPlan
from ..plan.model import LOCAL
from ..progress import Progress

SAMPLES = 256
MOST_BINS = 64
_FEW_BINS = 16
_ENOUGH = 16_384  # bins in all: the record of a network with a thousand tensors stays below a few megabytes


@dataclass
class _Tensor:
    """One tie under observation. `low` and `high` are its lowest and highest number, `step` their distance."""

    name: str
    layer: str
    what: str
    format: Format
    low: float
    high: float
    step: float
    unit: str = "value"
    members: tuple[str, ...] = ()
    # two, because one value far out would leave a histogram of all without any detail inside the range
    kept: Histogram = field(default_factory=Histogram)
    clipped: Histogram = field(default_factory=Histogram)

    @property
    def limits(self) -> tuple[float, float]:
        """Values beyond are clipped, not merely rounded: they lie further than half a step outside the range."""
        return self.low - self.step / 2, self.high + self.step / 2

    @property
    def count(self) -> int:
        return self.kept.count + self.clipped.count

    def update(self, values: Tensor) -> None:
        """Count the finite values of a tensor of any shape."""
        values = values.detach().flatten()
        if not values.numel():
            return
        low, high = (float(value) for value in torch.aminmax(values))
        if not (math.isfinite(low) and math.isfinite(high)):
            self.update(values[torch.isfinite(values)])
        elif self.limits[0] <= low and high <= self.limits[1]:
            self.kept.update(values)
        else:
            inside = (values >= self.limits[0]) & (values <= self.limits[1])
            self.kept.update(values[inside])
            self.clipped.update(values[~inside])

    def record(self, bins: int) -> dict[str, Any]:
        edges, counts = _binned(self, bins)
        return {
            "tensor": self.name,
            "layer": self.layer,
            "what": self.what,
            "format": str(self.format),
            "granularity": self.format.granularity,
            "unit": self.unit,
            "edges": edges,
            "counts": counts,
            "range": [_short(self.low), _short(self.high)],
            "clipped_share": self.clipped.count / self.count,
            "of": self.count,
        }


def distributions(
    reference: Graph, plan: Plan, evaluation: Source, progress: Progress
) -> list[dict[str, Any]]:
    """Histograms of every weight and activation that the plan stores as integers, in network order.

    Args:
        reference: the float network, folded, its scales moved as in the plan, nothing rounded.
        plan: a plan whose parameters are all known.
        evaluation: the first batches are used, until `SAMPLES` samples were seen.

    Returns: for each tensor `tensor`, `layer` (the operator it belongs to), `what` ("weights", "activations"),
        `format`, `granularity`, `unit`, `edges` [n+1], `counts` [n], `range` [low, high], `clipped_share` (values
        further than half a step outside the range) and `of` (finite values). A weight with a scale per channel or
        group is given in steps of it (`unit` "steps"), so that one range holds for all; else `unit` is "value".
    """
    order = {reference.name(node): index for index, node in enumerate(reference.gm.graph.nodes)}
    weights = _weights(reference, plan, order)
    activations = _activations(reference, plan, order)
    _observe(reference, activations, evaluation, progress)
    found = [tensor for tensor in (*weights, *activations) if tensor.count]
    found.sort(key=lambda tensor: (order.get(tensor.layer, -1), tensor.what == "activations", tensor.name))
    bins = max(_FEW_BINS, min(MOST_BINS, _ENOUGH // max(1, len(found))))
    return [tensor.record(bins) for tensor in found]


def _weights(reference: Graph, plan: Plan, order: Mapping[str, int]) -> list[_Tensor]:
    used_by: dict[str, str] = {}
    for edge, name in plan.edges.items():
        if name not in used_by or order.get(edge.consumer, 0) < order.get(used_by[name], 0):
            used_by[name] = edge.consumer
    found = []
    for name, tie in plan.ties.items():
        if tie.source != "weight" or name not in used_by or not tie.format.is_int or tie.scale is None:
            continue
        for member in tie.members:
            value = reference.tensor(member).detach()
            tensor = _of(member, used_by[name], "weights", tie)
            if tie.scale.numel() > 1:
                low, high = (code - tie.format.zero_point for code in (tie.format.low, tie.format.high))
                tensor.unit, tensor.low, tensor.high, tensor.step = "steps", low, high, 1.0
                value = _in_steps(value, tie)
            tensor.update(value)
            found.append(tensor)
    return found


def _activations(reference: Graph, plan: Plan, order: Mapping[str, int]) -> list[_Tensor]:
    producers: dict[str, list[str]] = {}
    for edge, name in plan.edges.items():
        if edge.producer not in producers.setdefault(name, []):
            producers[name].append(edge.producer)
    constants = constant_names(reference)
    found = []
    for name, tie in plan.ties.items():
        if tie.source in LOCAL or not tie.format.is_int or tie.scale is None:
            continue
        members = tie.members or tuple(producers.get(name, ()))
        made = [member for member in members if member in order]
        if made:
            first = min(made, key=order.__getitem__)
            tensor = _of(first, first, "activations", tie)
            tensor.members = members
            for member in set(members) & constants:
                tensor.update(reference.tensor(member).detach())
            found.append(tensor)
    return found


def _of(name: str, layer: str, what: str, tie: TensorPlan) -> _Tensor:
    scale, zero_point = (float(value.flatten()[0]) for value in tie.parameters())
    low, high = ((code - zero_point) * scale for code in (tie.format.low, tie.format.high))
    return _Tensor(name, layer, what, tie.format, low, high, scale)


def _in_steps(value: Tensor, tie: TensorPlan) -> Tensor:
    """Values in steps of their own scale, each moved so that all have the zero point of a symmetric format."""
    axis, moved = tie.format.axis or 0, [part.float() for part in tie.parameters()]
    if tie.format.group:
        scale, zero_point = (grouped(part, value.shape, axis, tie.format.group) for part in moved)
    else:
        scale, zero_point = (along(part, value.dim(), axis) for part in moved)
    return value / scale + (zero_point - tie.format.zero_point)


def _observe(reference: Graph, tensors: list[_Tensor], evaluation: Source, progress: Progress) -> None:
    watched: dict[str, list[_Tensor]] = {}
    for tensor in tensors:
        for member in tensor.members:
            watched.setdefault(member, []).append(tensor)

    def look(node: fx.Node, value: Any) -> None:
        for tensor in watched.get(reference.name(node), ()):
            tensor.update(value)

    with progress.task("looking at distributions") as task, torch.no_grad():
        for inputs in _first_samples(evaluation):
            reference.run(*inputs, on_value=look)
            task.advance(1)


def _first_samples(evaluation: Source) -> Iterator[tuple[Tensor, ...]]:
    seen = 0
    for batch in evaluation:
        inputs = tuple(batch.inputs)
        yield inputs
        seen += len(inputs[0]) if inputs and inputs[0].dim() else 1
        if seen >= SAMPLES:
            return


# ------------------------------------------------------------------------------------------------ bins


def _binned(tensor: _Tensor, bins: int) -> tuple[list[float], list[int]]:
    """(edges, counts): bins of one width that end where clipping begins; the tails in bins a whole number of times
    as wide, where they are long."""
    edges = _edges(tensor, bins)
    low, high = tensor.limits
    middles = [_middles(histogram) for histogram in (tensor.kept, tensor.clipped)]
    # the middle of a coarse bin may lie inside the range, none of its values does
    middles[1] = torch.where(
        middles[1] > 0, middles[1].clamp(min=high), middles[1].clamp(max=math.nextafter(low, -math.inf))
    )
    counts = torch.zeros(len(edges) - 1, dtype=torch.int64)
    for middle, histogram in zip(middles, (tensor.kept, tensor.clipped), strict=True):
        where = torch.bucketize(middle, torch.tensor(edges[1:-1], dtype=torch.float64), right=True)
        counts.index_add_(0, where, histogram.counts)
    return [_short(edge) for edge in edges], counts.tolist()


def _middles(histogram: Histogram) -> Tensor:
    edges = histogram.edges()
    return (edges[:-1] + edges[1:]) / 2


def _edges(tensor: _Tensor, bins: int) -> list[float]:
    low, high = tensor.limits
    left = max(0.0, low - tensor.clipped.minimum)
    right = max(0.0, tensor.clipped.maximum - high)
    fits = int(bins * (high - low) / (left + high - low + right))
    # a long tail may not starve the range of bins, and two tails need one bin each; a bin is at least one integer
    inside = min(max(fits, bins // 4), bins - (left > 0) - (right > 0), tensor.format.levels)
    width = (high - low) / inside
    wide, room = 1, bins - inside
    while _tail(left, width * wide) + _tail(right, width * wide) > max(room, (left > 0) + (right > 0)):
        wide *= 2
    before = [low - width * wide * i for i in range(_tail(left, width * wide), 0, -1)]
    after = [high + width * wide * i for i in range(1, _tail(right, width * wide) + 1)]
    return [*before, *(low + width * i for i in range(inside)), high, *after]


def _tail(length: float, width: float) -> int:
    return math.ceil(length / width)


def _short(value: float) -> float:
    """Seven digits are more than a chart can show, and a third of the text."""
    return float(f"{value:.7g}")
