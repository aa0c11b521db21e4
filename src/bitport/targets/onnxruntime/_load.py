"""ONNX Runtime's lines of an artifact's `run.py`: the functions from here on, behind what `_runner` imports."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._runner import Run


def load(folder: Path, manifest: Mapping[str, Any]) -> Run:
    """The network in ONNX Runtime."""
    import os

    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when the runtime is imported
    import onnxruntime

    wanted = manifest["target_options"]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = wanted["threads"]
    session = onnxruntime.InferenceSession(
        str(folder / "model.onnx"), options, providers=[wanted["provider"]]
    )
    names = [end.name for end in session.get_inputs()]
    return lambda fed: session.run(None, dict(zip(names, fed, strict=True)))
