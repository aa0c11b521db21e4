"""How XNNPACK computes 8-bit operators in ExecuTorch: the same integers, bit for bit.

Measured against ExecuTorch 1.5.1 on x86-64 with AVX-512: one-op graphs, signed activations, signed weights, 0
differing integers. The formulas are those of XNNPACK's kernels (github.com/google/XNNPACK, src/reference and
src/configs). Other processors sum products of scales otherwise.

A kernel maps a `Call` to int32 in bitport's signed scheme, which is XNNPACK's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import TargetError
from ...numerics.arithmetic import (
    Call,
    QSpec,
    QTensor,
    convolved,
    fma,
    project,
    quantized,
    requantize_float,
    rne,
)
from ...plan.constants import Coded

LOW, HIGH = -128, 127
MULTIPLIER_BITS = 20  # of the larger one of an addition's two
INT32 = torch.iinfo(torch.int32)
LARGEST_FLOAT = 2.0**31 - 128  # below 2^31, where a float32 still fits into int32


def quantize(values: Tensor, out: QSpec) -> Tensor:
    """`clip(rne(x·(1/s)) + z)`: multiplied by the reciprocal, float32."""
    return requantize_float(values, 1 / out.scale, out.zero_point, out.low, out.high)


def real_bias(q: Tensor, scale: Tensor) -> Tensor:
    """An int32 bias as the float32 numbers that ExecuTorch's exporter is given. scale: 0-d or [C]."""
    limit = LARGEST_FLOAT * scale.double()
    return (q.double() * scale.double()).clamp(-limit, limit).float()


def stored_bias(bias: QTensor) -> QTensor:
    """What the exporter makes of `real_bias`: `rne(b·(1/s))`, which is the same integer up to 2^22."""
    scale = bias.scale if bias.axis is not None else bias.scale.double()
    back = torch.round(real_bias(bias.q, bias.scale) * (1.0 / scale).to(scale.dtype))
    return replace(bias, q=back.to(torch.float64).clamp(INT32.min, INT32.max).to(torch.int32))


def conv(call: Call) -> Tensor:
    """`clip(rne(float32(acc)·(s_x·s_w/s_y)) + z_y)`, the multiplier float32, left to right."""
    return _finish(call, convolved(call, _bias(call)), 1)


def linear(call: Call) -> Tensor:
    """As conv."""
    return _finish(call, project(quantized(call, 0), quantized(call, 1), _bias(call)), -1)


def add(call: Call) -> Tensor:
    """`((a·m_a + b·m_b + 2^(n−1) − m_a·z_a − m_b·z_b) >> n) + z_y`; the larger m = rne(2^n·s/s_y) takes 21 bits."""
    first, second, out = quantized(call, 0), quantized(call, 1), _out(call)
    ratios = [float(operand.scale / out.scale) for operand in (first, second)]
    shift = MULTIPLIER_BITS - (math.frexp(max(ratios))[1] - 1)
    factors = [round(math.ldexp(ratio, shift)) for ratio in ratios]
    total = first.centred().long() * factors[0] + second.centred().long() * factors[1]
    result = ((total + (1 << (shift - 1))) >> shift) + out.zero_point
    return result.clamp(out.low, out.high).to(torch.int32)


def mul(call: Call) -> Tensor:
    """`clip(rne(float32(a·b)·(s_a·s_b/s_y)) + z_y)` of the operands without their zero points."""
    a, b, out = quantized(call, 0), quantized(call, 1), _out(call)
    scale = a.scale * b.scale / out.scale
    return requantize_float(a.centred() * b.centred(), scale, out.zero_point, out.low, out.high)


def global_avg_pool(call: Call) -> Tensor:
    """`rne(Σ x·m + z′)`, m = s_x/(s_y·n), z′ = z_y − n·z_x·m, float32. x: [B, C, H, W]."""
    x, out = quantized(call, 0), _out(call)
    count = math.prod(x.q.shape[2:])
    factor = x.scale / (out.scale * count)
    total = x.q.sum(dim=list(range(2, x.q.ndim)), keepdim=True, dtype=torch.int64).float()
    shifted = out.zero_point.float() - x.zero_point.float() * count * factor
    return rne(total * factor + shifted, out.low, out.high)


def linear_dynamic(call: Call) -> Tensor:
    """Rows of x rounded on ranges of their own, `fma(float32(acc)·s_x, s_w, bias)`.

    operands: (x: float32 [..., K], weight: `Coded` [N, K], bias: float32 [N] or None) → float32 [..., N]. Where groups
    of weights have scales of their own, those are bfloat16, and sums of groups are added in float32.
    """
    x, weight, bias = (*call.operands, None)[:3]
    if not isinstance(x, Tensor) or not isinstance(weight, Coded):
        raise TargetError(f"{call.kind}: takes a float input and a stored weight")
    q, scale = rounded_rows(x)
    if weight.grid.format.group:
        grid = replace(weight.grid, scale=weight.grid.scale.bfloat16().float())
        return F.linear(q.float() * scale, replace(weight, grid=grid).dequantize(), bias)
    zero, one = torch.zeros((), dtype=torch.int32), torch.ones(())
    codes = QTensor(weight.codes.to(torch.int32), one, zero, LOW, HIGH)
    real = project(QTensor(q, one, zero, LOW - HIGH, HIGH - LOW), codes).float() * scale
    return fma(real, weight.grid.scale, torch.zeros(()) if bias is None else bias)


def rounded_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(integers without zero points int32, scales float32 [..., 1]) of x [..., K].

    r = 255/(max(x, 0) − min(x, 0)) of a row; the zero point is counted from the end where that errs less.
    """
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    factor = torch.where(low == high, torch.ones_like(low), (HIGH - LOW) / (high - low))
    below, above = low * factor, high * factor
    zero = torch.where((LOW + below) + (HIGH + above) > 0, LOW - below, HIGH - above)
    zero = rne(zero, LOW, HIGH)
    q = rne(x * factor, LOW - HIGH, HIGH - LOW) + zero
    return q.clamp(LOW, HIGH) - zero, 1 / factor


KERNELS: dict[str, Callable[[Call], Tensor]] = {
    "conv": conv,
    "linear": linear,
    "linear_dynamic": linear_dynamic,
    "add": add,
    "mul": mul,
    "global_avg_pool": global_avg_pool,
}


def _bias(call: Call) -> QTensor | None:
    found = call.operands[2] if len(call.operands) > 2 else None
    return stored_bias(found) if isinstance(found, QTensor) else None


def _finish(call: Call, acc: Tensor, axis: int) -> Tensor:
    out = _out(call)
    scale = quantized(call, 0).scale * quantized(call, 1).scale / out.scale
    return requantize_float(acc, scale, out.zero_point, out.low, out.high, axis)


def _out(call: Call) -> QSpec:
    if call.out is None:
        raise TargetError(f"{call.kind}: XNNPACK has no such kernel with float output: quantize its output")
    return call.out
