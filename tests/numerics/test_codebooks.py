from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitport.errors import FormatError
from bitport.numerics.codebooks import NF4, fixed_table, learn, nearest

UNIT = st.floats(-1, 1, width=32)


def error(x: Tensor, table: Tensor) -> float:
    return float((x.double()[:, None] - table.double()).square().amin(1).sum())


def best_error(numbers: list[float], size: int) -> float:
    """The optimum: some cut of the sorted values into `size` runs, each stored as its mean."""
    ordered = torch.tensor(numbers).double().sort().values
    best = float("inf")
    for cuts in itertools.combinations(range(1, len(numbers)), min(size, len(numbers)) - 1):
        runs = torch.tensor_split(ordered, list(cuts))
        best = min(best, sum(float((run - run.mean()).square().sum()) for run in runs))
    return best


def test_nf4_follows_from_the_normal_distribution() -> None:
    """QLoRA's construction: 9 quantiles of one sign and 8 of the other, the largest at 1, zero shared."""
    from scipy.stats import norm

    offset = 0.9677083  # (1 − 1/32 + 1 − 1/30) / 2
    positive = norm.ppf(torch.linspace(offset, 0.5, 9)[:-1].double().numpy())
    negative = -norm.ppf(torch.linspace(offset, 0.5, 8)[:-1].double().numpy())
    table = sorted([*positive, 0.0, *negative])
    assert [value / max(table) for value in table] == pytest.approx(list(NF4), abs=2e-6)


@given(st.lists(UNIT, max_size=30), st.lists(UNIT, min_size=2, max_size=9))
def test_nearest(numbers: list[float], entries: list[float]) -> None:
    table = torch.tensor(sorted(entries))
    x = torch.tensor(numbers)
    index = nearest(x, table)
    distance = (x.double()[:, None] - table.double()).abs()
    assert torch.equal(distance.gather(1, index[:, None])[:, 0], distance.amin(1))


def test_halfway_goes_up() -> None:
    assert nearest(torch.tensor([0.0, -0.0, -1e-45, 0.5, 1.5]), torch.tensor([-1.0, 1.0, 2.0])).tolist() == [
        1,
        1,
        0,
        1,
        2,
    ]


@given(st.lists(UNIT, min_size=1, max_size=9), st.integers(2, 4))
def test_learning_is_near_the_optimum_and_never_worse_than_one_mean(numbers: list[float], size: int) -> None:
    x = torch.tensor(numbers)
    table = learn(x, size)
    assert table.shape == (size,)
    assert torch.equal(table, table.sort().values)
    found = error(x, table)
    assert found >= best_error(numbers, size) - 1e-6
    if 0.0 not in numbers:
        spread = float((x.double() - x.double().mean()).square().sum())
        assert found <= spread + 1e-6


@given(st.lists(UNIT, min_size=1, max_size=20))
def test_few_values_are_the_table(numbers: list[float]) -> None:
    x = torch.tensor(numbers) + 0.0
    distinct = x.unique()
    table = learn(x, max(2, distinct.numel()))
    assert torch.equal(table.unique(), distinct)
    assert error(x, table) == 0


@given(st.lists(UNIT, min_size=1, max_size=40), st.integers(2, 6))
def test_pruned_weights_stay_zero(numbers: list[float], size: int) -> None:
    table = learn(torch.tensor([*numbers, 0.0]), size)
    assert float(table[nearest(torch.tensor(0.0), table)]) == 0


def test_two_clouds_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(1000, generator=generator) * 0.01 + centre for centre in (-0.7, 0.1, 0.8)])
    assert learn(x, 3).tolist() == pytest.approx([-0.7, 0.1, 0.8], abs=2e-3)


def test_it_is_a_fixed_point() -> None:
    """Every value is the mean of what is nearest to it, also across the blocks of the prefix sums."""
    x = torch.randn(10_007, generator=torch.Generator().manual_seed(1))
    table = learn(x, 8)
    index = nearest(x, table)
    means = torch.stack([x[index == i].double().mean() for i in range(8)])
    torch.testing.assert_close(table.double(), means, atol=2e-3, rtol=0)
    # The best levels for a normal distribution (Max 1960, table I) are not better for this sample of it.
    half = [0.2451, 0.7560, 1.3439, 2.1520]
    assert error(x, table) < error(x, torch.tensor([-v for v in reversed(half)] + half))


def test_nothing_to_learn_from() -> None:
    assert learn(torch.zeros(0), 3).tolist() == [0, 0, 0]
    assert learn(torch.zeros(5), 3).tolist() == [0, 0, 0]
    with pytest.raises(FormatError, match="tensor's own table"):
        fixed_table("learned")


def test_the_callers_values_stay_unless_they_are_scratch() -> None:
    x = torch.tensor([3.0, 1.0, 2.0])
    wanted = learn(x, 2)
    assert x.tolist() == [3, 1, 2]
    assert torch.equal(learn(x, 2, scratch=True), wanted)
    assert x.tolist() == [1, 2, 3]
