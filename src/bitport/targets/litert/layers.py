"""Convolutions, linear layers, products, pools, embeddings and resampling as TFLite operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import ExportError
from ...graph.aten_table import spread
from ...plan.ops import DEQUANTIZE
from ._build import Size, Value
from ._flatbuffer import Quant
from .convert import Call, Dequantized, Ranged, Row, shape_of

VALID, SAME = 1, 0
aten = torch.ops.aten


# ------------------------------------------------------------------ space


def _planes(call: Call, x: Value, shape: Sequence[Size]) -> Value:
    """[N, C, L] with the channels last as [N, C, 1, L], a plane of one row; planes as they are."""
    if x.rank == 4:
        return x
    return call.b.reshaped(x, [shape[0], shape[1], 1, shape[2]], last=True, name=f"{call.name}/rows")


def _finish(call: Call, made: Value) -> Value:
    """A plane of one row as a row again."""
    return call.b.reshaped(made, call.shape, last=True, name=call.label) if len(call.shape) == 3 else made


def _plane_shape(call: Call) -> list[Size]:
    shape = list(call.shape)
    return shape if len(shape) == 4 else [shape[0], shape[1], 1, shape[2]]


def _row_options(values: Any, ndim: int, missing: int) -> tuple[int, int]:
    """A stride, padding … for height and width; a row has one of height `missing`."""
    numbers = spread(values, ndim)
    return (missing, numbers[0]) if ndim == 1 else (numbers[0], numbers[1])


def _same(
    sizes: Sequence[Size], out: Sequence[Size], kernel: Any, stride: Any, padding: Any, dilation: Any
) -> bool:
    """Whether TFLite's SAME pads as much in front as torch does, and gives as many results."""
    for size, made, k, s, p, d in zip(sizes, out, kernel, stride, padding, dilation, strict=True):
        if not isinstance(size, int) or not isinstance(made, int):
            return False
        total = max((made - 1) * s + (k - 1) * d + 1 - size, 0)
        if made != -(-size // s) or total // 2 != p:
            return False
    return True


def _padded(call: Call, x: Value, before: Sequence[int], after: Sequence[int], value: Tensor | None) -> Value:
    """The axes of space made longer, by zeros or by `value`; x: channels last."""
    if not any(before) and not any(after):
        return x
    space = (n + a + b for n, a, b in zip(x.shape[2:], before, after, strict=True))
    shape = [*x.shape[:2], *space]
    rows = [[0, 0], *([a, b] for a, b in zip(before, after, strict=True)), [0, 0]]
    widths = call.b.constant(torch.tensor(rows, dtype=torch.int32), "padding")
    if value is None:
        return call.step("PAD", [x, widths], shape, last=True, table="Pad")
    fill = call.b.constant(value.to(x.dtype), f"{call.name}/border", quant=x.quant)
    return call.step("PADV2", [x, widths, fill], shape, last=True, table="PadV2")


# ------------------------------------------------------------------ convolutions


def conv(call: Call) -> Value:
    """CONV_2D, DEPTHWISE_CONV_2D: weights [O, H, W, I/groups], or [1, H, W, O] where each channel has its own."""
    weight_shape = [call.b.size(n) for n in shape_of(call["weight"])]
    ndim, groups = len(weight_shape) - 2, call["groups"]
    if ndim > 2:
        return _conv3d(call)
    outputs, inside = weight_shape[:2]
    kernel = (1, weight_shape[2]) if ndim == 1 else (weight_shape[2], weight_shape[3])
    stride, dilation = _row_options(call["stride"], ndim, 1), _row_options(call["dilation"], ndim, 1)
    padding = _padding(call, kernel, dilation, ndim)
    depthwise = groups > 1 and inside == 1
    x = _planes(call, call.read("input", last=True), shape_of(call["input"]))
    before, after = zip(*padding, strict=True)
    same = before == after and _same(x.shape[2:], _plane_shape(call)[2:], kernel, stride, before, dilation)
    x = x if same else _padded(call, x, before, after, None)
    weight, bias = _weights(call, ndim, depthwise), _bias(call, outputs)
    options: dict[str, Any] = {
        "padding": SAME if same else VALID, "strideH": stride[0], "strideW": stride[1],
        "dilationHFactor": dilation[0], "dilationWFactor": dilation[1],
    }  # fmt: skip
    if depthwise:
        options |= {"table": "DepthwiseConv2D", "depthMultiplier": outputs // groups}
    else:
        options |= {"table": "Conv2D"}
    kind = "DEPTHWISE_CONV_2D" if depthwise else "CONV_2D"
    return _finish(call, call.give(kind, [x, weight, bias], _plane_shape(call), last=True, options=options))


def _padding(call: Call, kernel: Sequence[int], dilation: Sequence[int], ndim: int) -> list[tuple[int, int]]:
    given = call["padding"]
    if isinstance(given, str):
        totals = [d * (k - 1) if given == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(p, p) for p in _row_options(given, ndim, 0)]


def _weights(call: Call, ndim: int, depthwise: bool) -> Value:
    """torch's [O, I/groups, *kernel] in the order of TFLite."""

    def turned(weight: Tensor) -> Tensor:
        planes = weight.unsqueeze(2) if ndim == 1 else weight
        return planes.permute(1, 2, 3, 0) if depthwise else planes.permute(0, 2, 3, 1)

    return rearranged(call, "weight", turned, 3 if depthwise else 0)


def rearranged(call: Call, key: str, turned: Any, axis: int) -> Value:
    """A constant operand in another order of axes, its channels along `axis`; a computed one turned while running."""
    given = call[key]
    if isinstance(given, Dequantized) and isinstance(given.source, Tensor):
        quant = placed = given.quant
        if quant is not None and quant.axis is not None:
            placed = Quant(quant.scale, quant.zero_point, quant.low, quant.high, axis)
        source = call.memo(given.source, key, turned)
        name = call.names.get(id(given.source), f"{call.name}/{key}")
        value = call.b.constant(source, name, quant=placed, bits=call.bits(given.source))
        return value if call.integer or call.hybrid else call.b.real(value)
    if isinstance(given, Tensor):
        name = call.names.get(id(given), f"{call.name}/{key}")
        return call.b.constant(call.memo(given, key, turned), name)
    raise ExportError(f"{call.name}: LiteRT takes no {key} that is computed while the network runs")


def _bias(call: Call, outputs: int) -> Value:
    """A bias; zeros where there is none, since kernels want one."""
    given = call["bias"]
    if given is None:
        if not call.integer:
            return call.b.constant(call.zeros(outputs, torch.float32), f"{call.name}/no_bias")
        x, weight = (call[key].quant for key in ("input", "weight"))
        scale = np.float32(x.scale) * weight.scale
        quant = Quant(scale, np.zeros_like(scale, np.int64), axis=0 if scale.ndim else None)
        return call.b.constant(call.zeros(outputs, torch.int32), f"{call.name}/no_bias", quant=quant)
    if isinstance(given, Dequantized) and isinstance(given.source, Tensor):
        q = given.quant
        assert q is not None
        if call.integer:
            return call.stored(given)
        # one of 32 bits, as the plan of a kernel has it that is none here: no operator decodes it
        real = DEQUANTIZE(
            given.source,
            *(torch.from_numpy(n) for n in (q.scale, q.zero_point)),
            -1 if q.axis is None else q.axis,
        )
        return call.b.constant(call.memo(given.source, "real", lambda _: real), call.constant_name(given))
    return call.take(given)


def _conv3d(call: Call) -> Value:
    """CONV_3D: float; weights [D, H, W, I, O]."""
    weight = call["weight"]
    if not isinstance(weight, Tensor) or call["groups"] != 1:
        raise ExportError(f"{call.name}: LiteRT has 3-D convolutions of float weights without groups only")
    stride, dilation, padding = (spread(call[key], 3) for key in ("stride", "dilation", "padding"))
    x = _padded(call, call.read("input", last=True), padding, padding, None)
    w = rearranged(call, "weight", lambda t: t.permute(2, 3, 4, 1, 0), 4)
    options = {
        "table": "Conv3D", "padding": VALID, "strideD": stride[0], "strideH": stride[1], "strideW": stride[2],
        "dilationDFactor": dilation[0], "dilationHFactor": dilation[1], "dilationWFactor": dilation[2],
    }  # fmt: skip
    return call.give("CONV_3D", [x, w, _bias(call, weight.shape[0])], last=True, options=options)


def conv_transpose(call: Call) -> Value:
    """TRANSPOSE_CONV: weights [O, H, W, I]; what its VALID gives beyond torch's result is cut off."""
    shape = shape_of(call["weight"])
    ndim = len(shape) - 2
    if call["groups"] != 1 or ndim > 2:
        raise ExportError(
            f"{call.name}: LiteRT has transposed convolutions of rows and planes, without groups"
        )
    stride = _row_options(call["stride"], ndim, 1)
    padding, dilation = _row_options(call["padding"], ndim, 0), _row_options(call["dilation"], ndim, 1)
    kernel = [d * (k - 1) + 1 for k, d in zip([1, *shape[2:]][-2:], dilation, strict=True)]
    x = _planes(call, call.read("input", last=True), shape_of(call["input"]))

    def turned(weight: Tensor) -> Tensor:
        """[O, H, W, I], with the zeros between that dilation means."""
        planes = weight.unsqueeze(2) if ndim == 1 else weight
        wide = planes.new_zeros([*planes.shape[:2], *kernel])
        wide[:, :, :: dilation[0], :: dilation[1]] = planes
        return wide.permute(1, 2, 3, 0)

    given = call["weight"]
    if isinstance(given, Dequantized) and given.quant and given.quant.zero_point.any() and max(dilation) > 1:
        raise ExportError(f"{call.name}: dilated weights have zeros between them: make them symmetric")
    weight = rearranged(call, "weight", turned, 0)
    out = _plane_shape(call)
    full = [(n - 1) * s + k for n, s, k in zip(x.shape[2:], stride, kernel, strict=True)]
    need = [max(f, n + p) for f, n, p in zip(full, out[2:], padding, strict=True)]
    sizes = dynamic_shape(call, x, [out[0], *full, out[1]])
    options = {"table": "TransposeConv", "padding": VALID, "strideH": stride[0], "strideW": stride[1]}
    reads = [sizes, weight, x, _bias(call, int(shape[1]))]
    exact = not any(padding) and full == list(out[2:])
    if exact:
        return _finish(call, call.give("TRANSPOSE_CONV", reads, out, last=True, options=options))
    made = call.b.emit(
        "TRANSPOSE_CONV", reads, [out[0], out[1], *full], name=f"{call.name}/full", last=True, options=options
    )
    made = _padded(call, made, (0, 0), [n - f for n, f in zip(need, full, strict=True)], None)
    begin = call.b.integers([0, *padding, 0])
    end = call.b.integers([-1, *out[2:], -1])
    cut = call.give("SLICE", [made, begin, end], out, last=True, options={"table": "Slice"})
    return _finish(call, cut)


def dynamic_shape(call: Call, like: Value, stored: Sequence[Size]) -> Value:
    """A shape as a tensor, its first axis taken from `like` where that is dynamic."""
    if all(isinstance(size, int) for size in stored):
        return call.b.integers(stored)
    if any(not isinstance(size, int) for size in stored[1:]):
        raise ExportError(f"{call.name}: LiteRT can't make the shape {list(map(str, stored))} while running")
    return call.b.shape_like(like, stored, call.name)


# ------------------------------------------------------------------ products


def linear(call: Call) -> Value:
    """FULLY_CONNECTED with a weight [O, I]. Float inputs and an int8 weight: its hybrid kernel, or a decoded weight."""
    outputs = call.b.size(shape_of(call["weight"])[0])
    weight = call["weight"]
    if isinstance(weight, Value) or (isinstance(weight, Dequantized) and isinstance(weight.source, Value)):
        w = call.read("weight")
    else:
        w = rearranged(call, "weight", lambda t: t, 0)
    options = {"table": "FullyConnected", "keepNumDims": True}
    ranged = isinstance(call["input"], Ranged)
    options["asymmetricQuantizeInputs"] = ranged
    bias = None if call["bias"] is None and not call.integer else _bias(call, outputs)
    return call.give("FULLY_CONNECTED", [call.read("input", last=False), w, bias], options=options)


def matmul(call: Call) -> Value:
    """BATCH_MATMUL; vectors get an axis and lose it again."""
    first, second = ("self", "mat2" if "mat2" in call.args else "other")
    a, b = call.read(first, last=False), call.read(second, last=False)
    shape = list(call.shape)
    made = list(shape)
    if a.rank == 1:
        a = call.b.reshaped(a, [1, a.shape[0]])
        made.insert(len(made) - (b.rank > 1), 1)
    if b.rank == 1:
        b = call.b.reshaped(b, [b.shape[0], 1])
        made.append(1)
    options = {"table": "BatchMatMul", "adjX": False, "adjY": False}
    result = call.give("BATCH_MATMUL", [a, b], made, options=options)
    return result if made == shape else call.b.reshaped(result, shape, name=call.label)


def addmm(call: Call) -> Value:
    """β·self + α·mat1·mat2."""
    if call["beta"] != 1 or call["alpha"] != 1:
        raise ExportError(f"{call.name}: LiteRT gets no scaled sum of a product")
    a, b = call.read("mat1", last=False), call.read("mat2", last=False)
    options = {"table": "BatchMatMul", "adjX": False, "adjY": False}
    product = call.step("BATCH_MATMUL", [a, b], call.shape, **options)
    return call.give("ADD", [product, call.read("self", last=False)], options={"table": "Add"})


def embedding(call: Call) -> Value:
    """GATHER of rows of a table, of its integers where it is a quantized one that is moved."""
    table, ids = call["weight"], call.read("indices")
    quant = None
    if isinstance(table, Tensor) and not table.is_floating_point():
        quant = call.follows()
        source = call.b.constant(table, call.names.get(id(table), f"{call.name}/table"), quant=quant)
    else:
        source = call.take(table)
    ids = as_int32(call, ids)
    return call.give("GATHER", [source, ids], options={"table": "Gather", "axis": 0}, quant=quant)


def as_int32(call: Call, ids: Value) -> Value:
    if ids.dtype != torch.int64:
        return ids
    return call.step(
        "CAST", [ids], ids.shape, dtype=torch.int32, last=ids.last, table="Cast", inDataType=4, outDataType=2
    )


# ------------------------------------------------------------------ pools


def _pool(call: Call, kind: str, kernel: Any, stride: Any, padding: Any, ndim: int, *, zeros: bool) -> Value:
    """zeros: what is beyond the border counts as 0."""
    k = _row_options(kernel, ndim, 1)
    s = _row_options(stride or kernel, ndim, 1)
    p = _row_options(padding, ndim, 0)
    moved = isinstance(call["self"], Value) and call["self"].quant is not None and not call.integer
    x = call["self"] if moved else call.read("self")
    x = _planes(call, call.b.arranged(x, True), shape_of(call["self"]))
    out = _plane_shape(call)
    same = (not zeros or not any(p)) and _same(x.shape[2:], out[2:], k, s, p, (1, 1))
    if not same:
        # what a window needs beyond the end, as ceil_mode lets it be
        after = [
            max((made - 1) * stride_ + size - n - before, 0)
            for made, stride_, size, n, before in zip(out[2:], s, k, x.shape[2:], p, strict=True)
        ]
        if kind == "MAX_POOL_2D":
            lowest = torch.iinfo(x.dtype).min if x.quant is not None else torch.finfo(torch.float32).min
            x = _padded(call, x, p, after, torch.tensor(lowest))
        elif not any(p) and not any(after):
            pass
        elif not any(p) and all(size == 1 for size in out[2:]):
            return _finish(call, _mean_of_space(call, x, out))  # one window, cut by the border
        elif zeros and call["ceil_mode"] is not True:
            x = _padded(call, x, p, after, None)
        else:
            raise ExportError(f"{call.name}: LiteRT has no average pool with this padding")
    options = {
        "table": "Pool2D", "padding": SAME if same else VALID, "strideH": s[0], "strideW": s[1],
        "filterHeight": k[0], "filterWidth": k[1],
    }  # fmt: skip
    if moved:
        made = call.b.emit(
            kind, [x], out, name=call.name, dtype=x.dtype, quant=x.quant, last=True, options=options
        )
    else:
        made = call.give(kind, [x], out, last=True, options=options)
    return _finish(call, made)


def _mean_of_space(call: Call, x: Value, out: Sequence[Size]) -> Value:
    axes = call.b.integers([1, 2])
    return call.give("MEAN", [x, axes], out, last=True, options={"table": "Reducer", "keepDims": True})


def max_pool(call: Call) -> Any:
    ndim = len(shape_of(call["self"])) - 2
    if ndim > 2 or any(d != 1 for d in spread(call["dilation"], ndim)):
        raise ExportError(f"{call.name}: LiteRT has no dilated or 3-D max-pools")
    return _pool(call, "MAX_POOL_2D", call["kernel_size"], call["stride"], call["padding"], ndim, zeros=False)


def avg_pool(call: Call) -> Value:
    ndim = len(shape_of(call["self"])) - 2
    if ndim > 2 or call["divisor_override"]:
        raise ExportError(
            f"{call.name}: LiteRT has no 3-D average pools, and none with a divisor of their own"
        )
    return _pool(
        call, "AVERAGE_POOL_2D", call["kernel_size"], call["stride"], call["padding"], ndim,
        zeros=bool(call["count_include_pad"]),
    )  # fmt: skip


def adaptive_avg_pool(call: Call) -> Value:
    """MEAN over the space; a pool where windows are alike, a mean per window where they aren't."""
    x = call.read("self", last=True)
    space, out = x.shape[2:], call.shape[2:]
    if all(size == 1 for size in out):
        axes = call.b.integers(list(range(1, x.rank - 1)))
        return call.give("MEAN", [x, axes], last=True, options={"table": "Reducer", "keepDims": True})
    if any(not isinstance(n, int) for n in space) or x.rank > 4:
        raise ExportError(f"{call.name}: adaptive pooling needs image sizes that are fixed")
    if all(n % m == 0 for n, m in zip(space, out, strict=True)):
        kernel = [n // m for n, m in zip(space, out, strict=True)]
        return _pool(call, "AVERAGE_POOL_2D", kernel, kernel, 0, len(space), zeros=True)
    for axis, (n, m) in enumerate(zip(space, out, strict=True), start=1):
        parts = []
        for i in range(m):
            begin, end = i * n // m, -(-(i + 1) * n // m)
            offsets, lengths = [0] * x.rank, [-1] * x.rank
            offsets[axis], lengths[axis] = begin, end - begin
            shape = [*x.shape]
            shape[axis + 1] = end - begin
            cut = call.step(
                "SLICE",
                [x, call.b.integers(offsets), call.b.integers(lengths)],
                shape,
                last=True,
                table="Slice",
            )
            shape[axis + 1] = 1
            parts.append(
                call.step(
                    "MEAN", [cut, call.b.integers([axis])], shape, last=True, table="Reducer", keepDims=True
                )
            )
        shape = [*x.shape]
        shape[axis + 1] = m
        x = call.step("CONCATENATION", parts, shape, last=True, table="Concatenation", axis=axis)
    return x


def resize(call: Call) -> Value:
    """RESIZE_BILINEAR, RESIZE_NEAREST_NEIGHBOR."""
    x = call.read("self" if "self" in call.args else "input", last=True)
    if x.rank != 4 or any(not isinstance(n, int) for n in call.shape[2:]):
        raise ExportError(f"{call.name}: LiteRT resizes planes to sizes that are known beforehand")
    size = call.b.integers(list(call.shape[2:]))
    corners = bool(call["align_corners"])
    if "bilinear" in str(call.node.target):
        options = {"table": "ResizeBilinear", "alignCorners": corners, "halfPixelCenters": not corners}
        return call.give("RESIZE_BILINEAR", [x, size], last=True, options=options)
    options = {"table": "ResizeNearestNeighbor", "alignCorners": False, "halfPixelCenters": False}
    return call.give("RESIZE_NEAREST_NEIGHBOR", [x, size], last=True, options=options)


ROWS: dict[Any, Row] = {
    aten.conv1d.default: conv,
    aten.conv2d.default: conv,
    aten.conv3d.default: conv,
    aten.conv1d.padding: conv,
    aten.conv2d.padding: conv,
    aten.conv_transpose1d.default: conv_transpose,
    aten.conv_transpose2d.input: conv_transpose,
    aten.linear.default: linear,
    aten.matmul.default: matmul,
    aten.mm.default: matmul,
    aten.bmm.default: matmul,
    aten.addmm.default: addmm,
    aten.embedding.default: embedding,
    aten.max_pool1d.default: max_pool,
    aten.max_pool2d.default: max_pool,
    aten.avg_pool1d.default: avg_pool,
    aten.avg_pool2d.default: avg_pool,
    aten.adaptive_avg_pool1d.default: adaptive_avg_pool,
    aten.adaptive_avg_pool2d.default: adaptive_avg_pool,
    aten.upsample_bilinear2d.vec: resize,
    aten.upsample_nearest2d.vec: resize,
    aten.upsample_bilinear2d.default: resize,
    aten.upsample_nearest2d.default: resize,
}
