"""The Keras 3 front end: a `.keras` file, saved with any backend, to a `Graph`."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitport.apart import apart
from bitport.errors import LoadError, MissingDependency
from bitport.frontends.keras._archive import checked
from bitport.graph import Graph
from bitport.graph.archive import load_pt2
from bitport.graph.program import spans

CONVERT = "bitport.frontends.keras._network:convert"


def load_keras(
    path: str | Path,
    example_inputs: Any = None,
    dynamic_shapes: Any = "batch",
    device: str = "cpu",
    nonfinite: str = "refuse",
) -> Graph:
    """Reads a file in a process of its own, where Keras runs on torch; the user's process loads no Keras.

    Args:
        example_inputs: a tensor, a tuple of them, or a dict by input name. None: random numbers of the shapes that the
            file says, with a batch of two.
        dynamic_shapes: "batch" or None.
        nonfinite: as `pytorch.load_module` takes it.

    Raises:
        LoadError: it is damaged, isn't what Keras 3 saves, or a shape isn't known.
        UnsafeFile: it holds code (Lambda), classes that Keras doesn't bring, or wants other files; nothing was run.
        MissingDependency: Keras isn't installed.
    """
    path = Path(path)
    if dynamic_shapes not in ("batch", None):
        raise LoadError(f"dynamic_shapes of a .keras file are 'batch' or None, not {dynamic_shapes!r}")
    checked(path)
    if importlib.util.find_spec("keras") is None:
        raise MissingDependency(f"reading {path.name}", "keras", "keras")
    with tempfile.TemporaryDirectory(prefix="bitport-") as scratch:
        folder = Path(scratch)
        options: dict[str, Any] = {"path": str(path.absolute()), "out": str(folder / "graph.pt2")}
        options |= {"examples": None, "dynamic": dynamic_shapes, "nonfinite": nonfinite}
        given = _named(example_inputs)
        if given is not None:
            options["examples"] = str(folder / "examples.npz")
            arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in given.items()}
            np.savez(options["examples"], **arrays)
        # settings of Keras that lie in the user's home would change what is read
        apart(CONVERT, options, folder, {"KERAS_BACKEND": "torch", "KERAS_HOME": str(folder)})
        graph = load_pt2(folder / "graph.pt2", device)
    if given is not None:
        names = [item.name for item in graph.inputs]
        graph.examples = spans([given.get(name, given.get(str(i))) for i, name in enumerate(names)], names)
    return graph


def _named(given: Any) -> dict[str, Tensor] | None:
    """Example inputs by name, or by place."""
    if given is None:
        return None
    if isinstance(given, Tensor):
        given = (given,)
    named = given if isinstance(given, Mapping) else {str(place): value for place, value in enumerate(given)}
    for name, value in named.items():
        if not isinstance(value, Tensor) or value.dtype == torch.bfloat16:
            raise LoadError(f"example input {name!r} must be a tensor of integers or usual floats")
    return {name: value.detach().cpu() for name, value in named.items()}
