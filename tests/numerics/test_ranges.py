from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitport.errors import FormatError, RecipeError, UnknownName, WeightsError
from bitport.formats import Format
from bitport.numerics.codes import fit
from bitport.numerics.estimators import grid_step
from bitport.numerics.quantize import fake_quantize, qparams
from bitport.numerics.ranges import (
    Histogram,
    check,
    estimate,
    expected_error,
    known,
    minmax,
    mse,
    percentile,
    weight_ranges,
)

INT8 = Format.parse("int8")
FORMATS = st.sampled_from(
    ["int8", "int8 symmetric", "int4", "int4 symmetric", "uint8", "int2 symmetric"]
).map(Format.parse)
SAMPLES = st.tuples(
    st.sampled_from(["normal", "relu", "negative", "skewed", "heavy", "constant", "two", "far"]),
    st.integers(0, 10_000),
    st.floats(-30, 30),
)


def sample(kind: str, seed: int, log_size: float, n: int = 2000) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=g)
    x = {
        "normal": x,
        "relu": x.relu(),
        "negative": -x.abs() - 1,
        "skewed": x.exp() - 0.5,
        "heavy": x**5,
        "constant": torch.full((n,), 5.0),
        "two": torch.where(x > 1, 3.0, -1.0),
        "far": x + 100,
    }[kind]
    return x * math.exp(log_size)


def histogram(x: Tensor) -> Histogram:
    h = Histogram()
    h.update(x)
    return h


def error_of(x: Tensor, fmt: Format, low: float, high: float) -> float:
    """The measured mean squared error, an oracle without bins."""
    scale, zero_point = qparams(torch.tensor(low).double(), torch.tensor(high).double(), fmt)
    back = fake_quantize(x, scale, zero_point, fmt.low, fmt.high)
    return float((back.double() - x.double()).square().mean())


@given(SAMPLES, FORMATS)
def test_mse_is_never_worse_than_minmax(drawn: tuple[str, int, float], fmt: Format) -> None:
    h = histogram(sample(*drawn))
    ours = expected_error(h, fmt, *mse(h, fmt))
    assert ours <= expected_error(h, fmt, *minmax(h, fmt))
    assert ours <= expected_error(h, fmt, *percentile(h, fmt)) * 1.02


@given(SAMPLES, FORMATS)
def test_ranges_stay_within_the_values(drawn: tuple[str, int, float], fmt: Format) -> None:
    h = histogram(sample(*drawn))
    for spec in set(known()) - {"fixed"}:
        low, high = estimate(h, fmt, spec)
        assert min(h.minimum, 0.0) <= low <= high <= max(h.maximum, 0.0)


@given(SAMPLES, st.booleans(), st.lists(st.floats(50.01, 100), min_size=2, max_size=5))
def test_percentile_grows_with_q(drawn: tuple[str, int, float], symmetric: bool, qs: list[float]) -> None:
    h, fmt = histogram(sample(*drawn)), INT8.with_(symmetric=symmetric)
    ranges = [percentile(h, fmt, q=q) for q in sorted(qs)]
    for (low, high), (wider_low, wider_high) in pairwise(ranges):
        assert wider_low <= low
        assert high <= wider_high
    assert percentile(h, fmt, q=100) == minmax(h, fmt)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", ["normal", "relu", "negative", "skewed"])
@pytest.mark.parametrize("q", [90, 99.0, 99.9])
def test_percentile_against_numpy(kind: str, symmetric: bool, q: float) -> None:
    x = sample(kind, 1, 0.0, n=50_000)
    h = histogram(x)
    low, high = percentile(h, INT8.with_(symmetric=symmetric), q=q)
    values, width = x.numpy(), 2.0**h.exponent

    def upper(of: np.ndarray[tuple[int], np.dtype[np.float32]], share: float) -> float:
        return float(np.percentile(of, share, method="inverted_cdf"))

    if symmetric:
        bound = upper(np.abs(values), q)
        expected = max(float(values.min()), -bound), min(float(values.max()), bound)
    elif kind == "relu":
        expected = 0.0, upper(values, q)
    elif kind == "negative":
        expected = -upper(-values, q), float(values.max())
    else:
        expected = -upper(-values, 50 + q / 2), upper(values, 50 + q / 2)
    assert low == pytest.approx(expected[0], abs=1.01 * width)
    assert high == pytest.approx(expected[1], abs=1.01 * width)


def test_percentile_keeps_q_percent() -> None:
    x = sample("heavy", 0, 0.0, n=100_000)
    low, high = percentile(histogram(x), INT8, q=99)
    inside = float(((x >= low) & (x <= high)).double().mean())
    assert inside == pytest.approx(0.99, abs=0.002)


@pytest.mark.parametrize("fmt", ["int8", "int8 symmetric", "int4", "int4 symmetric"])
@pytest.mark.parametrize("kind", ["normal", "skewed", "heavy"])
def test_mse_is_two_sided(kind: str, fmt: str) -> None:
    """On the data themselves: mse clips (minmax doesn't), and yet its whole error is smaller."""
    x, parsed = sample(kind, 3, 0.0, n=20_000), Format.parse(fmt)
    h = histogram(x)
    low, high = mse(h, parsed)
    outside = (x < low) | (x > high)
    assert outside.any()
    scale, zero_point = qparams(torch.tensor(low), torch.tensor(high), parsed)
    loss = (fake_quantize(x, scale, zero_point, parsed.low, parsed.high) - x).square()
    full, full_zero = qparams(torch.tensor(h.minimum), torch.tensor(h.maximum), parsed)
    full_loss = (fake_quantize(x, full, full_zero, parsed.low, parsed.high) - x).square()
    assert loss[outside].sum() > full_loss[outside].sum()
    assert loss.double().sum() < full_loss.double().sum()


@pytest.mark.parametrize("fmt", ["int8", "int4", "int4 symmetric"])
@pytest.mark.parametrize("kind", ["normal", "relu", "skewed", "negative"])
def test_mse_against_brute_force(kind: str, fmt: str) -> None:
    """No range of a fine grid is more than 2 % better on the data themselves."""
    x, parsed = sample(kind, 5, 0.0, n=4000), Format.parse(fmt)
    h = histogram(x)
    found = error_of(x, parsed, *mse(h, parsed))
    factors = np.linspace(0.2, 1, 41)
    if h.minimum >= 0 or h.maximum <= 0 or parsed.symmetric:
        pairs = [(f, f) for f in factors]
    else:
        pairs = [(a, b) for a in factors for b in factors]
    best = min(error_of(x, parsed, h.minimum * a, h.maximum * b) for a, b in pairs)
    assert found <= 1.02 * best


@pytest.mark.parametrize("fmt", ["int8", "int4", "uint8 symmetric", "int2 symmetric"])
@pytest.mark.parametrize("kind", ["normal", "relu", "heavy", "far"])
def test_expected_error_is_the_measured_one(kind: str, fmt: str) -> None:
    x, parsed = sample(kind, 2, 0.0, n=200_000), Format.parse(fmt)
    h = histogram(x)
    for shrink in (1.0, 0.7, 0.3):
        low, high = h.minimum * shrink, h.maximum * shrink
        measured = error_of(x, parsed, low, high)
        assert expected_error(h, parsed, low, high) == pytest.approx(measured, rel=0.06)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_wide_range_that_errs_much_hides_no_narrow_one_that_does_not(sign: int) -> None:
    """Outliers that cost less than what they cost all others: the way to the best range leads past worse ones."""
    x = sign * torch.cat(
        [torch.randn(50_000, generator=torch.Generator().manual_seed(0)), torch.full((2,), 60.0)]
    )
    fmt = Format.parse("int4")
    for ends in (mse(histogram(x), fmt), weight_ranges(x, fmt, "mse")):
        low, high = float(ends[0]), float(ends[1])
        best = min(
            error_of(x, fmt, *sorted((-sign * a, sign * b))) for a in (2.0, 2.5, 3.0) for b in (2.5, 3.0, 3.5)
        )
        assert error_of(x, fmt, low, high) <= 1.02 * best


@pytest.mark.parametrize("sign", [1, -1])
def test_mse_cuts_an_outlier_at_one_end_only(sign: int) -> None:
    x = sign * torch.cat([torch.rand(20_000) * 2 - 1, torch.tensor([50.0])])
    fmt = Format.parse("int4")
    near, far = (x.min(), x.max()) if sign > 0 else (x.max(), x.min())

    def error(a: float, b: float) -> float:
        return error_of(x, fmt, *sorted((a, b)))

    best = min(
        error(float(near) * a, float(far) * b) for a in (0.8, 0.9, 1.0) for b in np.linspace(0.02, 1, 50)
    )
    for ends in (mse(histogram(x), fmt), weight_ranges(x, fmt, "mse")):
        assert error_of(x, fmt, float(ends[0]), float(ends[1])) <= 1.005 * best


def test_one_sided_values_keep_their_zero_end() -> None:
    assert mse(histogram(sample("relu", 0, 0.0)), Format.parse("int4"))[0] == 0.0
    low, high = mse(histogram(-sample("relu", 0, 0.0)), Format.parse("int4"))
    assert high == 0.0
    assert low < 0


@pytest.mark.parametrize(
    "spec", ["minmax", "percentile", "mse", "moving_average", "mean_std", "entropy", "hqq"]
)
@pytest.mark.parametrize(
    "values", [[], [0.0], [5.0], [-5.0], [1e-42, 0.0], [math.nan], [3e38, -3e38], [1e30, 1.0]]
)
def test_degenerate_histograms(spec: str, values: list[float]) -> None:
    h = histogram(torch.tensor(values))
    for text in ("int8", "int8 symmetric"):
        low, high = estimate(h, Format.parse(text), spec)
        scale, _ = qparams(torch.tensor(low), torch.tensor(high), Format.parse(text))
        assert 0 < float(scale) < math.inf
    assert values or (low, high) == (0.0, 0.0)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_weights_that_lie_on_a_grid_keep_it(granularity: str) -> None:
    """Whatever its largest code is; `minmax` would take another grid where that isn't 127."""
    fmt = Format.parse(
        "int8", granularity=granularity, group=8 if granularity == "group" else None, symmetric=True
    )
    fmt = fmt if granularity == "tensor" else fmt.with_(axis=0)
    codes = torch.randint(-90, 91, (6, 16))
    codes[:, 0], codes[:, 8] = 90, -89
    w = codes * torch.full((6, 1), 0.0123)
    scale, _ = qparams(*weight_ranges(w, fmt, "given"), fmt)
    torch.testing.assert_close(scale, torch.full_like(scale, 0.0123))
    assert float((fit(w, fmt, "minmax").scale - 0.0123).abs().max()) > 0.001


def test_weights_on_no_grid_get_their_extremes() -> None:
    fmt = Format.parse("int8", granularity="channel", symmetric=True).with_(axis=0)
    w = torch.randn(4, 50)
    w[1] = (w[1] * 10).round()
    w[2] = 0
    asked, whole = (torch.stack(weight_ranges(w, fmt, name)) for name in ("given", "minmax"))
    assert torch.equal(asked[:, [0, 2, 3]], whole[:, [0, 2, 3]])
    found = grid_step(w, 127)
    assert found[0] == found[2] == found[3] == 0
    assert torch.equal(w[1] / found[1], (w[1] / found[1]).round())


@given(st.integers(1, 127), st.floats(1e-6, 1e6), st.lists(st.integers(-127, 127), min_size=1, max_size=40))
def test_a_step_stores_without_loss(most: int, scale: float, codes: list[int]) -> None:
    held = torch.tensor([[max(-most, min(most, code)) for code in codes]]) * torch.tensor(scale)
    step = float(grid_step(held, most))
    assert (step > 0) == bool(held.any())
    if step:
        again = (held / step).round()
        assert float(again.abs().max()) <= most
        assert float((again * step - held).abs().max()) <= 2e-3 * step


def test_specs() -> None:
    h = histogram(torch.randn(5000))
    assert estimate(h, INT8, {"use": "percentile", "q": 99.0}) == percentile(h, INT8, q=99.0)
    assert estimate(h, INT8, "percentile") == percentile(h, INT8, q=99.99)
    names = {"minmax", "moving_average", "percentile", "mean_std", "mse", "entropy", "hqq", "fixed", "given"}
    assert set(known()) == names
    assert all(summary.endswith(".") for summary in known().values())


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("gauss", UnknownName, "hqq, mean_std, minmax, moving_average, mse, percentile"),
        ("percentil", UnknownName, "Did you mean 'percentile'"),
        ({"q": 99.9}, RecipeError, "names no estimator"),
        ({"use": "percentile", "p": 99.9}, RecipeError, "no option 'p': allowed are q"),
        ({"use": "minmax", "q": 99.9}, RecipeError, "allowed are none"),
        ({"use": "percentile", "q": 50}, RecipeError, "above 50"),
        ({"use": "percentile", "q": 101}, RecipeError, "up to 100"),
        ({"use": "percentile", "q": "99"}, RecipeError, "q = '99'"),
        ({"use": "percentile", "q": True}, RecipeError, "q = True"),
        ({"use": "percentile", "q": math.nan}, RecipeError, "q = nan"),
    ],
)
def test_bad_specs(spec: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        estimate(histogram(torch.ones(3)), INT8, spec)
    with pytest.raises(error, match=message):
        weight_ranges(torch.ones(3), INT8, spec)
    with pytest.raises(error, match=message):
        check(spec)


def test_mse_needs_an_integer_format() -> None:
    with pytest.raises(FormatError, match="float32"):
        estimate(histogram(torch.ones(3)), Format.parse("float32"), "mse")


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize(("axis", "dims"), [(0, (1, 2, 3)), (1, (0, 2, 3)), (-1, (0, 1, 2))])
def test_minmax_of_weights_per_channel(axis: int, dims: tuple[int, ...]) -> None:
    w = torch.randn(4, 3, 2, 5)
    low, high = weight_ranges(w, Format.parse(f"int8 channel({axis})"), "minmax")
    assert torch.equal(low, w.amin(dims))
    assert torch.equal(high, w.amax(dims))


def test_ranges_of_a_whole_weight() -> None:
    w = torch.randn(4, 3)
    low, high = weight_ranges(w, INT8, "minmax")
    assert (low.shape, high.shape) == ((), ())
    assert (float(low), float(high)) == (float(w.min()), float(w.max()))
    assert weight_ranges(torch.tensor(-2.0), INT8, "mse")[0] == -2.0


@pytest.mark.parametrize("fmt", ["int8 symmetric", "int4 symmetric", "int4", "int3 symmetric"])
@pytest.mark.parametrize("kind", ["normal", "heavy", "skewed"])
def test_mse_of_weights_beats_minmax_and_a_fine_grid(kind: str, fmt: str) -> None:
    parsed = Format.parse(fmt, granularity="channel", axis=0)
    w = torch.stack([sample(kind, seed, seed - 3.0, n=500) for seed in range(6)])
    low, high = weight_ranges(w, parsed, "mse")
    for w_K, a, b in zip(w, low.tolist(), high.tolist(), strict=True):
        found = error_of(w_K, parsed, a, b)
        extremes = float(w_K.min()), float(w_K.max())
        assert found <= error_of(w_K, parsed, *extremes)
        best = min(error_of(w_K, parsed, extremes[0] * f, extremes[1] * f) for f in np.linspace(0.05, 1, 96))
        assert found <= 1.05 * best


def test_mse_of_weights_is_independent_of_the_other_channels() -> None:
    w, fmt = torch.randn(300, 3000), Format.parse("int4 symmetric channel(0)")
    low, high = weight_ranges(w, fmt, "mse")
    for channel in (0, 87, 88, 299):
        alone = weight_ranges(w[channel : channel + 1], fmt, "mse")
        assert alone[0][0] == low[channel]
        assert alone[1][0] == high[channel]


@pytest.mark.parametrize("exponent", [-100, -60, 60, 110])
def test_mse_of_weights_scales(exponent: int) -> None:
    """Squares of these sizes leave float32."""
    w, fmt = torch.randn(4, 300), Format.parse("int4 symmetric channel(0)")
    for end, scaled in zip(
        weight_ranges(w, fmt, "mse"), weight_ranges(w * 2.0**exponent, fmt, "mse"), strict=True
    ):
        assert torch.allclose(scaled * 2.0**-exponent, end, rtol=0.02)
        assert (end.abs() < w.abs().amax(1)).all()


def test_mse_of_weights_agrees_with_the_histogram() -> None:
    w, fmt = torch.randn(40_000), Format.parse("int4 symmetric")
    exact = weight_ranges(w, fmt, "mse")[1]
    assert float(exact) == pytest.approx(mse(histogram(w), fmt)[1], rel=0.05)


@pytest.mark.parametrize("spec", ["minmax", "mse", "percentile", "moving_average", "entropy", "hqq"])
def test_degenerate_channels(spec: str) -> None:
    w = torch.zeros(6, 50)
    w[1] = 0.25
    w[2] = -0.25
    w[3] = 1e-42
    w[4, 7] = 1e30
    w[5] = torch.linspace(-1, 1, 50) * 3e38
    for text in ("int8 symmetric channel(0)", "int8 channel(0)"):
        fmt = Format.parse(text)
        low, high = weight_ranges(w, fmt, spec)
        assert (float(low[0]), float(high[0])) == (0.0, 0.0)
        assert torch.isfinite(low).all()
        assert torch.isfinite(high).all()
        scale, zero_point = qparams(low, high, fmt)
        assert torch.isfinite(scale).all()
        assert scale[0] == 1.0
        back = fake_quantize(w, scale, zero_point, fmt.low, fmt.high, axis=0)
        assert (back[0] == 0).all()
        assert torch.isfinite(back).all()
        assert torch.allclose(back[1:3], w[1:3], rtol=0.01)


def test_percentile_of_weights_cuts_an_outlier() -> None:
    w = torch.randn(2, 1000)
    w[0, 3] = 1e30
    low, high = weight_ranges(w, Format.parse("int8 channel(0)"), {"use": "percentile", "q": 99.5})
    assert float(high[0]) < 5
    assert float(low[0]) > float(w[0].min())
    low, high = weight_ranges(w, Format.parse("int8 symmetric channel(0)"), {"use": "percentile", "q": 99.5})
    assert float(high[0]) < 5
    w = w.abs()
    low, high = weight_ranges(w, Format.parse("int8 channel(0)"), {"use": "percentile", "q": 99.5})
    assert torch.equal(low, w.amin(1))
    assert float(high[0]) < 5


def test_percentile_of_weights_against_sorting() -> None:
    w = torch.arange(1.0, 101.0)
    assert weight_ranges(w, INT8, {"use": "percentile", "q": 90}) == (1.0, 90.0)
    assert weight_ranges(-w, INT8, {"use": "percentile", "q": 90}) == (-90.0, -1.0)
    both = torch.cat([-w, w])
    assert weight_ranges(both, INT8, {"use": "percentile", "q": 90}) == (-90.0, 90.0)
    assert weight_ranges(both, INT8.with_(symmetric=True), {"use": "percentile", "q": 75}) == (-75.0, 75.0)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (3, 0, 2)])
def test_empty_weights(shape: tuple[int, ...]) -> None:
    w = torch.empty(shape)
    for spec in set(known()) - {"fixed"}:
        low, high = weight_ranges(w, Format.parse("int8 channel(0)"), spec)
        assert low.shape == high.shape == (shape[0],)
        assert weight_ranges(w, INT8, spec)[0] == 0.0


def test_weights_refused() -> None:
    with pytest.raises(WeightsError, match="2 NaN or infinite"):
        weight_ranges(torch.tensor([1.0, math.nan, math.inf]), INT8, "minmax")
    for fmt in ("int8 channel", "int8 channel(2)", "int8 channel(-3)"):
        with pytest.raises(FormatError, match="channel axis"):
            weight_ranges(torch.ones(2, 2), Format.parse(fmt), "minmax")
    with pytest.raises(FormatError, match=r"group\(SIZE,AXIS\)"):
        weight_ranges(torch.ones(2, 2), Format.parse("int4 group(2)"), "minmax")


# ---------------------------------------------------------------- groups


@given(
    st.sampled_from([(3, 8), (3, 7), (2, 3, 2, 2), (5,), (1, 1), (4, 33)]),
    st.sampled_from([1, 2, 4, 7, 32, 100]),
    st.integers(0, 3),
    st.sampled_from(["minmax", "percentile", "mse"]),
    st.sampled_from(["int4 symmetric", "int4", "int8"]),
)
def test_groups_are_the_ranges_of_their_own_values(
    shape: tuple[int, ...], size: int, axis: int, spec: str, name: str
) -> None:
    """Against a loop over the slices of each channel: the shorter tail is a group too, to the bit."""
    axis = min(axis, len(shape) - 1)
    w = torch.randn(shape, generator=torch.Generator().manual_seed(size))
    fmt = Format.parse(f"{name} group({size},{axis})")
    low, high = weight_ranges(w, fmt, spec)
    channels = w.movedim(axis, 0).reshape(shape[axis], -1)
    count = -(-channels.shape[1] // size)
    assert low.shape == high.shape == (shape[axis], count)
    for c, channel in enumerate(channels):
        for g, values in enumerate(channel.split(size)):
            alone = weight_ranges(values.clone(), Format.parse(name), spec)
            assert (low[c, g], high[c, g]) == alone


def test_a_group_as_large_as_the_channel_is_the_channel() -> None:
    w = torch.randn(4, 3, 5)
    for size in (15, 16, 1000):
        for spec in ("minmax", "mse", "percentile"):
            grouped = weight_ranges(w, Format.parse(f"int4 group({size},0)"), spec)
            channel = weight_ranges(w, Format.parse("int4 channel(0)"), spec)
            for a, b in zip(grouped, channel, strict=True):
                assert torch.equal(a, b[:, None])


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (3, 0, 2)])
def test_groups_of_empty_weights(shape: tuple[int, ...]) -> None:
    w = torch.empty(shape)
    low, high = weight_ranges(w, Format.parse("int4 group(3,0)"), "mse")
    assert low.shape == high.shape == (shape[0], 0)


def test_finer_groups_never_have_wider_ranges() -> None:
    w = torch.randn(6, 50)
    wide = weight_ranges(w, Format.parse("int4 group(20,0)"), "minmax")[1]
    fine = weight_ranges(w, Format.parse("int4 group(10,0)"), "minmax")[1]
    assert torch.equal(wide, torch.stack([fine[:, :2].amax(1), fine[:, 2:4].amax(1), fine[:, 4]], 1))


def test_one_global_scale_is_shaped_as_a_tensors() -> None:
    w = torch.randn(3, 4)
    assert weight_ranges(w, Format.parse("int8 global"), "minmax") == weight_ranges(w, INT8, "minmax")


@pytest.mark.parametrize("name", ["e4m3", "nf4", "log2(4)", "sign", "codebook(16)"])
def test_percentile_of_formats_without_a_zero_point_is_symmetric(name: str) -> None:
    w = torch.cat([torch.arange(-100.0, 0.0), torch.arange(1.0, 11.0)])
    low, high = weight_ranges(w, Format.parse(name), {"use": "percentile", "q": 90})
    assert (low, high) == (-89.0, 10.0)
    found = percentile(histogram(w), Format.parse(name), q=90)
    assert found == pytest.approx((-89.0, 10.0), abs=0.1)
