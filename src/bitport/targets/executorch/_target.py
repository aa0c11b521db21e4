"""The target: export to a program with XNNPACK's delegates, sessions with taps, and a look into the file."""

from __future__ import annotations

import json
import os
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import RecipeError, TargetError, first_line
from ...graph import Graph
from ...plan import Plan
from ...rules import Ruleset
from ...simulate import Arithmetic
from .. import _trial
from .._base import Inspection, Session, Target
from .._xnnpack import quantize
from ._sdk import PACKAGE, muted, quiet, runtime
from .arithmetic import KERNELS
from .export import NOTE, export_model
from .inspect import FORWARD, inspected
from .known_gaps import KNOWN_GAPS
from .table import ruleset

PROBE = "bitport.targets.executorch._probe:probe"
NOTES = {"inputs": list, "taps": list, "batch": int | None, "delegated": dict, "left": dict}


class ExecuTorch(Target):
    name = "executorch"
    summary = "ExecuTorch on CPU (XNNPACK): int8 networks for phones and small devices (.pte)"
    model_file = "model.pte"
    modules = (PACKAGE,)
    runner = Path(__file__).with_name("_load.py")
    runs_as_written = True
    known_gaps = KNOWN_GAPS
    defaults: ClassVar[Mapping[str, Any]] = {"threads": 1, "batch": 64, "length": 512}

    def check_options(self) -> None:
        for name, value in self.options.items():
            if value < 1:
                raise RecipeError(f"[target] {name} = {value}: at least 1")

    def rules(self) -> Ruleset:
        return ruleset()

    def arithmetic(self) -> Arithmetic:
        return Arithmetic(KERNELS, quantize=quantize)

    def export(self, graph: Graph, plan: Plan, folder: Path) -> None:
        self._export(graph, plan, folder)

    @contextmanager
    def watchable(self, graph: Graph, plan: Plan, folder: Path) -> Iterator[Path]:
        """An export of its own: what isn't an output of a program can't be seen."""
        with tempfile.TemporaryDirectory() as scratch:
            self._export(graph, plan, Path(scratch), taps=True)
            yield Path(scratch)

    def _export(self, graph: Graph, plan: Plan, folder: Path, *, taps: bool = False) -> None:
        runtime()  # told before any work where it isn't there
        sizes = {name: self.options[name] for name in ("batch", "length")}
        path = folder / self.model_file
        export_model(graph, plan, path, **sizes, taps=taps)
        _trial.written(path)

    def open(self, folder: Path, *, taps: bool = False, optimize: bool = True) -> Session:
        return self._opened(folder / self.model_file)

    def inspect(self, folder: Path, plan: Plan, *, taps: bool = False) -> Inspection:
        path = folder / self.model_file
        note = self._opened(path).note
        with quiet():
            return inspected(path.read_bytes(), note, plan)

    def _opened(self, path: Path) -> EtSession:
        runtime()  # told before any trial where it isn't there
        _trial.tried(path, PROBE, {}, "ExecuTorch")
        return EtSession(path, self.options["threads"])


_sessions: weakref.WeakSet[EtSession] = weakref.WeakSet()


class EtSession(Session):
    def __init__(self, path: Path, threads: int) -> None:
        module = runtime()
        try:
            with muted():
                _use_threads(module, threads)
                # as bytes a path needs not be Unicode
                checked = module.Verification.InternalConsistency
                self.program = module._load_program(os.fsencode(path), program_verification=checked)
                self.note = _read_note(self.program.load_method(NOTE)([])[0])
                self.method = self.program.load_method(FORWARD)
        except (RuntimeError, ValueError) as error:
            raise TargetError(f"ExecuTorch can't load {path.name}: {first_line(error)}") from error
        _sessions.add(self)

    def run(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        results = self._run(inputs)
        return results[: len(results) - len(self.note["taps"])]

    def run_tapped(self, inputs: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        results = self._run(inputs)
        names: list[str] = self.note["taps"]
        count = len(results) - len(names)
        taps = (value.to(torch.int32) for value in results[count:])
        return results[:count], dict(zip(names, taps, strict=True))

    def prepared(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return [_fitting(value, *spec) for value, spec in zip(inputs, self.note["inputs"], strict=True)]

    def run_prepared(self, prepared: Any) -> None:
        self.method(prepared)

    def _run(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Batches that are larger than the file has room for go through it in parts."""
        most, count = self.note["batch"], len(inputs[0]) if inputs and inputs[0].dim() else 0
        if most is None or count <= most or any(value.shape[:1] != (count,) for value in inputs):
            return self._once(inputs)
        parts = zip(*(torch.split(value, most) for value in inputs), strict=True)
        return tuple(torch.cat(found) for found in zip(*map(self._once, parts), strict=True))

    def _once(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        fed = self.prepared(inputs)
        try:
            with muted():
                return tuple(self.method(fed))
        except RuntimeError as error:
            raise TargetError(f"ExecuTorch failed while running: {first_line(error)}") from error


def _read_note(text: Any) -> Mapping[str, Any]:
    """What the exporter left in the file. Raises ValueError where anything is missing."""
    note: dict[str, Any] = json.loads(text if isinstance(text, str) else "null")
    whole = isinstance(note, dict) and all(
        key in note and isinstance(note[key], kind) for key, kind in NOTES.items()
    )
    if not whole or not all(map(_is_input, note["inputs"])):
        raise ValueError(f"its method {NOTE!r} doesn't tell what bitport's exporter wrote there")
    return note


def _is_input(entry: Any) -> bool:
    """Name, sizes (null: open), and how large an open one may get."""
    return (
        isinstance(entry, list)
        and [type(part) for part in entry] == [str, list, list]
        and len(entry[1]) == len(entry[2])
        and all(size is None or type(size) is int for size in entry[1] + entry[2])
    )


def _fitting(value: Tensor, name: str, sizes: Sequence[int | None], largest: Sequence[int | None]) -> Tensor:
    """An input as ExecuTorch reads it: by its memory, whatever its strides are.

    Raises TargetError for another shape than the file takes.
    """
    fits = value.dim() == len(sizes) and all(
        given == size if size is not None else most is None or given <= most
        for given, size, most in zip(value.shape, sizes, largest, strict=True)
    )
    if not fits:
        bounds = zip(sizes, largest, strict=True)
        takes = ", ".join(f"up to {most}" if size is None else str(size) for size, most in bounds)
        raise TargetError(f"input {name!r} has shape {tuple(value.shape)}; the file takes [{takes}]")
    return value.detach().clone(memory_format=torch.contiguous_format)


def _use_threads(module: Any, threads: int) -> None:
    """It has one pool of threads for the process, which a network holds on to once it is loaded."""
    if module._threadpool_get_thread_count() == threads:
        return
    if len(_sessions):
        raise TargetError(
            f"ExecuTorch has one pool of threads for the process, and networks are loaded that use another number "
            f"than {threads}: give them up first, or run in a process of its own"
        )
    module._unsafe_reset_threadpool(threads)
