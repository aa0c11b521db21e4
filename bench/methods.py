"""How long the methods of each effort take, and what memory: `python -m bench.methods` prints their rows.

One thread. The networks are untrained; `gptq` tries more where it gains little, which they needn't have in common with
trained ones.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn

from bitport import api
from bitport.artifact import make_target
from bitport.data import Source
from bitport.formats import Format
from bitport.graph import Graph
from bitport.numerics.codes import decode, encode, fit
from bitport.numerics.gptq import by_rows, solve
from bitport.numerics.grid import Grid
from bitport.numerics.hessian import damped
from bitport.plan import Plan
from bitport.proof.cost import peak_memory
from bitport.recipe import Override, Recipe, StepSpec
from bitport.simulate import Run
from bitport.steps import _base as steps

from . import subjects
from .nets import WideNet, seeded
from .table import Row

Case = tuple[nn.Module, list[Tensor], dict[str, Any], tuple[Override, ...]]
NARROW = {"format": "int4", "granularity": "group", "group": 32, "symmetric": False}
FLOAT = {"format": "float32"}
METHODS: dict[str, dict[str, Any]] = {
    "correct_bias": {},
    "gptq": {},
    "reconstruct": {"narrow": False, "steps": 20},  # more steps need no more memory
    "self_distil": {},
}
IN_BLOCKS = "in activations of its largest block"


def gpt() -> Case:
    """3 million parameters, 64 texts of 128 bytes, 4 bits in groups of 32."""
    data = list(torch.split(subjects.windows(64, 3, test=False), 8))
    options = {"weights": NARROW, "activations": FLOAT}
    torch.manual_seed(0)
    return subjects.ByteGpt().eval(), data, options, (Override(op="embedding", weights=FLOAT),)


def convs() -> Case:
    """Eight convolutions of 64 channels, 128 images of 32×32, 4 bits."""
    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(32, 3, 32, 32, generator=generator) for _ in range(4)]
    return (
        seeded(lambda: WideNet(64)),
        data,
        {"weights": {"format": "int4"}, "activations": {"format": "int8"}},
        (),
    )


CASES: dict[str, tuple[str, Callable[[], Case]]] = {
    "gpt": ("GPT, 3 M parameters, W4 in groups of 32", gpt),
    "convs": ("8 convolutions of 64 channels, 128 images of 32×32, W4A8", convs),
}
LIMITS = {("gpt", "balanced"): "≤ 20 s", ("convs", "balanced"): "≤ 30 s"}


def rows() -> list[Row]:
    """Seconds of a solved layer, of `fast` and `balanced`; peak memory of the methods of `best`."""
    made = [Row("GPTQ of a Linear 1024×1024 from its Hessian, int4", f"{_solving():.2f} s", "≤ 1.5 s")]
    for name, (what, _) in CASES.items():
        total, passes = (float(part) for part in _apart("fast", name))
        told = f"{total - passes:.1f} s (all of it {total:.1f} s)"
        made.append(Row(f"`fast` beyond its passes of the data: {what}", told, "≤ 1 s"))
        total, _ = (float(part) for part in _apart("balanced", name))
        made.append(Row(f"`balanced`: {what}", f"{total:.1f} s", LIMITS[name, "balanced"]))
        for step in METHODS:
            peak, model, block = (int(part) / 2**20 for part in _apart("memory", name, step))
            beyond = f"{max(0.0, peak - model) / block:.2f}×"
            told = f"{beyond} ({peak:.0f} MiB; the network {model:.0f}, the block {block:.0f})"
            made.append(Row(f"peak memory of `{step}` beyond the network, {IN_BLOCKS}: {what}", told, "≤ 3×"))
    return made


def _apart(*words: str) -> list[str]:
    """What a process of its own answers."""
    command = [sys.executable, "-m", "bench.methods", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def _solving() -> float:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(1024, 1024, generator=generator)
    x = torch.randn(4096, 1024, generator=generator).double()
    hessian = damped((x.T @ x / len(x))[None], 0.01)
    assert hessian is not None
    fmt = Format.parse("int4 symmetric channel(0)")
    plain = fit(weight, fmt)
    grid = Grid(fmt, by_rows(plain.scale, (1, 1024, 1)), by_rows(plain.zero_point, (1, 1024, 1)), None)
    rounded = decode(encode(weight, plain), plain)[None]
    started = time.perf_counter()
    solve(weight[None].double(), hessian, rounded, grid)
    return time.perf_counter() - started


def _prepared(case: Case) -> tuple[Graph, steps.Context, dict[str, Any]]:
    model, data, options, overrides = case
    graph = api.load(model, data[0][:2])
    runtime = make_target("onnxruntime")
    source = Source(data, role="calibration", names=[spec.name for spec in graph.inputs], labels="ignored")
    return (
        graph,
        steps.Context(runtime.rules(), runtime.arithmetic(), source, graph, overrides=overrides),
        options,
    )


def _taken(
    work: Graph, context: steps.Context, options: dict[str, Any], uses: list[str]
) -> tuple[Graph, Plan]:
    plan = Plan.empty("onnxruntime")
    for use in uses:
        work, plan = steps.make(use, options if use == "quantize" else {})(work, plan, context)
    return work, plan


@contextmanager
def _passes() -> Iterator[list[float]]:
    """A list whose one number is what running operators took, of float and of simulated networks."""
    spent = [0.0]

    def timed(work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return work(*given, **named)
            finally:
                spent[0] += time.perf_counter() - started

        return run

    with patch.object(Graph, "run", timed(Graph.run)), patch.object(Run, "compute", timed(Run.compute)):
        yield spent


def _print_seconds(effort: str, name: str) -> None:
    graph, context, options = _prepared(CASES[name][1]())
    recipe = Recipe(steps=(StepSpec("quantize", options),), name="bench").expand(effort)
    work = graph.clone()
    started = time.perf_counter()
    with _passes() as spent:
        _taken(work, context, options, [spec.use for spec in recipe.steps])
    sys.stdout.write(f"{time.perf_counter() - started} {spent[0]}\n")  # the answer to the parent process


def _print_memory(name: str, step: str) -> None:
    """Peak bytes of a step above the level before it, bytes of the network, of its largest block's activations."""
    graph, context, options = _prepared(CASES[name][1]())
    work, plan = _taken(graph.clone(), context, options, ["fold", "quantize", "calibrate"])
    model = sum(tensor.numel() * tensor.element_size() for tensor in work.gm.parameters())
    block = max(_bytes_by_block(work, [tuple(batch.inputs) for batch in context.calibration]).values())
    gc.collect()
    with peak_memory() as peak:
        steps.make(step, METHODS[step])(work, plan, context)
    sys.stdout.write(f"{peak.bytes} {model} {block}\n")


def _bytes_by_block(graph: Graph, batches: list[tuple[Tensor, ...]]) -> dict[str, int]:
    """What a block's operators give, over all samples."""
    home = {
        node.meta.get("bitport_name"): block.name
        for block in graph.blocks()
        for node in block.graph_module.graph.nodes
    }
    found = dict.fromkeys(home.values(), 0)

    def look(node: fx.Node, value: Any) -> None:
        block = home.get(graph.name(node))
        if block is not None and isinstance(value, Tensor):
            found[block] += value.numel() * value.element_size()

    with torch.no_grad():
        for inputs in batches:
            graph.run(*inputs, on_value=look)
    return found


def main() -> None:
    torch.set_num_threads(1)
    if len(sys.argv) == 1:
        for row in rows():
            sys.stdout.write(f"{row.what}: {row.value}, wanted {row.wanted}\n")
    elif sys.argv[1] == "memory":
        _print_memory(*sys.argv[2:])
    else:
        _print_seconds(*sys.argv[1:])


if __name__ == "__main__":
    main()
