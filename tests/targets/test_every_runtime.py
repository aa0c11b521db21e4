"""What is asked of each runtime alike: a plan of another one runs on it, and its absence is told before any work."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.flow import Net, conv, images, prepare, ship
from torch import Tensor, nn
from torch.nn import functional as F

import bitport
from bitport.artifact import make_target
from bitport.errors import ExportError, MissingDependency, TargetError
from bitport.plan import Plan
from bitport.plan.retarget import retargeted, saturating

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
    if any(
        "which 8-bit weights can exceed" in note for note in record["notes"]
    ):  # as on processors without VNNI
        assert made in ("litert", "executorch") and make_target(other).rules().weight_limit is not None
    else:
        assert record["parity.exact_share"] >= exact and record["parity.max_steps"] <= (exact < 1)


def residual() -> nn.Module:
    torch.manual_seed(0)
    return Net(
        lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))) + m.a(x))), a=conv(), b=conv(8, 8), c=conv(8, 4)
    )  # fmt: skip


@pytest.mark.parametrize(
    "other", ["onnxruntime", "litert", pytest.param("executorch", marks=pytest.mark.slow)]
)
def test_what_another_runtime_has_no_integers_for_is_computed_in_float(other: str) -> None:
    """OpenVINO adds what a convolution leaves in float; nobody else does."""
    first, runtime = prepare(residual(), [images(8)], "openvino"), make_target(other)
    plan = retargeted(first.plan, first.work, runtime.rules())
    left = {name for name, todo in plan.nodes.items() if todo.reason is not None}
    assert left - {"relu"} == {"b", "add", "relu#2", "c"}  # OpenVINO alone has a relu of its own
    assert "from integers to floats" in str(plan.node("b").reason)
    assert plan.node("add").reason == f"{other} takes integers alone, and the plan has operand 0 as floats"
    shipped = ship(replace(first, plan=plan, target=runtime), images(8))
    assert not shipped.inspection.missed
    # sums of floats in another order fall on the other side of a rounding now and then
    assert shipped.record["exact_share"] > 0.999 and shipped.record["max_steps"] <= 1


def test_weights_that_another_runtime_has_no_kernels_for_are_named() -> None:
    groups = {"format": "int4", "granularity": "group", "group": 32}
    for options, told in (
        (
            {"weights": groups, "activations": {"format": "float32"}},
            r"a: litert has no kernels for int4 .* group",
        ),
        (
            {"activations": {"dynamic": True}},
            "openvino can't run activations quantized while running",
        ),
    ):
        plan = prepare(digits(), [images(8)], **options)
        other = make_target("litert" if "litert" in told else "openvino")
        with pytest.raises(TargetError, match=f"{told}.*: compress the network for {other.name}"):
            retargeted(plan.plan, plan.work, other.rules())


@pytest.mark.parametrize("other", ["litert", "openvino", "executorch"])
@pytest.mark.parametrize("layers", ["int8", "int16"])
def test_activations_that_another_runtime_does_not_hold_are_named(other: str, layers: str) -> None:
    """They came out as numbers without a meaning (-40 dB), or as a file that was said to be damaged."""
    sixteen = {"format": layers, "elsewhere": "int16"}
    plan = prepare(residual(), [images(8)], activations=sixteen)
    told = rf"\w+: {other} has no integer kernels for int16 .*: compress the network for {other}"
    with pytest.raises(TargetError, match=told):
        retargeted(plan.plan, plan.work, make_target(other).rules())


def test_weights_too_wide_for_this_processor_are_named() -> None:
    first = prepare(digits(), [images(8)], "litert")
    assert saturating(first.plan, first.target.rules()) == []
    narrow = replace(make_target("onnxruntime").rules(), weight_limit=63)
    assert saturating(first.plan, narrow) == ["a", "b", "c"]
    assert saturating(first.plan, replace(narrow, weight_limit=127)) == []


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


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "executorch"])
def test_an_average_pool_with_a_divisor_of_its_own(target: str, tmp_path: Path) -> None:
    net = Net(lambda m, x: F.avg_pool2d(m.a(x), 3, 2, 1, divisor_override=5), a=conv())
    prepared, x = prepare(net, [images(8)], target), images(2)
    prepared.target.export(prepared.graph, Plan.empty(target), tmp_path)
    (found,) = prepared.target.open(tmp_path).run((x,))
    torch.testing.assert_close(found, prepared.graph.run(x)[0].detach())


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "litert"])
def test_a_divisor_that_can_not_be_written_is_told(target: str, tmp_path: Path) -> None:
    net = Net(lambda m, x: F.avg_pool2d(m.a(x), 3, 2, ceil_mode=True, divisor_override=5), a=conv())
    prepared = prepare(net, [images(8)], target)
    with pytest.raises(ExportError, match="divisor"):
        prepared.target.export(prepared.graph, Plan.empty(target), tmp_path)
