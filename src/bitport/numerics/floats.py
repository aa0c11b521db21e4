"""Floating point numbers of few bits: real numbers ⇄ bit patterns sign | exponent | mantissa.

A pattern with the exponent field e > 0 stands for (1 + m/2^M) · 2^(e − bias), with e = 0 for m/2^M · 2^(1 − bias);
bias = 2^(E−1) − 1. Which patterns are no numbers follows one rule:

    up to 6 bits (e2m1, e2m3, e3m2 …)   none: every pattern is a number          OCP MX v1.0, 2023
    e4m3                                all ones is NaN, there is no infinity    OCP FP8 v1.0, 2023 ("E4M3", "fn")
    the others (e5m2, e3m4, float16 …)  the highest exponent is infinity (m = 0) or NaN, as in IEEE 754

`log2(N)` is the same with E = N − 1, M = 0 and the bias that makes 1 the largest value: 0 and ±2^−(2^(N−1)−2) … ±1
(Miyashita et al. 2016, arXiv:1603.01025). Its codes are sign | k, with k = 0 for zero. Miyashita rounds the logarithm,
which puts the threshold between 2^k and 2^(k+1) at √2 · 2^k; here the nearest value is taken, threshold 1.5 · 2^k,
which has the smaller squared error.

Rounding is to the nearest value, ties to the even pattern; what exceeds the largest value becomes the largest value.
Subnormals are kept. Everything is integer arithmetic on the bits of float32, so that a processor's
flush-to-zero mode changes nothing for numbers within float32's normal range.

Legend: E exponent bits, M mantissa bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bitport.errors import FormatError
from bitport.formats import Format

_BIAS, _MANTISSA = 127, 23  # of float32


@dataclass(frozen=True)
class Layout:
    """The fields of a float format.

    exponent, mantissa: widths in bits. bias: what the exponent field exceeds the exponent by. top: the pattern
    (without sign) of the largest number. infinity: whether the pattern after it is infinity and not NaN.
    negative_zero: whether −0 keeps its sign.
    """

    exponent: int
    mantissa: int
    bias: int
    top: int
    infinity: bool = False
    negative_zero: bool = True

    @property
    def smallest_exponent(self) -> int:
        """The exponent of the smallest normal number, and of the subnormal ones."""
        return 1 - self.bias

    @property
    def largest_exponent(self) -> int:
        """The exponent of the largest number; "emax" in the MX specification."""
        return max(self.top >> self.mantissa, 1) - self.bias

    @property
    def shares_bias(self) -> bool:
        """Whether the patterns are float32's, cut short."""
        return self.bias == _BIAS


def layout(fmt: Format) -> Layout:
    """The fields of a format of the kind "float" or "log2".

    Raises:
        FormatError: the format is of another kind.
    """
    if fmt.kind == "log2":
        half = 2 ** (fmt.bits - 1) - 1
        return Layout(fmt.bits - 1, 0, half, half, negative_zero=False)
    if fmt.kind != "float":
        raise FormatError(f"{fmt} has no exponent and mantissa: give a float format, such as e4m3")
    E, M = fmt.exponent, fmt.mantissa
    bias = 2 ** (E - 1) - 1
    if fmt.bits <= 6:
        return Layout(E, M, bias, 2 ** (E + M) - 1)
    if (E, M) == (4, 3):
        return Layout(E, M, bias, 2 ** (E + M) - 2)
    return Layout(E, M, bias, (2**E - 1) * 2**M - 1, infinity=True)


def to_bits(x: Tensor, fields: Layout) -> Tensor:
    """The pattern of the nearest number, int32, shape of x.

    Args:
        x: float32, no NaN; infinities become the largest number.
    """
    shift = _MANTISSA - fields.mantissa
    if shift == 0:
        return x.clamp(-largest_number(fields), largest_number(fields)).view(torch.int32)
    sign = (x.view(torch.int32) >> 31) & 1
    magnitude = x.abs().clamp_(max=largest_number(fields))
    bits = magnitude.view(torch.int32) - ((_BIAS - fields.bias) << _MANTISSA)
    odd = (bits >> shift) & 1
    code = bits.add_(2 ** (shift - 1) - 1).add_(odd) >> shift
    if not fields.shares_bias:
        # Below the normal numbers: adding this constant leaves the sum's last bits worth one subnormal step each.
        start = 2.0**fields.smallest_exponent
        anchor = torch.tensor(start * 2.0**shift)
        subnormal = (magnitude + anchor).view(torch.int32) - int(anchor.view(torch.int32))
        code = torch.where(magnitude < start, subnormal, code)
    if not fields.negative_zero:
        sign.masked_fill_(code == 0, 0)
    return code.bitwise_or_(sign << (fields.exponent + fields.mantissa))


def from_bits(code: Tensor, fields: Layout) -> Tensor:
    """The numbers of patterns, float32, shape of code; infinity and NaN where a pattern means them.

    Args:
        code: int32.
    """
    shift = _MANTISSA - fields.mantissa
    if shift == 0:
        return code.view(torch.float32)
    width = fields.exponent + fields.mantissa
    pattern = code & (2**width - 1)
    value = ((pattern << shift) + ((_BIAS - fields.bias) << _MANTISSA)).view(torch.float32)
    if not fields.shares_bias:
        step = 2.0 ** (fields.smallest_exponent - fields.mantissa)
        value = torch.where(pattern < 2**fields.mantissa, pattern.float() * step, value)
    if fields.infinity:
        value = value.masked_fill(pattern == fields.top + 1, torch.inf)
    value = value.masked_fill(pattern > fields.top + fields.infinity, torch.nan)
    negative = (code >> width) & 1 == 1
    if not fields.negative_zero:
        negative &= pattern != 0
    return torch.where(negative, -value, value)


def largest_number(fields: Layout) -> float:
    """The largest finite number of a layout."""
    M = fields.mantissa
    exponent, mantissa = fields.top >> M, fields.top & (2**M - 1)
    implied = 2**M if exponent else 0
    return math.ldexp(implied + mantissa, max(exponent, 1) - fields.bias - M)
