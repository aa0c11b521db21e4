"""Values that are looked up in a table: nf4, sign, and tables learned from a tensor.

Legend: S values of a table, ascending; N values of a tensor.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bitport.errors import FormatError

# Quantiles of a normal distribution with an exact 0, scaled to −1 … 1 (QLoRA, Dettmers et al. 2023,
# arXiv:2305.14314, appendix E).
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# XNOR-Net, Rastegari et al. 2016, arXiv:1603.05279: the sign times the mean magnitude; 0 counts as positive.
SIGN = (-1.0, 1.0)
_FIXED = {"nf4": NF4, "sign": SIGN}
_ROUNDS = 100
# Sums over sorted values are kept at every so many values only: 1/64 of the memory of all of them in float64.
_STRIDE, _PART = 128, 64


def fixed_table(name: str) -> Tensor:
    """The values of "nf4" or "sign", float32 [S].

    Raises:
        FormatError: the table is learned, so that no tensor-independent values exist.
    """
    if name not in _FIXED:
        raise FormatError(f"the codebook {name!r} has no fixed values: give the tensor's own table")
    return torch.tensor(_FIXED[name])


def nearest(x: Tensor, table: Tensor) -> Tensor:
    """The index of the nearest value of a table, int64, shape of x; half-way the higher one.

    Args:
        x: float32, any shape. table: float32 [S], ascending. Distances are compared exactly, in float64.
    """
    values = table.double()
    return torch.bucketize(x.double().contiguous(), (values[1:] + values[:-1]) / 2, right=True)


def learn(x: Tensor, size: int, *, scratch: bool = False) -> Tensor:
    """A table with a small squared error for the values of x, ascending, float32 [size].

    k-means in one dimension (Han et al. 2015, arXiv:1510.00149), Lloyd's algorithm to its fixed point, at most 100
    rounds, from two starts: quantiles, and the even spacing that Han et al. recommend; the better one is returned.
    Nothing is random. Where x has no more different values than `size`, they are the table. Where x contains 0, so
    does the table, so that pruned weights stay 0. Unused places repeat the largest value.

    Args:
        x: float32, any shape; values within a few orders of magnitude of 1, so that squares don't overflow.
        size: at least 2.
        scratch: whether x may be overwritten, which saves a copy.
    """
    ordered = torch.from_numpy(_sorted(x, scratch))
    if ordered.numel() == 0:
        return torch.zeros(size)
    distinct = _distinct(ordered, size)
    if distinct is not None:
        return torch.cat([distinct, distinct[-1:].expand(size - distinct.numel())])
    sums = _Sums(ordered)
    zero = bool(sums.holds(0.0))
    at = (torch.arange(size, dtype=torch.float64) + 0.5) / size * (ordered.numel() - 1)
    even = torch.linspace(float(ordered[0]), float(ordered[-1]), size, dtype=torch.float64)
    starts = (ordered[at.long()].double(), even)
    found = [_lloyd(sums, start, zero) for start in starts]
    table = min(found, key=sums.gain)
    return table.float().sort().values


class _Sums:
    """Sums of x over any run of sorted values, from prefix sums at every `_STRIDE`-th value."""

    def __init__(self, ordered: Tensor) -> None:
        self.ordered = ordered
        whole = ordered.numel() // _STRIDE
        strides = ordered[: whole * _STRIDE].reshape(whole, _STRIDE)
        self.prefix = torch.zeros(whole + 1, dtype=torch.float64)
        # In parts, because a sum in float64 copies what it adds; into place, so that the copies' memory is used again.
        for start in range(0, whole, _PART):
            part = strides[start : start + _PART]
            torch.sum(part, 1, dtype=torch.float64, out=self.prefix[start + 1 : start + 1 + part.shape[0]])
        self.prefix.cumsum_(0)

    def holds(self, value: float) -> bool:
        index = int(torch.searchsorted(self.ordered, torch.tensor(value)))
        return index < self.ordered.numel() and float(self.ordered[index]) == value

    def before(self, positions: Tensor) -> Tensor:
        """The sum of the values before each position, float64."""
        block = positions // _STRIDE
        offset = torch.arange(_STRIDE)
        index = (block[:, None] * _STRIDE + offset).clamp(max=self.ordered.numel() - 1)
        inside = offset < (positions % _STRIDE)[:, None]
        return self.prefix[block] + (self.ordered[index].double() * inside).sum(1)

    def clusters(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """How many values are nearest to each value of an ascending table, and their sums, float64 [S] each."""
        middle = ((table[1:] + table[:-1]) / 2).float()
        inner = torch.searchsorted(self.ordered, middle)
        edges = torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), self.ordered.numel())])
        return edges.diff().double(), self.before(edges).diff()

    def gain(self, table: Tensor) -> float:
        """The squared error of a table, less the sum of all squares."""
        counts, sums = self.clusters(table)
        return float((counts * table.square() - 2 * sums * table).sum())


def _lloyd(sums: _Sums, table: Tensor, zero: bool) -> Tensor:
    """Means of the values nearest to each value of the table, until nothing moves; `zero` keeps one value 0."""
    for _ in range(_ROUNDS):
        if zero:
            table[table.abs().argmin()] = 0.0
        counts, totals = sums.clusters(table)
        moved = torch.where(counts > 0, totals / counts.clamp(min=1), table)
        if zero:
            moved[table == 0] = 0.0
        moved = moved.sort().values
        if torch.equal(moved, table):
            break
        table = moved
    return table


def _sorted(x: Tensor, scratch: bool) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    # numpy sorts in place; torch.sort makes an int64 index of every value too.
    values = x.detach().float().cpu().reshape(-1).numpy()
    values = values if scratch else values.copy()
    values += 0.0  # −0 becomes 0
    values.sort()
    return values


def _distinct(ordered: Tensor, most: int) -> Tensor | None:
    """The different values of a sorted tensor, or None if there are more than `most`."""
    start = 0
    found: list[Tensor] = []
    while start < ordered.numel():
        if len(found) == most:
            return None
        found.append(ordered[start])
        start = int(torch.searchsorted(ordered, ordered[start], right=True))
    return torch.stack(found)
