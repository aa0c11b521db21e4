"""How ONNX Runtime computes 8-bit operators: the same integers, bit for bit.

Measured against ONNX Runtime 1.31.1 on x86-64 with AVX-512: one-op graphs, unsigned activations, signed
weights, 0 differing integers. The formulas are those of its QLinear* kernels and of MLAS
(github.com/microsoft/onnxruntime, contrib_ops/cpu/quantization and core/mlas/lib). ARM rounds add otherwise.

ONNX Runtime runs `u8 = s8 + 128`. Where the zero point is added before rounding (add, mul, average pool) a
shift by 128 changes the result, so those kernels compute with unsigned values and shift back.

A kernel maps a `Call` to int32 in bitport's signed scheme, or to float32 where `call.out` is None.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from bitport.errors import TargetError
from bitport.graph.experts import rows_of
from bitport.numerics.arithmetic import (
    Call,
    QSpec,
    QTensor,
    along,
    convolved,
    fma,
    integer_bias,
    multiply,
    project,
    quantize,
    quantized,
    requantize_float,
    rne,
    spread,
    stored,
)
from bitport.targets.onnxruntime.float_ops import FLOAT_OPS, ordered_sum

__all__ = ["FLOAT_OPS", "KERNELS"]

SHIFT = 128


def conv(call: Call) -> Tensor:
    """QLinearConv: `clip(rne(float32(acc)·(s_x·s_w/s_y)) + z_y)`, the multiplier float32, left to right."""
    scale = quantized(call, 0).scale * quantized(call, 1).scale
    return _finish(call, convolved(call, integer_bias(call)), scale, 1)


def linear(call: Call) -> Tensor:
    """QGemm, QLinearMatMul, MatMulIntegerToFloat: as conv; with float output `float32(acc)·(s_x·s_w)`.

    A float32 bias [O] is possible with float output only (MatMul and Add fused to MatMulIntegerToFloat).
    """
    x, weight = quantized(call, 0), quantized(call, 1)
    bias = call.operands[2] if len(call.operands) > 2 else None
    if isinstance(bias, Tensor):
        if call.out is not None:
            raise TargetError(
                "linear: a float bias with an integer output: give the bias as int32 of scale s_x·s_w"
            )
        return _finish(call, project(x, weight), x.scale * weight.scale, -1) + bias
    return _finish(call, project(x, weight, integer_bias(call)), x.scale * weight.scale, -1)


def matmul(call: Call) -> Tensor:
    """QLinearMatMul, MatMulIntegerToFloat: as linear; the second operand may have one scale per column."""
    a, b = quantized(call, 0), quantized(call, 1)
    return _finish(call, multiply(a, b), a.scale * b.scale, -1)


def experts(call: Call) -> Tensor:
    """One MatMulIntegerToFloat an expert, their rows put together; a QuantizeLinear of its own where wanted.

    operands: x [S, K], weight [E·N, K] with scales [E·N], ends: int [E].
    """
    x, weight, ends = quantized(call, 0), quantized(call, 1), call.operands[2]
    if not isinstance(ends, Tensor):
        raise TargetError("experts: where each expert's rows end must be plain integers")
    outputs = weight.q.shape[0] // ends.shape[0]
    result = torch.zeros(x.q.shape[0], outputs)
    for expert, rows in rows_of(ends):
        own = slice(expert * outputs, (expert + 1) * outputs)
        w = replace(weight, q=weight.q[own])
        if weight.axis is not None:
            w = replace(w, scale=weight.scale[own], zero_point=weight.zero_point[own])
        acc = project(replace(x, q=x.q[rows]), w)
        result[rows] = acc.float() * along(x.scale * w.scale, 2, -1)
    return result if call.out is None else quantize(result, call.out)


def add(call: Call) -> Tensor:
    """QLinearAdd (AVX2): `rne(fma(a, r_a, fma(b, r_b, z_y − fma(r_a, z_a, r_b·z_b))))`, r = s/s_y, unsigned.

    The operands change places where the first one is constant along the innermost broadcast span.
    """
    first, second, out = quantized(call, 0), quantized(call, 1), stored(call)
    if _is_span_scalar(first.q.shape, second.q.shape):
        first, second = second, first
    ratio_a, ratio_b = first.scale / out.scale, second.scale / out.scale
    zero_a, zero_b, zero_y = (_unsigned(t.zero_point) for t in (first, second, out))
    fixed = zero_y - fma(ratio_a, zero_a, ratio_b * zero_b)
    inner = fma(_unsigned(second.q), ratio_b, fixed)
    return _signed(fma(_unsigned(first.q), ratio_a, inner), out)


def mul(call: Call) -> Tensor:
    """QLinearMul: `rne((a − z_a)·(b − z_b)·(s_a·s_b/s_y) + z_y)`, multiply and add rounded apart."""
    a, b, out = quantized(call, 0), quantized(call, 1), stored(call)
    scaled = (a.centred() * b.centred()).float() * (a.scale * b.scale / out.scale)
    return _signed(scaled + _unsigned(out.zero_point), out)


def cat(call: Call) -> Tensor:
    """QLinearConcat: a copy where scale and zero point are the output's, else dequantize and quantize."""
    out = stored(call)
    parts = [_requantized(quantized(call, i), out) for i in range(len(call.operands))]
    return torch.cat(parts, call.attrs["dim"])


def where(call: Call) -> Tensor:
    """QLinearWhere: both sides as in QLinearConcat. operands: (condition: bool tensor, x, y), broadcast."""
    condition, out = call.operands[0], stored(call)
    if not isinstance(condition, Tensor):
        raise TargetError("where: the condition must be a bool tensor, not a quantized one")
    first, second = (_requantized(quantized(call, slot), out) for slot in (1, 2))
    return torch.where(condition.bool(), first, second)


def global_avg_pool(call: Call) -> Tensor:
    """QLinearGlobalAveragePool: `clip(rne(Σ(x − z_x)·(s_x/(s_y·n))) + z_y)`.

    x: [B, C, *space]; the mean is over *space, whose dimensions are kept with size 1.
    """
    x, out = quantized(call, 0), stored(call)
    dims = list(range(2, x.q.ndim))
    total = x.centred().sum(dim=dims, keepdim=True, dtype=torch.int64).to(torch.int32)
    count = math.prod(x.q.shape[2:])
    return requantize_float(total, x.scale / (out.scale * count), out.zero_point, out.low, out.high)


def avg_pool(call: Call) -> Tensor:
    """QLinearAveragePool: `rne(Σ x / n / s_y + z_y)`, a float32 sum of dequantized values, row by row.

    Raises TargetError for padded windows that overhang in ceil_mode and count the padding (ONNX Runtime
    divides them by the whole kernel, which is wrong by tens of steps), and for a divisor of one's own.
    """
    x, out, attrs = quantized(call, 0), stored(call), call.attrs
    if attrs.get("divisor_override"):
        raise TargetError(
            "avg_pool: ONNX Runtime has no divisor_override: use a plain pool and scale its result"
        )
    size = x.q.shape[2:]
    kernel, padding = spread(attrs["kernel"], len(size)), spread(attrs["padding"], len(size))
    stride = spread(attrs["stride"] or kernel, len(size))
    if kernel == tuple(size) and not any(padding):
        return global_avg_pool(call)
    ceil_mode = bool(attrs.get("ceil_mode"))
    axes = list(zip(size, kernel, stride, padding, strict=True))
    windows = [_windows(n, k, s, p, ceil_mode) for n, k, s, p in axes]
    overhang = [(w - 1) * s + k - n - 2 * p for w, (n, k, s, p) in zip(windows, axes, strict=True)]
    count_padding = bool(attrs.get("count_include_pad", True)) and any(padding)
    if count_padding and max(overhang) > 0:
        raise TargetError(
            "avg_pool: ONNX Runtime is wrong in ceil_mode with count_include_pad and padding: use float"
        )
    borders = [b for p, o in zip(padding[::-1], overhang[::-1], strict=True) for b in (p, p + max(o, 0))]
    values = F.pad(x.dequantize(), borders)
    inside = F.pad(torch.ones(size, device=values.device), borders)
    total, count = values.new_zeros(()), values.new_zeros(())
    for offset in product(*(range(k) for k in kernel)):
        corners = zip(offset, windows, stride, strict=True)
        view = tuple(slice(o, o + (w - 1) * s + 1, s) for o, w, s in corners)
        total = total + values[(slice(None), slice(None), *view)]
        count = count + inside[view]
    if count_padding:
        count = torch.full_like(count, math.prod(kernel))
    return _signed(total / count / out.scale + _unsigned(out.zero_point), out)


def max_pool(call: Call) -> Tensor:
    """MaxPool on the integers (its q/dq pairs are dropped where they are equal); order is preserved."""
    x, attrs = quantized(call, 0), call.attrs
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[x.q.ndim - 3]
    pooled = pool(
        x.q.float(),
        attrs["kernel"],
        attrs["stride"] or None,
        attrs["padding"],
        attrs.get("dilation", 1),
        bool(attrs.get("ceil_mode")),
    )
    moved = QTensor(pooled.to(torch.int32), x.scale, x.zero_point, x.low, x.high, x.axis)
    return _requantized(moved, stored(call))


def softmax(call: Call) -> Tensor:
    """QLinearSoftmax: a float32 table of exp over the 256 steps below the maximum, a running float32
    sum, then `min(rne(e·floor(1/s_y)/Σe) + z_y, 255)`, unsigned.

    The table is scaled so that the sum uses float32's whole range.
    Raises TargetError where `e·floor(1/s_y)` overflows and ONNX Runtime returns the zero point instead: on an
    axis of size 1, or with an output scale so small that it can't hold the maximum.
    """
    x, out, dim = quantized(call, 0), stored(call), call.attrs["dim"]
    levels = x.q.movedim(dim, -1)
    length = levels.shape[-1]
    step = float(x.scale)
    largest = torch.tensor(torch.finfo(torch.float32).max) / length
    headroom = max(0.0, float(torch.tensor(math.log(float(largest)))) - 5) / step
    table = torch.tensor([math.exp((i - 255 + headroom) * step) for i in range(256)], device=levels.device)
    exps = table[(levels - levels.amax(-1, keepdim=True) + 255).long()]
    scaled = exps * torch.floor(1 / out.scale)
    if not bool(scaled.isfinite().all()):
        raise TargetError(
            f"softmax: {length} elements at output scale {float(out.scale):.3g} overflow in ONNX Runtime: "
            "replace it by ones where the axis has size 1, otherwise keep it in float"
        )
    values = torch.round(scaled / ordered_sum(exps).unsqueeze(-1)) + _unsigned(out.zero_point)
    return _signed(values, out).movedim(-1, dim)


def sigmoid(call: Call) -> Tensor:
    """QLinearSigmoid: a table of 256 entries: dequantize, ONNX Runtime's float sigmoid, quantize."""
    return _float_inside(call, "sigmoid")


def leaky_relu(call: Call) -> Tensor:
    """QLinearLeakyRelu: a table of 256 entries: dequantize, `x ≥ 0 ? x : slope·x`, quantize."""
    x = quantized(call, 0).dequantize()
    slope = torch.tensor(call.attrs["negative_slope"], dtype=torch.float32)
    return quantize(torch.where(x >= 0, x, x * slope), stored(call))


def relu(call: Call) -> Tensor:
    """Dequantize, relu, quantize. (Where the output's zero point is its lowest integer, relu is dropped.)"""
    return quantize(quantized(call, 0).dequantize().relu(), stored(call))


KERNELS: dict[str, Callable[[Call], Tensor]] = {
    "conv": conv,
    "linear": linear,
    "matmul": matmul,
    "experts": experts,
    "add": add,
    "mul": mul,
    "cat": cat,
    "where": where,
    "global_avg_pool": global_avg_pool,
    "avg_pool": avg_pool,
    "max_pool": max_pool,
    "softmax": softmax,
    "sigmoid": sigmoid,
    "leaky_relu": leaky_relu,
    "relu": relu,
}
"""Operators that ONNX Runtime computes on integers. Everything else runs in float32: FLOAT_OPS."""


def _finish(call: Call, acc: Tensor, scale: Tensor, axis: int) -> Tensor:
    """Integer sums as output: requantized, or for float output times `scale` (0-d or [C] along `axis`)."""
    if call.out is None:
        return acc.float() * along(scale, acc.ndim, axis)
    out = call.out
    return requantize_float(acc, scale / out.scale, out.zero_point, out.low, out.high, axis)


def _unsigned(q: Tensor) -> Tensor:
    return (q + SHIFT).float()


def _signed(values: Tensor, out: QSpec) -> Tensor:
    """Unsigned float values, zero point included, rounded and clipped to the signed integers of `out`."""
    return rne(values, out.low + SHIFT, out.high + SHIFT) - SHIFT


def _requantized(x: QTensor, out: QSpec) -> Tensor:
    same = torch.equal(x.scale, out.scale) and torch.equal(x.zero_point, out.zero_point)
    return x.q.clamp(out.low, out.high) if same else quantize(x.dequantize(), out)


def _float_inside(call: Call, kind: str) -> Tensor:
    return quantize(FLOAT_OPS[kind](call.attrs, quantized(call, 0).dequantize()), stored(call))


def _is_span_scalar(first: torch.Size, second: torch.Size) -> bool:
    """Whether ONNX Runtime's broadcaster walks `second` while `first` stands still.

    It decides at the innermost dimension where one of the two is larger than 1 (failing that, at the
    outermost they share), and looks at the first operand only.
    """
    if not first:
        return True
    if not second:
        return first[-1] == 1
    pairs = list(zip(reversed(first), reversed(second), strict=False))
    decisive = next((pair for pair in pairs if max(pair) > 1), pairs[-1])
    return decisive[0] == 1


def _windows(size: int, kernel: int, stride: int, padding: int, ceil_mode: bool) -> int:
    """How many windows fit along one dimension (torch's rule: none may begin in the right padding)."""
    free = size + 2 * padding - kernel
    count = (-(-free // stride) if ceil_mode else free // stride) + 1
    return count - 1 if ceil_mode and (count - 1) * stride >= size + padding else count
