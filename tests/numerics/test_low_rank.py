"""The product that makes up for an error: against singular values, and every other product that is tried."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitport.errors import DataError
from bitport.formats import Format
from bitport.numerics.codes import decode, encode, fit
from bitport.numerics.low_rank import Factors, compensation, weighed_energy

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12))


def error(outputs: int, inputs: int, seed: int = 0) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


def scales(inputs: int, seed: int = 1) -> Tensor:
    return torch.randn(inputs, generator=torch.Generator().manual_seed(seed)).exp()


def left(e_OK: Tensor, found: Factors, s_K: Tensor | None = None) -> float:
    """‖(E − A B) · diag(s)‖², measured on the factors as they are stored."""
    rest = e_OK.double() - found.up_Or.double() @ found.down_rK.double()
    return float((rest if s_K is None else rest * s_K.double()).square().sum())


@given(SHAPES, st.integers(1, 14), st.integers(0, 100), st.booleans())
def test_what_is_left_is_the_tail_of_the_singular_values(
    shape: tuple[int, int], rank: int, seed: int, weighed: bool
) -> None:
    e = error(*shape, seed)
    s = scales(shape[1], seed) if weighed else None
    found = compensation(e, s, rank)
    squares = torch.linalg.svdvals(e.double() if s is None else e.double() * s.double()).square()
    total = float(squares.sum())
    assert found.up_Or.shape == (shape[0], min(rank, *shape))
    assert found.down_rK.shape == (min(rank, *shape), shape[1])
    assert found.total == pytest.approx(total)
    assert left(e, found, s) == pytest.approx(float(squares[rank:].sum()), abs=1e-9 * total)
    assert found.removed == pytest.approx(float(squares[:rank].sum()), abs=1e-9 * total)


@given(SHAPES, st.integers(1, 6), st.integers(0, 100))
def test_no_other_product_of_its_rank_is_nearer(shape: tuple[int, int], rank: int, seed: int) -> None:
    """Nor one that alternating least squares finds from a random start."""
    e, s = error(*shape, seed), scales(shape[1], seed)
    weighed = e.double() * s.double()
    rank = min(rank, *shape)
    up = torch.randn(shape[0], rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    down = torch.zeros(rank, shape[1], dtype=torch.float64)
    for _ in range(30):
        down = torch.linalg.lstsq(up, weighed, driver="gelsd").solution
        up = torch.linalg.lstsq(down.T, weighed.T, driver="gelsd").solution.T
    other = float((weighed - up @ down).square().sum())
    assert left(e, compensation(e, s, rank), s) <= other + 1e-9 * float(weighed.square().sum())


@given(SHAPES, st.integers(0, 100))
def test_more_rank_is_never_worse(shape: tuple[int, int], seed: int) -> None:
    e, s = error(*shape, seed), scales(shape[1], seed)
    found = [left(e, compensation(e, s, rank), s) for rank in range(1, min(shape) + 1)]
    total = float((e * s).double().square().sum())
    for wider, narrower in zip(found[1:], found, strict=False):
        assert wider <= narrower + 1e-9 * total
    assert found[-1] <= 1e-9 * total


def test_weighing_gains_where_inputs_differ_and_costs_the_plain_error() -> None:
    """From both sides: each is the better by its own measure, and the outputs gain by the weighed one."""
    w = error(64, 96)
    grid = fit(w, Format.parse("int2 group(32,0)"))
    e, s = w - decode(encode(w, grid), grid), scales(96)
    plain, weighed = compensation(e, None, 8), compensation(e, s, 8)
    assert left(e, weighed, s) < 0.9 * left(e, plain, s)
    assert left(e, plain) < left(e, weighed)
    x = error(4096, 96, 5) * s
    outputs = [float((x @ (e - f.up_Or @ f.down_rK).T).square().sum()) for f in (plain, weighed)]
    assert outputs[1] < 0.9 * outputs[0]
    assert outputs[1] < float((x @ e.T).square().sum())


def test_an_error_of_few_directions_vanishes_and_white_noise_stays() -> None:
    few = error(48, 3) @ error(3, 64, 1)
    found = compensation(few, None, 3)
    assert found.removed == pytest.approx(found.total)
    assert left(few, found) < 1e-10 * found.total
    noise = compensation(error(256, 256), None, 8)
    assert 8 / 256 < noise.removed / noise.total < 0.13  # the largest of a random matrix are 4 times the mean


def test_silent_inputs_take_no_part() -> None:
    e, s = error(6, 9), scales(9)
    s[[2, 5]] = 0
    found = compensation(e, s, 4)
    assert (found.down_rK[:, [2, 5]] == 0).all()
    assert torch.isfinite(found.up_Or).all() and torch.isfinite(found.down_rK).all()
    nothing = compensation(e, torch.zeros(9), 4)
    assert nothing.total == nothing.removed == 0
    assert (nothing.up_Or @ nothing.down_rK == 0).all()
    lossless = compensation(torch.zeros(6, 9), None, 4)
    assert (lossless.removed, lossless.total) == (0, 0)


@pytest.mark.parametrize(
    ("scale", "rank", "message"),
    [
        (None, 0, "rank 0"),
        (torch.ones(8), 2, "9 inputs were weighed by"),
        (-torch.ones(9), 2, "negative"),
        (torch.full((9,), torch.nan), 2, "finite"),
    ],
)
def test_what_cannot_be_is_named(scale: Tensor | None, rank: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        compensation(error(6, 9), scale, rank)


def test_energy_is_weighed_by_input() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, -4.0]])
    assert weighed_energy(values, None) == 30
    assert weighed_energy(values, torch.tensor([2.0, 0.0])) == 40
