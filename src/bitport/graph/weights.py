"""Parameters that are no numbers: refused by name and count, or set to zero where that was asked for."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bitport.errors import LoadError, WeightsError

NONFINITE = ("refuse", "zero")


def settled(model: nn.Module, nonfinite: str) -> list[str]:
    """Holds a model to finite weights, or makes them so in place; returns what was done, in sentences.

    Args:
        nonfinite: "refuse", or "zero": NaN and infinite parameters, and NaN in other buffers, become 0. Running
            statistics are refused all the same: a mean or a variance of 0 would be a wrong one, not a missing one.

    Raises:
        LoadError: `nonfinite` is something else; lazy or complex parameters.
        WeightsError: as `check_weights`.
    """
    if nonfinite not in NONFINITE:
        raise LoadError(f"nonfinite={nonfinite!r} is unknown: use {' or '.join(map(repr, NONFINITE))}")
    said = [] if nonfinite == "refuse" else _zero(model)
    check_weights(model)
    return said


def check_weights(model: nn.Module) -> None:
    """Refuses NaN or infinite parameters and statistics; other buffers (masks) may be infinite but not
    NaN."""
    for name, tensor, finite in _tensors(model):
        if nn.parameter.is_lazy(tensor):
            raise LoadError(f"{name} is uninitialised: run the model once before loading it")
        if tensor.is_complex():
            raise LoadError(f"{name} is complex ({tensor.dtype}): only real networks can be compressed")
        if not tensor.is_floating_point() or tensor.is_meta:
            continue
        data = tensor.detach()
        if name.endswith("running_var") and bool((data < 0).any()):
            channel = int(torch.nonzero(data.flatten() < 0)[0])
            raise WeightsError(
                f"{name} holds a variance of {float(data.flatten()[channel]):g} in channel {channel}: "
                "re-estimate its statistics on training data"
            )
        if _all_finite(data):
            continue
        nans, infs = _count(data)
        if nans or finite:
            remedy = "train it again or repair it"
            if not _is_statistic(name):
                remedy += ' (loading with nonfinite = "zero" sets such values to 0)'
            raise WeightsError(
                f"{name} holds {nans} NaN and {infs} infinite of {tensor.numel()} values: {remedy}"
            )


def _all_finite(data: Tensor) -> bool:
    """Extremes tell it without the copies that `isfinite` makes of a tensor as large as memory."""
    if data.dtype not in (torch.float32, torch.float64) or not data.numel():
        return bool(torch.isfinite(data).all())
    return all(math.isfinite(float(extreme)) for extreme in torch.aminmax(data))


def _zero(model: nn.Module) -> list[str]:
    said = []
    for name, tensor, finite in _tensors(model):
        if nn.parameter.is_lazy(tensor) or not tensor.is_floating_point() or _is_statistic(name):
            continue
        data = tensor.detach()
        bad = ~torch.isfinite(data) if finite else torch.isnan(data)
        if bool(bad.any()):
            nans, infs = _count(data[bad])
            # not in place: an expanded tensor may not be written to
            tensor.data = torch.where(bad, torch.zeros_like(data), data)
            said.append(
                f"{nans} NaN and {infs} infinite of {tensor.numel()} values of {name!r} were set to 0, as asked for: "
                "the float network that everything is compared with has those zeros, too"
            )
    return said


def _tensors(model: nn.Module) -> list[tuple[str, Tensor, bool]]:
    """(name, tensor, whether infinite values are wrong, too); tied ones once."""
    found: list[tuple[str, Tensor, bool]] = [(name, p, True) for name, p in model.named_parameters()]
    return found + [(name, buffer, _is_statistic(name)) for name, buffer in model.named_buffers()]


def _is_statistic(name: str) -> bool:
    return name.rpartition(".")[2].startswith("running_")


def _count(data: Tensor) -> tuple[int, int]:
    return int(torch.isnan(data).sum()), int(torch.isinf(data).sum())
