"""What a layer's inputs say about its weights: second moments, as the Hessian of the squared output error.

    E |x·w − x̂·q|² = (w' − q) H (w' − q)ᵀ + const      H = E[x̂ᵀx̂],  w' = w C H⁻¹,  C = E[xᵀx̂]

x is what the float layer reads, x̂ what the quantized one does. w' are the weights that make up best for what the
layers before have lost; without a loss x = x̂ and w' = w. A layer with a bias takes the means back there, so its
moments are those around the means.

Sources: Frantar et al. 2023, arXiv:2210.17323 (H); Zhang, Lybrand and Saab 2023, arXiv:2201.11113 (the float layer's
outputs as the target of quantized inputs).

Legend: B groups of a convolution (1 for other layers), P positions (rows of inputs), R rows of weights (outputs) of
a group, K weights of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from bitport.errors import DataError

ROWS = 2**21  # numbers of inputs that are multiplied at once, about: what a cache holds
WIDE = 256  # columns from which on a Hessian is made in panels, so that of what is the same twice less is computed
PANELS = 4
LADDER = (1.0, 10.0, 100.0)  # a damping that doesn't make the Hessian definite is raised


def patches(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    most: int,
) -> Iterator[Tensor]:
    """What a convolution multiplies its weights by, some at a time: [P, B, K], K in the order of `weight.flatten(1)`.

    Args:
        x: [N, C, …], one to three spatial dimensions. kernel … dilation: one number per spatial dimension.
        groups: B.
        most: positions that are taken at most, spread evenly over samples and places.
    """
    padded = F.pad(x, [size for amount in reversed(padding) for size in (amount, amount)])
    sizes = padded.shape[2:]
    places = [
        max(0, (size - (length - 1) * spread - 1) // step + 1)
        for size, length, spread, step in zip(sizes, kernel, dilation, stride, strict=True)
    ]
    # a pixel's channels lie together, so that reading a window is copying as many runs as the kernel has places
    pixels = padded.movedim(1, -1).reshape(-1, x.shape[1])
    chosen = spread_evenly(len(x) * prod(places), most)
    first, taps, factor = torch.zeros_like(chosen), torch.zeros(1, dtype=torch.int64), 1
    for axis in reversed(range(len(kernel))):
        first += chosen % places[axis] * stride[axis] * factor
        chosen = chosen.div(places[axis], rounding_mode="floor")
        taps = (torch.arange(kernel[axis])[:, None] * dilation[axis] * factor + taps).flatten()
        factor *= sizes[axis]
    first += chosen * factor
    row = x.shape[1] * len(taps)
    for part in torch.split(first, max(ROWS // max(1, row), row // groups)):
        found = pixels.index_select(0, (part[:, None] + taps).flatten())
        yield found.view(len(part), len(taps), -1).transpose(1, 2).reshape(len(part), groups, -1)


def spread_evenly(count: int, most: int) -> Tensor:
    """At most `most` of `count` indices, ascending, evenly spread; int64."""
    if count <= most:
        return torch.arange(count)
    return torch.arange(most, dtype=torch.int64) * count // most


class InputMoments:
    """Sums of what a layer reads, part by part, in float64.

    hessian, cross: E[x̂ᵀx̂] and E[xᵀx̂], [B, K, K], around the means where `centred`.

    Args:
        losses: without, x is taken for x̂ in `cross`, which is then the Hessian.
    """

    def __init__(self, losses: bool = True) -> None:
        self.count = 0
        self._losses = losses
        self._mean = self._mean_hat = self._h = self._c = torch.zeros(())

    def update(self, x_PBK: Tensor, hat_PBK: Tensor) -> None:
        """Some positions."""
        x, hat = x_PBK.movedim(0, 1).float(), hat_PBK.movedim(0, 1).float()
        self._h = self._h + _gram(hat).double()
        self._c = self._c + (x.mT @ hat).double() if self._losses else self._h
        # sums in float32, like the products; torch adds in pairs
        self._mean, self._mean_hat = self._mean + x.sum(1).double(), self._mean_hat + hat.sum(1).double()
        self.count += x_PBK.shape[0]

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """E[x], E[x̂]: [B, K], float64."""
        return self._mean / max(1, self.count), self._mean_hat / max(1, self.count)

    def mean_shift(self, w_BRK: Tensor, q_BRK: Tensor) -> Tensor:
        """What a bias takes back so that means stay: w E[x] − q E[x̂], float64 [B, R] (Nagel et al. 2019, 4.2)."""
        mean, mean_hat = self.means
        return (w_BRK.double() @ mean[:, :, None] - q_BRK.double() @ mean_hat[:, :, None])[:, :, 0]

    def settled(self, centred: bool) -> tuple[Tensor, Tensor]:
        """(hessian, cross), [B, K, K], float64. Raises DataError after inputs that weren't finite."""
        if not all(bool(torch.isfinite(sums).all()) for sums in (self._h, self._c, self._mean)):
            raise DataError("its inputs on the calibration data are not finite, or too large to be squared")
        h, c = self._h / max(1, self.count), self._c / max(1, self.count)
        if centred:
            mean, mean_hat = self.means
            h = h - mean_hat[:, :, None] * mean_hat[:, None, :]
            c = c - mean[:, :, None] * mean_hat[:, None, :] if self._losses else h
            diagonal = h.diagonal(dim1=1, dim2=2)
            diagonal.clamp_(min=0.0)  # of a constant input, what cancellation leaves
        return h, c


def _gram(x_BPK: Tensor) -> Tensor:
    """xᵀx, [B, K, K]; of a wide one, panels of columns from the diagonal on, and their mirror image."""
    count = x_BPK.shape[2]
    if count < WIDE:
        return x_BPK.mT @ x_BPK
    found = x_BPK.new_empty(len(x_BPK), count, count)
    width = -(-count // PANELS)
    for start in range(0, count, width):
        stop = start + width
        found[:, start:stop, start:] = x_BPK[:, :, start:stop].mT @ x_BPK[:, :, start:]
        found[:, stop:, start:stop] = found[:, start:stop, stop:].mT
    return found


def damped(h_BKK: Tensor, damping: float) -> Tensor | None:
    """H + λI with λ a share of the mean diagonal, raised ten and a hundred times until it is positive definite.

    Inputs that are always 0 get the mean of the others, of their group or of all, so that their weights are rounded
    as they are. Returns None where nothing helps: H is zero or holds no finite numbers.
    """
    diagonal = h_BKK.diagonal(dim1=1, dim2=2)
    mean_B = diagonal.mean(1)
    if not bool(torch.isfinite(h_BKK).all() & (mean_B >= 0).all() & (mean_B > 0).any()):
        return None
    mean_B = torch.where(mean_B > 0, mean_B, mean_B.mean())
    alone = torch.where(diagonal == 0, mean_B[:, None], torch.zeros_like(diagonal))
    for step in LADDER:
        found = h_BKK + torch.diag_embed(alone + damping * step * mean_B[:, None])
        if not bool(torch.linalg.cholesky_ex(found)[1].any()):
            return found
    return None


def shifted(w_BRK: Tensor, h_BKK: Tensor, cross_BKK: Tensor, definite_BKK: Tensor, share: float) -> Tensor:
    """w' = w + share · w (C − H) (H + λI)⁻¹, float64: the weights that x̂ needs to give the outputs of x.

    Args:
        definite_BKK: H + λI, as `damped` gives it; damping draws w' towards w.
        share: 0 leaves w, 1 is the least-squares answer.
    """
    if share == 0:
        return w_BRK.double()
    wanted = w_BRK.double() @ (cross_BKK - h_BKK)
    moved = torch.cholesky_solve(wanted.mT, torch.linalg.cholesky(definite_BKK)).mT
    return w_BRK.double() + share * moved
