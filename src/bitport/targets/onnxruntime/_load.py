"""ONNX Runtime's lines of an artifact's `run.py`: all from the class on, behind those of `_runner`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .._runner import Run, Runner


class Network(Runner):
    """The network in ONNX Runtime."""

    def load(self, options: Mapping[str, Any]) -> Run:
        import os

        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when the runtime is imported
        import onnxruntime

        wanted = onnxruntime.SessionOptions()
        wanted.log_severity_level = 3
        wanted.intra_op_num_threads = options["threads"]
        path, providers = str(self.folder / "model.onnx"), [options["provider"]]
        session = onnxruntime.InferenceSession(path, wanted, providers=providers)
        names = [end.name for end in session.get_inputs()]
        return lambda fed: session.run(None, dict(zip(names, fed, strict=True)))
