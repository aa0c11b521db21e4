"""The whole way of a network whose scales were moved: its artifact, its proof, and what can be made of it later."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests import small
from tests.flow import images
from tests.spread import Separable, rescale

import bitport
from bitport import Recipe
from bitport.checkpoint import Checkpoint, State
from bitport.recipe.model import StepSpec

WEIGHTS = {"weights": {"granularity": "tensor"}}
STEPS = (StepSpec("fold"), StepSpec("quantize", WEIGHTS), StepSpec("calibrate"))
RECIPE = Recipe((*STEPS, StepSpec("equalize"), StepSpec("correct_bias")), name="equalized")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    small.quick(monkeypatch)
    small.without_page(monkeypatch)


def network() -> Separable:
    torch.manual_seed(0)
    return rescale(Separable()).eval()


def data() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [images(16) for _ in range(4)]


def compressed(out: Path, target: str = "null", recipe: Recipe = RECIPE) -> bitport.Artifact:
    graph = bitport.load(network(), images(2))
    return bitport.compress(graph, recipe, target=target, data=data(), metric="mse", effort="plain", out=out)


def decibels(found: object, x: torch.Tensor) -> float:
    return small.decibels(network(), found, x)


@pytest.mark.parametrize("target", ["null", "onnxruntime"])
def test_the_proof_looks_at_the_tensors_that_were_rounded(tmp_path: Path, target: str) -> None:
    artifact = compressed(tmp_path / "out", target)
    record = artifact.measurements
    assert sorted(artifact.plan.rescaled) == ["dw1", "dw2", "pw1", "pw2", "stem"]
    assert record["verdict"]["passed"] and record["parity.exact_share"] == 1
    for row in record["layers"]:
        assert row["sqnr_db"] is None or row["sqnr_db"] > 20, row
    for row in record["distributions"]:
        assert row["clipped_share"] < 0.05, row
        if row["what"] == "weights":
            assert row["clipped_share"] == 0, row
    # plain rounding is that of the original weights, which the moved scales leave far behind
    assert record["plain.sqnr_db"] > record["plain.plain_sqnr_db"] + 10
    # read back, the same is found: the scales are in the plan
    small.assert_read_back(artifact, data())
    x = images(16)
    found = artifact.predict(x)
    assert decibels(found, x) > 30


def test_without_the_step_it_is_far_from_there(tmp_path: Path) -> None:
    x, plain = images(16), Recipe((*STEPS, StepSpec("correct_bias")), name="plain")
    found = compressed(tmp_path / "out", recipe=plain).predict(x)
    assert decibels(found, x) < 25


def test_floats_are_made_of_it_again_with_its_own_statistics(tmp_path: Path) -> None:
    compressed(tmp_path / "out")
    x = images(16)
    rough, corrected = (
        bitport.dequantize(tmp_path / "out", data() if correct else None, correct=correct)
        for correct in (False, True)
    )
    with torch.no_grad():
        for graph in (rough, corrected):
            assert decibels(graph.run(x)[0], x) > 30


@pytest.mark.slow
def test_it_can_be_stored_in_another_format(tmp_path: Path) -> None:
    compressed(tmp_path / "out")
    made = bitport.requantize(tmp_path / "out", "w4a8", data=data(), out=tmp_path / "four", metric="mse")
    assert not made.plan.rescaled, "its scales are part of the weights by now"
    x = images(16)
    found = made.predict(x)
    assert decibels(found, x) > 20


def test_the_same_call_gives_the_same_bytes(tmp_path: Path) -> None:
    small.assert_same_bytes(compressed, tmp_path)


def test_a_checkpoint_keeps_the_scales(tmp_path: Path) -> None:
    artifact = compressed(tmp_path / "out")
    checkpoint = Checkpoint(tmp_path / "later", dict)
    checkpoint.save(State(4, artifact.graph, artifact.plan, (), {}))
    found = checkpoint.resume()
    assert found is not None and found.plan.rescaled.keys() == artifact.plan.rescaled.keys()
    for name, scales in artifact.plan.rescaled.items():
        assert torch.equal(found.plan.rescaled[name], scales)


def test_in_front_of_quantize_it_does_nothing_and_plain_rounding_is_still_compared(tmp_path: Path) -> None:
    early = Recipe((STEPS[0], StepSpec("equalize"), *STEPS[1:]), name="early")
    artifact = compressed(tmp_path / "out", recipe=early)
    assert artifact.measurements["tried"][0]["reason"] == "nothing is quantized"
    assert artifact.measurements["plain"] is not None and not artifact.plan.rescaled
