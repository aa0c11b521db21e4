"""How outputs and labels are read: by class, by pairs, one sample at a time. NaN is refused.

Legend: N samples, C classes, T positions (tokens, pixels …) per sample.

Classes lie on the last axis of `[N, C]` and `[N, T, C]`, or on axis 1 of `[N, C, T…]`. Where there are
integer labels their shape decides which; where there are none, axis 1 from four axes on (images), else the
last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bitport.errors import MetricError

from ._metric import Outputs

IGNORED_LABEL = -100  # PyTorch's `ignore_index`: such positions count nowhere


def mean_per_sample(values: Tensor) -> Tensor:
    """`[N, …]` → `[N]`"""
    return values.reshape(len(values), -1).mean(1)


def mean_of_valid(values: Tensor, target: Tensor) -> Tensor:
    """Mean per sample over the labels that count: `[N, T…]` → `[N]`; NaN for a sample without any."""
    valid = (target != IGNORED_LABEL).double()
    return (values * valid).reshape(len(values), -1).sum(1) / valid.reshape(len(valid), -1).sum(1)


def classified(outputs: Outputs, labels: Any, ignored: int = IGNORED_LABEL) -> tuple[Tensor, Tensor, Tensor]:
    """(logits `[N, T…, C]`, labels `[N, T…]`, labels with 0 in place of ignored ones), checked.

    `ignored`: a label that counts nowhere, besides −100; it becomes −100.
    """
    logits, target = single(outputs), torch.as_tensor(labels).to("cpu")
    if not are_integers(target):
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
    refuse_nan(logits)
    classes = logits.shape[-1]
    if not 0 <= ignored < classes:
        target = target.masked_fill(target == ignored, IGNORED_LABEL)
    wrong = ((target < 0) | (target >= classes)) & (target != IGNORED_LABEL)
    if bool(wrong.any()):
        sample = int(torch.nonzero(wrong)[0, 0])
        raise MetricError(
            f"sample {sample} has the label {int(target[wrong][0])}, outside 0…{classes - 1}: "
            f"the network tells {classes} classes apart"
        )
    return logits, target, target.masked_fill(target == IGNORED_LABEL, 0)


def single(outputs: Outputs) -> Tensor:
    if isinstance(outputs, Tensor):
        return outputs.detach().to("cpu")
    if len(outputs) == 1:
        return next(iter(outputs.values())).detach().to("cpu")
    first = next(iter(outputs))
    raise MetricError(
        f"the network has several outputs ({', '.join(outputs)}): name one behind a colon, as 'top1:{first}', or give "
        "Metric(…, per_sample=…)"
    )


def paired(outputs: Outputs, reference: Any) -> list[tuple[str, Tensor, Tensor]]:
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
                f"output {name!r} has shape {list(mine.shape)}, what it is compared with {list(other.shape)}: "
                "give labels of the output's shape, or another metric"
            )
        refuse_nan(mine)
        refuse_nan(other, "labels")
        pairs.append((name, mine, other.reshape(mine.shape)))
    return pairs


def has_classes(output: Tensor) -> bool:
    """Whether an output may hold class scores, by its shape alone."""
    return shape_has_classes(output.shape)


def shape_has_classes(shape: Sequence[int | str]) -> bool:
    return len(shape) >= 2 and (size := shape[_class_axis(len(shape))]) != 1 and size != 0


def by_class(output: Tensor, name: str) -> Tensor:
    """Classes to the last axis."""
    if not has_classes(output):
        raise MetricError(
            f"output {name!r} of shape {list(output.shape)} has no classes to agree on: use the metric 'mse'"
        )
    return output.movedim(_class_axis(output.dim()), -1)


def _class_axis(dimensions: int) -> int:
    return 1 if dimensions >= 4 else -1


def refuse_nan(values: Tensor, what: str = "outputs") -> None:
    if not values.is_floating_point():
        return
    bad = torch.isnan(values).reshape(len(values), -1).any(1)
    if bool(bad.any()):
        raise MetricError(
            f"the {what} of sample {int(torch.nonzero(bad)[0])} are NaN ({int(bad.sum())} samples in all): "
            "check the data, and the network in float"
        )


def _count(outputs: Outputs) -> int:
    first = outputs if isinstance(outputs, Tensor) else next(iter(outputs.values()))
    return len(first)


def are_integers(labels: Any) -> bool:
    if labels is None:
        return True
    try:
        dtype = torch.as_tensor(labels).dtype
    except (TypeError, ValueError, RuntimeError):
        return False
    return not (dtype.is_floating_point or dtype.is_complex)
