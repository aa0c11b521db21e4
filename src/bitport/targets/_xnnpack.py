"""How XNNPACK's kernels compute 8-bit operators, whichever runtime calls them: the same integers, bit for bit.

Measured on x86-64 with AVX-512, through two runtimes. The formulas are those of its kernels (github.com/google/XNNPACK,
src/reference and src/configs). Other processors sum products of scales otherwise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..numerics.arithmetic import Call, QSpec, quantized, requantize_float, rne, stored

LOW, HIGH = -128, 127
MULTIPLIER_BITS = 20  # of the larger one of an addition's two


def quantize(values: Tensor, out: QSpec) -> Tensor:
    """`clip(rne(x·(1/s)) + z)`: multiplied by the reciprocal, which is rounded first, float32."""
    return requantize_float(values, 1 / out.scale, out.zero_point, out.low, out.high)


def requantized(call: Call, acc: Tensor, axis: int) -> Tensor:
    """Sums of a `conv` or `linear` call: `clip(rne(float32(acc)·(s_x·s_w/s_y)) + z_y)`, left to right.

    axis: of the output's channels.
    """
    out = stored(call)
    scale = quantized(call, 0).scale * quantized(call, 1).scale / out.scale
    return requantize_float(acc, scale, out.zero_point, out.low, out.high, axis)


def add(call: Call) -> Tensor:
    """`((a·m_a + b·m_b + 2^(n−1) − m_a·z_a − m_b·z_b) >> n) + z_y`; the larger m = rne(2^n·s/s_y) takes 21 bits."""
    first, second, out = quantized(call, 0), quantized(call, 1), stored(call)
    ratios = [float(operand.scale / out.scale) for operand in (first, second)]
    shift = MULTIPLIER_BITS - (math.frexp(max(ratios))[1] - 1)
    factors = [round(math.ldexp(ratio, shift)) for ratio in ratios]
    total = first.centred().long() * factors[0] + second.centred().long() * factors[1]
    result = ((total + (1 << (shift - 1))) >> shift) + out.zero_point
    return result.clamp(out.low, out.high).to(torch.int32)


def mul(call: Call) -> Tensor:
    """`clip(rne(float32(a·b)·(s_a·s_b/s_y)) + z_y)` of the operands without their zero points."""
    a, b, out = quantized(call, 0), quantized(call, 1), stored(call)
    scale = a.scale * b.scale / out.scale
    return requantize_float(a.centred() * b.centred(), scale, out.zero_point, out.low, out.high)


def rounded_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(integers without zero points int32, what numbers were multiplied by float32 [..., 1]) of x [..., K].

    r = 255/(max(x, 0) − min(x, 0)) of a row; the zero point is counted from the end where that errs less.
    """
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    factor = torch.where(low == high, torch.ones_like(low), (HIGH - LOW) / (high - low))
    below, above = low * factor, high * factor
    zero = torch.where((LOW + below) + (HIGH + above) > 0, LOW - below, HIGH - above)
    zero = rne(zero, LOW, HIGH)
    q = rne(x * factor, LOW - HIGH, HIGH - LOW) + zero
    return q.clamp(LOW, HIGH) - zero, factor
