"""How a runner picks among the ways its tool offers: by what they make of the calibration data."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@torch.no_grad()
def outputs(model: nn.Module, batches: list[Tensor]) -> Tensor:
    """What a network makes of all batches."""
    return torch.cat([model(batch) for batch in batches])


def divergence(reference: Tensor, other: Tensor) -> float:
    """Kullback-Leibler of two networks' scores, nats an image or a byte."""
    logs = [part.flatten(0, -2).log_softmax(-1) for part in (other, reference)]
    return float(F.kl_div(logs[0], logs[1], log_target=True, reduction="batchmean"))
