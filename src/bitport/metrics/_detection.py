"""Average precision of boxes, as COCO counts it (Lin et al. 2014, arXiv:1405.0312; pycocotools' `COCOeval`).

    outputs   `boxes` [N, B, 4] (x1, y1, x2, y2), `scores` [N, B], `classes` [N, B]; a score ≤ 0 is padding
    labels    `boxes` [N, M, 4], `classes` [N, M] with −1 as padding; or a list of N dicts without padding

Per image and class the 100 best boxes are matched, best first, each to the free label it overlaps most, at IoU
≥ t. AP is the precision at 101 recalls, each the best at that recall or above; its mean over the classes that
have labels and over t is the result. Crowd labels and sizes of objects aren't told apart.

Legend: N samples, B boxes, M labels, I IoU limits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bitport.errors import MetricError

from ._metric import Outputs
from ._ragged import Ragged

LIMITS = np.linspace(0.5, 0.95, 10)
MAX_BOXES = 100
_CLASS, _SCORE, _LABELS, _HITS = range(4)  # columns; a hit at limit i is bit i
_Array = npt.NDArray[Any]


def mean_precision(found: Ragged, _: None) -> float:
    """COCO mean average precision of boxes, over IoU 0.50:0.95 (outputs boxes, scores, classes)."""
    return _mean_precision(found, range(len(LIMITS)))


def mean_precision_50(found: Ragged, _: None) -> float:
    """Mean average precision of boxes at IoU 0.50 (outputs boxes, scores, classes)."""
    return _mean_precision(found, (0,))


def match(outputs: Outputs, labels: Any) -> Ragged:
    """Per sample one row for each box (class, score, 0, hits) and for each class (class, 0, labels, 0)."""
    boxes, scores, classes = _predicted(outputs)
    wanted = _labelled(labels, len(boxes))
    rows = []
    for i, (label_boxes, label_classes) in enumerate(wanted):
        valid = scores[i] > 0
        rows.append(
            _matched(boxes[i][valid], scores[i][valid], classes[i][valid], label_boxes, label_classes)
        )
    return Ragged.of(rows, 4)


def _mean_precision(found: Ragged, limits: Sequence[int]) -> float:
    rows = found.values
    is_label = rows[:, _LABELS] > 0
    if not is_label.any():
        raise MetricError("the labels hold no boxes")
    classes = rows[:, _CLASS].astype(np.int64)
    labels = np.bincount(classes[is_label], rows[is_label, _LABELS])
    known = ~is_label & (classes < len(labels)) & (labels[np.minimum(classes, len(labels) - 1)] > 0)
    boxes, classes = rows[known], classes[known]
    order = np.lexsort((-boxes[:, _SCORE], classes))
    classes, hits = classes[order], boxes[order, _HITS].astype(np.int64)
    rank = np.arange(len(classes)) - _starts(classes) + 1
    sum_of_precisions = 0.0
    for limit in limits:
        # recall and precision only rise at a hit, so nothing else needs to be looked at
        at = np.flatnonzero((hits >> limit) & 1)
        found_so_far = np.arange(len(at)) - _starts(classes[at]) + 1
        # the best precision at this recall or above; 2 per class keeps the classes apart
        apart = -2.0 * classes[at]
        best = np.maximum.accumulate((found_so_far / rank[at] + apart)[::-1])[::-1] - apart
        # how many of the 101 recalls 0, 0.01 … 1 are reached with this hit and not before
        total = labels[classes[at]]
        reached = np.floor(100 * found_so_far / total) - np.floor(100 * (found_so_far - 1) / total)
        sum_of_precisions += float((best * (reached + (found_so_far == 1))).sum())
    return sum_of_precisions / (101 * np.count_nonzero(labels) * len(limits))


def _starts(classes: _Array) -> _Array:
    """Where the class of each entry begins, in a sorted list of classes."""
    starts: _Array = np.searchsorted(classes, classes)
    return starts


def _matched(
    boxes: _Array, scores: _Array, classes: _Array, label_boxes: _Array, label_classes: _Array
) -> _Array:
    """The rows of one image."""
    rows = []
    for label in np.unique(np.concatenate([classes, label_classes])):
        mine = np.flatnonzero(classes == label)
        mine = mine[np.argsort(-scores[mine], kind="stable")][:MAX_BOXES]
        theirs = label_boxes[label_classes == label]
        if len(theirs):
            rows.append([label, 0.0, len(theirs), 0])
        overlap = _iou(boxes[mine], theirs)
        free = np.ones((len(LIMITS), len(theirs)), bool)
        for box, overlaps in zip(mine, overlap, strict=True):
            hits = 0
            if len(theirs):
                reach = np.where(free & (overlaps >= LIMITS[:, None] - 1e-10), overlaps, -1.0)
                best = reach.argmax(1)
                hit = reach[np.arange(len(LIMITS)), best] >= 0
                free[hit, best[hit]] = False
                hits = int((hit << np.arange(len(LIMITS))).sum())
            rows.append([label, scores[box], 0, hits])
    return np.array(rows, np.float64).reshape(-1, 4)


def _iou(a: _Array, b: _Array) -> _Array:
    """Intersection over union of each box of a with each of b: `[B, M]`"""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    both = np.clip(high - low, 0, None).prod(-1)
    areas = [np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(-1) for boxes in (a, b)]
    union = areas[0][:, None] + areas[1][None] - both
    shares: _Array = np.divide(both, union, out=np.zeros_like(both), where=union > 0)
    return shares


def _predicted(outputs: Outputs) -> tuple[_Array, _Array, _Array]:
    if isinstance(outputs, Tensor) or not {"boxes", "scores", "classes"} <= set(outputs):
        has = "one unnamed output" if isinstance(outputs, Tensor) else f"the outputs {', '.join(outputs)}"
        raise MetricError(
            f"the network has {has}; boxes [N, B, 4], scores [N, B] and classes [N, B] were expected: return a "
            "dict of them"
        )
    boxes, scores, classes = (
        outputs[name].detach().to("cpu", torch.float64).numpy() for name in ("boxes", "scores", "classes")
    )
    if boxes.ndim != 3 or boxes.shape[2] != 4 or not boxes.shape[:2] == scores.shape == classes.shape:
        raise MetricError(
            f"boxes {list(boxes.shape)}, scores {list(scores.shape)} and classes {list(classes.shape)} don't "
            "match: [N, B, 4], [N, B] and [N, B] were expected"
        )
    for name, values in (("boxes", boxes), ("scores", scores), ("classes", classes)):
        bad = np.isnan(values).reshape(len(values), -1).any(1)
        if bad.any():
            raise MetricError(
                f"the {name} of sample {int(bad.argmax())} are NaN ({int(bad.sum())} samples in all): "
                "check the data, and the network in float"
            )
    if (classes[scores > 0] < 0).any():
        raise MetricError("a box with a score above 0 has a class below 0")
    return boxes, scores, np.rint(classes).astype(np.int64)


def _labelled(labels: Any, count: int) -> list[tuple[_Array, _Array]]:
    """(boxes `[M, 4]`, classes `[M]`) per sample, padding taken out."""
    if isinstance(labels, Mapping) and {"boxes", "classes"} <= set(labels):
        if not len(labels["boxes"]) == len(labels["classes"]) == count:
            raise MetricError(
                f"labels hold boxes of {len(labels['boxes'])} and classes of {len(labels['classes'])} samples; "
                f"the outputs are of {count}"
            )
        samples = [
            {"boxes": b, "classes": c} for b, c in zip(labels["boxes"], labels["classes"], strict=True)
        ]
    elif isinstance(labels, Sequence) and all(
        isinstance(sample, Mapping) and {"boxes", "classes"} <= set(sample) for sample in labels
    ):
        samples = list(labels)
    else:
        raise MetricError(
            "labels must be a dict of boxes [N, M, 4] and classes [N, M] (−1 is padding), or a list of one dict of "
            "boxes [M, 4] and classes [M] per sample"
        )
    if len(samples) != count:
        raise MetricError(f"there are labels of {len(samples)} samples and outputs of {count}")
    return [_sample(sample, i) for i, sample in enumerate(samples)]


def _sample(sample: Mapping[str, Any], index: int) -> tuple[_Array, _Array]:
    boxes = torch.as_tensor(sample["boxes"]).to("cpu", torch.float64).reshape(-1, 4).numpy()
    classes = torch.as_tensor(sample["classes"]).to("cpu", torch.int64).reshape(-1).numpy()
    if len(boxes) != len(classes):
        raise MetricError(f"the labels of sample {index} are {len(boxes)} boxes and {len(classes)} classes")
    boxes, classes = boxes[classes >= 0], classes[classes >= 0]
    if not (boxes[:, 2:] > boxes[:, :2]).all():  # false for NaN, too
        raise MetricError(
            f"the labels of sample {index} hold a box without area: boxes are (x1, y1, x2, y2), not "
            "(x, y, width, height)"
        )
    return boxes, classes
