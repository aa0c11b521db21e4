"""How far a batch is from the statistics that a BatchNorm was trained with: what made-up inputs are learned by.

    D = mean_C ((μ(x_C) − μ_C) / σ_C)² + mean_C ((σ(x_C) − σ_C) / σ_C)²

Zero where a batch has the mean and the spread, in every channel, of the data that the network was trained on; so the
network's own memory of that data takes the place of samples. Source: Cai et al. 2020 (ZeroQ), arXiv:2001.00281, eq. 4;
there the distances are in the data's units, here in deviations, so that no loud channel outweighs the others.

Legend: C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def moment_distance(x: Tensor, mean_C: Tensor, variance_C: Tensor, eps: float = 1e-5) -> Tensor:
    """D of a batch x [N, C, …] from a mean and variance per channel; a 0-d tensor that gradients go through."""
    rows = x.transpose(0, 1).flatten(1)
    deviation_C = (variance_C + eps).sqrt()
    found = (rows.var(1, unbiased=False) + eps).sqrt()
    means = (rows.mean(1) - mean_C) / deviation_C
    return means.square().mean() + torch.square((found - deviation_C) / deviation_C).mean()
