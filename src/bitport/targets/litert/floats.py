"""What LiteRT multiplies in float: rows that it rounds while it runs."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ...numerics.arithmetic import Call
from .._xnnpack import rounded_rows


def linear_dynamic(call: Call) -> Tensor:
    """FULLY_CONNECTED of floats with stored weights: each row is rounded to 8 bits on a range of its own.

    operands: x float [..., I], weight `Coded` [O, I], bias float or None.
    """
    x, weight, bias = call.operands
    q, factor = rounded_rows(x)
    return F.linear(q / factor, weight.dequantize(), bias)
