"""Metrics of classes: of samples, of pixels, of tokens.

Legend: N samples, C classes, T positions (tokens, pixels …) per sample, M rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bitport.errors import MetricError

from ._metric import Outputs
from ._ragged import Ragged
from ._reading import (
    IGNORED_LABEL,
    by_class,
    classified,
    has_classes,
    mean_of_valid,
    mean_per_sample,
    paired,
    single,
)

IGNORED_PIXEL = 255  # of segmentation masks stored in 8 bits (Pascal VOC, Cityscapes, ADE20K)
_BLOCK = 2**24  # logits that are widened to float64 at a time


def top1(outputs: Outputs, labels: Any) -> Tensor:
    """Share of a sample's labels that are the most likely class, 0 to 1."""
    logits, target, _ = classified(outputs, labels)
    return mean_of_valid((logits.argmax(-1) == target).double(), target)


def agreement(outputs: Outputs, reference: Outputs) -> Tensor:
    """Share of a sample's positions whose most likely class is the float network's, over outputs with classes."""
    pairs = paired(outputs, reference)
    judged = [pair for pair in pairs if has_classes(pair[1])] or pairs
    shares = [
        mean_per_sample((by_class(ours, name).argmax(-1) == by_class(theirs, name).argmax(-1)).double())
        for name, ours, theirs in judged
    ]
    return torch.stack(shares).mean(0)


# ------------------------------------------------------------------------------------------------ likelihood


def nll(outputs: Outputs, labels: Any) -> Tensor:
    """Negative log likelihood of the labels in nats per label, from logits; labels at their logits' positions."""
    logits, target, safe = classified(outputs, labels)
    return mean_of_valid(_losses(logits, target, safe), target)


def perplexity(found: Tensor, _: None) -> float:
    """exp of the mean loss per token; labels are the token ids: position t's logits are held against token t + 1."""
    return _exp_of_mean(found)


def aligned_perplexity(found: Tensor, _: None) -> float:
    """Perplexity of labels that stand at their logits' positions: masked tokens, or labels shifted already."""
    return _exp_of_mean(found)


def next_token_losses(outputs: Outputs, labels: Any) -> Tensor:
    """(nats, labels that count) per sample, the logits at t against label t + 1: `[N, 2]`"""
    logits, target = single(outputs), torch.as_tensor(labels).to("cpu")
    if logits.dim() != 3 or target.shape != logits.shape[:2]:
        raise MetricError(
            f"outputs {list(logits.shape)} and labels {list(target.shape)} are no next-token task: expected logits "
            "[N, T, V] and token ids [N, T]; where labels stand at their logits' positions use 'aligned_perplexity'"
        )
    if logits.shape[1] < 2:
        raise MetricError("sequences of one token have no next token")
    # [N·(T − 1), V] leaves no doubt about where the classes are
    count, steps = len(logits), logits.shape[1] - 1
    rows, target, safe = classified(logits[:, :-1].flatten(0, 1), target[:, 1:].flatten())
    losses = _losses(rows, target, safe).reshape(count, steps)
    return torch.stack([losses.sum(1), (target != IGNORED_LABEL).reshape(count, steps).sum(1).double()], 1)


def token_losses(outputs: Outputs, labels: Any) -> Tensor:
    """(nats, labels that count) per sample: `[N, 2]`"""
    logits, target, safe = classified(outputs, labels)
    losses = _losses(logits, target, safe).reshape(len(target), -1)
    return torch.stack([losses.sum(1), (target != IGNORED_LABEL).reshape(len(target), -1).sum(1).double()], 1)


def _exp_of_mean(found: Tensor) -> float:
    nats, count = found.sum(0)
    if count == 0:
        raise MetricError("every label is ignored (-100)")
    return float((nats / count).exp())


def _losses(logits: Tensor, target: Tensor, safe: Tensor) -> Tensor:
    """nats per label `[N, T…]`, 0 where the label is ignored."""
    rows, labels = logits.reshape(-1, logits.shape[-1]), safe.reshape(-1, 1)
    block = max(1, _BLOCK // rows.shape[1])
    losses = []
    for part, label in zip(torch.split(rows, block), torch.split(labels, block), strict=True):
        # Normalised per label in float64, as a mean over many small losses loses digits in float32.
        wide = part.double()
        losses.append(wide.logsumexp(-1) - wide.gather(-1, label).squeeze(-1))
    return torch.cat(losses).reshape(target.shape).masked_fill(target == IGNORED_LABEL, 0.0)


# ------------------------------------------------------------------------------------------------ counts


def f1(found: Ragged, _: None) -> float:
    """F1 of class 1 of two: logits [N, 2], or one logit per sample, [N] or [N, 1], above 0 for class 1."""
    both, predicted, labelled = _totals(found)[1:]
    if len(both) < 2 or predicted[1] + labelled[1] == 0:
        raise MetricError("class 1 is neither labelled nor predicted, so it has no F1")
    return float(2 * both[1] / (predicted[1] + labelled[1]))


def f1_macro(found: Ragged, _: None) -> float:
    """Mean over classes of F1 = 2·TP / (2·TP + FP + FN), of the classes that are labelled or predicted."""
    seen, both, predicted, labelled = _totals(found)
    return float((2 * both[seen] / (predicted + labelled)[seen]).mean())


def mean_iou(found: Ragged, _: None) -> float:
    """Mean over classes of intersection / union of pixels over the data set; labels 255 and -100 are ignored."""
    seen, both, predicted, labelled = _totals(found)
    return float((both[seen] / (predicted + labelled - both)[seen]).mean())


def binary_counts(outputs: Outputs, labels: Any) -> Ragged:
    """As `class_counts`, of two classes."""
    logits, target = single(outputs), torch.as_tensor(labels).to("cpu")
    if logits.dim() == 1 or logits.shape[1:] == (1,):
        if logits.numel() != target.numel() or len(target) != len(logits):
            raise MetricError(
                f"outputs {list(logits.shape)} and labels {list(target.shape)} don't match: one label per sample"
            )
        if not bool(((target == 0) | (target == 1)).all()):  # also floats, which a binary loss wants
            raise MetricError("labels of one logit per sample must be 0 or 1")
        logits, target = torch.nn.functional.pad(logits.reshape(-1, 1), (1, 0)), target.reshape(-1).long()
    elif logits.shape[-1] != 2 and logits.shape[1] != 2:
        raise MetricError(
            f"outputs {list(logits.shape)} tell more than two classes apart: use 'f1_macro', or Metric(…, dataset=…)"
        )
    return class_counts(logits, target)


def class_counts(outputs: Outputs, labels: Any) -> Ragged:
    """Per sample a row (class, right, predicted, labelled) for each class that is predicted or labelled."""
    return _counts(*classified(outputs, labels)[:2])


def pixel_counts(outputs: Outputs, labels: Any) -> Ragged:
    """As `class_counts`, of masks whose label 255 is ignored (unless the network knows so many classes)."""
    return _counts(*classified(outputs, labels, IGNORED_PIXEL)[:2])


def _counts(logits: Tensor, target: Tensor) -> Ragged:
    count, classes = len(logits), logits.shape[-1]
    predicted, labels = logits.argmax(-1).reshape(count, -1), target.reshape(count, -1)
    places = torch.arange(count)[:, None] * classes
    valid = labels != IGNORED_LABEL

    def number(chosen: Tensor, where: Tensor) -> npt.NDArray[np.int64]:
        found = torch.bincount((places + chosen)[where], minlength=count * classes)
        return found.reshape(count, classes).numpy()

    columns = number(labels, valid & (predicted == labels)), number(predicted, valid), number(labels, valid)
    sample, label = np.nonzero(columns[1] + columns[2])
    rows = np.stack([label, *(column[sample, label] for column in columns)], 1)
    return Ragged(rows, np.bincount(sample, minlength=count))


def _totals(found: Ragged) -> tuple[npt.NDArray[Any], ...]:
    """(whether a class was seen, right, predicted, labelled), each `[C]`"""
    rows = found.values
    if not len(rows):
        raise MetricError("every label is ignored")
    both, predicted, labelled = (np.bincount(rows[:, 0], rows[:, i]) for i in (1, 2, 3))
    return predicted + labelled > 0, both, predicted, labelled
