"""Rotations: orthogonal, leaving the mean where it is, spreading what sticks out, and nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from bitport.errors import WeightsError
from bitport.numerics.rotation import has_hadamard, random_signs, rotation, spreading, turned

sizes = st.one_of(st.integers(1, 90), st.sampled_from([96, 112, 160, 192, 384, 448]))
seeds = st.integers(0, 10**6)


def made(size: int, seed: int, keeps_ones: bool) -> Tensor:
    return rotation(random_signs(size, seed), keeps_ones)


def sample(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def incoherence(x: Tensor) -> float:
    """√C · max|x| / ‖x‖ over the last axis, the mean of all rows: 1 of equal magnitudes, √C of one outlier."""
    return float((x.abs().amax(-1) * x.shape[-1] ** 0.5 / x.norm(dim=-1)).mean())


def kurtosis(x: Tensor) -> float:
    """The fourth moment over the channels against the second's square, 3 of normal numbers."""
    return float((x.pow(4).mean(-1) / x.square().mean(-1).square()).mean())


# ------------------------------------------------------------------------------------------------ the matrix


@given(sizes, seeds, st.booleans())
def test_it_is_orthogonal_and_keeps_lengths(size: int, seed: int, keeps_ones: bool) -> None:
    matrix, x = made(size, seed, keeps_ones), sample(5, size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(turned(x, matrix, 1).norm(dim=1), x.norm(dim=1), rtol=1e-12, atol=0)
    assert torch.equal(matrix, made(size, seed, keeps_ones))


@given(sizes, seeds)
def test_the_mean_of_the_channels_stays_and_layer_norm_commutes(size: int, seed: int) -> None:
    matrix, x = made(size, seed, True), 5 + 3 * sample(4, size)
    one = torch.ones(size, dtype=torch.float64)
    torch.testing.assert_close(matrix @ one, one, rtol=0, atol=1e-12)
    wanted = turned(F.layer_norm(x, (size,)), matrix, 1)
    torch.testing.assert_close(F.layer_norm(turned(x, matrix, 1), (size,)), wanted, rtol=0, atol=1e-9)
    wanted = turned(F.rms_norm(x, (size,)), made(size, seed, False), 1)
    torch.testing.assert_close(
        F.rms_norm(turned(x, made(size, seed, False), 1), (size,)), wanted, rtol=0, atol=1e-9
    )


def test_the_plain_one_does_not_keep_the_mean() -> None:
    one = torch.ones(64, dtype=torch.float64)
    assert float((made(64, 0, False) @ one - one).abs().max()) > 0.5


@pytest.mark.parametrize("size", [1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 44, 56, 64, 80, 96, 112, 768, 896])
def test_hadamard_matrices_have_entries_of_one_size(size: int) -> None:
    assert has_hadamard(size)
    matrix = spreading(size) * size**0.5
    torch.testing.assert_close(matrix.abs(), torch.ones_like(matrix), rtol=1e-12, atol=0)
    torch.testing.assert_close(matrix @ matrix.T, size * torch.eye(size, dtype=torch.float64))


@given(sizes)
def test_no_entry_is_larger_than_a_transforms(size: int) -> None:
    assert float(spreading(size).abs().max()) <= (2 / size) ** 0.5 * (1 + 1e-12)


def test_orders_without_a_matrix_are_no_hadamard_orders() -> None:
    assert not any(has_hadamard(order) for order in (3, 5, 6, 7, 10, 14, 18, 22, 92, 100))


# ------------------------------------------------------------------------------------------------ what it does


@given(st.sampled_from([32, 48, 56, 66, 75, 96, 128]), seeds, st.booleans())
def test_outliers_of_a_channel_are_spread(size: int, seed: int, keeps_ones: bool) -> None:
    x = sample(64, size)
    x[:, seed % size] *= 40
    found = turned(x, made(size, seed, keeps_ones), 1)
    assert incoherence(found) < 0.7 * incoherence(x)
    assert kurtosis(found) < 0.5 * kurtosis(x)


@given(st.sampled_from([32, 48, 56, 66, 75, 96, 128]), seeds, st.booleans())
def test_what_is_spread_already_gains_nothing(size: int, seed: int, keeps_ones: bool) -> None:
    x = sample(256, size)
    found = turned(x, made(size, seed, keeps_ones), 1)
    assert 0.93 < incoherence(found) / incoherence(x) < 1.07
    signs = x.sign()  # as spread as can be: turned, they can only get worse
    assert incoherence(turned(signs, made(size, seed, keeps_ones), 1)) > 1.5 * incoherence(signs)


def test_layers_on_both_sides_of_rotated_channels_compute_the_same() -> None:
    matrix, x = made(24, 3, False), sample(5, 7)
    first, bias, second = sample(24, 7), sample(24), sample(3, 24)
    wanted = F.linear(F.linear(x, first, bias), second)
    between = F.linear(x, turned(first, matrix, 0), turned(bias, matrix, 0))
    torch.testing.assert_close(F.linear(between, turned(second, matrix, 1)), wanted)
    assert turned(first.float(), matrix, 0).dtype == torch.float32


@pytest.mark.parametrize("signs", [torch.ones(2, 2), torch.tensor([1.0, 0.5]), torch.ones(0), torch.zeros(3)])
def test_what_is_no_list_of_signs_is_refused(signs: Tensor) -> None:
    with pytest.raises(WeightsError, match="one 1 or −1 a channel"):
        rotation(signs, False)


def test_signs_are_drawn_from_their_seed_alone() -> None:
    state = torch.get_rng_state()
    assert torch.equal(random_signs(64, 1), random_signs(64, 1))
    assert not torch.equal(random_signs(64, 1), random_signs(64, 2))
    assert torch.equal(torch.get_rng_state(), state)
