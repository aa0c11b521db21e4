"""Keras layers that own weights, as torch writes them: weights in torch's order, channels first inside.

Each takes and gives what the Keras layer does, channels last where that does. The rest of Keras runs as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Made = nn.Module | None
CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d,
}  # fmt: skip
AVERAGE: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
MAXIMUM: dict[int, Callable[..., Tensor]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


class Masked(Exception):
    """A recurrent layer met a mask, which torch's own can't take."""


class Kept:
    """Something of Keras that a module refers to: no part of it, and the same in its copies."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, *values: Any, **options: Any) -> Any:
        return self.value(*values, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        return self


def learnt(value: Any) -> nn.Parameter:
    """A Keras variable's value, or a tensor, as a parameter of its own."""
    tensor = value.value if hasattr(value, "value") else value
    return nn.Parameter(tensor.detach().clone().contiguous())


def first(x: Tensor) -> Tensor:
    """Channels first: N … C → N C …"""
    return x.permute(0, x.dim() - 1, *range(1, x.dim() - 1))


def last(x: Tensor) -> Tensor:
    """Channels last: N C … → N … C"""
    return x.permute(0, *range(2, x.dim()), 1)


def same(
    sizes: Sequence[Any], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> list[Any]:
    """What padding "same" adds before and behind each axis, the last axis first, as `F.pad` takes it."""
    found: list[Any] = []
    for size, width, step, wide in zip(sizes, kernel, stride, dilation, strict=True):
        total: Any = (width - 1) * wide
        if step > 1:
            most: Callable[..., Any] = torch.sym_max
            total = most(0, total + 1 + (-(-size // step) - 1) * step - size)
        found = [total // 2, total - total // 2, *found]
    return found


class Conv(nn.Module):
    """Convolution, in groups or by depth, of any rank. kernel: [*window, in, out] of Keras."""

    def __init__(self, layer: Any, kernel: Tensor, bias: Any, groups: int, activation: Any) -> None:
        super().__init__()
        rank = kernel.dim() - 2
        self.weight = learnt(kernel.permute(rank + 1, rank, *range(rank)))
        self.bias = None if bias is None else learnt(bias)
        self.rank, self.groups, self.activation = rank, groups, Kept(activation)
        self.stride, self.dilation = _spread(layer.strides, rank), _spread(layer.dilation_rate, rank)
        self.padding = layer.padding
        self.last = layer.data_format == "channels_last"

    def forward(self, x: Tensor) -> Tensor:
        x = first(x) if self.last else x
        beside: Any = (0,) * self.rank
        kernel = self.weight.shape[2:]
        if self.padding == "causal":
            x = F.pad(x, [(kernel[0] - 1) * self.dilation[0], 0])
        elif self.padding == "same":
            pads = same(x.shape[2:], kernel, self.stride, self.dilation)
            known = all(isinstance(size, int) for size in pads)
            if known and pads[0::2] == pads[1::2]:
                beside = tuple(pads[::-2])
            else:
                x = F.pad(x, pads)
        x = CONVS[self.rank](x, self.weight, self.bias, self.stride, beside, self.dilation, self.groups)
        found: Tensor = self.activation(last(x) if self.last else x)
        return found


class Separable(nn.Module):
    """A convolution by depth, and one across channels behind it."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.depthwise = Conv(layer, _by_depth(layer.depthwise_kernel.value), None, _inputs(layer), _as_it_is)
        across = Conv(layer, layer.pointwise_kernel.value, layer.bias, 1, layer.activation)
        across.stride = across.dilation = (1,) * across.rank
        across.padding = "valid"
        self.pointwise = across

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.pointwise(self.depthwise(x))
        return found


class Transposed(nn.Module):
    """Transposed convolution; torch's whole result is cut to what Keras' padding leaves. kernel: [*window, out, in]."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        kernel = layer.kernel.value
        self.rank = rank = kernel.dim() - 2
        self.weight = learnt(kernel.permute(rank + 1, rank, *range(rank)))
        self.bias = None if layer.bias is None else learnt(layer.bias)
        self.activation = Kept(layer.activation)
        self.stride, self.dilation = _spread(layer.strides, rank), _spread(layer.dilation_rate, rank)
        self.last, self.padding = layer.data_format == "channels_last", layer.padding

    def forward(self, x: Tensor) -> Tensor:
        x = first(x) if self.last else x
        sizes = x.shape[2:]
        x = TRANSPOSED[self.rank](x, self.weight, self.bias, self.stride, 0, 0, 1, self.dilation)
        for axis, size in enumerate(sizes):
            reach = (self.weight.shape[axis + 2] - 1) * self.dilation[axis] + 1
            over = max(reach - self.stride[axis], 0)  # of the whole result, behind size · stride
            if self.padding == "same":
                x = x.narrow(axis + 2, over // 2, size * self.stride[axis])
        found: Tensor = self.activation(last(x) if self.last else x)
        return found


class Pool(nn.Module):
    """Pooling with padding "same": what is added counts nowhere, and the longer side is behind."""

    def __init__(self, layer: Any, rank: int, average: bool) -> None:
        super().__init__()
        self.average, self.rank = average, rank
        self.size, self.stride = _spread(layer.pool_size, rank), _spread(layer.strides, rank)
        self.last = layer.data_format == "channels_last"

    def forward(self, x: Tensor) -> Tensor:
        x = first(x) if self.last else x
        pads = same(x.shape[2:], self.size, self.stride, (1,) * self.rank)
        before = [int(size) for size in pads[0::2]][::-1]
        longer = pads[0::2] != pads[1::2]
        if self.average:
            x = AVERAGE[self.rank](x, self.size, self.stride, before, longer, False)
        else:
            x = MAXIMUM[self.rank](x, self.size, self.stride, before, 1, longer)
        return last(x) if self.last else x


class Dense(nn.Module):
    """A product with [in, out] over the last axis."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.weight = learnt(layer.kernel.value.t())
        self.bias = None if layer.bias is None else learnt(layer.bias)
        self.activation = Kept(layer.activation)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.activation(F.linear(x, self.weight, self.bias))
        return found


class EinsumDense(nn.Module):
    """A product over the last axes, as attention projects by: `abc,cde->abde`, `abcd,cde->abe`."""

    def __init__(self, layer: Any, over: int) -> None:
        super().__init__()
        kernel = layer.kernel.value
        self.over, self.into = over, tuple(kernel.shape[over:])
        self.weight = learnt(kernel.reshape(-1, math.prod(self.into)).t())
        self.bias = None
        if layer.bias is not None:
            self.bias = learnt(layer.bias.value.broadcast_to(self.into).reshape(-1))
        self.activation = Kept(layer.activation)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x.flatten(-self.over) if self.over > 1 else x, self.weight, self.bias)
        found: Tensor = self.activation(x.reshape(*x.shape[:-1], *self.into) if len(self.into) > 1 else x)
        return found


class BatchNorm(nn.Module):
    """Statistics per channel, on whichever axis Keras has them."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.axis, self.eps, self.momentum = layer.axis, layer.epsilon, 1.0 - layer.momentum
        mean = layer.moving_mean.value.detach()
        self.register_buffer("running_mean", mean.clone())
        self.register_buffer("running_var", layer.moving_variance.value.detach().clone())
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if layer.scale or layer.center:
            self.weight = learnt(layer.gamma if layer.scale else torch.ones_like(mean))
            self.bias = learnt(layer.beta if layer.center else torch.zeros_like(mean))
            self.weight.requires_grad_(layer.scale)
            self.bias.requires_grad_(layer.center)

    def forward(self, x: Tensor) -> Tensor:
        axis = self.axis % x.dim()
        moved = x.dim() > 2 and axis == x.dim() - 1
        x = first(x) if moved else x
        x = F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        )
        return last(x) if moved else x


class LayerNorm(nn.Module):
    """Over the last axis."""

    def __init__(self, layer: Any, width: int) -> None:
        super().__init__()
        self.eps, self.width = layer.epsilon, width
        self.weight = None if layer.gamma is None else learnt(layer.gamma)
        self.bias = None if layer.beta is None else learnt(layer.beta)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.width,), self.weight, self.bias, self.eps)


class Embedding(nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.weight = learnt(layer.embeddings)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids.long(), self.weight)


class Recurrent(nn.Module):
    """LSTM (gates in torch's order already), GRU with the reset behind its product, or a plain cell."""

    def __init__(self, layer: Any, kind: type[nn.LSTM] | type[nn.GRU] | type[nn.RNN]) -> None:
        super().__init__()
        cell = layer.cell
        inner = kind(cell.kernel.value.shape[0], layer.units, batch_first=True, bias=cell.bias is not None)
        tensors = [cell.kernel.value.t(), cell.recurrent_kernel.value.t()]
        if cell.bias is not None:
            bias = cell.bias.value
            tensors += list(bias) if bias.dim() == 2 else [bias, torch.zeros_like(bias)]
        for name, tensor in zip(inner._all_weights[0], tensors, strict=True):
            setattr(self, name, learnt(_reordered(tensor) if kind is nn.GRU else tensor))
        self.kind, self.bias, self.names = kind, cell.bias is not None, list(inner._all_weights[0])
        self.sequences, self.state = layer.return_sequences, layer.return_state
        self.backwards, self.units = layer.go_backwards, layer.units

    def forward(self, x: Tensor, mask: Any = None, training: Any = None, initial_state: Any = None) -> Any:
        if mask is not None:
            raise Masked
        x = x.flip(1) if self.backwards else x
        given = list(initial_state) if isinstance(initial_state, list | tuple) else [initial_state]
        states = [
            torch.zeros(1, x.shape[0], self.units, dtype=x.dtype) if state is None else state.unsqueeze(0)
            for state in (given if given != [None] else [None] * (2 if self.kind is nn.LSTM else 1))
        ]
        weights = [getattr(self, name) for name in self.names]
        rest = (weights, self.bias, 1, 0.0, False, False, True)
        if self.kind is nn.LSTM:
            out, *found = torch.lstm(x, states, *rest)
        else:
            call = torch.gru if self.kind is nn.GRU else torch.rnn_tanh
            out, *found = call(x, states[0], *rest)
        out = out if self.sequences else out[:, -1]
        return (out, *(state.squeeze(0) for state in found)) if self.state else out


def step_by_step(layer: Any) -> Callable[..., Any]:
    """The loop of a Keras recurrent layer over time, spelled out: Keras' own fixes the batch.

    What is masked keeps its state, and repeats its output (or gives zeros, where the layer says so).
    """

    def run(sequences: Tensor, initial_state: Any, mask: Any = None, training: Any = False) -> Any:
        states: list[Tensor] = (
            list(initial_state) if isinstance(initial_state, list | tuple) else [initial_state]
        )
        mask = mask[0] if isinstance(mask, list | tuple) else mask
        steps = range(sequences.shape[1])
        outputs: list[Tensor] = []
        for step in reversed(steps) if layer.go_backwards else steps:
            output, found = layer.cell(sequences[:, step], states, training=False)
            found = list(found) if isinstance(found, list | tuple) else [found]
            if mask is not None:
                seen = mask[:, step].bool().unsqueeze(-1)
                repeated = outputs and not layer.zero_output_for_mask
                output = torch.where(seen, output, outputs[-1] if repeated else torch.zeros_like(output))
                found = [torch.where(seen, new, old) for new, old in zip(found, states, strict=True)]
            states = found
            outputs.append(output)
        return outputs[-1], torch.stack(outputs, 1), states

    return run


def _reordered(tensor: Tensor) -> Tensor:
    """Gates z, r, h of Keras as r, z, n of torch."""
    z, r, h = tensor.chunk(3)
    return torch.cat([r, z, h])


def _spread(value: Any, rank: int) -> tuple[int, ...]:
    return (value,) * rank if isinstance(value, int) else tuple(value)


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _inputs(layer: Any) -> int:
    return int(layer.depthwise_kernel.value.shape[-2])


def _by_depth(kernel: Tensor) -> Tensor:
    """[*window, in, times] as [*window, 1, in · times]."""
    return kernel.reshape(*kernel.shape[:-2], 1, -1)


# --------------------------------------------------------------------------------------------- which layer is which


def _conv(layer: Any) -> Made:
    return Conv(layer, layer.kernel.value, layer.bias, layer.groups, layer.activation)


def _depthwise(layer: Any) -> Made:
    return Conv(
        layer, _by_depth(layer.kernel.value), layer.bias, int(layer.kernel.value.shape[-2]), layer.activation
    )


def _transposed(layer: Any) -> Made:
    plain = layer.output_padding is None and all(step >= 1 for step in _spread(layer.strides, 1))
    kernel, strides = layer.kernel.value.shape[:-2], _spread(layer.strides, layer.rank)
    dilation = _spread(layer.dilation_rate, layer.rank)
    reaches = all((k - 1) * d + 1 >= s for k, d, s in zip(kernel, dilation, strides, strict=True))
    return Transposed(layer) if plain and reaches else None


def _einsum(layer: Any) -> Made:
    """None where letters don't come as: batch and what is contracted; contracted and new; batch and new."""
    given, _, result = layer.equation.replace(" ", "").partition("->")
    x, _, w = given.partition(",")
    x, result = x.replace("...", ""), result.replace("...", "")
    over = sum(1 for letter in w if letter in x)
    fits = 0 < over < len(w) and x[-over:] == w[:over] and result == x[:-over] + w[over:] and "..." not in w
    bias = None if layer.bias is None else tuple(layer.bias.value.shape)
    if not fits or (bias is not None and len(bias) > len(w) - over):
        return None
    return EinsumDense(layer, over)


def _batch_norm(layer: Any) -> Made:
    rank = layer.input_spec.ndim
    on_edge = layer.axis % rank in (1, rank - 1) and rank <= 5
    return BatchNorm(layer) if on_edge and not layer.renorm else None


def _layer_norm(layer: Any) -> Made:
    axes = [layer.axis] if isinstance(layer.axis, int) else list(layer.axis)
    shape = (layer.get_build_config() or {}).get("input_shape")
    if shape is None or layer.rms_scaling or len(axes) != 1 or axes[0] not in (-1, len(shape) - 1):
        return None
    return LayerNorm(layer, int(shape[-1]))


def _pool(rank: int, average: bool) -> Callable[[Any], Made]:
    def make(layer: Any) -> Made:
        """None where nothing is added, or where a window that moves by one is of even length: Keras' own does that."""
        steps = _spread(layer.strides, rank)
        odd = all(
            step > 1 or size % 2 for step, size in zip(steps, _spread(layer.pool_size, rank), strict=True)
        )
        return Pool(layer, rank, average) if layer.padding == "same" and odd else None

    return make


def _embedding(layer: Any) -> Made:
    return Embedding(layer)


def _rnn(kind: Any, **wanted: Any) -> Callable[[Any], Made]:
    def make(layer: Any) -> Made:
        names = {
            name: getattr(getattr(layer, name), "__name__", None) for name in wanted if name != "reset_after"
        }
        fits = all(names[name] == value for name, value in wanted.items() if name != "reset_after")
        fits = fits and getattr(layer.cell, "reset_after", True)
        return Recurrent(layer, kind) if fits else None

    return make


NATIVE: dict[str, Callable[[Any], Made]] = {
    **dict.fromkeys(("Conv1D", "Conv2D", "Conv3D"), _conv),
    **dict.fromkeys(("DepthwiseConv1D", "DepthwiseConv2D"), _depthwise),
    **dict.fromkeys(("SeparableConv1D", "SeparableConv2D"), Separable),
    **dict.fromkeys(("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"), _transposed),
    **{f"AveragePooling{rank}D": _pool(rank, True) for rank in AVERAGE},
    **{f"MaxPooling{rank}D": _pool(rank, False) for rank in MAXIMUM},
    "Dense": Dense,
    "EinsumDense": _einsum,
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "Embedding": _embedding,
    "Dropout": lambda layer: nn.Dropout(layer.rate) if layer.noise_shape is None else None,
    "LSTM": _rnn(nn.LSTM, activation="tanh", recurrent_activation="sigmoid"),
    "GRU": _rnn(nn.GRU, activation="tanh", recurrent_activation="sigmoid"),
    "SimpleRNN": _rnn(nn.RNN, activation="tanh"),
}
RECURRENT = ("LSTM", "GRU", "SimpleRNN")
