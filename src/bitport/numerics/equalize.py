"""Scales that move from one layer into the next without changing what a network computes.

    W₂ f(W₁x + b₁) = (W₂S) f(S⁻¹W₁x + S⁻¹b₁)        S = diag(s), s > 0, where f(s·x) = s·f(x)

    layers   s_C = √(r1_C · r2_C) / r2_C     both layers then have the same range √(r1_C · r2_C) in each channel
    norms    s_C = a_C^α / r2_C^(1−α)        α moves the spread of the activations into the weights that read them

Only differences between channels matter to one scale for a tensor, so the median of s is set to 1; that leaves channels
that can't be compared, whose scale is 1, where they were.

Sources: Nagel et al. 2019, arXiv:1906.04721, section 4.1; Xiao et al. 2023, arXiv:2211.10438, equation 4.

Legend: C channels between the two layers; O output channels, I input channels, G groups, K kernel positions; r1 the
largest magnitude of the weights that make a channel, r2 of those that read it, a of the channel itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bitport.errors import WeightsError

LARGEST = 2.0**20  # a scale beyond tells of a channel that is as good as dead, and float32 has bounds as well


def output_ranges(weight: Tensor, groups: int = 1, transposed: bool = False) -> Tensor:
    """Largest magnitude of the weights of each output channel, float64 [O].

    Args:
        weight: [O, I/G, …], or [I, O/G, …] if `transposed`.
        groups: G.

    Raises WeightsError where the channels are no multiple of the groups.
    """
    return _grouped(weight, groups, transposed).abs().amax((2, 3)).reshape(-1).double()


def input_ranges(weight: Tensor, groups: int = 1, transposed: bool = False) -> Tensor:
    """The same of each input channel, float64 [I]."""
    return _grouped(weight, groups, transposed).abs().amax((1, 3)).reshape(-1).double()


def scale_outputs(weight: Tensor, factor: Tensor, groups: int = 1, transposed: bool = False) -> Tensor:
    """The weight with each output channel times its factor [O], computed in float64; shape and type stay."""
    grouped = _grouped(weight, groups, transposed)
    return _restored(grouped.double() * factor.double().reshape(groups, -1, 1, 1), weight, transposed)


def scale_inputs(weight: Tensor, factor: Tensor, groups: int = 1, transposed: bool = False) -> Tensor:
    """The weight with each input channel times its factor [I], computed in float64; shape and type stay."""
    grouped = _grouped(weight, groups, transposed)
    return _restored(grouped.double() * factor.double().reshape(groups, 1, -1, 1), weight, transposed)


def layer_scales(made: Tensor, read: Tensor) -> Tensor:
    """What to divide channels by, and to multiply the weights by that read them.

    Args:
        made, read: r1 and r2, [C], not negative.

    Returns: s, float64 [C] within 2^±20; 1 for a channel whose weights are all zero on either side, or not finite.

    Raises WeightsError where the sizes differ.
    """
    return _settled(made, read, 0.5)


def smoothing_scales(seen: Tensor, read: Tensor, alpha: float) -> Tensor:
    """The same from the channels' own magnitudes: α = 0 evens the weights out, α = 1 the activations.

    Args:
        seen, read: a and r2, [C], not negative.
        alpha: α, from 0 to 1.

    Returns, raises as `layer_scales`.
    """
    return _settled(seen, read, alpha)


def salience_scales(mean: Tensor, alpha: float) -> Tensor:
    """s = a^α around its median: inputs that are loud on average get larger weights, which lose less by rounding.

    Source: Lin et al. 2023, arXiv:2306.00978 (AWQ), section 3.2. mean: a, the mean magnitudes, [C], not negative.

    Returns, raises as `layer_scales`.
    """
    return _settled(mean, torch.ones_like(mean), alpha)


def spread(scales: Tensor) -> float:
    """How far the scale furthest from the median is from it, as a factor of at least 1; 1.0 of no scales."""
    if scales.numel() == 0:
        return 1.0
    logs = scales.double().log()
    return math.exp(float((logs - logs.median()).abs().max()))


def _settled(first: Tensor, second: Tensor, alpha: float) -> Tensor:
    if first.shape != second.shape or first.dim() != 1:
        raise WeightsError(
            f"scales were asked of ranges of shapes {tuple(first.shape)} and {tuple(second.shape)}: give one range per "
            "channel on either side"
        )
    a, b = first.detach().double(), second.detach().double()
    alive = (a > 0) & (b > 0) & torch.isfinite(a) & torch.isfinite(b)
    if not bool(alive.any()):
        return torch.ones_like(a)
    logs = alpha * torch.where(alive, a, 1.0).log() - (1 - alpha) * torch.where(alive, b, 1.0).log()
    logs = torch.where(alive, logs - logs[alive].median(), 0.0)
    return logs.exp().clamp(1 / LARGEST, LARGEST)


def _grouped(weight: Tensor, groups: int, transposed: bool) -> Tensor:
    """[G, O/G, I/G, K]."""
    rows = weight.shape[0] if weight.dim() >= 2 else 0
    if weight.dim() < 2 or groups < 1 or rows % groups or not weight.numel():
        raise WeightsError(
            f"a weight of shape {tuple(weight.shape)} has no channels in {groups} groups: it can't be scaled by channel"
        )
    wide = weight.detach().reshape(groups, rows // groups, weight.shape[1], -1)
    return wide.transpose(1, 2) if transposed else wide


def _restored(grouped: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    flat = grouped.transpose(1, 2) if transposed else grouped
    return flat.reshape(weight.shape).to(weight.dtype)
