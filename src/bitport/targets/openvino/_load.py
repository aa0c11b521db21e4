"""OpenVINO's lines of an artifact's `run.py`: all from the class on, behind those of `_runner`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .._runner import Run, Runner


class Network(Runner):
    """The network in OpenVINO on the CPU, in the precision that was measured."""

    core: Any = (
        None  # one for the process: of two that overlap the second puts back the first one's signal stack
    )

    def load(self, options: Mapping[str, Any]) -> Run:
        import openvino

        Network.core = Network.core or openvino.Core()
        compiled = self.core.compile_model(self.folder / "model.xml", "CPU", settings(options["threads"]))
        request = compiled.create_infer_request()
        names = [port.get_any_name() for port in compiled.inputs]

        def run(fed: Sequence[Any]) -> Sequence[Any]:
            request.infer(dict(zip(names, fed, strict=True)))
            return [np.array(request.get_output_tensor(index).data) for index in range(len(compiled.outputs))]

        return run


def settings(threads: int) -> dict[str, Any]:
    """One answer at a time, in float32 (bfloat16 otherwise, where the processor has it), nothing rounded unasked."""
    return {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    }
