"""Operators that arrange: shapes, joins, cuts, padding, tiles, constants."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ._calls import Array, Call, Value, array, operator, tensor
from .elementwise import DTYPES


def shape_of(value: Value) -> list[Any]:
    return list(value.shape)


def _shape_known(call: Call, x: Array) -> Array:
    return _span(call, list(x.shape))


def _span(call: Call, sizes: list[Any]) -> Array:
    return array(sizes[call.attr("start", 0) : call.attr("end", None)])


@operator("Shape", known=_shape_known)
def shape(call: Call, x: Tensor) -> Array:
    """Known, as an array of sizes, some of them symbolic."""
    return _span(call, shape_of(x))


@operator("Size", known=lambda call, x: np.asarray(x.size))
def size(call: Call, x: Tensor) -> Array:
    found = array([math.prod(shape_of(x))])
    return found.reshape(())


def _target(call: Call, x: Value, wanted: list[Any]) -> list[Any]:
    """The shape that Reshape means: 0 copies a size, unless zeros are allowed."""
    if call.attr("allowzero", 0):
        return wanted
    have = shape_of(x)
    return [
        have[axis] if isinstance(length, int) and length == 0 else length
        for axis, length in enumerate(wanted)
    ]


def _reshape_known(call: Call, x: Array, wanted: Value = None) -> Array:
    return x.reshape([int(length) for length in _target(call, x, call.ints(wanted, "shape"))])


@operator("Reshape", known=_reshape_known)
def reshape(call: Call, x: Value, wanted: Value = None) -> Value:
    x = tensor(x)
    sizes = call.ints(call.attr("shape") if wanted is None else wanted, "shape")
    return x.reshape(_target(call, x, sizes))


@operator("Flatten")
def flatten(call: Call, x: Value) -> Value:
    x = tensor(x)
    axis = call.attr("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    if axis == 1 and x.dim() > 1:
        return x.flatten(1)
    rows, columns = math.prod(x.shape[:axis]), math.prod(x.shape[axis:])
    return x.reshape(rows, columns)


def _unsqueezed(call: Call, rank: int, given: Value) -> list[int]:
    axes = call.axes(given) or []
    return sorted(axis % (rank + len(axes)) for axis in axes)


def _unsqueeze_known(call: Call, x: Array, axes: Value = None) -> Array:
    for axis in _unsqueezed(call, x.ndim, axes):
        x = np.expand_dims(x, axis)
    return x


@operator("Unsqueeze", known=_unsqueeze_known)
def unsqueeze(call: Call, x: Value, axes: Value = None) -> Value:
    x = tensor(x)
    for axis in _unsqueezed(call, x.dim(), axes):
        x = x.unsqueeze(axis)
    return x


def _squeeze_known(call: Call, x: Array, axes: Value = None) -> Array:
    found = call.axes(axes)
    return x.squeeze() if found is None else x.squeeze(tuple(found))


@operator("Squeeze", known=_squeeze_known)
def squeeze(call: Call, x: Value, axes: Value = None) -> Value:
    found = call.axes(axes)
    return tensor(x).squeeze() if found is None else tensor(x).squeeze(tuple(found))


@operator("Transpose", known=lambda call, x: x.transpose(call.attr("perm")))
def transpose(call: Call, x: Value) -> Value:
    x = tensor(x)
    return x.permute(call.attr("perm") or list(range(x.dim()))[::-1])


@operator("Concat", known=lambda call, *xs: np.concatenate(xs, call.attr("axis", 1)))
def concat(call: Call, *values: Value) -> Value:
    return torch.cat([tensor(value) for value in values], call.attr("axis", 1))


def _parts(call: Call, length: int, sizes: Value) -> int | list[Any]:
    """The lengths of what a Split gives, or the one that all have but the last."""
    found = sizes if sizes is not None else call.attr("split")
    if found is not None:
        return call.ints(found, "parts")
    return int(-(-length // call.attr("num_outputs", call.outputs)))


def _split_known(call: Call, x: Array, sizes: Value = None) -> tuple[Array, ...]:
    axis = call.attr("axis", 0)
    length = x.shape[axis]
    parts = _parts(call, length, sizes)
    ends = range(parts, length, parts) if isinstance(parts, int) else list(itertools.accumulate(parts))[:-1]
    return tuple(np.split(x, ends, axis))


@operator("Split", known=_split_known)
def split(call: Call, x: Value, sizes: Value = None) -> tuple[Tensor, ...]:
    x, axis = tensor(x), call.attr("axis", 0)
    return torch.split(x, _parts(call, x.shape[axis], sizes), axis)


def _bounds(call: Call, rank: int, *given: Value) -> list[tuple[int, Any, Any, int]]:
    """(axis, start, end, step) of a Slice."""
    names = ("starts", "ends", "axes", "steps")
    found = [
        call.attr(name) if value is None else value
        for name, value in zip(names, [*given, *[None] * (4 - len(given))], strict=True)
    ]
    starts, ends = call.ints(found[0], "starts"), call.ints(found[1], "ends")
    axes = list(range(len(starts))) if found[2] is None else call.ints(found[2], "axes")
    steps = [1] * len(starts) if found[3] is None else call.ints(found[3], "steps")
    return [(int(axis) % rank, *rest) for axis, *rest in zip(axes, starts, ends, steps, strict=True)]


def _slice_known(call: Call, x: Array, *given: Value) -> Array:
    for axis, start, end, step in _bounds(call, x.ndim, *given):
        end = None if step < 0 and end < -x.shape[axis] else end
        x = x[(slice(None),) * axis + (slice(start, end, step),)]
    return x


@operator("Slice", known=_slice_known)
def cut(call: Call, x: Value, *given: Value) -> Value:
    x = tensor(x)
    for axis, start, end, step in _bounds(call, x.dim(), *given):
        if step > 0:
            end = min(end, 2**62) if isinstance(end, int) else end
            x = torch.ops.aten.slice.Tensor(x, axis, start, end, step)
            continue
        length = x.shape[axis]
        if not isinstance(length, int):
            call.refuse(f"a step of {step} along an axis whose length isn't known")
        picked = range(length)[slice(start, None if end < -length else end, step)]
        x = x.index_select(axis, torch.tensor(list(picked), dtype=torch.int64))
    return x


@operator("Expand")
def expand(call: Call, x: Value, wanted: Value) -> Value:
    x, sizes = tensor(x), call.ints(wanted, "shape")
    have = [1] * (len(sizes) - x.dim()) + shape_of(x)
    sizes = [1] * (len(have) - len(sizes)) + sizes
    # a 1 that is asked for keeps what is there
    sizes = [
        own if isinstance(size, int) and size == 1 else size for own, size in zip(have, sizes, strict=True)
    ]
    return x.expand(sizes)


@operator("Tile")
def tile(call: Call, x: Value, repeats: Value) -> Value:
    return tensor(x).repeat(call.ints(repeats, "repeats"))


@operator("Pad")
def pad(call: Call, x: Value, pads: Value = None, value: Value = None, axes: Value = None) -> Value:
    x = tensor(x)
    if isinstance(value, Tensor):
        return _filled(call, x, pads, value, axes)
    sizes = call.ints(call.attr("pads") if pads is None else pads, "pads")
    where = list(range(x.dim())) if axes is None else [int(a) % x.dim() for a in call.ints(axes, "axes")]
    ends = {axis: (sizes[i], sizes[i + len(where)]) for i, axis in enumerate(where)}
    mode = call.attr("mode", "constant")
    if mode == "constant":
        fill = call.attr("value", 0.0) if value is None else call.number(value, "value")
        flat = [side for axis in reversed(range(x.dim())) for side in ends.get(axis, (0, 0))]
        if x.dtype == torch.bool:
            return F.pad(x.to(torch.uint8), flat, value=int(fill)).bool()
        return F.pad(x, flat, value=fill)
    for axis, (before, after) in ends.items():
        x = _padded(call, x, axis, before, after, mode)
    return x


def _filled(call: Call, x: Tensor, pads: Value, value: Tensor, axes: Value) -> Value:
    """Padded with a number that data gives."""
    inside, wide = torch.ones(x.shape, dtype=torch.bool), pad(call, x, pads, None, axes)
    return torch.where(pad(call, inside, pads, None, axes), wide, value.to(x.dtype))


def _padded(call: Call, x: Tensor, axis: int, before: int, after: int, mode: str) -> Value:
    """One axis, by picking what is there (which works for any type and rank); a cut where a side is negative."""
    length = x.shape[axis]
    if before <= 0 and after <= 0:
        return x.narrow(axis, -before, length + before + after) if before or after else x
    if not isinstance(length, int):
        call.refuse(f"padding by {mode} along an axis whose length isn't known")
    index = np.arange(-before, length + after)
    if mode == "edge":
        index = index.clip(0, length - 1)
    elif mode == "wrap":
        index = index % length
    elif mode == "reflect":
        period = max(1, 2 * (length - 1))
        index = index % period
        index = np.where(index >= length, period - index, index)
    else:
        call.refuse(f"mode {mode!r} is unknown")
    return x.index_select(axis, torch.from_numpy(index))


@operator("Trilu")
def trilu(call: Call, x: Value, k: Value = None) -> Value:
    by = 0 if k is None else call.number(k, "diagonal")
    return torch.triu(tensor(x), by) if call.attr("upper", 1) else torch.tril(tensor(x), by)


@operator("DepthToSpace")
def depth_to_space(call: Call, x: Value) -> Value:
    x, b = tensor(x), call.attr("blocksize")
    if call.attr("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, b)
    n, c, h, w = x.shape
    parts = x.reshape(n, b, b, c // (b * b), h, w).permute(0, 3, 4, 1, 5, 2)
    return parts.reshape(n, c // (b * b), h * b, w * b)


@operator("SpaceToDepth")
def space_to_depth(call: Call, x: Value) -> Value:
    x, b = tensor(x), call.attr("blocksize")
    n, c, h, w = x.shape
    parts = x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4)
    return parts.reshape(n, c * b * b, h // b, w // b)


@operator("CenterCropPad")
def center_crop_pad(call: Call, x: Value, wanted: Value) -> Value:
    x = tensor(x)
    axes = call.attr("axes") or list(range(x.dim()))
    for axis, length in zip(axes, call.ints(wanted, "shape"), strict=True):
        have = x.shape[axis]
        if have > length:
            x = x.narrow(axis, (have - length) // 2, length)
        elif have < length:
            before = (length - have) // 2
            sides = [0, 0] * (x.dim() - 1 - axis % x.dim()) + [before, length - have - before]
            x = F.pad(x, sides)
    return x


# --------------------------------------------------------------------------- constants


@operator("ConstantOfShape")
def constant_of_shape(call: Call, wanted: Value) -> Value:
    sizes = call.ints(wanted, "shape")
    value = call.attr("value")
    fill = np.zeros(1, np.float32) if value is None else value
    if all(isinstance(length, int) for length in sizes):
        call.hold(math.prod(sizes))
        return np.full(sizes, fill.reshape(-1)[0], fill.dtype)
    return torch.full(sizes, fill.reshape(-1)[0].item(), dtype=torch.from_numpy(fill).dtype)


@operator("Range")
def span(call: Call, start: Value, limit: Value, delta: Value) -> Value:
    ends = [call.number(value, "ends") for value in (start, limit, delta)]
    if all(isinstance(end, int | float) for end in ends):
        if not ends[2]:
            call.refuse("its step is 0")
        call.hold(int((ends[1] - ends[0]) / ends[2]))
        return np.arange(
            *ends, dtype=np.asarray(start).dtype if np.asarray(start).dtype != object else np.int64
        )
    return torch.arange(*ends)


@operator("EyeLike")
def eye_like(call: Call, x: Value) -> Value:
    x = tensor(x)
    rows, columns = x.shape
    dtype = DTYPES[call.attr("dtype")] if call.attr("dtype") else x.dtype
    off = torch.arange(columns)[None, :] - torch.arange(rows)[:, None]
    return (off == call.attr("k", 0)).to(dtype)


@operator("OneHot")
def one_hot(call: Call, indices: Value, depth: Value, values: Value) -> Value:
    count, values = int(call.number(depth, "depth")), tensor(values)
    index = tensor(indices).to(torch.int64)
    index = torch.where(index < 0, index + count, index)
    axis = call.attr("axis", -1)
    hot = index.unsqueeze(axis) == torch.arange(count).reshape(
        [count] + [1] * ((index.dim() - axis) if axis >= 0 else -axis - 1)
    )
    return torch.where(hot, values[1], values[0])


def _window(call: Call, length: Value, a: float, b: float, c: float) -> Value:
    count = int(call.number(length, "size"))
    steps = count if call.attr("periodic", 1) else count - 1
    angle = 2 * math.pi * torch.arange(count, dtype=torch.float32) / steps
    found = a - b * torch.cos(angle) + c * torch.cos(2 * angle)
    return found.to(DTYPES[call.attr("output_datatype", 1)])


@operator("HannWindow")
def hann(call: Call, length: Value) -> Value:
    return _window(call, length, 0.5, 0.5, 0.0)


@operator("HammingWindow")
def hamming(call: Call, length: Value) -> Value:
    return _window(call, length, 25 / 46, 21 / 46, 0.0)


@operator("BlackmanWindow")
def blackman(call: Call, length: Value) -> Value:
    return _window(call, length, 0.42, 0.5, 0.08)


def constant(call: Call) -> Value:
    """The value of a Constant node; strings are refused."""
    for name in ("value", "value_float", "value_int", "value_floats", "value_ints"):
        if name in call.attrs:
            found = call.attrs[name]
            if name == "value":
                return found
            return np.asarray(found, dtype=np.float32 if "float" in name else np.int64)
    return call.refuse("it holds something else than numbers")


operator("Constant", known=constant)(constant)
