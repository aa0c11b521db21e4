"""`bitport::quantize` and `bitport::dequantize`: the one quantized currency inside exported graphs.

A target lowers them to what its runtime calls them (ONNX: QuantizeLinear, DequantizeLinear).
`quantize(x, scale, zero_point, low, high, axis, dtype)`: clamp(rne(x / scale) + zero_point, low, high);
`dequantize(q, scale, zero_point, axis)`: (q − zero_point) · scale. axis −1: one scale for the whole tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("bitport", "DEF")  # type: ignore[no-untyped-call]
for _schema in (
    "quantize(Tensor x, Tensor scale, Tensor zero_point, int low, int high, int axis) -> Tensor",
    "dequantize(Tensor q, Tensor scale, Tensor zero_point, int axis) -> Tensor",
):
    _LIBRARY.define(_schema)  # type: ignore[no-untyped-call]


def _spread(parameter: Tensor, like: Tensor, axis: int) -> Tensor:
    if axis < 0:
        return parameter
    shape = [1] * like.dim()
    shape[axis] = -1
    return parameter.view(shape)


@torch.library.impl(_LIBRARY, "quantize", "CompositeExplicitAutograd")
def _quantize(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, axis: int) -> Tensor:
    shifted = torch.round(x / _spread(scale, x, axis)) + _spread(zero_point, x, axis).float()
    return torch.clamp(shifted, low, high).to(zero_point.dtype)


@torch.library.impl(_LIBRARY, "dequantize", "CompositeExplicitAutograd")
def _dequantize(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    centred = q.to(torch.int32) - _spread(zero_point, q, axis).to(torch.int32)
    return centred.float() * _spread(scale, q, axis)


@torch.library.register_fake("bitport::quantize", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _quantize_fake(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, axis: int) -> Tensor:
    return torch.empty_like(x, dtype=zero_point.dtype)


@torch.library.register_fake("bitport::dequantize", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _dequantize_fake(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    return torch.empty_like(q, dtype=torch.float32)


QUANTIZE = torch.ops.bitport.quantize.default
DEQUANTIZE = torch.ops.bitport.dequantize.default
