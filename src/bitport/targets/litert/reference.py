"""How LiteRT's reference kernels compute 8-bit operators: bit for bit, in fixed point.

Measured against ai-edge-litert 2.3.0 with `OpResolverType.BUILTIN_REF`. The formulas are those of
tensorflow/lite/kernels/internal/reference.

A kernel maps a `Call` to int32.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ...numerics.arithmetic import (
    Call,
    along,
    convolved,
    in_float,
    integer_bias,
    multiply,
    project,
    quantize,
    quantized,
    stored,
)
from ...simulate import Arithmetic
from .fixed_point import FRACTION, away, by_parts, multiplied, scaled, split
from .floats import linear_dynamic

LEFT_SHIFT = 20  # of an add's operands, so that their bits aren't lost


def conv(call: Call) -> Tensor:
    """A 31-bit multiplier per channel, rounded twice."""
    out = stored(call)
    factor = quantized(call, 0).scale.double() * quantized(call, 1).scale.double() / out.scale.double()
    return multiplied(convolved(call, integer_bias(call)), factor, out, 1)


def linear(call: Call) -> Tensor:
    """In double, half away from zero."""
    if call.out is None:
        return in_float(call)
    x, weight, out = quantized(call, 0), quantized(call, 1), stored(call)
    acc = project(x, weight, integer_bias(call))
    factor = x.scale.double() * weight.scale.double() / out.scale.double()
    values = away(acc.double() * along(factor, acc.ndim, -1))
    return (values + out.zero_point).clamp(out.low, out.high).to(torch.int32)


def matmul(call: Call) -> Tensor:
    """A 31-bit multiplier, rounded twice."""
    if call.out is None:
        return in_float(call)
    a, b, out = quantized(call, 0), quantized(call, 1), stored(call)
    return multiplied(multiply(a, b), a.scale.double() * b.scale.double() / out.scale.double(), out)


def add(call: Call) -> Tensor:
    """Both operands shifted by 20 bits, brought to twice the larger scale, added, and scaled back."""
    a, b, out = quantized(call, 0), quantized(call, 1), stored(call)
    twice = 2 * torch.maximum(a.scale, b.scale).double()
    parts = [scaled(t.centred().long() << LEFT_SHIFT, t.scale.double() / twice) for t in (a, b)]
    return multiplied(parts[0] + parts[1], twice / (2.0**LEFT_SHIFT * out.scale.double()), out)


def mul(call: Call) -> Tensor:
    """A 31-bit multiplier, rounded twice."""
    a, b, out = quantized(call, 0), quantized(call, 1), stored(call)
    factor = a.scale.double() * b.scale.double() / out.scale.double()
    return multiplied(a.centred() * b.centred(), factor, out)


def global_avg_pool(call: Call) -> Tensor:
    """A 31-bit multiplier that is divided by n, cut off."""
    x, out = quantized(call, 0), stored(call)
    dims = list(range(2, x.q.ndim))
    total = x.centred().sum(dim=dims, keepdim=True, dtype=torch.int64)
    count = math.prod(x.q.shape[2:])
    m, e = split(x.scale.double() / out.scale.double())
    shift = min(count.bit_length() - 1, 32, FRACTION + int(e))
    m, e = torch.div(m << shift, count, rounding_mode="floor"), e - shift
    return (by_parts(total, m, e) + out.zero_point).clamp(out.low, out.high).to(torch.int32)


def sigmoid(call: Call) -> Tensor:
    """A table of 256 entries."""
    return quantize(torch.sigmoid(quantized(call, 0).dequantize()), stored(call))


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
