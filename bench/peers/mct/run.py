"""Model Compression Toolkit: gradient-based post-training quantization. `python -m bench.peers.mct.run JOB.json`.

Its first IMX500 capabilities with the cell's bits, weights per channel and symmetric, activations uniform; 20 epochs
over the 256 calibration images.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from bench.peers import common

# the one from the package index doesn't load beside this torch, and nothing of it is used here
common.without(
    "torchvision",
    "torchvision.ops",
    "torchvision.transforms",
    "torchvision.models",
    "torchvision.transforms.transforms",
)

import model_compression_toolkit as mct
from mct_quantizers import QuantizationMethod
from model_compression_toolkit.target_platform_capabilities.constants import KERNEL_ATTR, WEIGHTS_N_BITS
from model_compression_toolkit.target_platform_capabilities.tpc_models.imx500_tpc.v1_0 import tpc

EPOCHS = 20


def capabilities(cell: dict[str, Any]) -> Any:
    base, _, default = tpc.get_op_quantization_configs()
    bits = {
        "activation_n_bits": cell["activations"],
        "supported_input_activation_n_bits": (8, 4),
        "activation_quantization_method": QuantizationMethod.UNIFORM,
    }
    base = base.clone_and_edit(attr_to_edit={KERNEL_ATTR: {WEIGHTS_N_BITS: cell["weights"]}}, **bits)
    return tpc.generate_tpc(default.clone_and_edit(**bits), base, [base], "contest")


def main() -> None:
    job = common.read_job()
    warnings.filterwarnings("ignore")
    cell, batches = job["cell"], common.calibration_batches(job)
    if cell["group"]:
        common.unsupported("it has no groups of weights")
    model = common.network(job)

    def data() -> Iterator[list[Any]]:
        for batch in batches:
            yield [batch.numpy()]

    started = time.perf_counter()
    if cell["weights"] < 8:
        made, _ = mct.gptq.pytorch_gradient_post_training_quantization(
            model, data, gptq_config=mct.gptq.get_pytorch_gptq_config(n_epochs=EPOCHS),
            target_platform_capabilities=capabilities(cell),
        )  # fmt: skip
        method = f"gradient-based, {EPOCHS} epochs"
    else:
        made, _ = mct.ptq.pytorch_post_training_quantization(
            model, data, target_platform_capabilities=capabilities(cell)
        )
        method = "post-training"
    seconds = time.perf_counter() - started
    note = "weights per channel" if cell["per_tensor"] else ""
    with torch.no_grad():
        outputs = torch.cat([made(batch) for batch in common.test_batches(job)])
    common.write(job, outputs, seconds, method, "simulated", note, packages=("model-compression-toolkit",))


if __name__ == "__main__":
    main()
