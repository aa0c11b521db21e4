"""What is asked of each runtime alike: a plan of another one runs on it, and its absence is told before any work."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.flow import Net, conv, images
from torch import Tensor, nn
from torch.nn import functional as F

import bitport
from bitport.artifact import make_target
from bitport.errors import MissingDependency
from bitport.plan import Plan

PACKAGES = {"openvino": "openvino", "litert": "ai_edge_litert", "executorch": "executorch"}


def digits() -> nn.Module:
    return Net(
        lambda m, x: m.c(F.adaptive_avg_pool2d(F.relu(m.b(F.relu(m.a(x)))), 1).flatten(1)),
        a=conv(), b=conv(8, 16), c=nn.Linear(16, 4),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("made", "other", "exact"),
    [
        ("onnxruntime", "litert", 1.0),
        pytest.param("onnxruntime", "openvino", 0.999, marks=pytest.mark.slow),
        pytest.param("openvino", "onnxruntime", 1.0, marks=pytest.mark.slow),
        pytest.param("litert", "onnxruntime", 1.0, marks=pytest.mark.slow),
        pytest.param("onnxruntime", "executorch", 1.0, marks=pytest.mark.slow),
        pytest.param("executorch", "onnxruntime", 1.0, marks=pytest.mark.slow),
    ],
)
def test_the_same_plan_on_the_other_runtime(made: str, other: str, exact: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    graph, data = bitport.load(digits(), images(4)), [images(16) for _ in range(2)]
    artifact = bitport.compress(graph, "int8", target=made, data=data, out=tmp_path / "out", effort="plain")
    record = bitport.verify(artifact.path, [images(16)], target=other)
    assert record["target"] == other
    # ONNX Runtime's last layer gives floats out of integers; those without such a kernel run it in float, and tell it
    left = [op["name"] for op in record["integer.float_ops"]]
    assert left == (["c"] if other in ("litert", "executorch") else [])
    assert record["parity.exact_share"] >= exact and record["parity.max_steps"] <= (exact < 1)


@pytest.mark.parametrize("target", PACKAGES)
def test_without_the_package(target: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    graph, package = bitport.load(digits(), images(2)), PACKAGES[target]
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    wanted = pytest.raises(MissingDependency, match=rf"pip install 'bitport\[{target}\]'")
    runtime = make_target(target)
    with wanted:
        runtime.export(graph, Plan.empty(target), tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / runtime.model_file).write_bytes(b"anything")
    with wanted:
        runtime.open(tmp_path)
    read: list[int] = []

    def data() -> Iterator[Tensor]:
        read.append(1)
        yield images(2)

    with wanted:
        bitport.compress(graph, "int8", target=target, data=data, out=tmp_path / "out")
    assert not read  # before any work
    assert bitport.targets()[target]["available"] is False
    assert f"bitport[{target}]" in bitport.targets()[target]["needs"]


def test_listing_targets_loads_none() -> None:
    code = f"import sys, bitport; bitport.targets(); print(sorted({set(PACKAGES.values())!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
