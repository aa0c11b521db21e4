"""The range with the smallest Kullback-Leibler divergence between a histogram and its quantized version.

    Migacz 2017, "8-bit Inference with TensorRT", GTC S7310; ONNX Runtime's HistogramCollector follows it too

For a range, P is the histogram inside it, what lies outside added to its outermost bins; Q is the histogram inside
it after quantization: the counts of all bins that share a code, spread evenly over those of them where P isn't 0.

    KL(P‖Q) = Σ p · ln(p / q)

Two things differ from the slides. Exact zeros are left out, because every range stores them exactly: the many zeros
behind a ReLU would otherwise outweigh the rest, and the range that gives 0 a code of its own, however narrow, would
win. And both ends are searched where the format allows, instead of one magnitude.

Legend: B histogram bins.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bitport.errors import FormatError
from bitport.formats import Format
from bitport.numerics.estimators import estimator, for_weights
from bitport.numerics.histogram import Histogram
from bitport.numerics.quantize import qparams
from bitport.numerics.search import search

# Fewer values have no distribution to speak of.
_FEW = 1024
# The share of values that must lie inside: if all lay outside, the outermost bin would be P and Q, and KL 0.
_INSIDE = 0.9


@estimator
def entropy(h: Histogram, fmt: Format) -> tuple[float, float]:
    """The range whose integers keep most of the distribution's information (KL divergence).

    No code may become narrower than a bin, below which the bins can't tell ranges apart: for formats of 12 bits and
    more this is `minmax`. Fewer than 1024 values other than 0 get `minmax` too, and of more no tenth is cut.

    Raises:
        FormatError: `fmt` isn't an integer format.
    """
    if not fmt.is_int:
        raise FormatError(f"range 'entropy' counts integers, which {fmt} doesn't have: use mse or percentile")
    counts = h.counts.double()
    zero = -h.first
    if 0 <= zero < counts.numel():
        counts[zero] -= h.zeros
    if float(counts.sum()) < _FEW:
        return h.minimum, h.maximum
    edges = h.edges()
    middles = (edges[:-1] + edges[1:]) / 2
    width = 2.0**h.exponent

    def errors(low: Tensor, high: Tensor) -> Tensor:
        return _divergence(middles, counts, low, high, fmt, width)

    low, high = torch.tensor([[h.minimum], [h.maximum]], dtype=torch.float64)
    low, high = search(errors, low, high, fmt.symmetric)
    return float(low), float(high)


@for_weights("entropy")
def _entropy_of_weights(w_RV: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    low, high = w_RV.amin(1), w_RV.amax(1)
    if w_RV.shape[1] >= _FEW:
        for row, w_V in enumerate(w_RV):
            h = Histogram()
            h.update(w_V)
            low[row], high[row] = entropy(h, fmt)
    return low, high


def _divergence(
    middles: Tensor, counts: Tensor, low: Tensor, high: Tensor, fmt: Format, width: float
) -> Tensor:
    """KL(P‖Q) in nats, float64 [1], of bins of a `width` stored with the range [low, high]; inf where it is refused."""
    scale, zero_point = qparams(low, high, fmt)
    if float(scale) < width:
        return torch.full((1,), math.inf, dtype=torch.float64)
    codes = torch.round(middles / scale.double()) + zero_point
    first = int(torch.searchsorted(codes, fmt.low))
    last = int(torch.searchsorted(codes, fmt.high, right=True))
    inside = counts[first:last]
    if float(inside.sum()) < _INSIDE * float(counts.sum()):
        return torch.full((1,), math.inf, dtype=torch.float64)
    index = (codes[first:last] - codes[first]).long()
    p = inside.clone()
    p[0] += counts[:first].sum()
    p[-1] += counts[last:].sum()
    shared = torch.bincount(index, weights=inside)
    among = torch.bincount(index, weights=(p > 0).double())
    q = (shared / among.clamp(min=1.0))[index]
    # Where all of a code's values came from outside, Q has nothing: half a value stands for it.
    q = torch.where(p > 0, q.clamp(min=0.5), 0.0)
    p, q = p / p.sum(), q / q.sum()
    lost: Tensor = torch.special.xlogy(p, torch.where(p > 0, p / q, 1.0)).sum()
    return lost.reshape(1)
