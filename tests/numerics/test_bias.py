from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from bitport.errors import WeightsError
from bitport.formats import Format
from bitport.numerics.bias import analytic_bias, corrected_bias
from bitport.numerics.quantize import fake_quantize, qparams


def coarse(weight: torch.Tensor) -> torch.Tensor:
    fmt = Format.parse("int3 symmetric")
    scale, zero_point = qparams(weight.min(), weight.max(), fmt)
    return fake_quantize(weight, scale, zero_point, fmt.low, fmt.high)


@pytest.mark.parametrize("with_bias", [True, False])
def test_measured_correction_restores_the_mean(with_bias: bool) -> None:
    x, weight = torch.randn(500, 6) + 1, torch.randn(4, 6)
    bias = torch.randn(4) if with_bias else None
    exact, quantized = F.linear(x, weight, bias), F.linear(x, coarse(weight), bias)
    shift = (exact.mean(0) - quantized.mean(0)).abs()
    assert shift.max() > 0.05
    corrected = corrected_bias(bias, exact.mean(0), quantized.mean(0))
    after = F.linear(x, coarse(weight), corrected)
    assert torch.allclose(after.mean(0), exact.mean(0), atol=1e-5)
    # The mean error is taken back, not the noise: less squared error, but not none.
    assert 0 < (after - exact).square().mean() < (quantized - exact).square().mean()


def test_analytic_equals_measured_for_linear_layers() -> None:
    x, weight, bias = torch.randn(300, 6) + 1, torch.randn(4, 6), torch.randn(4)
    measured = corrected_bias(bias, F.linear(x, weight).mean(0), F.linear(x, coarse(weight)).mean(0))
    assert torch.allclose(analytic_bias(bias, weight, coarse(weight), x.mean(0)), measured, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_analytic_for_convolutions(groups: int) -> None:
    """Exact where every position has the channel's mean input."""
    mean = torch.randn(4)
    x = mean.reshape(1, 4, 1, 1).expand(1, 4, 5, 5)
    weight = torch.randn(8, 4 // groups, 3, 3)
    bias = analytic_bias(None, weight, coarse(weight), mean, groups=groups)
    exact = F.conv2d(x, weight, groups=groups)
    assert torch.allclose(F.conv2d(x, coarse(weight), bias, groups=groups), exact, atol=1e-4)


def test_nothing_to_correct() -> None:
    bias, mean = torch.randn(3), torch.randn(3)
    assert torch.equal(corrected_bias(bias, mean, mean), bias)
    weight = torch.randn(3, 2, 3)
    assert torch.equal(analytic_bias(bias, weight, weight, torch.randn(2)), bias)
    assert (analytic_bias(None, weight, weight, torch.randn(2)) == 0).all()


def test_refused() -> None:
    with pytest.raises(WeightsError, match="one value per output channel"):
        corrected_bias(torch.zeros(3), torch.zeros(2), torch.zeros(2))
    with pytest.raises(WeightsError, match="NaN or infinite"):
        corrected_bias(None, torch.tensor([math.nan]), torch.zeros(1))
    with pytest.raises(WeightsError, match="one mean per input channel"):
        analytic_bias(None, torch.ones(4, 2, 3), torch.ones(4, 2, 3), torch.ones(2), groups=2)
