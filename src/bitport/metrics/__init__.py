"""How well a network does its task: one score per sample, or one number for a data set.

A built-in metric is one function in a file of this package and one line in the table below. Those of a whole
data set reduce each batch to a few numbers per sample (`Metric.collect`), so that no logits are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bitport.errors import DataError, UnknownName

from . import _classes, _detection, _regression
from ._metric import Metric, Outputs, of_output
from ._ragged import Ragged
from ._reading import IGNORED_LABEL, are_integers, shape_has_classes
from ._sequences import word_error_rate

__all__ = ["IGNORED_LABEL", "Metric", "Outputs", "Ragged", "get", "known", "word_error_rate"]

_BUILT_INS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("top1", True, per_sample=_classes.top1, binary=True),
        Metric("agreement", True, per_sample=_classes.agreement, binary=True, against="float"),
        Metric("nll", False, per_sample=_classes.nll),
        Metric("perplexity", False, dataset=_classes.perplexity, collect=_classes.next_token_losses),
        Metric(
            "aligned_perplexity", False, dataset=_classes.aligned_perplexity, collect=_classes.token_losses
        ),
        Metric("f1", True, dataset=_classes.f1, collect=_classes.binary_counts),
        Metric("f1_macro", True, dataset=_classes.f1_macro, collect=_classes.class_counts),
        Metric("miou", True, dataset=_classes.mean_iou, collect=_classes.pixel_counts),
        Metric("map", True, dataset=_detection.mean_precision, collect=_detection.match),
        Metric("map50", True, dataset=_detection.mean_precision_50, collect=_detection.match),
        word_error_rate(),
        Metric("mse", False, per_sample=_regression.mse),
        Metric("mae", False, per_sample=_regression.mae),
        Metric("rmse", False, dataset=_regression.rmse, collect=_regression.mse),
        Metric("r2", True, dataset=_regression.r2, collect=_regression.squares),
    )
}
_ERRORS = ("mse", "mae", "rmse")  # without labels: their distance from the float network's outputs


def get(
    metric: str | Metric | None,
    has_labels: bool,
    labels: Any = None,
    shapes: Sequence[Sequence[int | str]] = (),
    outputs: Sequence[str] = (),
) -> Metric:
    """The metric that was asked for, ready for the data at hand.

    metric: a built-in's name (`"miou:mask"`: of the output called so), a Metric, or None: `top1` for integer
        labels, `mse` for others, and without labels the agreement with the float network, or `mse` from it where
        no output has classes. `labels` (those of one batch) tells integers from others; without it they are taken
        for integers.
    shapes, outputs: shapes and names of the network's outputs, if they are known.
    Raises UnknownName, also for an output that the network doesn't have; DataError when the metric needs labels and
    there are none.
    """
    if metric is None:
        if has_labels:
            metric = "top1" if are_integers(labels) else "mse"
        else:
            metric = "agreement" if not shapes or any(map(shape_has_classes, shapes)) else "mse"
    if isinstance(metric, str):
        name, colon, output = metric.partition(":")
        if name not in _BUILT_INS:
            raise UnknownName("metric", metric, _BUILT_INS)
        metric = _BUILT_INS[name]
        if not has_labels and name in _ERRORS:
            metric = replace(metric, against="float")
        if colon:
            if outputs and output not in outputs:
                raise UnknownName("output", output, outputs)
            metric = of_output(metric, output)
    if not has_labels and metric.needs_labels:
        raise DataError(
            f"metric {metric.name!r} needs labels and the data has none: yield (inputs, labels), "
            "or use 'agreement', 'mse', 'mae' or 'rmse', which compare with the float network"
        )
    return metric


def known() -> dict[str, str]:
    """The built-in metrics: name → one line about it."""
    lines = {name: (metric.per_sample or metric.dataset).__doc__ or "" for name, metric in _BUILT_INS.items()}
    return {name: line.split("\n", 1)[0] for name, line in sorted(lines.items())}
