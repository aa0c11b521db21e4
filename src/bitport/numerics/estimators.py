"""Range estimators that look at ranks, moments and extremes; `search`, `entropy` and `hqq` hold those that try ranges.

A new estimator is one function with `@estimator` on a `Histogram`; its keyword arguments are its options, the first
line of its docstring is its summary. `@for_weights` adds an exact version for tensors, where the values are at hand.

Legend: R rows that get a range of their own, V values of a row; B histogram bins.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bitport.errors import RecipeError
from bitport.formats import Format
from bitport.numerics.histogram import Histogram

Estimator = Callable[..., tuple[float, float]]
TensorEstimator = Callable[..., tuple[Tensor, Tensor]]

ESTIMATORS: dict[str, Estimator] = {}
WEIGHT_ESTIMATORS: dict[str, TensorEstimator] = {}
# Beyond this the square of a value may leave float64.
_LARGEST_SQUARED = 1e150
ON_GRID = 1e-3  # of a step: what float32 leaves of a decoded number is far below it


def estimator(function: Estimator) -> Estimator:
    """Registers a range estimator under the name of its function: (histogram, format, options) → (low, high)."""
    ESTIMATORS[function.__name__] = function
    return function


def for_weights(name: str) -> Callable[[TensorEstimator], TensorEstimator]:
    """Registers an estimator's version for tensors: ([R, V], format, options) → ([R], [R])."""

    def register(function: TensorEstimator) -> TensorEstimator:
        WEIGHT_ESTIMATORS[name] = function
        return function

    return register


def mirrored(fmt: Format) -> bool:
    """Whether a range serves by its magnitude only: symmetric integers, and all that has no zero point."""
    return fmt.symmetric or not fmt.is_int


def number(name: str, option: str, value: Any, what: str, *, low: float, high: float) -> float:
    """The option of an estimator, which must lie in low … high. Raises RecipeError saying `what` is asked for."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise RecipeError(f"range {name!r} has {option} = {value!r}: give {what}")
    return float(value)


@estimator
def minmax(h: Histogram, fmt: Format) -> tuple[float, float]:
    """The exact smallest and largest value."""
    return h.minimum, h.maximum


@for_weights("minmax")
def _minmax_of_weights(w_RV: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    return w_RV.amin(1), w_RV.amax(1)


@estimator
def given(h: Histogram, fmt: Format) -> tuple[float, float]:
    """The range that an already quantized file came with; where it has none, as `minmax`.

    `calibrate` takes a tensor's scale from the graph (`Graph.given`). A weight gets the finest grid that all its
    values lie on, which stores it without loss; one that lies on none gets `minmax`.
    """
    return h.minimum, h.maximum


@for_weights("given")
def _grid_of_weights(w_RV: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    if not (fmt.is_int and fmt.symmetric) or not w_RV.numel():
        return w_RV.amin(1), w_RV.amax(1)
    step_R = grid_step(w_RV, fmt.high)
    on = step_R > 0
    return (
        torch.where(on, -step_R * fmt.high, w_RV.amin(1)),
        torch.where(on, step_R * fmt.high, w_RV.amax(1)),
    )


def grid_step(x_RV: Tensor, most: int) -> Tensor:
    """The finest step s per row with x = s · n, n whole, |n| ≤ most, up to a thousandth of a step; 0: there is none.

    Args:
        x_RV: float32. most: the largest code.

    Returns: [R], float32. A row of zeros has none.
    """
    reach_R = x_RV.abs().amax(1)
    step_R = torch.zeros_like(reach_R)
    open_R = torch.nonzero(reach_R > 0).flatten()
    for largest in range(most, 0, -1):
        if not open_R.numel():
            break
        tried_R = reach_R[open_R] / largest
        codes_RV = x_RV[open_R] / tried_R[:, None]
        on = (codes_RV - codes_RV.round()).abs().amax(1) <= ON_GRID
        step_R[open_R[on]] = tried_R[on]
        open_R = open_R[~on]
    return step_R


@estimator
def moving_average(h: Histogram, fmt: Format, *, momentum: float = 0.9) -> tuple[float, float]:
    """The extremes of each batch, averaged: later batches count more.

    r ← momentum · r + (1 − momentum) · extremes of the next batch, from the first batch's on (Jacob et al. 2018,
    arXiv:1712.05877, 3.1; PyTorch's MovingAverageMinMaxObserver with averaging_constant = 1 − momentum). It is never
    wider than `minmax`. A weight, which is seen once, gets `minmax`.

    Args:
        momentum: 0 ≤ momentum < 1; 0 keeps the last batch only.

    Raises:
        RecipeError: momentum is outside its range.
    """
    kept = _momentum(momentum)
    low, high = h.updates[0].low, h.updates[0].high
    for update in h.updates[1:]:
        low, high = low + (1 - kept) * (update.low - low), high + (1 - kept) * (update.high - high)
    return max(h.minimum, low), min(h.maximum, high)


@for_weights("moving_average")
def _moving_average_of_weights(w_RV: Tensor, fmt: Format, *, momentum: float = 0.9) -> tuple[Tensor, Tensor]:
    _momentum(momentum)
    return w_RV.amin(1), w_RV.amax(1)


@estimator
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


@for_weights("percentile")
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


@estimator
def mean_std(h: Histogram, fmt: Format, *, k: float = 3.0) -> tuple[float, float]:
    """The mean ± k standard deviations, within the extremes.

    Mean and deviation come from the sums that the histogram keeps, not from its bins (ACIQ, Banner et al. 2019,
    arXiv:1810.05723, clips a Gauss curve like this). Made for values around their mean: at a long tail it cuts much.

    Args:
        k: above 0; 3 keeps 99.7 percent of a Gauss curve.

    Raises:
        RecipeError: k is not a number above 0.
    """
    reach = _deviations(k) * h.deviation
    if max(-h.minimum, h.maximum) > _LARGEST_SQUARED:
        return h.minimum, h.maximum
    # Rounding may leave the mean of equal values a hair outside of them.
    mean = min(max(h.mean, h.minimum), h.maximum)
    return max(h.minimum, mean - reach), min(h.maximum, mean + reach)


@for_weights("mean_std")
def _mean_std_of_weights(w_RV: Tensor, fmt: Format, *, k: float = 3.0) -> tuple[Tensor, Tensor]:
    wide, low, high = w_RV.double(), w_RV.amin(1), w_RV.amax(1)
    mean = wide.mean(1)
    reach = _deviations(k) * (wide - mean[:, None]).square().mean(1).sqrt()
    mean = mean.maximum(low.double()).minimum(high.double())
    return low.maximum((mean - reach).float()), high.minimum((mean + reach).float())


@estimator
def fixed(
    h: Histogram, fmt: Format, *, low: float | None = None, high: float | None = None
) -> tuple[float, float]:
    """The range that the recipe gives, whatever the values.

    Args:
        low, high: finite, low < high; both must be given. The stored range is widened to hold 0.

    Raises:
        RecipeError: an end is missing or not a finite number, or they aren't in order.
    """
    ends = []
    for option, value in (("low", low), ("high", high)):
        if value is None:
            raise RecipeError(
                f"range 'fixed' lacks {option}: write {{use = \"fixed\", low = -1.0, high = 1.0}}"
            )
        largest = torch.finfo(torch.float32).max
        ends.append(number("fixed", option, value, "a finite float32 number", low=-largest, high=largest))
    if not ends[0] < ends[1]:
        raise RecipeError(f"range 'fixed' has low = {low!r} and high = {high!r}: give low below high")
    return ends[0], ends[1]


@for_weights("fixed")
def _fixed_of_weights(
    w_RV: Tensor, fmt: Format, *, low: float | None = None, high: float | None = None
) -> tuple[Tensor, Tensor]:
    ends = fixed(Histogram(), fmt, low=low, high=high)
    rows = torch.ones(w_RV.shape[0], device=w_RV.device)
    return rows * ends[0], rows * ends[1]


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
    least = math.nextafter(50, 100)
    return 1 - number("percentile", "q", q, "a number above 50 and up to 100", low=least, high=100) / 100


def _momentum(momentum: float) -> float:
    last = math.nextafter(1, 0)
    return number("moving_average", "momentum", momentum, "a number from 0 to below 1", low=0, high=last)


def _deviations(k: float) -> float:
    return number("mean_std", "k", k, "a number above 0, such as 3", low=5e-324, high=1e6)
