"""How LiteRT computes 8-bit operators with XNNPACK, and with its own kernels where that has none: bit for bit.

Measured against ai-edge-litert 2.3.0 on x86-64 with AVX-512: one-op files, signed activations and weights. The formulas
are those of XNNPACK's requantization (github.com/google/XNNPACK) and of TFLite's built-in kernels.

A kernel maps a `Call` to int32.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ...numerics.arithmetic import (
    Call,
    QSpec,
    QTensor,
    convolved,
    multiply,
    project,
    quantized,
    requantize_float,
    rne,
)
from ...simulate import Arithmetic
from .fixed_point import in_float, linear_dynamic, multiplied, out_of

BITS_OF_ADD = 20  # of the larger of an add's two multipliers


def quantize(values: Tensor, out: QSpec) -> Tensor:
    """`clip(rne(x · (1/s)) + z)`: the reciprocal is rounded first."""
    scaled = values * (torch.ones(()) / out.scale)
    return requantize_float(scaled, None, out.zero_point, out.low, out.high)


def conv(call: Call) -> Tensor:
    """`clip(rne(float32(acc) · (s_x·s_w/s_y)) + z_y)`."""
    return _requantized(call, convolved(call, _bias(call)), 1)


def linear(call: Call) -> Tensor:
    """As conv."""
    if call.out is None:
        return in_float(call)
    return _requantized(call, project(quantized(call, 0), quantized(call, 1), _bias(call)), -1)


def matmul(call: Call) -> Tensor:
    """TFLite's own kernel: a 31-bit multiplier, rounded twice."""
    if call.out is None:
        return in_float(call)
    a, b, out = quantized(call, 0), quantized(call, 1), out_of(call)
    return multiplied(multiply(a, b), a.scale.double() * b.scale.double() / out.scale.double(), out)


def add(call: Call) -> Tensor:
    """`(a·m_a + b·m_b + half) >> shift`, with multipliers of at most 21 bits."""
    a, b, out = quantized(call, 0), quantized(call, 1), out_of(call)
    ratios = [t.scale / out.scale for t in (a, b)]
    exponent = math.frexp(max(float(r) for r in ratios))[1] - 1
    shift = BITS_OF_ADD - exponent
    m_a, m_b = (int(torch.round(r.double() * 2.0**shift)) for r in ratios)
    total = a.centred().long() * m_a + b.centred().long() * m_b + (1 << (shift - 1))
    return _clipped((total >> shift).to(torch.int32), out)


def mul(call: Call) -> Tensor:
    """`clip(rne(float32(a·b) · (s_a·s_b/s_y)) + z_y)`."""
    a, b, out = quantized(call, 0), quantized(call, 1), out_of(call)
    scale = a.scale * b.scale / out.scale
    return requantize_float(a.centred() * b.centred(), scale, out.zero_point, out.low, out.high)


def global_avg_pool(call: Call) -> Tensor:
    """`clip(rne(float32(Σ(x − z_x)) · (s_x/(s_y·n))) + z_y)`."""
    x, out = quantized(call, 0), out_of(call)
    dims = list(range(2, x.q.ndim))
    total = x.centred().sum(dim=dims, keepdim=True, dtype=torch.int64).to(torch.int32)
    count = math.prod(x.q.shape[2:])
    return requantize_float(total, x.scale / out.scale / count, out.zero_point, out.low, out.high)


def sigmoid(call: Call) -> Tensor:
    """A table of 256 entries."""
    x, out = quantized(call, 0), out_of(call)
    values = torch.sigmoid(x.dequantize())
    return rne(values * (1 / out.scale) + out.zero_point.float(), out.low, out.high)


KERNELS: dict[str, Callable[[Call], Tensor]] = {
    "conv": conv,
    "linear": linear,
    "linear_dynamic": linear_dynamic,
    "matmul": matmul,
    "add": add,
    "mul": mul,
    "global_avg_pool": global_avg_pool,
    "sigmoid": sigmoid,
}
ARITHMETIC = Arithmetic(KERNELS, quantize=quantize)


def _bias(call: Call) -> QTensor | None:
    return quantized(call, 2) if len(call.operands) > 2 and call.operands[2] is not None else None


def _requantized(call: Call, acc: Tensor, axis: int) -> Tensor:
    out = out_of(call)
    scale = quantized(call, 0).scale * quantized(call, 1).scale / out.scale
    return requantize_float(acc, scale, out.zero_point, out.low, out.high, axis)


def _clipped(values: Tensor, out: QSpec) -> Tensor:
    return (values + out.zero_point).clamp(out.low, out.high)
