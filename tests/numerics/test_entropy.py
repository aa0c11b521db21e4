"""The KL range: against its formula, ONNX Runtime's calibrator, and where the textbook version fails."""

from __future__ import annotations

import contextlib
import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.numerics.test_ranges import error_of, histogram, sample
from torch import Tensor

from bitport.errors import FormatError
from bitport.formats import Format
from bitport.numerics.entropy import entropy
from bitport.numerics.quantize import qparams
from bitport.numerics.ranges import estimate, minmax, weight_ranges

INT8, INT4 = Format.parse("int8"), Format.parse("int4")
KINDS = st.sampled_from(["normal", "relu", "negative", "skewed", "heavy", "far", "two", "constant"])


def values(kind: str, n: int = 30_000, seed: int = 0) -> Tensor:
    return sample(kind, seed, 0.0, n=n)


@given(
    KINDS, st.integers(0, 20), st.sampled_from(["int8", "int8 symmetric", "int4", "uint8", "int2 symmetric"])
)
def test_it_keeps_nine_of_ten_values_that_are_not_zero(kind: str, seed: int, name: str) -> None:
    x, fmt = values(kind, n=3000, seed=seed), Format.parse(name)
    h = histogram(x)
    low, high = entropy(h, fmt)
    assert min(h.minimum, 0.0) <= low <= high <= max(h.maximum, 0.0)
    scale = float(qparams(torch.tensor(low), torch.tensor(high), fmt)[0])
    alive = x[x != 0]
    kept = (alive >= low - scale) & (alive <= high + scale)
    assert float(kept.double().mean()) >= 0.9


@pytest.mark.parametrize("name", ["int8", "int8 symmetric", "int4 symmetric"])
@pytest.mark.parametrize("share", [0.5, 0.02, 0.002])
def test_sparse_values_are_not_cut_to_their_zeros(share: float, name: str) -> None:
    """The textbook version would give 0 a code of its own by a range near 0: its many zeros outweigh the rest."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(400_000, generator=g).relu()
    x[torch.rand(x.numel(), generator=g) > 2 * share] = 0.0
    fmt = Format.parse(name)
    h = histogram(x)
    low, high = entropy(h, fmt)
    assert low == 0.0
    assert high > 0.6 * h.maximum
    assert error_of(x, fmt, low, high) < 2 * error_of(x, fmt, *estimate(h, fmt, "mse"))
    if share < 0.1:
        h.zeros = 0  # as if they were values like others
        assert entropy(h, fmt)[1] < 0.4 * high


def test_zeros_have_no_say() -> None:
    x = values("relu")
    more = torch.cat([x, torch.zeros(1_000_000)])
    assert entropy(histogram(more), INT8) == entropy(histogram(x), INT8)


def test_it_is_two_sided() -> None:
    """It cuts a lone outlier that minmax keeps, and leaves evenly spread values alone."""
    x = values("normal")
    h = histogram(torch.cat([x, torch.tensor([100.0])]))
    low, high = entropy(h, INT8)
    assert high < 10
    assert error_of(x, INT8, low, high) < error_of(x, INT8, *minmax(h, INT8)) / 10
    even = torch.rand(30_000, generator=torch.Generator().manual_seed(0))
    assert entropy(histogram(even), INT8)[1] > 0.98


def test_few_values_and_wide_formats_keep_everything() -> None:
    h = histogram(values("normal", n=1000))
    assert entropy(h, INT4) == (h.minimum, h.maximum)
    h = histogram(values("heavy"))
    assert entropy(h, Format.parse("int16")) == (h.minimum, h.maximum)
    tiny = torch.full((5000,), 1e-42)
    assert entropy(histogram(tiny), Format.parse("int32")) == pytest.approx((1e-42, 1e-42), rel=1e-3)


def test_it_needs_an_integer_format() -> None:
    with pytest.raises(FormatError, match="e4m3"):
        entropy(histogram(torch.ones(5)), Format.parse("e4m3"))


def test_weights() -> None:
    w = torch.stack([values("normal", seed=1), values("heavy", seed=2)])
    low, high = weight_ranges(w, Format.parse("int8 symmetric channel(0)"), "entropy")
    for row in (0, 1):
        alone = entropy(histogram(w[row]), Format.parse("int8 symmetric"))
        assert (float(low[row]), float(high[row])) == pytest.approx(alone, rel=1e-6)
    groups = weight_ranges(w, Format.parse("int8 group(32,0)"), "entropy")
    assert torch.equal(groups[1], weight_ranges(w, Format.parse("int8 group(32,0)"), "minmax")[1])


def divergence(x: Tensor, reach: float, width: float, levels: int) -> float:
    """KL of Migacz 2017 for a symmetric range, written out in plain loops over the bins of |x|."""
    counts = np.bincount((x.abs().double().numpy() / width).astype(int)).astype(float)
    counts[0] -= int((x == 0).sum())
    size = min(round(reach / width), len(counts))
    step = reach / levels
    code = [min(math.floor((i + 0.5) * width / step + 0.5), levels) for i in range(size)]
    p = counts[:size].copy()
    p[-1] += counts[size:].sum()
    q = np.zeros(size)
    for level in set(code):
        bins = [i for i in range(size) if code[i] == level]
        alive = [i for i in bins if p[i] > 0]
        for i in alive:
            q[i] = max(sum(counts[j] for j in bins) / len(alive), 0.5)
    p, q = p / p.sum(), q / q.sum()
    return float(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


@pytest.mark.parametrize("kind", ["normal", "relu", "heavy"])
def test_against_the_formula_on_magnitudes(kind: str) -> None:
    """No magnitude of a ladder loses clearly less, by the one-sided formula, than the one that was found."""
    x, fmt = values(kind).abs(), Format.parse("int[0,127]")
    h = histogram(x)
    width = 2.0**h.exponent
    found = divergence(x, entropy(h, fmt)[1], width, 127)
    ladder = [h.maximum * step / 24 for step in range(2, 25)]
    best = min(divergence(x, reach, width, 127) for reach in ladder if reach / 127 >= width)
    full = divergence(x, h.maximum, width, 127)
    assert found <= best + 0.1 * (full - best) + 1e-4


@pytest.mark.parametrize("kind", ["normal", "laplace"])
def test_against_onnxruntime(kind: str) -> None:
    """Its calibrator: 1023 bins, 128 codes, one magnitude, every candidate. The results lie within 15 percent."""
    from onnxruntime.quantization.calibrate import HistogramCollector

    g = torch.Generator().manual_seed(0)
    x = torch.randn(100_000, generator=g)
    if kind == "laplace":
        x = x.sign() * -torch.rand(100_000, generator=g).clamp(min=1e-6).log()
    collector = HistogramCollector(
        method="entropy",
        symmetric=True,
        num_bins=1023,
        num_quantized_bins=128,
        percentile=99.999,
        scenario="same",
    )
    with contextlib.redirect_stdout(io.StringIO()):
        collector.collect({"x": [x.numpy()]})
        theirs = float(collector.compute_collection_result()["x"][1])
    low, high = entropy(histogram(x), Format.parse("int[-64,63] symmetric"))
    assert max(-low, high) == pytest.approx(theirs, rel=0.15)
