"""Layers: convolutions, products, pooling, normalization."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._calls import Array, Call, Value, operator, tensor

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
AVERAGE_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
ADAPTIVE = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
PARAMETERS = {1: "weight", 2: "bias"}
BIAS = 2  # the slot under which a product finds what is added to it alone


def _sides(
    call: Call, sizes: Any, kernel: list[int], stride: list[int], dilation: list[int]
) -> list[tuple[int, int]]:
    """(before, after) of each spatial axis, as `pads` or `auto_pad` say."""
    count, auto = len(kernel), call.attr("auto_pad", "NOTSET")
    if auto in ("NOTSET", "VALID"):
        pads = call.attr("pads") if auto == "NOTSET" else None
        pads = pads or [0] * (2 * count)
        return [(pads[i], pads[count + i]) for i in range(count)]
    found = []
    for size, k, s, d in zip(sizes, kernel, stride, dilation, strict=True):
        if not isinstance(size, int):
            call.refuse(f"auto_pad {auto} of an axis whose length isn't known: give an input of fixed size")
        total = max(0, (-(-size // s) - 1) * s + (k - 1) * d + 1 - size)
        small, large = total // 2, total - total // 2
        found.append((small, large) if auto == "SAME_UPPER" else (large, small))
    return found


def _flat(sides: list[tuple[int, int]]) -> list[int]:
    return [side for pair in reversed(sides) for side in pair]


def _even(sides: list[tuple[int, int]]) -> bool:
    return all(before == after for before, after in sides)


def _windows(call: Call, w: Tensor) -> tuple[int, list[int], list[int]]:
    """(spatial axes, strides, dilations) of a convolution with weights w."""
    count = w.dim() - 2
    if count not in CONV:
        call.refuse(f"convolutions over {count} axes")
    return count, call.sides("strides", count, 1), call.sides("dilations", count, 1)


@operator("Conv", params=PARAMETERS)
def conv(call: Call, x: Value, w: Value, b: Value = None) -> Value:
    x, w = tensor(x), tensor(w)
    count, stride, dilation = _windows(call, w)
    sides = _sides(call, x.shape[2:], list(w.shape[2:]), stride, dilation)
    if not _even(sides):
        x, sides = F.pad(x, _flat(sides)), [(0, 0)] * count
    bias = None if b is None else tensor(b)
    return CONV[count](x, w, bias, stride, [before for before, _ in sides], dilation, call.attr("group", 1))


@operator("ConvTranspose", params=PARAMETERS)
def conv_transpose(call: Call, x: Value, w: Value, b: Value = None) -> Value:
    x, w = tensor(x), tensor(w)
    count, stride, dilation = _windows(call, w)
    extra, shape = call.sides("output_padding", count, 0), call.attr("output_shape")
    auto = call.attr("auto_pad", "NOTSET")
    reach = [(k - 1) * d + 1 for k, d in zip(w.shape[2:], dilation, strict=True)]
    if shape is None and auto in ("SAME_UPPER", "SAME_LOWER"):
        shape = [size * s for size, s in zip(x.shape[2:], stride, strict=True)]
    if shape is not None:
        sides = []
        for size, s, r, o, wanted in zip(x.shape[2:], stride, reach, extra, shape[-count:], strict=True):
            total = s * (size - 1) + o + r - wanted
            sides.append(
                (total // 2, total - total // 2) if auto == "SAME_UPPER" else (total - total // 2, total // 2)
            )
    else:
        sides = _sides(call, x.shape[2:], reach, stride, [1] * count)
    bias, groups = None if b is None else tensor(b), call.attr("group", 1)
    if (
        _even(sides)
        and all(before >= 0 for before, _ in sides)
        and all(o < max(s, d) for o, s, d in zip(extra, stride, dilation, strict=True))
    ):
        pads = [before for before, _ in sides]
        return CONV_TRANSPOSE[count](x, w, bias, stride, pads, extra, groups, dilation)
    y = CONV_TRANSPOSE[count](x, w, bias, stride, 0, 0, groups, dilation)
    cuts = [(-before, o - after) for (before, after), o in zip(sides, extra, strict=True)]
    return F.pad(y, _flat(cuts))


class Linear(nn.Linear):
    """A product with weights of its own, called with all that its node reads."""

    def forward(self, x: Value, *known: Value) -> Tensor:
        return super().forward(tensor(x))


def _linear(weight: Any, bias: Any = None) -> nn.Linear:
    """A layer with weights [N, K] and a bias [N]."""
    made = Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    made.weight = nn.Parameter(torch.from_numpy(np.array(weight, order="C")))
    if bias is not None:
        made.bias = nn.Parameter(torch.from_numpy(np.array(bias)))
    return made


def _gemm_layer(call: Call, known: Mapping[int, Array]) -> nn.Module | None:
    weight, bias = known.get(1), known.get(2)
    scaled = call.attr("alpha", 1.0) != 1 or (bias is not None and call.attr("beta", 1.0) != 1)
    if weight is None or weight.dtype.kind != "f" or scaled or call.attr("transA", 0):
        return None
    weight = weight if call.attr("transB", 0) else weight.T
    if bias is not None and bias.reshape(-1).shape != weight.shape[:1]:
        return None
    return _linear(weight, None if bias is None else bias.reshape(-1))


def _matmul_layer(call: Call, known: Mapping[int, Array]) -> nn.Module | None:
    weight = known.get(1)
    if weight is None or weight.ndim != 2 or weight.dtype.kind != "f":
        return None
    return _linear(weight.T, known.get(BIAS))


@operator("Gemm", params=PARAMETERS, layer=_gemm_layer)
def gemm(call: Call, a: Value, b: Value, c: Value = None) -> Value:
    a, b = tensor(a), tensor(b)
    a = a.T if call.attr("transA", 0) else a
    alpha, beta = call.attr("alpha", 1.0), call.attr("beta", 1.0)
    weight = b if call.attr("transB", 0) else b.T
    plain = alpha == 1 and (
        c is None or (beta == 1 and tensor(c).dim() == 1 and tensor(c).shape[0] == weight.shape[0])
    )
    if plain:
        return F.linear(a, weight, None if c is None else tensor(c))
    found = alpha * F.linear(a, weight)
    return found if c is None else found + beta * tensor(c)


@operator("MatMul", layer=_matmul_layer)
def matmul(call: Call, a: Value, b: Value) -> Value:
    return torch.matmul(tensor(a), tensor(b))


# --------------------------------------------------------------------------- pooling


def _ceiled(call: Call, sizes: Any, kernel: list[int], stride: list[int], dilation: list[int],
            sides: list[tuple[int, int]]) -> list[tuple[int, int]]:  # fmt: skip
    """Sides with what `ceil_mode` adds behind, without windows that would start in the padding behind."""
    if not call.attr("ceil_mode", 0):
        return sides
    found = []
    for size, k, s, d, (before, after) in zip(sizes, kernel, stride, dilation, sides, strict=True):
        if not isinstance(size, int):
            call.refuse("ceil_mode along an axis whose length isn't known: give an input of fixed size")
        reach = (k - 1) * d + 1
        windows = -(-(size + before + after - reach) // s) + 1
        if (windows - 1) * s >= size + before:
            windows -= 1
        found.append((before, max(after, (windows - 1) * s + reach - size - before)))
    return found


def _pool(
    call: Call, x: Tensor
) -> tuple[list[int], list[int], list[int], list[tuple[int, int]], list[tuple[int, int]]]:
    kernel = [int(size) for size in call.attr("kernel_shape")]
    count = len(kernel)
    stride, dilation = call.sides("strides", count, 1), call.sides("dilations", count, 1)
    sides = _sides(call, x.shape[2:], kernel, stride, dilation)
    return kernel, stride, dilation, sides, _ceiled(call, x.shape[2:], kernel, stride, dilation, sides)


def _simple(call: Call, kernel: list[int], sides: list[tuple[int, int]], full: list[tuple[int, int]]) -> bool:
    fits = all(2 * before <= k for (before, _), k in zip(sides, kernel, strict=True))
    return _even(sides) and full == sides and fits


@operator("MaxPool")
def max_pool(call: Call, x: Value) -> Any:
    x = tensor(x)
    kernel, stride, dilation, sides, full = _pool(call, x)
    count = len(kernel)
    if count not in MAX_POOL:
        call.refuse(f"pooling over {count} axes")
    if call.outputs > 1:
        return _max_with_places(call, x)
    kind = x.dtype
    if not _simple(call, kernel, sides, full):
        lowest = float("-inf") if x.is_floating_point() else torch.iinfo(kind).min
        x, sides = F.pad(x, _flat(full), value=lowest), [(0, 0)] * count
    whole = not x.is_floating_point()
    pooled = MAX_POOL[count](
        x.double() if whole else x, kernel, stride, [before for before, _ in sides], dilation
    )
    return pooled.to(kind) if whole else pooled


def _max_with_places(call: Call, x: Tensor) -> tuple[Tensor, Tensor]:
    kernel, stride, dilation, sides, full = _pool(call, x)
    if not _simple(call, kernel, sides, full) or (call.attr("storage_order", 0) and len(kernel) != 2):
        call.refuse("places of the largest values with uneven padding")
    pads = [before for before, _ in sides]
    values, places = MAX_POOL[len(kernel)](x, kernel, stride, pads, dilation, return_indices=True)
    area = math.prod(x.shape[2:])
    if call.attr("storage_order", 0):
        height, width = x.shape[2:]
        places = places % width * height + places // width
    planes = torch.arange(math.prod(x.shape[:2])).reshape(*x.shape[:2], *[1] * len(kernel))
    return values, places + planes * area


@operator("AveragePool")
def average_pool(call: Call, x: Value) -> Value:
    x = tensor(x)
    kernel, stride, dilation, sides, full = _pool(call, x)
    count, counts_pads = len(kernel), bool(call.attr("count_include_pad", 0))
    if count not in AVERAGE_POOL:
        call.refuse(f"pooling over {count} axes")
    plain = all(d == 1 for d in dilation)
    if plain and _simple(call, kernel, sides, full):
        return AVERAGE_POOL[count](x, kernel, stride, [b for b, _ in sides], False, counts_pads)
    # sums of windows over how many of their places count
    ones = torch.ones_like(x[:1, :1])
    counted = F.pad(ones, _flat(sides), value=1.0 if counts_pads else 0.0)
    more = [(0, b[1] - a[1]) for a, b in zip(sides, full, strict=True)]
    return _window_sum(F.pad(x, _flat(full)), kernel, stride, dilation) / _window_sum(
        F.pad(counted, _flat(more)), kernel, stride, dilation
    )


def _window_sum(x: Tensor, kernel: list[int], stride: list[int], dilation: list[int]) -> Tensor:
    channels = x.shape[1]
    ones = torch.ones(channels, 1, *kernel, dtype=x.dtype)
    return CONV[len(kernel)](x, ones, None, stride, 0, dilation, channels)


@operator("LpPool")
def lp_pool(call: Call, x: Value) -> Value:
    x, p = tensor(x), call.attr("p", 2)
    kernel, stride, dilation, _, full = _pool(call, x)
    return _window_sum(F.pad(x.abs() ** p, _flat(full)), kernel, stride, dilation) ** (1 / p)


def _pixels(x: Tensor) -> list[int]:
    return list(range(2, x.dim()))


@operator("GlobalAveragePool")
def global_average_pool(call: Call, x: Value) -> Value:
    x = tensor(x)
    return x.mean(_pixels(x), keepdim=True)


@operator("GlobalMaxPool")
def global_max_pool(call: Call, x: Value) -> Value:
    x = tensor(x)
    return x.amax(_pixels(x), keepdim=True)


@operator("GlobalLpPool")
def global_lp_pool(call: Call, x: Value) -> Value:
    x, p = tensor(x), call.attr("p", 2)
    return (x.abs() ** p).sum(_pixels(x), keepdim=True) ** (1 / p)


# --------------------------------------------------------------------------- normalization


@operator("BatchNormalization", params={1: "weight", 2: "bias", 3: "running_mean", 4: "running_var"})
def batch_norm(call: Call, x: Value, gain: Value, shift: Value, mean: Value, var: Value) -> Any:
    x, gain, shift, mean, var = map(tensor, (x, gain, shift, mean, var))
    eps, momentum = call.attr("epsilon", 1e-5), call.attr("momentum", 0.9)
    if not call.attr("training_mode", 0):
        return F.batch_norm(x, mean, var, gain, shift, False, 0.0, eps)
    dims = [0, *_pixels(x)]
    own, spread = x.mean(dims), x.var(dims, correction=0)
    y = F.batch_norm(x, None, None, gain, shift, True, 0.0, eps)
    return y, mean * momentum + own * (1 - momentum), var * momentum + spread * (1 - momentum)


@operator("InstanceNormalization", params=PARAMETERS)
def instance_norm(call: Call, x: Value, gain: Value, shift: Value) -> Value:
    return F.instance_norm(tensor(x), weight=tensor(gain), bias=tensor(shift), eps=call.attr("epsilon", 1e-5))


@operator("LayerNormalization", params=PARAMETERS)
def layer_norm(call: Call, x: Value, gain: Value, shift: Value = None) -> Any:
    x, gain = tensor(x), tensor(gain)
    axis = call.attr("axis", -1) % x.dim()
    shape, eps = list(x.shape[axis:]), call.attr("epsilon", 1e-5)
    bias = None if shift is None else tensor(shift)
    if list(gain.shape) == shape and (bias is None or list(bias.shape) == shape):
        y = F.layer_norm(x, shape, gain, bias, eps)
    else:
        y = F.layer_norm(x, shape, None, None, eps) * gain
        y = y if bias is None else y + bias
    if call.outputs == 1:
        return y
    dims = list(range(axis, x.dim()))
    mean = x.mean(dims, keepdim=True)
    return (y, mean, 1 / torch.sqrt((x - mean).square().mean(dims, keepdim=True) + eps))[: call.outputs]


@operator("RMSNormalization", params={1: "weight"})
def rms_norm(call: Call, x: Value, gain: Value) -> Value:
    x, gain = tensor(x), tensor(gain)
    shape = list(x.shape[call.attr("axis", -1) % x.dim() :])
    eps = call.attr("epsilon", 1e-5)
    if list(gain.shape) == shape:
        return F.rms_norm(x, shape, gain, eps)
    return F.rms_norm(x, shape, None, eps) * gain


@operator("GroupNormalization", params=PARAMETERS)
def group_norm(call: Call, x: Value, gain: Value, shift: Value) -> Value:
    x, gain, shift = map(tensor, (x, gain, shift))
    groups = call.attr("num_groups")
    if call.opset < 21:  # one gain for each group there
        each = x.shape[1] // groups
        gain, shift = gain.repeat_interleave(each), shift.repeat_interleave(each)
    return F.group_norm(x, groups, gain, shift, call.attr("epsilon", 1e-5))


@operator("LpNormalization")
def lp_normalization(call: Call, x: Value) -> Value:
    x, p = tensor(x), call.attr("p", 2)
    norm = torch.linalg.vector_norm(x, p, call.attr("axis", -1), keepdim=True)
    return torch.where(norm == 0, torch.zeros_like(x), x / norm)


@operator("LRN")
def lrn(call: Call, x: Value) -> Value:
    x, size = tensor(x), call.attr("size")
    alpha, beta, bias = call.attr("alpha", 1e-4), call.attr("beta", 0.75), call.attr("bias", 1.0)
    before = (size - 1) // 2
    padded = F.pad(x.square(), [0, 0] * (x.dim() - 2) + [before, size - 1 - before])
    total = sum(padded.narrow(1, i, x.shape[1]) for i in range(size))
    return x / (bias + alpha / size * total) ** beta


@operator("MeanVarianceNormalization")
def mvn(call: Call, x: Value) -> Value:
    x, dims = tensor(x), call.attr("axes", [0, 2, 3])
    mean = x.mean(dims, keepdim=True)
    spread = (x.square().mean(dims, keepdim=True) - mean.square()).sqrt()
    return (x - mean) / (spread + 1e-9)


@operator("Dropout")
def dropout(call: Call, x: Value, ratio: Value = None, training: Value = None) -> Any:
    x = tensor(x)
    if training is not None and bool(np.asarray(call.ints(training, "training mode")).any()):
        if ratio is None or call.number(ratio, "ratio") != 0:
            call.refuse("dropout that is on: export the network in eval mode")
    return x if call.outputs == 1 else (x, torch.ones_like(x, dtype=torch.bool))


@operator("Einsum")
def einsum(call: Call, *values: Value) -> Value:
    return torch.einsum(call.attr("equation", ""), *map(tensor, values))


@operator("Det")
def det(call: Call, x: Value) -> Value:
    return torch.linalg.det(tensor(x))


@operator("Col2Im")
def col2im(call: Call, x: Value, image: Value, block: Value) -> Value:
    size, kernel = call.ints(image, "image shape"), call.ints(block, "block shape")
    if len(size) != 2:
        call.refuse(f"images with {len(size)} axes")
    pads = call.attr("pads", [0, 0, 0, 0])
    if pads[:2] != pads[2:]:
        call.refuse("uneven padding")
    stride, dilation = call.sides("strides", 2, 1), call.sides("dilations", 2, 1)
    return F.fold(tensor(x), tuple(size), tuple(kernel), tuple(dilation), tuple(pads[:2]), tuple(stride))
