"""bitport at one effort; outputs are ONNX Runtime's. `python -m bench.peers.bitport.run JOB.json`."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.peers import common
from bitport import api
from bitport.artifact import make_target
from bitport.data import Source
from bitport.graph import Graph
from bitport.plan import Plan
from bitport.plan.constants import on_grid
from bitport.recipe import Override, Recipe, StepSpec
from bitport.steps import _base as steps

Options = Mapping[str, Any]
FLOAT: Options = {"format": "float32"}
KEPT = (Override(op="embedding", weights=FLOAT),)  # as with every other tool


def options(cell: Mapping[str, Any], effort: str) -> tuple[Options, Options]:
    """What `quantize` is told of weights and activations. Plain: ranges by min-max as well."""
    weights: dict[str, Any] = {"format": f"int{cell['weights']}"}
    if cell["group"]:
        return {**weights, "granularity": "group", "group": cell["group"], "symmetric": False}, FLOAT
    estimator = "minmax" if effort == "plain" else "mse"
    weights |= (
        {"granularity": "tensor"} if cell["per_tensor"] else {"granularity": "channel", "range": estimator}
    )
    return weights, {"format": f"int{cell['activations']}", "range": estimator}


def quantized(
    graph: Graph, cell: Mapping[str, Any], effort: str, data: Sequence[Tensor]
) -> tuple[Graph, Plan, float, list[dict[str, str]]]:
    """(graph, plan, seconds that the steps took, what they tried)."""
    weights, activations = options(cell, effort)
    step = StepSpec("quantize", {"weights": weights, "activations": activations})
    uses = [spec.use for spec in Recipe(steps=(step,), name="contest").expand(effort).steps]
    runtime = make_target("onnxruntime")
    names = [spec.name for spec in graph.inputs]
    source = Source(list(data), role="calibration", names=names, labels="ignored")
    context = steps.Context(
        runtime.rules(), runtime.arithmetic(), source, graph, overrides=KEPT if cell["group"] else ()
    )
    work, plan = graph.clone(), Plan.empty(runtime.name)
    started = time.perf_counter()
    for use in uses:
        work, plan = steps.make(use, step.options if use == "quantize" else {})(work, plan, context)
    seconds = time.perf_counter() - started
    on_grid(work, plan)
    return work, plan, seconds, context.tried


def outputs(graph: Graph, plan: Plan, batches: Sequence[Tensor]) -> Tensor:
    """What ONNX Runtime makes of them."""
    runtime = make_target("onnxruntime")
    with tempfile.TemporaryDirectory() as scratch:
        runtime.export(graph, plan, Path(scratch))
        session = runtime.open(Path(scratch))
        return torch.cat([session.run((part,))[0] for part in batches])


def main() -> None:
    job = common.read_job()
    data = common.calibration_batches(job)
    graph = api.load(common.network(job), data[0][:2])
    work, plan, seconds, told = quantized(graph, job["cell"], job["effort"], data)
    for row in told:
        sys.stdout.write(f"{row['what']}: {row['outcome']}: {row['reason']}\n")
    found = outputs(work, plan, common.test_batches(job))
    common.write(job, found, seconds, job["effort"], "onnxruntime", packages=("onnxruntime",))


if __name__ == "__main__":
    main()
