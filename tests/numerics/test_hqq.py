"""Half-quadratic ranges: against plain loops and a grid of every range, and where they should gain or not."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.numerics.test_ranges import FORMATS, SAMPLES, histogram, sample
from torch import Tensor

from bitport.errors import FormatError, RecipeError
from bitport.formats import Format
from bitport.numerics.codes import decode, encode, fit
from bitport.numerics.hqq import hqq, shrink
from bitport.numerics.quantize import fake_quantize, qparams
from bitport.numerics.ranges import Spec, check, estimate, minmax, weight_ranges

INT8, INT4 = Format.parse("int8"), Format.parse("int4")
ROWS = ["int4 channel(0)", "int3 channel(0)", "int2 channel(0)", "int4 symmetric channel(0)"]


def lost(x: Tensor, fmt: Format, low: Tensor, high: Tensor, p: float = 0.7) -> Tensor:
    """Σ |error|^p of each row [R], measured on what is stored; an oracle that shares nothing but `quantize`."""
    scale, zero_point = qparams(low, high, fmt)
    back = fake_quantize(x, scale, zero_point, fmt.low, fmt.high, axis=0)
    return (back.double() - x.double()).abs().pow(p).sum(1)


def spread(w: Tensor, fmt: Format, spec: Spec) -> Tensor:
    grid = fit(w, fmt, spec)
    return decode(encode(w, grid), grid)


def planted(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gauss weights [64, 512] with a few in a thousand twelve times as large, and where those are."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(64, 512, generator=g)
    where = torch.rand(w.shape, generator=g) < 0.004
    return torch.where(where, 12 * w, w), where


# ---------------------------------------------------------------- properties


@given(SAMPLES, FORMATS, st.floats(0.2, 1.0), st.integers(1, 8))
def test_of_weights_it_is_never_worse_than_minmax(
    drawn: tuple[str, int, float], fmt: Format, p: float, iterations: int
) -> None:
    x = torch.stack([sample(*drawn, n=200), -sample(*drawn, n=200)])
    by_row = fmt.with_(granularity="channel", axis=0)
    low, high = weight_ranges(x, by_row, {"use": "hqq", "p": p, "iterations": iterations})
    full = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
    assert (full[0] <= low).all()
    assert (low <= 0).all()
    assert (high >= 0).all()
    assert (high <= full[1]).all()
    assert (qparams(low, high, fmt)[0] > 0).all()
    assert (lost(x, fmt, low, high, p) <= lost(x, fmt, *full, p) * (1 + 1e-5)).all()
    back = fake_quantize(torch.zeros(2, 1), *qparams(low, high, fmt), fmt.low, fmt.high, axis=0)
    assert (back == 0).all()


@given(SAMPLES, FORMATS)
def test_of_histograms_it_is_never_worse_than_minmax(drawn: tuple[str, int, float], fmt: Format) -> None:
    h = histogram(sample(*drawn))
    edges = h.edges()
    middles = ((edges[:-1] + edges[1:]) / 2).clamp(h.minimum, h.maximum)
    counts = h.counts.double()
    if 0 <= -h.first < counts.numel():
        counts[-h.first] -= h.zeros

    def measure(low: float, high: float) -> float:
        scale, zero_point = qparams(torch.tensor(low).double(), torch.tensor(high).double(), fmt)
        steps = middles / scale
        nearest = (steps.round() + zero_point).clamp(fmt.low, fmt.high) - zero_point
        return float((((steps - nearest) * scale).abs().pow(0.7) * counts).sum())

    low, high = hqq(h, fmt)
    assert measure(low, high) <= measure(*minmax(h, fmt)) * (1 + 1e-9)


@pytest.mark.parametrize("fmt", ROWS)
def test_a_row_depends_on_no_other_row(fmt: str) -> None:
    w = torch.randn(300, 700, generator=torch.Generator().manual_seed(0))
    low, high = weight_ranges(w, Format.parse(fmt), "hqq")
    for row in (0, 187, 299):
        alone = weight_ranges(w[row : row + 1], Format.parse(fmt), "hqq")
        assert (alone[0][0], alone[1][0]) == (low[row], high[row])


@pytest.mark.parametrize("exponent", [-100, -60, 60, 110])
def test_it_does_not_depend_on_the_size_of_weights(exponent: int) -> None:
    w, fmt = sample("heavy", 0, 0.0).reshape(4, 500), Format.parse("int4 channel(0)")
    for end, scaled in zip(
        weight_ranges(w, fmt, "hqq"), weight_ranges(w * 2.0**exponent, fmt, "hqq"), strict=True
    ):
        assert torch.equal(scaled * 2.0**-exponent, end)


# ---------------------------------------------------------------- independent references


def by_hand(row: list[float], fmt: Format, p: float, iterations: int) -> float:
    """The smallest Σ |error|^p on the way of the module's formulas, in plain loops over one row."""
    low, high = min(0.0, *row), max(0.0, *row)
    levels = fmt.high - fmt.low
    full = (high - low) / levels
    scale, zero = full, round(fmt.low - low / full)
    best, beta = math.inf, 10.0
    for _ in range(iterations + 1):
        codes = [min(max(round(w / scale) + zero, fmt.low), fmt.high) for w in row]
        errors = [w / scale - (q - zero) for w, q in zip(row, codes, strict=True)]
        best = min(best, sum((scale * abs(d)) ** p for d in errors))
        goal = []
        for w, d in zip(row, errors, strict=True):
            kept = max(0.0, abs(d) - abs(d) ** (p - 1) / beta) if d else 0.0
            goal.append(w / scale - math.copysign(kept, d))
        mean_q, mean_g = sum(codes) / len(row), sum(goal) / len(row)
        across = sum((q - mean_q) ** 2 for q in codes)
        along = sum((q - mean_q) * (g - mean_g) for q, g in zip(codes, goal, strict=True))
        if across > 0 and along > 0:
            zero = min(max(round(mean_q - mean_g * across / along), fmt.low), fmt.high)
        n = [q - zero for q in codes]
        product, square = sum(a * b for a, b in zip(n, goal, strict=True)), sum(a * a for a in n)
        scale = min(scale * product / square if square > 0 and product > 0 else scale, full)
        start = min(max(min((fmt.low - zero) * scale, high - levels * scale), low), 0.0)
        zero = min(max(round(fmt.low - start / scale), fmt.low), fmt.high)
        beta *= 1.01
    return best


@pytest.mark.parametrize("fmt", ["int4", "int3", "int2", "uint4"])
@pytest.mark.parametrize("p", [0.5, 0.7, 1.0])
def test_against_plain_loops(fmt: str, p: float) -> None:
    parsed = Format.parse(fmt)
    agreeing = 0
    for seed in range(20):
        w = torch.randn(1, 24, generator=torch.Generator().manual_seed(seed)) + seed % 3 - 1
        ends = weight_ranges(w, parsed, {"use": "hqq", "p": p, "iterations": 6})
        ours = float(lost(w, parsed, ends[0].reshape(1), ends[1].reshape(1), p))
        theirs = by_hand(w[0].tolist(), parsed, p, 6)
        agreeing += abs(ours - theirs) <= 1e-4 * theirs
    # float32 and float64 may round one weight to two sides of a tie, and go on from there.
    assert agreeing >= 18


@pytest.mark.parametrize("fmt", ["int3", "int2"])
def test_between_minmax_and_the_best_of_every_range(fmt: str) -> None:
    """Nothing is better than a fine grid of both ends; a good part of the way to it is gone."""
    parsed = Format.parse(fmt)
    full = ours = best = 0.0
    for seed in range(12):
        w = torch.randn(1, 12, generator=torch.Generator().manual_seed(seed))
        low, high = float(w.min()), float(w.max())
        shares = [step / 60 for step in range(6, 61)]
        pairs = torch.tensor([(low * a, high * b) for a, b in itertools.product(shares, shares)])
        every = lost(w.expand(len(pairs), -1), parsed, pairs[:, 0], pairs[:, 1])
        ends = weight_ranges(w, parsed, "hqq")
        found = float(lost(w, parsed, ends[0].reshape(1), ends[1].reshape(1)))
        assert found >= 0.97 * float(every.min())  # the grid's own steps
        full, ours, best = full + float(every[-1]), ours + found, best + float(every.min())
    assert (full - ours) / (full - best) > 0.25


def test_shrinking_is_the_proximal_operator_of_the_absolute_value() -> None:
    """For p = 1 it minimises |e| + β/2 · (e − d)²; for every p small errors vanish and large ones stay."""
    d = torch.linspace(-2, 2, 41)
    e = torch.linspace(-2, 2, 4001)
    best = e[(e.abs()[None] + 2.0 * (e[None] - d[:, None]).square()).argmin(1)]
    assert torch.allclose(shrink(d, 4.0, 1.0), best, atol=2e-3)
    small, large = shrink(torch.tensor([1e-3, 0.0, 50.0]), 10.0, 0.7).split([2, 1])
    assert torch.equal(small, torch.zeros(2))
    assert float(large) == pytest.approx(50.0, rel=1e-3)


# ---------------------------------------------------------------- where it gains, and where not


@pytest.mark.parametrize("fmt", ROWS)
def test_outliers_are_given_up_for_the_others(fmt: str) -> None:
    w, where = planted()
    parsed = Format.parse(fmt)
    full = spread(w, parsed, "minmax") - w
    ours = spread(w, parsed, "hqq") - w
    assert float(ours.abs().pow(0.7).sum()) < 0.9 * float(full.abs().pow(0.7).sum())
    assert float(ours[~where].abs().mean()) < 0.9 * float(full[~where].abs().mean())
    assert float(ours[where].abs().mean()) > float(full[where].abs().mean())


@pytest.mark.parametrize("fmt", ["int8 channel(0)", "int8 symmetric channel(0)"])
def test_evenly_spread_weights_stay_as_they_are(fmt: str) -> None:
    w = torch.rand(16, 4096, generator=torch.Generator().manual_seed(0)) * 2 - 1
    parsed = Format.parse(fmt)
    full, ours = (spread(w, parsed, spec) - w for spec in ("minmax", "hqq"))
    assert float(ours.square().sum()) == pytest.approx(float(full.square().sum()), rel=0.03)
    low, high = weight_ranges(w, parsed, "hqq")
    assert torch.equal(low.sign(), -torch.ones(16))
    assert (high > 0.97).all()


def test_weights_on_the_grid_stay_there() -> None:
    w = torch.arange(-8, 8).repeat(3, 4).float() * 0.25
    low, high = weight_ranges(w, Format.parse("int4 channel(0)"), "hqq")
    assert torch.equal(low, torch.full((3,), -2.0))
    assert torch.equal(high, torch.full((3,), 1.75))


def test_a_smaller_power_forgives_more() -> None:
    w, where = planted()
    parsed = Format.parse("int4 channel(0)")
    strict, mild = (
        (spread(w, parsed, {"use": "hqq", "p": p, "iterations": 100}) - w).abs() for p in (1.0, 0.5)
    )
    assert float(mild.pow(0.5).sum()) < float(strict.pow(0.5).sum())
    assert float(mild[where].mean()) > float(strict[where].mean())


def test_more_iterations_are_never_worse() -> None:
    w, parsed = planted()[0], Format.parse("int3 channel(0)")
    found = [
        lost(w, parsed, *weight_ranges(w, parsed, {"use": "hqq", "iterations": n})) for n in (1, 5, 20, 60)
    ]
    for before, after in itertools.pairwise(found):
        assert (after <= before * (1 + 1e-5)).all()
    assert float(found[-1].sum()) < 0.98 * float(found[0].sum())


def test_groups_and_histograms() -> None:
    w, _ = planted()
    grouped = weight_ranges(w, Format.parse("int4 group(32,0)"), "hqq")
    rows = weight_ranges(w.reshape(-1, 32), Format.parse("int4 channel(0)"), "hqq")
    assert torch.equal(grouped[0].reshape(-1), rows[0])
    one, binned = weight_ranges(w, INT4, "hqq"), hqq(histogram(w), INT4)
    assert binned == pytest.approx((float(one[0]), float(one[1])), rel=0.05)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 0}, "p = 0: give a number above 0"),
        ({"p": 1.5}, "up to 1"),
        ({"p": math.nan}, "p = nan"),
        ({"p": True}, "p = True"),
        ({"iterations": 0}, "iterations = 0: give a whole number"),
        ({"iterations": 2.5}, "iterations = 2.5"),
        ({"iterations": 10_000}, r"1 … 1000"),
        ({"beta": 2.0}, "no option 'beta': allowed are p, iterations"),
    ],
)
def test_options_are_held_to_their_ranges(options: dict[str, float], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check({"use": "hqq", **options})
    with pytest.raises(RecipeError, match=message):
        weight_ranges(torch.ones(3), INT8, {"use": "hqq", **options})


def test_it_needs_an_integer_format() -> None:
    with pytest.raises(FormatError, match="e4m3"):
        estimate(histogram(torch.ones(5)), Format.parse("e4m3"), "hqq")
    with pytest.raises(FormatError, match="nf4"):
        fit(torch.ones(5), Format.parse("nf4"), "hqq")
