"""Ranges that are taken from a tensor while the network runs (ONNX DynamicQuantizeLinear, opset 11, for bytes)."""

from __future__ import annotations

import torch
from torch import Tensor

from bitport.formats import Format
from bitport.numerics.arithmetic import QTensor
from bitport.numerics.quantize import qparams, quantize


def quantize_dynamic(x: Tensor, fmt: Format) -> QTensor:
    """x rounded on a range of its own, as `dynamic` activations are while a network runs.

    Args:
        x: float, any shape, all of it sharing one range. fmt: an integer format.
    """
    ends = torch.aminmax(x) if x.numel() else (torch.zeros(()), torch.zeros(()))
    scale, zero_point = qparams(*ends, fmt)
    return QTensor(quantize(x, scale, zero_point, fmt.low, fmt.high), scale, zero_point, fmt.low, fmt.high)
