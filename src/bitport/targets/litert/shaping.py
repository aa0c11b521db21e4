"""Operators that move numbers as TFLite operators; on integers they keep scale and zero point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import ExportError
from ._build import Size, Value
from .convert import Call, Row, shape_of
from .elementwise import cast
from .layers import as_int32

aten = torch.ops.aten
WHOLE = 2**31 - 1


def moved(call: Call, key: str = "self") -> Value:
    """What is moved: integers as they are."""
    return as_moved(call, call[key])


def as_moved(call: Call, given: Any) -> Value:
    if isinstance(given, Tensor) and given.dtype == torch.int8:  # a constant that integers are joined to
        name = call.names.get(id(given), f"{call.name}/constant")
        return call.b.constant(given, name, quant=call.follows())
    return given if isinstance(given, Value) else call.take(given)


def move(call: Call, kind: str, inputs: Sequence[Value], x: Value, **options: Any) -> Value:
    """An operator whose result has the integers of x."""
    last = options.pop("last", False)
    shape = options.pop("shape", None)
    return call.b.emit(
        kind, inputs, call.shape if shape is None else shape, name=call.name, dtype=x.dtype, quant=x.quant, last=last,
        options=options or None,
    )  # fmt: skip


def view(call: Call) -> Value:
    x = moved(call)
    if tuple(map(str, x.shape)) == tuple(map(str, call.shape)):
        return x
    if x.last and call.b.flat(x):
        x = replace(x, last=False)
    return call.b.reshaped(call.b.arranged(x, False), call.shape, name=call.name)


def permute(call: Call) -> Value:
    x = moved(call)
    dims = call["dims"]
    if dims is None:
        dims = list(range(x.rank))
        a, b = (call["dim0"], call["dim1"]) if "dim0" in call.args else (0, 1)
        if x.rank > 1:
            dims[a], dims[b] = dims[b], dims[a]
    dims = [dim % x.rank for dim in dims]
    there = [x.axis(dim) for dim in dims]
    if there == sorted(there):
        return replace(x, shape=call.shape, last=False)
    return move(call, "TRANSPOSE", [x, call.b.integers(there)], x, table="Transpose")


def expand(call: Call) -> Any:
    x = moved(call)
    if tuple(map(str, x.shape)) == tuple(map(str, call.shape)):
        return x
    x = call.b.arranged(x, False)
    if x.rank < len(call.shape):
        x = call.b.reshaped(x, [1] * (len(call.shape) - x.rank) + list(x.shape))
    dynamic = call.b.dynamic(call.shape)
    if all(
        x.shape[axis] is call.shape[axis] or str(x.shape[axis]) == str(call.shape[axis]) for axis in dynamic
    ):
        times = [
            1 if axis in dynamic or size == x.shape[axis] else size for axis, size in enumerate(call.shape)
        ]
        return move(call, "TILE", [x, call.b.integers(times)], x, table="Tile")
    if dynamic != [0]:
        raise ExportError(
            f"{call.name}: LiteRT can't make the shape {list(map(str, call.shape))} while running"
        )
    sizes = call.b.shape_like(call.converter.inputs[0][1], call.shape, call.name)
    return move(call, "BROADCAST_TO", [x, sizes], x, table="BroadcastTo")


def cut(call: Call, x: Value, dim: int, start: int, end: int, step: int = 1, *, name: str = "") -> Value:
    """Part of an axis; x keeps its layout."""
    size = x.shape[dim]
    if isinstance(size, int):
        start, end = (min(max(n + size if n < 0 else n, 0), size) for n in (start, end))
    begin, stop, stride = [0] * x.rank, [0] * x.rank, [1] * x.rank
    axis = x.axis(dim)
    mask = sum(1 << other for other in range(x.rank) if other != axis)
    begin[axis], stop[axis], stride[axis] = start, min(end, WHOLE), step
    shape = list(x.shape)
    if isinstance(size, int):
        shape[dim] = max(0, -(-(end - start) // step))
    whole_end = mask | (1 << axis if end >= WHOLE else 0)
    return call.b.emit(
        "STRIDED_SLICE", [x, *(call.b.integers(n) for n in (begin, stop, stride))], shape, name=name or call.name,
        dtype=x.dtype, quant=x.quant, last=x.last,
        options={"table": "StridedSlice", "beginMask": mask, "endMask": whole_end},
    )  # fmt: skip


def slice_(call: Call) -> Value:
    x, dim = moved(call), call["dim"]
    dim %= x.rank
    start, end = call["start"] or 0, WHOLE if call["end"] is None else call["end"]
    if not isinstance(start, int) or (not isinstance(end, int) and str(end) != str(x.shape[dim])):
        raise ExportError(f"{call.name}: LiteRT can't slice at a place that is computed while running")
    end = end if isinstance(end, int) else WHOLE
    if start == 0 and call["step"] == 1 and str(x.shape[dim]) == str(call.shape[dim]):
        return x
    return cut(call, x, dim, start, end, call["step"])


def select(call: Call) -> Value:
    x, dim, index = moved(call), call["dim"], call["index"]
    dim %= x.rank
    if not isinstance(index, int):
        raise ExportError(f"{call.name}: LiteRT can't select at a place that is computed while running")
    end = index + 1 if index != -1 else WHOLE
    part = cut(call, x, dim, index, end, name=f"{call.name}/part")
    return call.b.reshaped(call.b.arranged(part, False), call.shape, name=call.name)


def split(call: Call) -> tuple[Value, ...]:
    x, dim = moved(call), call["dim"] % call.rank("self")
    found, start = [], 0
    for part in call.result:
        size = part.shape[dim]
        if not isinstance(size, int):
            raise ExportError(
                f"{call.name}: LiteRT can't split an axis of a length that isn't known beforehand"
            )
        found.append(cut(call, x, dim, start, start + size))
        start += size
    return tuple(found)


def unbind(call: Call) -> tuple[Value, ...]:
    x, dim = moved(call), call["dim"] % call.rank("self")
    found = []
    for index, part in enumerate(call.result):
        piece = cut(call, x, dim, index, index + 1, name=f"{call.name}/part")
        found.append(call.b.reshaped(call.b.arranged(piece, False), tuple(part.shape), name=call.name))
    return tuple(found)


def cat(call: Call) -> Value:
    given = call["tensors"]
    parts = [as_moved(call, v) for v in given if shape_of(v) != (0,)]
    if any(p.quant is None for p in parts):
        parts = [call.b.real(p) for p in parts]
    last = any(p.last for p in parts)
    parts = [call.b.arranged(p, last) for p in parts]
    axis = parts[0].axis(call["dim"])
    return move(call, "CONCATENATION", parts, parts[0], table="Concatenation", axis=axis, last=last)


def stack(call: Call) -> Value:
    parts = [call.b.arranged(as_moved(call, v), False) for v in call["tensors"]]
    dim = call["dim"] % len(call.shape)
    options = {"table": "Pack", "axis": dim, "valuesCount": len(parts)}
    return move(call, "PACK", parts, parts[0], **options)


def pad(call: Call) -> Value:
    """Constant padding; on integers the value is one of them (the lowering gives the zero point)."""
    x = moved(call)
    value, rows = call["value"] or 0, _by_axis(call["pad"], x.rank)
    if any(n < 0 for row in rows for n in row):
        y = x
        for dim, (before, after) in enumerate(rows):
            if before < 0 or after < 0:
                y = cut(call, y, dim, max(-before, 0), -max(-after, 0) if after < 0 else WHOLE)
        if all(n <= 0 for row in rows for n in row):
            return y
        x, rows = y, [[max(n, 0) for n in row] for row in rows]
    widths = call.b.constant(torch.tensor(x.stored(rows), dtype=torch.int32), "padding")
    fill = call.b.constant(torch.tensor(value, dtype=x.dtype), f"{call.name}/value", quant=x.quant)
    return move(call, "PADV2", [x, widths, fill], x, table="PadV2", last=x.last)


def _by_axis(pads: Sequence[int], rank: int) -> list[list[int]]:
    """[before, after] of each axis; torch counts from the last one."""
    rows = [[0, 0] for _ in range(rank)]
    for pair in range(len(pads) // 2):
        rows[rank - 1 - pair] = [pads[2 * pair], pads[2 * pair + 1]]
    return rows


def mirror_pad(call: Call) -> Value:
    x = moved(call)
    rows = x.stored(_by_axis(call["padding"], x.rank))
    widths = call.b.constant(torch.tensor(rows, dtype=torch.int32), "padding")
    return move(call, "MIRROR_PAD", [x, widths], x, table="MirrorPad", mode=0, last=x.last)


def index_select(call: Call) -> Value:
    x = call.b.arranged(moved(call), False)
    ids = as_int32(call, call.take(call["index"]))
    return move(call, "GATHER", [x, ids], x, table="Gather", axis=call["dim"] % x.rank)


def index(call: Call) -> Value:
    """x[…, ids, …]: GATHER along one axis, GATHER_ND along the first ones; others are brought to the front."""
    given = list(call["indices"])
    used = [axis for axis, ids in enumerate(given) if ids is not None]
    x = call.b.arranged(moved(call), False)
    if any(isinstance(i, Tensor) and i.dtype == torch.bool for i in given):
        raise ExportError(
            f"{call.name}: LiteRT can't pick by a mask: how much is picked isn't known beforehand"
        )
    if len(used) == 1:
        (axis,) = used
        ids = as_int32(call, call.take(given[axis]))
        ids = _from_front(call, ids, x.shape[axis])
        return move(call, "GATHER", [x, ids], x, table="Gather", axis=axis)
    rest = [axis for axis in range(x.rank) if axis not in used]
    # what is picked takes the place of neighbours, and is in front of everything where the axes are apart
    place = used[0] if used == list(range(used[0], used[-1] + 1)) else 0
    shape = np.broadcast_shapes(*[tuple(call.b.sizes(shape_of(given[axis]))) for axis in used])
    symbolic = call.shape[place : place + len(shape)]
    parts = []
    for axis in used:
        ids = as_int32(call, call.take(given[axis]))
        ids = _from_front(call, ids, x.shape[axis])
        if tuple(map(str, ids.shape)) != tuple(map(str, symbolic)):
            zeros = filled_with(call, 0, symbolic)
            ids = call.step("ADD", [zeros, ids], symbolic, dtype=torch.int32, table="Add")
        parts.append(ids)
    options = {"table": "Pack", "axis": len(symbolic), "valuesCount": len(parts)}
    ids = call.step("PACK", parts, [*symbolic, len(parts)], **options)
    x = _transposed(call, x, [*used, *rest])
    picked = move(call, "GATHER_ND", [x, ids], x, table="GatherNd", shape=[*symbolic, *x.shape[len(used) :]])
    before = range(len(symbolic), len(symbolic) + place)
    after = range(len(symbolic) + place, picked.rank)
    return _transposed(call, picked, [*before, *range(len(symbolic)), *after])


def _transposed(call: Call, x: Value, dims: Sequence[int]) -> Value:
    """x: without a layout of its own."""
    if list(dims) == sorted(dims):
        return x
    shape = [x.shape[dim] for dim in dims]
    return move(call, "TRANSPOSE", [x, call.b.integers(dims)], x, table="Transpose", shape=shape)


def filled_with(call: Call, value: int, shape: Sequence[Size]) -> Value:
    """int32 numbers, all the same."""
    if all(isinstance(size, int) for size in shape):
        return call.b.constant(torch.full(list(shape), value, dtype=torch.int32), f"{call.name}/full")
    one = call.b.constant(torch.full([1] * len(shape), value, dtype=torch.int32), f"{call.name}/one")
    sizes = call.b.shape_like(call.converter.inputs[0][1], shape, call.name)
    return call.b.emit(
        "BROADCAST_TO", [one, sizes], shape, name=f"{call.name}/zeros", dtype=torch.int32,
        options={"table": "BroadcastTo"},
    )  # fmt: skip


def gather(call: Call) -> Value:
    """x[…, ids]: along the last axis, row by row."""
    x, ids = call.b.arranged(moved(call), False), as_int32(call, call.take(call["index"], last=False))
    dim = call["dim"] % x.rank
    same = [str(n) for n in x.shape[:-1]] == [str(n) for n in ids.shape[:-1]]
    if dim != x.rank - 1 or not same:
        raise ExportError(
            f"{call.name}: LiteRT gathers along the last axis of tensors that are alike otherwise"
        )
    return move(call, "GATHER", [x, ids], x, table="Gather", axis=dim, batchDims=dim)


def _from_front(call: Call, ids: Value, size: Size) -> Value:
    """Places counted from the front: −1 is the last one."""
    if not isinstance(size, int):
        return ids
    length = call.b.constant(torch.tensor(size, dtype=torch.int32), f"{call.name}/length")
    up = call.step("ADD", [ids, length], ids.shape, table="Add")
    return call.step("FLOOR_MOD", [up, length], ids.shape, table="FloorMod")


def arange(call: Call) -> Value:
    """0, 1, … of a length that is known beforehand."""
    if not all(isinstance(size, int) for size in call.shape):
        if call["start"] not in (None, 0) or call["step"] not in (None, 1) or len(call.shape) != 1:
            raise ExportError(f"{call.name}: LiteRT can't count to a number that is computed while running")
        ones = filled_with(call, 1, call.shape)
        total = call.step(
            "CUMSUM",
            [ones, call.b.constant(torch.tensor(0, dtype=torch.int32), "axis")],
            call.shape,
            table="Cumsum",
            exclusive=True,
        )
        return total if call.result.dtype == torch.int32 else cast(call, total, call.result.dtype)
    start, step = call["start"] or 0, call["step"] or 1
    values = torch.arange(call.shape[0], dtype=call.result.dtype) * step + start
    return call.b.constant(values, f"{call.name}/range")


def repeat(call: Call) -> Value:
    x = call.b.arranged(moved(call), False)
    repeats = list(call["repeats"])
    if len(repeats) > x.rank:
        x = call.b.reshaped(x, [1] * (len(repeats) - x.rank) + list(x.shape))
    if all(isinstance(n, int) for n in repeats):
        return move(call, "TILE", [x, call.b.integers(repeats)], x, table="Tile")
    batch, first = call.converter.inputs[0][1], repeats[0]
    if not all(isinstance(n, int) for n in [*repeats[1:], *x.shape]):
        raise ExportError(f"{call.name}: LiteRT can't repeat as often as is computed while running")
    shape = [x.shape[0], *call.shape[1:]]
    wide = move(call, "TILE", [x, call.b.integers([1, *repeats[1:]])], x, table="Tile", shape=shape)
    sizes = call.b.shape_like(batch, [first, *shape], call.name)
    many = [call.b.reshaped(wide, [1, *shape]), sizes]
    again = move(call, "BROADCAST_TO", many, x, table="BroadcastTo", shape=[first, *shape])
    return call.b.reshaped(again, call.shape, name=call.name)


def col2im(call: Call) -> Value:
    """Blocks that don't overlap, side by side: a reshape and a transpose."""
    x = call.b.arranged(moved(call), False)
    kernel, stride = call["kernel_size"], call["stride"]
    if list(kernel) != list(stride) or any(call["padding"]) or any(n != 1 for n in call["dilation"]):
        raise ExportError(f"{call.name}: LiteRT can't add up blocks that overlap")
    batch, channels, *size = call.shape
    across = [n // k for n, k in zip(size, kernel, strict=True)]
    blocks = call.b.reshaped(x, [batch, channels, *kernel, *across])
    return call.b.reshaped(_transposed(call, blocks, [0, 1, 4, 2, 5, 3]), call.shape, name=call.name)


def roll(call: Call) -> Value:
    x = moved(call)
    for shift, dim in zip(call["shifts"], call["dims"], strict=True):
        size = x.shape[dim]
        if not isinstance(size, int):
            raise ExportError(f"{call.name}: LiteRT can't roll an axis of unknown length")
        at = size - shift % size
        if at == size:
            continue
        dim %= x.rank
        parts = [cut(call, x, dim, at, size), cut(call, x, dim, 0, at)]
        x = call.b.emit(
            "CONCATENATION", parts, x.shape, name=call.name, dtype=x.dtype, quant=x.quant, last=x.last,
            options={"table": "Concatenation", "axis": x.axis(dim)},
        )  # fmt: skip
    return x


def flip(call: Call) -> Value:
    x = moved(call)
    axes = call.b.integers([x.axis(dim) for dim in call["dims"]])
    return move(call, "REVERSE_V2", [x, axes], x, table="ReverseV2", last=x.last)


ROWS: dict[Any, Row] = {
    **dict.fromkeys(
        (
            aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
            aten.unflatten.int, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.unsqueeze.default,
            aten._reshape_copy.default,
        ),
        view,
    ),
    **dict.fromkeys(
        (aten.permute.default, aten.transpose.int, aten.t.default, aten.numpy_T.default, aten.mT.default), permute
    ),
    **dict.fromkeys((aten.expand.default, aten.expand_as.default), expand),
    aten.slice.Tensor: slice_,
    aten.narrow.default: lambda call: cut(
        call, moved(call), call["dim"] % call.rank("self"), call["start"], call["start"] + call["length"]
    ),
    aten.select.int: select,
    **dict.fromkeys(
        (aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.chunk.default), split
    ),
    aten.unbind.int: unbind,
    **dict.fromkeys((aten.cat.default, aten.concat.default), cat),
    aten.stack.default: stack,
    aten.constant_pad_nd.default: pad,
    **dict.fromkeys((aten.reflection_pad1d.default, aten.reflection_pad2d.default), mirror_pad),
    aten.index_select.default: index_select,
    aten.index.Tensor: index,
    aten.gather.default: gather,
    **dict.fromkeys((aten.arange.default, aten.arange.start, aten.arange.start_step), arange),
    aten.repeat.default: repeat,
    aten.col2im.default: col2im,
    aten.roll.default: roll,
    aten.flip.default: flip,
}  # fmt: skip
