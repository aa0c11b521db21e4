"""Calibration inputs for a network that nobody has data for: noise that its BatchNorms take for what they know.

A last resort. Ranges and figures that come of it say nothing certain of real data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from .errors import DataError
from .graph import Graph
from .numerics.inversion import moment_distance
from .progress import NullProgress, Progress

WORD = "synthetic"  # what is given in the place of data
SAMPLES, BATCH = 64, 16
STEPS = 40  # of the optimizer, a batch; beyond, the distance hardly falls
RATE = 0.1  # of an input's deviation that it moves a step, at most, at the start

Sampler = Callable[[tuple[int, ...], torch.Generator], Tensor]


def inputs(graph: Graph, seed: int = 0, progress: Progress | None = None) -> list[tuple[Tensor, ...]]:
    """Batches of made-up inputs, the same for the same seed.

    Float inputs are normal noise in the range of the example that the network was loaded with, moved until the means
    and variances in front of all BatchNorms are those that these hold (Cai et al. 2020, arXiv:2001.00281); without
    BatchNorm they stay noise. Integers are drawn from the rows of the embedding that reads them, or from the range of
    the example.

    Args:
        graph: as it was loaded, its BatchNorms not folded yet.

    Raises DataError for an integer input of which nothing tells the range.
    """
    generator = torch.Generator().manual_seed(seed)
    samplers = [_sampler(graph, index) for index in range(len(graph.inputs))]
    axis = graph.inputs[0].shape[0] if graph.inputs and graph.inputs[0].shape else None
    batched = isinstance(axis, str)
    sizes = {**graph.sizes, **({axis: BATCH} if isinstance(axis, str) else {})}
    shapes = [tuple(sizes[n] if isinstance(n, str) else n for n in spec.shape) for spec in graph.inputs]
    norms = _norms(graph)
    made = []
    count = SAMPLES // BATCH if batched else SAMPLES
    with (progress or NullProgress()).task("making inputs up", count) as task:
        for _ in range(count):
            drawn = [sample(shape, generator) for sample, shape in zip(samplers, shapes, strict=True)]
            made.append(_learned(graph, drawn, norms) if norms else tuple(drawn))
            task.advance(1)
    return made


def _norms(graph: Graph) -> dict[fx.Node, list[tuple[Tensor, Tensor]]]:
    """What stands in front of BatchNorms → the (mean, variance) that they hold."""
    found: dict[fx.Node, list[tuple[Tensor, Tensor]]] = {}
    for node in graph.nodes():
        op = graph.op(node)
        if op.kind != "batch_norm" or len(op.operands) < 5:
            continue
        source, mean, variance = op.operands[0], op.operands[3], op.operands[4]
        if source and source.node is not None and mean and mean.tensor and variance and variance.tensor:
            stored = (graph.tensor(mean.tensor).detach(), graph.tensor(variance.tensor).detach())
            found.setdefault(source.node, []).append(stored)
    return found


def _learned(
    graph: Graph, drawn: Sequence[Tensor], norms: dict[fx.Node, list[tuple[Tensor, Tensor]]]
) -> tuple[Tensor, ...]:
    learned = [x for x in drawn if x.is_floating_point()]
    if not learned:
        return tuple(drawn)
    ranges = [(float(x.min()), float(x.max())) for x in learned]
    spreads = [float(x.std()) if x.numel() > 1 else 1.0 for x in learned]
    for x in learned:
        x.requires_grad_()
    groups = [
        {"params": [x], "lr": RATE * max(spread, 1e-6)} for x, spread in zip(learned, spreads, strict=True)
    ]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    best, kept = float("inf"), [x.detach().clone() for x in learned]
    for _ in range(STEPS):
        distance = _distance(graph, drawn, norms)
        value = float(distance.detach())
        if value < best:
            best, kept = value, [x.detach().clone() for x in learned]
        optimizer.zero_grad()
        torch.autograd.backward(distance, inputs=learned)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for x, (low, high) in zip(learned, ranges, strict=True):
                x.clamp_(low, high)
    floats = iter(kept)
    return tuple(next(floats) if x.is_floating_point() else x for x in drawn)


def _distance(
    graph: Graph, drawn: Sequence[Tensor], norms: dict[fx.Node, list[tuple[Tensor, Tensor]]]
) -> Tensor:
    parts: list[Tensor] = []

    def look(node: fx.Node, value: object) -> None:
        if isinstance(value, Tensor):
            parts.extend(moment_distance(value, *stored) for stored in norms.get(node, ()))

    graph.run(*drawn, on_value=look)
    return torch.stack(parts).mean()


# ------------------------------------------------------------------------------------------- what is drawn


def _sampler(graph: Graph, index: int) -> Sampler:
    spec = graph.inputs[index]
    known = graph.examples.get(spec.name)
    if spec.dtype == torch.bool:
        return lambda shape, generator: torch.rand(shape, generator=generator) < 0.5
    if spec.dtype.is_floating_point:
        low, high = known or (-3.0, 3.0)
        middle, spread = (low + high) / 2, (high - low) / 6 or 1.0

        def noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
            found = middle + spread * torch.randn(shape, generator=generator)
            return found.clamp(min(low, middle), max(high, middle)).to(spec.dtype)

        return noise
    rows = _rows_read_by(graph, index)
    if rows is None and known is None:
        raise DataError(
            f"nothing tells which integers input {spec.name!r} takes, so that none can be made up: give data"
        )
    low, high = (0, rows - 1) if rows is not None else tuple(map(int, known or (0, 0)))
    return lambda shape, generator: torch.randint(low, high + 1, shape, generator=generator, dtype=spec.dtype)


def _rows_read_by(graph: Graph, index: int) -> int | None:
    """How many rows the smallest embedding has that reads an input."""
    node = list(graph.gm.graph.find_nodes(op="placeholder"))[index]
    found = []
    for user in node.users:
        op = graph.op(user) if user.op.startswith("call") else None
        if op is not None and op.kind == "embedding":
            table = next((o.tensor for o in op.operands if o is not None and o.tensor is not None), None)
            if table is not None:
                found.append(graph.tensor(table).shape[0])
    return min(found, default=None)
