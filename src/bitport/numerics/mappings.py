"""The uniform mappings of textbooks and papers, each a special case of one affine mapping.

    q  = clamp(round((x − shift) / scale) + zero_point, low, high)
    x̂  = (q − zero_point) · scale + shift

bitport stores `affine` only: shift 0, an integer zero point, ties to even, so that 0.0 is exact. The others are here
to compare against code and papers that use them; each says where it differs. All take 0 ≤ code ≤ 2^b − 1.

    mapping        scale                 shift   where it differs from `affine`
    endpoints      (max − min)/(2^b − 1)  min    both ends exact; 0.0 is stored exactly only by luck
    half_open      (max − min)/2^b        min    a finer step, but no code for max, which saturates one step below
    normalized     (max − min)/2^b        min    as half_open; ties upwards instead of to even
    affine         (max − min)/(2^b − 1)  0      0.0 exact; the ends move by up to half a step
    round_scaled   s                      0      no ends: nothing saturates, as many bits as the values need
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bitport.errors import DataError, FormatError
from bitport.formats import Format
from bitport.numerics.quantize import dequantize, qparams, quantize

_MOST_BITS = 16
_INT32 = (-(2**31), 2**31 - 1)


@dataclass(frozen=True)
class Mapping:
    """One affine mapping between real numbers and integers (formulas: the module's text).

    Attributes:
        scale: the step, above 0. shift: the real number of the code `zero_point`.
        zero_point, low, high: integers; codes lie in low … high.
        ties_up: round halves towards +∞, floor(t + ½), instead of to even.
    """

    scale: float
    shift: float = 0.0
    zero_point: int = 0
    low: int = 0
    high: int = 255
    ties_up: bool = False

    def quantize(self, x: Tensor) -> Tensor:
        """The codes of x, int32, its shape; computed in float32."""
        moved = x.detach().float() - torch.tensor(self.shift)
        scale, zero_point = self._parameters()
        if self.ties_up:
            steps = torch.floor(moved / scale + 0.5) + zero_point
            return steps.clamp(self.low, self.high).to(torch.int32)
        return quantize(moved, scale, zero_point, self.low, self.high)

    def dequantize(self, q: Tensor) -> Tensor:
        """The real numbers of codes of any integer type, float32, their shape."""
        return dequantize(q, *self._parameters()) + torch.tensor(self.shift)

    def roundtrip(self, x: Tensor) -> Tensor:
        """`dequantize(quantize(x))`."""
        return self.dequantize(self.quantize(x))

    def _parameters(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.scale), torch.tensor(self.zero_point, dtype=torch.int32)


def endpoints(minimum: float, maximum: float, bits: int) -> Mapping:
    """step = (max − min)/(2^b − 1), q = round((x − min)/step): both ends are codes.

    x̂ = step · q + min, as llama.cpp's Q4_1 stores blocks of weights. 0.0 is a code only where −min/step is an
    integer, so that zero padding and ReLU err by up to half a step.

    Args:
        minimum, maximum: finite, minimum < maximum. bits: 1 … 16.

    Raises:
        DataError: the ends aren't finite and in order. FormatError: bits is outside its range.
    """
    top = _top(minimum, maximum, bits)
    return Mapping((maximum - minimum) / top, minimum, 0, 0, top)


def half_open(minimum: float, maximum: float, bits: int) -> Mapping:
    """step = (max − min)/2^b: the converter of signal processing, whose full scale isn't a code.

    Oppenheim & Schafer, "Discrete-Time Signal Processing", 4.8.2: Δ = 2·X_m/2^(B+1), codes for −X_m … X_m − Δ. max
    itself and all within half a step of it saturate: they err by up to a whole step, twice what the rest does.

    Args, Raises: as `endpoints`.
    """
    top = _top(minimum, maximum, bits)
    return Mapping((maximum - minimum) / (top + 1), minimum, 0, 0, top)


def normalized(minimum: float, maximum: float, bits: int) -> Mapping:
    """x is brought to t in [0, 1], then q = floor(t · 2^b + 0.5): images and many scripts.

    With the top code 2^b clamped to 2^b − 1 it is `half_open` with ties upwards. (DoReFa-Net, Zhou et al. 2016,
    arXiv:1606.06160, scales by 2^b − 1 instead, which is `endpoints` of 0 and 1.)

    Args, Raises: as `endpoints`.
    """
    top = _top(minimum, maximum, bits)
    return Mapping((maximum - minimum) / (top + 1), minimum, 0, 0, top, ties_up=True)


def affine(minimum: float, maximum: float, bits: int) -> Mapping:
    """step = (max − min)/(2^b − 1) with an integer zero point (Jacob et al. 2018, arXiv:1712.05877): bitport's own.

    The range is widened to hold 0.0, and moved by up to half a step so that 0.0 is a code: the same numbers as
    `qparams` gives for `uint<b>`.

    Args, Raises: as `endpoints`.
    """
    top = _top(minimum, maximum, bits)
    ends = torch.tensor([minimum, maximum], dtype=torch.float64)
    scale, zero_point = qparams(ends[0], ends[1], Format("int", low=0, high=top))
    return Mapping(float(scale), 0.0, int(zero_point), 0, top)


def round_scaled(step: float) -> Mapping:
    """round(x/s) · s: a grid without ends, as in papers that leave the number of bits to the entropy coder.

    Nothing saturates (up to int32), 0.0 is exact, and the error is s/2 at most everywhere; the bits that the codes
    need follow from the data.

    Raises:
        DataError: the step isn't finite and above 0.
    """
    if not (math.isfinite(step) and step > 0):
        raise DataError(f"step {step!r} can't be a grid's: give a finite number above 0")
    return Mapping(step, 0.0, 0, *_INT32)


def _top(minimum: float, maximum: float, bits: int) -> int:
    """The highest code. Raises DataError or FormatError."""
    if not (math.isfinite(minimum) and math.isfinite(maximum) and minimum < maximum):
        raise DataError(f"range [{minimum!r}, {maximum!r}] has no steps: give finite ends, the lower first")
    if type(bits) is not int or not 1 <= bits <= _MOST_BITS:
        raise FormatError(f"a mapping of {bits!r} bits isn't supported: give 1 … {_MOST_BITS}")
    return int(2**bits) - 1
