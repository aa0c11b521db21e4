"""Operators that pick, place and order: gathers, scatters, sorts, sums along the way."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ._calls import Array, Call, Value, operator, tensor

MERGED = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _wrapped(index: Tensor, length: Any) -> Tensor:
    index = index.to(torch.int64)
    return torch.where(index < 0, index + length, index)


def _gather_known(call: Call, x: Array, index: Array) -> Array:
    return np.asarray(np.take(x, index.astype(np.int64), axis=call.attr("axis", 0)))


@operator("Gather", params={0: "weight"}, known=_gather_known)
def gather(call: Call, x: Value, index: Value) -> Value:
    """Rows of a table by numbers that depend on data are an embedding."""
    x, axis = tensor(x), call.attr("axis", 0)
    if isinstance(index, np.ndarray) and index.dtype != object:
        picked = [int(i) for i in index.reshape(-1)]
        if index.ndim == 0:
            return x.select(axis, picked[0])
        if len(picked) == 1:
            return x.narrow(axis, picked[0] % x.shape[axis], 1).reshape(
                [*x.shape[:axis], *index.shape, *x.shape[axis:][1:]]
            )
    found = tensor(index)
    if axis == 0 and x.dim() == 2 and x.is_floating_point():
        return F.embedding(
            _wrapped(found, x.shape[0]) if _may_be_negative(index) else found.to(torch.int64), x
        )
    axis = axis % x.dim()
    flat = x.index_select(axis, _wrapped(found.reshape(-1), x.shape[axis]))
    return flat.reshape([*x.shape[:axis], *found.shape, *x.shape[axis + 1 :]])


def _may_be_negative(index: Value) -> bool:
    return isinstance(index, np.ndarray) and bool((np.asarray(index) < 0).any())


@operator("GatherElements")
def gather_elements(call: Call, x: Value, index: Value) -> Value:
    x, axis = tensor(x), call.attr("axis", 0)
    return torch.gather(x, axis, _wrapped(tensor(index), x.shape[axis]))


def _flat_index(index: Tensor, sizes: list[Any]) -> Tensor:
    """Indices [..., K] into axes of the sizes given, as numbers of elements [...]."""
    found = torch.zeros_like(index[..., 0], dtype=torch.int64)
    for position, length in enumerate(sizes):
        found = found * length + _wrapped(index[..., position], length)
    return found


@operator("GatherND")
def gather_nd(call: Call, x: Value, index: Value) -> Value:
    x, index, batch = tensor(x), tensor(index), call.attr("batch_dims", 0)
    depth = index.shape[-1]
    sizes, rest = list(x.shape[batch : batch + depth]), list(x.shape[batch + depth :])
    lead = list(x.shape[:batch])
    flat = _flat_index(index, sizes)
    if not batch:
        return x.reshape(-1, *rest)[flat]
    rows = x.reshape(*lead, -1, *rest).flatten(0, batch - 1)
    picked = [row[i] for row, i in zip(rows, flat.reshape(rows.shape[0], *flat.shape[batch:]), strict=True)]
    return torch.stack(picked).reshape(*lead, *flat.shape[batch:], *rest)


@operator("ScatterElements", "Scatter")
def scatter_elements(call: Call, x: Value, index: Value, updates: Value) -> Value:
    x, axis = tensor(x), call.attr("axis", 0)
    index, how = _wrapped(tensor(index), x.shape[axis]), _how(call)
    if how == "none":
        return x.scatter(axis, index, tensor(updates))
    return x.scatter_reduce(axis, index, tensor(updates), MERGED[how])


def _how(call: Call) -> str:
    return str(call.attr("reduction", "none"))


@operator("ScatterND")
def scatter_nd(call: Call, x: Value, index: Value, updates: Value) -> Value:
    x, index, updates = tensor(x), tensor(index), tensor(updates)
    depth = index.shape[-1]
    rest = list(x.shape[depth:])
    flat = _flat_index(index, list(x.shape[:depth])).reshape(-1)
    rows, new = x.reshape(-1, *rest), updates.reshape(-1, *rest)
    how = _how(call)
    if how == "none":
        return rows.index_copy(0, flat, new).reshape(x.shape)
    where = flat.reshape([-1] + [1] * len(rest)).expand(new.shape)
    return rows.scatter_reduce(0, where, new, MERGED[how]).reshape(x.shape)


@operator("TensorScatter")
def tensor_scatter(call: Call, past: Value, update: Value, at: Value = None) -> Value:
    past, update, axis = tensor(past), tensor(update), call.attr("axis", -2)
    axis = axis % past.dim()
    starts = torch.zeros(past.shape[0], dtype=torch.int64) if at is None else tensor(at).to(torch.int64)
    steps = starts[:, None] + torch.arange(update.shape[axis])[None, :]
    if call.attr("mode", "linear") == "circular":
        steps = steps % past.shape[axis]
    shape = [past.shape[0]] + [1] * (past.dim() - 1)
    shape[axis] = update.shape[axis]
    return past.scatter(axis, steps.reshape(shape).expand(update.shape), update)


@operator("Compress")
def compress(call: Call, x: Value, condition: Value) -> Value:
    x, kept = tensor(x), np.asarray(call.ints(condition, "condition"), dtype=bool)
    axis = call.attr("axis")
    if axis is None:
        x, axis = x.reshape(-1), 0
    return x.index_select(axis, torch.from_numpy(np.flatnonzero(kept)))


# --------------------------------------------------------------------------- order


@operator("ArgMax", "ArgMin")
def arg(call: Call, x: Value) -> Value:
    x, axis, keep = tensor(x), call.attr("axis", 0), bool(call.attr("keepdims", 1))
    pick = torch.argmax if call.kind == "ArgMax" else torch.argmin
    if not call.attr("select_last_index", 0):
        return pick(x, axis, keepdim=keep)
    return x.shape[axis] - 1 - pick(x.flip(axis), axis, keepdim=keep)


@operator("TopK")
def top_k(call: Call, x: Value, k: Value = None) -> tuple[Tensor, Tensor]:
    x, axis = tensor(x), call.attr("axis", -1)
    count = call.attr("k") if k is None else call.number(k, "k")
    largest = bool(call.attr("largest", 1))
    values, indices = torch.sort(x, dim=axis, descending=largest, stable=True)
    return values.narrow(axis, 0, count), indices.narrow(axis, 0, count)


@operator("CumSum")
def cum_sum(call: Call, x: Value, axis: Value) -> Value:
    return _running(call, x, axis, torch.cumsum, 0)


@operator("CumProd")
def cum_prod(call: Call, x: Value, axis: Value) -> Value:
    return _running(call, x, axis, torch.cumprod, 1)


def _running(call: Call, x: Value, axis: Value, run: Any, start: int) -> Value:
    x, dim = tensor(x), int(call.number(axis, "axis"))
    backwards = call.attr("reverse", 0)
    found = x.flip(dim) if backwards else x
    if call.attr("exclusive", 0):
        first = torch.full_like(found.narrow(dim, 0, 1), start)
        found = torch.cat([first, found.narrow(dim, 0, found.shape[dim] - 1)], dim)
    found = run(found, dim).to(x.dtype)
    return found.flip(dim) if backwards else found


@operator("ReverseSequence")
def reverse_sequence(call: Call, x: Value, lengths: Value) -> Value:
    x, count = tensor(x), tensor(lengths).to(torch.int64)
    time, batch = call.attr("time_axis", 0), call.attr("batch_axis", 1)
    steps = torch.arange(x.shape[time])
    turned = torch.where(steps[None, :] < count[:, None], count[:, None] - 1 - steps[None, :], steps[None, :])
    index = turned if batch < time else turned.T
    return x.gather(time, index.reshape(*index.shape, *[1] * (x.dim() - 2)).expand(x.shape))
