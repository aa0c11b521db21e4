"""Brevitas: layer quantization, then GPTQ or Qronos, then bias correction.

`python -m bench.peers.brevitas.run JOB.json`. The order is that of Brevitas' own post-training examples: batch norms
merged, weights equalized across layers, layers quantized, activations calibrated (MSE), rounding with the quantized
activations in place, biases corrected. Both roundings are tried, and what comes nearer to the float outputs on the
calibration data is kept; the seconds count both.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from brevitas.core.scaling.standalone import ParameterFromStatsFromParameterScaling
from brevitas.core.zero_point import ParameterFromStatsFromParameterZeroPoint
from brevitas.graph.calibrate import bias_correction_mode, calibration_mode
from brevitas.graph.gpfq import gpfq_mode
from brevitas.graph.gptq import gptq_mode
from brevitas.graph.qronos import Qronos
from brevitas.graph.quantize import layerwise_quantize, preprocess_for_quantize
from brevitas.nn import QuantConv2d, QuantLinear
from brevitas.quant.scaled_int import Int8WeightPerTensorFloatMSE
from brevitas.quant.shifted_scaled_int import (
    ShiftedUint8ActPerTensorFloatMSE,
    ShiftedUint8WeightPerChannelFloatMSE,
)
from brevitas_examples.common.generative.quantizers import ShiftedUint8WeightGroupQuantFloatMSE
from torch import Tensor, nn

from bench.peers import common

PARALLEL = [
    [f"blocks.{block}.{layer}" for layer in "qkv"] for block in range(4)
]  # what reads the same, of the GPT


def quantized(model: nn.Module, cell: dict[str, Any]) -> nn.Module:
    """The model with every Linear and Conv2d in its quantizing form, nothing calibrated yet."""
    if cell["group"]:
        weights = ShiftedUint8WeightGroupQuantFloatMSE.let(group_size=cell["group"])
    elif cell["per_tensor"]:
        weights = Int8WeightPerTensorFloatMSE
    else:
        weights = ShiftedUint8WeightPerChannelFloatMSE
    scaling = ParameterFromStatsFromParameterScaling
    weights = weights.let(bit_width=cell["weights"], narrow_range=False, scaling_impl=scaling)
    if not cell["per_tensor"]:
        weights = weights.let(zero_point_impl=ParameterFromStatsFromParameterZeroPoint)
    inputs = cell["activations"] and ShiftedUint8ActPerTensorFloatMSE.let(bit_width=cell["activations"])
    options = {
        "weight_quant": weights,
        "input_quant": inputs,
        "bias_quant": None,
        "return_quant_tensor": False,
    }
    return layerwise_quantize(model, {nn.Linear: (QuantLinear, options), nn.Conv2d: (QuantConv2d, options)})


def run(model: nn.Module, batches: Sequence[Tensor]) -> None:
    for batch in batches:
        model(batch)


def rounded(
    model: nn.Module, batches: Sequence[Tensor], method: str, parallel: list[list[str]] | None
) -> nn.Module:
    shared = {"act_order": True, "group_of_parallel_layers": parallel}
    if method == "GPTQ":
        mode = gptq_mode(model, use_quant_activations=True, **shared)
    else:
        mode = gpfq_mode(model, algorithm_impl=partial(Qronos, alpha=1e-6), **shared)
    with mode as rounding:
        for _ in range(rounding.num_layers):
            run(rounding.model, batches)
            rounding.update()
    return model


@torch.no_grad()
def main() -> None:
    job = common.read_job()
    cell, batches = job["cell"], common.calibration_batches(job)
    model = common.network(job)
    warnings.filterwarnings("ignore")
    images = job["network"] != "gpt"
    started = time.perf_counter()
    wanted = [model(batch) for batch in batches]

    def error(made: nn.Module) -> float:
        pairs = zip(batches, wanted, strict=True)
        return sum(float((made(batch) - outputs).square().mean()) for batch, outputs in pairs)

    if images and job["network"] != "vit":
        model = preprocess_for_quantize(model, equalize_iters=20)
    found: list[tuple[float, str, nn.Module]] = []
    for method in ("GPTQ", "Qronos"):
        made = quantized(copy.deepcopy(model), cell)
        run(made, batches[:1])
        if cell["activations"]:
            with calibration_mode(made):
                run(made, batches)
        made = rounded(made, batches, method, None if images else PARALLEL)
        found.append((error(made), method, made))
        if images:
            made = copy.deepcopy(made)
            with bias_correction_mode(made):
                run(made, batches)
            found.append((error(made), f"{method}, bias correction", made))
    seconds = time.perf_counter() - started
    _, method, made = min(found, key=lambda one: one[0])
    outputs = torch.cat([made(batch) for batch in common.test_batches(job)])
    common.write(job, outputs, seconds, method, "simulated", packages=("brevitas",))


if __name__ == "__main__":
    main()
