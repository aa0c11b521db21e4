"""Values of a network on their way into a TFLite file, each with the layout that it is stored in.

TFLite's convolutions and pools take the channels last, torch's in front of the space. A value keeps its logical shape
(torch's) and says whether it is stored with the channels last; what asks for the other layout gets a transpose, made
once. Constants are turned when they are written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import ExportError
from ...plan.lower import BYTE
from ._flatbuffer import File, Quant

Size = Any  # int, or torch.SymInt where an axis is dynamic
TYPES: dict[torch.dtype, str] = {
    torch.float32: "FLOAT32", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16", torch.float64: "FLOAT64",
    torch.int8: "INT8", torch.uint8: "UINT8", torch.int16: "INT16", torch.int32: "INT32", torch.int64: "INT64",
    torch.bool: "BOOL",
}  # fmt: skip
MOST_AXES = 3  # of a tensor with channels: fewer have no space
HALF = 4  # bits


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the file. shape: logical. last: stored with axis 1 behind all others."""

    index: int
    shape: tuple[Size, ...]
    dtype: torch.dtype
    quant: Quant | None = None
    last: bool = False

    @property
    def rank(self) -> int:
        return len(self.shape)

    def axis(self, dim: int) -> int:
        """The stored place of a logical axis."""
        dim %= max(self.rank, 1)
        return order(self.rank).index(dim) if self.last else dim

    def stored(self, sizes: Sequence[Any]) -> list[Any]:
        """One item per logical axis, in the order in which axes are stored."""
        return [sizes[dim] for dim in order(self.rank)] if self.last else list(sizes)


def _quotient(size: Size, other: Size) -> int | None:
    """How many times the other size it is, whatever that is while running; None: no such number."""
    if isinstance(size, int):
        return None
    found = size.node.expr / (other if isinstance(other, int) else other.node.expr)
    return int(found) if found.is_Integer else None


def plain(shape: Sequence[Size]) -> tuple[Size, ...]:
    """Sizes that are known are numbers, however they were found."""
    return tuple(int(size) if isinstance(size, int) or size.node.expr.is_number else size for size in shape)


def order(rank: int) -> list[int]:
    """Logical axes in the order of a tensor that is stored with the channels last."""
    return [0, *range(2, rank), 1] if rank > 1 else list(range(rank))


def type_of(dtype: torch.dtype, name: str) -> str:
    """The schema's name of a type. Raises ExportError where it has none."""
    if dtype not in TYPES:
        raise ExportError(f"{name}: LiteRT has no numbers of type {dtype}: use float32, int32 or int64")
    return TYPES[dtype]


class Builder:
    """Writes operators; knows how long dynamic axes are in the file as it is written (symbols)."""

    def __init__(self, symbols: Mapping[Any, int]) -> None:
        self.file = File()
        self.symbols = dict(symbols)
        self.turned: dict[tuple[int, bool], Value] = {}
        self.constants: dict[tuple[Any, ...], Value] = {}
        self.kept: list[Tensor] = []  # whose ids are keys
        self.floats: dict[int, Value] = {}

    # ------------------------------------------------------------------ sizes

    def size(self, size: Size) -> int:
        """A size in the file."""
        if isinstance(size, int):
            return size
        found = size.node.expr.subs(self.symbols)
        return int(found) if not found.free_symbols else int(size.node.hint)

    def sizes(self, shape: Sequence[Size]) -> list[int]:
        return [self.size(size) for size in shape]

    @staticmethod
    def dynamic(shape: Sequence[Size]) -> list[int]:
        """Axes whose length isn't known before the network runs."""
        return [axis for axis, size in enumerate(shape) if not isinstance(size, int)]

    # ------------------------------------------------------------------ values

    def emit(
        self,
        kind: str,
        inputs: Sequence[Value | None],
        shape: Sequence[Size],
        *,
        name: str,
        dtype: torch.dtype = torch.float32,
        quant: Quant | None = None,
        last: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> Value:
        """An operator with one result. shape: the result's, logical."""
        made = self.empty(shape, name, dtype, quant, last)
        self.file.operator(kind, [-1 if v is None else v.index for v in inputs], [made.index], options)
        return made

    def empty(
        self,
        shape: Sequence[Size],
        name: str,
        dtype: torch.dtype,
        quant: Quant | None = None,
        last: bool = False,
    ) -> Value:
        """A tensor that something is still to write."""
        shape = plain(shape)
        there = [shape[dim] for dim in order(len(shape))] if last else list(shape)
        index = self.file.tensor(
            name, self.sizes(there), type_of(dtype, name), dynamic=self.dynamic(there), quant=quant
        )
        if last and quant is not None:
            self.file.turned.append(self.file.tensors[index].name)
        return Value(index, shape, dtype, quant, last)

    def constant(
        self, value: Tensor, name: str, *, quant: Quant | None = None, last: bool = False, bits: int = BYTE
    ) -> Value:
        """A tensor of known numbers, written once. bits: HALF packs two codes into a byte."""
        key = (
            id(value),
            last,
            bits,
            None if quant is None else (quant.scale.tobytes(), quant.zero_point.tobytes()),
        )
        if key not in self.constants:
            self.kept.append(value)
            self.constants[key] = self._written(value, name, quant, last, bits)
        return self.constants[key]

    def _written(self, value: Tensor, name: str, quant: Quant | None, last: bool, bits: int) -> Value:
        turned = value.detach().permute(order(value.dim())) if last else value.detach()
        shape = tuple(int(size) for size in turned.shape)
        dtype, raw = type_of(value.dtype, name), turned.contiguous()
        array = raw.view(torch.int16).numpy() if value.dtype == torch.bfloat16 else raw.numpy()
        if bits == HALF:
            codes = array.reshape(-1).astype(np.uint8) & 15
            codes = np.append(codes, np.zeros(codes.size % 2, np.uint8))
            array, dtype = codes[0::2] | codes[1::2] << 4, "INT4"
        if array.size == 0:
            raise ExportError(f"{name}: TFLite stores no empty constants")
        index = self.file.tensor(name, shape, dtype, quant=quant, data=array)
        return Value(index, tuple(value.shape), value.dtype, quant, last)

    def integers(self, values: Sequence[int], name: str = "sizes") -> Value:
        """A short list of integers, as operators take shapes and axes."""
        key = ("integers", tuple(values))
        if key not in self.constants:
            array = np.array(values, np.int32)
            index = self.file.tensor(name, array.shape, "INT32", data=array)
            self.constants[key] = Value(index, array.shape, torch.int32)
        return self.constants[key]

    # ------------------------------------------------------------------ layouts

    def arranged(self, value: Value, last: bool) -> Value:
        """The value in a layout."""
        if value.last == last or value.rank < MOST_AXES:
            return value
        key = (value.index, last)
        if key not in self.turned:
            there = order(value.rank) if last else [0, value.rank - 1, *range(1, value.rank - 1)]
            if self.flat(value):
                made = self.reshaped(replace(value, last=False), value.shape, last=last)
            else:
                made = self.emit(
                    "TRANSPOSE", [value, self.integers(there)], value.shape, name=f"{self.name(value)}/turned",
                    dtype=value.dtype, quant=value.quant, last=last, options={"table": "Transpose"},
                )  # fmt: skip
            self.turned[key] = made
            self.turned[made.index, value.last] = value
        return self.turned[key]

    def flat(self, value: Value) -> bool:
        """Whether both layouts hold the same numbers in the same order."""
        return value.rank < MOST_AXES or value.shape[1] == 1 or all(size == 1 for size in value.shape[2:])

    def reshaped(self, value: Value, shape: Sequence[Size], *, last: bool = False, name: str = "") -> Value:
        """The numbers in the order in which they are stored, in another shape. shape: logical."""
        shape = plain(shape)
        there = [shape[dim] for dim in order(len(shape))] if last else list(shape)
        target = self.target(there, name or self.name(value))
        options = {"table": "Reshape", "newShape": target}
        called = name or f"{self.name(value)}/reshaped"
        return self.emit(
            "RESHAPE", [value, self.integers(target)], shape, name=called, dtype=value.dtype, quant=value.quant,
            last=last, options=options,
        )  # fmt: skip

    def target(self, shape: Sequence[Size], name: str) -> list[int]:
        """A shape as reshapes take it: −1 for the axis that is dynamic."""
        if len(self.dynamic(shape)) > 1:
            raise ExportError(
                f"{name}: a tensor of shape {list(map(str, shape))} can't be made while running: LiteRT infers one "
                "dynamic axis of a reshape; load the network with fewer dynamic axes"
            )
        return [size if isinstance(size, int) else -1 for size in shape]

    def shape_like(self, like: Value, stored: Sequence[Size], name: str) -> Value:
        """A shape whose first axis is that of `like`, or so many times it; known before the network runs."""
        times = _quotient(stored[0], like.shape[0])
        if times is None:
            raise ExportError(f"{name}: LiteRT can't make the shape {list(map(str, stored))} while running")
        shape = self.emit(
            "SHAPE", [like], [like.rank], name=f"{name}/shape", dtype=torch.int32,
            options={"table": "Shape", "outType": 2},
        )  # fmt: skip
        first = self.emit(
            "SLICE", [shape, self.integers([0]), self.integers([1])], [1], name=f"{name}/batch", dtype=torch.int32,
            options={"table": "Slice"},
        )  # fmt: skip
        if times > 1:
            first = self.emit(
                "MUL", [first, self.integers([times])], [1], name=f"{name}/times", dtype=torch.int32,
                options={"table": "Mul"},
            )  # fmt: skip
        rest = self.integers([int(size) for size in stored[1:]])
        return self.emit(
            "CONCATENATION", [first, rest], [len(stored)], name=f"{name}/sizes", dtype=torch.int32,
            options={"table": "Concatenation", "axis": 0},
        )  # fmt: skip

    def name(self, value: Value) -> str:
        return str(self.file.tensors[value.index].name)

    # ------------------------------------------------------------------ numbers

    def real(self, value: Value, name: str = "") -> Value:
        """The value as float32."""
        if value.quant is None and value.dtype != torch.float16:
            return value
        if value.index not in self.floats:
            self.floats[value.index] = self.emit(
                "DEQUANTIZE", [value], value.shape, name=name or f"{self.name(value)}/real", last=value.last,
                options={"table": "Dequantize"},
            )  # fmt: skip
        return self.floats[value.index]

    def quantized(self, value: Value, quant: Quant, dtype: torch.dtype, name: str) -> Value:
        """Rounded; integers of another meaning are requantized."""
        return self.emit(
            "QUANTIZE", [value], value.shape, name=name, dtype=dtype, quant=quant, last=value.last,
            options={"table": "Quantize"},
        )  # fmt: skip
