"""Run all benchmarks and print one table: `python -m bench.run [--write docs/benchmarks.md]`.

Each figure is a ratio measured in one process, interleaved where it is a speed; machines drift.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from bitport import api
from bitport.artifact import make_target
from bitport.data import Source
from bitport.forecast import inspect
from bitport.graph import Graph
from bitport.plan import Plan
from bitport.proof.cost import peak_memory
from bitport.steps import _base as steps

from . import formats, methods
from .nets import ConvNet, Mlp, Pooled, WideNet, seeded
from .table import Row, publish, table

BATCHES, BATCH = 4, 8
RUNTIMES = ("onnxruntime", "litert", "executorch", "openvino")
SIZES: dict[type[nn.Module], int] = {ConvNet: 64, WideNet: 32, Pooled: 64}


def speed(make: type[nn.Module], size: int = 64, target: str = "onnxruntime") -> Row:
    """int8 against float on a runtime, batch 1, one thread."""
    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(BATCH, 3, size, size, generator=generator) for _ in range(2)]
    graph = api.load(seeded(make), data[0][:1])
    with tempfile.TemporaryDirectory() as scratch:
        artifact = api.compress(graph, "int8", target=target, data=data, out=Path(scratch) / "a")
        record = artifact.measurements
    low, high = record["latency.ci95"]
    value = f"{record['latency.speedup']:.2f}× ({low:.2f}–{high:.2f}), {record['latency.float_ms']:.2f} ms → "
    value += f"{record['latency.compressed_ms']:.2f} ms; file {record['size.ratio']:.2f}×"
    expected = inspect(graph, target)["speedup"]
    if expected is not None:
        value += f"; forecast {expected:.0f}×, off by {record['latency.speedup'] / expected - 1:+.0%}"
    what = f"int8 against float, {make.__name__}, 1×3×{size}×{size}, {target}"
    return Row(what, value, "≥ 2.5×" if make is ConvNet else "")


def calibration() -> list[Row]:
    """Time of the calibration steps in float passes, and their memory against one float pass."""
    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(BATCH, 3, 64, 64, generator=generator) for _ in range(BATCHES)]
    graph = api.load(seeded(WideNet), data[0])
    context = _context(graph, data)
    folded, plan = _prepared(graph, context)

    def float_pass() -> None:
        with torch.no_grad():
            for batch in data:
                folded.run(batch)

    def calibrate() -> None:
        steps.make("calibrate", {})(folded.clone(), plan, context)

    float_pass()
    calibrate()
    floats, steps_taken = [], []
    for _ in range(3):
        floats.append(_seconds(float_pass))
        steps_taken.append(_seconds(calibrate))
    ratio = sorted(a / b for a, b in zip(steps_taken, floats, strict=True))[1]
    seconds = f"{sorted(floats)[1]:.2f} s → {sorted(steps_taken)[1]:.2f} s"
    memory = {kind: _memory(kind) for kind in ("float", "calibrate")}
    return [
        Row("calibration in float passes over the data (WideNet)", f"{ratio:.2f} ({seconds})", "≤ 3"),
        Row(
            "peak memory of calibration against a float pass",
            f"{memory['calibrate'] / memory['float']:.2f}× "
            f"({memory['float'] / 2**20:.0f} MiB → {memory['calibrate'] / 2**20:.0f} MiB)",
            "≤ 2×",
        ),
    ]


def quantization() -> Row:
    """Peak memory of the step `quantize` beside the network, which is a copy already, in sizes of its largest layer."""
    largest = max(p.numel() * p.element_size() for p in seeded(Mlp).parameters())
    ratio = _memory("quantize") / largest
    return Row(
        "peak memory of quantizing a network beside it (Mlp, int8)", f"{ratio:.2f}× its largest layer", "≤ 2×"
    )


def _context(graph: Graph, data: list[torch.Tensor]) -> steps.Context:
    runtime = make_target("onnxruntime")
    source = Source(data, role="calibration", names=[spec.name for spec in graph.inputs], labels="ignored")
    return steps.Context(runtime.rules(), runtime.arithmetic(), source, graph)


def _prepared(graph: Graph, context: steps.Context) -> tuple[Graph, Plan]:
    folded, plan = graph.clone(), Plan.empty("onnxruntime")
    for step in ("fold", "quantize"):
        folded, plan = steps.make(step, {})(folded, plan, context)
    return folded, plan


def _seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _memory(kind: str) -> int:
    """Peak bytes above the level before the work, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.run", "--memory", kind], capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1])


def _print_memory(kind: str) -> None:
    if kind == "quantize":
        _print_memory_of_quantize()
        return
    data = [torch.randn(BATCH, 3, 64, 64) for _ in range(BATCHES)]
    graph = api.load(seeded(WideNet), data[0])
    context = _context(graph, data)
    folded, plan = _prepared(graph, context)
    with peak_memory() as peak, torch.no_grad():
        if kind == "float":
            for batch in data:
                folded.run(batch)
        else:
            steps.make("calibrate", {})(folded, plan, context)
    sys.stdout.write(f"{peak.bytes}\n")  # the answer to the parent process


def _print_memory_of_quantize() -> None:
    def made(model: nn.Module, width: int) -> tuple[Graph, Plan, steps.Context]:
        data = [torch.randn(BATCH, width)]
        graph = api.load(model, data[0])
        context = _context(graph, data)
        return *steps.make("fold", {})(graph, Plan.empty("onnxruntime"), context), context

    quantize = steps.make("quantize", {})
    quantize(*made(nn.Sequential(nn.Linear(8, 8)).eval(), 8))  # what only the first call loads
    large = made(seeded(Mlp), 1024)
    with peak_memory() as peak:
        quantize(*large)
    sys.stdout.write(f"{peak.bytes}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="also write the table to this file")
    parser.add_argument("--memory", choices=("float", "calibrate", "quantize"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        _print_memory(arguments.memory)
        return
    rows = [speed(make, size, target) for make, size in SIZES.items() for target in RUNTIMES]
    rows += calibration()
    rows += [*formats.speeds(), *formats.files(), *formats.weights(), quantization(), *methods.rows()]
    publish(table(rows), arguments.write)


if __name__ == "__main__":
    main()
