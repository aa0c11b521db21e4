"""Exact integer arithmetic shared by the simulators of all runtimes.

Integers are bitport's signed scheme (int8: −128..127) in int32 tensors; `real = (q − zero_point)·scale`.
Floating-point units carry the integer sums, because they are many times faster than torch's integer
convolutions: a sum whose partial sums all stay below 2^24 (float32) or 2^53 (float64) is exact in any order.
Tie rules and formulas of one runtime live in that runtime's target; here is only what they share.

Letters: B batch, C channels, I input features, O output features, K length of one dot product.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bitport.errors import GraphError, TargetError

FLOAT32_EXACT = 2**24  # every integer up to here is a float32
FLOAT64_EXACT = 2**53


@dataclass(frozen=True)
class QTensor:
    """An integer tensor with its meaning: `real = (q − zero_point)·scale`.

    q: int32, any shape, in bitport's signed scheme. scale: float32, 0-d or [C]; zero_point: int32, alike.
    low, high: the clamp range of q. axis: the dimension of q that scale runs along; None with a 0-d scale.
    """

    q: Tensor
    scale: Tensor
    zero_point: Tensor
    low: int
    high: int
    axis: int | None = None

    def centred(self) -> Tensor:
        """`q − zero_point`, int32, shape of q."""
        return self.q - along(self.zero_point, self.q.ndim, self.axis)

    def dequantize(self) -> Tensor:
        """`(q − zero_point)·scale`, float32, shape of q.

        One rounding where |q − zero_point| ≤ 2^24 (any format up to 16 bits); beyond it, as in every runtime,
        the integer is rounded to float32 first.
        """
        return self.centred().float() * along(self.scale, self.q.ndim, self.axis)


@dataclass(frozen=True)
class QSpec:
    """How an output is stored. scale: 0-d float32; zero_point: 0-d int32; low, high: clamp range."""

    scale: Tensor
    zero_point: Tensor
    low: int
    high: int


@dataclass(frozen=True)
class Call:
    """One operator to be computed in integers.

    kind: conv, conv_transpose, linear, matmul, add, mul, cat, avg_pool, global_avg_pool, softmax, sigmoid,
        leaky_relu, relu, max_pool …
    attrs: conv, conv_transpose: stride padding dilation groups ndim (conv_transpose also output_padding);
        softmax, cat: dim; avg_pool: kernel stride padding ceil_mode count_include_pad ndim;
        max_pool: kernel stride padding dilation ceil_mode ndim; leaky_relu: negative_slope.
    operands: in slot order; conv, linear: (x, weight, bias or None), the bias int32 of scale s_x·s_w. Kernels on floats
        (`linear_dynamic`, `linear_weights`): x and bias float tensors, the weight `plan.constants.Coded`.
    out: how the output is stored; None where the kernel returns float32.
    """

    kind: str
    attrs: Mapping[str, Any]
    operands: tuple[Any, ...]
    out: QSpec | None


def quantized(call: Call, slot: int) -> QTensor:
    """An operand as integers. Raises TargetError where it is none."""
    operand = call.operands[slot]
    if not isinstance(operand, QTensor):
        raise TargetError(
            f"{call.kind}: operand {slot} is not quantized: quantize it or keep this operator in float"
        )
    return operand


def stored(call: Call) -> QSpec:
    """How the result is stored. Raises TargetError where floats are wanted of a kernel that gives integers alone."""
    if call.out is None:
        raise TargetError(f"{call.kind}: there is no such kernel with float output: quantize its output")
    return call.out


def in_float(call: Call) -> Tensor:
    """A product of integers as real numbers, float32: of a runtime whose integer kernels give integers alone.

    kind: linear or matmul.
    """
    x, weight, *bias = (v.dequantize() if isinstance(v, QTensor) else v for v in call.operands)
    return torch.matmul(x, weight) if call.kind == "matmul" else F.linear(x, weight, *bias)


def integer_bias(call: Call) -> QTensor | None:
    """The int32 bias of a `conv` or `linear` call, where it has one."""
    return quantized(call, 2) if len(call.operands) > 2 and call.operands[2] is not None else None


def along(values: Tensor, ndim: int, axis: int | None) -> Tensor:
    """`values` (0-d or [C]) shaped to broadcast along dimension `axis` of a tensor with `ndim` dimensions.

    Raises GraphError for [C] values without an axis.
    """
    if values.ndim == 0:
        return values
    if axis is None:
        if values.numel() == 1:
            return values.reshape(())
        raise GraphError(f"{values.numel()} scales or zero points without a channel axis: set QTensor.axis")
    shape = [1] * ndim
    shape[axis] = -1
    return values.reshape(shape)


def grouped(values: Tensor, shape: Sequence[int], axis: int, group: int) -> Tensor:
    """`values` [C, G] of groups spread over a tensor of `shape`, whose dimension `axis` has C channels.

    A channel is what is left when `axis` is taken out, flattened; each value holds for `group` consecutive numbers of
    it, the last one for what is left over.
    """
    rest = [size for dim, size in enumerate(shape) if dim != axis % len(shape)]
    width = math.prod(rest)
    wide = values.repeat_interleave(group, 1)[:, :width]
    return wide.reshape([shape[axis], *rest]).movedim(0, axis)


def spread(value: int | Sequence[int], count: int) -> tuple[int, ...]:
    """A stride, padding … as one number per dimension. value: one number for all, or `count` of them."""
    if isinstance(value, int):
        return (value,) * count
    return tuple(value) * (count if len(value) == 1 else 1)


def rne(values: Tensor, low: int, high: int) -> Tensor:
    """`clip(round half to even(values), low, high)` as int32; values: floating point, any shape."""
    return values.clamp(low, high).round().to(torch.int32)


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """float32 fused multiply-add `a·b + c` of float32 tensors (broadcast).

    Computed in float64, where a·b is exact. The result is the correctly rounded one whenever a·b + c fits
    into 53 bits, as it does for an 8-bit integer times a float32 plus a float32 of similar size; elsewhere it
    is rounded twice, which errs by one unit in the last place about once in 2^29 cases.
    """
    return torch.addcmul(c.double(), a.double(), b.double()).float()


def quantize(values: Tensor, out: QSpec) -> Tensor:
    """`clip(rne(values/scale) + zero_point)`, int32; values: float32, any shape. ONNX QuantizeLinear."""
    return requantize_float(values / out.scale, None, out.zero_point, out.low, out.high)


def requantize_float(
    acc: Tensor, multiplier: Tensor | None, zero_point: Tensor, low: int, high: int, axis: int | None = None
) -> Tensor:
    """`clip(rne(float32(acc)·multiplier) + zero_point)`, int32, shape of acc.

    acc: int32 (or float32). multiplier: float32, 0-d or [C] along `axis`; None stands for 1. zero_point: 0-d.
    """
    values = acc.float()
    if multiplier is not None:
        values = values * along(multiplier, acc.ndim, axis)
    shift = int(zero_point)
    return rne(values, low - shift, high - shift) + shift


def reach(tensor: QTensor) -> int:
    """The largest |q − zero_point| that the format of `tensor` allows."""
    zero = tensor.zero_point
    return max(int((tensor.high - zero).abs().max()), int((tensor.low - zero).abs().max()))


def carrier(bound: int, device: torch.device) -> torch.dtype:
    """The cheapest float type in which sums that never exceed `bound` are exact.

    float32 only on the CPU: GPU libraries may choose Winograd or TF32 kernels, which are not exact.
    Raises GraphError at 2^53 and above.
    """
    if bound < FLOAT32_EXACT and device.type == "cpu":
        return torch.float32
    if bound < FLOAT64_EXACT:
        return torch.float64
    raise GraphError(f"integer sums of up to {bound} are not exact in float64: use narrower integer formats")


def _weighted(x: QTensor, weight: QTensor, channel: int) -> tuple[Tensor, Tensor]:
    """x and weight without zero points, in a float type that holds Σ|w|·reach(x) of each output channel.

    That sum bounds each partial sum in any order, and is several times tighter than K·max|x|·max|w|.
    """
    w = weight.centred()
    others = [d for d in range(w.ndim) if d != channel]
    total = int(w.abs().sum(dim=others, dtype=torch.int64).max()) if w.numel() else 0
    kind = carrier(total * reach(x), w.device)
    return x.centred().to(kind), w.to(kind)


def _integers(values: Tensor, bias: QTensor | None, axis: int) -> Tensor:
    """Float sums as int32 with the int32 bias [O] added along `axis`; both wrap as int32 registers do."""
    acc = values.round().to(torch.int64)
    if bias is not None:
        acc = acc + along(bias.q.to(torch.int64), acc.ndim, axis)
    return acc.to(torch.int32)


def convolve(
    x: QTensor,
    weight: QTensor,
    bias: QTensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Exact int32 sums of a 1–3-D convolution, padded with real zeros.

    x: [B, I, *space]; weight: [O, I/groups, *kernel]; bias: int32 [O]. Returns [B, O, *space'].
    """
    x_f, w_f = _weighted(x, weight, 0)
    run = (F.conv1d, F.conv2d, F.conv3d)[w_f.ndim - 3]
    return _integers(run(x_f, w_f, None, stride, padding, dilation, groups), bias, 1)


def convolved(call: Call, bias: QTensor | None = None) -> Tensor:
    """The exact int32 sums of a `conv` call."""
    names = ("stride", "padding", "dilation", "groups")
    return convolve(
        quantized(call, 0), quantized(call, 1), bias, **{name: call.attrs[name] for name in names}
    )


def convolve_transposed(
    x: QTensor,
    weight: QTensor,
    bias: QTensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Exact int32 sums of a 1–3-D transposed convolution.

    x: [B, I, *space]; weight: [I, O/groups, *kernel]; bias: int32 [O]. Returns [B, O, *space'].
    """
    x_f, w_f = _weighted(x, weight, 1)
    run = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[w_f.ndim - 3]
    return _integers(run(x_f, w_f, None, stride, padding, output_padding, groups, dilation), bias, 1)


def project(x: QTensor, weight: QTensor, bias: QTensor | None = None) -> Tensor:
    """Exact int32 sums of a linear layer. x: [..., I]; weight: [O, I]; bias: int32 [O]. Returns [..., O]."""
    x_f, w_f = _weighted(x, weight, 0)
    return _integers(F.linear(x_f, w_f), bias, -1)


def multiply(a: QTensor, b: QTensor) -> Tensor:
    """Exact int32 sums of a matrix product. a: [..., M, K]; b: [..., K, N]. Returns [..., M, N]."""
    kind = carrier(a.q.shape[-1] * reach(a) * reach(b), a.q.device)
    return _integers(torch.matmul(a.centred().to(kind), b.centred().to(kind)), None, -1)
