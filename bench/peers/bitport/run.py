"""bitport at one effort; outputs are ONNX Runtime's. `python -m bench.peers.bitport.run JOB.json`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch

from bench import efforts
from bench.peers import common
from bitport import api
from bitport.recipe import Override

FLOAT = {"format": "float32"}
KEPT = (Override(op="embedding", weights=FLOAT),)  # as with every other tool


def options(cell: Mapping[str, Any]) -> tuple[efforts.Options, efforts.Options]:
    """What `quantize` is told of weights and activations."""
    weights: dict[str, Any] = {"format": f"int{cell['weights']}"}
    if cell["group"]:
        return {**weights, "granularity": "group", "group": cell["group"], "symmetric": False}, FLOAT
    weights |= {"granularity": "tensor"} if cell["per_tensor"] else {"granularity": "channel", "range": "mse"}
    return weights, {"format": f"int{cell['activations']}", "range": "mse"}


def main() -> None:
    job = common.read_job()
    data, test = common.calibration_batches(job), torch.cat(common.test_batches(job))
    graph = api.load(common.network(job), data[0][:2])
    kept = KEPT if job["cell"]["group"] else ()
    found, seconds, told = efforts.outputs(graph, options(job["cell"]), job["effort"], data, test, kept)
    for row in told:
        sys.stdout.write(f"{row['what']}: {row['outcome']}: {row['reason']}\n")
    common.write(job, found, seconds, job["effort"], "onnxruntime", packages=("onnxruntime",))


if __name__ == "__main__":
    main()
