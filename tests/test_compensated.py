"""The whole way of a network with products beside its layers: artifact, proof, and what can be made of it later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests import small
from torch import nn

import bitport
from bitport import Recipe
from bitport.checkpoint import Checkpoint, State
from bitport.graph.beside import names_beside
from bitport.recipe.model import StepSpec

WEIGHTS = {"format": "int3", "granularity": "group", "group": 32, "symmetric": False}
QUANTIZE = StepSpec("quantize", {"weights": WEIGHTS, "activations": {"format": "float32"}})
PLAIN = (StepSpec("fold"), QUANTIZE, StepSpec("calibrate"))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    small.quick(monkeypatch)
    small.without_page(monkeypatch)


class Net(nn.Module):
    """A residual block of Linear layers behind a norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
        self.head = nn.Linear(64, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        found: torch.Tensor = self.head(x)
        return found


def network() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def inputs(count: int = 16, seed: int = 1) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(count, 6, 64) * torch.linspace(-2, 1, 64).exp()


def data() -> list[torch.Tensor]:
    return [inputs(16, seed) for seed in range(4)]


def compressed(out: Path, target: str = "null", *more: StepSpec, options: Any = None) -> bitport.Artifact:
    steps = (*PLAIN, *more, StepSpec("low_rank", options or {}))
    recipe = Recipe(steps, name="compensated", target={"accuracy_level": 0} if target != "null" else {})
    graph = bitport.load(network(), inputs(2))
    return bitport.compress(graph, recipe, target=target, data=data(), metric="mse", effort="plain", out=out)


def decibels(found: object) -> float:
    return small.decibels(network(), found, inputs(seed=9))


@pytest.mark.parametrize("target", [pytest.param("null", marks=pytest.mark.slow), "onnxruntime"])
def test_it_is_proved_and_read_back(tmp_path: Path, target: str) -> None:
    artifact = compressed(tmp_path / "out", target)
    record = artifact.measurements
    assert artifact.plan.low_rank == {"up": 8, "down": 8, "head": 8}
    assert record["verdict"]["passed"]
    assert record["plain.sqnr_db"] > record["plain.plain_sqnr_db"] + 1
    again = bitport.verify(tmp_path / "out", data())
    for key in ("layers", "parity", "distributions", "network"):
        assert again[key] == record[key], key
    golden = bitport.verify(tmp_path / "out")["golden"]
    assert golden["max_difference"] == 0
    assert decibels(artifact.predict(inputs(seed=9))) > record["plain.plain_sqnr_db"] + 1


def test_the_proof_counts_what_stands_beside(tmp_path: Path) -> None:
    record = compressed(tmp_path / "out").measurements
    positions = 6  # of one sample
    beside = positions * 8 * (64 + 128 + 128 + 64 + 64 + 48)
    assert record["integer.macs_total"] == record["model"]["macs"] + beside
    rows = {row["name"]: row for row in record["layers"]}
    assert rows["up_low_rank.down"]["compressed_bytes"] == 4 * 8 * 64
    islands = {row["name"]: row["reason"] for row in record["integer.float_ops"]}
    assert "makes up in float for what rounding took from 'down'" in islands["down_low_rank.sum"]


def test_a_layer_is_told_with_what_stands_beside_it(tmp_path: Path) -> None:
    plain = bitport.compress(
        bitport.load(network(), inputs(2)), Recipe(PLAIN), target="null", data=data(), metric="mse",
        effort="plain", out=tmp_path / "plain",
    )  # fmt: skip
    before = {row["name"]: row for row in plain.measurements["layers"]}
    after = {row["name"]: row for row in compressed(tmp_path / "out").measurements["layers"]}
    for name in ("up", "down", "head"):
        assert after[name]["sqnr_db"] > before[name]["sqnr_db"] + 1, name
    assert sum(after[name]["loss_share"] for name in ("up", "down", "head")) == pytest.approx(1)


@pytest.mark.slow
def test_steps_behind_it_still_compare_with_the_float_network(tmp_path: Path) -> None:
    recipe = Recipe((*PLAIN, StepSpec("low_rank"), StepSpec("correct_bias"), StepSpec("gptq")), name="behind")
    made = bitport.compress(
        bitport.load(network(), inputs(2)), recipe, target="null", data=data(), metric="mse", effort="plain",
        out=tmp_path / "out",
    )  # fmt: skip
    alone = compressed(tmp_path / "alone")
    assert made.measurements["plain.sqnr_db"] >= alone.measurements["plain.sqnr_db"] - 1
    assert decibels(made.predict(inputs(seed=9))) >= decibels(alone.predict(inputs(seed=9))) - 1


def test_behind_gptq_and_corrected_biases_it_adds_to_them(tmp_path: Path) -> None:
    others = (StepSpec("gptq"), StepSpec("correct_bias"))
    artifact = compressed(tmp_path / "out", "null", *others)
    (row,) = [row for row in artifact.measurements["tried"] if row["what"] == "low-rank compensation"]
    assert row["outcome"] == "kept", row


def test_the_same_call_gives_the_same_bytes(tmp_path: Path) -> None:
    small.assert_same_bytes(compressed, tmp_path)


def test_a_checkpoint_keeps_it(tmp_path: Path) -> None:
    artifact = compressed(tmp_path / "out")
    checkpoint = Checkpoint(tmp_path / "later", dict)
    checkpoint.save(State(4, artifact.graph, artifact.plan, (), {}))
    found = checkpoint.resume()
    assert found is not None and found.plan.low_rank == artifact.plan.low_rank
    assert found.graph.digest() == artifact.graph.digest()


@pytest.mark.slow
def test_floats_are_made_of_it_again(tmp_path: Path) -> None:
    artifact = compressed(tmp_path / "out")
    simulated = decibels(artifact.predict(inputs(seed=9)))
    for correct in (False, True):
        graph = bitport.dequantize(tmp_path / "out", data() if correct else None, correct=correct)
        with torch.no_grad():
            assert decibels(graph.run(inputs(seed=9))[0]) == pytest.approx(simulated, abs=0.5)


@pytest.mark.slow
def test_it_can_be_stored_in_another_format(tmp_path: Path) -> None:
    compressed(tmp_path / "out")
    made = bitport.requantize(
        tmp_path / "out", "int8-weights", data=data(), out=tmp_path / "eight", metric="mse"
    )
    assert not made.plan.low_rank, "the products are layers like others by now"
    assert made.graph.node(names_beside("up").up) is not None
    again = Recipe((*PLAIN, StepSpec("low_rank")), name="again")
    twice = bitport.requantize(
        tmp_path / "out", again, data=data(), out=tmp_path / "twice", metric="mse", effort="plain"
    )
    told = [row["reason"] for row in twice.measurements["tried"]]
    assert any("up and 2 more: something stands beside it already" in reason for reason in told), told


@pytest.mark.slow
def test_the_doctor_reads_it(tmp_path: Path) -> None:
    artifact = compressed(tmp_path / "out")
    found = bitport.diagnose(tmp_path / "out", data())
    assert {row["layer"] for row in found.record["culprits"]} <= {"up", "down", "head"}
    if found.recipe is not None:
        assert "low_rank" in [step.use for step in found.recipe.steps]
    assert artifact.plan.low_rank
