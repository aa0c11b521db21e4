from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from bitport.errors import MetricError
from bitport.numerics.intervals import (
    Interval,
    beyond_extremes,
    bootstrap_dataset,
    paired_binary,
    paired_mean,
    ratio_of_medians,
    verdict,
)

COUNTS = st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(0, 400)).filter(lambda c: sum(c) > 0)
Vector = np.ndarray[tuple[int], np.dtype[np.bool_]]


def pair(lost: int, won: int, same: int) -> tuple[Vector, Vector]:
    first = np.array([True] * lost + [False] * won + [True] * same)
    second = np.array([False] * lost + [True] * won + [True] * same)
    return first, second


# ---------------------------------------------------------------- proportions


@given(COUNTS.filter(lambda c: c[0] + c[1] > 0))
def test_ends_are_roots_of_the_quartic(counts: tuple[int, int, int]) -> None:
    """Squaring the score equation gives one (Yang, Sun & Hardin's non-iterative form of Tango's interval)."""
    lost, won, same = counts
    n, g, d, s = sum(counts), stats.chi2.ppf(0.95, 1), lost - won, lost + won
    quartic = [
        n**2 * (n / g + 1) ** 2,
        -n * d * (n / g + 1) * (4 * n / g + 1),
        2 * n * d**2 * (3 * n / g + 2) / g - n**2 * (s / g + 1),
        n * d * (2 * s / g + 1) - d**3 * (4 * n / g + 1) / g,
        d**2 * (d**2 / g - s) / g,
    ]
    roots = np.roots(quartic)
    interval = paired_binary(*pair(lost, won, same))
    for end in (interval.low, interval.high):
        assert np.abs(roots - end).min() < 1e-5


def score_by_search(lost: int, won: int, n: int, delta: float) -> float:
    """The score statistic with the nuisance share found by maximising the likelihood numerically."""
    q = np.linspace(max(0.0, -delta) + 1e-9, (1 - delta) / 2 - 1e-9, 400_001)
    rest = n - lost - won
    with np.errstate(all="ignore"):
        likelihood = lost * np.log(q + delta) + won * np.log(q) + rest * np.log(1 - 2 * q - delta)
    best = q[np.nanargmax(likelihood)]
    return float((lost - won - n * delta) / math.sqrt(n * (2 * best + delta * (1 - delta))))


@pytest.mark.parametrize(("lost", "won", "n"), [(5, 3, 100), (40, 1, 120), (3, 9, 60), (1, 1, 10)])
def test_ends_solve_the_score_equation(lost: int, won: int, n: int) -> None:
    interval = paired_binary(*pair(lost, won, n - lost - won))
    z = stats.norm.ppf(0.975)
    assert score_by_search(lost, won, n, interval.low) == pytest.approx(z, abs=1e-3)
    assert score_by_search(lost, won, n, interval.high) == pytest.approx(-z, abs=1e-3)


@given(COUNTS)
def test_interval_holds_the_drop_and_mirrors(counts: tuple[int, int, int]) -> None:
    lost, won, same = counts
    interval = paired_binary(*pair(lost, won, same))
    mirrored = paired_binary(*pair(won, lost, same))
    assert -1 <= interval.low <= interval.drop <= interval.high <= 1
    assert interval.low < interval.high
    assert (interval.n, interval.discordant) == (sum(counts), lost + won)
    assert interval.drop == pytest.approx((lost - won) / sum(counts))
    assert mirrored.low == pytest.approx(-interval.high, abs=1e-9)
    assert mirrored.high == pytest.approx(-interval.low, abs=1e-9)


@given(COUNTS)
def test_more_samples_narrow_the_interval(counts: tuple[int, int, int]) -> None:
    one, four = (paired_binary(*pair(*(k * count for count in counts))) for k in (1, 4))
    assert four.high - four.low < one.high - one.low


@pytest.mark.parametrize("n", [1, 3, 50, 1000])
def test_no_difference_gives_the_rule_of_three(n: int) -> None:
    interval = paired_binary([True] * n, [True] * n)
    exact = stats.binomtest(0, n).proportion_ci(0.90, method="exact").high
    assert interval.high == pytest.approx(exact)
    assert interval.low == -interval.high
    assert interval.high > 0
    if n >= 50:
        assert interval.high == pytest.approx(3 / n, rel=0.05)


@pytest.mark.parametrize(
    ("n", "lost", "won"), [(200, 0.03, 0.02), (1000, 0.02, 0.02), (100, 0.1, 0.05), (50, 0.05, 0.05)]
)
def test_coverage(n: int, lost: float, won: float) -> None:
    rng = np.random.default_rng(1)
    drawn = rng.multinomial(n, [lost, won, 1 - lost - won], size=1500)
    kinds, repeats = np.unique(drawn, axis=0, return_counts=True)
    covered = 0
    for counts, repeat in zip(kinds, repeats, strict=True):
        interval = paired_binary(*pair(*counts.tolist()))
        covered += int(repeat) * (interval.low <= lost - won <= interval.high)
    assert 0.93 <= covered / 1500 <= 0.99


def test_tensors_and_lists_are_alike() -> None:
    first, second = pair(3, 1, 20)
    expected = paired_binary(first, second)
    assert paired_binary(torch.from_numpy(first), torch.from_numpy(second)) == expected
    assert paired_binary(first.tolist(), second.tolist()) == expected


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ([], [], "there are none"),
        ([1], [1, 0], "lengths 1 and 2"),
        ([0.5], [1.0], "other than 0 and 1"),
        ([math.nan], [1.0], "NaN"),
    ],
)
def test_bad_answers_are_refused(first: list[float], second: list[float], message: str) -> None:
    with pytest.raises(MetricError, match=message):
        paired_binary(first, second)


# ---------------------------------------------------------------- means


def test_mean_against_scipy() -> None:
    values = np.random.default_rng(0).exponential(size=40)
    interval = paired_mean(values, 5.0)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert interval.drop == pytest.approx(values.mean())
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))
    assert (interval.n, interval.discordant) == (40, 40)


def test_mean_coverage() -> None:
    rng = np.random.default_rng(2)
    drawn = rng.normal(0.1, 1.0, size=(1000, 15))
    intervals = [paired_mean(row, 6.0) for row in drawn]
    assert 0.93 <= np.mean([i.low <= 0.1 <= i.high for i in intervals]) <= 0.97


@pytest.mark.parametrize("spread", [0.5, 20.0])
def test_equal_scores_are_bounded_by_their_range(spread: float) -> None:
    interval = paired_mean(np.zeros(300), spread)
    assert interval.high == pytest.approx(3 / 300 * spread, rel=0.01)
    assert interval.low == -interval.high
    assert interval.discordant == 0
    assert paired_mean(np.zeros(300), 0.0).high == pytest.approx(0.01, rel=0.01)


def test_single_sample() -> None:
    interval = paired_mean([0.25], 2.0)
    assert (interval.drop, interval.low, interval.high) == (0.25, -1.75, 2.25)


def test_bad_differences_are_refused() -> None:
    with pytest.raises(MetricError, match="there are none"):
        paired_mean([], 1.0)
    with pytest.raises(MetricError, match="NaN or infinite"):
        paired_mean([math.inf], 1.0)
    with pytest.raises(MetricError, match="range of the scores"):
        paired_mean([1.0], -1.0)


# ---------------------------------------------------------------- data sets


def mean_score(outputs: torch.Tensor, labels: torch.Tensor) -> float:
    return float((outputs == labels).double().mean())


def test_bootstrap_agrees_with_the_formula_for_a_mean() -> None:
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (400,), generator=g)
    float_outputs, other = labels.clone(), labels.clone()
    float_outputs[:20] += 1
    other[10:50] += 1
    drawn = bootstrap_dataset(mean_score, float_outputs, other, labels, 400)
    exact = paired_binary((float_outputs == labels).numpy(), (other == labels).numpy())
    assert drawn.drop == pytest.approx(exact.drop)
    assert drawn.low == pytest.approx(exact.low, abs=0.008)
    assert drawn.high == pytest.approx(exact.high, abs=0.008)


def test_bootstrap_is_repeatable_and_leaves_the_global_generator() -> None:
    outputs, labels = torch.arange(50) % 3, torch.arange(50) % 2
    np.random.seed(0)
    before = np.random.get_state()[1].tolist()
    first = bootstrap_dataset(mean_score, labels, outputs, labels, 50, resamples=100, seed=4)
    assert first == bootstrap_dataset(mean_score, labels, outputs, labels, 50, resamples=100, seed=4)
    assert first != bootstrap_dataset(mean_score, labels, outputs, labels, 50, resamples=100, seed=5)
    assert np.random.get_state()[1].tolist() == before


def test_bootstrap_takes_lists_and_dicts() -> None:
    def words(outputs: dict[str, list[str]], labels: list[str] | None) -> float:
        return sum(len(word) for word in outputs["text"]) / len(outputs["text"])

    texts = ["a", "bb", "ccc", "dddd"] * 5
    interval = bootstrap_dataset(
        words, {"text": texts}, {"text": [t[:2] for t in texts]}, None, 20, resamples=200
    )
    assert interval.drop == pytest.approx(2.5 - 1.75)
    assert 0.3 < interval.low < interval.drop < interval.high < 1.3


def test_bootstrap_of_equal_outputs_has_a_bound() -> None:
    labels = torch.arange(100) % 2
    interval = bootstrap_dataset(mean_score, labels, labels.clone(), labels, 100, resamples=50)
    assert interval.drop == 0
    assert interval.high == pytest.approx(0.03, rel=0.02)
    assert verdict(interval, 0.05, True) == ("holds", None)


def test_bootstrap_leaves_out_draws_without_a_score() -> None:
    labels = torch.tensor([0] * 40 + [1] * 3)

    def recall(outputs: torch.Tensor, truth: torch.Tensor) -> float:
        if not bool((truth == 1).any()):
            raise MetricError("no positive sample")
        return float((outputs[truth == 1] == 1).double().mean())

    other = labels.clone()
    other[-1] = 0
    interval = bootstrap_dataset(recall, labels, other, labels, 43, resamples=300)
    assert interval.drop == pytest.approx(1 / 3)
    assert interval.low <= interval.drop <= interval.high


def test_bootstrap_refuses_what_has_no_score() -> None:
    labels = torch.zeros(4)
    with pytest.raises(MetricError, match="no samples"):
        bootstrap_dataset(mean_score, labels, labels, labels, 0)
    with pytest.raises(MetricError, match="whole data set"):
        bootstrap_dataset(lambda o, t: math.nan, labels, labels, labels, 4)
    calls = iter(range(10**6))
    with pytest.raises(MetricError, match="can't score 15 of 20"):
        bootstrap_dataset(
            lambda o, t: 1.0 if next(calls) < 12 else math.nan, labels, labels, labels, 4, resamples=20
        )
    calls = iter(range(10**6))
    with pytest.raises(MetricError, match="resampled data sets"):
        bootstrap_dataset(
            lambda o, t: 1.0 if next(calls) < 2 else math.nan, labels, labels, labels, 4, resamples=20
        )


# ---------------------------------------------------------------- verdict


@pytest.mark.parametrize(
    ("interval", "max_drop", "higher", "expected"),
    [
        (Interval(0.0, -0.01, 0.01, 500), 0.01, True, "holds"),
        (Interval(0.0, -0.01, 0.0101, 500), 0.01, True, "undecided"),
        (Interval(0.05, 0.0101, 0.09, 500), 0.01, True, "fails"),
        (Interval(0.05, 0.01, 0.09, 500), 0.01, True, "undecided"),
        (Interval(-0.5, -0.6, -0.4, 500), 0.01, True, "holds"),
        (Interval(-0.5, -0.6, -0.4, 500), 0.01, False, "fails"),
        (Interval(0.5, 0.4, 0.6, 500), 0.01, False, "holds"),
        (Interval(-0.01, -0.03, 0.01, 500), 0.02, False, "undecided"),
    ],
)
def test_verdict(interval: Interval, max_drop: float, higher: bool, expected: str) -> None:
    word, needed = verdict(interval, max_drop, higher)
    assert word == expected
    assert (needed is not None) == (expected == "undecided")
    if needed is not None:
        assert needed > interval.n


@pytest.mark.parametrize("max_drop", [0.02, 0.005, 0.001])
def test_samples_needed_without_differences_is_enough_and_no_more(max_drop: float) -> None:
    word, needed = verdict(paired_binary([1] * 20, [1] * 20), max_drop, True)
    assert word == "undecided"
    assert needed is not None
    assert verdict(paired_binary([1] * needed, [1] * needed), max_drop, True)[0] == "holds"
    assert verdict(paired_binary([1] * (needed - 1), [1] * (needed - 1)), max_drop, True)[0] == "undecided"
    scores = paired_mean(np.zeros(20), 2.0)
    wide = verdict(scores, max_drop, False)[1]
    assert wide is not None
    assert wide == pytest.approx(2 * needed, rel=0.02)


@pytest.mark.parametrize(
    ("lost", "won", "same", "max_drop"), [(5, 3, 192, 0.02), (10, 1, 189, 0.02), (0, 1, 99, 0.01)]
)
def test_samples_needed_would_decide(lost: int, won: int, same: int, max_drop: float) -> None:
    """The same shares in that many samples decide, or nearly: one and a half times as many do for sure."""
    word, needed = verdict(paired_binary(*pair(lost, won, same)), max_drop, True)
    assert word == "undecided"
    assert needed is not None
    factor = math.ceil(1.5 * needed / (lost + won + same))
    assert (
        verdict(paired_binary(*pair(factor * lost, factor * won, factor * same)), max_drop, True)[0]
        != "undecided"
    )


def test_no_number_of_samples_decides() -> None:
    assert verdict(Interval(0.01, 0.0, 0.02, 100), 0.01, True) == ("undecided", None)
    assert verdict(paired_binary([1] * 20, [1] * 20), 0.0, True) == ("undecided", None)
    assert verdict(Interval(0.0, -math.inf, math.inf, 1), 0.01, True) == ("undecided", None)


# ---------------------------------------------------------------- latencies


def test_ratio_of_medians_cancels_what_slows_both_sides() -> None:
    rng = np.random.default_rng(0)
    load = rng.uniform(1, 3, 60)
    b = load * rng.normal(1, 0.01, 60)
    a = 2 * load * rng.normal(1, 0.01, 60)
    ratio, low, high = ratio_of_medians(a, b)
    assert ratio == pytest.approx(np.median(a) / np.median(b))
    assert low < ratio < high
    assert low < 2 < high
    assert high - low < 0.1
    unpaired = ratio_of_medians(a, rng.permutation(b))
    assert unpaired[2] - unpaired[1] > 2 * (high - low)


@given(st.lists(st.floats(0.1, 10), min_size=3, max_size=20), st.floats(0.5, 4))
def test_ratio_of_medians_scales(rounds: list[float], factor: float) -> None:
    a = [factor * value for value in rounds]
    ratio, low, high = ratio_of_medians(a, rounds, resamples=100)
    assert [ratio, low, high] == pytest.approx([factor] * 3)


def test_ratio_coverage() -> None:
    rng = np.random.default_rng(3)
    found = [
        ratio_of_medians(1.5 * rng.lognormal(0, 0.1, 41), rng.lognormal(0, 0.1, 41), resamples=200)
        for _ in range(200)
    ]
    assert np.mean([low <= 1.5 <= high for _, low, high in found]) >= 0.9


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [([1, 2], [1, 2], "at least 3"), ([1, 2, 3], [1, 2], "lengths"), ([1, 2, 0], [1, 2, 3], "positive")],
)
def test_bad_latencies_are_refused(a: list[float], b: list[float], message: str) -> None:
    with pytest.raises(MetricError, match=message):
        ratio_of_medians(a, b)


def test_rule_of_three_shrinks_with_n() -> None:
    bounds = [paired_binary([1] * n, [1] * n).high for n in (1, 2, 5, 20, 100, 10_000)]
    assert all(a > b > 0 for a, b in pairwise(bounds))


@pytest.mark.parametrize("n", [1, 4, 15])
def test_new_samples_lie_beyond_the_extremes_as_often_as_is_told(n: int) -> None:
    drawn = np.random.default_rng(0).normal(size=(40_000, n + 1))
    known, new = drawn[:, :-1], drawn[:, -1]
    share = float(((new > known.max(1)) | (new < known.min(1))).mean())
    assert share == pytest.approx(beyond_extremes(n), abs=0.01)
    assert beyond_extremes(0) == 1.0
