"""Scales at the width they are stored with.

float32, float16, bfloat16    as they are
e8m0                          a power of two: 8 bits of biased exponent           OCP MX v1.0, 2023
e4m3                          a small float each, times one float32 a tensor      NVIDIA's NVFP4
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bitport.errors import FormatError
from bitport.formats import Format
from bitport.numerics.floats import from_bits, largest_number, layout, to_bits
from bitport.numerics.quantize import LARGEST_SCALE, SMALLEST_SCALE

BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "e8m0": 8, "e4m3": 8, "none": 0}
_E8M0_BIAS = 127
_E4M3 = layout(Format.parse("e4m3"))
_E4M3_MOST = largest_number(_E4M3)
# The smallest code of e4m3 is 2^-9: no product with this factor is subnormal in float32.
_LEAST_FACTOR = SMALLEST_SCALE * 2.0**9
# Below float16's normal numbers (6.1e-5) bits are lost one by one: here a scale is still kept to 3 percent.
_SMALLEST_FLOAT16 = 2.0**-20


def smallest(name: str) -> float:
    """The smallest scale that `stored` takes without an error."""
    return _SMALLEST_FLOAT16 if name == "float16" else SMALLEST_SCALE


def stored(wanted: Tensor, name: str, *, up: bool, most: float = LARGEST_SCALE) -> Tensor:
    """Scales that `name` can store, near the wanted ones; float32, same shape.

    Args:
        wanted: within 2^±126, any shape and float type.
        name: one of `formats.SCALES`.
        up: whether to take the smallest that isn't below the wanted one, so that a range still fits, and not the
            nearest. float32 is always rounded to the nearest.
        most: the largest scale with which every code stays finite; where rounding up passes it, it rounds down.

    Raises:
        FormatError: a scale is beyond float16's 65504 or below 2^-20, where float16 loses it.
    """
    exact = wanted.detach().double()
    if name == "float32" or exact.numel() == 0:
        return exact.float()
    if name == "e8m0":
        mantissa, exponent = torch.frexp(exact)  # mantissa in [½, 1)
        exponent = exponent - (mantissa <= 0.5 if up else mantissa < 0.75).to(exponent.dtype)
        lowest, highest = (math.floor(math.log2(end)) for end in (SMALLEST_SCALE, min(most, LARGEST_SCALE)))
        return torch.ldexp(torch.ones_like(exact), exponent.clamp(lowest, highest)).float()
    if name == "e4m3":
        exact = exact.clamp(max=most * (1 - 2.0**-18))  # so that rounding the factor up can't pass `most`
        factor = _factor(float(exact.max()))
        return _rounded(exact / factor, name, up, math.inf).mul_(factor)
    if name == "float16":
        least, top = float(exact.min()), float(exact.max())
        if least < _SMALLEST_FLOAT16 or top > largest_number(layout(Format.parse(name))):
            wrong = least if least < _SMALLEST_FLOAT16 else top
            raise FormatError(
                f"a scale of {wrong:g} can't be kept in float16 ({_SMALLEST_FLOAT16:.1e} … 65504): store scales in "
                "float32 or bfloat16"
            )
    return _rounded(exact, name, up, most)


def parts(scale: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """What a file holds of scales that `stored` made: (codes, factor), `scale = value(code) · factor` exactly.

    Args:
        scale: float32, any shape. name: as for `stored`.

    Returns: codes, int32, shape of scale: the bit patterns of the stored type (e8m0: exponent + 127); factor,
        float32 0-d: 1 but for e4m3.

    Raises:
        FormatError: a scale isn't one that `name` stores.
    """
    factor = torch.tensor(1.0)
    if name == "e8m0":
        exponent = torch.frexp(scale)[1]
        codes = (exponent - 1 + _E8M0_BIAS).to(torch.int32)
    else:
        if name == "e4m3" and scale.numel():
            factor = torch.tensor(_factor(float(scale.max())))
        codes = to_bits(scale / factor, layout(Format.parse(name)))
    if not torch.equal(from_parts(codes, factor, name), scale):
        raise FormatError(f"scales aren't numbers of {name}: make them by numerics.codes.fit")
    return codes, factor


def from_parts(codes: Tensor, factor: Tensor, name: str) -> Tensor:
    """The scales whose `parts` are given, float32, shape of codes."""
    if name == "e8m0":
        return torch.ldexp(torch.ones_like(codes, dtype=torch.float32), codes - _E8M0_BIAS)
    return from_bits(codes, layout(Format.parse(name))) * factor


def _rounded(exact: Tensor, name: str, up: bool, most: float) -> Tensor:
    """The nearest number of a float format that isn't 0, or the smallest one ≥ exact; at most `most`."""
    fields = layout(Format.parse(name))
    codes = to_bits(exact.float(), fields)
    if up:
        codes = (codes + (from_bits(codes, fields) < exact).int()).clamp_(max=fields.top)
    codes = (codes - (from_bits(codes, fields) > most).int()).clamp_(min=1)
    return from_bits(codes, fields)


def _factor(largest: float) -> float:
    """The float32 that e4m3 scales of a tensor are multiplied by: largest / 448, rounded up to 20 bits.

    So many bits make its product with the 4 bits of e4m3 exact; the largest product is 448 times the factor, from
    which the same factor is found again.
    """
    mantissa, exponent = math.frexp(max(largest / _E4M3_MOST, _LEAST_FACTOR))
    return math.ldexp(math.ceil(mantissa * 2**20), exponent - 20)
