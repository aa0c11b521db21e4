"""ModelOpt: inputs and weights of every layer fake-quantized. `python -m bench.peers.modelopt.run JOB.json`.

Images: ranges by max and by MSE; GPT: AWQ (lite and clip) and MSE. What comes nearer to the float outputs on the
calibration data is kept; the seconds count all that were tried.
"""

from __future__ import annotations

import copy
import time
import warnings
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from torch import nn

from bench.peers import common


def config(cell: dict[str, Any], algorithm: Any) -> dict[str, Any]:
    weights: dict[str, Any] = {"num_bits": cell["weights"]}
    if cell["group"]:
        weights["block_sizes"] = {-1: cell["group"], "type": "static"}
    else:
        weights["axis"] = None if cell["per_tensor"] else 0
    entries: list[dict[str, Any]] = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": weights},
        {"quantizer_name": "*", "parent_class": "nn.Embedding", "enable": False},
        {"quantizer_name": "*", "parent_class": "nn.BatchNorm2d", "enable": False},
    ]
    if cell["activations"]:
        entries.insert(
            2, {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": cell["activations"], "axis": None}}
        )
    return {"quant_cfg": entries, "algorithm": algorithm}


def folded(model: nn.Module) -> nn.Module:
    """Batch norms merged into the convolutions in front of them, which ModelOpt leaves to its user."""
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            for index in range(len(module) - 1):
                if isinstance(module[index], nn.Conv2d) and isinstance(module[index + 1], nn.BatchNorm2d):
                    module[index] = nn.utils.fuse_conv_bn_eval(module[index], module[index + 1])
                    module[index + 1] = nn.Identity()
    return model


def main() -> None:
    job = common.read_job()
    warnings.filterwarnings("ignore")
    cell, batches = job["cell"], common.calibration_batches(job)
    model = folded(common.network(job))

    def calibrate(made: nn.Module) -> None:
        with torch.no_grad():
            for batch in batches:
                made(batch)

    started = time.perf_counter()
    with torch.no_grad():
        wanted = [model(batch) for batch in batches]
    algorithms = ("awq_full", "mse") if cell["group"] else ("max", "mse")
    found: list[tuple[float, str, nn.Module]] = []
    for algorithm in algorithms:
        made = mtq.quantize(copy.deepcopy(model), config(cell, algorithm), calibrate)
        with torch.no_grad():
            error = sum(float((made(x) - y).square().mean()) for x, y in zip(batches, wanted, strict=True))
        found.append((error, algorithm, made))
    seconds = time.perf_counter() - started
    _, method, made = min(found, key=lambda one: one[0])
    with torch.no_grad():
        outputs = torch.cat([made(batch) for batch in common.test_batches(job)])
    common.write(job, outputs, seconds, method, "simulated", packages=("nvidia-modelopt",))


if __name__ == "__main__":
    main()
