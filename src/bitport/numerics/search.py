"""The range with the smallest squared quantization error, by trying ranges out.

    argmin over the range of E[(x − dequantize(quantize(x)))²]
    (Nagel et al. 2021, "A White Paper on Neural Network Quantization", arXiv:2106.08295, 3.1)

Legend: R rows that get a range of their own, V values of a row; B histogram bins.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bitport.formats import Format
from bitport.numerics.estimators import estimator, for_weights
from bitport.numerics.histogram import Histogram
from bitport.numerics.quantize import qparams_of_finite

# Maps the candidate ends of the range, [R] each, to the error of each row, [R].
Errors = Callable[[Tensor, Tensor], Tensor]

# Weights are searched in blocks of about this many elements, which stay in the processor's cache.
_BLOCK = 2**18
# A narrower range must gain at least this share of the error, so that rounding noise never narrows one.
_GAIN = 1 - 1e-6
# A range narrower than the best that errs so many times as much cuts off too much; one narrower still cuts off more.
# Of squared errors rounding adds such as grow with the square of the range, cutting off such as fall: both convex.
_HOPELESS = 1.5
# Down to this factor the ladders are linear, and finer than steps of this many octaves or more.
_LINEAR, _FINE = 0.5, 1 / 8


@estimator
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


@for_weights("mse")
def _mse_of_weights(w_RV: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    lows, highs = [], []
    for part in torch.split(w_RV, max(1, _BLOCK // w_RV.shape[1])):
        low, high = part.amin(1), part.amax(1)
        scratch = (
            torch.empty_like(part),
            torch.empty_like(part),
        )  # fresh memory would cost more than the arithmetic

        def errors(
            low: Tensor, high: Tensor, part: Tensor = part, scratch: tuple[Tensor, Tensor] = scratch
        ) -> Tensor:
            return squared_errors(part, low, high, fmt, scratch)

        low, high = search(errors, low, high, fmt.symmetric)
        lows.append(low)
        highs.append(high)
    return torch.cat(lows), torch.cat(highs)


def squared_errors(
    w_RV: Tensor, low: Tensor, high: Tensor, fmt: Format, scratch: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Σ (w − dequantize(quantize(w)))² of each row stored with its range; float64 [R].

    Args:
        w_RV: float32, without NaN, so that the plain formula does. low, high: [R], finite. fmt: an integer format.
        scratch: two tensors like w_RV to compute in.
    """
    scale, zero_point = qparams_of_finite(low.double(), high.double(), fmt)
    offset = zero_point.float()[:, None]
    t, off = scratch or (torch.empty_like(w_RV), torch.empty_like(w_RV))
    # in units of the scale, so that no square overflows; float32 sums err by far less than a range must gain
    torch.div(w_RV, scale[:, None], out=t)
    torch.round(t, out=off).add_(offset).clamp_(fmt.low, fmt.high).sub_(offset).sub_(t)
    error: Tensor = torch.linalg.vector_norm(off, dim=1).double() * scale.double()
    return error.square()


def expected_error(h: Histogram, fmt: Format, minimum: float, maximum: float) -> float:
    """E[(x − dequantize(quantize(x)))²] of a histogram's values stored with a range; the measure of `mse`.

    The values of a bin are taken as spread evenly over it, exact zeros too: after a ReLU they add a constant
    of up to (bin width)²/3.
    """
    low, high = torch.tensor([[minimum], [maximum]], dtype=torch.float64)
    total = float(_histogram_error(h.edges(), h.counts.double(), low, high, fmt))
    return total / max(h.count, 1)


def search(errors: Errors, low: Tensor, high: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The ends [R] of the range with the smallest error per row, by a grid search over shrink factors.

    The extremes, widened to include 0, are multiplied by factors ≤ 1 from a ladder: linear down to ½, then
    2^-½ a step down to 2^-10. First both by the same one; then, unless the format is symmetric or the values
    have one sign, each end by its own; then each is refined around the best in steps of 2^¼ to 2^1/128.
    An end at 0 stays there. A row leaves a ladder where it errs many times its least. Every range is compared by
    `errors`, the full one among them, and the best is kept; a row's result depends on no other row.

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

    def attempt(a: Tensor, b: Tensor, where: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The factors tried, and the errors found."""
        nonlocal best_a, best_b, best
        a, b = a.clamp(max=1.0), b.clamp(max=1.0)
        found = errors(*ends(a, b))
        better = (found < best * _GAIN) & where
        best_a, best_b = torch.where(better, a, best_a), torch.where(better, b, best_b)
        best = torch.where(better, found, best)
        return a, b, found

    octaves = [2.0 ** (-1 - step / 2) for step in range(1, 19)]
    ladders = [("both", [1 - step / 32 for step in range(1, 17)])]
    ladders += [(end, [1 - step / 16 for step in range(9)]) for end in "ab"]
    for end, factors in ladders:
        alive = everywhere if end == "both" else two_ends
        for factor in factors + octaves:
            if not bool(alive.any()):
                break
            a, b, found = attempt(
                best_a if end == "b" else one * factor, best_b if end == "a" else one * factor, alive
            )
            hopeless = (a <= best_a) & (b <= best_b) & (found > _HOPELESS * best)
            alive = alive & ~hopeless & (best > 0)
    for octave in (1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128):
        # steps as wide as these are new only where the ladders went by octaves
        where = everywhere if octave < _FINE else torch.minimum(best_a, best_b) < _LINEAR
        apart, together = where & two_ends, where & ~two_ends
        for factor in (2.0**octave, 2.0**-octave):
            if bool(together.any()):
                attempt(best_a * factor, best_b * factor, together)
            if bool(apart.any()):
                attempt(best_a * factor, best_b, apart)
                attempt(best_a, best_b * factor, apart)
    return ends(best_a, best_b)


def _histogram_error(edges: Tensor, counts: Tensor, low: Tensor, high: Tensor, fmt: Format) -> Tensor:
    """The summed squared error, float64 [1], of a histogram's values stored with the range [low, high].

    In units of the scale, with n(t) = clamp(rne(t)) the code next to t, ∫(t − n(t))² dt from 0 is
    n/12 + (t − n)³/3: each whole cell adds 1/12. The error of a bin is the integral's mean over the bin.
    """
    scale, zero_point = qparams_of_finite(low.double(), high.double(), fmt)
    offset = zero_point.double()
    t = edges / scale.double()
    nearest = t.round().clamp(fmt.low - offset, fmt.high - offset)
    integral = nearest / 12 + (t - nearest) ** 3 / 3
    width = t.diff()
    # The integrals' difference cancels in a very narrow bin, which is a single point for all purposes.
    narrow = width < 1e-6
    mean = torch.where(narrow, (t - nearest)[1:] ** 2, integral.diff() / torch.where(narrow, 1.0, width))
    return (mean @ counts * scale.double() ** 2).reshape(1)
