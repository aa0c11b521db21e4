"""A graph as a `.pt2` file: written without traces of the machine, read without executing anything."""

from __future__ import annotations

import io
import json
import logging
import warnings
from pathlib import Path
from typing import IO, Any, cast

import torch

from bitport.errors import BitportError, LoadError, first_line
from bitport.graph._pt2_scan import scanned
from bitport.graph.export import quiet_export
from bitport.graph.graph import GivenScale, Graph
from bitport.graph.program import from_program
from bitport.graph.weights import settled

NAMES_FILE = "bitport.json"


def save_pt2(graph: Graph, path: str | Path) -> None:
    """Writes a graph as `.pt2`, with its names, axes and stage; no absolute path or source line is stored.

    Raises OSError when the disk refuses.
    """
    extra = {
        "schema": 1,
        "stage": graph.stage,
        "notes": graph.notes,
        "inputs": [{"name": i.name, "shape": list(i.shape)} for i in graph.inputs],
        "sizes": graph.sizes,
        "given": {name: list(scale) for name, scale in graph.given.items()},
    }
    program = graph.export()
    with Path(path).open("wb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        careful = _Careful(file)
        torch.export.save(
            program, cast("IO[bytes]", careful), extra_files={NAMES_FILE: json.dumps(extra, sort_keys=True)}
        )
        careful.finish()


class _Careful(io.RawIOBase):
    """A file for torch to write to, which keeps errors until it is asked for them.

    torch's writer ends the whole process (C++ `terminate`) when it is destroyed after a write that failed or was
    interrupted, so no error may reach it.
    """

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__()
        self._file = file
        self._error: BaseException | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self._error is None:
            try:
                self._file.write(data)
            except BaseException as error:  # noqa: BLE001 - Ctrl-C as well
                self._error = error
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return 0  # torch rewinds what it was given; nobody reads it here

    def finish(self) -> None:
        """Raise what went wrong."""
        if self._error is not None:
            raise self._error


def load_pt2(path: str | Path, device: str = "cpu", nonfinite: str = "refuse") -> Graph:
    """Reads a `.pt2` made by `save_pt2` or by plain `torch.export.save`.

    nonfinite: "refuse" or "zero", as `graph.weights.settled` takes it.

    Raises:
        UnsafeFile: the file needs more than plain tensors; nothing of it was executed.
        LoadError: it is no readable `.pt2`.
        WeightsError: as `settled`.
    """
    archive = scanned(path)
    extra = {NAMES_FILE: ""}
    log = logging.getLogger("torch.export")
    level = log.level
    try:
        with quiet_export():
            log.setLevel(logging.CRITICAL)  # torch logs what we raise
            program = torch.export.load(archive, extra_files=extra)
    except Exception as error:
        raise LoadError(f"{Path(path).name} is no readable exported program ({first_line(error)})") from error
    finally:
        log.setLevel(level)
    try:
        graph, known = _graph(program, _known(extra[NAMES_FILE]), device)
    except BitportError:
        raise
    except Exception as error:
        # torch reads programs that it would not write
        raise LoadError(
            f"{Path(path).name} holds a program that can't be followed ({first_line(error)})"
        ) from error
    graph.notes += settled(graph.gm, nonfinite)
    if not known and graph.inputs and graph.inputs[0].shape and not isinstance(graph.inputs[0].shape[0], str):
        first = graph.inputs[0]
        graph.notes.append(f"axis 0 of {first.name!r} is fixed at {first.shape[0]}: the file was exported so")
    return graph


def _graph(
    program: torch.export.ExportedProgram, known: dict[str, Any], device: str
) -> tuple[Graph, dict[str, Any]]:
    notes = list(known.get("notes", ()))
    axes: dict[tuple[str, int], str] = {}
    for item, label in zip(known.get("inputs", ()), program.graph_signature.user_inputs, strict=False):
        axes |= {(label, i): axis for i, axis in enumerate(item["shape"]) if isinstance(axis, str)}
    if device != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    graph = from_program(program, None, axes, notes, known.get("stage", "float"))
    for name, (scale, *integers) in known.get("given", {}).items():
        graph.given[name] = GivenScale(float(scale), *map(int, integers)).checked(name)
    return graph, known


def _known(text: str | bytes) -> dict[str, Any]:
    try:
        found = json.loads(text) if text else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) and found.get("schema") == 1 else {}
