"""How LiteRT computes 8-bit operators with XNNPACK, and with its own kernels where that has none: bit for bit.

Measured against ai-edge-litert 2.3.0 on x86-64 with AVX-512: one-op files, signed activations and weights. The formulas
are those of `targets._xnnpack` and of TFLite's built-in kernels.

A kernel maps a `Call` to int32.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ...numerics.arithmetic import (
    Call,
    convolved,
    in_float,
    integer_bias,
    multiply,
    project,
    quantized,
    requantize_float,
    rne,
    stored,
)
from ...simulate import Arithmetic
from .._xnnpack import add, mul, quantize, requantized
from .fixed_point import multiplied
from .floats import linear_dynamic


def conv(call: Call) -> Tensor:
    """`clip(rne(float32(acc) · (s_x·s_w/s_y)) + z_y)`."""
    return requantized(call, convolved(call, integer_bias(call)), 1)


def linear(call: Call) -> Tensor:
    """As conv."""
    if call.out is None:
        return in_float(call)
    return requantized(call, project(quantized(call, 0), quantized(call, 1), integer_bias(call)), -1)


def matmul(call: Call) -> Tensor:
    """TFLite's own kernel: a 31-bit multiplier, rounded twice."""
    if call.out is None:
        return in_float(call)
    a, b, out = quantized(call, 0), quantized(call, 1), stored(call)
    return multiplied(multiply(a, b), a.scale.double() * b.scale.double() / out.scale.double(), out)


def global_avg_pool(call: Call) -> Tensor:
    """`clip(rne(float32(Σ(x − z_x)) · (s_x/(s_y·n))) + z_y)`."""
    x, out = quantized(call, 0), stored(call)
    dims = list(range(2, x.q.ndim))
    total = x.centred().sum(dim=dims, keepdim=True, dtype=torch.int64).to(torch.int32)
    count = math.prod(x.q.shape[2:])
    return requantize_float(total, x.scale / out.scale / count, out.zero_point, out.low, out.high)


def sigmoid(call: Call) -> Tensor:
    """A table of 256 entries."""
    x, out = quantized(call, 0), stored(call)
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
