"""Mean and spread per channel of a stream, and the affine map that gives a tensor the moments of another.

    gain_C = σ(y_C) / σ(ỹ_C)        shift_C = μ(y_C) − gain_C · μ(ỹ_C)        y: float, ỹ: quantized layer

Matching the first two moments undoes the shift and the inflation that rounding weights gives a layer's output; with
the means alone it is the measured bias correction of Nagel et al. 2019 (arXiv:1906.04721, 4.2), with both the
re-estimation of statistics that BatchNorm would do (Sun et al. 2019, arXiv:1911.10125).

Legend: C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitport.errors import DataError

LARGEST_GAIN = 2.0  # a layer whose spread is off by more is not one that an affine map repairs


@dataclass
class ChannelMoments:
    """Sums over a stream of tensors, float64 [C]; empty until the first."""

    count: int = 0
    total: Tensor | None = None
    squares: Tensor | None = None

    def update(self, values: Tensor, axis: int) -> None:
        """Add a tensor whose dimension `axis` has the channels."""
        channels = values.shape[axis]
        if self.total is None or self.squares is None:
            self.total = torch.zeros(channels, dtype=torch.float64)
            self.squares = torch.zeros_like(self.total)
        if not values.numel():
            return
        wide = values.detach().to(torch.float64, copy=True)
        self.count += values.numel() // channels
        self.total = self.total + sum_of(wide, axis)
        self.squares = self.squares + sum_of(wide.square_(), axis)

    def moments(self) -> tuple[Tensor, Tensor]:
        """(mean, standard deviation), float32 [C]. Raises DataError when nothing was seen."""
        if self.total is None or self.squares is None or self.count == 0:
            raise DataError("moments of no values: give at least one batch")
        mean = self.total / self.count
        variance = (self.squares / self.count - mean.square()).clamp(min=0.0)
        return mean.float(), variance.sqrt().float()

    def root_mean_square(self) -> Tensor:
        """sqrt(E[x²]), float64 [C]. Raises DataError when nothing was seen."""
        mean, deviation = self.moments()
        return (mean.double().square() + deviation.double().square()).sqrt()


def sum_of(values: Tensor, axis: int) -> Tensor:
    """The sum of each channel, [C], of a tensor whose dimension `axis` has them."""
    others = [dim for dim in range(values.dim()) if dim != axis % values.dim()]
    return values.sum(others) if others else values  # a sum over no dimensions is one over all


def matching(
    mean: Tensor, deviation: Tensor, found_mean: Tensor, found_deviation: Tensor, spread: bool = True
) -> tuple[Tensor, Tensor]:
    """(gain, shift), float64 [C]: the map after which the found moments are the wanted ones.

    The gain stays within 1/2 … 2, and is 1 for a channel that is constant on either side; without `spread` for all.
    """
    wanted, found = deviation.double(), found_deviation.double()
    alive = (wanted > 0) & (found > 0) & spread
    gain = torch.where(alive, wanted / torch.where(alive, found, 1.0), 1.0).clamp(
        1 / LARGEST_GAIN, LARGEST_GAIN
    )
    return gain, mean.double() - gain * found_mean.double()
