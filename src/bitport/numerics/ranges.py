"""Range estimators: from the distribution of a tensor to the real range [minimum, maximum] that is stored.

    minmax        the exact extremes
    percentile    the range that keeps q percent of the values
    mse           argmin over the range of E[(x − dequantize(quantize(x)))²]
                  (Nagel et al. 2021, "A White Paper on Neural Network Quantization", arXiv:2106.08295, 3.1)

A new estimator is one function with `@_estimator` on a `Histogram`; `@_for_weights` adds an exact version for
tensors where the distribution per channel is at hand.

Legend: C channels, K values per channel, G groups of a channel; R rows that get a range of their own, V values of
a row; B histogram bins.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bitport.errors import FormatError, RecipeError, UnknownName, WeightsError
from bitport.formats import Format
from bitport.numerics.histogram import Histogram
from bitport.numerics.quantize import qparams

__all__ = [
    "Histogram",
    "Spec",
    "estimate",
    "expected_error",
    "known",
    "minmax",
    "mse",
    "percentile",
    "search",
    "weight_losses",
    "weight_ranges",
]

Spec = str | Mapping[str, Any]
Estimator = Callable[..., tuple[float, float]]
TensorEstimator = Callable[..., tuple[Tensor, Tensor]]
# Maps the candidate ends of the range, [R] each, to the squared error of each row, [R].
Errors = Callable[[Tensor, Tensor], Tensor]

_ESTIMATORS: dict[str, Estimator] = {}
_WEIGHT_ESTIMATORS: dict[str, TensorEstimator] = {}
# Weights are searched in blocks of about this many elements, which stay in the processor's cache.
_BLOCK = 2**18
# A narrower range must gain at least this share of the error, so that rounding noise never narrows one.
_GAIN = 1 - 1e-6


def _estimator(function: Estimator) -> Estimator:
    _ESTIMATORS[function.__name__] = function
    return function


def _for_weights(name: str) -> Callable[[TensorEstimator], TensorEstimator]:
    def register(function: TensorEstimator) -> TensorEstimator:
        _WEIGHT_ESTIMATORS[name] = function
        return function

    return register


def known() -> dict[str, str]:
    """The range estimators: name → one-line summary."""
    return {name: (inspect.getdoc(f) or "").splitlines()[0] for name, f in sorted(_ESTIMATORS.items())}


def estimate(h: Histogram, fmt: Format, spec: Spec) -> tuple[float, float]:
    """The range to store for the values of a histogram; (0.0, 0.0) if it saw none.

    Args:
        h: the values' histogram.
        fmt: the integer format they are stored in.
        spec: an estimator's name, or a table of its name and options: `{"use": "percentile", "q": 99.9}`.

    Raises:
        UnknownName: no such estimator. RecipeError: an unknown or impossible option.
    """
    function, options = _resolve(spec)
    return function(h, fmt, **options) if h.counts.numel() else (0.0, 0.0)


def weight_ranges(w: Tensor, fmt: Format, spec: Spec) -> tuple[Tensor, Tensor]:
    """The ranges to store for a weight tensor, computed on the tensor itself.

    Args:
        w: any shape and float type.
        fmt: granularity "channel" gives one range per index of `fmt.axis`, "group" one per `fmt.group` consecutive
            values of a channel (a shorter tail is a group of its own), "tensor" and "global" a single one.
        spec: as for `estimate`.

    Returns: (minimum, maximum), float32, 0-d, [C] or [C, G]. What has no elements or only zeros gets (0, 0).

    Raises:
        UnknownName, RecipeError: as `estimate`.
        FormatError: the format's channel axis is missing or not an axis of w.
        WeightsError: w holds NaN or infinite values.
    """
    function, options = _resolve(spec)
    parts = _parts(w.detach().float(), fmt)
    # The extremes show whether anything is wrong, without a second tensor; only then it is counted.
    if w.numel() and not all(math.isfinite(float(end)) for end in torch.aminmax(w)):
        wrong = w.numel() - int(torch.isfinite(w).sum())
        raise WeightsError(f"weights hold {wrong} NaN or infinite values: repair the float network first")
    exact = _WEIGHT_ESTIMATORS.get(function.__name__)
    lows, highs = [], []
    for part in parts:
        w_RV = part.flatten(0, 1)
        if w_RV.numel() == 0:
            low_R = high_R = torch.zeros(w_RV.shape[0], device=w.device)
        elif exact is not None:
            low_R, high_R = exact(w_RV, fmt, **options)
        else:
            low_R, high_R = _through_histograms(w_RV, fmt, function, options)
        lows.append(low_R.reshape(part.shape[:2]))
        highs.append(high_R.reshape(part.shape[:2]))
    return _shaped(torch.cat(lows, 1), fmt), _shaped(torch.cat(highs, 1), fmt)


def weight_losses(w: Tensor, fmt: Format, low: Tensor, high: Tensor, scale: Tensor) -> tuple[int, int, int]:
    """What a range costs a weight tensor: (clipped, flushed, channel).

    Args:
        w: any shape. low, high, scale: as `weight_ranges` and `qparams` return them, 0-d, [C] or [C, G].

    Returns: how many values are far outside, more than twice the range; how many values other than 0 become 0 in
        the channel (or in the group) where they are the largest share, counted only where nine of ten do; that
        channel, else -1. Only integers flush in this sense: (clipped, 0, -1) for the other kinds of formats.
    """
    parts = _parts(w.detach().float(), fmt)
    ends = torch.maximum(-low, high).reshape(parts[0].shape[0], -1)
    steps = scale.reshape(ends.shape)
    clipped, worst = 0, (0.0, 0, -1)
    first = 0
    for part in parts:
        groups = slice(first, first + part.shape[1])
        first += part.shape[1]
        reach = 2 * ends[:, groups, None]
        size = part.abs()
        clipped += int(((size > reach) & (reach > 0)).sum())
        if not fmt.is_int or not part.numel():
            continue
        alive = (part != 0).sum(2)
        flushed = ((part != 0) & (size < steps[:, groups, None] / 2)).sum(2)
        many = (flushed >= 8) & (10 * flushed >= 9 * alive)
        share = torch.where(many, flushed / alive.clamp(min=1), 0.0)
        index = int(share.argmax())
        if float(share.reshape(-1)[index]) > worst[0]:
            found = (float(share.reshape(-1)[index]), int(flushed.reshape(-1)[index]), index // part.shape[1])
            worst = found
    return clipped, worst[1], worst[2]


# ---------------------------------------------------------------- the estimators


@_estimator
def minmax(h: Histogram, fmt: Format) -> tuple[float, float]:
    """The exact smallest and largest value."""
    return h.minimum, h.maximum


@_estimator
def percentile(h: Histogram, fmt: Format, *, q: float = 99.99) -> tuple[float, float]:
    """The range that keeps q percent of the values.

    A format without a zero point to choose cuts the largest magnitudes. Otherwise half of the rest is cut at
    each end, or all of it at the far end where the values have one sign. Inside a bin the values are taken as
    spread evenly.

    Args:
        q: 50 < q ≤ 100; 100 is `minmax`.

    Raises:
        RecipeError: q is outside its range.
    """
    outside = _outside(q)
    if outside == 0.0:
        return h.minimum, h.maximum
    edges, counts = h.edges(), h.counts.double()
    if mirrored(fmt):
        negative = int((edges[:-1] < 0).sum())
        below, above = counts[:negative].flip(0), counts[negative:]
        sides = max(below.numel(), above.numel())
        folded = torch.zeros(sides, dtype=torch.float64)
        folded[: below.numel()] += below
        folded[: above.numel()] += above
        reach = max(-h.minimum, h.maximum)
        folded_edges = (torch.arange(sides + 1, dtype=torch.float64) * 2.0**h.exponent).clamp(max=reach)
        # Interpolation may end below the smallest magnitude where all values share the bin.
        bound = max(_quantile(folded_edges, folded, 1 - outside), h.minimum, -h.maximum)
        return max(h.minimum, -bound), min(h.maximum, bound)
    if h.minimum >= 0:
        return h.minimum, max(h.minimum, _quantile(edges, counts, 1 - outside))
    if h.maximum <= 0:
        return min(h.maximum, -_quantile(-edges.flip(0), counts.flip(0), 1 - outside)), h.maximum
    return (
        max(h.minimum, -_quantile(-edges.flip(0), counts.flip(0), 1 - outside / 2)),
        min(h.maximum, _quantile(edges, counts, 1 - outside / 2)),
    )


@_estimator
def mse(h: Histogram, fmt: Format) -> tuple[float, float]:
    """The range with the smallest expected squared quantization error.

    Found by the grid search of `search`, which starts from `minmax` and is never worse than it.

    Raises:
        FormatError: `fmt` is a float format.
    """
    low, high = torch.tensor([[h.minimum], [h.maximum]], dtype=torch.float64)
    edges, counts = h.edges(), h.counts.double()
    low, high = search(lambda a, b: _histogram_error(edges, counts, a, b, fmt), low, high, fmt.symmetric)
    return float(low), float(high)


def expected_error(h: Histogram, fmt: Format, minimum: float, maximum: float) -> float:
    """E[(x − dequantize(quantize(x)))²] of a histogram's values stored with a range; the measure of `mse`.

    The values of a bin are taken as spread evenly over it, exact zeros too: after a ReLU they add a constant
    of up to (bin width)²/3.
    """
    low, high = torch.tensor([[minimum], [maximum]], dtype=torch.float64)
    total = float(_histogram_error(h.edges(), h.counts.double(), low, high, fmt))
    return total / max(h.count, 1)


@_for_weights("minmax")
def _minmax_of_weights(w_RV: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    return w_RV.amin(1), w_RV.amax(1)


@_for_weights("percentile")
def _percentile_of_weights(w_RV: Tensor, fmt: Format, *, q: float = 99.99) -> tuple[Tensor, Tensor]:
    """As `percentile`, with the smallest value below or at which enough values lie."""
    outside, size = _outside(q), w_RV.shape[1]
    low, high = w_RV.amin(1), w_RV.amax(1)

    def rank(share: float) -> int:
        return max(0, math.ceil(share * size - 1e-9) - 1)

    if mirrored(fmt):
        bound = w_RV.abs().sort(1).values[:, rank(1 - outside)]
        return low.maximum(-bound), high.minimum(bound)
    ordered = w_RV.sort(1).values
    one, half = rank(1 - outside), rank(1 - outside / 2)
    upper = torch.where(low >= 0, ordered[:, one], torch.where(high <= 0, high, ordered[:, half]))
    lower = torch.where(
        high <= 0, ordered[:, size - 1 - one], torch.where(low >= 0, low, ordered[:, size - 1 - half])
    )
    return lower, upper


@_for_weights("mse")
def _mse_of_weights(w_RV: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    lows, highs = [], []
    for part in torch.split(w_RV, max(1, _BLOCK // w_RV.shape[1])):
        low, high = part.amin(1), part.amax(1)
        # Errors relative to the largest weight: their squares can't overflow.
        size = torch.maximum(-low, high).clamp(min=torch.finfo(torch.float32).tiny)[:, None]

        def errors(low: Tensor, high: Tensor, part: Tensor = part, size: Tensor = size) -> Tensor:
            scale, zero_point = (p[:, None] for p in qparams(low, high, fmt))
            offset = zero_point.float()
            codes = (part / scale).round_().add_(offset).clamp_(fmt.low, fmt.high).sub_(offset)
            return codes.mul_(scale).sub_(part).div_(size).square_().sum(1, dtype=torch.float64)

        low, high = search(errors, low, high, fmt.symmetric)
        lows.append(low)
        highs.append(high)
    return torch.cat(lows), torch.cat(highs)


# ---------------------------------------------------------------- how they are found


def search(errors: Errors, low: Tensor, high: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The ends [R] of the range with the smallest error per row, by a grid search over shrink factors.

    The extremes, widened to include 0, are multiplied by factors ≤ 1 from a ladder: linear down to ½, then
    2^-½ a step down to 2^-10. First both by the same one; then, unless the format is symmetric or the values
    have one sign, each end by its own; then the grid is refined around the best in steps of 2^¼ to 2^1/128.
    An end at 0 stays there. Every range is compared by `errors`, the full one among them, and the best is
    kept; a row's result depends on no other row.

    Args:
        errors: maps candidate ends, [R] each, to the error of each row, [R]; any measure that is to be small.
        low, high: the extremes of the values, [R].
        symmetric: whether both ends are cut at one magnitude.
    """
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    reach = torch.maximum(-low, high)
    everywhere = torch.ones_like(low, dtype=torch.bool)
    two_ends = (low < 0) & (high > 0) & (not symmetric)

    def ends(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        if symmetric:
            return low.maximum(-reach * b), high.minimum(reach * b)
        return low * a, high * b

    one = torch.ones_like(low)
    best_a, best_b, best = one, one, errors(low, high)

    def attempt(a: Tensor, b: Tensor, where: Tensor) -> None:
        nonlocal best_a, best_b, best
        a, b = a.clamp(max=1.0), b.clamp(max=1.0)
        found = errors(*ends(a, b))
        better = (found < best * _GAIN) & where
        best_a, best_b = torch.where(better, a, best_a), torch.where(better, b, best_b)
        best = torch.where(better, found, best)

    octaves = [2.0 ** (-1 - step / 2) for step in range(1, 19)]
    for factor in [1 - step / 64 for step in range(1, 33)] + octaves:
        attempt(one * factor, one * factor, everywhere)
    alone = [1 - step / 32 for step in range(17)] + octaves
    if bool(two_ends.any()):
        for factor in alone:
            attempt(one * factor, best_b, two_ends)
        for factor in alone:
            attempt(best_a, one * factor, two_ends)
        for factor in alone:
            attempt(one * factor, best_b, two_ends)
    for octave in (1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128):
        step = 2.0**octave
        for factor in (step, 1 / step):
            attempt(best_a * factor, best_b * factor, everywhere)
            if bool(two_ends.any()):
                attempt(best_a * factor, best_b, two_ends)
                attempt(best_a, best_b * factor, two_ends)
    return ends(best_a, best_b)


def _histogram_error(edges: Tensor, counts: Tensor, low: Tensor, high: Tensor, fmt: Format) -> Tensor:
    """The summed squared error, float64 [1], of a histogram's values stored with the range [low, high].

    In units of the scale, with n(t) = clamp(rne(t)) the code next to t, ∫(t − n(t))² dt from 0 is
    n/12 + (t − n)³/3: each whole cell adds 1/12. The error of a bin is the integral's mean over the bin.
    """
    scale, zero_point = qparams(low, high, fmt)
    offset = zero_point.double()
    t = edges / scale.double()
    nearest = t.round().clamp(fmt.low - offset, fmt.high - offset)
    integral = nearest / 12 + (t - nearest) ** 3 / 3
    width = t.diff()
    # The integrals' difference cancels in a very narrow bin, which is a single point for all purposes.
    narrow = width < 1e-6
    mean = torch.where(narrow, (t - nearest)[1:] ** 2, integral.diff() / torch.where(narrow, 1.0, width))
    return (mean @ counts * scale.double() ** 2).reshape(1)


def mirrored(fmt: Format) -> bool:
    """Whether a range serves by its magnitude only: symmetric integers, and all that has no zero point."""
    return fmt.symmetric or not fmt.is_int


def _quantile(edges: Tensor, counts: Tensor, share: float) -> float:
    """The value below which `share` of the counts lie, interpolated inside its bin."""
    total = counts.cumsum(0)
    wanted = share * float(total[-1])
    index = min(int(torch.searchsorted(total, wanted)), counts.numel() - 1)
    before = float(total[index] - counts[index])
    inside = (wanted - before) / float(counts[index]) if counts[index] > 0 else 1.0
    left, right = float(edges[index]), float(edges[index + 1])
    return left + (right - left) * min(max(inside, 0.0), 1.0)


def _outside(q: float) -> float:
    """The share of values that `percentile` cuts."""
    if isinstance(q, bool) or not isinstance(q, int | float) or not 50 < q <= 100:
        raise RecipeError(f"range 'percentile' has q = {q!r}: give a number above 50 and up to 100")
    return 1 - q / 100


def _parts(w: Tensor, fmt: Format) -> list[Tensor]:
    """w cut into what shares a range: [C, G, V] without the tails, and [C, 1, V] of the shorter tails.

    C and G are 1 where the format has no channels or groups. There is always a first part.
    """
    if fmt.granularity not in ("channel", "group"):
        return [w.reshape(1, 1, -1)]
    if fmt.axis is None or not -w.ndim <= fmt.axis < w.ndim:
        raise FormatError(
            f"format {fmt} needs a channel axis of a weight with {w.ndim} dimensions: write "
            f"{'channel(AXIS)' if fmt.granularity == 'channel' else 'group(SIZE,AXIS)'}"
        )
    moved = w.movedim(fmt.axis, 0)
    channels = moved.shape[0]
    w_CK = moved.reshape(channels, moved.numel() // max(channels, 1))
    if fmt.granularity == "channel":
        return [w_CK[:, None]]
    whole = w_CK.shape[1] // fmt.group * fmt.group
    grouped = w_CK[:, :whole].reshape(channels, whole // fmt.group, fmt.group)
    tail = w_CK[:, None, whole:]
    return [part for part in (grouped, tail) if part.shape[1] and part.shape[2]] or [grouped]


def _shaped(ends_CG: Tensor, fmt: Format) -> Tensor:
    """[C, G] as the format's scales are shaped."""
    if fmt.granularity == "group":
        return ends_CG
    return ends_CG.reshape(-1) if fmt.granularity == "channel" else ends_CG.reshape(())


def _through_histograms(
    w_RV: Tensor, fmt: Format, function: Estimator, options: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """The ranges of an estimator without a version for tensors: one histogram per row."""
    ranges = []
    for w_V in w_RV:
        h = Histogram()
        h.update(w_V)
        ranges.append(function(h, fmt, **options))
    low_R, high_R = torch.tensor(ranges, dtype=torch.float32, device=w_RV.device).unbind(1)
    return low_R, high_R


def _resolve(spec: Spec) -> tuple[Estimator, dict[str, Any]]:
    """The estimator and the options that a spec names."""
    table: dict[str, Any] = {"use": spec} if isinstance(spec, str) else dict(spec)
    name = table.pop("use", None)
    if not isinstance(name, str):
        raise RecipeError(f'range {spec!r} names no estimator: write {{use = "percentile", q = 99.9}}')
    if name not in _ESTIMATORS:
        raise UnknownName("range", name, _ESTIMATORS)
    allowed = [
        option.name
        for option in inspect.signature(_ESTIMATORS[name]).parameters.values()
        if option.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    for option in table:
        if option not in allowed:
            raise RecipeError(
                f"range {name!r} has no option {option!r}: allowed are {', '.join(allowed) or 'none'}"
            )
    return _ESTIMATORS[name], table
