"""One batch: what a user may hand over, read as flat tensors and held against the network's inputs.

*Flat* means one tensor per input of the network, in the order of the graph's inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bitport.errors import DataError

_LABEL_NAMES = ("label", "labels", "target", "targets", "y")


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch of samples.

    inputs: a tensor (single-input networks), a tuple (one tensor per input, in the network's order) or a dict
        (input name → tensor). NumPy arrays are taken wherever a tensor is.
    labels: whatever the metric reads; for the built-in metrics a tensor whose axis 0 is the sample.
    """

    inputs: Any
    labels: Any | None = None


class InputLike(Protocol):
    """What `check_inputs` needs to know of one input of a network (`graph.InputSpec` has it)."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int | str, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...


def to_flat(
    batch: Any, names: Sequence[str], batch_index: int | None = None
) -> tuple[list[Tensor], Any | None]:
    """Read one element of a data stream as (one tensor per name, labels or None).

    batch: a tensor or array, a dict of inputs, a `Batch`, or (inputs, labels) for single-input networks; a
    list is read as the tuple, because `torch.utils.data.DataLoader` collates pairs into lists.
    Raises DataError (with `batch_index`) for anything else and for missing or unknown input names.
    """
    where = _where(batch_index)
    if isinstance(batch, Batch):
        return _inputs(batch.inputs, names, batch_index), _labels(batch.labels)
    if not isinstance(batch, (tuple, list)):
        return _inputs(batch, names, batch_index), None
    if len(names) != 1:
        raise DataError(
            f"{where} is a bare {type(batch).__name__}, which can't be told apart from (inputs, labels) on a "
            f"network with the inputs {_list(names)}: yield a dict of inputs, or Batch(inputs=…, labels=…)",
            batch=batch_index,
        )
    if len(batch) not in (1, 2):
        raise DataError(
            f"{where} is a {type(batch).__name__} of {len(batch)} elements; (inputs, labels) was expected: "
            "yield Batch(inputs=…, labels=…)",
            batch=batch_index,
        )
    return _inputs(batch[0], names, batch_index), _labels(batch[1] if len(batch) == 2 else None)


def check_inputs(
    flat: Sequence[Tensor], specs: Sequence[InputLike], batch_index: int | None = None
) -> list[Tensor]:
    """Hold flat inputs against the network's; returns them, int32 widened where the network takes int64.

    Axes that are symbols (`"batch"`) may have any size above 0, but one symbol has one size within a batch.
    Raises DataError (with `batch_index`) that says what was expected, what came, and the likely remedy.
    """
    if len(flat) != len(specs):
        raise DataError(
            f"{_where(batch_index)} has {len(flat)} inputs; the network takes {len(specs)} "
            f"({_list([spec.name for spec in specs])})",
            batch=batch_index,
        )
    sizes: dict[str, tuple[int, str]] = {}
    checked = []
    for tensor, spec in zip(flat, specs, strict=True):
        problem = _dtype_problem(tensor, spec) or _shape_problem(tensor, spec, sizes)
        if problem:
            raise DataError(
                f"input {spec.name!r} of {_where(batch_index, start=False)}: {problem}", batch=batch_index
            )
        widen = spec.dtype == torch.int64 and tensor.dtype == torch.int32
        checked.append(tensor.to(torch.int64) if widen else tensor)
    return checked


def _inputs(inputs: Any, names: Sequence[str], index: int | None) -> list[Tensor]:
    if isinstance(inputs, Mapping):
        unknown = [name for name in inputs if name not in names]
        missing = [name for name in names if name not in inputs]
        if unknown or missing:
            what = [f"unknown {_list(unknown)}"] * bool(unknown) + [f"missing {_list(missing)}"] * bool(
                missing
            )
            hint = "; labels go into Batch(inputs=…, labels=…)" if set(unknown) & set(_LABEL_NAMES) else ""
            raise DataError(
                f"{_where(index)} has other inputs than the network ({' and '.join(what)}); it takes "
                f"{_list(names)}{hint}",
                batch=index,
            )
        return [_tensor(inputs[name], name, index) for name in names]
    parts = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
    if len(parts) != len(names):
        raise DataError(
            f"{_where(index)} has {len(parts)} input{'s' * (len(parts) != 1)}; the network takes "
            f"{len(names)} ({_list(names)}): yield a dict of inputs, or Batch(inputs=(…))",
            batch=index,
        )
    return [_tensor(part, name, index) for part, name in zip(parts, names, strict=True)]


def _tensor(value: Any, name: str, index: int | None) -> Tensor:
    if isinstance(value, np.ndarray):
        value = _from_numpy(value, name, index)
    if not isinstance(value, Tensor):
        raise DataError(
            f"input {name!r} of {_where(index, start=False)} is of type {type(value).__name__}; "
            "a tensor or NumPy array was expected: convert it with torch.as_tensor(…)",
            batch=index,
        )
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        raise DataError(
            f"input {name!r} of {_where(index, start=False)} is not a dense tensor with values "
            f"(layout {value.layout}, dtype {value.dtype}, device {value.device}): hand over a dense one",
            batch=index,
        )
    return value.detach()


def _from_numpy(array: np.ndarray[Any, Any], name: str, index: int | None) -> Tensor:
    try:
        # torch warns about arrays it may not write to, and refuses foreign byte order and negative strides.
        native = array.dtype.newbyteorder("=")
        return torch.from_numpy(np.require(array.astype(native, copy=False), requirements=["C", "W"]))
    except TypeError as error:
        raise DataError(
            f"input {name!r} of {_where(index, start=False)} is an array of dtype {array.dtype}: "
            "hand over plain numbers",
            batch=index,
        ) from error


def _labels(labels: Any) -> Any:
    """Arrays of numbers become tensors; anything else is left to the metric, which alone knows its form."""
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "biuf":
        return _from_numpy(labels, "labels", None)
    return labels.detach() if isinstance(labels, Tensor) else labels


def _dtype_problem(tensor: Tensor, spec: InputLike) -> str:
    expected, got = spec.dtype, tensor.dtype
    if got == expected or (expected == torch.int64 and got == torch.int32):
        return ""
    cast = {torch.float32: ".float()", torch.int64: ".long()", torch.int32: ".int()", torch.bool: ".bool()",
            torch.float64: ".double()", torch.float16: ".half()"}  # fmt: skip
    remedy = f"convert it with {cast.get(expected, f'.to({expected})')}"
    if expected.is_floating_point and got == torch.uint8:
        remedy += " and scale it as in training (raw 0–255 pixels?)"
    return f"expected {_dtype(expected)}, got {_dtype(got)}: {remedy}"


def _shape_problem(tensor: Tensor, spec: InputLike, sizes: dict[str, tuple[int, str]]) -> str:
    expected, got = tuple(spec.shape), tuple(tensor.shape)
    said = f"expected shape {_shape(expected)}, got {_shape(got)}"
    if len(expected) != len(got) or any(
        isinstance(e, int) and e != g for e, g in zip(expected, got, strict=True)
    ):
        return f"{said}{_shape_hint(expected, got)}"
    if 0 in got:
        return f"{said}: it is empty; drop empty batches"
    for symbol, size in zip(expected, got, strict=True):
        if isinstance(symbol, str):
            first = sizes.setdefault(symbol, (size, spec.name))
            if first[0] != size:
                return f"{said}: axis {symbol!r} is {size} here but {first[0]} in input {first[1]!r}"
    return ""


def _shape_hint(expected: tuple[int | str, ...], got: tuple[int, ...]) -> str:
    if len(got) == len(expected) - 1 and _fits(expected[1:], got):
        return ": the batch axis is missing; add it with .unsqueeze(0)"
    if len(got) == len(expected) + 1 and got[0] == 1 and _fits(expected, got[1:]):
        return ": there is one axis too many; drop it with .squeeze(0)"
    if len(got) == len(expected) >= 3:
        to_channels_first = (0, len(got) - 1, *range(1, len(got) - 1))
        to_channels_last = (0, *range(2, len(got)), 1)
        for order, form in (
            (to_channels_first, "channels last (NHWC)"),
            (to_channels_last, "channels first (NCHW)"),
        ):
            if _fits(expected, tuple(got[axis] for axis in order)):
                return f": it looks like {form}; reorder it with .permute({', '.join(map(str, order))})"
    if len(got) == len(expected) and isinstance(expected[0], int) and _fits(("batch", *expected[1:]), got):
        return f": this network's batch is fixed at {expected[0]}; use that batch size"
    return ""


def _fits(expected: tuple[int | str, ...], got: tuple[int, ...]) -> bool:
    return len(expected) == len(got) and all(
        isinstance(e, str) or e == g for e, g in zip(expected, got, strict=True)
    )


def _where(index: int | None, *, start: bool = True) -> str:
    text = "the batch" if index is None else f"batch {index}"
    return text[0].upper() + text[1:] if start else text


def _list(names: Sequence[Any]) -> str:
    return ", ".join(repr(name) for name in names)


def _shape(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(str(size) for size in shape)}]"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
