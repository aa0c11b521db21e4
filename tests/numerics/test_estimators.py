"""The estimators of extremes and moments: moving_average, mean_std, fixed; and which estimator wins where."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.numerics.test_ranges import error_of, histogram, sample

from bitport.errors import RecipeError, WeightsError
from bitport.formats import Format
from bitport.numerics.ranges import (
    Histogram,
    Spec,
    check,
    choose_symmetry,
    choose_symmetry_of_weights,
    estimate,
    expected_error,
    fixed,
    known,
    mean_std,
    minmax,
    moving_average,
    weight_ranges,
    weights_range,
)

INT8 = Format.parse("int8")
BATCHES = st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=6), min_size=1, max_size=6)


def of(batches: list[list[float]]) -> Histogram:
    h = Histogram()
    for batch in batches:
        h.update(torch.tensor(batch))
    return h


# ---------------------------------------------------------------- moving_average


@given(BATCHES, st.sampled_from([0.0, 0.5, 0.9, 0.99]))
def test_moving_average_is_its_recurrence(batches: list[list[float]], momentum: float) -> None:
    low, high = min(batches[0]), max(batches[0])
    for batch in batches[1:]:
        low = momentum * low + (1 - momentum) * min(batch)
        high = momentum * high + (1 - momentum) * max(batch)
    found = moving_average(of(batches), INT8, momentum=momentum)
    assert found == pytest.approx((low, high), abs=1e-9)


@given(BATCHES)
def test_moving_average_against_pytorch(batches: list[list[float]]) -> None:
    from torch.ao.quantization import MovingAverageMinMaxObserver

    observer = MovingAverageMinMaxObserver(averaging_constant=0.1)
    for batch in batches:
        observer(torch.tensor(batch))
    found = moving_average(of(batches), INT8)
    assert found == pytest.approx((float(observer.min_val), float(observer.max_val)), abs=2e-3, rel=1e-5)


@given(BATCHES, st.floats(0, 0.999))
def test_moving_average_stays_within_the_extremes(batches: list[list[float]], momentum: float) -> None:
    h = of(batches)
    low, high = moving_average(h, INT8, momentum=momentum)
    assert h.minimum <= low <= high <= h.maximum
    same = of([batches[0]] * 4)
    assert moving_average(same, INT8, momentum=momentum) == minmax(same, INT8)


@given(BATCHES, st.integers(1, 5))
def test_moving_average_of_merged_parts_gives_the_same_bytes(batches: list[list[float]], at: int) -> None:
    whole = of(batches)
    merged = of(batches[:at]).merge(of(batches[at:]))
    assert moving_average(merged, INT8) == moving_average(whole, INT8)


def test_moving_average_is_two_sided() -> None:
    """One batch with an outlier, early: later ones make up for it. Late: it counts a tenth."""
    usual = [torch.randn(500, generator=torch.Generator().manual_seed(i)) for i in range(40)]
    spoilt = [*usual[:4], usual[4] * 30, *usual[5:]]
    x = torch.cat(usual)
    h, clean = Histogram(), Histogram()
    for a, b in zip(spoilt, usual, strict=True):
        h.update(a)
        clean.update(b)
    fmt = Format.parse("int8 symmetric")
    better, worse = (error_of(x, fmt, *estimate(h, fmt, spec)) for spec in ("moving_average", "minmax"))
    assert better < worse / 4
    # without an outlier it clips what minmax keeps
    assert moving_average(clean, fmt)[1] < minmax(clean, fmt)[1]
    late = h.merge(histogram(usual[0] * 1000))
    assert 0.09 < moving_average(late, fmt)[1] / minmax(late, fmt)[1] < 0.11


# ---------------------------------------------------------------- mean_std


@given(st.sampled_from(["normal", "relu", "skewed", "heavy", "far"]), st.floats(0.1, 8))
def test_mean_std_against_numpy(kind: str, k: float) -> None:
    x = sample(kind, 4, 0.0)
    values = x.double().numpy()
    reach = k * float(np.std(values))
    wanted = max(float(values.min()), values.mean() - reach), min(float(values.max()), values.mean() + reach)
    assert mean_std(histogram(x), INT8, k=k) == pytest.approx(wanted, rel=1e-6, abs=1e-6)
    rows = weight_ranges(
        torch.stack([x, x * 3]), Format.parse("int8 channel(0)"), {"use": "mean_std", "k": k}
    )
    for factor, low, high in zip((1, 3), *(end.tolist() for end in rows), strict=True):
        assert (low, high) == pytest.approx([factor * end for end in wanted], rel=1e-5, abs=1e-5)


@given(BATCHES, st.floats(0.1, 5), st.floats(1, 4))
def test_mean_std_stays_within_the_extremes_and_grows_with_k(
    batches: list[list[float]], k: float, factor: float
) -> None:
    h = of(batches)
    low, high = mean_std(h, INT8, k=k)
    assert h.minimum <= low <= high <= h.maximum
    wider = mean_std(h, INT8, k=k * factor)
    assert wider[0] <= low <= high <= wider[1]
    assert mean_std(h, INT8, k=1e6)[1] == pytest.approx(h.maximum, abs=1e-3)


def test_mean_std_of_huge_values_is_minmax() -> None:
    h = Histogram()
    h.update(torch.tensor([-1e308, 1e308, 1e308], dtype=torch.float64))
    assert mean_std(h, INT8) == (-1e308, 1e308)


def test_mean_std_is_two_sided() -> None:
    """At 4 bits a Gauss curve gains by it, a long tail loses."""
    fmt = Format.parse("int4")
    for kind, gains in (("normal", True), ("skewed", False)):
        x = sample(kind, 1, 0.0, n=20_000) if kind == "normal" else sample("heavy", 1, 0.0, n=20_000)
        clipped, full = (
            error_of(x, fmt, *estimate(histogram(x), fmt, spec)) for spec in ("mean_std", "minmax")
        )
        assert (clipped < full) == gains


# ---------------------------------------------------------------- percentile, both sides


def test_percentile_beats_minmax_with_outliers_and_loses_without() -> None:
    fmt, spec = INT8, {"use": "percentile", "q": 99.9}
    usual = torch.rand(20_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    spoilt = torch.cat([usual, torch.full((4,), 1000.0)])
    for x, wins in ((usual, False), (spoilt, True)):
        ranges = [estimate(histogram(x), fmt, s) for s in (spec, "minmax")]
        cut, full = (error_of(usual, fmt, *ends) for ends in ranges)
        assert (cut < full) == wins


# ---------------------------------------------------------------- fixed


def test_fixed_is_what_was_given() -> None:
    spec = {"use": "fixed", "low": -1, "high": 2.5}
    assert estimate(histogram(torch.randn(50)), INT8, spec) == (-1.0, 2.5)
    assert estimate(Histogram(), INT8, spec) == (-1.0, 2.5)
    low, high = weight_ranges(torch.randn(3, 5), Format.parse("int8 group(2,0)"), spec)
    assert torch.equal(low, torch.full((3, 3), -1.0))
    assert torch.equal(high, torch.full((3, 3), 2.5))
    assert fixed(Histogram(), INT8, low=3.0, high=4.0) == (3.0, 4.0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fixed", "lacks low"),
        ({"use": "fixed", "low": 0.0}, "lacks high"),
        ({"use": "fixed", "low": 1.0, "high": 1.0}, "low below high"),
        ({"use": "fixed", "low": 2.0, "high": 1.0}, "low below high"),
        ({"use": "fixed", "low": -math.inf, "high": 1.0}, "finite"),
        ({"use": "fixed", "low": 0.0, "high": 1e39}, "finite"),
        ({"use": "fixed", "low": 0.0, "high": math.nan}, "finite"),
        ({"use": "fixed", "low": "0", "high": 1.0}, "low = '0'"),
        ({"use": "fixed", "low": False, "high": 1.0}, "low = False"),
        ({"use": "moving_average", "momentum": 1.0}, "from 0 to below 1"),
        ({"use": "moving_average", "momentum": -0.1}, "from 0 to below 1"),
        ({"use": "moving_average", "momentum": math.nan}, "momentum = nan"),
        ({"use": "mean_std", "k": 0}, "above 0"),
        ({"use": "mean_std", "k": math.inf}, "above 0"),
        ({"use": "mean_std", "k": "3"}, "k = '3'"),
    ],
)
def test_bad_options(spec: Spec, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check(spec)
    with pytest.raises(RecipeError, match=message):
        weight_ranges(torch.ones(3), INT8, spec)
    with pytest.raises(RecipeError, match=message):
        weights_range([torch.ones(3)], INT8, spec)


# ---------------------------------------------------------------- several weights, one range


def test_one_range_of_several_weights() -> None:
    tensors = [torch.randn(40, 50), torch.randn(300) * 3, torch.randn(7, 2, 3)]
    joined = torch.cat([w.flatten() for w in tensors])
    fmt = Format.parse("int8 symmetric global")
    low, high = weights_range(tensors, fmt, "minmax")
    assert (low.shape, high.shape, low.dtype) == ((), (), torch.float32)
    assert (low, high) == weight_ranges(joined, fmt, "minmax")
    for spec in sorted(set(known()) - {"fixed"}):
        together = weights_range(tensors, fmt, spec)
        assert together == weights_range([joined], fmt, spec)
        exact = weight_ranges(joined, fmt, spec)
        assert [float(end) for end in together] == pytest.approx([float(end) for end in exact], rel=0.05)
    assert weights_range([], fmt, "mse") == (0.0, 0.0)
    assert weights_range([torch.empty(0)], fmt, "mse") == (0.0, 0.0)
    with pytest.raises(WeightsError, match="1 NaN"):
        weights_range([torch.ones(3), torch.tensor([math.nan, 1.0])], fmt, "minmax")


# ---------------------------------------------------------------- symmetric or not


@given(
    st.sampled_from(["normal", "relu", "negative", "skewed", "heavy", "far", "constant"]),
    st.integers(0, 50),
    st.sampled_from(["int8", "int4", "uint8", "int8n"]),
    st.sampled_from(["minmax", "mse", "percentile"]),
)
def test_the_chosen_symmetry_is_never_the_worse(kind: str, seed: int, name: str, spec: str) -> None:
    h, fmt = histogram(sample(kind, seed, 0.0)), Format.parse(name)
    chosen = choose_symmetry(h, fmt, spec)
    assert chosen == choose_symmetry(h, fmt.with_(symmetric=True), spec)
    errors = {s: expected_error(h, f, *estimate(h, f, spec)) for s, f in _both(fmt).items()}
    assert errors[chosen.symmetric] <= 1.01 * min(errors.values())
    if errors[True] <= 1.01 * errors[False]:
        assert chosen.symmetric


def _both(fmt: Format) -> dict[bool, Format]:
    return {symmetric: fmt.with_(symmetric=symmetric) for symmetric in (False, True)}


def test_symmetry_by_kind_of_values() -> None:
    """Where both halves of the codes are of use, symmetric is as good; where one is empty, it wastes a bit."""
    normal, relu = sample("normal", 0, 0.0, n=20_000), sample("relu", 0, 0.0, n=20_000)
    both = torch.cat([normal, -normal])
    for spec in ("minmax", "mse"):
        assert choose_symmetry(histogram(both), INT8, spec).symmetric
        assert not choose_symmetry(histogram(relu), INT8, spec).symmetric
        assert choose_symmetry_of_weights(both, INT8, spec).symmetric
        assert not choose_symmetry_of_weights(relu, INT8, spec).symmetric
    assert choose_symmetry(Histogram(), INT8, "minmax").symmetric


def test_formats_that_leave_no_choice() -> None:
    h = histogram(sample("normal", 0, 0.0))
    assert choose_symmetry(h, Format.parse("e4m3"), "minmax") == Format.parse("e4m3")
    assert choose_symmetry(h, Format.parse("uint1"), "minmax") == Format.parse("uint1")
    assert choose_symmetry_of_weights(torch.ones(3), Format.parse("nf4"), "minmax") == Format.parse("nf4")


@pytest.mark.parametrize("name", ["int4", "int4 channel(0)", "int4 group(7,0)", "int4 group(7,1)"])
def test_symmetry_of_weights_by_measured_error(name: str) -> None:
    """Against the error of each slice, measured on its own."""
    fmt = Format.parse(name)
    for w in (torch.randn(6, 20), torch.randn(6, 20).abs() + 0.5):
        errors = {}
        for symmetric, candidate in _both(fmt).items():
            errors[symmetric] = 0.0
            rows = [w.flatten()] if name == "int4" else list(w.movedim(fmt.axis or 0, 0))
            for row in rows:
                for part in row.split(fmt.group or row.numel()):
                    ends = weight_ranges(part, candidate.with_(granularity="tensor"), "minmax")
                    error = error_of(part, candidate, float(ends[0]), float(ends[1])) * part.numel()
                    errors[symmetric] += error
        chosen = choose_symmetry_of_weights(w, fmt, "minmax")
        assert chosen.symmetric == (errors[True] <= 1.01 * errors[False])
        assert chosen.granularity == fmt.granularity
