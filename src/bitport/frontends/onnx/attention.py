"""Attention and what comes with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ._calls import Call, Value, operator, tensor
from .elementwise import DTYPES


def _heads(x: Tensor, count: Any) -> Tensor:
    """[N, L, H·E] → [N, H, L, E]; what has four axes already stays."""
    if x.dim() == 4:
        return x
    return x.reshape(x.shape[0], x.shape[1], count, -1).transpose(1, 2)


@operator("Attention")
def attention(
    call: Call, q: Value, k: Value, v: Value, mask: Value = None, past_k: Value = None, past_v: Value = None,
    lengths: Value = None,
) -> Any:  # fmt: skip
    """softmax(scale·Q Kᵀ + mask) V, with caches, grouped heads and soft caps."""
    query = _heads(tensor(q), call.attr("q_num_heads"))
    key, value = (_heads(tensor(x), call.attr("kv_num_heads")) for x in (k, v))
    flat = tensor(q).dim() == 3
    before = 0
    if past_k is not None and past_v is not None:
        before = tensor(past_k).shape[2]
        key, value = torch.cat([tensor(past_k), key], 2), torch.cat([tensor(past_v), value], 2)
    present = key, value
    groups = query.shape[1] // key.shape[1]
    if groups != 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = call.attr("scale") or query.shape[-1] ** -0.5
    bias = _bias(call, query, key, mask, lengths, before)
    guarded = (bias is not None and mask is not None) or lengths is not None or call.attr("is_causal", 0)
    if (
        not call.attr("softcap", 0.0)
        and call.outputs < 4
        and call.attr("softmax_precision") is None
        and not guarded
    ):
        y = F.scaled_dot_product_attention(query, key, value, bias, scale=scale)
        return _told(call, y, flat, present, None)
    products = (query * scale**0.5) @ (key * scale**0.5).transpose(-1, -2)
    cap = call.attr("softcap", 0.0)
    capped = cap * torch.tanh(products / cap) if cap else products
    masked = capped if bias is None else capped + bias
    shares = _shares(call, masked)
    stages = (products, capped, masked, shares)
    told = stages[call.attr("qk_matmul_output_mode", 0)]
    return _told(call, (shares @ value).to(query.dtype), flat, present, told)


def _shares(call: Call, x: Tensor) -> Value:
    """Softmax, where a row that is masked all over gives nothing."""
    precision = DTYPES.get(call.attr("softmax_precision", 0), x.dtype)
    largest = x.amax(-1, keepdim=True)
    found = torch.softmax(x.to(precision), -1).to(x.dtype)
    return torch.where(largest == float("-inf"), torch.zeros_like(found), found)


def _bias(call: Call, query: Tensor, key: Tensor, mask: Value, lengths: Value, before: Any) -> Tensor | None:
    """What is added to the products, [N or 1, H or 1, L, S]; None where nothing is."""
    found: Tensor | None = None
    if mask is not None:
        given = tensor(mask)
        if given.dtype == torch.bool:
            given = _closed(~given, query.dtype)
        short = key.shape[2] - given.shape[-1]
        found = F.pad(given, [0, short], value=float("-inf")) if short else given
    columns = torch.arange(key.shape[2])[None, None, None, :]
    rows = torch.arange(query.shape[2])[None, None, :, None]
    if lengths is not None:
        valid = tensor(lengths).to(torch.int64)[:, None, None, None]
        found = _added(found, _closed(columns >= valid, query.dtype))
        rows = rows + valid - query.shape[2]
    else:
        rows = rows + before
    left, right = call.attr("left_window_size", -1), call.attr("right_window_size", -1)
    if call.attr("is_causal", 0):
        found = _added(found, _closed(columns > rows, query.dtype))
    if left >= 0:
        found = _added(found, _closed(columns < rows - left, query.dtype))
    if right >= 0:
        found = _added(found, _closed(columns > rows + right, query.dtype))
    return found


def _closed(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, float("-inf"))


def _added(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b


def _told(call: Call, y: Tensor, flat: bool, present: tuple[Tensor, Tensor], products: Tensor | None) -> Any:
    if flat:
        y = y.transpose(1, 2).flatten(2)
    every = (y, *present, products)
    return every[: call.outputs] if call.outputs > 1 else y


@operator("RotaryEmbedding")
def rotary(call: Call, x: Value, cos: Value, sin: Value, positions: Value = None) -> Value:
    x, cos, sin = map(tensor, (x, cos, sin))
    heads = x if x.dim() == 3 else x.transpose(1, 2)
    if x.dim() == 3:
        heads = x.reshape(x.shape[0], x.shape[1], call.attr("num_heads"), -1)
    turned = call.attr("rotary_embedding_dim", 0) or heads.shape[-1]
    part, rest = heads[..., :turned], heads[..., turned:]
    half = turned // 2
    if positions is not None:
        index = tensor(positions).to(torch.int64)
        cos, sin = cos[index], sin[index]
    cos, sin = cos[..., :half].unsqueeze(2), sin[..., :half].unsqueeze(2)
    if call.attr("interleaved", 0):
        a, b = part[..., 0::2], part[..., 1::2]
        mixed = torch.stack([cos * a - sin * b, sin * a + cos * b], -1).flatten(-2)
    else:
        a, b = part[..., :half], part[..., half:]
        mixed = torch.cat([cos * a - sin * b, sin * a + cos * b], -1)
    found = torch.cat([mixed, rest], -1)
    return found.flatten(2) if x.dim() == 3 else found.transpose(1, 2)
