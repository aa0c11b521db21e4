"""Every format behind one door: fit a grid to a tensor, then encode and decode with it.

    grid = fit(w, Format.parse("nf4 group(64,0)"))
    codes = encode(w, grid)          # int32, shape of w
    again = decode(codes, grid)      # float32

The codes and what they stand for: `grid`. Legend: R rows that have a scale each (`rows`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitport.formats import Format
from bitport.numerics import codebooks, scales
from bitport.numerics.floats import layout
from bitport.numerics.grid import (
    Grid,
    blocks,
    check_finite,
    decode,
    decode_rows,
    encode,
    encode_rows,
    largest,
    real,
    scale_bits,
    storage_bits,
    values,
)
from bitport.numerics.quantize import LARGEST_SCALE, SMALLEST_SCALE, qparams, zero_points
from bitport.numerics.ranges import Spec, search, weight_ranges
from bitport.numerics.rows import restore, row_sizes, rows

__all__ = ["Grid", "decode", "encode", "fit", "largest", "scale_bits", "storage_bits", "values"]

_FLOAT32_MAX = torch.finfo(torch.float32).max


def fit(w: Tensor, fmt: Format, spec: Spec = "minmax") -> Grid:
    """The grid that stores a tensor.

    Integers take the range that `spec` finds (`ranges.weight_ranges`). Small floats, log2 levels and codebooks scale
    the largest magnitude of that range to their largest value; with "mse" they search the scale of the smallest
    squared error instead. `sign` takes the mean magnitude, which is the least-squares one (XNOR-Net), whatever
    `spec` says. A learned table is made by `codebooks.learn` from w / scale.

    Scales in narrow types: of integers, log2 levels and tables the smallest that holds the range; of floats the
    nearest, in e8m0 floor(log2(largest magnitude)) − emax (OCP MX v1.0, 6.3, which may clip the largest values).
    With "mse" the neighbour below is tried as well. Scales of zeros are 1, or the tensor's largest in e4m3; for `sign`
    the smallest that can be stored.

    Args:
        w: any shape and real type; computed in float32.

    Raises:
        WeightsError: w holds NaN or infinite values, or is complex.
        FormatError: the format's axis is missing or not an axis of w; a scale doesn't fit float16.
        UnknownName, RecipeError: as `weight_ranges`.
    """
    w = real(w)
    if fmt.unscaled:
        check_finite(w)
        return Grid(fmt, torch.ones(()), torch.zeros((), dtype=torch.int32))
    if fmt.is_int:
        return _fit_int(w, fmt, spec)
    scale = _fit_scale(w, fmt, spec)
    zero_point = torch.zeros_like(scale, dtype=torch.int32)
    if fmt.table != "learned":
        return Grid(fmt, scale, zero_point)
    x_RK = rows(w, fmt) / scale.reshape(-1, 1)
    table = codebooks.learn(restore(x_RK, fmt, w.shape), fmt.size, scratch=True)
    # Weights of 3e38 on scales that end at 2^126: rounding must not make the product infinite.
    most = _FLOAT32_MAX / max(1.0, float(scale.max()) if scale.numel() else 1.0) * (1 - 2.0**-22)
    return Grid(fmt, scale, zero_point, table.clamp(-most, most))


def _fit_int(w: Tensor, fmt: Format, spec: Spec) -> Grid:
    low, high = weight_ranges(w, fmt, spec)
    if fmt.scale == "float32":
        return Grid(fmt, *qparams(low, high, fmt))
    most = min(LARGEST_SCALE, _FLOAT32_MAX / (fmt.high - fmt.low) * (1 - 2.0**-23))

    def grid(low: Tensor, high: Tensor, up: bool, least: float = SMALLEST_SCALE) -> Grid:
        wanted = _fill(qparams(low, high, fmt)[0].clamp(min=least), (low == 0) & (high == 0), fmt)
        scale = scales.stored(wanted, fmt.scale, up=up, most=most)
        return Grid(fmt, scale, zero_points(low.clamp(max=0.0), scale, fmt))

    if not _searches(spec) or w.numel() == 0:
        return grid(low, high, up=True)
    whole = weight_ranges(w, fmt, "minmax")
    # What the full range fits in float16, a narrower one may not: it is tried as far as it goes.
    least = scales.smallest(fmt.scale)
    tried = [
        grid(*whole, up=True),
        grid(low, high, up=True, least=least),
        grid(low, high, up=False, least=least),
    ]
    return _best(w, tried)


def _fit_scale(w: Tensor, fmt: Format, spec: Spec) -> Tensor:
    """The scales of formats without zero points, in the shape of `scale_shape`."""
    searches = _searches(spec)
    low, high = weight_ranges(w, fmt, "minmax" if searches else spec)
    reach = torch.maximum(-low, high).double()
    if fmt.table == "sign":
        mean = _means(w, fmt).reshape(reach.shape)
        return _scales_of(mean, mean == 0, fmt)
    scale = _scales_of(reach, reach == 0, fmt)
    if not searches or fmt.table == "learned" or w.numel() == 0:
        return scale
    x_RK, least = rows(w, fmt), scales.smallest(fmt.scale)
    # `search` works on rows; a group's scales may depend on the tensor's largest, so the shape is kept where it is.
    reach_R, empty_R = reach.reshape(-1), reach.reshape(-1) == 0

    def errors(low_R: Tensor, high_R: Tensor) -> Tensor:
        return _row_errors(x_RK, _plain(fmt, _scales_of(high_R, empty_R, fmt, least)), reach_R)

    found = _scales_of(search(errors, -reach_R, reach_R, True)[1], empty_R, fmt, least).reshape(scale.shape)
    tried = [scale, found]
    if fmt.scale == "e8m0":
        tried += [(2 * known).clamp(max=LARGEST_SCALE) for known in tried]
    return _best(w, [_plain(fmt, known) for known in tried]).scale


def _scales_of(reach: Tensor, empty: Tensor, fmt: Format, least: float = SMALLEST_SCALE) -> Tensor:
    """The stored scales with which a format's largest value is near `reach` (float64, any shape)."""
    most = min(LARGEST_SCALE, _FLOAT32_MAX / largest(fmt) * (1 - 2.0**-23))
    wanted = reach / largest(fmt)
    if fmt.is_float and fmt.scale == "e8m0":
        exponent = torch.frexp(reach)[1] - 1 - layout(fmt).largest_exponent
        wanted = torch.ldexp(torch.ones_like(reach), exponent)
    wanted = _fill(wanted.clamp(least, most), empty, fmt)
    return scales.stored(wanted, fmt.scale, up=not fmt.is_float and fmt.table != "sign", most=most)


def _fill(wanted: Tensor, empty: Tensor, fmt: Format) -> Tensor:
    """The wanted scales with those of zeros replaced by ones that suit their neighbours."""
    if not bool(empty.any()):
        return wanted
    if fmt.table == "sign":
        return wanted.masked_fill(empty, scales.smallest(fmt.scale))
    shared = fmt.scale == "e4m3" and not bool(empty.all())
    return wanted.masked_fill(empty, float(wanted[~empty].max()) if shared else 1.0)


def _best(w: Tensor, grids: list[Grid]) -> Grid:
    """The grid with the smallest squared error, row by row; for the whole tensor where scales depend on each other.

    Of equal ones the first.
    """
    x_RK, first = rows(w, grids[0].format), grids[0]
    size_R = x_RK.abs().amax(1).double()
    errors = torch.stack([_row_errors(x_RK, grid, size_R) for grid in grids])
    if first.format.scale == "e4m3":
        whole = (errors * size_R.square()).sum(1)
        return grids[int(whole.argmin())]
    choice_R = errors.argmin(0)[None]
    chosen = (
        torch.stack([part.reshape(-1) for part in parts]).gather(0, choice_R).reshape(first.scale.shape)
        for parts in ([grid.scale for grid in grids], [grid.zero_point for grid in grids])
    )
    scale, zero_point = chosen
    return Grid(first.format, scale, zero_point)


def _row_errors(x_RK: Tensor, grid: Grid, size_R: Tensor) -> Tensor:
    """Σ ((x̂ − x) / size)² of each row, float64 [R]. Relative to a row's size, no square overflows."""
    total_R = torch.zeros(x_RK.shape[0], dtype=torch.float64)
    scale_R, zero_point_R = grid.scale.reshape(-1), grid.zero_point.reshape(-1)
    for block in blocks(x_RK.shape):
        part, scale, zero_point = x_RK[block], scale_R[block[0]], zero_point_R[block[0]]
        back = decode_rows(encode_rows(part, grid, scale, zero_point, torch.int32), grid, scale, zero_point)
        size = size_R[block[0], None].float().clamp(min=SMALLEST_SCALE)
        total_R[block[0]] += back.sub_(part).div_(size).square_().sum(1, dtype=torch.float64)
    return total_R


def _means(w: Tensor, fmt: Format) -> Tensor:
    """The mean magnitude of each row, float64 [R]."""
    x_RK = rows(w, fmt)
    sums_R = torch.zeros(x_RK.shape[0], dtype=torch.float64)
    for block in blocks(x_RK.shape):
        sums_R[block[0]] += x_RK[block].abs().sum(1, dtype=torch.float64)
    return sums_R / row_sizes(w.shape, fmt).clamp(min=1)


def _plain(fmt: Format, scale: Tensor) -> Grid:
    return Grid(fmt, scale, torch.zeros_like(scale, dtype=torch.int32))


def _searches(spec: Spec) -> bool:
    """Whether a spec is plain "mse": for formats other than integers it is searched here, on the codes themselves."""
    return spec == "mse" or (not isinstance(spec, str) and dict(spec) == {"use": "mse"})
