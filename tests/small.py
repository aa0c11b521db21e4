"""Tiny networks and data for whole journeys, and a way to make their proof cheap.

`quick` shortens the timing, for tests that are not about it.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bitport
from bitport import api
from bitport.numerics.error import ErrorStats
from bitport.proof import cost, memory

SOURCE = Path(bitport.__file__).parents[1]
CLASSES = 3


class Tiny(nn.Module):
    """Convolution, BatchNorm, a residual, pooling, Linear: 1×8×8 images, 3 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(self.body(x) + x)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class TwoInputs(nn.Module):
    """Two inputs, a dict of two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(6, 12)
        self.right = nn.Linear(4, 12)
        self.head = nn.Linear(12, CLASSES)
        self.value = nn.Linear(12, 1)

    def forward(self, x: Tensor, z: Tensor) -> dict[str, Tensor]:
        hidden = F.relu(self.left(x)) + F.relu(self.right(z))
        return {"scores": self.head(hidden), "value": self.value(hidden)}


def patterns(count: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Noisy images of three patterns [N, 1, 8, 8], and which one each is [N]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    kinds = torch.stack([rows % 2, columns % 2, (rows + columns) % 2]).float()
    images = kinds[labels] + 0.2 * torch.randn(count, 8, 8, generator=generator)
    return images[:, None], labels


@functools.cache
def _trained() -> Mapping[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Tiny()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        x, y = patterns(96)
        for _ in range(40):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval().state_dict()


def tiny() -> Tiny:
    """A trained `Tiny` in eval mode; a new one each time."""
    model = Tiny()
    model.load_state_dict(_trained())
    return model.eval()


def two_inputs() -> TwoInputs:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return TwoInputs().eval()


def calibration() -> list[Tensor]:
    return list(patterns(32)[0].split(16))


def evaluation(count: int = 64) -> list[tuple[Tensor, Tensor]]:
    x, y = patterns(count, seed=2)
    return list(zip(x.split(32), y.split(32), strict=True))


def pairs(count: int = 32, seed: int = 5) -> list[bitport.Batch]:
    """Unlabelled batches for `TwoInputs`."""
    generator = torch.Generator().manual_seed(seed)
    return [
        bitport.Batch(
            {"x": torch.randn(16, 6, generator=generator), "z": torch.randn(16, 4, generator=generator)}
        )
        for _ in range(count // 16)
    ]


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time for 30 ms only."""
    monkeypatch.setattr(cost, "latency", functools.partial(cost.latency, seconds=0.03, rounds=8))


@contextmanager
def with_memory() -> Iterator[None]:
    """Measure what memory artifacts take, in processes of their own, as users have it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cost, "run_memory", memory.run_memory)
        yield


def without_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no report, for tests that are about files, numbers or faults."""
    monkeypatch.setattr(api, "render", lambda folder: (folder / "report.html").write_text("<!doctype html>"))


def python(
    code: str, *arguments: object, cwd: Path | None = None, seconds: float = 120, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, warnings off as a user has them."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=process_environment(**environment),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def process_environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(SOURCE), str(SOURCE.parent)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, whole."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def compressed(out: Path, target: str = "null", **options: Any) -> bitport.Artifact:
    """`Tiny`, compressed with defaults."""
    graph = bitport.load(tiny(), patterns(1)[0])
    given: dict[str, Any] = {"data": calibration(), "evaluation": evaluation(), **options}
    return bitport.compress(graph, given.pop("recipe", "int8"), target=target, out=out, **given)


def decibels(net: nn.Module, found: object, x: Tensor) -> float:
    """Signal against noise of a network's outputs, all batches as one."""
    assert isinstance(found, Tensor)
    stats = ErrorStats()
    with torch.no_grad():
        stats.update(net(x), found)
    return stats.sqnr_db


def assert_same_bytes(make: Callable[[Path], object], place: Path) -> None:
    """What decides a result is the same to the byte when it is made twice."""
    for name in ("a", "b"):
        make(place / name)
    first, second = (content(place / name) for name in ("a", "b"))
    for file in ("plan.json", "graph.pt2", "statistics.safetensors", "recipe.toml"):
        assert first[file] == second[file], file


def assert_read_back(artifact: bitport.Artifact, data: Sequence[Tensor]) -> None:
    """Verified, an artifact shows what its proof has."""
    again, record = bitport.verify(artifact.path, data), artifact.measurements
    for part in ("layers", "parity", "distributions"):
        assert again[part] == record[part], part
