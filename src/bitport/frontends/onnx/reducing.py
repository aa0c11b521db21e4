"""Reductions over axes, and losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._calls import Array, Call, Value, operator, tensor

Reduction = Callable[[Tensor, list[int], bool], Tensor]


def _prod(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    for dim in sorted((dim % x.dim() for dim in dims), reverse=True):
        x = x.prod(dim, keepdim=keep)
    return x


def _log_sum(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    return x.sum(dims, keepdim=keep).log()


REDUCTIONS: dict[str, Reduction] = {
    "ReduceSum": lambda x, dims, keep: x.sum(dims, keepdim=keep, dtype=x.dtype),
    "ReduceMean": lambda x, dims, keep: _mean(x, dims, keep),
    "ReduceMax": lambda x, dims, keep: _extreme(x, dims, keep, torch.amax),
    "ReduceMin": lambda x, dims, keep: _extreme(x, dims, keep, torch.amin),
    "ReduceProd": _prod,
    "ReduceL1": lambda x, dims, keep: x.abs().sum(dims, keepdim=keep),
    "ReduceL2": lambda x, dims, keep: x.square().sum(dims, keepdim=keep).sqrt(),
    "ReduceLogSum": _log_sum,
    "ReduceLogSumExp": lambda x, dims, keep: torch.logsumexp(x, dims, keepdim=keep),
    "ReduceSumSquare": lambda x, dims, keep: x.square().sum(dims, keepdim=keep),
}  # fmt: skip
KNOWN: dict[str, Any] = {"ReduceProd": np.prod, "ReduceSum": np.sum, "ReduceMax": np.max, "ReduceMin": np.min}


def _mean(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    if x.is_floating_point():
        return x.mean(dims, keepdim=keep)
    return x.double().mean(dims, keepdim=keep).to(x.dtype)


def _extreme(x: Tensor, dims: list[int], keep: bool, pick: Callable[..., Tensor]) -> Tensor:
    if 0 in [x.shape[dim] for dim in dims]:  # of nothing: the smallest or largest number there is
        shape = [1 if i in [d % x.dim() for d in dims] else n for i, n in enumerate(x.shape)]
        fill = float("-inf") if pick is torch.amax else float("inf")
        if not x.is_floating_point():
            info = torch.iinfo(x.dtype)
            fill = info.min if pick is torch.amax else info.max
        found = torch.full(shape, fill, dtype=x.dtype)
        return found if keep else found.squeeze(tuple(dims))
    if x.dtype == torch.bool:
        return pick(x.to(torch.uint8), dims, keepdim=keep).bool()
    return pick(x, dims, keepdim=keep)


def _axes(call: Call, rank: int, given: Value) -> list[int] | None:
    found = call.axes(given)
    if not found:
        return None if call.attr("noop_with_empty_axes", 0) else list(range(rank))
    return found


def _reduction(name: str, compute: Reduction) -> None:
    def run(call: Call, x: Value, axes: Value = None) -> Value:
        x = tensor(x)
        dims = _axes(call, x.dim(), axes)
        if dims is None:
            return elementwise[name](x) if name in elementwise else x
        return compute(x, dims, bool(call.attr("keepdims", 1))) if dims else compute(x[None], [0], False)

    def known(call: Call, x: Array, axes: Value = None) -> Array:
        dims = _axes(call, x.ndim, axes)
        if dims is None:
            return x
        return np.asarray(KNOWN[name](x, axis=tuple(dims), keepdims=bool(call.attr("keepdims", 1))))

    operator(name, known=known if name in KNOWN else None)(run)


# what a reduction over no axes is, where it isn't the value itself
elementwise: dict[str, Callable[[Tensor], Tensor]] = {
    "ReduceL1": torch.abs, "ReduceL2": torch.abs, "ReduceLogSum": torch.log, "ReduceSumSquare": torch.square,
}  # fmt: skip
for _name, _compute in REDUCTIONS.items():
    _reduction(_name, _compute)


# --------------------------------------------------------------------------- losses


def _reduced(call: Call, lost: Tensor, weight: Tensor) -> Value:
    how = call.attr("reduction", "mean")
    if how == "none":
        return lost
    return lost.sum() if how == "sum" else lost.sum() / weight.sum()


def _lost(call: Call, log: Tensor, target: Value, weight: Value) -> Value:
    """−w_t · log p_t at every place, then reduced. log: [N, C, …]; target [N, …]."""
    wanted, ignored = tensor(target).to(torch.int64), call.attr("ignore_index")
    kept = torch.ones_like(wanted, dtype=torch.bool) if ignored is None else wanted != ignored
    safe = torch.where(kept, wanted, torch.zeros_like(wanted))
    own = torch.ones(log.shape[1], dtype=log.dtype) if weight is None else tensor(weight)
    each = own[safe] * kept.to(log.dtype)
    return _reduced(call, -log.gather(1, safe.unsqueeze(1)).squeeze(1) * each, each)


@operator("NegativeLogLikelihoodLoss")
def nll(call: Call, x: Value, target: Value, weight: Value = None) -> Value:
    return _lost(call, tensor(x), target, weight)


@operator("SoftmaxCrossEntropyLoss")
def cross_entropy(call: Call, x: Value, target: Value, weight: Value = None) -> Any:
    log = torch.log_softmax(tensor(x), 1)
    found = _lost(call, log, target, weight)
    return found if call.outputs == 1 else (found, log)
