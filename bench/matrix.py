"""Every front end on every runtime: `make matrix` writes docs/matrix.md.

A convolutional network, a depthwise one and a transformer come in through each front end and go to each target as
float, static int8, dynamic int8 and 4-bit weights. Untrained, their statistics of batch normalisation measured: a
conversion is right or wrong whatever a network has learned. What fails is shown as that.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn

from bitport import api
from bitport.errors import BitportError, first_line
from bitport.graph import Graph
from bitport.proof import cost
from bitport.targets._base import host

from . import subjects

SHAPE = (1, 16, 16)
RECIPES = ("float", "int8", "int8-dynamic", "int4-weights")
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "cnn": subjects.ThinNet,
    "depthwise": subjects.MobileNet,
    "transformer": subjects.VisionTransformer,
}
TARGETS = ("onnxruntime", "litert", "executorch", "openvino")
COLUMNS = ("agreement", "equal", "integer MACs", "size", "speed")
CALIBRATED_ON, JUDGED_ON, BATCH = 64, 256, 32
SECONDS = 1.0  # that a speed is measured for; tiny networks need few
HEADING = "| network | front end | target | recipe | " + " | ".join(COLUMNS) + " |"


@dataclass(frozen=True)
class Cell:
    network: str
    front_end: str
    target: str
    recipe: str


@dataclass(frozen=True)
class Outcome:
    """What one cell came to.

    Attributes:
        told: the columns that are the same wherever the same versions run.
        speed: float time ÷ compressed time, as text.
        failed: why there is no artifact.
    """

    told: tuple[str, ...] = ()
    speed: str = ""
    failed: str = ""


# ------------------------------------------------------------------------------------------- front ends


def _warmed(make: Callable[[], nn.Module]) -> nn.Module:
    """In eval mode, its statistics those of the data: untrained ones make narrow formats a lottery."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().train()
        with torch.no_grad():
            for _ in range(20):
                model(images(BATCH, 3))
    return model.eval()


def images(count: int, seed: int) -> Tensor:
    return subjects.digits(count, seed, test=False)[0]


def from_pytorch(network: str, folder: Path) -> Graph:
    return api.load(_warmed(NETWORKS[network]), images(2, 1))


def from_onnx(network: str, folder: Path) -> Graph:
    """As PyTorch's exporter writes it, opset 18."""
    path = folder / "net.onnx"
    batch = {0: torch.export.Dim("batch")}
    model, example = _warmed(NETWORKS[network]), images(2, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's are about itself
        program = torch.onnx.export(model, (example,), dynamo=True, dynamic_shapes=(batch,), verbose=False)
    assert program is not None
    program.save(path)
    return api.load(path)


def from_keras(network: str, folder: Path) -> Graph:
    return api.load(_saved(network, folder / "net.keras", "torch"))


def from_tensorflow(network: str, folder: Path) -> Graph:
    """As Keras exports it from TensorFlow."""
    return api.load(_saved(network, folder / "net", "tensorflow"))


def _saved(network: str, place: Path, backend: str) -> Path:
    command = [sys.executable, "-m", "bench.keras_nets", network, str(place)]
    quiet = {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, env={**os.environ, **quiet}, capture_output=True, check=True)
    return place


FRONT_ENDS: dict[str, Callable[[str, Path], Graph]] = {
    "pytorch": from_pytorch,
    "onnx": from_onnx,
    "keras": from_keras,
    "tensorflow": from_tensorflow,
}
LARGE = ("tensorflow",)  # what tests do without


# ------------------------------------------------------------------------------------------- cells


def cells() -> list[Cell]:
    return [
        Cell(network, front_end, target, recipe)
        for network in NETWORKS
        for front_end in FRONT_ENDS
        for target in TARGETS
        for recipe in RECIPES
    ]


def diagonal() -> list[Cell]:
    """A dozen cells: four of each network, in which no other two parts stay in step."""
    networks = tuple(NETWORKS)
    front_ends = [name for name in FRONT_ENDS if name not in LARGE]
    found = []
    for index in range(12):
        turn = index // 4
        parts = (
            networks[turn],
            front_ends[index % len(front_ends)],
            TARGETS[(index + turn) % len(TARGETS)],
            RECIPES[(index + 2 * turn + 3) % len(RECIPES)],
        )
        found.append(Cell(*parts))
    return found


@functools.cache
def loaded(network: str, front_end: str) -> Graph | str:
    """The graph, or why there is none."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            return FRONT_ENDS[front_end](network, Path(scratch))
        except BitportError as error:
            return first_line(error)


def outcome(cell: Cell, folder: Path) -> Outcome:
    """One artifact, measured. folder: where it goes."""
    graph = loaded(cell.network, cell.front_end)
    if isinstance(graph, str):
        return Outcome(failed=graph)
    calibration = list(torch.split(images(CALIBRATED_ON, 1), BATCH))
    judged = list(torch.split(images(JUDGED_ON, 2), BATCH))
    name = graph.inputs[0].name
    transposed = tuple(graph.inputs[0].shape[1:]) == (*SHAPE[1:], SHAPE[0])

    def fed(batches: Iterable[Tensor]) -> list[dict[str, Tensor]]:
        return [{name: x.permute(0, 2, 3, 1).contiguous() if transposed else x} for x in batches]

    try:
        record = api.compress(
            graph,
            cell.recipe,
            target=cell.target,
            data=fed(calibration),
            evaluation=fed(judged),
            effort="plain",
            out=folder,
        ).measurements
    except BitportError as error:
        return Outcome(failed=first_line(error))
    agreement = record["parity.top1_agreement"]
    told = (
        # nothing is simulated of a float network: it is its own simulator
        _percent(record["task.runtime"] if agreement is None else agreement),
        _percent(record["parity.exact_share"]) if record["parity.edges"] else "no integers",
        _percent(record["integer.mac_share"]),
        f"{record['size.ratio']:.2f}×",
    )
    return Outcome(told, f"{record['latency.speedup']:.1f}×")


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def outcomes(wanted: Sequence[Cell]) -> dict[Cell, Outcome]:
    """Cell after cell."""
    found: dict[Cell, Outcome] = {}
    briefly = functools.partial(cost.latency, seconds=SECONDS)
    with tempfile.TemporaryDirectory() as scratch, patch.object(cost, "latency", briefly):
        for index, cell in enumerate(wanted):
            found[cell] = outcome(cell, Path(scratch) / str(index))
            sys.stderr.write(f"{index + 1}/{len(wanted)} {line(cell, found[cell])}\n")
    return found


# ------------------------------------------------------------------------------------------- the page


def line(cell: Cell, found: Outcome) -> str:
    names = f"| {cell.network} | {cell.front_end} | {cell.target} | {cell.recipe} | "
    if found.failed:
        return f"{names}not there: {found.failed.replace('|', '/')} |" + " |" * (len(COLUMNS) - 1)
    return f"{names}{' | '.join(found.told)} | {found.speed} |"


def page(found: dict[Cell, Outcome]) -> str:
    info = host()
    arrived = sum(not each.failed for each in found.values())
    told = [
        "# Every pair",
        "",
        f"Made by `make matrix`. {info['cpu']}, {', '.join(info['isa'])}; one thread, batch 1 for speed.",
        "",
        *__doc__.strip().splitlines()[2:],
        "",
        f"*agreement*: top-1 of the runtime's file and of the exact simulator, {JUDGED_ON} images. *equal*: integers",
        "of all tensors that are the simulator's. *integer MACs*: their share. *size*: of the files, against float's.",
        "*speed*: float's time by this one's; these networks are tiny (at most 0.2 million parameters), see",
        "[benchmarks](benchmarks.md) for larger ones.",
        "",
        f"{arrived} of {len(found)} arrive.",
        "",
        HEADING,
        "|" + "---|" * (4 + len(COLUMNS)),
        *(line(cell, each) for cell, each in found.items()),
    ]
    return "\n".join(told) + "\n"


def read(text: str) -> dict[Cell, str]:
    """The lines of a page by cell, without the speed."""
    found = {}
    for row in text.splitlines():
        parts = [part.strip() for part in row.strip("|").split("|")]
        if len(parts) == 4 + len(COLUMNS) and parts[0] in NETWORKS:
            found[Cell(*parts[:4])] = without_speed(row)
    return found


def without_speed(row: str) -> str:
    return re.sub(r"[^|]*\|$", " |", row)


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="also write the page here")
    parser.add_argument("--diagonal", action="store_true", help="only the cells that every change is held to")
    parser.add_argument("--only", default="", help="words that a cell's names must all be among, with commas")
    arguments = parser.parse_args()
    wanted = diagonal() if arguments.diagonal else cells()
    for word in filter(None, arguments.only.split(",")):
        wanted = [cell for cell in wanted if word in (cell.network, cell.front_end, cell.target, cell.recipe)]
    text = page(outcomes(wanted))
    sys.stdout.write(text)
    if arguments.write is not None:
        arguments.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
