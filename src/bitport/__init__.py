"""bitport: a trained float network in, a small and fast integer network for a named runtime out, with the proof.

import bitport

graph = bitport.load(model, example_inputs)
artifact = bitport.compress(graph, "int8", target="onnxruntime", data=calibration, evaluation=test,
                            max_drop=0.01, out="out/")
artifact.predict(inputs)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import (
    ArtifactError,
    BitportError,
    DataError,
    ExportError,
    FormatError,
    GateFailed,
    GraphError,
    Interrupted,
    LoadError,
    Locked,
    MetricError,
    MissingDependency,
    NotEnoughMemory,
    RecipeError,
    Tampered,
    TargetError,
    UnknownName,
    UnsafeFile,
    WeightsError,
)

if TYPE_CHECKING:
    from .api import compress, load, report, targets, verify
    from .artifact import Artifact
    from .data import Batch
    from .difference import diff
    from .doctor import diagnose
    from .formats import Format
    from .metrics import Metric
    from .recipe import Recipe
    from .recover import dequantize, requantize

__version__ = "0.1.0"

# Loaded when first asked for: `import bitport` costs neither torch nor a runtime.
_LAZY = {
    "Artifact": "artifact",
    "Batch": "data",
    "Format": "formats",
    "Metric": "metrics",
    "Recipe": "recipe",
    "compress": "api",
    "dequantize": "recover",
    "diagnose": "doctor",
    "diff": "difference",
    "load": "api",
    "report": "api",
    "requantize": "recover",
    "verify": "api",
}

__all__ = [
    "Artifact",
    "ArtifactError",
    "Batch",
    "BitportError",
    "DataError",
    "ExportError",
    "Format",
    "FormatError",
    "GateFailed",
    "GraphError",
    "Interrupted",
    "LoadError",
    "Locked",
    "Metric",
    "MetricError",
    "MissingDependency",
    "NotEnoughMemory",
    "Recipe",
    "RecipeError",
    "Tampered",
    "TargetError",
    "UnknownName",
    "UnsafeFile",
    "WeightsError",
    "compress",
    "dequantize",
    "diagnose",
    "diff",
    "load",
    "report",
    "requantize",
    "targets",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "targets":
        return import_module(".targets", __name__)  # a package that can be called: always the same object
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module 'bitport' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
