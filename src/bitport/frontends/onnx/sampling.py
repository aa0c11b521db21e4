"""Resizing and sampling of images."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ._calls import Call, Value, operator, tensor

GRID = {
    "bilinear": "bilinear",
    "linear": "bilinear",
    "nearest": "nearest",
    "bicubic": "bicubic",
    "cubic": "bicubic",
}


@operator("Upsample")
def upsample(call: Call, x: Value, scales: Value = None) -> Value:
    x = tensor(x)
    factors = call.attr("scales") if scales is None else scales
    found = [float(s) for s in call.ints(np.asarray(factors), "scales")]
    return _resized(call, x, list(range(x.dim())), found, None, "asymmetric", "floor")


@operator("Resize")
def resize(call: Call, x: Value, roi: Value = None, scales: Value = None, sizes: Value = None) -> Value:
    if call.opset < 11:  # inputs are x and scales there
        return upsample(call, x, roi)
    x = tensor(x)
    axes = [int(a) % x.dim() for a in call.attr("axes") or range(x.dim())]
    mode = call.attr("coordinate_transformation_mode", "half_pixel")
    if mode == "tf_crop_and_resize":
        call.refuse("it crops while it resizes")
    factors = None
    if scales is not None and np.asarray(scales).size:
        factors = [float(s) for s in call.ints(scales, "scales")]
    wanted = None if sizes is None else call.ints(sizes, "sizes")
    policy = call.attr("keep_aspect_ratio_policy", "stretch")
    if wanted is not None and policy != "stretch":
        ratios = [w / x.shape[a] for a, w in zip(axes, wanted, strict=True)]
        ratio = min(ratios) if policy == "not_larger" else max(ratios)
        wanted = [math.floor(ratio * x.shape[a] + 0.5) for a in axes]
        factors = [ratio] * len(axes)
    return _resized(call, x, axes, factors, wanted, mode, call.attr("nearest_mode", "round_prefer_floor"))


def _resized(
    call: Call, x: Tensor, axes: list[int], factors: list[float] | None, wanted: list[Any] | None, mode: str,
    rounding: str,
) -> Value:  # fmt: skip
    """Axis by axis, with a matrix of weights for each; by torch's own operator where that is the same."""
    kind = call.attr("mode", "nearest")
    if factors is None:
        if wanted is None:
            call.refuse("it has neither scales nor sizes")
        factors = [w / x.shape[a] for a, w in zip(axes, wanted, strict=True)]
    own = _by_torch(call, x, axes, factors, wanted, mode, kind, rounding)
    if own is not None:
        return own
    for place, axis in enumerate(axes):
        length = x.shape[axis]
        if not isinstance(length, int):
            if factors[place] == 1:
                continue
            call.refuse("an axis whose length isn't known")
        out = math.floor(length * factors[place]) if wanted is None else int(wanted[place])
        if out == length and factors[place] == 1:
            continue
        weights = _weights(call, length, out, factors[place], mode, kind, rounding)
        x = (x.movedim(axis, -1).float() @ torch.from_numpy(weights).T).movedim(-1, axis).to(x.dtype)
    return x


def _by_torch(
    call: Call, x: Tensor, axes: list[int], factors: list[float], wanted: list[Any] | None, mode: str, kind: str,
    rounding: str,
) -> Tensor | None:  # fmt: skip
    spatial = [axis for axis, factor in zip(axes, factors, strict=True) if axis >= 2 or factor != 1]
    if x.dim() != 4 or any(axis < 2 for axis in spatial) or call.attr("antialias", 0):
        return None
    by_axis = dict(zip(axes, factors, strict=True))
    sizes = dict(zip(axes, wanted or [None] * len(axes), strict=True))
    scale = [by_axis.get(axis, 1.0) for axis in (2, 3)]
    size = [sizes.get(axis) or _length(x.shape[axis], s) for axis, s in zip((2, 3), scale, strict=True)]
    if (
        kind == "nearest"
        and mode == "asymmetric"
        and rounding == "floor"
        and all(float(s).is_integer() for s in scale)
    ):
        return F.interpolate(x, scale_factor=scale, mode="nearest")
    exact = all(isinstance(n, int) and isinstance(m, int) and abs(m / n - s) < 1e-6
                for n, m, s in zip(x.shape[2:], size, scale, strict=True))  # fmt: skip
    whole = all(float(s).is_integer() for s in scale)
    if (
        kind == "linear"
        and (exact or whole)
        and mode in ("half_pixel", "pytorch_half_pixel", "align_corners")
    ):
        if mode == "pytorch_half_pixel" and 1 in size:
            return None
        if mode == "align_corners":
            return F.interpolate(x, size=size, mode="bilinear", align_corners=True) if exact else None
        return F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
    return None


def _length(size: Any, scale: float) -> Any:
    return math.floor(size * scale) if isinstance(size, int) else None


def _weights(call: Call, length: int, out: int, scale: float, mode: str, kind: str, rounding: str) -> Any:
    """What each of `out` places takes of `length`: float32 [out, length]."""
    places = np.arange(out, dtype=np.float64)
    if mode == "align_corners":
        at = places * ((length - 1) / (out - 1)) if out > 1 else places * 0
    elif mode == "asymmetric":
        at = places / scale
    elif mode == "half_pixel_symmetric":
        adjustment = out / (scale * length)
        center = length / 2
        at = center * (1 - adjustment) + (places + 0.5) / scale - 0.5
    elif mode == "pytorch_half_pixel":
        at = (places + 0.5) / scale - 0.5 if out > 1 else places * 0
    elif mode == "half_pixel":
        at = (places + 0.5) / scale - 0.5
    else:
        call.refuse(f"coordinates by {mode}")
    found = np.zeros((out, length), dtype=np.float64)
    if kind == "nearest":
        near = {
            "floor": np.floor(at), "ceil": np.ceil(at), "round_prefer_floor": np.ceil(at - 0.5),
            "round_prefer_ceil": np.floor(at + 0.5),
        }[rounding]  # fmt: skip
        found[np.arange(out), near.clip(0, length - 1).astype(int)] = 1
        return found.astype(np.float32)
    narrow = min(1.0, scale) if call.attr("antialias", 0) else 1.0
    reach = (1.0 if kind == "linear" else 2.0) / narrow
    a = call.attr("cubic_coeff_a", -0.75)
    for i, x in enumerate(at):
        first, last = math.floor(x - reach) + 1, math.ceil(x + reach) - 1
        if kind == "linear" and narrow == 1:
            first, last = math.floor(x), math.floor(x) + 1
        elif narrow == 1:
            first, last = math.floor(x) - 1, math.floor(x) + 2
        taps = np.arange(first, last + 1)
        away = np.abs(taps - x) * narrow
        share = np.clip(1 - away, 0, None) if kind == "linear" else _cubic(away, a)
        inside = (taps >= 0) & (taps < length)
        if call.attr("exclude_outside", 0) or narrow < 1:
            share = np.where(inside, share, 0)
        share = share / share.sum()
        np.add.at(found[i], taps.clip(0, length - 1), share)
    return found.astype(np.float32)


def _cubic(away: Any, a: float) -> Any:
    near = (a + 2) * away**3 - (a + 3) * away**2 + 1
    far = a * away**3 - 5 * a * away**2 + 8 * a * away - 4 * a
    return np.where(away <= 1, near, np.where(away < 2, far, 0))


@operator("GridSample")
def grid_sample(call: Call, x: Value, grid: Value) -> Value:
    mode = call.attr("mode", "linear")
    return F.grid_sample(
        tensor(x),
        tensor(grid),
        GRID[mode],
        call.attr("padding_mode", "zeros"),
        bool(call.attr("align_corners", 0)),
    )


@operator("AffineGrid")
def affine_grid(call: Call, theta: Value, size: Value) -> Value:
    return F.affine_grid(tensor(theta), call.ints(size, "size"), bool(call.attr("align_corners", 0)))
