"""What a grid costs a weight beyond rounding: values it cuts off, and values it can't tell from nothing.

Legend: R rows that have a scale each, K values of a row (`rows`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitport.numerics.floats import largest_number, layout
from bitport.numerics.grid import Grid, blocks, decode_rows, encode_rows, largest, real
from bitport.numerics.rows import rows

# A value counts as cut off where it is more than twice as large as the largest that is stored, and as lost only in rows
# where nine of ten values are, at least eight: rounding to few bits alone does less.
FAR = 2.0
MANY, MOST = 8, 0.9
SMALL = 1 / 16  # of the largest number stored: what is larger is lost to few bits, not to an outlier
HALF = 0.51  # of a scale: what is larger is stored as something nearer than 0, nor twice as large
_LOST = 0.999  # of a value: its error where it is stored as 0, or as a value as far away


@dataclass(frozen=True)
class Losses:
    """What a grid loses of a weight.

    Attributes:
        clipped: how many values are far outside what is stored.
        mass: their share of Σ|w| that is cut off.
        lost: how many values become 0, or a value as far away, in the row where they are the largest share.
        row: that row's index, else −1.
        all: whether the row's largest value is lost as well: not an outlier, but the scale's own limit is at fault.
    """

    clipped: int = 0
    mass: float = 0.0
    lost: int = 0
    row: int = -1
    all: bool = False


def losses(w: Tensor, grid: Grid) -> Losses:
    """Hold a weight against its grid.

    Args:
        w: any shape and real type, finite. grid: as `codes.fit` made it for w, or for several weights together.

    Raises FormatError where the grid belongs to a tensor of another shape.
    """
    x_RK = rows(real(w), grid.format)
    if x_RK.numel() == 0:
        return Losses()
    reach_R = _reach(grid).expand(x_RK.shape[0])
    if grid.format.is_int and _is_kept(x_RK, reach_R, grid.scale.reshape(-1)):
        return Losses()
    scale_R, zero_point_R = (part.reshape(-1).expand(x_RK.shape[0]) for part in (grid.scale, grid.zero_point))
    alive_R, lost_R = (torch.zeros(x_RK.shape[0], dtype=torch.int64) for _ in range(2))
    kept_R = torch.zeros(x_RK.shape[0], dtype=torch.bool)
    clipped, cut, total = 0, 0.0, 0.0
    for block in blocks(x_RK.shape):
        part, of = x_RK[block], block[0]
        codes = encode_rows(part, grid, scale_R[of], zero_point_R[of], torch.int32)
        size, reach = part.abs(), reach_R[of, None]
        error = (part - decode_rows(codes, grid, scale_R[of], zero_point_R[of])).abs()
        far = size > FAR * reach
        clipped += int(far.sum())
        cut += float((size.double() - reach)[far].sum())
        total += float(size.sum(dtype=torch.float64))
        lost = (size != 0) & (error >= _LOST * size)
        kept_R[of] |= ((size != 0) & ~lost).any(1)
        alive_R[of] += (size != 0).sum(1)
        lost_R[of] += (lost & (size < SMALL * reach)).sum(1)
    if grid.format.table == "sign":
        clipped, cut = 0, 0.0  # it stores the mean magnitude and is meant to cut off what is larger
    share_R = torch.where((lost_R >= MANY) & (lost_R >= MOST * alive_R), lost_R / alive_R.clamp(min=1), 0.0)
    row = int(share_R.argmax())
    mass = cut / total if total else 0.0
    if not float(share_R[row]):
        return Losses(clipped, mass)
    return Losses(clipped, mass, int(lost_R[row]), row, not bool(kept_R[row]))


def _is_kept(x_RK: Tensor, reach_R: Tensor, scale_R: Tensor) -> bool:
    """Whether integers lose nothing: no value lies far outside, and few of a row are below half of its scale.

    A quick look before the long one, which is a fifth of the work.
    """
    scale_R = scale_R.expand(x_RK.shape[0])
    for block in blocks(x_RK.shape):
        size = x_RK[block].abs()
        if bool((size.amax(1) > FAR * reach_R[block[0]]).any()):
            return False
        tiny_R = (size < HALF * scale_R[block[0], None]).sum(1)
        if bool((tiny_R >= MOST * size.shape[1]).any()):
            return False
    return True


def _reach(grid: Grid) -> Tensor:
    """The largest magnitude that each row stores, float64 [R] or [1]."""
    fmt = grid.format
    scale_R = grid.scale.reshape(-1).double()
    if fmt.unscaled:
        return torch.tensor([largest_number(layout(fmt))], dtype=torch.float64)
    if fmt.is_int:
        zero_R = grid.zero_point.reshape(-1).double()
        return torch.maximum(zero_R - fmt.low, fmt.high - zero_R) * scale_R
    if grid.table is not None:
        return grid.table.abs().max().double() * scale_R
    return largest(fmt) * scale_R
