"""Scales between layers: what they keep, what they even out, and what they leave alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from bitport.errors import WeightsError
from bitport.formats import Format
from bitport.numerics.equalize import (
    LARGEST,
    input_ranges,
    layer_scales,
    output_ranges,
    salience_scales,
    scale_inputs,
    scale_outputs,
    smoothing_scales,
    spread,
)
from bitport.numerics.quantize import fake_quantize, qparams

sizes = st.lists(st.floats(1e-5, 1e5), min_size=1, max_size=9)
maybe_dead = st.lists(st.one_of(st.just(0.0), st.floats(1e-30, 1e30)), min_size=1, max_size=9)


def rounded(weight: Tensor, bits: int = 8) -> Tensor:
    """One symmetric scale for the tensor, as wide as its values."""
    high = 2 ** (bits - 1) - 1
    scale = weight.abs().max() / high
    return (weight / scale).round() * scale


def two(spreads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of two layers whose channels differ by factors that cancel out, and an input."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(len(spreads), 6, generator=generator), torch.randn(4, len(spreads))
    return first * spreads[:, None], second / spreads, torch.randn(64, 6, generator=generator)


# ------------------------------------------------------------------------------------------------ the formula


@given(sizes, st.integers(0, 10**6))
def test_both_sides_get_one_range_up_to_one_factor(made: list[float], seed: int) -> None:
    r1 = torch.tensor(made, dtype=torch.float64)
    r2 = r1[torch.randperm(len(r1), generator=torch.Generator().manual_seed(seed))].flip(0)
    scales = layer_scales(r1, r2)
    bounded = (scales > 1.01 / LARGEST) & (scales < LARGEST / 1.01)
    quotient = ((r1 / scales) / (r2 * scales))[bounded]
    assert quotient.numel() == 0 or torch.allclose(quotient, quotient[:1].expand_as(quotient), rtol=1e-9)


def test_it_is_nagels_scale_up_to_one_factor() -> None:
    r1, r2 = torch.tensor([1.0, 8.0, 0.5]).double(), torch.tensor([2.0, 0.5, 4.0]).double()
    paper = (r1 * r2).sqrt() / r2
    scales = layer_scales(r1, r2)
    assert torch.allclose(scales / paper, (scales / paper)[:1].expand(3), rtol=1e-12)
    assert float(scales.median()) == pytest.approx(1.0)


def test_it_is_smoothquants_scale_up_to_one_factor() -> None:
    a, w = torch.tensor([1.0, 80.0, 0.5]).double(), torch.tensor([2.0, 0.5, 4.0]).double()
    for alpha in (0.0, 0.5, 0.8, 1.0):
        paper, scales = a**alpha / w ** (1 - alpha), smoothing_scales(a, w, alpha)
        assert torch.allclose(scales / paper, (scales / paper)[:1].expand(3), rtol=1e-12)
    even = a / smoothing_scales(a, w, 1.0)
    assert torch.allclose(even, even[:1].expand(3)), "alpha = 1 leaves no spread to the activations"
    even = w * smoothing_scales(a, w, 0.0)
    assert torch.allclose(even, even[:1].expand(3)), "alpha = 0 leaves none to the weights"


@given(maybe_dead, maybe_dead, st.floats(0, 1))
def test_scales_are_always_usable(first: list[float], second: list[float], alpha: float) -> None:
    count = min(len(first), len(second))
    a, b = (torch.tensor(part[:count], dtype=torch.float64) for part in (first, second))
    scales = smoothing_scales(a, b, alpha)
    assert bool(torch.isfinite(scales).all())
    assert float(scales.min()) >= 1 / LARGEST and float(scales.max()) <= LARGEST
    assert bool((scales[(a == 0) | (b == 0)] == 1).all()), "what can't be compared stays"


def test_a_dead_channel_doesnt_move_the_others() -> None:
    r1, r2 = torch.tensor([1.0, 100.0, 10.0]), torch.tensor([1.0, 0.01, 0.1])
    alone = layer_scales(r1, r2)
    beside = layer_scales(torch.cat([r1, torch.zeros(2)]), torch.cat([r2, torch.tensor([5.0, 0.0])]))
    assert torch.equal(beside[:3], alone) and bool((beside[3:] == 1).all())
    assert bool((layer_scales(torch.zeros(3), r2) == 1).all())
    odd = layer_scales(torch.tensor([1.0, math.inf, math.nan, 4.0]), torch.ones(4))
    assert odd[1:3].tolist() == [1, 1]


def test_spread_is_of_the_scale_furthest_from_the_median() -> None:
    assert spread(torch.tensor([])) == 1.0
    assert spread(torch.full((5,), 7.0)) == pytest.approx(1.0)
    assert spread(torch.tensor([1.0, 1.0, 1.0, 12.0])) == pytest.approx(12.0)
    assert spread(torch.tensor([1.0, 1.0, 0.05])) == pytest.approx(20.0)


def test_sizes_that_disagree_are_refused() -> None:
    with pytest.raises(WeightsError, match="one range per channel"):
        layer_scales(torch.ones(3), torch.ones(4))
    with pytest.raises(WeightsError, match=r"shape \(5, 2\).*3 groups"):
        output_ranges(torch.ones(5, 2), 3)


# ------------------------------------------------------------------------------------------------ the weights

SHAPES = [
    ((6, 4), 1, False), ((6, 4, 3, 3), 1, False), ((6, 2, 3), 2, False), ((6, 1, 3, 3), 6, False),
    ((4, 6, 3), 1, True), ((4, 3, 3, 3), 2, True),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "groups", "transposed"), SHAPES)
def test_scaling_a_weight_scales_its_layers_channels(
    shape: tuple[int, ...], groups: int, transposed: bool
) -> None:
    weight, rank = torch.randn(shape), len(shape) - 2
    inputs = shape[0] if transposed else shape[1] * groups

    def layer(x: Tensor, w: Tensor) -> Tensor:
        if rank == 0:
            return F.linear(x, w)
        names = {(1, False): F.conv1d, (2, False): F.conv2d, (1, True): F.conv_transpose1d}
        call = names.get((rank, transposed), F.conv_transpose2d)
        return call(x, w, groups=groups)

    x = torch.randn(2, inputs, *[5] * rank)
    y = layer(x, weight)
    wide = [1, -1, *[1] * rank]
    out, into = torch.rand(y.shape[1]) + 0.1, torch.rand(inputs) + 0.1
    scaled = layer(x, scale_outputs(weight, out, groups, transposed))
    torch.testing.assert_close(scaled, y * out.view(wide))
    torch.testing.assert_close(
        layer(x / into.view(wide), scale_inputs(weight, into, groups, transposed)), y, rtol=1e-4, atol=1e-5
    )
    assert output_ranges(weight, groups, transposed).shape == out.shape
    ones = scale_inputs(weight, 1 / input_ranges(weight, groups, transposed), groups, transposed)
    torch.testing.assert_close(input_ranges(ones, groups, transposed), torch.ones(inputs).double())
    ones = scale_outputs(weight, 1 / output_ranges(weight, groups, transposed), groups, transposed)
    torch.testing.assert_close(output_ranges(ones, groups, transposed), torch.ones(y.shape[1]).double())


def test_rounding_gains_where_channels_are_spread_and_the_function_stays() -> None:
    first, second, x = two(torch.logspace(-2, 2, 12))
    real = F.linear(F.relu(F.linear(x, first)), second)
    scales = layer_scales(output_ranges(first), input_ranges(second))
    even = scale_outputs(first, 1 / scales), scale_inputs(second, scales)
    moved = F.linear(F.relu(F.linear(x, even[0])), even[1])
    torch.testing.assert_close(moved, real, rtol=1e-4, atol=1e-4)
    before, after = (
        float((F.linear(F.relu(F.linear(x, rounded(a))), rounded(b)) - real).norm() / real.norm())
        for a, b in ((first, second), even)
    )
    assert after < 0.05 * before


def test_leaky_relu_keeps_the_function_and_hardswish_and_relu6_dont() -> None:
    first, second, x = two(torch.logspace(-1, 1, 12))
    scales = layer_scales(output_ranges(first), input_ranges(second))
    even = scale_outputs(first, 1 / scales), scale_inputs(second, scales)

    def change(f: object) -> float:
        assert callable(f)
        real, moved = (F.linear(f(F.linear(x, a)), b) for a, b in ((first, second), even))
        return float((real - moved).norm() / real.norm())

    assert change(lambda v: F.leaky_relu(v, 0.1)) < 1e-5 and change(F.relu) < 1e-5
    assert change(F.hardswish) > 0.01 and change(F.relu6) > 0.01 and change(F.gelu) > 0.01


def test_scales_that_are_alike_change_no_rounding() -> None:
    first, second, _ = two(torch.full((12,), 3.0))
    for weight, factor in ((first, 4.0), (second, 0.25)):
        moved = scale_outputs(weight, torch.full((len(weight),), factor))
        codes = []
        for part in (weight, moved / factor):
            scale, zero = qparams(part.min(), part.max(), Format.parse("int8n symmetric"))
            codes.append(fake_quantize(part, scale, zero, -127, 127))
        assert torch.equal(*codes)


def test_salience_raises_the_weights_of_loud_inputs() -> None:
    mean = torch.tensor([0.25, 1.0, 4.0, 0.0])
    found = salience_scales(mean, 0.5)
    assert torch.allclose(found, torch.tensor([0.5, 1.0, 2.0, 1.0], dtype=torch.float64))
    assert torch.equal(salience_scales(mean, 0.0), torch.ones(4, dtype=torch.float64))
