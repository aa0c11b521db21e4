"""The closed set of raised modules, and how each is read as an `Op`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from bitport.graph.aten_table import same_padding, spread
from bitport.graph.match import Op, Operand, is_tensor, operand_of


class RaisedLSTM(nn.LSTM):
    """`nn.LSTM` that returns the flat triple of the aten operator: (output, h, c)."""

    def forward(self, x: Tensor, h: Tensor | None = None, c: Tensor | None = None) -> Any:  # type: ignore[override]
        out, (hn, cn) = super().forward(x, None if h is None or c is None else (h, c))
        return out, hn, cn


class RaisedGRU(nn.GRU):
    """`nn.GRU` called with the state as second argument."""


class RaisedRNN(nn.RNN):
    """`nn.RNN` called with the state as second argument."""


class BatchNormCall(nn.Module):
    """Batch normalisation with tensors given by the caller, for weights that can't be owned by one module.

    Statistics are taken from the batch, and the running ones updated, in train mode only.
    """

    def __init__(self, momentum: float, eps: float, use_batch: bool = False) -> None:
        super().__init__()
        self.momentum, self.eps, self.use_batch = momentum, eps, use_batch

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None
    ) -> Tensor:
        train = self.training or self.use_batch or mean is None
        return F.batch_norm(x, mean, var, weight, bias, train, self.momentum, self.eps)

    def extra_repr(self) -> str:
        return f"momentum={self.momentum}, eps={self.eps}"


class Attention(nn.Module):
    """Scaled dot-product attention whose dropout follows train / eval mode."""

    def __init__(self, dropout: float, is_causal: bool, scale: float | None, enable_gqa: bool) -> None:
        super().__init__()
        self.dropout, self.is_causal, self.scale, self.enable_gqa = dropout, is_causal, scale, enable_gqa

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        p = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(
            q, k, v, mask, dropout_p=p, is_causal=self.is_causal, scale=self.scale, enable_gqa=self.enable_gqa
        )

    def extra_repr(self) -> str:
        return (
            f"dropout={self.dropout}, is_causal={self.is_causal}, scale={self.scale}, gqa={self.enable_gqa}"
        )


class ModuleRow(NamedTuple):
    """How to read one raised module: kind, its tensors by slot after the activation operands, attributes."""

    kind: str
    tensors: tuple[str, ...]
    attrs: Callable[[Any], dict[str, Any]]
    weight_first: bool = False


def _conv(m: Any) -> dict[str, Any]:
    ndim = len(m.kernel_size)
    dilation = spread(m.dilation, ndim)
    padding = m.padding
    if isinstance(padding, str):
        padding = same_padding(padding, tuple(m.kernel_size), dilation)
    found = {
        "stride": spread(m.stride, ndim),
        "padding": padding,
        "dilation": dilation,
        "groups": m.groups,
        "ndim": ndim,
    }
    found["padding_mode"] = m.padding_mode
    if m.transposed:
        found["output_padding"] = spread(m.output_padding, ndim)
    return found


def _bn(m: Any) -> dict[str, Any]:
    return {"eps": m.eps, "momentum": m.momentum, "training": m.running_mean is None}


def _rnn(m: Any) -> dict[str, Any]:
    keys = ("num_layers", "bidirectional", "batch_first", "dropout", "hidden_size", "input_size", "proj_size")
    return {k: getattr(m, k) for k in keys}


def _p(m: Any) -> dict[str, Any]:
    return {"p": m.p}


_WB, _BN = ("weight", "bias"), ("weight", "bias", "running_mean", "running_var")

MODULES: dict[type[nn.Module], ModuleRow] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), ModuleRow("conv", _WB, _conv)),
    **dict.fromkeys(
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), ModuleRow("conv_transpose", _WB, _conv)
    ),
    nn.Linear: ModuleRow("linear", _WB, lambda m: {}),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), ModuleRow("batch_norm", _BN, _bn)),
    **dict.fromkeys(
        (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
        ModuleRow(
            "instance_norm", _BN, lambda m: {"eps": m.eps, "use_input_stats": not m.track_running_stats}
        ),
    ),
    nn.LayerNorm: ModuleRow(
        "layer_norm", _WB, lambda m: {"normalized_shape": tuple(m.normalized_shape), "eps": m.eps}
    ),
    nn.RMSNorm: ModuleRow(
        "rms_norm", ("weight",), lambda m: {"normalized_shape": tuple(m.normalized_shape), "eps": m.eps}
    ),
    nn.GroupNorm: ModuleRow("group_norm", _WB, lambda m: {"num_groups": m.num_groups, "eps": m.eps}),
    nn.Embedding: ModuleRow(
        "embedding", ("weight",), lambda m: {"padding_idx": -1 if m.padding_idx is None else m.padding_idx}
    ),
    **dict.fromkeys(
        (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
        ModuleRow("dropout", (), _p),
    ),
    RaisedLSTM: ModuleRow("lstm", (), _rnn),
    RaisedGRU: ModuleRow("gru", (), _rnn),
    RaisedRNN: ModuleRow("rnn", (), lambda m: _rnn(m) | {"nonlinearity": m.nonlinearity}),
    BatchNormCall: ModuleRow(
        "batch_norm", (), lambda m: {"eps": m.eps, "momentum": m.momentum, "training": m.use_batch}
    ),
    Attention: ModuleRow(
        "sdpa",
        (),
        lambda m: {
            "is_causal": m.is_causal,
            "scale": m.scale,
            "dropout_p": m.dropout,
            "enable_gqa": m.enable_gqa,
        },
    ),
}
_ARITY = {"sdpa": 4, "batch_norm": 5}


def classify_module(graph_module: fx.GraphModule, node: fx.Node) -> Op:
    """`Op` of a call_module node; a module outside the closed set reads as `other:<class name>`."""
    path = str(node.target)
    module = graph_module.get_submodule(path)
    row = MODULES.get(type(module))
    args: list[Operand | None] = [operand_of(a) if is_tensor(a) else None for a in node.args]
    args += [operand_of(a) for a in node.kwargs.values() if is_tensor(a)]
    if row is None:
        own = [Operand(None, f"{path}.{n}") for n, _ in module.named_parameters(recurse=False)]
        return Op(f"other:{type(module).__name__}", (*args, *own), {})
    if isinstance(module, nn.RNNBase):
        states = 2 if isinstance(module, nn.LSTM) else 1
        args += [None] * (1 + states - len(args))
        args += [Operand(None, f"{path}.{name}") for group in module._all_weights for name in group]
    for name in row.tensors:
        value = getattr(module, name)
        args.append(Operand(None, f"{path}.{name}") if isinstance(value, torch.Tensor) else None)
    args += [None] * (_ARITY.get(row.kind, 0) - len(args))
    return Op(row.kind, tuple(args), row.attrs(module))
