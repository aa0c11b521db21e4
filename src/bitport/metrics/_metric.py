"""What a metric is: a judge of outputs, per sample or over a data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitport.errors import BitportError, DataError, MetricError

Outputs = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True)
class Metric:
    """A judge of outputs. Give exactly one of `per_sample` and `dataset`; MetricError otherwise.

    name: what records and reports call it.
    higher_is_better: the direction of a gain.
    per_sample: (outputs, labels) → one score per sample, `[N]`; the data set's value is their mean.
    dataset: (outputs, labels) → one number, for what no mean of samples gives (mAP, WER, perplexity).
        Outputs and labels are those of all samples, along axis 0.
    collect: (outputs, labels) of one batch → what `dataset` needs of each sample: a tensor or array `[N, …]`,
        a list of N, or a dict of such. `dataset` then gets that of all samples in place of the outputs, and
        None in place of the labels; outputs are not kept.
    binary: a sample with one label scores 0 or 1, so that exact paired intervals apply (`is_binary` tells
        whether they do for the scores at hand: dense labels give shares between).
    against: "labels", or "float": the second argument is then the float network's outputs.

    `outputs` is a tensor for networks with one output, else a dict (output name → tensor).
    """

    name: str
    higher_is_better: bool
    per_sample: Callable[[Any, Any], Any] | None = None
    dataset: Callable[[Any, Any], Any] | None = None
    binary: bool = False
    against: str = "labels"
    collect: Callable[[Any, Any], Any] | None = None

    def __post_init__(self) -> None:
        if (self.per_sample is None) == (self.dataset is None):
            raise MetricError(f"metric {self.name!r} needs exactly one of per_sample= and dataset=")
        if self.binary and self.dataset is not None:
            raise MetricError(f"metric {self.name!r} can't be binary: only per-sample scores are 0 or 1")
        if self.collect is not None and self.dataset is None:
            raise MetricError(f"metric {self.name!r} collects for nothing: collect= goes with dataset=")
        if self.against not in ("labels", "float"):
            raise MetricError(f"metric {self.name!r} is against {self.against!r}: give 'labels' or 'float'")

    @property
    def needs_labels(self) -> bool:
        """Whether the second argument of its function is labels (else the float network's outputs)."""
        return self.against == "labels"

    def scores(self, outputs: Outputs, labels: Any) -> Tensor:
        """One score per sample: float64 `[N]`. `labels` is whatever the metric is against.

        Raises MetricError, naming the metric and the sample, when the function fails, returns another shape,
        or gives a score that isn't finite.
        """
        if self.per_sample is None:
            raise MetricError(f"metric {self.name!r} has no per-sample scores: use value(…)")
        found = self._call(self.per_sample, outputs, labels)
        try:
            scores = torch.as_tensor(found).detach().to("cpu", torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise MetricError(
                f"metric {self.name!r} returned {type(found).__name__}, not one number per sample"
            ) from error
        count = _count(outputs)
        if tuple(scores.shape) != (count,):
            raise MetricError(
                f"metric {self.name!r} returned shape {list(scores.shape)} for {count} samples: "
                f"return one score per sample, [{count}]"
            )
        wrong = torch.nonzero(~torch.isfinite(scores)).flatten()
        if len(wrong):
            first = int(wrong[0])
            raise MetricError(
                f"metric {self.name!r} scored sample {first} as {float(scores[first])} "
                f"({len(wrong)} of {count} samples have no finite score): "
                "check that sample's outputs and labels"
            )
        return scores

    def is_binary(self, *scores: Tensor) -> bool:
        """Whether these scores are all 0 or 1 by the metric's nature (not by chance)."""
        return self.binary and all(bool(((part == 0) | (part == 1)).all()) for part in scores)

    def value(self, outputs: Outputs, labels: Any) -> float:
        """One number for all samples given. Raises MetricError as `scores` does."""
        if self.dataset is None:
            return float(self.scores(outputs, labels).mean())
        return self.conclude(*self.keep(outputs, labels))

    def keep(self, outputs: Outputs, labels: Any) -> tuple[Any, Any]:
        """What has to be kept of a batch so that `conclude` can score it: (outputs or their statistics, labels).

        Raises MetricError when `collect` fails or doesn't speak of every sample.
        """
        if self.collect is None:
            return _on_cpu(outputs), labels
        found = self._call(self.collect, outputs, labels)
        parts = list(found.values()) if isinstance(found, Mapping) else [found]
        count = _count(outputs)
        if not parts or any(not hasattr(part, "__len__") or len(part) != count for part in parts):
            raise MetricError(
                f"metric {self.name!r}: collect must return one entry per sample, {count} of them"
            )
        return found, None

    def conclude(self, kept: Any, labels: Any) -> float:
        """One number from what was kept of all samples. Raises MetricError as `scores` does."""
        assert self.dataset is not None
        if self.collect is None:
            found = self._call(self.dataset, kept, labels)
        else:
            found = self._guarded(self.dataset, kept, None)
        try:
            value = float(found)
        except (TypeError, ValueError, RuntimeError) as error:
            raise MetricError(
                f"metric {self.name!r} returned {type(found).__name__}, not one number"
            ) from error
        if not np.isfinite(value):
            raise MetricError(
                f"metric {self.name!r} is {value} over {_count(kept)} samples: check its function"
            )
        return value

    def _call(self, function: Callable[[Any, Any], Any], outputs: Outputs, labels: Any) -> Any:
        if labels is None and self.needs_labels:
            raise DataError(
                f"metric {self.name!r} needs labels and the data has none: yield (inputs, labels)"
            )
        return self._guarded(function, outputs, labels)

    def _guarded(self, function: Callable[[Any, Any], Any], outputs: Any, labels: Any) -> Any:
        try:
            return function(outputs, labels)
        except BitportError as error:
            raise MetricError(f"metric {self.name!r}: {error}") from error
        except Exception as error:
            raise MetricError(
                f"metric {self.name!r} raised {type(error).__name__}: {error}; mend it, or the labels that it is given"
            ) from error


def of_output(metric: Metric, output: str) -> Metric:
    """The metric of one output of a network that has several."""

    def reading(function: Callable[[Any, Any], Any] | None) -> Callable[[Any, Any], Any] | None:
        if function is None:
            return None

        def read(outputs: Outputs, against: Any) -> Any:
            other = against if metric.needs_labels else _chosen(against, output)
            return function(_chosen(outputs, output), other)

        return read

    changes: dict[str, Any] = {"name": f"{metric.name}:{output}", "per_sample": reading(metric.per_sample)}
    if metric.collect is not None:
        changes["collect"] = reading(metric.collect)
    else:
        changes["dataset"] = reading(metric.dataset)
    return replace(metric, **changes)


def _chosen(outputs: Any, output: str) -> Any:
    if not isinstance(outputs, Mapping):
        return outputs  # a network's only output has no choice
    if output not in outputs:
        raise MetricError(f"the network has no output {output!r}; it has {', '.join(outputs)}")
    return outputs[output]


def _on_cpu(outputs: Outputs) -> Outputs:
    if isinstance(outputs, Tensor):
        return outputs.detach().cpu()
    return {name: value.detach().cpu() for name, value in outputs.items()}


def _count(outputs: Any) -> int:
    return len(next(iter(outputs.values()))) if isinstance(outputs, Mapping) else len(outputs)
