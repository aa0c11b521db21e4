"""The one quantized currency inside exported graphs; a target lowers it to what its runtime calls it.

    quantize(x, scale, zero_point, low, high, axis)     clamp(rne(x / scale) + zero_point, low, high)
    quantize_dynamic(x, low, high)                      with a range taken from x itself → (q, scale, zero_point)
    dequantize(q, scale, zero_point, axis, group)       (q − zero_point) · scale
    lookup(codes, table, scale, axis, group, kind)      table[codes] · scale: small floats, codebooks, log2 levels
    unpack(packed, bits, low, shape)                    the integers of a bit stream: code + low, of narrow widths

axis −1: one scale for the whole tensor. group 0: a scale per index of `axis`; else scale is [C, G], for groups of that
many consecutive values of each channel (what is left when `axis` is taken out, flattened; the tail may be shorter).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..numerics.arithmetic import along, grouped
from ..numerics.packing import unpack as unpack_bits

_LIBRARY = torch.library.Library("bitport", "DEF")  # type: ignore[no-untyped-call]
for _schema in (
    "quantize(Tensor x, Tensor scale, Tensor zero_point, int low, int high, int axis) -> Tensor",
    "quantize_dynamic(Tensor x, int low, int high) -> (Tensor, Tensor, Tensor)",
    "dequantize(Tensor q, Tensor scale, Tensor zero_point, int axis, int group=0) -> Tensor",
    "lookup(Tensor codes, Tensor table, Tensor scale, int axis, int group, str kind) -> Tensor",
    "unpack(Tensor packed, int bits, int low, int[] shape) -> Tensor",
):
    _LIBRARY.define(_schema)  # type: ignore[no-untyped-call]


def code_type(low: int, high: int) -> torch.dtype:
    """The narrowest integer type of torch that holds low … high; signed where low is negative."""
    for dtype in (torch.uint8, torch.int8, torch.int16):
        if torch.iinfo(dtype).min <= low and high <= torch.iinfo(dtype).max:
            return dtype
    return torch.int32


def _spread(parameter: Tensor, like: Tensor, axis: int, group: int = 0) -> Tensor:
    if group:
        return grouped(parameter, like.shape, axis, group)
    return along(parameter, like.dim(), axis if axis >= 0 else None)


@torch.library.impl(_LIBRARY, "quantize", "CompositeExplicitAutograd")
def _quantize(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, axis: int) -> Tensor:
    shifted = torch.round(x / _spread(scale, x, axis)) + _spread(zero_point, x, axis).float()
    return torch.clamp(shifted, low, high).to(zero_point.dtype)


@torch.library.impl(_LIBRARY, "quantize_dynamic", "CompositeExplicitAutograd")
def _quantize_dynamic(x: Tensor, low: int, high: int) -> tuple[Tensor, Tensor, Tensor]:
    smallest, largest = (end.clamp(max=0) if lower else end.clamp(min=0) for end, lower in _ends(x))
    scale = (largest - smallest) / (high - low)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero_point = torch.round(low - smallest / scale).clamp(low, high)
    q = torch.clamp(torch.round(x / scale) + zero_point, low, high)
    dtype = code_type(low, high)
    return q.to(dtype), scale, zero_point.to(dtype)


def _ends(x: Tensor) -> tuple[tuple[Tensor, bool], tuple[Tensor, bool]]:
    return (x.amin(), True), (x.amax(), False)


@torch.library.impl(_LIBRARY, "dequantize", "CompositeExplicitAutograd")
def _dequantize(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int, group: int = 0) -> Tensor:
    centred = q.to(torch.int32) - _spread(zero_point, q, axis, group).to(torch.int32)
    return centred.float() * _spread(scale, q, axis, group)


@torch.library.impl(_LIBRARY, "lookup", "CompositeExplicitAutograd")
def _lookup(codes: Tensor, table: Tensor, scale: Tensor, axis: int, group: int, kind: str) -> Tensor:
    return table[codes.to(torch.int64)] * _spread(scale, codes, axis, group)


@torch.library.impl(_LIBRARY, "unpack", "CompositeExplicitAutograd")
def _unpack(packed: Tensor, bits: int, low: int, shape: Sequence[int]) -> Tensor:
    count = 1
    for size in shape:
        count *= size
    codes = unpack_bits(packed, bits, count) + low
    return codes.reshape(list(shape)).to(code_type(low, low + 2**bits - 1))


@torch.library.register_fake("bitport::quantize", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _quantize_fake(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, axis: int) -> Tensor:
    return torch.empty_like(x, dtype=zero_point.dtype)


@torch.library.register_fake("bitport::quantize_dynamic", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _quantize_dynamic_fake(x: Tensor, low: int, high: int) -> tuple[Tensor, Tensor, Tensor]:
    dtype = code_type(low, high)
    return torch.empty_like(x, dtype=dtype), x.new_empty(()), x.new_empty((), dtype=dtype)


@torch.library.register_fake("bitport::dequantize", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _dequantize_fake(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int, group: int = 0) -> Tensor:
    return torch.empty_like(q, dtype=torch.float32)


@torch.library.register_fake("bitport::lookup", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _lookup_fake(codes: Tensor, table: Tensor, scale: Tensor, axis: int, group: int, kind: str) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


@torch.library.register_fake("bitport::unpack", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _unpack_fake(packed: Tensor, bits: int, low: int, shape: Sequence[int]) -> Tensor:
    return packed.new_empty(list(shape), dtype=code_type(low, low + 2**bits - 1))


QUANTIZE = torch.ops.bitport.quantize.default
QUANTIZE_DYNAMIC = torch.ops.bitport.quantize_dynamic.default
DEQUANTIZE = torch.ops.bitport.dequantize.default
LOOKUP = torch.ops.bitport.lookup.default
UNPACK = torch.ops.bitport.unpack.default
