"""The target: export, sessions with taps, and a look into the file that ONNX Runtime optimized."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...errors import RecipeError, TargetError, first_line
from ...graph import Graph
from ...plan import Plan
from ...plan.lower import QUANTIZED
from ...rules import Ruleset
from ...simulate import Arithmetic
from .._base import Inspection, Session, Target, as_array
from .._onnx import ROUNDING, U8_OFFSET
from . import products
from .arithmetic import FLOAT_OPS, KERNELS
from .blockwise import LEVELS, ROUNDS_ACTIVATIONS
from .ends import REMEDY, read_ends
from .export import export_model
from .inspect import inspected, read_model
from .known_gaps import KNOWN_GAPS
from .table import ruleset

OPSETS = range(18, 24)
QUIET = 3  # log level: errors only
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
DUMPED_WEIGHTS = "session.optimized_model_external_initializers_file_name"

# From 1.29 on, official builds send the name and hashes of every model that is loaded to their maker, and keep a
# device id in the user's home, unless this is set before the first import (Privacy.md of the package). Nobody who
# compresses a network has agreed to that; who wants to agree sets it to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


class OnnxRuntime(Target):
    name = "onnxruntime"
    summary = "ONNX Runtime on CPU: int8 convolutions, linear layers and matrix products (.onnx)"
    model_file = "model.onnx"
    modules = ("onnxruntime",)
    runner = Path(__file__).with_name("_load.py")
    known_gaps = KNOWN_GAPS
    defaults: ClassVar[Mapping[str, Any]] = {
        "threads": 1,
        "opset": 20,
        "provider": "CPUExecutionProvider",
        "io": "float",
        "accuracy_level": ROUNDS_ACTIVATIONS,
    }

    def check_options(self) -> None:
        if self.options["opset"] not in OPSETS:
            raise RecipeError(
                f"[target] opset = {self.options['opset']}: {OPSETS[0]} to {OPSETS[-1]} are supported"
            )
        if self.options["accuracy_level"] not in LEVELS:
            raise RecipeError(
                f"[target] accuracy_level = {self.options['accuracy_level']}: expected 0 or 1 (MatMulNBits multiplies "
                f"float activations) or {ROUNDS_ACTIVATIONS} (it rounds them to 8 bits block by block, and is faster)"
            )

    def rules(self) -> Ruleset:
        return ruleset(integer_io=self.options["io"] == "integer", level=self.options["accuracy_level"])

    def arithmetic(self) -> Arithmetic:
        return Arithmetic(KERNELS | products.kernels(self.options["accuracy_level"]), FLOAT_OPS)

    def export(self, graph: Graph, plan: Plan, folder: Path) -> None:
        integer_io = self.options["io"] == "integer" and plan.quantized
        export_model(
            graph,
            plan,
            folder / self.model_file,
            opset=self.options["opset"],
            integer_io=integer_io,
            accuracy_level=self.options["accuracy_level"],
        )

    def open(self, folder: Path, *, taps: bool = False, optimize: bool = True) -> Session:
        session = self._session(folder / self.model_file, taps=taps, optimize=optimize)
        try:
            return _OrtSession(session)
        except UnicodeError as error:
            raise TargetError(f"{self.model_file} holds a name that is no text: {REMEDY}") from error

    def inspect(self, folder: Path, plan: Plan, *, taps: bool = False) -> Inspection:
        with tempfile.TemporaryDirectory() as scratch:
            dump = Path(scratch) / "optimized.onnx"
            self._session(folder / self.model_file, taps=taps, dump=dump)
            nodes = read_model(dump).graph.node
        return inspected(nodes, read_model(folder / self.model_file), plan)

    def _session(
        self, path: Path, *, taps: bool = False, optimize: bool = True, dump: Path | None = None
    ) -> Any:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = QUIET
        options.intra_op_num_threads = self.options["threads"]
        options.inter_op_num_threads = 1
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if dump is not None:
            options.optimized_model_filepath = str(dump)
            # in one file they would end at 2 GiB, and only the operators are looked at
            options.add_session_config_entry(DUMPED_WEIGHTS, f"{dump.name}.data")
        provider = self.options["provider"]
        if provider not in ort.get_available_providers():
            raise TargetError(
                f"ONNX Runtime has no provider {provider!r} here; it has {', '.join(ort.get_available_providers())}"
            )
        with _readable(path.parent) as folder:
            # what is given as bytes finds the weights beside it there
            options.add_session_config_entry(WEIGHTS_FOLDER, str(folder))
            model: str | bytes = _with_taps(path) if taps else str(folder / path.name)
            try:
                # its fallback prints, and tries the same once more
                return ort.InferenceSession(model, options, providers=[provider], enable_fallback=0)
            except Exception as error:
                raise TargetError(f"ONNX Runtime can't load {path.name}: {first_line(error)}") from error


@contextmanager
def _readable(folder: Path) -> Iterator[Path]:
    """A folder by a name that ONNX Runtime takes: its own, or a link to it where that is no valid Unicode."""
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory() as scratch:
            link = Path(scratch) / "folder"
            link.symlink_to(folder.resolve(), target_is_directory=True)
            yield link
    else:
        yield folder


def _with_taps(path: Path) -> bytes:
    """The model with every activation's integers as a graph output; weights that lie beside it stay there.

    Integer outputs, not float ones: a float output in the middle would keep the runtime from fusing.
    """
    import onnx

    model = read_model(path)
    for node in model.graph.node:
        if node.op_type in ROUNDING and node.output[0].endswith(QUANTIZED):
            model.graph.output.append(onnx.ValueInfoProto(name=node.output[0]))
    return bytes(model.SerializeToString())


class _OrtSession(Session):
    """Takes and gives floats; where the file's own inputs and outputs are integers it converts as its metadata says."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.inputs = [value.name for value in session.get_inputs()]
        names = [value.name for value in session.get_outputs()]
        self.outputs = [name for name in names if not name.endswith(QUANTIZED)]
        self.taps = [name for name in names if name.endswith(QUANTIZED)]
        self.ends = read_ends(session.get_modelmeta().custom_metadata_map)

    def run(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        results = self._run(self.outputs, self.prepared(inputs))
        return tuple(self._given(name, y) for name, y in zip(self.outputs, results, strict=True))

    def run_tapped(self, inputs: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        feeds = self.prepared(inputs)
        results = self._run(self.outputs + self.taps, feeds)
        count = len(self.outputs)
        taps = {
            name.removesuffix(QUANTIZED): _signed(value)
            for name, value in zip(self.taps, results[count:], strict=True)
        }
        integers = {**feeds, **dict(zip(self.outputs, results, strict=False))}
        taps |= {end.producer: _signed(integers[name]) for name, end in self.ends.items()}
        return tuple(self._given(n, y) for n, y in zip(self.outputs, results, strict=False)), taps

    def as_stored(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        feeds = self.prepared(inputs)
        results = self._run(self.outputs, feeds)
        return [torch.from_numpy(feeds[name]) for name in self.inputs], [torch.from_numpy(y) for y in results]

    def prepared(self, inputs: Sequence[Tensor]) -> dict[str, np.ndarray[Any, Any]]:
        return {
            name: self._taken(name, as_array(value)) for name, value in zip(self.inputs, inputs, strict=True)
        }

    def run_prepared(self, prepared: Any) -> None:
        self.session.run(self.outputs, prepared)

    def _taken(self, name: str, value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        end = self.ends.get(name)
        return value if end is None or value.dtype == end.dtype else end.quantize(value)

    def _given(self, name: str, value: np.ndarray[Any, Any]) -> Tensor:
        end = self.ends.get(name)
        return torch.from_numpy(np.array(value if end is None else end.dequantize(value)))

    def _run(self, names: list[str], feeds: Mapping[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        try:
            results: list[np.ndarray[Any, Any]] = self.session.run(names, feeds)
        except Exception as error:
            raise TargetError(f"ONNX Runtime failed while running: {first_line(error)}") from error
        return results


def _signed(value: np.ndarray[Any, Any]) -> Tensor:
    offset = U8_OFFSET if value.dtype == np.uint8 else 0
    return torch.from_numpy(np.array(value)).to(torch.int32) - offset
