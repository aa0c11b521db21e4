"""HQQ's weights in groups; outputs are PyTorch's, from what HQQ unpacks. `python -m bench.peers.hqq.run JOB.json`.

Its documentation: axis 0 is better at few bits, axis 1 is what fast kernels take. Both are tried; what counts is the
one whose outputs on the calibration data are nearer the float network's.
"""

from __future__ import annotations

import copy
import time

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear
from torch import nn

from bench.peers import choice, common

AXES = (0, 1)


def quantized(model: nn.Module, bits: int, group: int, axis: int) -> nn.Module:
    """A copy whose every Linear is HQQ's."""
    made = copy.deepcopy(model)
    config = BaseQuantizeConfig(nbits=bits, group_size=group, axis=axis)
    for module in list(made.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                layer = HQQLinear(child, config, compute_dtype=torch.float32, device="cpu")
                setattr(module, name, layer)
    return made


def main() -> None:
    job = common.read_job()
    cell = job["cell"]
    if not cell["group"]:
        common.unsupported("it rounds weights alone, those of linear layers")
    model, data = common.network(job), common.calibration_batches(job)
    HQQLinear.set_backend(HQQBackend.PYTORCH)
    started = time.perf_counter()
    reference = choice.outputs(model, data)
    tried = {}
    for axis in AXES:
        made = quantized(model, cell["weights"], cell["group"], axis)
        tried[choice.divergence(reference, choice.outputs(made, data))] = (axis, made)
    axis, best = tried[min(tried)]
    seconds = time.perf_counter() - started
    found = choice.outputs(best, common.test_batches(job))
    common.write(job, found, seconds, f"HQQ, axis {axis}", "simulated", packages=("hqq",))


if __name__ == "__main__":
    main()
