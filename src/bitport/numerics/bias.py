"""Bias correction: quantizing weights shifts the mean of a layer's outputs; the bias takes the shift back.

    measured   b'_C = b_C + E[y_C] − E[ỹ_C]                 ỹ: output of the quantized layer
    analytic   b'_O = b_O − Σ_I… (w̃ − w)_OI… · E[x_I]       as E[ỹ] − E[y] = (w̃ − w) E[x]

Source: Nagel et al. 2019, arXiv:1906.04721, section 4.2.

Legend: C = O output channels, I input channels, G groups, … kernel positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitport.errors import WeightsError


def corrected_bias(bias: Tensor | None, mean_float_C: Tensor, mean_quantized_C: Tensor) -> Tensor:
    """The bias after which the quantized layer's mean output equals the float layer's.

    Args:
        bias: [C], or None for 0.
        mean_float_C, mean_quantized_C: mean outputs per channel of the float and of the quantized layer over
            the same data, [C].

    Returns: [C] in the bias's dtype (that of `mean_float_C` without a bias).

    Raises:
        WeightsError: sizes disagree or the result isn't finite.
    """
    like = mean_float_C if bias is None else bias
    if mean_float_C.shape != mean_quantized_C.shape or mean_float_C.shape != like.shape:
        raise WeightsError(
            f"bias correction got a bias of shape {tuple(like.shape)} and means of shapes "
            f"{tuple(mean_float_C.shape)} and {tuple(mean_quantized_C.shape)}: give one value per output "
            "channel"
        )
    shift_C = mean_float_C.detach().double() - mean_quantized_C.detach().double()
    return shifted_bias(bias, shift_C, like.dtype)


def analytic_bias(
    bias: Tensor | None,
    weight: Tensor,
    quantized_weight: Tensor,
    mean_input_I: Tensor,
    groups: int = 1,
) -> Tensor:
    """The bias that makes up for the weight error, from the mean input alone.

    Exact for a linear layer; for a convolution it takes each position to have the channel's mean input, which
    padding contradicts at the border.

    Args:
        bias: [O], or None for 0.
        weight, quantized_weight: [O, I/G, …], the latter dequantized.
        mean_input_I: mean input per channel, [I].
        groups: G.

    Returns: [O] in the bias's dtype (the weight's without a bias).

    Raises:
        WeightsError: sizes disagree or the result isn't finite.
    """
    outputs, inputs = weight.shape[0], weight.shape[1] * groups
    if quantized_weight.shape != weight.shape or mean_input_I.shape != (inputs,) or outputs % groups:
        raise WeightsError(
            f"bias correction got weights of shapes {tuple(weight.shape)} and "
            f"{tuple(quantized_weight.shape)} with {groups} groups and a mean input of shape "
            f"{tuple(mean_input_I.shape)}: give weights of one shape and one mean per input channel"
        )
    error = quantized_weight.detach().double() - weight.detach().double()
    error_OI = error if error.ndim == 2 else error.flatten(2).sum(-1)
    error_GOI = error_OI.reshape(groups, outputs // groups, -1)
    mean_GI = mean_input_I.detach().double().reshape(groups, -1)
    shift_O = -torch.einsum("goi,gi->go", error_GOI, mean_GI).reshape(-1)
    return shifted_bias(bias, shift_O, weight.dtype if bias is None else bias.dtype)


def shifted_bias(bias: Tensor | None, shift: Tensor, dtype: torch.dtype) -> Tensor:
    """bias + shift, computed in float64, in `dtype`. Raises WeightsError where the result isn't finite."""
    result = (shift if bias is None else bias.detach().double() + shift).to(dtype)
    if not bool(torch.isfinite(result).all()):
        raise WeightsError(
            "bias correction gives NaN or infinite values: look for non-finite activations in the "
            "calibration data"
        )
    return result
