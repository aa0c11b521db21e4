"""What rounding a weight lost, as the product of two thin matrices.

    W ≈ Q + A B,   A [O, r], B [r, K]:   argmin over A, B of ‖(W − Q − A B) · diag(s)‖²

Without s this is ZeroQuant-V2's low-rank compensation (Yao et al. 2023, arXiv:2303.08302); with s, how large each input
is, it is LQER's (Zhang et al. 2024, arXiv:2402.02446): the error of an input that is mostly silent isn't worth a
direction. For independent inputs s = sqrt(E[x²]) gives the smallest error of the outputs. The minimum is the truncated
singular value decomposition of (W − Q) · diag(s) (Eckart & Young 1936); what is left is the sum of the σ² behind r.

Legend: O outputs, K inputs, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitport.errors import DataError


@dataclass(frozen=True)
class Factors:
    """A product that makes up for an error.

    Attributes:
        up_Or: A, float32, its columns orthonormal in front of s, or those of B behind it, whichever side is shorter.
        down_rK: B, float32; 0 for inputs whose s is 0.
        removed: Σ σ² of the directions that are taken: the squared weighted error that A B takes away.
        total: Σ σ² of all.
    """

    up_Or: Tensor
    down_rK: Tensor
    removed: float
    total: float


def compensation(error_OK: Tensor, scale_K: Tensor | None, rank: int) -> Factors:
    """The factors nearest to an error, its columns weighed by `scale_K`; computed in float64.

    Args:
        error_OK: W − Q, any float type, finite.
        scale_K: s ≥ 0, any float type; None: all ones. At most min(O, K) directions are taken.
        rank: r, at least 1.

    Raises:
        DataError: rank is below 1; s has another length, or values that are negative or not finite.
    """
    if rank < 1:
        raise DataError(f"a compensation of rank {rank} was asked for: give 1 or more")
    error = error_OK.detach().double()
    outputs, inputs = error.shape
    scale = torch.ones(inputs, dtype=torch.float64, device=error.device)
    if scale_K is not None:
        scale = scale_K.detach().double().to(error.device)
        if scale.shape != (inputs,) or not bool((torch.isfinite(scale) & (scale >= 0)).all()):
            raise DataError(
                f"{inputs} inputs were weighed by {tuple(scale.shape)} scales, or by negative or infinite ones: give "
                "one finite number from 0 on for each"
            )
    weighed = error * scale
    # The vectors of the shorter side are the eigenvectors of a small matrix; the other side follows by projection.
    wide = outputs <= inputs
    square = weighed @ weighed.T if wide else weighed.T @ weighed
    vectors = torch.linalg.eigh(square).eigenvectors  # of ascending values
    taken = vectors[:, -min(rank, outputs, inputs) :].flip(1)
    up, down = (taken, taken.T @ weighed) if wide else (weighed @ taken, taken.T)
    removed = float((down if wide else up).square().sum())
    down = torch.where(scale > 0, down / scale, 0.0)
    return Factors(up.float(), down.float(), removed, weighed_energy(error, scale))


def weighed_energy(values_OK: Tensor, scale_K: Tensor | None) -> float:
    """‖V · diag(s)‖², in float64; s None: all ones."""
    values = values_OK.detach().double()
    return float((values if scale_K is None else values * scale_K.double()).square().sum())
