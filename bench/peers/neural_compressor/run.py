"""Neural Compressor: static int8, or weights alone. `python -m bench.peers.neural_compressor.run JOB.json`.

Images: its PT2E flow, with its two ways of finding the ranges of activations. GPT: GPTQ on the blocks with HQQ on the
head (no data reaches the head in its GPTQ, which makes zeros of it), and HQQ alone. What comes nearer to the float
outputs on the calibration data is kept.
"""

from __future__ import annotations

import copy
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

os.environ["HQQ_NOT_USE_HALF"] = "1"  # its own switch, read at import: float32 as all else here

import torch
from neural_compressor.torch.export import export
from neural_compressor.torch.quantization import GPTQConfig, HQQConfig, StaticQuantConfig, convert, prepare
from torch import Tensor, nn

from bench.peers import common

RANGES = {"moving minimum and maximum": "minmax", "histogram": "kl"}


def outputs(model: Callable[[Tensor], Tensor], batches: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(batch) for batch in batches])


def converted(model: nn.Module, config: Any, batches: list[Tensor]) -> nn.Module:
    prepared = prepare(model, config)
    with torch.no_grad():
        for batch in batches:
            prepared(batch)
    made: nn.Module = convert(prepared)
    return made


def static(model: nn.Module, cell: dict[str, Any], ranges: str, batches: list[Tensor]) -> nn.Module:
    sizes = ({0: torch.export.Dim("batch")},)
    exported = export(copy.deepcopy(model), (batches[0],), dynamic_shapes=sizes)
    weights = "per_tensor" if cell["per_tensor"] else "per_channel"
    return converted(exported, StaticQuantConfig(act_algo=ranges, w_granularity=weights), batches)


def gptq(model: nn.Module, cell: dict[str, Any], batches: list[Tensor]) -> nn.Module:
    shared = {"bits": cell["weights"], "group_size": cell["group"]}
    with tempfile.TemporaryDirectory() as folder:  # it wants a folder, and takes nothing from it
        blocks = GPTQConfig(**shared, use_sym=False, act_order=True, model_path=folder)
        made = converted(copy.deepcopy(model), blocks, batches)
    head = HQQConfig(dtype="fp32")
    head.set_local("head", HQQConfig(**shared, quant_lm_head=True))
    return converted(made, head, batches)


def hqq(model: nn.Module, cell: dict[str, Any], batches: list[Tensor]) -> nn.Module:
    config = HQQConfig(bits=cell["weights"], group_size=cell["group"], quant_lm_head=True)
    return converted(copy.deepcopy(model), config, batches)


def main() -> None:
    job = common.read_job()
    warnings.filterwarnings("ignore")
    cell, batches = job["cell"], common.calibration_batches(job)
    if not cell["group"] and (cell["weights"], cell["activations"]) != (8, 8):
        common.unsupported("its static flow has 8 bits alone")
    model = common.network(job)
    wanted = outputs(model, batches)
    started = time.perf_counter()
    if cell["group"]:
        found = {"GPTQ, head by HQQ": gptq(model, cell, batches), "HQQ": hqq(model, cell, batches)}
    else:
        found = {f"PT2E, {name}": static(model, cell, ranges, batches) for name, ranges in RANGES.items()}
    errors = {name: float((outputs(made, batches) - wanted).square().mean()) for name, made in found.items()}
    method = min(errors, key=lambda name: errors[name])
    seconds = time.perf_counter() - started
    tested = outputs(found[method], common.test_batches(job))
    note = "embeddings in float" if cell["group"] else ""
    common.write(job, tested, seconds, method, "simulated", note, packages=("neural-compressor", "torchao"))


if __name__ == "__main__":
    main()
