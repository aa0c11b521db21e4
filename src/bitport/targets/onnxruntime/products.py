"""How ONNX Runtime multiplies float inputs with stored weights: rounded while running, or as they are.

Measured against version 1.31.1 on x86-64 with AVX-512. Kernels of `arithmetic` take a `Call` whose operands are
(x: float32 [..., K], weight: `Coded` [N, K], bias: float32 [N] or None) and return float32 [..., N].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import TargetError
from ...numerics.arithmetic import Call, QTensor, project
from ...plan.constants import Coded, is_plain
from .blockwise import ROUNDS_ACTIVATIONS, layout

BYTE_LEVELS = 255
LARGEST_BLOCK_CODE = 127


def kernels(level: int) -> dict[str, Callable[[Call], Tensor]]:
    """By kind; level: accuracy_level of MatMulNBits."""
    return {"linear_dynamic": dynamic, "linear_weights": lambda call: blockwise(call, level)}


def dynamic(call: Call) -> Tensor:
    """DynamicQuantizeMatMul: `float32(Σ (q − z)·w)·(s_x·s_w) + bias`, to the bit.

    s_x = (max(x, 0) − min(x, 0))/255 over all of x, z = rne(−min/s_x), q = clamp(rne(x/s_x) + z, 0, 255)
    (ONNX DynamicQuantizeLinear, opset 11); an x of zeros has scale 1.

    Raises TargetError for a weight with a scale per group.
    """
    x, weight, bias = _operands(call)
    grid = weight.grid
    if not is_plain(grid.format):
        raise TargetError(f"linear: DynamicQuantizeMatMul can't multiply with {grid.format}")
    axis = 0 if grid.scale.ndim else None
    low, high = grid.format.low, grid.format.high
    stored = QTensor(weight.codes, grid.scale, grid.zero_point, low, high, axis)
    rounded = _ranged(x)
    # [..., N] · [N]: the scale of each output feature
    result = project(rounded, stored).float() * (rounded.scale * grid.scale)
    return result if bias is None else result + bias


def _ranged(x: Tensor) -> QTensor:
    smallest, largest = (
        (x.amin().clamp(max=0.0), x.amax().clamp(min=0.0)) if x.numel() else (torch.zeros(()),) * 2
    )
    scale = (largest - smallest) / BYTE_LEVELS
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = torch.round(-smallest / scale).clamp(0, BYTE_LEVELS)
    q = (torch.round(x / scale) + zero).clamp(0, BYTE_LEVELS)
    return QTensor(q.to(torch.int32), scale, zero.to(torch.int32), 0, BYTE_LEVELS)


def blockwise(call: Call, level: int) -> Tensor:
    """MatMulNBits: floats times decoded weights, summed in an order of its own (1e-6 of the largest value).

    At accuracy level 4 each block of x is first rounded to q = rne(x·(127/max|x|)) and stands for q·(max|x|/127).
    """
    x, weight, bias = _operands(call)
    fmt = weight.grid.format
    if level == ROUNDS_ACTIVATIONS and fmt.is_int:
        found = layout(fmt.bits, fmt.group, x.shape[-1], level)
        if found is not None:
            x = rounded_in_blocks(x, found.block)
    return F.linear(x, weight.dequantize(), bias)


def rounded_in_blocks(x: Tensor, block: int) -> Tensor:
    """x [..., K] as MatMulNBits takes it at accuracy level 4: 8 bits and a scale for each `block` values of a row."""
    width = x.shape[-1]
    parts = F.pad(x, (0, -width % block)).reshape(*x.shape[:-1], -(-width // block), block)
    most = parts.abs().amax(-1, keepdim=True)
    inverse = torch.where(most == 0, torch.zeros_like(most), LARGEST_BLOCK_CODE / most)
    rounded = torch.round(parts * inverse) * (most / LARGEST_BLOCK_CODE)
    return rounded.reshape(*x.shape[:-1], -1)[..., :width]


def _operands(call: Call) -> tuple[Tensor, Coded, Tensor | None]:
    x, weight, bias = (*call.operands, None)[:3]
    if not isinstance(x, Tensor) or not isinstance(weight, Coded):
        raise TargetError(f"{call.kind}: takes a float input and a stored weight")
    return x, weight, bias
