"""What an ONNX operator's implementation is given, and the table that they stand in.

A value is a tensor; a numpy array, where it is known without data (constants, shapes; elements may be symbolic sizes);
a list of tensors, for a sequence; or None, for an input that isn't given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ...errors import LoadError

Array = npt.NDArray[Any]
Value = Any
Implementation = Callable[..., Any]
LARGEST = 2**28  # numbers in what a file makes up


class Unsupported(LoadError):
    """An operator, or a form of one, that can't be imported."""


@dataclass(frozen=True)
class Operator:
    """One row: what computes an operator, which inputs are its parameters, and what computes it on known values.

    run: `(call, *values)` → a value, or a tuple of as many as it has outputs. params: input slot → the parameter's name
    in the layer. known: `(call, *arrays)` → an array, where no input is a tensor. layer: `(call, constants by slot)` →
    a module that is called with all values instead of `run`, those constants left out (None); or None. controls: it
    runs graphs of its own: `run` is `(call, bodies by name, iterations that are left, *values)`.
    """

    run: Implementation
    params: Mapping[int, str] = field(default_factory=dict)
    known: Implementation | None = None
    layer: Callable[[Call, Mapping[int, Array]], nn.Module | None] | None = None
    controls: bool = False


OPERATORS: dict[str, Operator] = {}


def operator(*names: str, **options: Any) -> Callable[[Implementation], Implementation]:
    """Put an implementation into the table under its ONNX names. options: the other fields of `Operator`."""

    def register(run: Implementation) -> Implementation:
        for name in names:
            OPERATORS[name] = Operator(run, **options)
        return run

    return register


@dataclass(frozen=True)
class Call:
    """One node: its operator, its name, its attributes, the opset it is written in, how many outputs are wanted."""

    kind: str
    name: str
    attrs: Mapping[str, Any]
    opset: int
    outputs: int = 1

    def attr(self, name: str, default: Any = None) -> Any:
        return self.attrs.get(name, default)

    def refuse(self, why: str) -> NoReturn:
        """Raise Unsupported, naming node, operator and opset."""
        raise Unsupported(f"node {self.name!r} ({self.kind}, opset {self.opset}) can't be imported: {why}")

    def hold(self, count: int) -> None:
        """Refuse a constant of so many numbers that only a damaged file can mean it."""
        if count > LARGEST:
            self.refuse(f"it makes a constant of {count} numbers")

    def ints(self, value: Value, what: str) -> list[Any]:
        """A list of whole numbers that must be known without data (or be sizes)."""
        if isinstance(value, Tensor):
            self.refuse(f"its {what} depend on data; only what shapes and constants give can be taken")
        return list(np.asarray(value).reshape(-1).tolist())

    def number(self, value: Value, what: str) -> Any:
        return self.ints(value, what)[0]

    def axes(self, given: Value, default: list[int] | None = None) -> list[int] | None:
        """The axes of a node, which are an attribute in older opsets and an input in newer ones."""
        if given is not None:
            return [int(axis) for axis in self.ints(given, "axes")]
        found = self.attr("axes", default)
        return None if found is None else [int(axis) for axis in found]

    def sides(self, name: str, count: int, default: int) -> list[int]:
        """An attribute with a number for each spatial axis."""
        found = self.attr(name)
        return [default] * count if found is None else [int(size) for size in found]


# small floats that torch has as well, by numpy's name for them
SMALL_FLOATS: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn, "float8_e4m3fnuz": torch.float8_e4m3fnuz,
    "float8_e5m2": torch.float8_e5m2, "float8_e5m2fnuz": torch.float8_e5m2fnuz, "float8_e8m0fnu": torch.float8_e8m0fnu,
}  # fmt: skip
# what torch lacks, in the smallest type that holds it
HELD_IN: dict[str, Any] = {
    "int4": np.int8, "int2": np.int8, "uint4": np.uint8, "uint2": np.uint8, "float4_e2m1fn": np.float32,
}  # fmt: skip


def tensor(value: Value) -> Tensor:
    """A value as a tensor; sizes become a tensor of int64, integers of 2 and 4 bits lie in bytes."""
    if isinstance(value, Tensor):
        return value
    array = np.array(value)
    name = array.dtype.name
    if name in SMALL_FLOATS:
        raw = array.reshape(-1).view(np.uint8)
        return torch.from_numpy(raw).view(SMALL_FLOATS[name]).reshape(array.shape)
    if name in HELD_IN:
        return torch.from_numpy(array.astype(HELD_IN[name]))
    if array.dtype != object:
        return torch.from_numpy(array)
    if any(isinstance(item, str | bytes) for item in array.reshape(-1).tolist()):
        raise LoadError("text can't be imported: only numbers are tensors here")
    parts = [_scalar(item) for item in array.reshape(-1).tolist()]
    if not parts:
        return torch.zeros(array.shape, dtype=torch.int64)
    return torch.stack(parts).reshape(array.shape)


def _scalar(item: Any) -> Tensor:
    return torch.scalar_tensor(item, dtype=torch.int64)


def is_known(value: Value) -> bool:
    return value is None or isinstance(value, np.ndarray)


def array(items: Sequence[Any]) -> Array:
    """Sizes as an array; symbolic ones make it an array of objects."""
    if all(isinstance(item, int) for item in items):
        return np.array(items, dtype=np.int64)
    found = np.empty(len(items), dtype=object)
    found[:] = items
    return found
