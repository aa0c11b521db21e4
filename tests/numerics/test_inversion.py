"""Distance to a BatchNorm's statistics: zero at them, larger off them, and gradients lead there."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitport.numerics.inversion import moment_distance


def batch(mean: float, deviation: float, shape: tuple[int, ...] = (64, 3, 5)) -> Tensor:
    torch.manual_seed(0)
    x = torch.randn(shape)
    axes = [axis for axis in range(len(shape)) if axis != 1]
    x = (x - x.mean(axes, keepdim=True)) / x.var(axes, unbiased=False, keepdim=True).sqrt()
    return mean + deviation * x


def distance(x: Tensor, mean: float, variance: float) -> float:
    count = x.shape[1]
    return float(moment_distance(x, torch.full((count,), mean), torch.full((count,), variance)))


@given(st.floats(-5, 5), st.floats(0.1, 10), st.sampled_from([(64, 3), (64, 3, 5), (8, 3, 4, 4)]))
def test_a_batch_with_those_statistics_is_at_zero(
    mean: float, deviation: float, shape: tuple[int, ...]
) -> None:
    assert distance(batch(mean, deviation, shape), mean, deviation**2) < 1e-6


def test_one_deviation_off_counts_one_whatever_the_units() -> None:
    for scale in (0.1, 1.0, 1e3):
        assert abs(distance(batch(2 * scale, scale), scale, scale**2) - 1) < 1e-2  # eps blurs small ones
        assert abs(distance(batch(scale, 2 * scale), scale, scale**2) - 1) < 1e-2


def test_channels_that_never_vary_give_finite_gradients() -> None:
    x = torch.zeros(4, 2, 3, requires_grad=True)
    moment_distance(x, torch.ones(2), torch.zeros(2)).backward()
    assert x.grad is not None and bool(torch.isfinite(x.grad).all())


def test_gradients_lead_to_the_statistics() -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 3, 4).requires_grad_()
    mean, variance = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([0.25, 4.0, 1.0])
    optimizer = torch.optim.Adam([x], lr=0.05)
    before = float(moment_distance(x, mean, variance).detach())
    for _ in range(300):
        optimizer.zero_grad()
        found = moment_distance(x, mean, variance)
        found.backward()
        optimizer.step()
    assert float(found.detach()) < 1e-3 * before
    assert torch.allclose(x.detach().mean((0, 2)), mean, atol=0.1)
