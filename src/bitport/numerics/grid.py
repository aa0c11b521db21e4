"""A stored tensor and its grid: real numbers ⇄ codes, and the bits that they take.

    int        q = clamp(rne(x / scale) + zero_point)      r = (q − zero_point) · scale
    others     code of the value nearest to x / scale      r = value(code) · scale

all in float32. Codes of integers are low … high; the others 0 … 2^bits − 1: a float's bit pattern, a log2 level's
sign | magnitude (both: `floats`), the index into a codebook's table (`codebooks`).

Legend: C channels, G groups a channel; R rows that have a scale each, K values of a row (`rows`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bitport.errors import FormatError, WeightsError
from bitport.formats import Format
from bitport.numerics import codebooks, scales
from bitport.numerics.arithmetic import along
from bitport.numerics.floats import from_bits, largest_number, layout, to_bits
from bitport.numerics.quantize import (
    dequantize,
    quantize,
)
from bitport.numerics.rows import restore, rows, scale_shape

_MOST_TABLE_BITS = 8
# Tensors are worked on in blocks of about this many values, which stay in the processor's cache.
_BLOCK = 2**16
_Block = tuple[slice, slice]


@dataclass(frozen=True)
class Grid:
    """The parameters of one stored tensor.

    Attributes:
        format: how it is stored.
        scale: float32, 0-d (tensor, global), [C] (channel) or [C, G] (group), as rounded to the type that the format
            stores scales in; 1 where the format has none.
        zero_point: int32, shape of scale; 0 for kinds other than int.
        table: float32 [size], ascending: the values of a learned codebook, which the whole tensor shares; else None.
    """

    format: Format
    scale: Tensor
    zero_point: Tensor
    table: Tensor | None = None


def encode(w: Tensor, grid: Grid, dtype: torch.dtype = torch.int32) -> Tensor:
    """The codes of the values nearest to w; integers of type `dtype`, shape of w.

    Integers are those of `quantize.quantize`, to the bit. Ties go to the even code, in tables to the higher value.
    What exceeds the format's range becomes its end.

    Args:
        w: any shape and real type; computed in float32.
        dtype: a type that holds the codes; a narrow one saves memory and time.

    Raises:
        WeightsError: w holds NaN or infinite values, or is complex.
        FormatError: the grid belongs to a tensor of another shape; `dtype` doesn't hold the codes.
    """
    fmt = grid.format
    w = real(w)
    _check_shape(w, grid)
    _check_dtype(fmt, dtype)
    x_RK = rows(w, fmt)
    codes = torch.empty(x_RK.shape, dtype=dtype, device=w.device)
    scale_R, zero_point_R = grid.scale.reshape(-1), grid.zero_point.reshape(-1)
    for block in blocks(x_RK.shape):
        part = x_RK[block]
        check_finite(part)
        codes[block] = encode_rows(part, grid, scale_R[block[0]], zero_point_R[block[0]], dtype)
    return restore(codes, fmt, w.shape)


def decode(codes: Tensor, grid: Grid) -> Tensor:
    """The numbers that codes stand for: (q − zero_point) · scale, or value · scale; float32, shape of codes.

    Codes of small floats that are no numbers (`values`) give infinity or NaN.

    Args:
        codes: any integer type.

    Raises:
        FormatError: the grid belongs to a tensor of another shape.
        WeightsError: a code is outside the format.
    """
    fmt = grid.format
    _check_shape(codes, grid)
    if codes.is_floating_point() or codes.is_complex():
        raise FormatError(f"codes of type {codes.dtype} can't be decoded: give integers")
    q_RK = rows(codes, fmt)
    x_RK = torch.empty(q_RK.shape, device=codes.device)
    scale_R, zero_point_R = grid.scale.reshape(-1), grid.zero_point.reshape(-1)
    # A group's tail is filled up with zeros, which need not be codes of the format.
    _check_codes(codes, fmt)
    for block in blocks(q_RK.shape):
        x_RK[block] = decode_rows(
            q_RK[block].to(torch.int32), grid, scale_R[block[0]], zero_point_R[block[0]]
        )
    return restore(x_RK, fmt, codes.shape)


def values(fmt: Format, table: Tensor | None = None) -> Tensor:
    """The value of every code before scaling, float32 [2^bits], of a format other than integers of up to 8 bits.

    Not numbers, and never made by `encode`, are the codes of infinity and NaN: 127 and 255 of e4m3 (NaN); those with
    the highest exponent of the other floats beyond 6 bits, such as 124 … 127 and 252 … 255 of e5m2 (124 and 252
    infinite). Never made either: the second zero of log2 levels (2^(bits − 1)), and codes beyond a table's size,
    which repeat its largest value.

    Args:
        table: the values of a learned codebook, float32 [size], ascending.

    Raises:
        FormatError: the format has no such table, or `table` is missing or of another size.
    """
    if fmt.is_int or fmt.bits > _MOST_TABLE_BITS:
        raise FormatError(
            f"{fmt} has no table of values: those of codebooks, log2 levels and floats up to 8 bits have"
        )
    if fmt.kind != "codebook":
        return from_bits(torch.arange(2**fmt.bits, dtype=torch.int32), layout(fmt))
    known = _table(fmt, table)
    return torch.cat([known, known[-1:].expand(2**fmt.bits - fmt.size)])


def largest(fmt: Format) -> float:
    """The largest finite magnitude before scaling; of a learned table 1, which it is learned within.

    Raises:
        FormatError: an integer format, whose range depends on the zero point.
    """
    if fmt.is_int:
        raise FormatError(f"{fmt} has a range of integers, not a largest value: ask low and high")
    return 1.0 if fmt.kind == "codebook" else largest_number(layout(fmt))


def scale_bits(grid: Grid) -> int:
    """The bits that a grid takes in storage: scales, zero points where they aren't fixed, a learned table.

    Zero points take `format.bits` each, tables 32 bits a value, e4m3 scales 32 more bits for the tensor. A global
    scale is counted with each tensor.
    """
    fmt = grid.format
    if fmt.unscaled:
        return 0
    bits = grid.scale.numel() * scales.BITS[fmt.scale]
    if fmt.scale == "e4m3":
        bits += 32
    if fmt.is_int and not fmt.symmetric:
        bits += grid.zero_point.numel() * fmt.bits
    return bits if grid.table is None else bits + 32 * grid.table.numel()


def storage_bits(count: int, grid: Grid) -> int:
    """The bits that a tensor of `count` values takes in storage: its codes and its grid."""
    return count * grid.format.bits + scale_bits(grid)


# ---------------------------------------------------------------- one block


def encode_rows(x: Tensor, grid: Grid, scale: Tensor, zero_point: Tensor, dtype: torch.dtype) -> Tensor:
    """The codes of rows [R, K] with scale and zero point [R]."""
    fmt = grid.format
    if fmt.is_int:
        return quantize(x, scale, zero_point, fmt.low, fmt.high, 0, dtype)
    steps = x if fmt.unscaled else x / along(scale, 2, 0)
    if fmt.kind == "codebook":
        return codebooks.nearest(steps, _table(fmt, grid.table)).to(dtype)
    return to_bits(steps, layout(fmt)).to(dtype)


def decode_rows(q: Tensor, grid: Grid, scale: Tensor, zero_point: Tensor) -> Tensor:
    """The numbers of rows of int32 codes [R, K] with scale and zero point [R]."""
    fmt = grid.format
    if fmt.is_int:
        return dequantize(q, scale, zero_point, 0)
    small = fmt.bits <= _MOST_TABLE_BITS
    value = values(fmt, grid.table)[q] if small else from_bits(q, layout(fmt))
    return value if fmt.unscaled else value * along(scale, 2, 0)


def _table(fmt: Format, table: Tensor | None) -> Tensor:
    if fmt.table != "learned":
        return codebooks.fixed_table(fmt.table)
    if table is None or table.shape != (fmt.size,):
        raise FormatError(f"{fmt} needs its table of {fmt.size} values: make the grid by fit")
    return table.float()


def blocks(shape: torch.Size) -> Iterator[_Block]:
    """Pieces of a matrix of about `_BLOCK` values: whole rows, or parts of long ones."""
    count, length = shape
    if not count or not length:
        return
    many, wide = max(1, _BLOCK // length), min(length, _BLOCK)
    for row in range(0, count, many):
        for column in range(0, length, wide):
            yield slice(row, row + many), slice(column, column + wide)


# ---------------------------------------------------------------- what is refused


def real(w: Tensor) -> Tensor:
    """w in float32, without a gradient. Raises WeightsError for complex numbers."""
    if w.is_complex():
        raise WeightsError(
            f"weights of type {w.dtype} can't be quantized: split them into real and imaginary parts"
        )
    return w.detach().float()


def check_finite(x: Tensor) -> None:
    """Raises WeightsError for NaN and infinite values."""
    # Of a tensor with a NaN both ends are NaN.
    if x.numel() and not all(math.isfinite(float(end)) for end in torch.aminmax(x)):
        raise WeightsError("weights hold NaN or infinite values: repair the float network first")


def _check_shape(w: Tensor, grid: Grid) -> None:
    wanted = () if grid.format.unscaled else scale_shape(w.shape, grid.format)
    if tuple(grid.scale.shape) != wanted or tuple(grid.zero_point.shape) != wanted:
        raise FormatError(
            f"scales of shape {tuple(grid.scale.shape)} don't fit a tensor of {tuple(w.shape)} stored as "
            f"{grid.format}: {wanted} would; make the grid by fit"
        )


def _code_range(fmt: Format) -> tuple[int, int]:
    """The lowest and the highest code; float32's bit patterns fill an int32."""
    if fmt.is_int:
        return fmt.low, fmt.high
    if fmt.bits == 32:
        return -(2**31), 2**31 - 1
    return 0, (fmt.size or 2**fmt.bits) - 1


def _check_dtype(fmt: Format, dtype: torch.dtype) -> None:
    low, high = _code_range(fmt)
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        raise FormatError(f"codes can't be {dtype}: give an integer type")
    limits = torch.iinfo(dtype)
    if low < limits.min or high > limits.max:
        raise FormatError(f"codes {low} … {high} of {fmt} don't fit {dtype}: give a wider integer type")


def _check_codes(codes: Tensor, fmt: Format) -> None:
    if codes.numel() == 0:
        return
    low, high = _code_range(fmt)
    wide = codes.to(torch.int64) if codes.dtype in (torch.uint16, torch.uint32) else codes
    least, most = int(wide.min()), int(wide.max())
    if least < low or most > high:
        raise WeightsError(
            f"codes {least} … {most} are outside those of {fmt}, {low} … {high}: they belong to another format"
        )
