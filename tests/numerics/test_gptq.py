"""GPTQ's codes: better for the outputs, worse for the weights, never worse than plain rounding, always on the grid."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitport.formats import Format
from bitport.numerics.codes import decode, encode, fit
from bitport.numerics.gptq import Solution, by_rows, loss, solve, spans, weighted_range
from bitport.numerics.grid import Grid
from bitport.numerics.hessian import damped
from bitport.numerics.scales import stored

TEXTS = [
    "int8 symmetric channel(0)", "int4 channel(0)", "int4 symmetric channel(0)", "int3 group(16,0)",
    "int2 group(8,0)", "int4 group(7,0)", "ternary channel(0)", "int[-5,9] channel(0)", "int4 symmetric",
    "int4 group(16,0) scale(float16)", "int4 group(16,0) scale(e8m0)",
]  # fmt: skip


def problem(rows: int = 12, columns: int = 48, batch: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights, and a Hessian of inputs that hang together as a network's do."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(batch, rows, columns, generator=generator) * 0.1
    mix = torch.randn(batch, columns, columns, generator=generator) * torch.rand(columns, generator=generator)
    x = torch.randn(batch, 4 * columns, columns, generator=generator) @ mix
    h = damped((x.mT @ x).double() / (4 * columns), 0.01)
    assert h is not None
    return w, h


def plainly(w: Tensor, text: str) -> tuple[Tensor, Grid]:
    """Plain rounding, and its grid as `solve` takes it."""
    fmt = Format.parse(text)
    whole = w.reshape(-1, w.shape[2])
    grid = fit(whole, fmt, "minmax")
    rows = (*w.shape[:2], len(spans(w.shape[2], fmt)))
    scale, zero_point = (by_rows(part, rows) for part in (grid.scale, grid.zero_point))
    return decode(encode(whole, grid), grid).reshape(w.shape), Grid(fmt, scale, zero_point, grid.table)


def total(w: Tensor, values: Tensor, h: Tensor) -> float:
    return float(loss(w.double() - values.double(), h).sum())


def assert_on_grid(found: Solution, fmt: Format) -> None:
    for group, (start, end) in enumerate(spans(found.values.shape[2], fmt)):
        scale, zero = found.scale[:, :, group, None], found.zero_point[:, :, group, None]
        codes = torch.round(found.values[:, :, start:end] / scale) + zero
        assert torch.equal((codes - zero) * scale, found.values[:, :, start:end])
        assert bool(((codes >= fmt.low) & (codes <= fmt.high)).all())
        assert bool(((zero >= fmt.low) & (zero <= fmt.high)).all())


@pytest.mark.parametrize("text", TEXTS)
def test_outputs_gain_what_weights_lose(text: str) -> None:
    w, h = problem()
    plain, grid = plainly(w, text)
    found = solve(w.double(), h, plain, grid)
    assert_on_grid(found, grid.format)
    assert total(w, found.values, h) < 0.75 * total(w, plain, h)
    assert torch.allclose(found.loss, loss(w.double() - found.values.double(), h))
    # and the weights themselves are further from the float ones: it is their outputs that count
    best = fit(w[0], grid.format, "mse")
    assert float((found.values - w).square().sum()) > float(
        (decode(encode(w[0], best), best) - w).square().sum()
    )


@pytest.mark.parametrize("text", TEXTS)
def test_scales_are_ones_that_are_stored(text: str) -> None:
    w, h = problem()
    plain, grid = plainly(w, text)
    found = solve(w.double(), h, plain, grid)
    assert torch.equal(stored(found.scale, grid.format.scale, up=False), found.scale)
    if grid.format.symmetric:
        assert bool((found.zero_point == grid.format.zero_point).all())


@pytest.mark.parametrize(
    "text", ["nf4 channel(0)", "e2m1 channel(0)", "codebook(8) channel(0)", "log2(4) channel(0)"]
)
def test_formats_that_are_no_integers(text: str) -> None:
    w, h = problem()
    plain, grid = plainly(w, text)
    found = solve(w.double(), h, plain, grid)
    assert total(w, found.values, h) < 0.9 * total(w, plain, h)
    assert torch.equal(found.scale, grid.scale)
    again = Grid(grid.format, grid.scale.reshape(-1), grid.zero_point.reshape(-1), grid.table)
    assert torch.equal(decode(encode(found.values[0], again), again), found.values[0])


def test_a_diagonal_hessian_leaves_plain_rounding() -> None:
    """Inputs that have nothing in common can't make up for each other."""
    w, _ = problem()
    plain, grid = plainly(w, "int4 symmetric")  # scales are kept
    found = solve(w.double(), torch.eye(48, dtype=torch.float64)[None], plain, grid)
    assert torch.equal(found.values, plain)


@settings(max_examples=40)
@given(
    st.sampled_from(TEXTS), st.integers(1, 6), st.integers(1, 20), st.integers(1, 3), st.integers(0, 3),
    st.booleans(), st.integers(0, 2**31),
)  # fmt: skip
def test_no_row_is_worse_than_plain_rounding(
    text: str, rows: int, columns: int, batch: int, rounds: int, order: bool, seed: int
) -> None:
    w, h = problem(rows, columns, batch, seed)
    plain, grid = plainly(w, text)
    found = solve(w.double(), h, plain, grid, rounds=rounds, order=order)
    before = loss(w.double() - plain.double(), h)
    if grid.format.granularity in ("channel", "group"):  # others share a scale, and are taken together
        assert float((found.loss - before).max()) <= 1e-12
    assert float(found.loss.sum()) <= float(before.sum()) + 1e-12
    assert_on_grid(found, grid.format)


def test_it_comes_near_the_best_of_all_codes() -> None:
    """Exhaustive search over a small problem: 3^6 codes of one row."""
    w, h = problem(1, 6, seed=3)
    plain, grid = plainly(w, "ternary channel(0)")
    found = solve(w.double(), h, plain, grid)
    scale = float(found.scale)
    every = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=6)), dtype=torch.float64) * scale
    best = float(loss(w.double() - every[None], h).min())
    assert float(found.loss.sum()) <= 1.1 * best
    assert float(found.loss.sum()) < total(w, plain, h)


@pytest.mark.parametrize("text", ["int4 channel(0)", "int2 group(8,0)"])
def test_each_refinement_helps(text: str) -> None:
    w, h = problem(64, 96)
    plain, grid = plainly(w, text)
    losses = [float(solve(w.double(), h, plain, grid, rounds=rounds).loss.sum()) for rounds in (0, 1, 2)]
    assert losses[2] <= losses[1] < losses[0]


def test_problems_side_by_side_are_solved_alone() -> None:
    w, h = problem(5, 9, batch=4)
    plain, grid = plainly(w, "int4 channel(0)")
    together = solve(w.double(), h, plain, grid)
    for index in range(4):
        one = slice(index, index + 1)
        alone = solve(
            w[one].double(), h[one], plain[one], Grid(grid.format, grid.scale[one], grid.zero_point[one])
        )
        assert torch.equal(alone.values[0], together.values[index])


def test_scales_stay_above_what_a_bias_needs() -> None:
    w, h = problem()
    plain, grid = plainly(w, "int4 channel(0)")
    least = 1.5 * grid.scale
    found = solve(w.double(), h, plain, grid, least=least)
    changed = found.scale != grid.scale
    assert bool((found.scale >= least * (1 - 1e-6))[changed].all())


@pytest.mark.parametrize("text", ["int4", "int2", "int4 symmetric", "ternary", "uint4", "binary"])
def test_weighted_ranges_suit_what_weighs_most(text: str) -> None:
    fmt = Format.parse(text)
    torch.manual_seed(0)
    w = torch.randn(1, 6, 32, dtype=torch.float64)
    w[:, :, 5] = 4.0  # an outlier

    def error(weight: Tensor, of: Tensor) -> float:
        scale, zero = weighted_range(w, weight, fmt)
        steps = torch.round(w / scale.double()[..., None]) + zero[..., None]
        back = (steps.clamp(fmt.low, fmt.high) - zero[..., None]) * scale.double()[..., None]
        return float(((back - w).square() * of[:, None]).sum())

    even = torch.ones(1, 32, dtype=torch.float64)
    heavy = even.clone()
    heavy[:, 5] = 1000
    assert error(even, even) <= error(heavy, even)
    assert error(heavy, heavy) <= error(even, heavy)


def test_zeros_have_a_scale() -> None:
    scale, zero = weighted_range(
        torch.zeros(1, 2, 4, dtype=torch.float64), torch.ones(1, 4), Format.parse("int4")
    )
    assert bool((scale == 1).all()) and zero.dtype == torch.int32
