"""What shares a scale, as the rows of a matrix: every granularity is then one scale per row.

    tensor, global   [1, N]      all values
    channel          [C, N/C]    one index of the format's axis
    group            [C·G, S]    S consecutive values of a channel; zeros fill up a shorter tail

A channel is w.movedim(axis, 0).flatten(1): the other axes in their order. Legend: N values, C channels, G groups a
channel, S group size (the channel's length where that is smaller), R rows, K columns.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from bitport.errors import FormatError
from bitport.formats import Format


def scale_shape(shape: torch.Size, fmt: Format) -> tuple[int, ...]:
    """The shape of the scales of a tensor of `shape`: () for tensor and global, (C,) for channel, (C, G) for group.

    Raises:
        FormatError: the format's axis is missing or not an axis of the tensor.
    """
    if fmt.granularity not in ("channel", "group"):
        return ()
    channels, length = _channels(shape, fmt)
    return (channels,) if fmt.granularity == "channel" else (channels, -(-length // fmt.group))


def rows(w: Tensor, fmt: Format) -> Tensor:
    """w as [R, K], one row per scale, scales in the order of `scale_shape` flattened; a view where that is possible.

    Raises:
        FormatError: as `scale_shape`.
    """
    if fmt.granularity not in ("channel", "group"):
        return w.reshape(1, -1)
    channels, length = _channels(w.shape, fmt)
    x_CK = w.movedim(fmt.axis or 0, 0).reshape(channels, length)
    if fmt.granularity == "channel" or length <= fmt.group:
        return x_CK if length or fmt.granularity == "channel" else x_CK.reshape(0, 0)
    if missing := -length % fmt.group:
        x_CK = F.pad(x_CK, (0, missing))
    return x_CK.reshape(-1, fmt.group)


def restore(x_RK: Tensor, fmt: Format, shape: torch.Size) -> Tensor:
    """The inverse of `rows`: a contiguous tensor of `shape`, without what filled up the tails."""
    if fmt.granularity not in ("channel", "group"):
        return x_RK.reshape(shape)
    channels, length = _channels(shape, fmt)
    if x_RK.numel() != channels * length:
        x_RK = x_RK.reshape(channels, -1)[:, :length]
    axis = (fmt.axis or 0) % len(shape)
    moved = (channels, *shape[:axis], *shape[axis + 1 :])
    return x_RK.reshape(moved).movedim(0, axis).contiguous()


def row_sizes(shape: torch.Size, fmt: Format) -> Tensor:
    """How many values of the tensor each row holds, int64 [R]; less than K only in a group's tail."""
    if fmt.granularity not in ("channel", "group"):
        return torch.tensor([prod(shape)])
    channels, length = _channels(shape, fmt)
    if fmt.granularity == "channel":
        return torch.full((channels,), length)
    starts = torch.arange(0, length, fmt.group)
    return (length - starts).clamp(max=fmt.group).repeat(channels)


def _channels(shape: torch.Size, fmt: Format) -> tuple[int, int]:
    """(channels, values in each); (0, 0) where there are no channels."""
    if fmt.axis is None or not -len(shape) <= fmt.axis < len(shape):
        raise FormatError(
            f"format {fmt} needs a channel axis of a weight with {len(shape)} dimensions: write "
            f"{'channel(AXIS)' if fmt.granularity == 'channel' else 'group(SIZE,AXIS)'}"
        )
    axis = fmt.axis % len(shape)
    return shape[axis], prod(shape) // max(shape[axis], 1)
