"""What bitport knows of each aten operator: one row gives its kind, tensor slots and canonical attributes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bitport.graph.match import Call, Row

Attrs = Callable[[Call], dict[str, Any]]


def _none(call: Call) -> dict[str, Any]:
    return {}


def _take(*names: str, **renamed: str) -> Attrs:
    """Attributes copied from the schema, under their own or another name: `_take("eps", dim="axis")`."""
    pairs = {name: name for name in names} | renamed

    def read(call: Call) -> dict[str, Any]:
        return {ours: _plain(call[theirs]) for ours, theirs in pairs.items()}

    return read


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


def spread(value: Any, ndim: int) -> tuple[Any, ...]:
    """A number or a sequence as one number per spatial axis."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values * ndim if len(values) == 1 else values


def same_padding(padding: str, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> Any:
    """`"same"` / `"valid"` as numbers where the padding is symmetric, else the word itself."""
    if padding == "valid":
        return (0,) * len(kernel)
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    return tuple(t // 2 for t in total) if all(t % 2 == 0 for t in total) else padding


def _conv(call: Call) -> dict[str, Any]:
    weight = call.value("weight")
    ndim = weight.dim() - 2 if isinstance(weight, torch.Tensor) else len(call["stride"])
    stride, dilation = spread(call["stride"], ndim), spread(call["dilation"], ndim)
    padding = call["padding"]
    if isinstance(padding, str):
        kernel = tuple(int(k) for k in weight.shape[2:]) if weight is not None else ()
        padding = same_padding(padding, kernel, dilation) if kernel else padding
    else:
        padding = spread(padding, ndim)
    found = {
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": call["groups"],
        "ndim": ndim,
    }
    if "output_padding" in call.args:
        found["output_padding"] = spread(call["output_padding"], ndim)
    return found | {"padding_mode": "zeros"}


def _pool(call: Call) -> dict[str, Any]:
    name = str(call.node.target.overloadpacket.__name__)  # type: ignore[union-attr]
    ndim = int(name[name.index("pool") + 4])
    kernel = spread(call["kernel_size"], ndim)
    stride = spread(call["stride"], ndim) if call["stride"] else kernel
    found = {"kernel": kernel, "stride": stride, "padding": spread(call["padding"], ndim), "ndim": ndim}
    found["ceil_mode"] = call["ceil_mode"]
    for key in ("dilation", "count_include_pad", "divisor_override"):
        if key in call.args:
            found[key] = spread(call[key], ndim) if key == "dilation" else call[key]
    return found


def _adaptive(call: Call) -> dict[str, Any]:
    name = str(call.node.target.overloadpacket.__name__)  # type: ignore[union-attr]
    ndim = int(name[name.index("pool") + 4])
    return {"output_size": spread(call["output_size"], ndim), "ndim": ndim}


def _adaptive_kind(call: Call) -> str:
    return "global_avg_pool" if all(s == 1 for s in _adaptive(call)["output_size"]) else "adaptive_avg_pool"


def _dim(*names: str, **more: str) -> Attrs:
    """Attribute `dim` counted from the front, and others as they are."""
    rest = _take(*names, **more)
    return lambda call: {"dim": call.dim(call["dim"])} | rest(call)


def _reduce(call: Call) -> dict[str, Any]:
    rank, dim = call.rank(), call.dim(call["dim"])
    if dim is None or dim == ():
        dim = tuple(range(rank)) if rank is not None else None
    else:
        dim = (dim,) if isinstance(dim, int) else tuple(sorted(dim))
    return {"dim": dim, "keepdim": bool(call["keepdim"])}


def _binary(kind: str) -> Callable[[Call], str]:
    return lambda call: kind if call.is_tensor("other") else f"{kind}_scalar"


def _add(sign: int) -> Attrs:
    def read(call: Call) -> dict[str, Any]:
        alpha = call["alpha"] if call["alpha"] is not None else 1
        if call.is_tensor("other"):
            return {"alpha": alpha}
        value = call["other"]
        return {"value": value * alpha * sign if isinstance(value, int | float) else value}

    return read


def _scaled(call: Call) -> dict[str, Any]:
    found: dict[str, Any] = {} if call.is_tensor("other") else {"value": call["other"]}
    if call["rounding_mode"] is not None:
        found["rounding_mode"] = call["rounding_mode"]
    return found


def _out_shape(call: Call) -> tuple[Any, ...] | None:
    """The static output shape, -1 for the one symbolic axis (text where several are)."""
    if not isinstance(call.out, torch.Tensor):
        return None
    shape = [s if isinstance(s, int) else str(s) for s in call.out.shape]
    symbolic = [i for i, s in enumerate(shape) if isinstance(s, str)]
    if len(symbolic) == 1:
        shape[symbolic[0]] = -1
    return tuple(shape)


def _view(call: Call) -> dict[str, Any]:
    size = call["size"] if call["size"] is not None else call["shape"]
    return {"shape": tuple(size) if size is not None else _out_shape(call)}


def _flatten(call: Call) -> dict[str, Any]:
    start, end = call.dim(call["start_dim"]), call.dim(call["end_dim"])
    return {"shape": _out_shape(call), "start_dim": start, "end_dim": end}


def _swap(first: str, second: str) -> Attrs:
    def read(call: Call) -> dict[str, Any]:
        rank = call.rank()
        a, b = (call[first], call[second]) if first else (0, 1)
        if rank is None:
            return {"dims": None, "swap": (a, b)}
        dims = list(range(rank))
        if rank > 1:
            dims[a], dims[b] = dims[b], dims[a]
        return {"dims": tuple(dims)}

    return read


def _slice(call: Call) -> dict[str, Any]:
    start = 0 if call["start"] is None else call["start"]
    end = 2**63 - 1 if call["end"] is None else call["end"]
    return {"dim": call.dim(call["dim"]), "start": start, "end": end, "step": call["step"]}


def _squeeze(call: Call) -> dict[str, Any]:
    dim, rank = call.dim(call["dim"]), call.rank()
    value = call.value("self")
    if dim is None and rank is not None:
        dim = tuple(i for i, s in enumerate(value.shape) if isinstance(s, int) and s == 1)
    return {"dims": (dim,) if isinstance(dim, int) else dim}


def _unsqueeze(call: Call) -> dict[str, Any]:
    return {"dim": call.dim(call["dim"], extra=1)}


def _pad(mode: str | None) -> Attrs:
    def read(call: Call) -> dict[str, Any]:
        pad = call["pad"] if call["pad"] is not None else call["padding"]
        value = call["value"] if call["value"] is not None else 0.0
        return {"pad": tuple(pad), "mode": mode or call["mode"] or "constant", "value": value}

    return read


def _split_sizes(call: Call) -> dict[str, Any]:
    sizes = call["split_size"] if call["split_size"] is not None else call["split_sizes"]
    found: dict[str, Any] = {"dim": call.dim(call["dim"])}
    if isinstance(call.out, list | tuple) and isinstance(found["dim"], int):
        parts = tuple(t.shape[found["dim"]] for t in call.out if isinstance(t, torch.Tensor))
        found["sizes"] = tuple(p if isinstance(p, int) else str(p) for p in parts)
    found["arg"] = _plain(sizes) if sizes is not None else call["chunks"]
    return found


def _resize(call: Call) -> dict[str, Any]:
    scales = call["scale_factors"]
    if scales is None and call["scales_h"] is not None:
        scales = (call["scales_h"], call["scales_w"])
    return {
        "size": _plain(call["output_size"]),
        "scales": _plain(scales),
        "align_corners": call["align_corners"],
    }


def _resize_kind(call: Call) -> str:
    """A size that is computed while running isn't read."""
    known = all(isinstance(n, int) for n in call["output_size"] or ())
    return "resize_bilinear" if known else "other:upsample_bilinear2d"


def _cast_kind(call: Call) -> str:
    before, after = call.value("self"), call.out
    same = (
        isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor) and before.dtype == after.dtype
    )
    return "identity" if same else "cast"


def _cast(call: Call) -> dict[str, Any]:
    if _cast_kind(call) == "identity":
        return {}
    return {"dtype": call.out.dtype if isinstance(call.out, torch.Tensor) else call["dtype"]}


def _index(call: Call) -> dict[str, Any]:
    return {"axes": tuple(i for i, a in enumerate(call["indices"]) if a is not None)}


def _rows() -> dict[str, Row]:
    x = ("self",)
    rows: dict[str, Row] = {}

    def add(
        names: str, kind: str | Callable[[Call], str], slots: tuple[str, ...] = x, attrs: Attrs = _none
    ) -> None:
        for name in names.split():
            rows[name] = Row(kind, slots, attrs)

    add("conv1d conv2d conv3d", "conv", ("input", "weight", "bias"), _conv)
    add(
        "conv_transpose1d conv_transpose2d conv_transpose3d",
        "conv_transpose",
        ("input", "weight", "bias"),
        _conv,
    )
    add(
        "convolution",
        lambda c: "conv_transpose" if c["transposed"] else "conv",
        ("input", "weight", "bias"),
        _conv,
    )
    add("linear", "linear", ("input", "weight", "bias"))
    add("matmul mm bmm", "matmul", ("self", "other"))
    add("mm bmm", "matmul", ("self", "mat2"))
    # rows sorted by expert, [E, K, N] matrices, and where each expert's rows end
    add("_grouped_mm", "grouped_mm", ("self", "mat2", "offs", "bias"))
    add("transformers::grouped_mm_fallback", "grouped_mm", ("input", "weight", "offs"))
    add("bitport::expert_linear", "experts", ("x", "weight", "ends"))
    add("addmm", "addmm", ("mat1", "mat2", "self"), _take("alpha", "beta"))
    add("baddbmm", "addmm", ("batch1", "batch2", "self"), _take("alpha", "beta"))
    norm = ("input", "weight", "bias")
    add(
        "batch_norm",
        "batch_norm",
        (*norm, "running_mean", "running_var"),
        _take("eps", "training", "momentum"),
    )
    add(
        "instance_norm",
        "instance_norm",
        (*norm, "running_mean", "running_var"),
        _take("eps", "use_input_stats"),
    )
    add("layer_norm", "layer_norm", norm, _take("normalized_shape", "eps"))
    add("rms_norm", "rms_norm", ("input", "weight"), _take("normalized_shape", "eps"))
    add("group_norm", "group_norm", norm, _take("num_groups", "eps"))
    add("embedding", "embedding", ("indices", "weight"), _take("padding_idx"))
    add("dropout feature_dropout alpha_dropout feature_alpha_dropout", "dropout", ("input",), _take("p"))

    for name in [
        "relu",
        "relu6",
        "sigmoid",
        "tanh",
        "hardsigmoid",
        "hardswish",
        "silu",
        "neg",
        "exp",
        "sqrt",
        "rsqrt",
    ]:
        add(name, name)
    add(
        "hardtanh",
        lambda c: "relu6" if (c["min_val"], c["max_val"]) == (0, 6) else "hardtanh",
        x,
        lambda c: {"min": c["min_val"], "max": c["max_val"]},
    )
    add("clamp clip clamp_min clamp_max", "clamp", x, _take("min", "max"))
    add("gelu", "gelu", x, _take("approximate"))
    add("leaky_relu", "leaky_relu", x, _take("negative_slope"))
    add("elu", "elu", x, _take("alpha", "scale", "input_scale"))
    add("softmax _softmax", "softmax", x, _dim())
    add("log_softmax _log_softmax", "log_softmax", x, _dim())
    add("add", _binary("add"), ("self", "other"), _add(1))
    add(
        "sub subtract", lambda c: "sub" if c.is_tensor("other") else "add_scalar", ("self", "other"), _add(-1)
    )
    add("mul multiply", _binary("mul"), ("self", "other"), _scaled)
    add("div divide true_divide", _binary("div"), ("self", "other"), _scaled)
    add(
        "pow",
        "pow",
        ("self", "exponent"),
        lambda c: {} if c.is_tensor("exponent") else {"exponent": c["exponent"], "base": None},
    )
    add("mean", "mean", x, _reduce)
    add("sum", "sum", x, _reduce)
    # the input is called one or the other, by overload
    add("upsample_bilinear2d", _resize_kind, ("input", "self"), _resize)
    add("sort", "sort", x, _dim("descending"))
    add("argsort", "argsort", x, _dim("descending"))
    add("topk", lambda c: "topk" if isinstance(c["k"], int) else "other:topk", x, _dim("k", "largest"))
    add("max_pool1d max_pool2d max_pool3d", "max_pool", x, _pool)
    add("avg_pool1d avg_pool2d avg_pool3d", "avg_pool", x, _pool)
    add("adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d", _adaptive_kind, x, _adaptive)
    add("cat concat concatenate", "cat", ("tensors",), lambda c: {"dim": _list_dim(c)})
    add("stack", "stack", ("tensors",), lambda c: {"dim": _list_dim(c, 1)})
    add("split split_with_sizes chunk", "split", x, _split_sizes)
    add("unbind", "split", x, lambda c: {"dim": c.dim(c["dim"]), "unbind": True})
    add("view reshape _unsafe_view view_as reshape_as unflatten", "view", x, _view)
    add("flatten", "view", x, _flatten)
    add("transpose swapaxes swapdims", "transpose", x, _swap("dim0", "dim1"))
    add("t numpy_T mT", "transpose", x, _swap("", ""))
    add("permute", "transpose", x, lambda c: {"dims": c.dim(c["dims"])})
    add("expand expand_as broadcast_to", "expand", x, _view)
    add("slice", "slice", x, _slice)
    add("select", "select", x, _dim("index"))
    add("squeeze", "squeeze", x, _squeeze)
    add("unsqueeze", "unsqueeze", x, _unsqueeze)
    add("pad", "pad", x, _pad(None))
    add("constant_pad_nd", "pad", x, _pad("constant"))
    add("reflection_pad1d reflection_pad2d reflection_pad3d", "pad", x, _pad("reflect"))
    add("replication_pad1d replication_pad2d replication_pad3d", "pad", x, _pad("replicate"))
    add("index", "index", ("self", "indices"), _index)
    add("gather", "gather", ("self", "index"), _dim())
    add(
        "where",
        "where",
        ("condition", "self", "other"),
        lambda c: {k: c[k] for k in ("self", "other") if not c.is_tensor(k)},
    )
    add(
        "masked_fill",
        "masked_fill",
        ("self", "mask", "value"),
        lambda c: {} if c.is_tensor("value") else {"value": c["value"]},
    )
    add(
        "scaled_dot_product_attention",
        "sdpa",
        ("query", "key", "value", "attn_mask"),
        _take("is_causal", "scale", "dropout_p", "enable_gqa"),
    )
    add(
        "lstm",
        "lstm",
        ("input", "hx", "params"),
        _take("num_layers", "bidirectional", "batch_first", "dropout"),
    )
    add(
        "gru",
        "gru",
        ("input", "hx", "params"),
        _take("num_layers", "bidirectional", "batch_first", "dropout"),
    )
    add("contiguous clone alias detach lift_fresh lift_fresh_copy resolve_conj resolve_neg", "identity")
    add("to _to_copy type_as", _cast_kind, x, _cast)
    add(
        "arange full ones zeros empty eye scalar_tensor linspace tril_indices triu_indices",
        "const",
        (),
        _fill,
    )
    add("zeros_like ones_like full_like new_zeros new_ones new_full new_empty empty_like", "const", x, _fill)
    return rows


def _fill(call: Call) -> dict[str, Any]:
    return {
        k: _plain(v) for k, v in call.args.items() if k in ("fill_value", "size", "start", "end", "step", "s")
    }


def _list_dim(call: Call, extra: int = 0) -> Any:
    tensors = call["tensors"]
    value = tensors[0].meta.get("val") if tensors else None
    rank = value.dim() + extra if isinstance(value, torch.Tensor) else None
    return call["dim"] % rank if rank else call["dim"]


ROWS: dict[str, Row] = _rows()
