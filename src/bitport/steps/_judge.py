"""Which of two candidates is nearer to the float network: the error of their simulated outputs on batches held back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..data import Source
from ..graph import Graph
from ..numerics.error import ErrorStats
from ..plan import Plan
from ..simulate import Arithmetic, Simulator

Inputs = tuple[Tensor, ...]
HELD = 4  # one batch in so many
KEPT = 2**26  # bytes of the float network's outputs


def parted(calibration: Source, graph: Graph, samples: int) -> tuple[list[Inputs], list[Inputs]]:
    """(batches to work with, batches to judge by): the last quarter of the first `samples` samples is held back.

    A single batch is cut along its batch axis. Where there is nothing to cut, both are the same.
    """
    found: list[Inputs] = []
    seen = 0
    for batch in calibration:
        found.append(tuple(batch.inputs))
        seen += len(batch.inputs[0]) if batch.inputs and batch.inputs[0].dim() else 1
        if seen >= samples:
            break
    held = len(found) // HELD or int(len(found) > 1)
    if held:
        return found[:-held], found[-held:]
    if len(found) == 1 and has_batches(graph):
        count = len(found[0][0])
        cut = count - (count // HELD or int(count > 1))
        if 0 < cut < count:
            return [tuple(x[:cut] for x in found[0])], [tuple(x[cut:] for x in found[0])]
    return found, found


def samples_in(batches: Sequence[Inputs]) -> int:
    """How many samples they hold; an input without axes is one."""
    return sum(len(inputs[0]) if inputs[0].dim() else 1 for inputs in batches)


def split_batches(batches: Sequence[Inputs], graph: Graph, size: int) -> list[Inputs]:
    """The same samples in batches of at most `size`, where all inputs share a batch axis."""
    if not has_batches(graph):
        return list(batches)
    return [part for batch in batches for part in zip(*(torch.split(x, size) for x in batch), strict=True)]


def has_batches(graph: Graph) -> bool:
    """Whether all inputs share a batch axis, so that samples can be taken apart and put together."""
    shapes = [spec.shape for spec in graph.inputs]
    axis = shapes[0][0] if shapes and shapes[0] else None
    return isinstance(axis, str) and all(shape and shape[0] == axis for shape in shapes)


class Judge:
    """Noise against signal of candidates' simulated float outputs: Σ (ŷ − y)² / Σ y²; 0 without float outputs.

    Args:
        reference: the float network. What it makes of the batches is computed once, and kept where that is little.
        arithmetic: the target's.
        batches: what no candidate has learnt from.
    """

    def __init__(self, reference: Graph, arithmetic: Arithmetic, batches: Sequence[Inputs]) -> None:
        self.arithmetic, self.batches = arithmetic, batches
        self._reference = reference
        self._outputs: dict[int, tuple[Tensor, ...]] = {}
        self._room = KEPT

    def error(self, candidate: Graph, plan: Plan) -> float:
        """The error of a candidate under its plan."""
        simulator = Simulator(candidate, plan, self.arithmetic)
        stats = ErrorStats()
        with torch.no_grad():
            for index, inputs in enumerate(self.batches):
                for real, found in zip(self._wanted(index), simulator.run(inputs), strict=True):
                    if real.is_floating_point():
                        stats.update(real, found)
        return stats.relative

    def _wanted(self, index: int) -> tuple[Tensor, ...]:
        found = self._outputs.get(index)
        if found is None:
            found = self._reference.run(*self.batches[index])
            size = sum(y.numel() * y.element_size() for y in found)
            if size <= self._room:
                self._room -= size
                self._outputs[index] = found
        return found
