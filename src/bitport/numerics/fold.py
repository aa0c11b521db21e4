"""Folding a batch normalisation into the convolution or linear layer before it.

    y = γ · (w∗x + b − μ) / √(σ² + ε) + β   =   w'∗x + b'
    w'_O… = w_O… · f_O        b'_O = (b_O − μ_O) · f_O + β_O        f_O = γ_O / √(σ²_O + ε)

Source: Jacob et al. 2018, arXiv:1712.05877, section 3.2 (inference form).

Legend: O output channels, I input channels, G groups, … kernel positions. A convolution or linear layer has
w_OI… (I per group), a transposed convolution w_IO… (O per group).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitport.errors import WeightsError


def fold_batch_norm(
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    transposed: bool = False,
    groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """The weight and bias of the layer that does the work of both, computed in float64.

    Args:
        weight: [O, I/G, …], or [I, O/G, …] if `transposed`.
        bias: [O], or None for 0.
        mean, var: running statistics, [O].
        gamma, beta: [O], or None for 1 and 0 (a normalisation without affine parameters).
        eps: added to the variance.
        transposed: whether the layer is a transposed convolution.
        groups: G; it matters for transposed convolutions only.

    Returns: weight and bias [O] in the weight's dtype.

    Raises:
        WeightsError: var + eps isn't positive, sizes disagree, or the result isn't finite.
    """
    dtype = weight.dtype
    spread = var.detach().double() + eps
    # In the statistics' own type, which is what the network itself computes.
    wrong = ~(var.detach() + eps > 0)
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        raise WeightsError(
            f"batch normalisation has a variance of {float(var.reshape(-1)[first]):g} in channel {first}, "
            f"which with eps {eps:g} isn't positive ({int(wrong.sum())} channels in all): re-estimate its "
            "statistics on training data"
        )
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    for name, values in (("mean", mean), ("var", var), ("gamma", gamma), ("beta", beta), ("bias", bias)):
        if values is not None and values.shape != (channels,):
            raise WeightsError(
                f"batch normalisation or layer has {name} of shape {tuple(values.shape)} for {channels} "
                "output channels: only a normalisation of the layer's own output channels can be folded"
            )
    factor_O = spread.rsqrt() if gamma is None else gamma.detach().double() / spread.sqrt()
    weight_64 = weight.detach().double()
    kernel = [1] * (weight.ndim - 2)
    if transposed:
        inputs = weight.shape[0] // groups
        grouped = weight_64.reshape(groups, inputs, *weight.shape[1:])
        folded = (grouped * factor_O.reshape(groups, 1, -1, *kernel)).reshape(weight.shape)
    else:
        folded = weight_64 * factor_O.reshape(-1, 1, *kernel)
    before = torch.zeros_like(factor_O) if bias is None else bias.detach().double()
    bias_O = (before - mean.detach().double()) * factor_O
    if beta is not None:
        bias_O = bias_O + beta.detach().double()
    weight_out, bias_out = folded.to(dtype), bias_O.to(dtype)
    if not bool(torch.isfinite(weight_out).all() and torch.isfinite(bias_out).all()):
        raise WeightsError(
            f"folding a batch normalisation overflows {str(dtype).removeprefix('torch.')} or meets NaN: "
            "check its parameters and statistics, or keep it unfolded"
        )
    return weight_out, bias_out
