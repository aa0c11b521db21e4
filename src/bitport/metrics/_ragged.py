"""Rows of which every sample has its own number, taken by sample as fast as the bootstrap needs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt


class Ragged:
    """`counts[i]` rows of `values` [M, K] belong to sample i, in order.

    It behaves as an array of samples: `len` is their number N, and indexing with an array of sample numbers
    gives those samples.
    """

    def __init__(self, values: npt.NDArray[Any], counts: npt.NDArray[np.int64]) -> None:
        self.values, self.counts = values, counts

    @classmethod
    def of(cls, samples: Sequence[npt.NDArray[Any]], columns: int) -> Self:
        """From one array [Mᵢ, columns] per sample."""
        values = np.concatenate([np.empty((0, columns)), *samples])
        return cls(values, np.array([len(rows) for rows in samples], np.int64))

    @classmethod
    def joined(cls, parts: Sequence[Ragged]) -> Self:
        """The samples of all parts, one part after the other."""
        values = np.concatenate([part.values for part in parts])
        return cls(values, np.concatenate([part.counts for part in parts]))

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, samples: npt.NDArray[np.int64]) -> Ragged:
        starts, counts = (np.cumsum(self.counts) - self.counts)[samples], self.counts[samples]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return Ragged(self.values[np.repeat(starts, counts) + within], counts)
