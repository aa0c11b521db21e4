"""OpenVINO's lines of an artifact's `run.py`: the functions from here on, behind what `_runner` imports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._runner import Run


def load(folder: Path, manifest: Mapping[str, Any]) -> Run:
    """The network in OpenVINO on the CPU, in the precision that was measured."""
    import openvino

    compiled = openvino.Core().compile_model(
        folder / "model.xml", "CPU", settings(manifest["target_options"]["threads"])
    )
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
