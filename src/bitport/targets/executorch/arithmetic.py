"""How ExecuTorch computes 8-bit operators, with XNNPACK's kernels and its own exporter's biases: bit for bit.

Measured against ExecuTorch 1.5.1 on x86-64 with AVX-512: one-op graphs, signed activations, signed weights, 0
differing integers.

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
    QTensor,
    convolved,
    fma,
    in_float,
    integer_bias,
    project,
    quantized,
    rne,
    stored,
)
from ...plan.constants import Coded
from .._xnnpack import HIGH, LOW, add, mul, requantized, rounded_rows

INT32 = torch.iinfo(torch.int32)
LARGEST_FLOAT = 2.0**31 - 128  # below 2^31, where a float32 still fits into int32


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
    return requantized(call, convolved(call, _bias(call)), 1)


def linear(call: Call) -> Tensor:
    """As conv."""
    if call.out is None:
        return in_float(call)
    return requantized(call, project(quantized(call, 0), quantized(call, 1), _bias(call)), -1)


def global_avg_pool(call: Call) -> Tensor:
    """`rne(Σ x·m + z′)`, m = s_x/(s_y·n), z′ = z_y − n·z_x·m, float32. x: [B, C, H, W]."""
    x, out = quantized(call, 0), stored(call)
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
    q, factor = rounded_rows(x)
    scale = 1 / factor
    if weight.grid.format.group:
        grid = replace(weight.grid, scale=weight.grid.scale.bfloat16().float())
        return F.linear(q.float() * scale, replace(weight, grid=grid).dequantize(), bias)
    zero, one = torch.zeros((), dtype=torch.int32), torch.ones(())
    centred = weight.codes.to(torch.int32) - weight.grid.format.zero_point
    codes = QTensor(centred, one, zero, LOW, HIGH)
    real = project(QTensor(q, one, zero, LOW - HIGH, HIGH - LOW), codes).float() * scale
    return fma(real, weight.grid.scale, torch.zeros(()) if bias is None else bias)


KERNELS: dict[str, Callable[[Call], Tensor]] = {
    "conv": conv,
    "linear": linear,
    "linear_dynamic": linear_dynamic,
    "add": add,
    "mul": mul,
    "global_avg_pool": global_avg_pool,
}


def _bias(call: Call) -> QTensor | None:
    found = integer_bias(call)
    return None if found is None else stored_bias(found)
    return stored_bias(found) if isinstance(found, QTensor) else None
