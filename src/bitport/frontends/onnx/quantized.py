"""Operators of integers: what they compute, in float where that is exact."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._calls import Call, Value, operator, tensor
from .elementwise import DTYPES, EIGHT_BITS, convert
from .layers import conv


def _spread(call: Call, part: Tensor, x: Tensor) -> Value:
    """Scales or zero points, one for all, for each channel, or for each block of one."""
    if part.numel() == 1 and part.dim() < 2:
        return part.reshape(())
    axis = call.attr("axis", 1) % max(1, x.dim())
    block = call.attr("block_size", 0)
    if block:
        return part.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    return part.reshape([-1 if i == axis else 1 for i in range(x.dim())])


@operator("QuantizeLinear")
def quantize(call: Call, x: Value, scale: Value, zero: Value = None) -> Value:
    """clip(rne(x / scale) + zero_point)."""
    x, scale = tensor(x), tensor(scale)
    wanted = tensor(zero).dtype if zero is not None else DTYPES.get(call.attr("output_dtype", 2) or 2)
    small = [kind for kind, dtype in EIGHT_BITS.items() if dtype == wanted]
    if small:
        return convert(call, x / _spread(call, scale, x), small[0])
    if wanted is None or wanted.is_floating_point:
        call.refuse(f"it quantizes to data type {call.attr('output_dtype')}")
    info = torch.iinfo(wanted)
    offset = 0 if zero is None else _spread(call, tensor(zero), x).to(torch.float32)
    codes = torch.round(x.to(scale.dtype) / _spread(call, scale, x)) + offset
    return codes.clamp(info.min, info.max).to(wanted)


@operator("DequantizeLinear")
def dequantize(call: Call, x: Value, scale: Value, zero: Value = None) -> Value:
    """(x − zero_point) · scale."""
    x, scale = tensor(x), tensor(scale)
    if x.is_floating_point():
        return x.to(scale.dtype) * _spread(call, scale, x)
    offset = 0 if zero is None else _spread(call, tensor(zero), x).to(torch.int32)
    return (x.to(torch.int32) - offset).to(scale.dtype) * _spread(call, scale, x)


@operator("DynamicQuantizeLinear")
def dynamic_quantize(call: Call, x: Value) -> tuple[Tensor, Tensor, Tensor]:
    x = tensor(x)
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / 255
    zero = torch.round(-low / scale).clamp(0, 255)
    return (torch.round(x / scale) + zero).clamp(0, 255).to(torch.uint8), scale, zero.to(torch.uint8)


def _centred(x: Value, zero: Value, axis: int) -> Tensor:
    """x − zero_point in float64, in which sums of products of bytes are exact."""
    found = tensor(x).double()
    if zero is None:
        return found
    offset = tensor(zero).double()
    if offset.dim() and offset.numel() > 1:
        offset = offset.reshape([-1 if i == axis % found.dim() else 1 for i in range(found.dim())])
    return found - offset


@operator("MatMulInteger")
def matmul_integer(call: Call, a: Value, b: Value, zero_a: Value = None, zero_b: Value = None) -> Value:
    return (_centred(a, zero_a, -2) @ _centred(b, zero_b, -1)).to(torch.int32)


@operator("ConvInteger")
def conv_integer(call: Call, x: Value, w: Value, zero_x: Value = None, zero_w: Value = None) -> Any:
    return conv(call, _centred(x, zero_x, 0), _centred(w, zero_w, 0)).to(torch.int32)


def _requantized(call: Call, product: Tensor, scale: Tensor, zero: Value) -> Value:
    offset = tensor(zero)
    info = torch.iinfo(offset.dtype)
    return (torch.round(product * scale) + offset.double()).clamp(info.min, info.max).to(offset.dtype)


@operator("QLinearMatMul")
def qlinear_matmul(
    call: Call, a: Value, a_scale: Value, a_zero: Value, b: Value, b_scale: Value, b_zero: Value,
    y_scale: Value, y_zero: Value,
) -> Value:  # fmt: skip
    product = _centred(a, a_zero, -2) @ _centred(b, b_zero, -1)
    scale = tensor(a_scale).double() * tensor(b_scale).double() / tensor(y_scale).double()
    return _requantized(call, product, scale, y_zero)


@operator("QLinearConv")
def qlinear_conv(
    call: Call, x: Value, x_scale: Value, x_zero: Value, w: Value, w_scale: Value, w_zero: Value, y_scale: Value,
    y_zero: Value, b: Value = None,
) -> Value:  # fmt: skip
    bias = None if b is None else tensor(b).double()
    product = conv(call, _centred(x, x_zero, 0), _centred(w, w_zero, 0), bias)
    scale = tensor(x_scale).double() * tensor(w_scale).double() / tensor(y_scale).double()
    if scale.dim() and scale.numel() > 1:
        scale = scale.reshape([1, -1] + [1] * (product.dim() - 2))
    return _requantized(call, product, scale.reshape(()) if scale.numel() == 1 else scale, y_zero)
