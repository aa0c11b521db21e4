from __future__ import annotations

import json
import math
import sys
from itertools import pairwise
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitport.errors import DataError
from bitport.numerics.histogram import MAX_BINS, Histogram, exact_sum

VALUES = st.one_of(
    st.floats(width=32),
    st.floats(-10, 10, width=32),
    st.sampled_from(
        [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 2.0**-126, -(2.0**-126), 3e38, -3e38, 1024.0, -1024.0]
    ),
)
CHUNKS = st.lists(st.lists(VALUES, max_size=12), max_size=5)


def of(*chunks: list[float]) -> Histogram:
    h = Histogram()
    for chunk in chunks:
        h.update(torch.tensor(chunk))
    return h


def bytes_of(h: Histogram) -> bytes:
    return json.dumps(h.to_json()).encode()


def bins_of(h: Histogram) -> dict[str, Any]:
    """Everything but the updates, which have an order."""
    return {key: value for key, value in h.to_json().items() if key != "updates"}


@given(CHUNKS)
def test_any_order_and_grouping_gives_the_same_bins(chunks: list[list[float]]) -> None:
    whole = of([value for chunk in chunks for value in chunk])
    streamed = of(*chunks)
    backwards = of(*chunks[::-1])
    left = Histogram()
    for chunk in chunks:
        left = left.merge(of(chunk))
    right = Histogram()
    for chunk in reversed(chunks):
        right = of(chunk).merge(right)
    for other in (streamed, backwards, left, right):
        assert bins_of(other) == bins_of(whole)


@given(CHUNKS, st.randoms(use_true_random=False))
def test_any_grouping_in_one_order_gives_the_same_bytes(chunks: list[list[float]], random: Random) -> None:
    parts = [of(chunk) for chunk in chunks] or [Histogram()]
    while len(parts) > 1:
        at = random.randrange(len(parts) - 1)
        parts[at : at + 2] = [parts[at].merge(parts[at + 1])]
    assert bytes_of(parts[0]) == bytes_of(of(*chunks))
    assert parts[0] == of(*chunks)


@given(CHUNKS, CHUNKS)
def test_merge_is_commutative_but_for_the_order_of_updates(
    a: list[list[float]], b: list[list[float]]
) -> None:
    first, second = of(*a), of(*b)
    before = bytes_of(first), bytes_of(second)
    one, other = first.merge(second), second.merge(first)
    assert bins_of(one) == bins_of(other)
    assert (one.mean, one.deviation) == (other.mean, other.deviation)
    assert sorted(one.updates) == sorted(other.updates)
    assert one.updates == first.updates + second.updates
    assert (bytes_of(first), bytes_of(second)) == before


@given(st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=9), min_size=1, max_size=5))
def test_mean_deviation_and_zeros_against_numpy(chunks: list[list[float]]) -> None:
    h = of(*chunks)
    x = np.array([value for chunk in chunks for value in chunk], dtype=np.float64)
    assert h.mean == pytest.approx(x.mean(), abs=1e-9)
    assert h.deviation == pytest.approx(x.std(), abs=2e-4)  # the squares of 1e3 cancel to about (1e-4)²
    assert h.zeros == int((x == 0).sum())
    assert [update.number for update in h.updates] == [len(chunk) for chunk in chunks]
    assert [update.low for update in h.updates] == [min(chunk) for chunk in chunks]
    assert [update.high for update in h.updates] == [max(chunk) for chunk in chunks]


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_moments_of_large_tensors(offset: float) -> None:
    x = torch.randn(700_001) + offset
    h = Histogram()
    h.update(x)
    assert h.mean == pytest.approx(float(x.double().mean()), rel=1e-12)
    assert h.deviation == pytest.approx(float(x.double().std(correction=0)), rel=1e-8)
    y = x.relu()
    h.update(y)
    assert h.zeros == int((y == 0).sum()) + int((x == 0).sum())


def test_sums_dont_depend_on_threads() -> None:
    x = torch.randn(300_001).exp()
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            h = Histogram()
            h.update(x)
            found.append(h.updates)
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]


def test_sums_saturate() -> None:
    assert exact_sum([1e308, 1e308]) == exact_sum([math.inf]) == sys.float_info.max
    assert exact_sum([-1e308, -1e308]) == exact_sum([-math.inf]) == -sys.float_info.max
    assert exact_sum([1e16, 1.0, -1e16]) == 1.0
    assert math.copysign(1, exact_sum([-0.0])) == 1


@given(CHUNKS, CHUNKS)
def test_as_one_update(chunks: list[list[float]], constants: list[list[float]]) -> None:
    h, always = of(*chunks), of(*constants)
    before = bytes_of(h), bytes_of(always)
    one = h.as_one_update(always)
    assert (bytes_of(h), bytes_of(always)) == before
    assert bins_of(one) == bins_of(h)
    if not h.updates:
        assert one.updates == []
        return
    (update,) = one.updates
    reach = [part for part in (h, always) if part.count]
    assert update.low == min(part.minimum for part in reach)
    assert update.high == max(part.maximum for part in reach)
    assert update.number == h.count
    assert (one.mean, one.deviation) == (h.mean, h.deviation)


def test_negative_zero_leaves_no_trace() -> None:
    assert bytes_of(of([0.0], [-0.0])) == bytes_of(of([-0.0], [0.0])) == bytes_of(of([0.0], [0.0]))
    assert bytes_of(of([-0.0, -0.0])) == bytes_of(of([0.0, 0.0]))
    assert bytes_of(of([-0.0, 1.0])) == bytes_of(of([0.0, 1.0]))


def test_large_integers_are_exact() -> None:
    h = Histogram()
    h.update(torch.tensor([2**24 + 1, 3]))
    assert (h.minimum, h.maximum) == (3, 2**24 + 1)


@given(st.lists(VALUES, max_size=40))
def test_extremes_and_counts_are_exact(values: list[float]) -> None:
    h = of(values)
    finite = [value for value in np.array(values, dtype=np.float32).tolist() if math.isfinite(value)]
    assert h.nonfinite == len(values) - len(finite)
    assert h.count == len(finite)
    assert h.minimum == min(finite, default=0.0)
    assert h.maximum == max(finite, default=0.0)
    assert h.counts.numel() <= MAX_BINS


@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=60))
def test_bins_against_numpy(values: list[float]) -> None:
    h = of(values)
    x = np.array(values, dtype=np.float64)
    width = 2.0**h.exponent
    low, high = min(x.min(), 0.0), max(x.max(), 0.0)
    positive = np.floor(x[x >= 0] / width)
    negative = -1 - np.floor(-x[x < 0] / width)
    first = -1 - math.floor(-low / width) if low < 0 else 0
    expected = np.zeros(math.floor(high / width) - first + 1, dtype=np.int64)
    np.add.at(expected, (np.concatenate([positive, negative]) - first).astype(int), 1)
    assert h.counts.tolist() == expected.tolist()


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20))
def test_bins_are_the_finest_that_fit(values: list[float]) -> None:
    h = of(values)
    if h.exponent > -126:
        # Half the width needs up to twice the bins, and that is too many.
        assert h.counts.numel() >= MAX_BINS // 2


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20))
def test_edges_enclose_the_values(values: list[float]) -> None:
    h = of(values)
    edges = h.edges().tolist()
    assert len(edges) == h.counts.numel() + 1
    assert all(a <= b for a, b in pairwise(edges))
    assert edges[0] == min(h.minimum, 0.0)
    assert edges[-1] == max(h.maximum, 0.0)


@given(CHUNKS)
def test_json_round_trip(chunks: list[list[float]]) -> None:
    h = of(*chunks)
    assert Histogram.from_json(json.loads(json.dumps(h.to_json(), allow_nan=False))) == h


ZERO = [0.0, 0.0, 1, 0.0, 0.0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"maximum": 1.0, "counts": [1, 2, 3]},
        {"minimum": 2.0, "maximum": 1.0, "counts": []},
        {"maximum": math.nan, "counts": []},
        {"minimum": "a", "maximum": 1.0, "counts": []},
        {"counts": [-1]},
        {"counts": [[1]]},
        {"counts": [2**70]},
        {"nonfinite": -1},
        {"zeros": 2},
        {"zeros": -1},
        {"zeros": None},
        {"updates": []},
        {"updates": [ZERO, ZERO]},
        {"updates": [[0.0, 0.0, 1]]},
        {"updates": [[0.0, 0.0, 0, 0.0, 0.0], ZERO]},
        {"updates": [[1.0, 0.0, 1, 0.0, 0.0]]},
        {"updates": [[0.0, 0.0, 1, math.inf, 0.0]]},
        {"updates": None},
    ],
)
def test_malformed_records_are_refused(wrong: dict[str, object]) -> None:
    sound = of([0.0]).to_json()
    assert Histogram.from_json(sound) == of([0.0])
    with pytest.raises(DataError, match="calibrate again"):
        Histogram.from_json(sound | wrong)
    with pytest.raises(DataError, match="calibrate again"):
        Histogram.from_json({})


def test_large_tensors_are_counted_in_parts() -> None:
    x = torch.randn(700_001)
    h = Histogram()
    h.update(x)
    parts = Histogram()
    for part in torch.tensor_split(x, 7):
        parts.update(part)
    assert bins_of(h) == bins_of(parts)
    assert h.count == x.numel()


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last),
        torch.randn(10, 8)[::2, ::3],
        torch.randn(7).to(torch.float16),
        torch.randn(7).to(torch.bfloat16),
        torch.randint(-5, 5, (9,)),
        torch.tensor(2.5),
        torch.randn(5, requires_grad=True),
        torch.randn(4, 3).expand(2, 4, 3),
    ],
    ids=["channels_last", "strided", "float16", "bfloat16", "int64", "scalar", "grad", "expanded"],
)
def test_layouts_and_types(x: torch.Tensor) -> None:
    h = Histogram()
    h.update(x)
    flat = Histogram()
    flat.update(torch.tensor(x.detach().double().flatten().tolist(), dtype=torch.float64))
    assert h == flat


def test_float64_is_not_narrowed() -> None:
    h = of()
    h.update(torch.tensor([1e300, -1e-300], dtype=torch.float64))
    assert (h.minimum, h.maximum, h.count) == (-1e-300, 1e300, 2)


def test_empty_tensors_and_no_values() -> None:
    h = of([], [])
    h.update(torch.empty(0, 3))
    assert h.count == 0
    assert h.counts.numel() == 0
    assert h == Histogram()
    assert h.merge(of([1.0])) == of([1.0])
    assert "count=0" in repr(h)


def test_only_non_finite_values() -> None:
    h = of([math.nan, math.inf, -math.inf])
    assert (h.nonfinite, h.count, h.minimum, h.maximum) == (3, 0, 0.0, 0.0)
    merged = h.merge(of([2.0, math.nan]))
    assert (merged.nonfinite, merged.count, merged.minimum) == (4, 1, 2.0)
