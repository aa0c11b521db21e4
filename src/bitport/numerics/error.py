"""How far a tensor is from its reference.

SQNR = 10 · log10( Σ r² / Σ (r − v)² )  dB       r reference, v value
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from bitport.errors import MetricError


@dataclass
class ErrorStats:
    """Sums over a stream of (reference, value) pairs, in float64.

    Attributes:
        count: elements seen.
        signal: Σ reference².
        noise: Σ (reference − value)².
        largest: max |reference − value|.
    """

    count: int = 0
    signal: float = 0.0
    noise: float = 0.0
    largest: float = 0.0

    def update(self, reference: Tensor, value: Tensor) -> None:
        """Add a pair of tensors of the same shape, any float or integer type.

        Raises:
            MetricError: the shapes differ.
        """
        if reference.shape != value.shape:
            raise MetricError(
                f"an error was asked of shapes {tuple(reference.shape)} and {tuple(value.shape)}: compare "
                "tensors of one shape"
            )
        if reference.numel() == 0:
            return
        signal = reference.detach().double()
        noise = signal - value.detach().double()
        self.count += reference.numel()
        self.signal += float(signal.square().sum())
        self.noise += float(noise.square().sum())
        self.largest = _larger(self.largest, float(noise.abs().max()))

    def merge(self, other: ErrorStats) -> ErrorStats:
        """The sums of both streams; neither operand changes."""
        return ErrorStats(
            self.count + other.count,
            self.signal + other.signal,
            self.noise + other.noise,
            _larger(self.largest, other.largest),
        )

    @property
    def mse(self) -> float:
        """Mean squared error; 0.0 while nothing was seen."""
        return self.noise / self.count if self.count else 0.0

    @property
    def relative(self) -> float:
        """Noise against signal; the noise itself without a signal."""
        return self.noise / self.signal if self.signal else self.noise

    @property
    def sqnr_db(self) -> float:
        """Signal-to-quantization-noise ratio in dB: inf without noise, −inf for noise without a signal."""
        if math.isnan(self.signal) or math.isnan(self.noise):
            return math.nan
        if self.noise == 0:
            return math.inf
        if self.signal == 0:
            return -math.inf
        # A difference of logarithms: the quotient of two extreme sums may overflow.
        return 10 * (math.log10(self.signal) - math.log10(self.noise))


def sqnr_db(reference: Tensor, value: Tensor) -> float:
    """Signal-to-quantization-noise ratio of `value` in dB, in float64.

    Args:
        reference, value: same shape, any float or integer type.

    Returns: inf if they are equal, −inf for a reference of zeros with a value that isn't.

    Raises:
        MetricError: the shapes differ.
    """
    stats = ErrorStats()
    stats.update(reference, value)
    return stats.sqnr_db


def finite(decibels: float) -> float | None:
    """Decibels as a record holds them: None where nothing differs or nothing is there, since JSON has no infinity."""
    return decibels if math.isfinite(decibels) else None


def _larger(a: float, b: float) -> float:
    """max that keeps NaN, which `max` drops or keeps depending on the order."""
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)
