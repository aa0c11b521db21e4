"""Intervals for what was lost: 95 %, two-sided, from samples that both networks saw (paired).

    proportions      score interval of Tango 1998, Statistics in Medicine 17:891–908. With b samples that only
                     the float network has right and c that only the other has, the drop is d = (b − c)/n and
                     the interval holds every Δ with (b − c − nΔ)² ≤ z² n (2 q̂(Δ) + Δ(1 − Δ)), q̂ being the
                     likeliest share of c given Δ
    no difference    rule of three: where none of n samples differs, a share of differing ones above
                     1 − 0.05^(1/n) ≈ 3/n is unlikely (Hanley & Lippman-Hand 1983, JAMA 249:1743)
    means            Student's t on the differences
    data-set scores  bias-corrected bootstrap over samples (Efron 1987, JASA 82:171)

Legend: N samples, R rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats
from torch import Tensor

from bitport.errors import MetricError

CONFIDENCE = 0.95
_ALPHA = 1 - CONFIDENCE
_Z = float(stats.norm.ppf(1 - _ALPHA / 2))
_Floats = npt.NDArray[np.float64]
Values = Sequence[float] | npt.NDArray[Any] | Tensor


@dataclass(frozen=True)
class Interval:
    """A drop (float score − other score, in the metric's unit) with its 95 % interval.

    Attributes:
        drop: the observed difference.
        low, high: the interval's ends.
        n: samples.
        discordant: samples on which the two networks differ; None where samples have no score of their own.
    """

    drop: float
    low: float
    high: float
    n: int
    discordant: int | None = None


def paired_binary(float_correct: Values, other_correct: Values) -> Interval:
    """The drop of a share of right answers.

    Its coverage is 95 % on average; with few discordant samples (under about 10) it ripples down to 91 %, as
    that of every interval for counts does.

    Args:
        float_correct, other_correct: bool [N], whether each network has sample i right.

    Raises:
        MetricError: no samples, unequal lengths, or values other than 0 and 1.
    """
    first, second = _paired(float_correct, other_correct)
    if not np.isin(first, (0.0, 1.0)).all() or not np.isin(second, (0.0, 1.0)).all():
        raise MetricError("right answers hold values other than 0 and 1: use paired_mean for real scores")
    n = len(first)
    lost, won = int((first > second).sum()), int((second > first).sum())
    if lost + won == 0:
        bound = _rule_of_three(n)
        return Interval(0.0, -bound, bound, n, 0)
    drop = (lost - won) / n
    return Interval(drop, *_tango(lost, won, n), n, lost + won)


def paired_mean(differences: Values, spread: float) -> Interval:
    """The drop of a mean of real scores, by Student's t.

    Args:
        differences: float score − other score of each sample, [N].
        spread: the range (largest − smallest) of the scores seen. If all differences are 0 the bound is the
            rule of three times it (times 1, the metric's unit, if all scores are the same); a single
            sample gets an interval of ± spread.

    Raises:
        MetricError: no samples, or values that aren't finite.
    """
    values = _finite(differences, "differences of scores")
    if not math.isfinite(spread) or spread < 0:
        raise MetricError(f"the range of the scores is {spread}: give a finite number ≥ 0")
    n, drop = len(values), float(values.mean())
    discordant = int(np.count_nonzero(values))
    spread = spread or 1.0
    if discordant == 0:
        bound = _rule_of_three(n) * spread
        return Interval(0.0, -bound, bound, n, 0)
    if n == 1:
        bound = max(spread, abs(drop))
        return Interval(drop, drop - bound, drop + bound, 1, 1)
    half = float(stats.t.ppf(1 - _ALPHA / 2, n - 1) * values.std(ddof=1) / math.sqrt(n))
    return Interval(drop, drop - half, drop + half, n, discordant)


def bootstrap_dataset(
    fn: Callable[[Any, Any], float],
    float_outputs: Any,
    other_outputs: Any,
    labels: Any,
    n: int,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """The drop of a score that only a whole data set has (mAP, F1, word error rate …), by the bootstrap.

    Samples are drawn with replacement, the same ones for both networks. Where every draw gives the same drop
    (as for equal outputs), the bound is the rule of three times the score's size, at least 1.

    Args:
        fn: (outputs, labels) → score.
        float_outputs, other_outputs, labels: [N, …] arrays or tensors, lists of N, or dicts of such; labels
            may be None.
        n: N.
        resamples: how many data sets are drawn; those that `fn` can't score (NaN, MetricError) are left out.
        seed: of this function's own generator.

    Raises:
        MetricError: no samples, or a score that is NaN or infinite.
    """
    if n < 1:
        raise MetricError("no samples to score: give evaluation data")
    score = float(fn(float_outputs, labels))
    drop = score - float(fn(other_outputs, labels))
    if not math.isfinite(drop):
        raise MetricError("the metric gives NaN or infinity on the whole data set: check outputs and labels")
    generator = np.random.default_rng(seed)
    drawn = np.empty(resamples)
    for i in range(resamples):
        rows = generator.integers(0, n, n)
        chosen = _take(labels, rows)
        try:
            ours = float(fn(_take(float_outputs, rows), chosen))
            drawn[i] = ours - float(fn(_take(other_outputs, rows), chosen))
        except MetricError:
            drawn[i] = math.nan
    drawn = drawn[np.isfinite(drawn)]
    if len(drawn) < resamples / 2 or len(drawn) == 0:
        raise MetricError(
            f"the metric can't score {resamples - len(drawn)} of {resamples} resampled data sets: give more "
            "samples of each kind"
        )
    if drawn.min() == drawn.max() == drop:
        bound = _rule_of_three(n) * max(1.0, abs(score))
        return Interval(drop, drop - bound, drop + bound, n, 0 if drop == 0 else None)
    low, high = _bias_corrected(drawn, drop)
    return Interval(drop, low, high, n)


def verdict(interval: Interval, max_drop: float, higher_is_better: bool) -> tuple[str, int | None]:
    """Whether a drop stays within `max_drop`, and if that is open, how many samples would tell.

    Args:
        interval: float score − other score.
        max_drop: the largest loss allowed, in the metric's unit.
        higher_is_better: if False, a loss is a score that grew.

    Returns: ("holds", None) if the interval's upper end of the loss is ≤ max_drop; ("fails", None) if its
        lower end is above; else ("undecided", N) with the number of samples at which an equal observation
        would decide, or None if no number would. N is an estimate: the interval's arms are taken to shrink
        as 1/√N, or as 1/N where no sample differs.
    """
    loss, low, high = interval.drop, interval.low, interval.high
    if not higher_is_better:
        loss, low, high = -loss, -high, -low
    if high <= max_drop:
        return "holds", None
    if low > max_drop:
        return "fails", None
    return "undecided", _samples_needed(loss, low, high, interval, max_drop)


def ratio_of_medians(
    a: Values, b: Values, *, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """median(a) / median(b) with a 95 % percentile-bootstrap interval over paired rounds.

    Args:
        a, b: latencies of the two sides in round i, [R], any unit. A round is drawn as a whole, so that what
            slows both sides of it down cancels.
        resamples: how many sets of rounds are drawn. seed: of this function's own generator.

    Returns: (ratio, low, high).

    Raises:
        MetricError: fewer than 3 rounds, unequal lengths, or values that aren't positive.
    """
    first, second = _paired(a, b)
    n = len(first)
    if n < 3:
        raise MetricError(f"latencies of {n} rounds have no interval: measure at least 3 rounds")
    if min(first.min(), second.min()) <= 0:
        raise MetricError("latencies hold values that aren't positive: measure again")
    rows = np.random.default_rng(seed).integers(0, n, (resamples, n))
    drawn = np.median(first[rows], axis=1) / np.median(second[rows], axis=1)
    low, high = np.quantile(drawn, (_ALPHA / 2, 1 - _ALPHA / 2))
    return float(np.median(first) / np.median(second)), float(low), float(high)


# ---------------------------------------------------------------- formulas


def beyond_extremes(n: int) -> float:
    """The share of new samples that lie beyond the extremes of n independent ones, at either end: 2 / (n + 1).

    The next sample is as likely as each of the others to be the largest, or the smallest (Wilks 1941, Determination of
    sample sizes for setting tolerance limits). 1 for fewer than two.
    """
    return min(1.0, 2 / (max(0, n) + 1))


def _rule_of_three(n: int) -> float:
    """The share that n samples without a single hit rule out at 95 %."""
    return float(-math.expm1(math.log(_ALPHA) / n))


def _tango(lost: int, won: int, n: int) -> tuple[float, float]:
    """The ends of Tango's score interval for (lost − won)/n."""
    drop = (lost - won) / n

    def score(delta: float) -> float:
        linear = (2 * n - lost + won) * delta - lost - won
        constant = -won * delta * (1 - delta)
        share = (math.sqrt(max(linear**2 - 8 * n * constant, 0.0)) - linear) / (4 * n)
        variance = n * (2 * share + delta * (1 - delta))
        difference = lost - won - n * delta
        if variance <= 0:
            return math.copysign(math.inf, difference) if difference else 0.0
        return float(difference / math.sqrt(variance))

    low = -1.0 if won == n else _crossing(score, _Z, -1.0, drop)
    high = 1.0 if lost == n else _crossing(score, -_Z, drop, 1.0)
    return low, high


def _crossing(score: Callable[[float], float], level: float, left: float, right: float) -> float:
    """Where `score` falls through `level` between left and right."""

    def distance(delta: float) -> float:
        # Brent's method needs finite values.
        return max(-1e6, min(1e6, score(delta) - level))

    return float(optimize.brentq(distance, left, right, xtol=1e-12))


def _bias_corrected(drawn: _Floats, observed: float) -> tuple[float, float]:
    """The bias-corrected percentile interval of bootstrap replicates."""
    below = (np.count_nonzero(drawn < observed) + np.count_nonzero(drawn == observed) / 2) / len(drawn)
    shift = stats.norm.ppf(min(max(below, 1 / len(drawn)), 1 - 1 / len(drawn)))
    low, high = np.quantile(drawn, stats.norm.cdf((2 * shift - _Z, 2 * shift + _Z)))
    return float(low), float(high)


def _samples_needed(loss: float, low: float, high: float, interval: Interval, max_drop: float) -> int | None:
    if not (math.isfinite(low) and math.isfinite(high)):
        return None
    if interval.discordant == 0:
        if max_drop <= 0:
            return None
        # The bound is a rule of three times the scores' range; max_drop is below it, or it would hold.
        spread = high / _rule_of_three(interval.n)
        return math.ceil(math.log(_ALPHA) / math.log1p(-max_drop / spread))
    gap, half = (max_drop - loss, high - loss) if loss < max_drop else (loss - max_drop, loss - low)
    if gap <= 0:
        return None
    needed = interval.n * (half / gap) ** 2
    return max(interval.n + 1, math.ceil(needed)) if math.isfinite(needed) else None


# ---------------------------------------------------------------- arguments


def _finite(values: Values, what: str) -> _Floats:
    """`values` as a float64 vector."""
    source = values.detach().cpu().numpy() if isinstance(values, Tensor) else values
    vector = np.asarray(source, dtype=np.float64).reshape(-1)
    if len(vector) == 0:
        raise MetricError(f"{what}: there are none; give evaluation data")
    if not np.isfinite(vector).all():
        raise MetricError(f"{what} hold NaN or infinite values: check the network's outputs")
    return vector


def _paired(a: Values, b: Values) -> tuple[_Floats, _Floats]:
    first, second = _finite(a, "paired values"), _finite(b, "paired values")
    if len(first) != len(second):
        raise MetricError(
            f"paired values have lengths {len(first)} and {len(second)}: score the same samples"
        )
    return first, second


def _take(values: Any, rows: npt.NDArray[np.int64]) -> Any:
    """The chosen samples of an array, a tensor, a list, or a dict of such."""
    if values is None:
        return None
    if isinstance(values, Mapping):
        return {name: _take(value, rows) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [values[row] for row in rows]
    return values[rows]
