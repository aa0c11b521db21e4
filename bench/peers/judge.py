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
    by_seed: tuple[Interval, ...] = ()
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

    @property
    def median_peer(self) -> str | None:
        """The peer in the middle; of two in the middle the better one."""
        ranked = sorted(self.ran, key=lambda name: _drop(self.ran[name]))
        return ranked[(len(ranked) - 1) // 2] if ranked else None

    def against(self, peer: str | None, effort: str) -> Interval | None:
        """What ours loses against a peer, paired; below 0: it is ahead, 0 inside: a tie. None: one didn't run."""
        own = self.ours.get(effort, Entry()).scores
        other = None if peer is None else self.peers[peer].scores
        return None if own is None or other is None else loss(other, own, text=self.text)


def at_or_above(gap: Interval) -> bool:
    """Ahead of the other, or tied with it."""
    return gap.low <= 0


def pooled(
    references: Sequence[Scores], others: Sequence[Scores], seconds: Sequence[float], *, text: bool
) -> Entry:
    """One entry of several seeds' scores: every sample of every seed is a pair. seconds: the median counts."""
    together = np.concatenate(others)
    return Entry(
        loss(np.concatenate(references), together, text=text),
        tuple(loss(*pair, text=text) for pair in zip(references, others, strict=True)),
        median(seconds),
        together,
    )


def _drop(entry: Entry) -> float:
    assert entry.loss is not None
    return entry.loss.drop
