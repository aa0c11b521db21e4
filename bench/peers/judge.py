"""Outputs → losses with their intervals, and who is ahead of whom."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from bitport.numerics.intervals import Interval, paired_binary, paired_mean

Scores = npt.NDArray[np.float64]


def scores(outputs: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> Scores:
    """What a network's outputs are worth, larger is better: right or wrong of an image, −bits a byte of a stretch."""
    if labels.ndim == 1:
        return np.asarray(outputs.argmax(1) == labels, dtype=np.float64)
    logits, wanted = torch.from_numpy(outputs), torch.from_numpy(labels)
    lost = F.cross_entropy(logits.flatten(0, 1).double(), wanted.flatten(), reduction="none")
    return np.asarray(-lost.reshape(wanted.shape).mean(1).numpy() / math.log(2))


def loss(reference: Scores, other: Scores, *, text: bool) -> Interval:
    """What `other` loses against `reference`, paired, 95 %: in points of accuracy, or in percent of the bits."""
    if text:
        found, unit = paired_mean(reference - other, float(np.ptp(reference))), 100 / float(-reference.mean())
    else:
        found, unit = paired_binary(reference, other), 100.0
    return Interval(unit * found.drop, unit * found.low, unit * found.high, found.n, found.discordant)


@dataclass(frozen=True)
class Entry:
    """One entrant in one cell, over all seeds. Without scores: why there are none."""

    loss: Interval | None = None
    seconds: float = 0.0
    scores: Scores | None = None
    method: str = ""
    where: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Standing:
    """How a cell stands. Entrants are ours by effort, and peers by name."""

    text: bool
    ours: Mapping[str, Entry]
    peers: Mapping[str, Entry]
    ran: Mapping[str, Entry] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ran", {name: entry for name, entry in self.peers.items() if entry.loss})

    @property
    def best_peer(self) -> str | None:
        return min(self.ran, key=lambda name: _drop(self.ran[name]), default=None)

    @property
    def median_loss(self) -> float | None:
        """Of the peers; None where none ran."""
        return median(_drop(entry) for entry in self.ran.values()) if self.ran else None

    def beats_median(self, effort: str) -> bool | None:
        """At or above the median peer: loses no more, or no more than chance explains."""
        middle, own = self.median_loss, self.ours.get(effort, Entry())
        if middle is None or own.loss is None:
            return None
        return _drop(own) <= middle or own.loss.low <= middle

    def against_best(self, effort: str) -> Interval | None:
        """What ours loses against the best peer; below 0: it is ahead, 0 inside: a tie."""
        best, own = self.best_peer, self.ours.get(effort, Entry())
        if best is None or own.scores is None:
            return None
        other = self.ran[best].scores
        assert other is not None
        return loss(other, own.scores, text=self.text)

    def beats_best(self, effort: str) -> bool | None:
        """Ahead of the best peer, or tied with it."""
        found = self.against_best(effort)
        return None if found is None else found.drop <= 0 or found.low <= 0


def pooled(
    references: Sequence[Scores], others: Sequence[Scores], seconds: Sequence[float], *, text: bool
) -> Entry:
    """One entry of several seeds' scores: every sample of every seed is a pair. seconds: the median counts."""
    together = np.concatenate(others)
    return Entry(loss(np.concatenate(references), together, text=text), median(seconds), together)


def _drop(entry: Entry) -> float:
    assert entry.loss is not None
    return entry.loss.drop
