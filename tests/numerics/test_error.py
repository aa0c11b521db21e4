from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitport.errors import MetricError
from bitport.numerics.error import ErrorStats, sqnr_db

VALUES = st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)), max_size=30)


def of(pairs: list[tuple[float, float]]) -> ErrorStats:
    stats = ErrorStats()
    both = torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2)
    stats.update(both[:, 0], both[:, 1])
    return stats


@given(VALUES, VALUES)
def test_merging_is_streaming(a: list[tuple[float, float]], b: list[tuple[float, float]]) -> None:
    whole, first, second = of(a + b), of(a), of(b)
    merged = first.merge(second)
    assert (first, second) == (of(a), of(b))
    assert merged == second.merge(first)
    assert (merged.count, merged.largest) == (whole.count, whole.largest)
    assert merged.signal == pytest.approx(whole.signal, rel=1e-12)
    assert merged.noise == pytest.approx(whole.noise, rel=1e-12)


def test_against_numpy() -> None:
    rng = np.random.default_rng(0)
    r = rng.normal(size=(40, 30)).astype(np.float32)
    v = (r + 0.01 * rng.normal(size=r.shape)).astype(np.float32)
    noise = r.astype(np.float64) - v
    expected = 10 * np.log10(np.square(r, dtype=np.float64).sum() / np.square(noise).sum())
    assert sqnr_db(torch.from_numpy(r), torch.from_numpy(v)) == pytest.approx(expected, rel=1e-12)
    assert expected == pytest.approx(40, abs=1)
    stats = ErrorStats()
    stats.update(torch.from_numpy(r), torch.from_numpy(v))
    assert stats.mse == pytest.approx(np.square(noise).mean(), rel=1e-12)
    assert stats.largest == np.abs(noise).max()


def test_a_bit_is_six_decibels() -> None:
    x = torch.rand(100_000) * 2 - 1
    coarse, fine = ((x * steps).round() / steps for steps in (100, 200))
    assert sqnr_db(x, fine) - sqnr_db(x, coarse) == pytest.approx(6.02, abs=0.1)


def test_limits() -> None:
    x, zero = torch.randn(5), torch.zeros(5)
    assert sqnr_db(x, x) == math.inf
    assert sqnr_db(zero, zero) == math.inf
    assert sqnr_db(zero, x) == -math.inf
    assert sqnr_db(x, zero) == 0.0
    assert math.isnan(sqnr_db(x, x * math.nan))
    assert sqnr_db(torch.empty(0), torch.empty(0)) == math.inf
    assert ErrorStats().mse == 0.0
    nan = of([(1.0, math.nan)])
    for merged in (nan.merge(of([(1.0, 2.0)])), of([(1.0, 2.0)]).merge(nan)):
        assert math.isnan(merged.largest)


def test_integers_and_half_precision() -> None:
    assert sqnr_db(torch.tensor([3, 4]), torch.tensor([3, 5])) == pytest.approx(10 * math.log10(25))
    big = torch.full((4,), 6e4, dtype=torch.float16)
    assert sqnr_db(big, big / 2) == pytest.approx(20 * math.log10(2), abs=0.01)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(MetricError, match=r"\(2,\) and \(1, 2\)"):
        sqnr_db(torch.zeros(2), torch.zeros(1, 2))
