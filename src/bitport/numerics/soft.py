"""Rounding as something that can be learned: up or down, a weight at a time.

    q = clamp(⌊w/s⌋ + h(v) + z),  h(v) = clamp(1.2·sigmoid(v) − 0.1, 0, 1)
    driven to 0 or 1 by  Σ 1 − |2h − 1|^β,  β falling

Source: Nagel et al. 2020, arXiv:2004.10568 (AdaRound), sections 3.2 and 3.3; blocks by Li et al. 2021,
arXiv:2102.05426 (BRECQ).
"""

from __future__ import annotations

import torch
from torch import Tensor

STRETCH, BELOW = 1.2, 0.1
WARM = 0.2  # of all steps go by before rounding is driven to its ends
SHARP = (20.0, 2.0)  # β then, and at the end


def sharpness(done: float) -> float | None:
    """β once a share `done` of all steps is over; None while values may still move freely."""
    return None if done <= WARM else SHARP[0] + (SHARP[1] - SHARP[0]) * (done - WARM) / (1 - WARM)


def relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """E[(ŷ − y)²] / E[y²], 0-d, with a gradient: outputs of different sizes weigh alike."""
    return (found - wanted).square().mean() / wanted.square().mean().clamp(min=1e-12)


class SoftRounding:
    """One weight on its grid, with a variable for each value. w, scale, zero_point broadcast together; float32."""

    def __init__(self, w: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> None:
        self.scale, self.zero_point = scale, zero_point.float()
        self.low, self.high = low, high
        steps = w / scale
        self.floor = steps.floor()
        rest = (steps - self.floor).clamp(1e-4, 1 - 1e-4)
        self.v = torch.logit((rest + BELOW) / STRETCH).requires_grad_()

    def up(self) -> Tensor:
        """h(v): how far each value goes up, 0 … 1."""
        return (STRETCH * torch.sigmoid(self.v) - BELOW).clamp(0, 1)

    def values(self) -> Tensor:
        """The weight in between."""
        return self._at(self.up())

    def settled(self) -> Tensor:
        """The weight with each value up or down."""
        return self._at((self.up() >= 0.5).float()).detach()

    def openness(self, beta: float) -> Tensor:
        """Mean of 1 − |2h − 1|^β: 0 once every value has settled."""
        return (1 - (2 * self.up() - 1).abs().pow(beta)).mean()

    def _at(self, up: Tensor) -> Tensor:
        codes = (self.floor + up).clamp(self.low - self.zero_point, self.high - self.zero_point)
        return codes * self.scale


class StraightCodes:
    """A weight on its grid whose codes and scales learn, the gradient going straight through the rounding.

    codes_RK: int32, with one scale_R and zero_point_R a row (`rows`). Source: Esser et al. 2020, arXiv:1902.08153.
    """

    def __init__(self, codes_RK: Tensor, scale_R: Tensor, zero_point_R: Tensor, low: int, high: int) -> None:
        self._zero_point, self._scale = zero_point_R[:, None].float(), scale_R[:, None]
        self._low, self._high = low - self._zero_point, high - self._zero_point
        self.latent = (codes_RK.float() - self._zero_point).requires_grad_()
        self.log = torch.zeros_like(self._scale).requires_grad_()

    def scale(self) -> Tensor:
        """What the scales have become, [R]."""
        return (self._scale * self.log.exp())[:, 0]

    def values(self) -> Tensor:
        """The weight that is stored, [R, K]: on its grid at any time."""
        steps = self.latent.clamp(self._low, self._high)
        return (steps + (steps.round() - steps).detach()) * self.scale()[:, None]


def blended(x_N: Tensor, other_N: Tensor, share_N: Tensor) -> Tensor:
    """(1 − λ) x + λ x': samples between samples (Zhang et al. 2018, arXiv:1710.09412). share_N: λ, one a sample."""
    share = share_N.reshape(-1, *[1] * (x_N.dim() - 1)).to(x_N.dtype)
    return (1 - share) * x_N + share * other_N
