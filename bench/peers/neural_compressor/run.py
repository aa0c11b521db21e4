"""Neural Compressor: weights alone, GPTQ, HQQ and plain. `python -m bench.peers.neural_compressor.run JOB.json`."""

from __future__ import annotations

import copy
import time
import warnings

import torch
from neural_compressor.torch.quantization import GPTQConfig, HQQConfig, RTNConfig, convert, prepare
from torch import nn

from bench.peers import common


def main() -> None:
    job = common.read_job()
    warnings.filterwarnings("ignore")
    cell, batches = job["cell"], common.calibration_batches(job)
    if not cell["group"]:
        common.unsupported("static int8 needs its extension for Intel's PyTorch, which is no longer released")
    model = common.network(job)
    with torch.no_grad():
        wanted = [model(batch) for batch in batches]
    shared = {"bits": cell["weights"], "group_size": cell["group"], "use_sym": False, "quant_lm_head": True}
    found: list[tuple[float, str, nn.Module]] = []
    started = time.perf_counter()
    half = HQQConfig(bits=cell["weights"], group_size=cell["group"], quant_lm_head=True)
    configs = {"GPTQ": GPTQConfig(**shared), "HQQ": half, "RTN": RTNConfig(**shared)}
    for name, config in configs.items():
        try:
            made = prepare(copy.deepcopy(model), config)
            with torch.no_grad():
                for batch in batches:
                    made(batch)
            made = convert(made)
            with torch.no_grad():
                error = sum(
                    float((made(x) - y).square().mean()) for x, y in zip(batches, wanted, strict=True)
                )
        except Exception as error:  # noqa: BLE001 - one of the methods may fail: the log tells
            print(f"{name}: {type(error).__name__}: {error}")  # noqa: T201
            continue
        found.append((error, name, made))
    seconds = time.perf_counter() - started
    if not found:
        raise RuntimeError("none of its methods ran")
    _, method, made = min(found, key=lambda one: one[0])
    with torch.no_grad():
        outputs = torch.cat([made(batch) for batch in common.test_batches(job)])
    common.write(job, outputs, seconds, method, "simulated", packages=("neural-compressor",))


if __name__ == "__main__":
    main()
