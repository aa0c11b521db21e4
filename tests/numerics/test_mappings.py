"""The textbook mappings against their formulas in numpy, and where each differs from the others."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitport.errors import DataError, FormatError
from bitport.formats import Format
from bitport.numerics import mappings
from bitport.numerics.mappings import Mapping, affine, endpoints, half_open, normalized, round_scaled
from bitport.numerics.quantize import fake_quantize, qparams, quantize

BOUNDED = [endpoints, half_open, normalized, affine]
Maker = Callable[[float, float, int], Mapping]
# Ends and steps that float32 holds exactly, so that the formulas can be compared code by code.
DYADIC = st.tuples(st.integers(-40, 20), st.integers(1, 60)).map(lambda d: (d[0] / 8, (d[0] + d[1]) / 8))


def grid(low: float, high: float, n: int = 1001) -> torch.Tensor:
    return torch.linspace(low, high, n)


def far_from_ties(x: np.ndarray, steps: np.ndarray) -> np.ndarray:
    return np.abs(np.abs(steps - np.floor(steps)) - 0.5) > 1e-3


@given(DYADIC, st.integers(1, 8))
def test_endpoints_is_its_formula(ends: tuple[float, float], bits: int) -> None:
    low, high = ends
    x = grid(low - 1, high + 1)
    steps = (x.double().numpy() - low) / ((high - low) / (2**bits - 1))
    wanted = np.clip(np.round(steps), 0, 2**bits - 1)
    sure = far_from_ties(x.numpy(), steps)
    assert (endpoints(low, high, bits).quantize(x).numpy() == wanted)[sure].all()


@given(DYADIC, st.integers(1, 8))
def test_half_open_and_normalized_are_their_formulas(ends: tuple[float, float], bits: int) -> None:
    low, high = ends
    x = grid(low - 1, high + 1)
    t = (x.double().numpy() - low) / (high - low)
    sure = far_from_ties(x.numpy(), t * 2**bits)
    wanted = np.clip(np.floor(t * 2**bits + 0.5), 0, 2**bits - 1)
    for mapping in (half_open(low, high, bits), normalized(low, high, bits)):
        assert (mapping.quantize(x).numpy() == wanted)[sure].all()


@given(DYADIC, st.integers(2, 8))
def test_affine_is_what_bitport_stores(ends: tuple[float, float], bits: int) -> None:
    low, high = ends
    fmt = Format.parse(f"uint{bits}")
    scale, zero_point = qparams(torch.tensor(low), torch.tensor(high), fmt)
    x = grid(low - 1, high + 1)
    mapping = affine(low, high, bits)
    assert torch.equal(mapping.quantize(x), quantize(x, scale, zero_point, fmt.low, fmt.high))
    assert torch.equal(mapping.roundtrip(x), fake_quantize(x, scale, zero_point, fmt.low, fmt.high))


@given(st.sampled_from([2.0**-6, 0.3, 7.0]), st.integers(0, 1000))
def test_round_scaled_is_its_formula(step: float, seed: int) -> None:
    x = torch.randn(500, generator=torch.Generator().manual_seed(seed)) * 50
    wanted = torch.round(x / step) * step
    assert torch.equal(round_scaled(step).roundtrip(x), wanted)


@given(DYADIC, st.integers(1, 8), st.sampled_from(BOUNDED))
def test_every_code_comes_back_to_itself(ends: tuple[float, float], bits: int, make: Maker) -> None:
    mapping = make(*ends, bits)
    codes = torch.arange(2**bits, dtype=torch.int32)
    assert torch.equal(mapping.quantize(mapping.dequantize(codes)), codes)


# ---------------------------------------------------------------- where they differ


def test_the_top_level_saturates_in_half_open_only() -> None:
    """max errs by a whole step where max isn't a code, and not at all where it is."""
    step = 2.0 / 2**3
    assert half_open(-1.0, 1.0, 3).roundtrip(torch.tensor([1.0])) == 1.0 - step
    assert normalized(-1.0, 1.0, 3).roundtrip(torch.tensor([1.0])) == 1.0 - step
    assert endpoints(-1.0, 1.0, 3).roundtrip(torch.tensor([1.0])) == 1.0
    x = grid(-1, 1, 4001)
    inside = x <= 1 - step / 2
    error = (half_open(-1.0, 1.0, 3).roundtrip(x) - x).abs()
    assert float(error[inside].max()) <= step / 2 + 1e-6
    assert float(error[~inside].min()) > step / 2 - 1e-3
    assert float(error[~inside].max()) == step


def test_half_open_has_the_finer_step() -> None:
    """2^b steps instead of 2^b − 1: a smaller error away from the top, a larger one with the top."""
    fine, coarse = half_open(0.0, 1.0, 2), endpoints(0.0, 1.0, 2)
    assert (fine.scale, coarse.scale) == (1 / 4, pytest.approx(1 / 3))
    x = grid(0, 0.8, 4001)
    assert (fine.roundtrip(x) - x).square().mean() < (coarse.roundtrip(x) - x).square().mean()
    x = grid(0, 1, 4001)
    assert (fine.roundtrip(x) - x).abs().max() > (coarse.roundtrip(x) - x).abs().max()


def test_zero_is_a_code_of_affine_and_round_scaled_only() -> None:
    zero = torch.zeros(1)
    assert affine(-0.3, 1.0, 4).roundtrip(zero) == 0
    assert round_scaled(0.1).roundtrip(zero) == 0
    for make in (endpoints, half_open, normalized):
        mapping = make(-0.3, 1.0, 4)
        error = float(mapping.roundtrip(zero).abs())
        assert 0.1 * mapping.scale < error <= mapping.scale / 2 * 1.001
    assert endpoints(-0.25, 1.0, 2).quantize(zero) == 1  # the nearest code stands for 0.1667
    lucky = endpoints(-1.0, 2.0, 2)
    assert lucky.roundtrip(zero) == 0


@given(DYADIC, st.integers(2, 8))
def test_affine_moves_its_ends_by_half_a_step_at_most(ends: tuple[float, float], bits: int) -> None:
    low, high = min(ends[0], 0.0), max(ends[1], 0.0)
    mapping = affine(*ends, bits)
    stored = mapping.dequantize(torch.tensor([0, 2**bits - 1]))
    for end, found in zip((low, high), stored.tolist(), strict=True):
        assert abs(found - end) <= mapping.scale / 2 * (1 + 1e-5)
    assert mapping.roundtrip(torch.zeros(1)) == 0


def test_affine_widens_a_range_without_zero() -> None:
    assert affine(3.0, 4.0, 8).scale == pytest.approx(4 / 255)
    assert endpoints(3.0, 4.0, 8).scale == pytest.approx(1 / 255)


def test_ties_go_up_or_to_even() -> None:
    x = torch.tensor([0.5, 1.5, 2.5]) / 4
    assert half_open(0.0, 1.0, 2).quantize(x).tolist() == [0, 2, 2]
    assert normalized(0.0, 1.0, 2).quantize(x).tolist() == [1, 2, 3]
    below = torch.tensor([-0.5, -1.5])
    assert Mapping(1.0, low=-9, high=9).quantize(below).tolist() == [0, -2]
    assert Mapping(1.0, low=-9, high=9, ties_up=True).quantize(below).tolist() == [0, -1]


def test_round_scaled_never_saturates() -> None:
    x = torch.tensor([-1e5, 1e5])
    assert torch.equal(round_scaled(0.5).roundtrip(x), x)
    assert affine(-1.0, 1.0, 8).roundtrip(x).abs().max() < 1.01
    assert int(round_scaled(0.5).quantize(x)[1]) == 200_000  # 19 bits with its sign


def test_normalized_with_the_other_factor_is_endpoints() -> None:
    """DoReFa: round((2^b − 1) t)/(2^b − 1), in exact fractions."""
    mapping = endpoints(0.0, 1.0, 3)
    for i in range(101):
        t = Fraction(i, 100)
        code = math.floor(t * 7 + Fraction(1, 2))
        if (t * 7 + Fraction(1, 2)).denominator > 1:
            assert int(mapping.quantize(torch.tensor(float(t)))) == code


@pytest.mark.parametrize("make", BOUNDED)
def test_bad_input(make: Maker) -> None:
    for low, high in ((1.0, 1.0), (2.0, 1.0), (math.nan, 1.0), (0.0, math.inf)):
        with pytest.raises(DataError, match="no steps"):
            make(low, high, 8)
    for bits in (0, 17, 2.0, True):
        with pytest.raises(FormatError, match="1 … 16"):
            make(0.0, 1.0, bits)  # type: ignore[arg-type]


@pytest.mark.parametrize("step", [0.0, -1.0, math.inf, math.nan])
def test_bad_steps(step: float) -> None:
    with pytest.raises(DataError, match="above 0"):
        round_scaled(step)


def test_every_mapping_is_in_the_table_of_the_module() -> None:
    text = mappings.__doc__ or ""
    for make in (*BOUNDED, round_scaled):
        assert f"\n    {make.__name__} " in text
