"""What each effort keeps: `python -m bench.efforts [--gpt] [--write docs/efforts.md]`.

Networks of `bench.subjects` on ONNX Runtime, 10,000 generated test images (or 96 stretches of text), against plain
rounding of the same formats. Accuracy comes from the runtime's own outputs; intervals are paired, 95 %.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitport import api
from bitport.artifact import make_target
from bitport.data import Source
from bitport.graph import Graph
from bitport.numerics.intervals import paired_binary
from bitport.plan import Plan
from bitport.plan.constants import on_grid
from bitport.recipe import Override, Recipe, StepSpec
from bitport.steps import _base as steps
from bitport.targets._base import host

from . import subjects
from .table import publish

EFFORTS = ("plain", "fast", "balanced", "best")  # plain: ranges by min-max as well
TESTED, CALIBRATED = 10_000, 256
Options = Mapping[str, Any]
FLOAT: Options = {"format": "float32"}


def _weights(bits: int, **more: Any) -> Options:
    return {"format": f"int{bits}", "granularity": "channel", "range": "mse", **more}


IMAGES: dict[str, tuple[Options, Options]] = {
    "W8A8 per tensor": ({"format": "int8", "granularity": "tensor"}, {"range": "mse"}),
    "W4A8": (_weights(4), {"range": "mse"}),
    "W4A4": (_weights(4), {"format": "int4", "range": "mse"}),
    "W2A8": (_weights(2), {"range": "mse"}),
}
GROUPS: dict[str, tuple[Options, Options]] = {
    f"W{bits}, groups of 32": (
        {"format": f"int{bits}", "granularity": "group", "group": 32, "symmetric": False}, FLOAT
    )
    for bits in (4, 3, 2)
}  # fmt: skip


def outputs(
    graph: Graph,
    chosen: tuple[Options, Options],
    effort: str,
    data: Sequence[Tensor],
    test: Tensor,
    overrides: Sequence[Override] = (),
) -> tuple[Tensor, float, list[dict[str, str]]]:
    """(the runtime's outputs, seconds that the steps took, what they tried)."""
    weights, activations = chosen
    if effort == "plain":
        weights, activations = {**weights, "range": "minmax"}, {**activations, "range": "minmax"}
    step = StepSpec("quantize", {"weights": weights, "activations": activations})
    recipe = Recipe(steps=(step,), name="bench")
    uses = [spec.use for spec in recipe.expand(effort).steps]
    runtime = make_target("onnxruntime")
    source = Source(
        list(data), role="calibration", names=[spec.name for spec in graph.inputs], labels="ignored"
    )
    context = steps.Context(runtime.rules(), runtime.arithmetic(), source, graph, overrides=tuple(overrides))
    work, plan = graph.clone(), Plan.empty(runtime.name)
    started = time.perf_counter()
    for use in uses:
        work, plan = steps.make(use, step.options if use == "quantize" else {})(work, plan, context)
    seconds = time.perf_counter() - started
    on_grid(work, plan)
    with tempfile.TemporaryDirectory() as scratch:
        runtime.export(work, plan, Path(scratch))
        session = runtime.open(Path(scratch))
        found = torch.cat([session.run((part,))[0] for part in torch.split(test, 250)])
    return found, seconds, context.tried


def of_images(name: str, model: nn.Module, cells: Sequence[str]) -> list[list[str]]:
    """Rows of one network: a cell, then loss in points for each effort."""
    images, _ = subjects.digits(CALIBRATED, 9, test=False)
    test, labels = subjects.digits(TESTED, 2, test=True)
    graph = api.load(model, images[:2])
    with torch.no_grad():
        right = torch.cat([graph.run(part)[0] for part in torch.split(test, 250)]).argmax(1) == labels
    rows = []
    for cell in cells:
        row = [name, f"{100 * right.float().mean():.2f} %", cell]
        for effort in EFFORTS:
            found, seconds, _ = outputs(graph, IMAGES[cell], effort, torch.split(images, 32), test)
            interval = paired_binary(right.float(), (found.argmax(1) == labels).float())
            loss = f"{100 * interval.drop:.2f} ({100 * interval.low:.2f} … {100 * interval.high:.2f})"
            row.append(f"{loss}, {seconds:.1f} s")
        rows.append(row)
        sys.stderr.write(" | ".join(row) + "\n")
    return rows


def of_text(model: nn.Module) -> list[list[str]]:
    """Rows of the GPT: bits per byte, and what is lost of them in percent."""
    data = torch.split(subjects.windows(64, 3, test=False), 8)
    stretches = subjects.windows(96, 4, test=True, length=subjects.CONTEXT + 1)
    graph = api.load(model, data[0][:2])

    def bits(scores: Tensor) -> float:
        found = F.cross_entropy(scores.flatten(0, 1), stretches[:, 1:].flatten())
        return float(found) / math.log(2)

    with torch.no_grad():
        before = bits(torch.cat([graph.run(part)[0] for part in torch.split(stretches[:, :-1], 16)]))
    rows = []
    for cell, chosen in GROUPS.items():
        row = ["byte GPT", f"{before:.4f} bits a byte", cell]
        for effort in EFFORTS:
            found, seconds, _ = outputs(graph, chosen, effort, data, stretches[:, :-1].contiguous())
            row.append(f"{100 * (bits(found) / before - 1):.2f} %, {seconds:.1f} s")
        rows.append(row)
        sys.stderr.write(" | ".join(row) + "\n")
    return rows


def page(rows: Sequence[Sequence[str]]) -> str:
    info = host()
    lines = [
        "# What each effort keeps",
        "",
        f"Made by `make efforts`. {info['cpu']}, one thread. Networks and data: `bench/subjects.py`; images are",
        f"judged by {TESTED:,} generated test samples, calibrated on {CALIBRATED}, all on ONNX Runtime. Loss against",
        "float in points (95 % interval, paired; below 0: better), or in percent of the bits; seconds are the steps'.",
        "*Plain* rounds to nearest with ranges by min-max, everything else alike. The twin is the thin network with",
        "channels up to 100 times apart, the same float function.",
        "",
        f"| network | float | format | {' | '.join(EFFORTS)} |",
        f"|---|---|---|{'---|' * len(EFFORTS)}",
    ]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="also write the table to this file")
    parser.add_argument("--gpt", type=int, default=300, help="steps that the GPT is trained; 0 leaves it out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    made: list[tuple[str, Callable[[], nn.Module], Sequence[str]]] = [
        (
            "thin residual CNN",
            lambda: subjects.trained(subjects.ThinNet, 0, rate=3e-3, epochs=8),
            list(IMAGES)[1:],
        ),
        (
            "its rescaled twin",
            lambda: subjects.rescaled(subjects.trained(subjects.ThinNet, 0, rate=3e-3, epochs=8)),
            ["W8A8 per tensor", "W4A4", "W2A8"],
        ),
        (
            "depthwise + SE",
            lambda: subjects.trained(subjects.MobileNet, 0, rate=3e-3, epochs=8),
            list(IMAGES)[1:],
        ),
        (
            "vision transformer",
            lambda: subjects.trained(subjects.VisionTransformer, 0, rate=1.5e-3, epochs=14),
            list(IMAGES)[1:],
        ),
    ]
    rows = [row for name, make, cells in made for row in of_images(name, make(), cells)]
    if arguments.gpt:
        rows += of_text(subjects.trained_gpt(0, arguments.gpt))
    publish(page(rows), arguments.write)


if __name__ == "__main__":
    main()
