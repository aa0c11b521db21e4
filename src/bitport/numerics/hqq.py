"""Half-quadratic quantization: ranges by a sum of |error|^p that forgives a few large errors; no data is needed.

    Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models", mobiusml.github.io/hqq_blog

    argmin over s, z of Σ |w − ŵ|^p,   ŵ = s · n,   n = clamp(rne(w / s) + z) − z,   0 < p ≤ 1

splits the error into what is forgiven, e, and the rest, whose square is punished by β, and alternates, in units of s:

    d = w / s − n           e = sign(d) · max(0, |d| − |d|^(p−1) / β)         generalised soft-thresholding
    s, z = least squares of s · n to w − s · e                               β ← κ · β

Two things differ from the source. It solves for a zero point that is a real number, and leaves the scale alone; here
zero points are integers, which such small steps would never move. So both are solved by one regression, the zero
point is rounded, and the scale is solved again for it (in symmetric formats the scale alone). And β is in units of the
scale instead of the weights', so that the result doesn't depend on theirs.

Legend: R rows that get a range of their own, V values of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitport.errors import FormatError, RecipeError
from bitport.formats import Format
from bitport.numerics.estimators import estimator, for_weights, number
from bitport.numerics.histogram import Histogram
from bitport.numerics.quantize import qparams

# The source's β and its growth.
_BETA, _KAPPA = 10.0, 1.01
_MOST_ITERATIONS = 1000
# Weights are solved in blocks of about this many elements, which stay in the processor's cache.
_BLOCK = 2**17
# A range must gain at least this share of the error, so that rounding noise never takes one.
_GAIN = 1 - 1e-6


@estimator
def hqq(h: Histogram, fmt: Format, *, p: float = 0.7, iterations: int = 20) -> tuple[float, float]:
    """The range near min-max whose rounding errors, to the power of p, sum up to least (HQQ); for weights.

    Half-quadratic steps from `minmax`, of which the best is kept: never worse than it in Σ |error|^p, and never wider.
    The values of a bin are taken as its middle; exact zeros, which have no error, are left out.

    Args:
        p: 0 < p ≤ 1; the smaller, the less a large error counts beside a small one.
        iterations: 1 … 1000.

    Raises:
        RecipeError: an option is outside its range. FormatError: `fmt` isn't an integer format.
    """
    _check(fmt, p, iterations)
    edges, counts = h.edges(), h.counts.double()
    zero = -h.first
    if 0 <= zero < counts.numel():
        counts[zero] -= h.zeros
    middles = ((edges[:-1] + edges[1:]) / 2).clamp(h.minimum, h.maximum)
    ends = torch.tensor([[h.minimum], [h.maximum]], dtype=torch.float64)
    low, high = _solve(middles[None], counts, ends[0], ends[1], fmt, p, iterations)
    return float(low), float(high)


@for_weights("hqq")
def _hqq_of_weights(
    w_RV: Tensor, fmt: Format, *, p: float = 0.7, iterations: int = 20
) -> tuple[Tensor, Tensor]:
    _check(fmt, p, iterations)
    lows, highs = [], []
    for part in torch.split(w_RV, max(1, _BLOCK // w_RV.shape[1])):
        low, high = _solve(part, None, part.amin(1), part.amax(1), fmt, p, iterations)
        lows.append(low)
        highs.append(high)
    return torch.cat(lows), torch.cat(highs)


def shrink(d: Tensor, beta: float, p: float) -> Tensor:
    """sign(d) · max(0, |d| − |d|^(p−1) / β): the part of an error that is forgiven; shape of d, 0 where d is 0."""
    size = d.abs()
    return (size - size.pow(p - 1) / beta).clamp_(min=0).mul_(d.sign())


def _solve(
    w_RV: Tensor, counts_V: Tensor | None, low: Tensor, high: Tensor, fmt: Format, p: float, iterations: int
) -> tuple[Tensor, Tensor]:
    """The ends [R] of the best range on the way from [low, high], widened to include 0.

    Args:
        counts_V: how often each value counts, [V]; None: once.
        low, high: the extremes of the values, [R].
    """
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    full = qparams(low, high, fmt)[0].to(low.dtype)
    a, b = low, high
    best_a, best_b, best = low, high, torch.full(low.shape, torch.inf, dtype=torch.float64, device=low.device)
    beta = _BETA
    # The last turn only measures where the one before it arrived.
    for _ in range(iterations + 1):
        scale, zero_point = qparams(a, b, fmt)
        steps = w_RV / scale[:, None]
        zero = zero_point.to(steps.dtype)[:, None]
        codes = (steps.round() + zero).clamp_(fmt.low, fmt.high)
        d = steps - (codes - zero)
        lost = d.abs().mul_(scale[:, None]).double().pow_(p)
        found = lost.sum(1) if counts_V is None else lost @ counts_V
        better = found < best * _GAIN
        best_a, best_b = torch.where(better, a, best_a), torch.where(better, b, best_b)
        best = torch.where(better, found, best)
        factor, zero_point = _fit(steps - shrink(d, beta, p), codes, zero_point, counts_V, fmt)
        wanted = (scale.double() * factor).to(low.dtype).minimum(full)
        a, b = _ends(wanted, zero_point.to(low.dtype), low, high, fmt)
        beta *= _KAPPA
    return best_a, best_b


def _fit(
    goal_RV: Tensor, codes_RV: Tensor, zero_point: Tensor, counts_V: Tensor | None, fmt: Format
) -> tuple[Tensor, Tensor]:
    """factor and zero point z, float64 and int32 [R], for which factor · (codes − z) is nearest to the goal.

    Least squares over factor and a real z, which is then rounded; the factor is solved again for it. Where all codes
    are alike nothing follows: the factor is 1 and z stays.
    """
    goal, codes = goal_RV.double(), codes_RV.double()

    def mean(x_RV: Tensor) -> Tensor:
        return (
            x_RV.mean(1, keepdim=True)
            if counts_V is None
            else ((x_RV @ counts_V) / counts_V.sum().clamp(min=1))[:, None]
        )

    zero = zero_point.double()[:, None]
    if not fmt.symmetric:
        away, up = codes - mean(codes), goal - mean(goal)
        across, along = mean(away.square()), mean(away * up)
        slope = along / across
        known = (across > 0) & (along > 0)
        zero = torch.where(known, (mean(codes) - mean(goal) / slope).round(), zero).clamp(fmt.low, fmt.high)
    n = codes - zero
    square, product = mean(n.square()), mean(n * goal)
    factor = torch.where((square > 0) & (product > 0), product / square, 1.0)
    return factor[:, 0], zero[:, 0].to(torch.int32)


def _ends(scale: Tensor, zero_point: Tensor, low: Tensor, high: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """The range within [low, high] that `qparams` turns into a scale, and into the zero point as far as that fits."""
    if fmt.symmetric:
        above = fmt.high - fmt.zero_point
        below = fmt.zero_point - fmt.low
        if below == above + 1:
            below = above
        return low.maximum(-scale * below), high.minimum(scale * above)
    length = scale * (fmt.high - fmt.low)
    # Half a step of play is free: the zero point is rounded. Beyond it the neighbour's is taken.
    start = ((fmt.low - zero_point) * scale).minimum(high - length).maximum(low).clamp(max=0.0)
    return start, (start + length).minimum(high).clamp(min=0.0)


def _check(fmt: Format, p: float, iterations: int) -> None:
    number("hqq", "p", p, "a number above 0 and up to 1, such as 0.7", low=5e-324, high=1)
    what = f"a whole number of 1 … {_MOST_ITERATIONS}"
    number("hqq", "iterations", iterations, what, low=1, high=_MOST_ITERATIONS)
    if not isinstance(iterations, int):
        raise RecipeError(f"range 'hqq' has iterations = {iterations!r}: give {what}")
    if not fmt.is_int:
        raise FormatError(f"range 'hqq' solves for integers, which {fmt} doesn't have: use mse or percentile")
