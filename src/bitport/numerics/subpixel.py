"""A transposed convolution as a convolution with one output channel a phase of the stride.

    y[s·m + r] = Σ_t x[(s·m + r + p − t)/s] · w[t]  over the t for which that is whole
               = Σ_c x[m + c] · w[r + p − s·c]        : an ordinary convolution over c, for each phase r

Source: Shi et al. 2016, arXiv:1609.07009 ("Is the deconvolution layer the same as a convolutional layer?").

Legend: I input channels, O output channels, G groups, s stride, p padding, k kernel, r phase (0 … s − 1), m position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Axis:
    """One spatial axis. The convolution's kernel covers the offsets `first` … `first + kernel − 1`.

    before, after: padding of the input (negative: cropped). crop: superfluous elements at the end of the result.
    """

    first: int
    kernel: int
    before: int
    after: int
    crop: int


def axis(kernel: int, stride: int, padding: int, output_padding: int) -> Axis:
    offsets = [
        (phase + padding - tap) // stride
        for phase in range(stride)
        for tap in range(kernel)
        if (phase + padding - tap) % stride == 0
    ]
    first, width = min(offsets), max(offsets) - min(offsets) + 1
    length = kernel + output_padding - 2 * padding  # of the result for an input of one element
    positions = -(-length // stride)
    return Axis(first, width, -first, positions - 2 + first + width, positions * stride - length)


def phase_weights(
    weight: Tensor, stride: Sequence[int], padding: Sequence[int], axes: Sequence[Axis], groups: int = 1
) -> Tensor:
    """Weight [I, O/G, *k] of a transposed convolution → [O·Πs, I/G, *kernel], phases innermost in the channels."""
    inputs, outputs, *kernel = weight.shape
    grouped = weight.reshape(groups, inputs // groups, outputs, *kernel).transpose(1, 2)
    phases = list(product(*(range(s) for s in stride)))
    new = weight.new_zeros(groups, outputs, len(phases), inputs // groups, *(a.kernel for a in axes))
    for index, phase in enumerate(phases):
        for place in product(*(range(a.kernel) for a in axes)):
            taps = [
                r + p - s * (a.first + q)
                for r, p, s, a, q in zip(phase, padding, stride, axes, place, strict=True)
            ]
            if all(0 <= t < k for t, k in zip(taps, kernel, strict=True)):
                target: tuple[Any, ...] = (slice(None), slice(None), index, slice(None), *place)
                source: tuple[Any, ...] = (..., *taps)
                new[target] = grouped[source]
    return new.reshape(groups * outputs * len(phases), inputs // groups, *(a.kernel for a in axes))


def phase_bias(bias: Tensor, stride: Sequence[int]) -> Tensor:
    """[O] → [O·Πs]."""
    return bias.repeat_interleave(int(torch.tensor(stride).prod()))
