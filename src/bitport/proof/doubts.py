"""What makes a result doubtful although nothing failed: thin data, shared data, a float network that only guesses.

Sentences for the report; none of them changes a verdict.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .. import wording
from ..data import Source
from ..graph import Graph
from ..metrics import Metric
from ..numerics.intervals import beyond_extremes

FEW_SAMPLES = 16  # fewer distinct ones hardly show a network's ranges
ENOUGH_TO_TELL = 20  # samples, before accuracy is compared with guessing
OTHER_SCALE = (
    32  # bytes are 255 times pixels in 0…1 and 60 times normal numbers; ordinary data is within 10 of both
)


def of_data(calibration: Source, judged: Source, has_evaluation: bool, made_up: bool = False) -> list[str]:
    """Doubts about the data that ranges were measured on and the result was judged by."""
    notes = []
    if made_up:
        also = "" if has_evaluation else ", and the result was judged on them: no figure here is of real data"
        notes.append(f"the calibration data is made up: ranges were measured on synthetic inputs{also}")
    elif not has_evaluation:
        notes.append(
            "judged on the calibration data (no evaluation data was given): the real loss may be larger"
        )
    elif (shared := calibration.overlap(judged)) > 0:
        notes.append(f"{shared} samples of the calibration data are in the evaluation data too")
    if calibration.dropped:
        notes.append(f"{calibration.dropped} calibration batches held NaN and were left out")
    if (distinct := calibration.distinct()) < FEW_SAMPLES:
        beyond = wording.percent(beyond_extremes(distinct), 0)
        notes.append(
            f"the calibration data has only {distinct} distinct sample{'s' * (distinct != 1)}: in each tensor about "
            f"{beyond} of new samples go beyond its range and are clipped; give {FEW_SAMPLES} at least, better some "
            "hundreds"
        )
    return notes


def of_task(task: Mapping[str, Any], graph: Graph) -> list[str]:
    """A float network that is right no more often than guessing says nothing of what compression costs."""
    classes = graph.outputs[0].shape[-1] if len(graph.outputs) == 1 and graph.outputs[0].shape else 0
    if task["metric"] != "top1" or not task["labels"] or not isinstance(classes, int) or classes < 2:
        return []
    samples, found = task["samples"], task["float"]
    chance = 1 / classes
    # within two standard deviations of what guessing gives
    if samples < ENOUGH_TO_TELL or found > chance + 2 * math.sqrt(chance * (1 - chance) / samples):
        return []
    return [
        f"the float network itself is right on {wording.percent(found)} of {samples} samples, no better than "
        f"guessing among {classes} classes: check the preprocessing, the labels, and the order of the classes"
    ]


def of_limit(max_drop: float | None, metric: Metric) -> list[str]:
    """A limit above everything that a share can lose was probably meant in points."""
    if max_drop is None or max_drop <= 1 or not metric.binary:
        return []
    return [
        f"max_drop = {max_drop:g} allows any loss: {metric.name} is a share from 0 to 1, and one point of it is 0.01"
    ]


def of_scale(data: Source, known: Mapping[str, tuple[float, float]], whose: str) -> list[str]:
    """Inputs that are many times larger or smaller than those the network is known by: another preprocessing?

    Args:
        known: input name → (lowest, highest) value of an example; constant examples tell nothing and aren't in it.
        whose: what they are called, as "the example inputs".
    """
    notes = []
    for name, (low, high) in data.spans().items():
        if name not in known or low == high:
            continue
        ours, theirs = max(-low, high), max(-known[name][0], known[name][1])
        if ours >= OTHER_SCALE * theirs or theirs >= OTHER_SCALE * ours:
            span = f"{known[name][0]:.4g} … {known[name][1]:.4g}"
            notes.append(
                f"input {name!r} of the {data.role} data spans {low:.4g} … {high:.4g}, that of {whose} {span}: "
                "check that both are preprocessed as in training"
            )
    return notes


def of_classes(metric: str, samples: int, classes: set[int], count: int) -> list[str]:
    """Agreement with a network that says the same of everything is empty.

    Args:
        classes: those the float network chose, among `count`.
    """
    if metric != "agreement" or samples < ENOUGH_TO_TELL or len(classes) != 1:
        return []
    return [
        f"the float network puts all {samples} samples into one class (number {min(classes)} of {count}), "
        "so that agreement with it says little: check the preprocessing of the data, or give labels"
    ]
