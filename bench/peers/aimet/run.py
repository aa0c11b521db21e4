"""AIMET: batch norms folded, layers equalized, AdaRound, then ranges. `python -m bench.peers.aimet.run JOB.json`.

Images: cross-layer equalization where the network is convolutional, AdaRound with 1,500 iterations a layer, activations
by the tool's enhanced (SQNR) ranges. GPT, 4 bits: blocks of weights with sequential MSE.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from bench.peers import common

# the one from the package index doesn't load beside this torch, and nothing of it is used here
common.without("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.ops")

from aimet_torch import QuantizationSimModel
from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters
from aimet_torch.batch_norm_fold import fold_all_batch_norms
from aimet_torch.common import quantsim_config
from aimet_torch.common.defs import QuantScheme
from aimet_torch.cross_layer_equalization import equalize_model
from aimet_torch.quantsim.config_utils import set_blockwise_quantization_for_weights
from aimet_torch.seq_mse import apply_seq_mse
from torch import Tensor, nn
from torch.utils.data import DataLoader

ITERATIONS = 1500
SCHEME = QuantScheme.post_training_tf_enhanced


def config(cell: dict[str, Any]) -> str:
    """AIMET's own rules; its default is a scale per channel."""
    if not cell["per_tensor"]:
        return "default"
    return str(Path(quantsim_config.__file__).parent / "default_config.json")


def simulated(model: nn.Module, example: Tensor, cell: dict[str, Any]) -> Any:
    return QuantizationSimModel(
        model,
        dummy_input=example,
        quant_scheme=SCHEME,
        default_param_bw=cell["weights"],
        default_output_bw=cell["activations"] or 16,
        config_file=config(cell),
    )


def images(job: dict[str, Any], model: nn.Module, batches: list[Tensor]) -> tuple[Any, str]:
    cell, example = job["cell"], batches[0][:2]
    if job["network"] == "vit":
        fold_all_batch_norms(model, None, dummy_input=example)
    else:
        equalize_model(model, dummy_input=example)
    loader = DataLoader(torch.cat(batches), batch_size=32)
    method = "CLE, " if job["network"] != "vit" else ""
    if cell["weights"] < 8:
        parameters = AdaroundParameters(
            loader,
            num_batches=len(batches),
            default_num_iterations=ITERATIONS,
            forward_fn=lambda net, x: net(x),
        )
        with tempfile.TemporaryDirectory() as folder:
            model = Adaround.apply_adaround(
                model, example, parameters, path=folder, filename_prefix="rounded",
                default_param_bw=cell["weights"], default_quant_scheme=SCHEME,
                default_config_file=config(cell),
            )  # fmt: skip
            sim = simulated(model, example, cell)
            sim.set_and_freeze_param_encodings(encoding_path=f"{folder}/rounded.encodings")
        method += f"AdaRound {ITERATIONS}"
    else:
        sim = simulated(model, example, cell)
        method += "enhanced ranges"
    sim.compute_encodings(lambda net, _: [net(batch) for batch in batches], None)
    return sim, method


def text(job: dict[str, Any], model: nn.Module, batches: list[Tensor]) -> tuple[Any, str]:
    cell = job["cell"]
    sim = simulated(model, batches[0][:2], cell)
    set_blockwise_quantization_for_weights(
        sim, [nn.Linear], cell["weights"], symmetric=False, block_size=cell["group"]
    )
    for module in sim.model.modules():
        for name in ("input_quantizers", "output_quantizers"):
            if hasattr(module, name):
                holder = getattr(module, name)
                for index in range(len(holder)):
                    holder[index] = None
        if isinstance(module, nn.Embedding):
            module.param_quantizers["weight"] = None
        if isinstance(module, nn.LayerNorm):
            for key in module.param_quantizers:
                module.param_quantizers[key] = None
    apply_seq_mse(
        sim, DataLoader(torch.cat(batches), batch_size=8), num_candidates=20, forward_fn=lambda net, x: net(x)
    )
    sim.compute_encodings(lambda net, _: [net(batch) for batch in batches[:1]], None)
    return sim, "sequential MSE"


def main() -> None:
    job = common.read_job()
    warnings.filterwarnings("ignore")
    batches = common.calibration_batches(job)
    model = common.network(job)
    started = time.perf_counter()
    with torch.no_grad() if job["network"] == "gpt" else torch.enable_grad():
        sim, method = (text if job["network"] == "gpt" else images)(job, model, batches)
    seconds = time.perf_counter() - started
    with torch.no_grad():
        outputs = torch.cat([sim.model(batch) for batch in common.test_batches(job)])
    common.write(job, outputs, seconds, method, "simulated", packages=("aimet-torch",))


if __name__ == "__main__":
    main()
