"""The task: how well the float network, its simulation and the runtime do on the same samples, and whether
the drop stays within what was allowed.

A drop is always a loss: positive means worse, also where a lower score is better. Batches stream through;
what stays is one number per sample and side; for metrics that only a whole data set has, what the metric collects
of each sample, or the outputs themselves where it collects nothing.

Legend: N samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import Batch
from ..errors import DataError, MetricError
from ..graph import Graph
from ..metrics import Metric, Outputs, Ragged
from ..numerics.intervals import Interval, bootstrap_dataset, paired_binary, paired_mean, verdict
from . import doubts

_NO_LIMIT = "no max_drop was given"
_UNSTEADY = (
    "metric {!r} scored the same outputs twice and differently: make it deterministic (seed what it draws)"
)


def task_record(
    metric: Metric,
    float_outputs: Outputs,
    simulated_outputs: Outputs | None,
    runtime_outputs: Outputs,
    labels: Any,
    max_drop: float | None,
) -> dict[str, Any]:
    """The `task` section for outputs that are all at hand; see `TaskAccumulator`."""
    accumulator = TaskAccumulator(metric, max_drop)
    accumulator.update(float_outputs, simulated_outputs, runtime_outputs, labels)
    return accumulator.record()


def rehearse(metric: Metric, float_out: Outputs, labels: Any | None) -> None:
    """Score the float network's outputs of one batch, so that a metric that doesn't fit is told before long work.

    Raises MetricError, also for a metric that gives two scores for the same outputs: it would report its own dice
    as a loss.
    """
    against = labels if metric.needs_labels else float_out
    if metric.dataset is None:
        equal = torch.equal(metric.scores(float_out, against), metric.scores(float_out, against))
    else:
        kept = [metric.keep(float_out, against) for _ in range(2)]
        try:
            equal = metric.conclude(*kept[0]) == metric.conclude(*kept[1])
        except MetricError:  # one batch may be too little for a data-set metric; the whole will tell
            return
    if not equal:
        raise MetricError(
            f"metric {metric.name!r} gives different scores for the same outputs and labels: take the random "
            "choice out of it, or seed it"
        )


def rehearse_on(graph: Graph, batch: Batch, metric: Metric) -> None:
    """Run the float network on a batch and `rehearse`. Raises MetricError."""
    graph.gm.eval()
    with torch.no_grad():
        found = graph.run(*batch.inputs)
    names = [spec.name for spec in graph.outputs]
    rehearse(metric, found[0] if len(found) == 1 else dict(zip(names, found, strict=True)), batch.labels)


class TaskAccumulator:
    """Collects the scores of three networks on the same samples, batch by batch.

    Args:
        metric: as `metrics.get` returns it: ready for data with or without labels.
        max_drop: the largest loss allowed, in the metric's unit; None: measured, not judged.
    """

    def __init__(self, metric: Metric, max_drop: float | None) -> None:
        self._metric, self._max_drop = metric, max_drop
        self._sides: dict[str, list[Any]] = {"float": [], "simulated": [], "runtime": []}
        self._labels: list[Any] = []
        self._samples = 0
        self._classes: set[int] = set()  # of the float network, as long as they are few
        self._of = 0

    def update(
        self, float_out: Outputs, sim_out: Outputs | None, run_out: Outputs, labels: Any | None = None
    ) -> None:
        """Add one batch.

        Args:
            float_out, sim_out, run_out: a tensor [N, …], or a dict of them by output name; `sim_out` is None
                where nothing was simulated.
            labels: those of the batch, or None. Either every batch has labels or none has.

        Raises:
            DataError: this batch has labels and earlier ones have none, or the other way round.
            MetricError: the metric can't score these outputs.
        """
        index = len(self._labels)
        if self._labels and (labels is None) != (self._labels[0] is None):
            has, had = ("no labels", "some") if labels is None else ("labels", "none")
            raise DataError(
                f"evaluation batch {index} has {has} and the batches before it have {had}: label all or none",
                batch=index,
            )
        against = labels if self._metric.needs_labels else float_out
        if index == 0:
            rehearse(self._metric, float_out, labels)
        for side, outputs in (("float", float_out), ("simulated", sim_out), ("runtime", run_out)):
            if outputs is not None:
                self._sides[side].append(self._kept(outputs, against))
        # most metrics are done with the labels; only that there were some is remembered
        done = self._metric.dataset is None or self._metric.collect is not None
        self._labels.append(True if done and labels is not None else labels)
        self._samples += _length(float_out)
        if isinstance(float_out, Tensor) and float_out.dim() == 2 and len(self._classes) < 2:
            self._classes |= set(float_out.argmax(-1).tolist())
            self._of = float_out.shape[-1]

    def _kept(self, outputs: Outputs, against: Any) -> Any:
        if self._metric.dataset is None:
            return self._metric.scores(outputs, against)
        return self._metric.keep(outputs, against)[0]

    def record(self) -> dict[str, Any]:
        """The `task` section of the measurement record.

        Returns: `metric`, `higher_is_better`, `binary` (each sample is right or wrong: values are shares),
            `float`, `simulated`, `runtime` (values), `drop` (> 0: worse) with `ci95`, `verdict` (`holds`,
            `fails`, `undecided`, or None with `verdict_reason`), `samples`, `samples_needed` (how many would
            decide, else None), `max_drop`, `labels` (whether the data had some).

        Raises:
            DataError: there was no sample.
            MetricError: the metric has no finite value on the data.
        """
        if self._samples == 0:
            raise DataError("evaluation data has no samples: give at least one batch")
        simulated = len(self._sides["simulated"]) == len(self._sides["float"])
        if self._metric.dataset is None:
            values, interval, binary = self._per_sample(simulated)
        else:
            values, interval, binary = (*self._dataset(simulated), False)
        if not self._metric.higher_is_better:
            interval = replace(interval, drop=-interval.drop, low=-interval.high, high=-interval.low)
        made = {
            "metric": self._metric.name,
            "higher_is_better": self._metric.higher_is_better,
            "binary": binary,
            **values,
            # −0.0 would read as a gain
            "drop": interval.drop + 0.0,
            "ci95": [interval.low, interval.high],
            "samples": self._samples,
            "max_drop": self._max_drop,
            "labels": self._labels[0] is not None,
            **self._judged(interval),
        }
        if not simulated:
            made["simulated_reason"] = "not every batch was simulated"
        return made

    def doubts(self) -> list[str]:
        """What makes this comparison say little, in sentences."""
        return doubts.of_classes(self._metric.name, self._samples, self._classes, self._of)

    def _judged(self, interval: Interval) -> dict[str, Any]:
        if self._max_drop is None:
            return {"verdict": None, "verdict_reason": _NO_LIMIT, "samples_needed": None}
        # the interval counts losses already, whatever the metric's direction
        found, needed = verdict(interval, self._max_drop, True)
        return {"verdict": found, "samples_needed": needed}

    def _per_sample(self, simulated: bool) -> tuple[dict[str, float | None], Interval, bool]:
        ours, run = (torch.cat(self._sides[side]) for side in ("float", "runtime"))
        values = {
            "float": float(ours.mean()),
            "simulated": float(torch.cat(self._sides["simulated"]).mean()) if simulated else None,
            "runtime": float(run.mean()),
        }
        if self._metric.is_binary(ours, run):
            return values, paired_binary(ours, run), True
        both = torch.cat([ours, run])
        return values, paired_mean(ours - run, float(both.max() - both.min())), False

    def _dataset(self, simulated: bool) -> tuple[dict[str, float | None], Interval]:
        metric = self._metric
        ours, run = (_joined(self._sides[side]) for side in ("float", "runtime"))
        against = None if metric.collect else _joined(self._labels) if metric.needs_labels else ours
        values = {
            "float": metric.conclude(ours, against),
            "simulated": metric.conclude(_joined(self._sides["simulated"]), against) if simulated else None,
            "runtime": metric.conclude(run, against),
        }
        return values, bootstrap_dataset(metric.conclude, ours, run, against, self._samples)


def _length(outputs: Outputs) -> int:
    return len(outputs if isinstance(outputs, Tensor) else next(iter(outputs.values())))


def _joined(parts: list[Any]) -> Any:
    """Batches as one: tensors and arrays along axis 0, lists one after the other, dicts by key."""
    first = parts[0]
    if first is None:
        return None
    if isinstance(first, Mapping):
        return {name: _joined([part[name] for part in parts]) for name in first}
    if isinstance(first, Ragged):
        return Ragged.joined(parts)
    if isinstance(first, Tensor):
        return torch.cat([part.detach().cpu() for part in parts])
    if isinstance(first, np.ndarray):
        return np.concatenate(parts)
    return [item for part in parts for item in part]
