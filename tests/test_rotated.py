"""The whole way of a network whose residual stream was rotated: its artifact, its proof, and what can be made of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests import small
from tests.spread import Embedded, plant_loud

import bitport
from bitport import Recipe
from bitport.recipe.model import StepSpec

RECIPE = Recipe((StepSpec("quantize"), StepSpec("rotate")), name="rotated")
STREAM = "body.layers.0.norm1"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    small.quick(monkeypatch)
    small.without_page(monkeypatch)


def network() -> Embedded:
    torch.manual_seed(0)
    return plant_loud(Embedded()).eval()


def data(count: int = 4) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(16, 9, 8) for _ in range(count)]


def compressed(out: Path, target: str = "null") -> bitport.Artifact:
    graph = bitport.load(network(), data(1)[0][:2])
    return bitport.compress(graph, RECIPE, target=target, data=data(), metric="mse", effort="fast", out=out)


def decibels(found: object, x: torch.Tensor) -> float:
    return small.decibels(network(), found, x)


@pytest.mark.parametrize("target", [pytest.param("null", marks=pytest.mark.slow), "onnxruntime"])
def test_the_proof_looks_at_the_tensors_that_were_rounded(tmp_path: Path, target: str) -> None:
    artifact = compressed(tmp_path / "out", target)
    record = artifact.measurements
    assert list(artifact.plan.rotated) == [STREAM]
    assert record["verdict"]["passed"] and record["parity.exact_share"] == 1
    for row in record["layers"]:
        assert row["sqnr_db"] is None or row["sqnr_db"] > 12, row
    for row in record["distributions"]:
        assert row["clipped_share"] < 0.05, row
    # plain rounding is that of the network as it was loaded
    assert record["plain.sqnr_db"] > record["plain.plain_sqnr_db"] + 5
    # read back, the same is found: the rotation is in the plan
    small.assert_read_back(artifact, data())
    x = data(1)[0]
    found = artifact.predict(x)
    assert decibels(found, x) > 15


@pytest.mark.slow
def test_floats_and_other_formats_can_be_made_of_it(tmp_path: Path) -> None:
    compressed(tmp_path / "out")
    x = data(1)[0]
    with torch.no_grad():
        for correct in (False, True):
            graph = bitport.dequantize(tmp_path / "out", data() if correct else None, correct=correct)
            assert decibels(graph.run(x)[0], x) > 15
    made = bitport.requantize(tmp_path / "out", "int8", data=data(), out=tmp_path / "again", metric="mse")
    assert not made.plan.rotated, "it is part of the weights by now"


@pytest.mark.slow
def test_the_same_call_gives_the_same_bytes(tmp_path: Path) -> None:
    small.assert_same_bytes(compressed, tmp_path)
