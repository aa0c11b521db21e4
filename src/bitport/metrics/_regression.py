"""Errors of real values. Legend: N samples, K values per sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bitport.errors import MetricError

from ._metric import Outputs
from ._reading import mean_per_sample, paired


def mse(outputs: Outputs, reference: Any) -> Tensor:
    """Mean squared difference from the labels (without labels: from the float network's outputs)."""
    return torch.stack([mean_per_sample(error.square()) for error in _errors(outputs, reference)]).mean(0)


def mae(outputs: Outputs, reference: Any) -> Tensor:
    """Mean absolute difference from the labels (without labels: from the float network's outputs)."""
    return torch.stack([mean_per_sample(error.abs()) for error in _errors(outputs, reference)]).mean(0)


def rmse(squared: Tensor, _: None) -> float:
    """Root of the mean squared difference over the data set (without labels: from the float network's outputs)."""
    return float(squared.mean().sqrt())


def squares(outputs: Outputs, labels: Any) -> Tensor:
    """(label, squared error) of each value: `[N, 2, K]`"""
    pairs = paired(outputs, labels if isinstance(labels, Mapping) else torch.as_tensor(labels))
    rows = [
        torch.stack([label.double(), (ours.double() - label.double()).square()], 1).reshape(len(ours), 2, -1)
        for _, ours, label in pairs
    ]
    return torch.cat(rows, 2)


def r2(found: Tensor, _: None) -> float:
    """Share of the labels' variance that is explained, 1 − Σ(y − ŷ)² / Σ(y − ȳ)², mean over output values."""
    labels, errors = found[:, 0], found[:, 1]
    variance = (labels - labels.mean(0)).square().sum(0)
    if not bool((variance > 0).all()):
        raise MetricError("labels that are all the same have no variance to explain: use 'mse' or 'mae'")
    return float((1 - errors.sum(0) / variance).mean())


def _errors(outputs: Outputs, reference: Any) -> list[Tensor]:
    pairs = paired(outputs, reference if isinstance(reference, Mapping) else torch.as_tensor(reference))
    return [ours.double() - theirs.double() for _, ours, theirs in pairs]
