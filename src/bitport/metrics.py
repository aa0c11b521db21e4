"""How well a network does its task: one score per sample, or one number for a data set.

Legend: N samples, C classes, T positions (tokens, pixels …) per sample.

Classes lie on the last axis of `[N, C]` and `[N, T, C]`, or on axis 1 of `[N, C, T…]`. Where there are
integer labels their shape decides which; where there are none, axis 1 from four axes on (images), else the
last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitport.errors import BitportError, DataError, MetricError, UnknownName

Outputs = Tensor | Mapping[str, Tensor]
IGNORED_LABEL = -100  # PyTorch's `ignore_index`: such positions count nowhere


@dataclass(frozen=True)
class Metric:
    """A judge of outputs. Give exactly one of `per_sample` and `dataset`; MetricError otherwise.

    name: what records and reports call it.
    higher_is_better: the direction of a gain.
    per_sample: (outputs, labels) → one score per sample, `[N]`; the data set's value is their mean.
    dataset: (outputs, labels) → one number, for what no mean of samples gives (mAP, WER, perplexity).
        Outputs and labels are those of all samples, along axis 0.
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

    def __post_init__(self) -> None:
        if (self.per_sample is None) == (self.dataset is None):
            raise MetricError(f"metric {self.name!r} needs exactly one of per_sample= and dataset=")
        if self.binary and self.dataset is not None:
            raise MetricError(f"metric {self.name!r} can't be binary: only per-sample scores are 0 or 1")
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
        found = self._call(self.dataset, outputs, labels)
        try:
            value = float(found)
        except (TypeError, ValueError, RuntimeError) as error:
            raise MetricError(
                f"metric {self.name!r} returned {type(found).__name__}, not one number"
            ) from error
        if not np.isfinite(value):
            raise MetricError(
                f"metric {self.name!r} is {value} over {_count(outputs)} samples: check its function"
            )
        return value

    def _call(self, function: Callable[[Any, Any], Any], outputs: Outputs, labels: Any) -> Any:
        if labels is None and self.needs_labels:
            raise DataError(
                f"metric {self.name!r} needs labels and the data has none: yield (inputs, labels)"
            )
        try:
            return function(outputs, labels)
        except BitportError as error:
            raise MetricError(f"metric {self.name!r}: {error}") from error
        except Exception as error:
            raise MetricError(f"metric {self.name!r} raised {type(error).__name__}: {error}") from error


def get(metric: str | Metric | None, has_labels: bool, labels: Any = None) -> Metric:
    """The metric that was asked for, ready for the data at hand.

    metric: a built-in's name, a Metric, or None: `top1` for integer labels, `mse` for others, and without
        labels the agreement with the float network. `labels` (those of one batch) tells integers from others;
        without it they are taken for integers.
    Raises UnknownName; DataError when the metric needs labels and there are none.
    """
    if metric is None:
        metric = "agreement" if not has_labels else "top1" if _are_integers(labels) else "mse"
    if isinstance(metric, str):
        if metric not in _BUILT_INS:
            raise UnknownName("metric", metric, _BUILT_INS)
        metric = _BUILT_INS[metric]
    if not has_labels and metric is _BUILT_INS["mse"]:
        return replace(metric, against="float")
    if not has_labels and metric.needs_labels:
        raise DataError(
            f"metric {metric.name!r} needs labels and the data has none: yield (inputs, labels), "
            "or use 'agreement' or 'mse', which compare with the float network"
        )
    return metric


def known() -> dict[str, str]:
    """The built-in metrics: name → one line about it."""
    lines = {name: (metric.per_sample or metric.dataset).__doc__ or "" for name, metric in _BUILT_INS.items()}
    return {name: line.split("\n", 1)[0] for name, line in sorted(lines.items())}


def _top1(outputs: Outputs, labels: Any) -> Tensor:
    """Share of a sample's labels that are the most likely class, 0 to 1."""
    logits, target, _ = _classified(outputs, labels)
    return _mean_of_valid((logits.argmax(-1) == target).double(), target)


def _agreement(outputs: Outputs, reference: Outputs) -> Tensor:
    """Share of a sample's positions whose most likely class is the float network's, 0 to 1."""
    pairs = [
        (_by_class(ours, name), _by_class(theirs, name)) for name, ours, theirs in _paired(outputs, reference)
    ]
    shares = [_mean_per_sample((ours.argmax(-1) == theirs.argmax(-1)).double()) for ours, theirs in pairs]
    return torch.stack(shares).mean(0)


def _mse(outputs: Outputs, reference: Any) -> Tensor:
    """Mean squared difference from the labels (without labels: from the float network's outputs)."""
    pairs = _paired(outputs, reference if isinstance(reference, Mapping) else torch.as_tensor(reference))
    errors = [_mean_per_sample((ours.double() - theirs.double()).square()) for _, ours, theirs in pairs]
    return torch.stack(errors).mean(0)


def _nll(outputs: Outputs, labels: Any) -> Tensor:
    """Negative log likelihood of the labels in nats per label, from logits."""
    losses, target = _losses(outputs, labels)
    return _mean_of_valid(losses, target)


def _perplexity(outputs: Outputs, labels: Any) -> float:
    """exp of the mean negative log likelihood over all labels; labels stand at their logits' positions."""
    losses, target = _losses(outputs, labels)
    valid = target != IGNORED_LABEL
    if not bool(valid.any()):
        raise MetricError("every label is ignored (-100)")
    return float(losses[valid].mean().exp())


def _losses(outputs: Outputs, labels: Any) -> tuple[Tensor, Tensor]:
    """(nats per label `[N, T…]`, 0 where the label is ignored; labels)"""
    logits, target, safe = _classified(outputs, labels)
    # Normalised per label in float64, as a mean over many small losses loses digits in float32.
    losses = logits.double().logsumexp(-1) - logits.double().gather(-1, safe.unsqueeze(-1)).squeeze(-1)
    return losses.masked_fill(target == IGNORED_LABEL, 0.0), target


def _mean_per_sample(values: Tensor) -> Tensor:
    """`[N, …]` → `[N]`"""
    return values.reshape(len(values), -1).mean(1)


def _mean_of_valid(values: Tensor, target: Tensor) -> Tensor:
    """Mean per sample over the labels that count: `[N, T…]` → `[N]`; NaN for a sample without any."""
    valid = (target != IGNORED_LABEL).double()
    return (values * valid).reshape(len(values), -1).sum(1) / valid.reshape(len(valid), -1).sum(1)


def _classified(outputs: Outputs, labels: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(logits `[N, T…, C]`, labels `[N, T…]`, labels with 0 in place of ignored ones), checked."""
    logits, target = _single(outputs), torch.as_tensor(labels).to("cpu")
    if not _are_integers(target):
        raise MetricError(
            f"labels are {target.dtype}; class indices (integers) were expected: one-hot? take .argmax(1)"
        )
    if target.dim() == logits.dim() and target.shape[1:] == (1,) and logits.dim() == 2:
        target = target.squeeze(1)
    target = target.long()
    last = target.shape == logits.shape[:-1]
    second = logits.dim() > 2 and target.shape == (logits.shape[0], *logits.shape[2:])
    if last and second and logits.dim() > 2:
        raise MetricError(
            f"classes may lie on axis 1 or on the last axis of outputs {list(logits.shape)} with labels "
            f"{list(target.shape)}: give Metric(…, per_sample=…)"
        )
    if logits.dim() < 2 or not (last or second):
        raise MetricError(
            f"outputs {list(logits.shape)} and labels {list(target.shape)} don't match: "
            "expected logits [N, C], [N, T, C] or [N, C, T…] with labels [N] or [N, T…]"
        )
    logits = logits if last else logits.movedim(1, -1)
    _refuse_nan(logits)
    classes = logits.shape[-1]
    wrong = ((target < 0) | (target >= classes)) & (target != IGNORED_LABEL)
    if bool(wrong.any()):
        sample = int(torch.nonzero(wrong)[0, 0])
        raise MetricError(
            f"sample {sample} has the label {int(target[wrong][0])}, outside 0…{classes - 1}: "
            f"the network tells {classes} classes apart"
        )
    return logits, target, target.masked_fill(target == IGNORED_LABEL, 0)


def _single(outputs: Outputs) -> Tensor:
    if isinstance(outputs, Tensor):
        return outputs.detach().to("cpu")
    if len(outputs) == 1:
        return next(iter(outputs.values())).detach().to("cpu")
    raise MetricError(f"the network has several outputs ({', '.join(outputs)}): give Metric(…, per_sample=…)")


def _paired(outputs: Outputs, reference: Any) -> list[tuple[str, Tensor, Tensor]]:
    """(output name, output, reference) for each output; shapes equal, no NaN, samples on axis 0."""
    ours = outputs if isinstance(outputs, Mapping) else {"output": outputs}
    if isinstance(reference, Mapping) and set(reference) != set(ours):
        raise MetricError(
            f"outputs are named {sorted(ours)}, what they are compared with {sorted(reference)}"
        )
    if not isinstance(reference, Mapping) and len(ours) != 1:
        raise MetricError(
            f"the network has several outputs ({', '.join(ours)}): give labels as a dict of them"
        )
    theirs = reference if isinstance(reference, Mapping) else dict.fromkeys(ours, reference)
    pairs = []
    for name, value in ours.items():
        mine, other = value.detach().to("cpu"), torch.as_tensor(theirs[name]).detach().to("cpu")
        # Broadcasting [N] against [N, 1] would silently compare every sample with every other.
        column = other.dim() == mine.dim() - 1 and mine.shape[-1] == 1 and len(other) == len(mine)
        if mine.dim() == 0 or mine.shape != (*other.shape, *[1] * column):
            raise MetricError(
                f"output {name!r} has shape {list(mine.shape)}, what it is compared with {list(other.shape)}"
            )
        _refuse_nan(mine)
        pairs.append((name, mine, other.reshape(mine.shape)))
    return pairs


def _by_class(output: Tensor, name: str) -> Tensor:
    """Classes to the last axis."""
    axis = 1 if output.dim() >= 4 else -1
    if output.dim() < 2 or output.shape[axis] < 2:
        raise MetricError(
            f"output {name!r} of shape {list(output.shape)} has no classes to agree on: use the metric 'mse'"
        )
    return output.movedim(axis, -1)


def _refuse_nan(values: Tensor) -> None:
    if not values.is_floating_point():
        return
    bad = torch.isnan(values).reshape(len(values), -1).any(1)
    if bool(bad.any()):
        raise MetricError(
            f"the outputs of sample {int(torch.nonzero(bad)[0])} are NaN ({int(bad.sum())} samples in all)"
        )


def _count(outputs: Outputs) -> int:
    first = outputs if isinstance(outputs, Tensor) else next(iter(outputs.values()))
    return len(first)


def _are_integers(labels: Any) -> bool:
    if labels is None:
        return True
    try:
        dtype = torch.as_tensor(labels).dtype
    except (TypeError, ValueError, RuntimeError):
        return False
    return not (dtype.is_floating_point or dtype.is_complex)


_BUILT_INS: dict[str, Metric] = {
    "top1": Metric("top1", True, per_sample=_top1, binary=True),
    "agreement": Metric("agreement", True, per_sample=_agreement, binary=True, against="float"),
    "mse": Metric("mse", False, per_sample=_mse),
    "nll": Metric("nll", False, per_sample=_nll),
    "perplexity": Metric("perplexity", False, dataset=_perplexity),
}
