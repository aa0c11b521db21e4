"""What LiteRT multiplies in float: rows that it rounds while it runs, and products without an integer kernel."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...numerics.arithmetic import Call, QTensor
from .._xnnpack import rounded_rows


def in_float(call: Call) -> Tensor:
    """A product that a plan of another runtime takes as floats out of an integer kernel: LiteRT multiplies floats."""
    x, weight, *bias = (v.dequantize() if isinstance(v, QTensor) else v for v in call.operands)
    return torch.matmul(x, weight) if call.kind == "matmul" else F.linear(x, weight, *bias)


def linear_dynamic(call: Call) -> Tensor:
    """FULLY_CONNECTED of floats with stored weights: each row is rounded to 8 bits on a range of its own.

    operands: x float [..., I], weight `Coded` [O, I], bias float or None.
    """
    x, weight, bias = call.operands
    q, factor = rounded_rows(x)
    return F.linear(q / factor, weight.dequantize(), bias)
