"""TFLite's fixed-point arithmetic: a real multiplier as 31 bits and a power of two.

The formulas are those of tensorflow/lite/kernels/internal (`QuantizeMultiplier`,
`MultiplyByQuantizedMultiplier`) and of gemmlowp's fixed-point library that they come from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...numerics.arithmetic import QSpec, along

FRACTION = 31  # bits


def split(multiplier: Tensor) -> tuple[Tensor, Tensor]:
    """(m, e) with multiplier ≈ m · 2^(e − 31), m of 31 bits; float64 in, int64 out, any shape."""
    fraction, exponent = torch.frexp(multiplier.double())
    m = away(fraction * 2.0**FRACTION).long()
    e = exponent.long()
    full = m == 1 << FRACTION
    m, e = torch.where(full, m // 2, m), torch.where(full, e + 1, e)
    return torch.where(e < -FRACTION, torch.zeros_like(m), m), torch.where(
        e < -FRACTION, torch.zeros_like(e), e
    )


def away(values: Tensor) -> Tensor:
    """Rounded to whole numbers, half away from zero."""
    return torch.sign(values) * torch.floor(values.abs() + 0.5)


def high_mul(a: Tensor, b: Tensor) -> Tensor:
    """gemmlowp's saturating rounding doubling high product of two int32: `a·b / 2^31`, half away from zero."""
    product = a.long() * b.long()
    nudge = torch.where(product >= 0, 1 << 30, 1 - (1 << 30))
    return torch.div(product + nudge, 1 << FRACTION, rounding_mode="trunc").clamp(max=2**31 - 1)


def shifted(values: Tensor, by: Tensor) -> Tensor:
    """`values / 2^by`, half away from zero, of integers."""
    mask = (torch.ones_like(by) << by) - 1
    remainder = values & mask
    threshold = (mask >> 1) + (values < 0).long()
    return (values >> by) + (remainder > threshold).long()


def scaled(values: Tensor, multiplier: Tensor, axis: int | None = None) -> Tensor:
    """`values · multiplier`, rounded twice; multiplier: float64, 0-d or [C] along `axis`. int64."""
    m, e = (along(part, values.ndim, axis) for part in split(multiplier))
    return by_parts(values, m, e)


def by_parts(values: Tensor, m: Tensor, e: Tensor) -> Tensor:
    """`values · m · 2^(e − 31)`, rounded twice; m, e: as `split` gives them. int64."""
    left, right = e.clamp(min=0), (-e).clamp(min=0)
    return shifted(high_mul(values.long() << left, m), right)


def multiplied(acc: Tensor, multiplier: Tensor, out: QSpec, axis: int | None = None) -> Tensor:
    """Integer sums requantized, int32."""
    return (scaled(acc, multiplier, axis) + out.zero_point).clamp(out.low, out.high).to(torch.int32)
