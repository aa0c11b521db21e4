"""Moments of a stream, and the map from one pair of them to another."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitport.errors import DataError
from bitport.numerics.moments import LARGEST_GAIN, ChannelMoments, matching


@given(st.integers(1, 4), st.integers(1, 5), st.sampled_from([0, 1, -1]), st.integers(0, 2**31))
def test_a_stream_has_the_moments_of_the_whole(parts: int, channels: int, axis: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = [3, 4, 5]
    shape[axis] = channels
    stream = [torch.randn(shape, generator=generator) * 7 + 2 for _ in range(parts)]
    found = ChannelMoments()
    for part in stream:
        found.update(part, axis)
    mean, deviation = found.moments()
    rows = torch.cat([part.movedim(axis, 0).flatten(1) for part in stream], 1).double()
    assert mean.dtype == deviation.dtype == torch.float32 and mean.shape == (channels,)
    torch.testing.assert_close(mean.double(), rows.mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(deviation.double(), rows.std(1, unbiased=False), rtol=1e-6, atol=1e-6)
    assert found.count == rows.shape[1]


def test_a_small_spread_on_a_large_mean_is_kept() -> None:
    # in float32 sums of squares would leave nothing of it
    found, values = ChannelMoments(), 1e3 + torch.linspace(-0.01, 0.01, 4001)[None]
    found.update(values, 0)
    mean, deviation = found.moments()
    assert float(mean) == pytest.approx(1e3)
    assert float(deviation) == pytest.approx(float(values.double().std(unbiased=False)), rel=1e-3)


def test_constants_have_no_spread_and_nothing_has_no_moments() -> None:
    found = ChannelMoments()
    for nothing in (None, torch.zeros(0, 3)):
        if nothing is not None:
            found.update(nothing, 1)
        with pytest.raises(DataError, match="moments of no values: give at least one batch"):
            found.moments()
    found.update(torch.full((5, 3), 0.1), 1)
    mean, deviation = found.moments()
    assert mean.tolist() == pytest.approx([0.1] * 3) and float(deviation.abs().max()) < 1e-7


def test_channels_without_any_other_dimension() -> None:
    found, parts = ChannelMoments(), torch.randn(4, 3)
    for part in parts:
        found.update(part, -1)
    mean, deviation = found.moments()
    torch.testing.assert_close(mean, parts.mean(0))
    torch.testing.assert_close(deviation, parts.std(0, unbiased=False))
    assert found.count == 4


def test_the_map_gives_a_tensor_the_wanted_moments() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(4, 1000, generator=generator) * torch.tensor([[1.0], [3.0], [0.2], [10.0]]) + 5
    spoilt = 0.8 * y - torch.tensor([[1.0], [0.0], [2.0], [-3.0]])
    ends = [(rows.mean(1), rows.std(1, unbiased=False)) for rows in (y, spoilt)]
    gain, shift = matching(*ends[0], *ends[1])
    assert gain.dtype == shift.dtype == torch.float64
    torch.testing.assert_close((gain[:, None] * spoilt + shift[:, None]).float(), y, rtol=1e-5, atol=1e-5)


def test_without_spread_only_means_are_wanted() -> None:
    mean, deviation = torch.tensor([3.0, 1.0]), torch.tensor([2.0, 0.5])
    gain, shift = matching(mean, deviation, torch.zeros(2), torch.ones(2), spread=False)
    assert gain.tolist() == [1.0, 1.0] and shift.tolist() == [3.0, 1.0]


def test_the_root_mean_square_is_that_of_the_whole() -> None:
    x, found = torch.randn(3, 40, generator=torch.Generator().manual_seed(1)) + 2, ChannelMoments()
    found.update(x[:, :15], 0)
    found.update(x[:, 15:], 0)
    torch.testing.assert_close(
        found.root_mean_square(), x.double().square().mean(1).sqrt(), rtol=1e-6, atol=0
    )


def test_gains_are_bounded_and_constants_are_only_shifted() -> None:
    wanted = torch.tensor([10.0, 0.01, 0.0, 1.0, 0.0])
    found = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])
    gain, shift = matching(torch.full((5,), 3.0), wanted, torch.full((5,), 2.0), found)
    assert gain.tolist() == [LARGEST_GAIN, 1 / LARGEST_GAIN, 1.0, 1.0, 1.0]
    # whatever the gain, the mean is the wanted one
    assert (gain * 2 + shift).tolist() == [3.0] * 5
