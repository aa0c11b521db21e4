"""The TensorFlow front end: a SavedModel folder or a `.tflite` file to a `Graph`, by way of ONNX.

TensorFlow is loaded in a process of its own, which writes an ONNX file.
"""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

from bitport.apart import apart
from bitport.errors import LoadError, MissingDependency
from bitport.frontends import onnx
from bitport.graph import Graph
from bitport.graph.layout import cancel_permutes
from bitport.graph.simplify import drop_identities

SAVED_MODEL = "saved_model.pb"
CONVERT = "bitport.frontends.tensorflow._convert"
LARGEST_TFLITE = 2**31  # what a flatbuffer can hold
TFLITE = b"TFL3"  # at the fifth byte


def is_saved_model(folder: Path) -> bool:
    return (folder / SAVED_MODEL).is_file()


def load_saved_model(
    path: str | Path,
    example_inputs: Any = None,
    dynamic_shapes: Any = "batch",
    device: str = "cpu",
    nonfinite: str = "refuse",
) -> Graph:
    """Reads the signature `serving_default` (or the only one) of a SavedModel.

    Args:
        example_inputs, dynamic_shapes, nonfinite: as `onnx.load_onnx` takes them.

    Raises:
        LoadError: it is damaged, an operator can't be converted or imported (named), a shape isn't known.
        UnsafeFile: it holds operators that run Python or read and write files; nothing was run.
        MissingDependency: TensorFlow or tf2onnx isn't installed.
    """
    folder = Path(path)
    for place in folder.rglob("*"):
        if place.is_symlink():
            raise LoadError(f"{folder.name} holds a link ({place.name}): copy what it points to")
    return _through_onnx("saved_model", folder, example_inputs, dynamic_shapes, device, nonfinite)


def load_tflite(
    path: str | Path,
    example_inputs: Any = None,
    dynamic_shapes: Any = "batch",
    device: str = "cpu",
    nonfinite: str = "refuse",
) -> Graph:
    """Reads a float or 8-bit `.tflite`; of the latter, the float network: weights on their grid, no roundings (a note).

    Arguments and errors as `load_saved_model`.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head, size = file.read(8), path.stat().st_size
    except OSError as error:
        raise LoadError(f"{path.name} can't be read: {error.strerror}") from error
    if head[4:8] != TFLITE or size > LARGEST_TFLITE:
        raise LoadError(f"{path.name} is no .tflite file, or is damaged: its mark isn't there")
    return _through_onnx("tflite", path, example_inputs, dynamic_shapes, device, nonfinite)


def _through_onnx(function: str, path: Path, *options: Any) -> Graph:
    for package in ("tensorflow", "tf2onnx"):
        if importlib.util.find_spec(package) is None:
            raise MissingDependency(f"reading {path.name}", package, "tensorflow")
    with tempfile.TemporaryDirectory(prefix="bitport-") as scratch:
        folder = Path(scratch)
        model = folder / "model.onnx"
        apart(f"{CONVERT}:{function}", {"path": str(path.absolute()), "out": str(model)}, folder)
        graph = onnx.load_onnx(model, *options)
    drop_identities(graph, dropout=False)
    cancel_permutes(graph)  # the converter leaves some
    return graph
