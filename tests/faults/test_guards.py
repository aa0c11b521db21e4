"""Guards that no other test misses when they are switched off (see mutations.py)."""

from __future__ import annotations

import pytest
import torch

from bitport.formats import Format
from bitport.numerics.quantize import SMALLEST_SCALE, dequantize, qparams, quantize


@pytest.mark.parametrize("text", ["int8", "int8 symmetric", "uint8"])
@pytest.mark.parametrize("end", [1e-45, 1e-40, 1e-300])
def test_scales_of_the_smallest_ranges_have_a_floor(text: str, end: float) -> None:
    fmt = Format.parse(text)
    low, high = torch.tensor([0.0, end], dtype=torch.float64)
    scale, zero_point = qparams(low, high, fmt)
    assert float(scale) == SMALLEST_SCALE
    x = torch.tensor([0.0, end])
    back = dequantize(quantize(x, scale, zero_point, fmt.low, fmt.high), scale, zero_point)
    assert back.tolist() == [0.0, 0.0]
