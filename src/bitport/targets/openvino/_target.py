"""The target: export to OpenVINO IR, sessions with taps, and a look into the network that OpenVINO compiled."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...errors import ExportError, MissingDependency, TargetError
from ...graph import Graph
from ...plan import Plan, lower
from ...plan.lower import QUANTIZED
from ...plan.retarget import with_signed_weights
from ...rules import Ruleset
from ...simulate import Arithmetic
from .._base import Inspection, Session, Target, as_array
from .._onnx import U8_OFFSET, save, to_onnx, with_heads
from ._load import settings
from .arithmetic import KERNELS, quantize
from .inspect import MADE_BY, inspected
from .known_gaps import KNOWN_GAPS
from .table import SWALLOWED, ruleset
from .weights import narrow, widened

PREFACES = ("Exception from", "Check 'false'", "FrontEnd API", "Model wasn't fully converted")
LONGEST = 400  # characters of an error that are told
OPSET = 21  # knows 4-bit integers and scales per block


class OpenVino(Target):
    name = "openvino"
    summary = "OpenVINO on CPU: int8 networks, weights of 4 and 8 bits (.xml and .bin)"
    model_file = "model.xml"
    modules = ("openvino",)
    runner = Path(__file__).with_name("_load.py")
    known_gaps = KNOWN_GAPS
    defaults: ClassVar[Mapping[str, Any]] = {"threads": 1}

    def rules(self) -> Ruleset:
        return ruleset()

    def arithmetic(self) -> Arithmetic:
        return Arithmetic(KERNELS, quantize=quantize)

    def export(self, graph: Graph, plan: Plan, folder: Path) -> None:
        graph = with_heads(graph)
        lowered = lower(
            graph, with_signed_weights(plan), dtype=torch.uint8, offset=U8_OFFSET, swallowed=SWALLOWED
        )
        found = widened(lowered, plan)
        model = to_onnx(lowered, graph, opset=OPSET)
        narrow(model, found)
        core = _core()
        # IR is written from ONNX, which is read from a file: what lies beside it as well
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "model.onnx"
            save(model, path)
            try:
                import openvino

                ir = core.read_model(path)
                _name_alike(ir)
                ends = zip(graph.outputs, graph.output_nodes(), strict=True)
                ir.set_rt_info({spec.name: graph.name(node) for spec, node in ends}, MADE_BY)
                openvino.save_model(ir, folder / self.model_file, compress_to_fp16=False)
            except RuntimeError as error:
                raise ExportError(f"OpenVINO refused the network: {_told(error)}") from error

    def open(self, folder: Path, *, taps: bool = False, optimize: bool = True) -> Session:
        return _OvSession(self._compiled(folder, taps=taps, lowered=optimize))

    def inspect(self, folder: Path, plan: Plan, *, taps: bool = False) -> Inspection:
        compiled = self._compiled(folder, taps=taps)
        with self._reading():
            written = _core().read_model(folder / self.model_file)
            return inspected(compiled.get_runtime_model(), written, plan)

    def _compiled(self, folder: Path, *, taps: bool, lowered: bool = True) -> Any:
        """lowered: to integers; without, integers are rounded floats all the way."""
        core = _core()
        config = settings(self.options["threads"]) | ({} if lowered else {"LP_TRANSFORMS_MODE": "NO"})
        with self._reading():
            model = core.read_model(folder / self.model_file)
            if taps:
                model.add_outputs([name for name in _tensor_names(model) if name.endswith(QUANTIZED)])
            return core.compile_model(model, "CPU", config)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, UnicodeError) as error:  # it quotes what it reads
            raise TargetError(f"OpenVINO can't load {self.model_file}: {_told(error)}") from error


def _core() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise MissingDependency("the target openvino", "openvino", "openvino") from error
    return _only_core(openvino.Core)


@cache
def _only_core(make: Callable[[], Any]) -> Any:
    """One for the process, never given up.

    Each gives the thread a stack of its own for signals (AMX registers fit on no other), and puts back the one before
    when it goes: of two the second puts back what the first has freed, and the next signal ends the process.
    """
    return make()


def _told(error: Exception) -> str:
    """What went wrong: OpenVINO begins with where in its own source."""
    lines = [line.strip(" -") for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith(PREFACES)]
    return " ".join(told)[:LONGEST] or type(error).__name__


def _name_alike(model: Any) -> None:
    """Numbers in names that OpenVINO has made up count from 1 in each file, not on through the process."""
    counts: Counter[str] = Counter()
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if re.fullmatch(rf"{kind}_\d+", node.get_friendly_name()):
            counts[kind] += 1
            node.set_friendly_name(f"{kind}_{counts[kind]}")


def _tensor_names(model: Any) -> list[str]:
    """Names of activations; weights are constants."""
    operators = (node for node in model.get_ordered_ops() if node.get_type_name() != "Constant")
    return sorted({name for node in operators for output in node.outputs() for name in output.get_names()})


def _fitting(value: np.ndarray[Any, Any], port: Any) -> np.ndarray[Any, Any]:
    """An array of the shape that an input has; OpenVINO would read any as that shape, without a word."""
    wanted = port.get_partial_shape()
    sizes = [size.get_length() if size.is_static else None for size in wanted]
    if len(sizes) != value.ndim or any(
        size not in (None, given) for size, given in zip(sizes, value.shape, strict=True)
    ):
        name = port.get_any_name()
        raise TargetError(f"input {name!r} has shape {value.shape}; the file takes {wanted.to_string()}")
    return value


class _OvSession(Session):
    def __init__(self, compiled: Any) -> None:
        self.request = compiled.create_infer_request()
        self.inputs = list(compiled.inputs)
        self.outputs: list[int] = []
        self.taps: dict[str, int] = {}
        for index, port in enumerate(compiled.outputs):
            tapped = [name for name in port.get_names() if name.endswith(QUANTIZED)]
            if tapped:
                self.taps |= {name.removesuffix(QUANTIZED): index for name in tapped}
            else:
                self.outputs.append(index)

    def run(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        self._infer(self.prepared(inputs))
        return tuple(self._result(index) for index in self.outputs)

    def run_tapped(self, inputs: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        outputs = self.run(inputs)
        taps = {name: self._result(index).to(torch.int32) - U8_OFFSET for name, index in self.taps.items()}
        return outputs, taps

    def prepared(self, inputs: Sequence[Tensor]) -> dict[str, np.ndarray[Any, Any]]:
        return {
            port.get_any_name(): _fitting(as_array(value), port)
            for port, value in zip(self.inputs, inputs, strict=True)
        }

    def run_prepared(self, prepared: Any) -> None:
        self.request.infer(prepared, share_inputs=True, share_outputs=True)

    def _infer(self, feeds: Mapping[str, np.ndarray[Any, Any]]) -> None:
        try:
            self.request.infer(feeds)
        except RuntimeError as error:
            raise TargetError(f"OpenVINO failed while running: {_told(error)}") from error

    def _result(self, index: int) -> Tensor:
        return torch.from_numpy(np.array(self.request.get_output_tensor(index).data))
