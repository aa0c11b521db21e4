"""Sums, means, norms and softmax as TFLite operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import ExportError
from ._build import Value
from .convert import Call, Row
from .elementwise import cast, operands

aten = torch.ops.aten
REDUCER = {"table": "Reducer"}


def _dims(call: Call, rank: int) -> list[int]:
    dims = call["dim"]
    if dims is None or dims == []:
        return list(range(rank))
    return [dim % rank for dim in (dims if isinstance(dims, list | tuple) else [dims])]


def reduce(kind: str, key: str = "self") -> Row:
    """Over some axes; the layout stays where they are kept, or where only the space goes."""

    def write(call: Call) -> Value:
        x = call.read(key)
        dims, keep = _dims(call, x.rank), bool(call["keepdim"])
        if call.result.dtype != x.dtype and x.quant is None and x.dtype != torch.bool:
            x = cast(call, x, call.result.dtype)
        if not keep and x.last and set(range(2, x.rank)) - set(dims):
            x = call.b.arranged(x, False)
        axes = call.b.integers(sorted(x.axis(dim) for dim in dims))
        return call.give(kind, [x, axes], last=keep and x.last, options=REDUCER | {"keepDims": keep})

    return write


def arg(kind: str, table: str) -> Row:
    def write(call: Call) -> Value:
        x = call.read("self", last=False)
        if call["dim"] is None:
            raise ExportError(f"{call.name}: LiteRT looks for the largest along one axis")
        dim = call["dim"] % x.rank
        axis = call.b.constant(torch.tensor(dim, dtype=torch.int32), "axis")
        shape = [size for d, size in enumerate(x.shape) if d != dim]
        made = call.b.emit(
            kind,
            [x, axis],
            shape,
            name=call.name,
            dtype=torch.int64,
            options={"table": table, "outputType": 4},
        )
        return call.b.reshaped(made, call.shape) if call["keepdim"] else made

    return write


def softmax(call: Call) -> Value:
    """SOFTMAX works along the last axis; others are brought there."""
    x = call.read("self")
    dim = call["dim"] % x.rank
    if x.last and x.axis(dim) == x.rank - 1:
        return call.give("SOFTMAX", [x], last=True, options={"table": "Softmax", "beta": 1.0})
    x = call.b.arranged(x, False)
    if dim == x.rank - 1:
        return call.give("SOFTMAX", [x], options={"table": "Softmax", "beta": 1.0})
    dims = [d for d in range(x.rank) if d != dim] + [dim]
    back = [dims.index(d) for d in range(x.rank)]
    shape = [x.shape[d] for d in dims]
    turned = call.step("TRANSPOSE", [x, call.b.integers(dims)], shape, table="Transpose")
    made = call.give("SOFTMAX", [turned], shape, options={"table": "Softmax", "beta": 1.0})
    return call.b.emit(
        "TRANSPOSE", [made, call.b.integers(back)], x.shape, name=f"{call.name}/back", dtype=made.dtype,
        quant=made.quant, options={"table": "Transpose"},
    )  # fmt: skip


def log_softmax(call: Call) -> Value:
    x = call.read("self", last=False)
    if call["dim"] % x.rank != x.rank - 1:
        raise ExportError(f"{call.name}: LiteRT has log_softmax along the last axis only")
    return call.give("LOG_SOFTMAX", [x], options={"table": "LogSoftmax"})


def _affine(call: Call, x: Value, kind: str, given: Any, last_step: bool) -> Value:
    (a, b), last = operands(call, [x, given], torch.float32)
    table = {"MUL": "Mul", "ADD": "Add"}[kind]
    if last_step:
        return call.give(kind, [a, b], last=last, options={"table": table})
    return call.step(kind, [a, b], x.shape, last=last, table=table)


def _normalised(call: Call, x: Value, axes: list[int], eps: float, *, centre: bool, last_step: bool) -> Value:
    """(x − mean) / √(mean square + eps) over stored axes."""
    kept = [1 if axis in axes else size for axis, size in enumerate(x.stored(x.shape))]
    shape = [kept[x.axis(dim)] for dim in range(x.rank)]
    over = call.b.integers(axes)

    def mean(value: Value) -> Value:
        return call.step("MEAN", [value, over], shape, last=x.last, keepDims=True, **REDUCER)

    if centre:
        x = call.step("SUB", [x, mean(x)], x.shape, last=x.last, table="Sub")
    square = call.step("MUL", [x, x], x.shape, last=x.last, table="Mul")
    small = call.b.constant(torch.tensor(eps, dtype=torch.float32), f"{call.name}/eps")
    spread = call.step("ADD", [mean(square), small], shape, last=x.last, table="Add")
    root = call.step("RSQRT", [spread], shape, last=x.last)
    if last_step:
        return call.give("MUL", [x, root], x.shape, last=x.last, options={"table": "Mul"})
    return call.step("MUL", [x, root], x.shape, last=x.last, table="Mul")


def layer_norm(call: Call) -> Value:
    centre = "bias" in call.args
    x = call.read("input", last=False)
    size = len(call["normalized_shape"])
    weight, bias = call["weight"], call["bias"]
    eps = call["eps"] if call["eps"] is not None else torch.finfo(torch.float32).eps
    plain = weight is None and bias is None
    x = _normalised(call, x, list(range(x.rank - size, x.rank)), eps, centre=centre, last_step=plain)
    if weight is not None:
        x = _affine(call, x, "MUL", weight, bias is None)
    return x if bias is None else _affine(call, x, "ADD", bias, True)


def group_norm(call: Call) -> Value:
    """Statistics of groups of channels: each a row of its own meanwhile."""
    x = call.read("input", last=False)
    groups = call["num_groups"]
    width = 1
    for size in x.shape[1:]:
        width = width * size
    rows = call.b.reshaped(x, [x.shape[0], groups, width // groups])
    made = _normalised(call, rows, [2], call["eps"], centre=True, last_step=False)
    weight, bias = call["weight"], call["bias"]
    made = call.b.reshaped(made, x.shape, name=call.name)
    ones = [1] * (x.rank - 2)
    for kind, given in (("MUL", weight), ("ADD", bias)):
        if isinstance(given, Tensor):
            made = _affine(call, made, kind, call.memo(given, kind, lambda t: t.reshape(-1, *ones)), False)
        elif given is not None:
            made = _affine(call, made, kind, call.b.reshaped(call.take(given), [x.shape[1], *ones]), False)
    return made


def batch_norm(call: Call) -> Value | tuple[Value, None, None]:
    """With the statistics that it has: a product and a sum per channel. Decomposed it gives three tensors."""
    mean, var, weight, bias = (call[key] for key in ("running_mean", "running_var", "weight", "bias"))
    if call["training"] or mean is None:
        raise ExportError(f"{call.name}: LiteRT takes no statistics of a batch")
    if any(given is not None and not isinstance(given, Tensor) for given in (mean, var, weight, bias)):
        raise ExportError(f"{call.name}: LiteRT takes no statistics and weights that the network computes")
    x = call.read("input")
    factor = torch.rsqrt(var.double() + call["eps"]) * (1 if weight is None else weight.double())
    offset = (0 if bias is None else bias.double()) - mean.double() * factor
    ones = [1] * (x.rank - 2)
    for kind, values, is_last in (("MUL", factor, False), ("ADD", offset, True)):
        x = _affine(call, x, kind, values.float().reshape(-1, *ones), is_last)
    return (x, None, None) if isinstance(call.result, tuple | list) else x


def vector_norm(call: Call) -> Value:
    """√Σx²."""
    if call["ord"] != 2:
        raise ExportError(f"{call.name}: LiteRT gets no norms but the Euclidean one")
    x = call.read("self", last=False)
    axes, keep = _dims(call, x.rank), bool(call["keepdim"])
    square = call.step("MUL", [x, x], x.shape, table="Mul")
    total = call.step("SUM", [square, call.b.integers(axes)], call.shape, keepDims=keep, **REDUCER)
    return call.give("SQRT", [total])


def cumsum(call: Call) -> Value:
    x = call.read("self", last=False)
    if x.dtype != call.result.dtype:
        x = cast(call, x, call.result.dtype)
    axis = call.b.constant(torch.tensor(call["dim"] % x.rank, dtype=torch.int32), "axis")
    return call.give("CUMSUM", [x, axis], options={"table": "Cumsum"})


def largest(call: Call) -> tuple[Any, Any]:
    """max and min along an axis: values, and where they are if that is asked for."""
    x = call.read("self", last=False)
    dim, keep = call["dim"] % x.rank, bool(call["keepdim"])
    up = "max" in str(call.node.target)
    shape = tuple(call.result[0].shape)
    values = call.b.emit(
        "REDUCE_MAX" if up else "REDUCE_MIN", [x, call.b.integers([dim])], shape, name=call.name,
        options=REDUCER | {"keepDims": keep},
    )  # fmt: skip
    return values, None


def topk(call: Call) -> tuple[Value, Value]:
    """TOPK_V2, along the last axis."""
    x = call.read("self", last=False)
    if call["dim"] % x.rank != x.rank - 1 or not call["largest"]:
        raise ExportError(f"{call.name}: LiteRT finds the largest along the last axis only")
    values, places = (tuple(part.shape) for part in call.result)
    k = call.b.constant(torch.tensor(call["k"], dtype=torch.int32), "k")
    first = call.b.empty(values, call.name, x.dtype)
    second = call.b.empty(places, f"{call.name}/places", torch.int32)
    call.b.file.operator("TOPK_V2", [x.index, k.index], [first.index, second.index], {"table": "TopKV2"})
    return first, cast(call, second, torch.int64)


ROWS: dict[Any, Row] = {
    aten.mean.dim: reduce("MEAN"),
    aten.mean.default: reduce("MEAN"),
    aten.sum.dim_IntList: reduce("SUM"),
    aten.sum.default: reduce("SUM"),
    aten.amax.default: reduce("REDUCE_MAX"),
    aten.amin.default: reduce("REDUCE_MIN"),
    aten.prod.dim_int: reduce("REDUCE_PROD"),
    aten.prod.default: reduce("REDUCE_PROD"),
    aten.any.dim: reduce("REDUCE_ANY"),
    aten.any.default: reduce("REDUCE_ANY"),
    aten.all.default: reduce("REDUCE_ALL"),
    aten.all.dim: reduce("REDUCE_ALL"),
    aten.max.dim: largest,
    aten.min.dim: largest,
    aten.argmax.default: arg("ARG_MAX", "ArgMax"),
    aten.argmin.default: arg("ARG_MIN", "ArgMin"),
    aten.softmax.int: softmax,
    aten._softmax.default: softmax,
    aten.log_softmax.int: log_softmax,
    aten._log_softmax.default: log_softmax,
    aten.layer_norm.default: layer_norm,
    aten.rms_norm.default: layer_norm,
    aten.group_norm.default: group_norm,
    **dict.fromkeys((aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default), batch_norm),
    aten.cumsum.default: cumsum,
    aten.linalg_vector_norm.default: vector_norm,
    aten.topk.default: topk,
}
