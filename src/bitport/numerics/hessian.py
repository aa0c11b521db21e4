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

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from bitport.errors import DataError

LADDER = (1.0, 10.0, 100.0)  # a damping that doesn't make the Hessian definite is raised


def patches(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    most: int,
) -> Tensor:
    """What a convolution multiplies its weights by: [P, B, K], K in the order of `weight.flatten(1)`.

    Args:
        x: [N, C, …], one to three spatial dimensions. kernel … dilation: one number per spatial dimension.
        groups: B.
        most: positions that are taken at most, spread evenly over samples and places.
    """
    pad = [size for amount in reversed(padding) for size in (amount, amount)]
    windows = F.pad(x, pad)
    for axis, (size, step, spread) in enumerate(zip(kernel, stride, dilation, strict=True), 2):
        windows = windows.unfold(axis, (size - 1) * spread + 1, step)[..., ::spread]
    count, places = x.shape[0], windows.shape[2 : 2 + len(kernel)]
    chosen = spread_evenly(count * places.numel(), most)
    index: list[Tensor] = []
    for size in reversed((count, *places)):
        index.insert(0, chosen % size)
        chosen = chosen.div(size, rounding_mode="floor")
    found = windows.movedim(1, 1 + len(kernel))[tuple(index)]  # [P, C, kernel …]
    return found.reshape(len(found), groups, -1)


def spread_evenly(count: int, most: int) -> Tensor:
    """At most `most` of `count` indices, ascending, evenly spread; int64."""
    if count <= most:
        return torch.arange(count)
    return torch.arange(most, dtype=torch.int64) * count // most


class InputMoments:
    """Sums of what a layer reads, batch by batch, in float64.

    hessian, cross: E[x̂ᵀx̂] and E[xᵀx̂], [B, K, K], around the means where `centred`.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean = self._mean_hat = self._h = self._c = torch.zeros(())

    def update(self, x_PBK: Tensor, hat_PBK: Tensor) -> None:
        """One batch. Raises DataError for inputs that aren't finite."""
        x, hat = x_PBK.movedim(0, 1).float(), hat_PBK.movedim(0, 1).float()
        h, c = hat.mT @ hat, x.mT @ hat
        if not bool(torch.isfinite(h).all() and torch.isfinite(c).all()):
            raise DataError("its inputs on the calibration data are not finite, or too large to be squared")
        self._h, self._c = self._h + h.double(), self._c + c.double()
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
        """(hessian, cross), [B, K, K], float64."""
        h, c = self._h / max(1, self.count), self._c / max(1, self.count)
        if centred:
            mean, mean_hat = self.means
            h = h - mean_hat[:, :, None] * mean_hat[:, None, :]
            c = c - mean[:, :, None] * mean_hat[:, None, :]
            diagonal = h.diagonal(dim1=1, dim2=2)
            diagonal.clamp_(min=0.0)  # of a constant input, what cancellation leaves
        return h, c


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
