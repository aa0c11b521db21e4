"""The target: export to .tflite, sessions with taps, and a look into the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...errors import MissingDependency, RecipeError, TargetError, first_line
from ...graph import Graph
from ...plan import Plan
from ...plan.lower import QUANTIZED
from ...rules import Ruleset
from ...simulate import Arithmetic
from .. import _trial
from .._base import Inspection, Session, Target, as_array
from .._runner import dequantize, quantize
from . import reference, xnnpack
from ._load import opened, shaped
from .export import export_model
from .inspect import inspected
from .reading import channels_last, read_model, with_outputs
from .table import ruleset

PROBE = "bitport.targets.litert._probe:probe"
KERNELS = {"xnnpack": xnnpack.ARITHMETIC, "reference": reference.ARITHMETIC}


class LiteRt(Target):
    name = "litert"
    summary = "LiteRT (TensorFlow Lite) on CPU: int8 networks (.tflite)"
    model_file = "model.tflite"
    modules = ("ai_edge_litert",)
    runner = Path(__file__).with_name("_load.py")
    byte = "int8"
    defaults: ClassVar[Mapping[str, Any]] = {"threads": 1, "io": "float", "kernels": "xnnpack"}

    def check_options(self) -> None:
        if self.options["kernels"] not in KERNELS:
            raise RecipeError(
                f"[target] kernels = {self.options['kernels']!r}: expected 'xnnpack' (fast) or 'reference' (plain C++)"
            )

    def rules(self) -> Ruleset:
        return ruleset(self.options["kernels"], integer_io=self.options["io"] == "integer")

    def arithmetic(self) -> Arithmetic:
        return KERNELS[self.options["kernels"]]

    def export(self, graph: Graph, plan: Plan, folder: Path) -> None:
        integer_io = self.options["io"] == "integer" and plan.quantized
        path = folder / self.model_file
        path.write_bytes(export_model(graph, plan, integer_io=integer_io))
        _trial.written(path)

    def open(self, folder: Path, *, taps: bool = False, optimize: bool = True) -> Session:
        content = (folder / self.model_file).read_bytes()
        model = read_model(content, self.model_file)
        _trial.tried(folder / self.model_file, PROBE, {"kernels": self.options["kernels"]}, "LiteRT")
        names: list[str] = []
        if taps:
            content, names = with_outputs(model, QUANTIZED)
        kernels = self.options["kernels"] if optimize else "reference"
        try:
            interpreter = opened(content, self.options["threads"], kernels)
            return _Session(interpreter, names, channels_last(model) if taps else frozenset())
        except ImportError as error:
            raise MissingDependency("the target litert", "ai_edge_litert", "litert") from error
        except (RuntimeError, ValueError) as error:
            raise TargetError(f"LiteRT can't load {self.model_file}: {first_line(error)}") from error

    def inspect(self, folder: Path, plan: Plan, *, taps: bool = False) -> Inspection:
        content = (folder / self.model_file).read_bytes()
        return inspected(read_model(content, self.model_file), plan)


class _Session(Session):
    """Takes and gives floats; where the file's own inputs and outputs are integers it converts as they say."""

    def __init__(self, interpreter: Any, taps: Sequence[str], turned: frozenset[str]) -> None:
        self.interpreter, self.turned = interpreter, turned
        self.inputs = interpreter.get_input_details()
        ends = interpreter.get_output_details()
        count = len(ends) - len(taps)
        self.outputs, self.taps = ends[:count], dict(zip(taps, ends[count:], strict=True))

    def run(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        with _told():
            self._invoke(self.prepared(inputs))
            return tuple(self._given(end) for end in self.outputs)

    def run_tapped(self, inputs: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        with _told():
            fed = self.prepared(inputs)
            self._invoke(fed)
            outputs = tuple(self._given(end) for end in self.outputs)
            taps = {
                name.removesuffix(QUANTIZED): self._integers(name, end) for name, end in self.taps.items()
            }
        for end, value in zip(self.inputs, fed, strict=True):
            if _stored(end) is not None:
                taps[end["name"]] = torch.from_numpy(value.astype(np.int32))
        return outputs, taps

    def as_stored(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        with _told():
            fed = self.prepared(inputs)
            self._invoke(fed)
            found = [
                torch.from_numpy(np.array(self.interpreter.get_tensor(end["index"]))) for end in self.outputs
            ]
        return [torch.from_numpy(value) for value in fed], found

    def prepared(self, inputs: Sequence[Tensor]) -> list[np.ndarray[Any, Any]]:
        return [_fitting(as_array(value), end) for end, value in zip(self.inputs, inputs, strict=True)]

    def run_prepared(self, prepared: Any) -> None:
        for end, value in zip(self.inputs, prepared, strict=True):
            self.interpreter.set_tensor(end["index"], value)
        self.interpreter.invoke()

    def _invoke(self, fed: Sequence[np.ndarray[Any, Any]]) -> None:
        shaped(self.interpreter, [end["index"] for end in self.inputs], fed)
        self.run_prepared(fed)

    def _integers(self, name: str, end: Mapping[str, Any]) -> Tensor:
        value = torch.from_numpy(self.interpreter.get_tensor(end["index"]).astype(np.int32))
        return value.movedim(-1, 1).contiguous() if name in self.turned else value

    def _given(self, end: Mapping[str, Any]) -> Tensor:
        value, stored = np.array(self.interpreter.get_tensor(end["index"])), _stored(end)
        return torch.from_numpy(value if stored is None else dequantize(value, *stored))


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, TypeError, ValueError) as error:
        raise TargetError(f"LiteRT failed while running: {first_line(error)}") from error


def _stored(end: Mapping[str, Any]) -> tuple[float, int] | None:
    """(scale, zero point) of an end that is integers."""
    scale, zero_point = end["quantization"]
    return (float(scale), int(zero_point)) if scale else None


def _fitting(value: np.ndarray[Any, Any], end: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """An array as the file takes it. Raises TargetError for another shape or type."""
    wanted, name = [int(size) for size in end["shape_signature"]], end["name"]
    wanted = wanted or [int(size) for size in end["shape"]]
    if len(wanted) != value.ndim or any(
        size not in (-1, given) for size, given in zip(wanted, value.shape, strict=True)
    ):
        raise TargetError(f"input {name!r} has shape {value.shape}; the file takes {wanted}")
    stored = _stored(end)
    if stored is not None and value.dtype != end["dtype"]:
        return np.asarray(quantize(value, *stored, np.dtype(end["dtype"]).name))
    if value.dtype != end["dtype"]:
        raise TargetError(f"input {name!r} is {value.dtype}; the file takes {np.dtype(end['dtype'])}")
    return value
