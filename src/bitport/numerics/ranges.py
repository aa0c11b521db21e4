"""Range estimation: from the distribution of a tensor to the real range [minimum, maximum] that is stored.

The estimators are functions in `estimators`, `search`, `entropy` and `hqq`; here they are looked up by the name that
a recipe gives, and run on the histogram of an activation or on the values of a weight. docs/ranges.md says which to
use when.

Legend: C channels, K values per channel, G groups of a channel; R rows that get a range of their own, V values of
a row.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from bitport.errors import FormatError, RecipeError, UnknownName, WeightsError
from bitport.formats import Format
from bitport.numerics.entropy import entropy
from bitport.numerics.estimators import (
    ESTIMATORS,
    WEIGHT_ESTIMATORS,
    Estimator,
    fixed,
    mean_std,
    minmax,
    mirrored,
    moving_average,
    percentile,
)
from bitport.numerics.histogram import Histogram
from bitport.numerics.hqq import hqq
from bitport.numerics.rows import scale_shape
from bitport.numerics.search import expected_error, mse, search, squared_errors

__all__ = [
    "Histogram",
    "Spec",
    "check",
    "choose_symmetry",
    "choose_symmetry_of_weights",
    "entropy",
    "estimate",
    "expected_error",
    "fixed",
    "hqq",
    "known",
    "mean_std",
    "minmax",
    "mirrored",
    "moving_average",
    "mse",
    "percentile",
    "search",
    "weight_ranges",
    "weights_range",
]

Spec = str | Mapping[str, Any]
# Symmetric ranges need no zero point in the kernels: an asymmetric one must gain more than this share of the error.
_TIE = 1.01


def known() -> dict[str, str]:
    """The range estimators: name → one-line summary."""
    return {name: (inspect.getdoc(f) or "").splitlines()[0] for name, f in sorted(ESTIMATORS.items())}


def check(spec: Spec) -> None:
    """Hold a spec's name and options against its estimator, on two values.

    Raises:
        UnknownName: no such estimator. RecipeError: an unknown or impossible option.
    """
    h = Histogram()
    h.update(torch.tensor([-1.0, 1.0]))
    estimate(h, Format.parse("int8"), spec)


def estimate(h: Histogram, fmt: Format, spec: Spec) -> tuple[float, float]:
    """The range to store for the values of a histogram; (0.0, 0.0) if it saw none, except for `fixed`.

    Args:
        h: the values' histogram.
        fmt: the format they are stored in.
        spec: an estimator's name, or a table of its name and options: `{"use": "percentile", "q": 99.9}`.

    Raises:
        UnknownName: no such estimator. RecipeError: an unknown or impossible option.
    """
    function, options = _resolve(spec)
    seen = bool(h.counts.numel()) or function is fixed
    return function(h, fmt, **options) if seen else (0.0, 0.0)


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
    exact = WEIGHT_ESTIMATORS.get(function.__name__)
    lows, highs = [], []
    for part in parts:
        w_RV = part.flatten(0, 1)
        if w_RV.numel() == 0 and function is not fixed:
            low_R = high_R = torch.zeros(w_RV.shape[0], device=w.device)
        elif exact is not None:
            low_R, high_R = exact(w_RV, fmt, **options)
        else:
            low_R, high_R = _through_histograms(w_RV, fmt, function, options)
        lows.append(low_R.reshape(part.shape[:2]))
        highs.append(high_R.reshape(part.shape[:2]))
    shape = scale_shape(w.shape, fmt)
    return torch.cat(lows, 1).reshape(shape), torch.cat(highs, 1).reshape(shape)


def weights_range(tensors: Iterable[Tensor], fmt: Format, spec: Spec) -> tuple[Tensor, Tensor]:
    """One range for the values of several weights, such as a granularity of "global" asks for.

    Args:
        tensors: any shapes and float types. They are read one by one, into one histogram.
        fmt: as for `weight_ranges`; its granularity isn't looked at.
        spec: as for `estimate`.

    Returns: (minimum, maximum), float32, 0-d; (0, 0) if there are no values.

    Raises:
        UnknownName, RecipeError: as `estimate`. WeightsError: a weight holds NaN or infinite values.
    """
    h = Histogram()
    for w in tensors:
        h.update(w)
    if h.nonfinite:
        raise WeightsError(
            f"weights hold {h.nonfinite} NaN or infinite values: repair the float network first"
        )
    # The weights have no order in time, so they are a single update.
    low, high = torch.tensor(estimate(h.as_one_update(), fmt, spec), dtype=torch.float32).unbind()
    return low, high


def choose_symmetry(h: Histogram, fmt: Format, spec: Spec) -> Format:
    """`fmt`, symmetric or not, whichever stores a histogram's values with the smaller expected error.

    Each of the two gets its own range by `spec`. Symmetric is preferred unless asymmetric gains more than 1 %.

    Args: as `estimate`. A format of another kind than "int" has no zero point to choose and comes back unchanged.

    Raises:
        UnknownName, RecipeError: as `estimate`.
    """

    def error(candidate: Format) -> float:
        return expected_error(h, candidate, *estimate(h, candidate, spec))

    return _choose(fmt, error)


def choose_symmetry_of_weights(w: Tensor, fmt: Format, spec: Spec) -> Format:
    """As `choose_symmetry`, by the measured squared error of a whole weight.

    Args: as `weight_ranges`.

    Raises:
        UnknownName, RecipeError, FormatError, WeightsError: as `weight_ranges`.
    """

    def error(candidate: Format) -> float:
        low, high = weight_ranges(w, candidate, spec)
        if w.numel() == 0:
            return 0.0
        parts, total, first = _parts(w.detach().float(), candidate), 0.0, 0
        low, high = low.reshape(parts[0].shape[0], -1), high.reshape(parts[0].shape[0], -1)
        for part in parts:
            groups = slice(first, first + part.shape[1])
            first += part.shape[1]
            ends = low[:, groups].reshape(-1), high[:, groups].reshape(-1)
            total += float(squared_errors(part.flatten(0, 1), *ends, candidate).sum())
        return total

    return _choose(fmt, error)


def _choose(fmt: Format, error: Callable[[Format], float]) -> Format:
    if not fmt.is_int:
        return fmt
    free = fmt.with_(symmetric=False)
    try:
        fixed_zero = fmt.with_(symmetric=True)
    except FormatError:  # codes on one side of its zero point only
        return free
    return fixed_zero if error(fixed_zero) <= _TIE * error(free) else free


def _parts(w: Tensor, fmt: Format) -> list[Tensor]:
    """w cut into what shares a range: [C, G, V] without the tails, and [C, 1, V] of the shorter tails.

    C and G are 1 where the format has no channels or groups. There is always a first part. Unlike `rows.rows`, nothing
    fills up a tail: a zero more would change its percentiles and moments.
    """
    shape = scale_shape(w.shape, fmt)
    if shape == ():
        return [w.reshape(1, 1, -1)]
    channels = shape[0]
    w_CK = w.movedim(fmt.axis or 0, 0).reshape(channels, w.numel() // max(channels, 1))
    if fmt.granularity == "channel":
        return [w_CK[:, None]]
    whole = w_CK.shape[1] // fmt.group * fmt.group
    grouped = w_CK[:, :whole].reshape(channels, whole // fmt.group, fmt.group)
    tail = w_CK[:, None, whole:]
    return [part for part in (grouped, tail) if part.shape[1] and part.shape[2]] or [grouped]


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
    if name not in ESTIMATORS:
        raise UnknownName("range", name, ESTIMATORS)
    allowed = [
        option.name
        for option in inspect.signature(ESTIMATORS[name]).parameters.values()
        if option.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    for option in table:
        if option not in allowed:
            raise RecipeError(
                f"range {name!r} has no option {option!r}: allowed are {', '.join(allowed) or 'none'}"
            )
    return ESTIMATORS[name], table
