"""NNCF on OpenVINO: int8, or weights alone. `python -m bench.peers.nncf.run JOB.json`.

Images: `nncf.quantize` with full bias correction, run as OpenVINO does and with OpenVINO's rewriting to int8 switched
off: what it rewrites a vision transformer to gives other outputs for other sizes of batch. GPT: `compress_weights` on
all layers but the embeddings, with GPTQ and with AWQ and scale estimation. What comes nearer to the float outputs on
the calibration data is kept.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from typing import Any

import nncf
import numpy as np
import openvino as ov
import torch
from nncf.quantization.advanced_parameters import QuantizationParameters
from torch import Tensor

from bench.peers import common

FLOAT = {"LP_TRANSFORMS_MODE": "NO"}  # what was rounded stays so, and is computed with in float32


def outputs(model: Any, batches: list[Tensor], how: Mapping[str, str] | None = None) -> Tensor:
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32", **(how or {})}
    compiled = ov.Core().compile_model(model, "CPU", settings)
    return torch.cat([torch.from_numpy(np.array(compiled(batch.numpy())[0])) for batch in batches])


def weights_alone(model: Any, batches: list[Tensor], cell: dict[str, Any], wanted: Tensor) -> tuple[Any, str]:
    modes = {4: nncf.CompressWeightsMode.INT4_ASYM, 3: nncf.CompressWeightsMode.INT3_SYM}
    modes[2] = nncf.CompressWeightsMode.INT2_SYM
    singles = [row[None].numpy() for batch in batches for row in batch]
    found = []
    for name, how in {
        "GPTQ": {"gptq": True},
        "AWQ, scale estimation": {"awq": True, "scale_estimation": True},
    }.items():
        try:
            made = nncf.compress_weights(
                model.clone(), mode=modes[cell["weights"]], ratio=1.0, group_size=cell["group"], all_layers=True,
                ignored_scope=nncf.IgnoredScope(types=["Gather"], validate=False), dataset=nncf.Dataset(singles),
                subset_size=len(singles), **how,
            )  # fmt: skip
        except (
            nncf.UnsupportedDatatypeError,
            nncf.ParameterNotSupportedError,
            nncf.ValidationError,
        ) as error:
            last = error
            continue
        found.append((float((outputs(made, batches) - wanted).square().mean()), name, made))
    if not found:
        common.unsupported(str(last).splitlines()[0])
    _, name, made = min(found, key=lambda one: one[0])
    return made, name


def int8(model: Any, job: common.Job, batches: list[Tensor]) -> Any:
    weights = QuantizationParameters(per_channel=False) if job["cell"]["per_tensor"] else None
    singles = [row[None].numpy() for batch in batches for row in batch]
    return nncf.quantize(
        model, nncf.Dataset(singles), preset=nncf.QuantizationPreset.MIXED, fast_bias_correction=False,
        subset_size=len(singles), model_type=nncf.ModelType.TRANSFORMER if job["network"] == "vit" else None,
        advanced_parameters=nncf.AdvancedQuantizationParameters(weights_quantization_params=weights),
    )  # fmt: skip


def main() -> None:
    job = common.read_job()
    warnings.filterwarnings("ignore")
    cell, batches = job["cell"], common.calibration_batches(job)
    model = common.network(job)
    if cell["activations"] not in (None, 8) or (cell["activations"] and cell["weights"] != 8):
        common.unsupported("nncf.quantize refuses other widths than 8 bits")
    with torch.no_grad():
        wanted = torch.cat([model(batch) for batch in batches])
    converted = ov.convert_model(model, example_input=batches[0][:1])
    how: Mapping[str, str] | None = None
    started = time.perf_counter()
    if cell["group"]:
        made, method = weights_alone(converted, batches, cell, wanted)
        note = "embeddings in float"
    else:
        made, method = int8(converted, job, batches), "int8, bias correction"
        together = [torch.cat(batches)]  # a large batch, as the test's are
        errors = [float((outputs(made, together, one) - wanted).square().mean()) for one in (None, FLOAT)]
        how = FLOAT if errors[1] < errors[0] else None
        note = "OpenVINO's rewriting to int8 switched off" if how else ""
    seconds = time.perf_counter() - started
    tested = outputs(made, common.test_batches(job), how)
    common.write(job, tested, seconds, method, "openvino", note, packages=("nncf", "openvino"))


if __name__ == "__main__":
    main()
