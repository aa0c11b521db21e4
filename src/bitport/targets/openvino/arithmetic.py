"""How OpenVINO's CPU plugin computes 8-bit operators, as near to the bit as its float32 arithmetic allows.

Measured against OpenVINO 2026.4.1 on x86-64 with AVX-512: one-op graphs, unsigned activations, signed weights. It sums
integers exactly and does everything else in float32: `FakeQuantize` of real values, where ONNX Runtime and its like
multiply sums by one factor. So exact halves may be rounded the other way.

A kernel maps a `Call` to int32 in bitport's signed scheme, or to float32 where `call.out` is None.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from ...numerics.arithmetic import (
    Call,
    QSpec,
    QTensor,
    along,
    convolved,
    fma,
    multiply,
    project,
    quantized,
    rne,
    stored,
)

SHIFT = 128
LEVELS = 255


def quantize(values: Tensor, out: QSpec) -> Tensor:
    """FakeQuantize: `rne(clip(x, il, ih)·k + (−il·k))`, il = −z·s, ih = (255 − z)·s, k = 255/(ih − il), float32."""
    low, high, factor = _fake_quantize(out)
    scaled = values.maximum(low).minimum(high) * factor + -low * factor
    return rne(scaled, out.low + SHIFT, out.high + SHIFT) - SHIFT


def _fake_quantize(out: QSpec) -> tuple[Tensor, Tensor, Tensor]:
    """il, ih and k of FakeQuantize."""
    zero = (out.zero_point + SHIFT).float()
    low, high = -zero * out.scale, (LEVELS - zero) * out.scale
    return low, high, LEVELS / (high - low)


def conv(call: Call) -> Tensor:
    """`FakeQuantize(acc·(s_x·s_w) + b)`, the bias in float32."""
    scale = quantized(call, 0).scale * quantized(call, 1).scale
    return _finish(call, convolved(call), scale, 1)


def linear(call: Call) -> Tensor:
    """As conv."""
    x, weight = quantized(call, 0), quantized(call, 1)
    return _finish(call, project(x, weight), x.scale * weight.scale, -1)


def matmul(call: Call) -> Tensor:
    """As conv, without a bias; the second operand may have one scale per column."""
    a, b = quantized(call, 0), quantized(call, 1)
    return _finish(call, multiply(a, b), a.scale * b.scale, -1)


def avg_pool(call: Call) -> Tensor:
    """`rne(fma(Σq/n, s_x·k, −il·k − z_x·(s_x·k)))` with FakeQuantize's il and k: the mean is one of codes, q + 128.

    In one fused operation, so that a mean near a half is rounded otherwise than step by step. Padding doesn't count:
    the table has no other pools.
    """
    x, out, attrs = quantized(call, 0), stored(call), call.attrs
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[x.q.ndim - 3]
    sizes = (attrs["kernel"], attrs["stride"], attrs["padding"], bool(attrs.get("ceil_mode")))
    mean = pool(x.centred().double(), *sizes, count_include_pad=False)  # exact
    zero_x = (x.zero_point + SHIFT).float()
    low, _, factor = _fake_quantize(out)
    step = x.scale * factor
    shift = -low * factor - zero_x * step
    codes = fma((mean + zero_x.double()).float(), step, shift)
    return rne(codes, out.low + SHIFT, out.high + SHIFT) - SHIFT


KERNELS: dict[str, Callable[[Call], Tensor]] = {
    "conv": conv,
    "linear": linear,
    "matmul": matmul,
    "avg_pool": avg_pool,
}


def _finish(call: Call, acc: Tensor, scale: Tensor, axis: int) -> Tensor:
    """Integer sums as real numbers with the bias added, quantized where integers are wanted."""
    real = acc.float() * along(scale, acc.ndim, axis)
    bias = call.operands[2] if len(call.operands) > 2 else None
    if bias is not None:
        values = bias.dequantize() if isinstance(bias, QTensor) else bias
        real = real + along(values, acc.ndim, axis)
    return real if call.out is None else quantize(real, call.out)
