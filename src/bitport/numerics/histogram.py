"""A streaming histogram whose merging is exact and associative to the byte.

Bins are 2^k wide and mirrored at 0: bin j ≥ 0 holds j·2^k ≤ x < (j+1)·2^k, and bin −1−j holds the negatives
with j·2^k ≤ −x < (j+1)·2^k. k is the smallest integer ≥ −126 for which the bins that cover
[min(minimum, 0), max(maximum, 0)] number at most 4096: it follows from the exact extremes of all values seen.
Because a bin of width 2^(k+1) is the union of two of width 2^k, counts do not depend on when the range grew:
any order and grouping of the same values gives the same bins, extremes and counts.

Beside the bins it keeps one `Update` for each tensor it saw, in order: merging appends, so that any grouping of a
merge in one order gives the same bytes. Sums over updates are rounded once (`math.fsum`), so that they don't depend
on the order either.

Legend: B bins, B+1 edges.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitport.errors import DataError

MAX_BINS = 4096
# 2^126 is the largest power of two whose product with a float32 below 2^-114 can't overflow.
_SMALLEST_EXPONENT = -126
# Elements binned at a time: their temporaries stay in the processor's cache.
_CHUNK = 2**18
# Elements summed at a time by one thread, so that sums don't depend on the number of threads.
_ROW = 2**12


class Update(NamedTuple):
    """What one tensor added: its extremes, the number of finite values, their sum and the sum of their squares.

    The sums are float64; beyond its range they are the largest float64.
    """

    low: float
    high: float
    number: int
    total: float
    squares: float


class Histogram:
    """Exact minimum, maximum and counts of a stream of tensors, and their distribution in at most 4096 bins.

    Cost of `update`: one pass for the extremes, and eight light ones in cache (scale, truncate, sign, count, zeros,
    sums): 10 to 12 ms of one core for 4 M float32 elements, where the 3×3 convolution of 64 channels before them
    takes about 100.

    A value far out costs resolution: one of 4096 times the others' size leaves all others in one or two bins.

    Attributes:
        minimum, maximum: exact extremes of the finite values; 0.0 while there are none.
        count: how many finite values were seen.
        nonfinite: how many NaN and infinite values were seen; they are left out of everything else.
        zeros: how many values were exactly 0.
        exponent, first: bins are 2^exponent wide; the lowest holds the values from first · 2^exponent on.
        counts: int64 [B] on the CPU, from the lowest bin to the highest; [0] while there are no values.
        updates: one for each tensor with finite values, in the order they came in.
    """

    __slots__ = ("counts", "exponent", "first", "maximum", "minimum", "nonfinite", "updates", "zeros")

    def __init__(self) -> None:
        self.minimum = 0.0
        self.maximum = 0.0
        self.nonfinite = 0
        self.zeros = 0
        self.updates: list[Update] = []
        self.exponent, self.first, _ = _layout(0.0, 0.0)
        self.counts = torch.zeros(0, dtype=torch.int64)

    @property
    def count(self) -> int:
        return int(self.counts.sum())

    def update(self, x: Tensor) -> None:
        """Add the values of a tensor of any shape, real dtype and device; an empty one adds nothing."""
        values = x.detach()
        if values.dtype != torch.float64:
            # Integers of 32 bits and more are exact in float64 only.
            wide = values.dtype in (torch.int32, torch.int64)
            values = values.to(torch.float64 if wide else torch.float32)
        values = values.reshape(-1)
        if values.numel() == 0:
            return
        low, high = _extremes(values)
        if not (math.isfinite(low) and math.isfinite(high)):
            finite = values[torch.isfinite(values)]
            self.nonfinite += values.numel() - finite.numel()
            if finite.numel() == 0:
                return
            values = finite
            low, high = _extremes(values)
        self._widen(low, high)
        self.counts += _count(values, self.exponent, self.first, self.counts.numel(), signed=low < 0)
        zeros, total, squares = _sums(values)
        self.zeros += zeros
        self.updates.append(Update(low + 0.0, high + 0.0, values.numel(), total, squares))

    def merge(self, other: Histogram) -> Histogram:
        """The histogram of both streams, the updates of `other` behind those of this one; neither changes."""
        merged = Histogram()
        for part in (self, other):
            merged.nonfinite += part.nonfinite
            merged.zeros += part.zeros
            merged.updates += part.updates
            if part.counts.numel():
                merged._widen(part.minimum, part.maximum)
        for part in (self, other):
            if part.counts.numel():
                merged.counts += part._rebinned(merged.exponent, merged.first, merged.counts.numel())
        return merged

    def as_one_update(self, *always: Histogram) -> Histogram:
        """This histogram, its updates taken for a single one; it doesn't change itself.

        Args:
            always: values that belong to every update of this stream without being counted again, such as constants:
                the extremes of the single update include theirs.
        """
        joined = self.merge(Histogram())
        if joined.updates:
            reach = [self, *(other for other in always if other.updates)]
            joined.updates = [
                Update(
                    min(part.minimum for part in reach),
                    max(part.maximum for part in reach),
                    self.count,
                    exact_sum(update.total for update in self.updates),
                    exact_sum(update.squares for update in self.updates),
                )
            ]
        return joined

    @property
    def mean(self) -> float:
        """The mean of the finite values, from sums in float64; 0.0 while there are none."""
        return exact_sum(update.total for update in self.updates) / max(self.count, 1)

    @property
    def deviation(self) -> float:
        """The standard deviation of the finite values (of all, not an estimate for a sample); 0.0 without any."""
        squares = exact_sum(update.squares for update in self.updates) / max(self.count, 1)
        return math.sqrt(max(squares - self.mean * self.mean, 0.0))

    def edges(self) -> Tensor:
        """The bins' edges, float64 [B+1], the outer ones drawn in to minimum and maximum (or to 0)."""
        first = torch.arange(self.first, self.first + self.counts.numel() + 1, dtype=torch.float64)
        return (first * 2.0**self.exponent).clamp(min(self.minimum, 0.0), max(self.maximum, 0.0))

    def to_json(self) -> dict[str, Any]:
        """A record of plain numbers; `from_json` gives an equal histogram back."""
        return {
            "minimum": self.minimum,
            "maximum": self.maximum,
            "nonfinite": self.nonfinite,
            "zeros": self.zeros,
            "counts": self.counts.tolist(),
            "updates": [list(update) for update in self.updates],
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Histogram:
        """The histogram of a record made by `to_json`.

        Raises:
            DataError: the record is not one that `to_json` makes.
        """
        result = cls()
        try:
            low, high = float(record["minimum"]), float(record["maximum"])
            counts = torch.tensor(record["counts"], dtype=torch.int64)
            result.nonfinite, result.zeros = int(record["nonfinite"]), int(record["zeros"])
            result.updates = [
                Update(float(a), float(b), int(n), float(t), float(s)) for a, b, n, t, s in record["updates"]
            ]
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise DataError(f"histogram record is malformed ({error}): calibrate again") from error
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise DataError(f"histogram record has the range [{low}, {high}]: calibrate again")
        if counts.numel():
            result._widen(low, high)
        sound = counts.shape == result.counts.shape and bool((counts >= 0).all()) and result.nonfinite >= 0
        if not (sound and 0 <= result.zeros <= int(counts.sum())):
            raise DataError("histogram record has counts that don't match its range: calibrate again")
        result.counts = counts
        if not result._updates_are_sound():
            raise DataError("histogram record has updates that don't match its counts: calibrate again")
        return result

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Histogram) and self.to_json() == other.to_json()

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return (
            f"Histogram(minimum={self.minimum}, maximum={self.maximum}, count={self.count}, "
            f"nonfinite={self.nonfinite}, bins={self.counts.numel()} of 2^{self.exponent})"
        )

    def _updates_are_sound(self) -> bool:
        numbers = [number for update in self.updates for number in update]
        if not all(map(math.isfinite, numbers)) or any(u.number < 1 or u.low > u.high for u in self.updates):
            return False
        return sum(update.number for update in self.updates) == self.count

    def _widen(self, low: float, high: float) -> None:
        """Make room for values from low to high."""
        if self.counts.numel():
            low, high = min(low, self.minimum), max(high, self.maximum)
        # Adding 0.0 turns −0.0 into 0.0, which would otherwise depend on the order of the values.
        self.minimum, self.maximum = low + 0.0, high + 0.0
        exponent, first, bins = _layout(self.minimum, self.maximum)
        if (exponent, first, bins) != (self.exponent, self.first, self.counts.numel()):
            self.counts = self._rebinned(exponent, first, bins)
            self.exponent, self.first = exponent, first

    def _rebinned(self, exponent: int, first: int, bins: int) -> Tensor:
        """The counts in wider bins; int64 [bins]."""
        rebinned = torch.zeros(bins, dtype=torch.int64)
        old = torch.arange(self.first, self.first + self.counts.numel())
        # An arithmetic shift is the floor, which maps bin −1−j to −1−(j >> shift): mirrors stay mirrors.
        shift = min(exponent - self.exponent, 62)
        return rebinned.index_add_(0, (old >> shift) - first, self.counts)


def _extremes(values: Tensor) -> tuple[float, float]:
    low, high = torch.aminmax(values)
    return float(low), float(high)


def exact_sum(values: Iterable[float]) -> float:
    """The sum of finite numbers, rounded once; the largest float64 of its sign where it is larger."""
    listed = list(values)
    try:
        total = math.fsum(listed)
    except (OverflowError, ValueError):
        total = math.inf if sum(value * 2.0**-64 for value in listed) > 0 else -math.inf
    # Adding 0.0 turns −0.0 into 0.0.
    return max(-sys.float_info.max, min(sys.float_info.max, total)) + 0.0


def _sums(values: Tensor) -> tuple[int, float, float]:
    """(number of zeros, Σ x, Σ x²) of finite `values` [N], the sums in float64."""
    zeros, totals, squares = 0, [], []
    wide = torch.empty(min(values.numel(), _CHUNK), dtype=torch.float64, device=values.device)
    equal = torch.empty_like(wide)
    for part in torch.split(values, _CHUNK):
        size = part.numel()
        whole = size // _ROW * _ROW
        wide[:size].copy_(part)
        # A comparison that gives numbers runs many times as fast as one that gives booleans to count.
        zeros += int(torch.eq(wide[:size], 0, out=equal[:size]).sum())
        rows = [wide[:whole].view(-1, _ROW), wide[whole:size].view(1, -1)]
        totals += [total for row in rows for total in row.sum(1).tolist()]
        squares += [total for row in rows for total in row.square_().sum(1).tolist()]
    return zeros, exact_sum(totals), exact_sum(squares)


def _layout(minimum: float, maximum: float) -> tuple[int, int, int]:
    """(k, index of the lowest bin, number of bins) for values from minimum to maximum."""
    low, high = min(minimum, 0.0), max(maximum, 0.0)
    if low == high:
        return _SMALLEST_EXPONENT, 0, 1
    exponent = max(_SMALLEST_EXPONENT, math.frexp(max(-low, high))[1] - 13)
    while True:
        last = int(math.ldexp(high, -exponent))
        first = -1 - int(math.ldexp(-low, -exponent)) if low < 0 else 0
        if last - first < MAX_BINS:
            return exponent, first, last - first + 1
        exponent += 1


def _count(values: Tensor, exponent: int, first: int, bins: int, *, signed: bool) -> Tensor:
    """Counts of `values` [N] per bin; int64 [bins] on the CPU."""
    counts = torch.zeros(bins, dtype=torch.int64, device=values.device)
    factor = 2.0**-exponent
    for part in torch.split(values, _CHUNK):
        # The conversion truncates towards 0; where the product underflows to 0, the sign is still known.
        index = (part * factor).to(torch.int32)
        if signed:
            index -= (part < 0).to(torch.int32)
        index -= first
        counts += torch.bincount(index, minlength=bins)
    return counts.cpu()
