"""The journey load → compress → verify → report, on real (tiny) networks."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import small
from torch import Tensor, nn

import bitport
from bitport import Batch, GateFailed, Metric, Recipe, api
from bitport.errors import DataError, MetricError, RecipeError
from bitport.recipe import Override, StepSpec
from bitport.records import load as read_json


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    small.quick(monkeypatch)


def recipe(weights: str = "int8", activations: str = "int8", **more: Any) -> Recipe:
    options = {"weights": {"format": weights}, "activations": {"format": activations}}
    return Recipe(steps=(StepSpec("quantize", options),), name="mine", **more)


# --------------------------------------------------------------------------------------------- the journey


def test_the_whole_journey_on_onnx_runtime(tmp_path: Path) -> None:
    model = small.tiny()
    graph = bitport.load(model, torch.zeros(1, 1, 8, 8))  # a batch of one does not fix the batch
    out = tmp_path / "deep" / "out"
    artifact = bitport.compress(
        graph, "int8", target="onnxruntime", data=small.calibration(), evaluation=small.evaluation(), out=out,
        metric="top1", max_drop=0.2,
    )  # fmt: skip
    record = artifact.measurements
    assert artifact.path == out
    assert record["task.verdict"] == "holds"
    assert record["task.samples"] == 64
    assert record["task.float"] > 0.9  # the net has learned: what is kept is worth keeping
    assert record["task.simulated"] == pytest.approx(record["task.runtime"], abs=0.02)
    assert record["parity.local"]["exact_share"] == 1.0
    assert record["integer.float_ops"] == []

    x = small.patterns(5, seed=9)[0]
    found = artifact.predict(x)
    assert isinstance(found, Tensor)
    assert found.shape == (5, 3)
    float_outputs = model(x)
    error = (found - float_outputs).abs().max() / float_outputs.abs().max()
    assert 0 < error < 0.1  # quantized, and close

    again = bitport.verify(out, data=small.evaluation(), metric="top1")
    assert again["task.runtime"] == record["task.runtime"]
    assert again["task.verdict"] == "holds"
    assert bitport.report(out) == out / "report.html"
    bitport.Artifact.load(out)  # a report that was rendered again is no tampering


@pytest.mark.parametrize("target", ["onnxruntime", "null"])
def test_two_inputs_and_a_dict_of_outputs(tmp_path: Path, target: str) -> None:
    model = small.two_inputs()
    example = {"x": torch.zeros(1, 6), "z": torch.zeros(1, 4)}
    graph = bitport.load(model, example)
    artifact = bitport.compress(
        graph, "int8", target=target, data=small.pairs(), metric="mse", out=tmp_path / "out"
    )
    x, z = torch.randn(7, 6), torch.randn(7, 4)
    found = artifact.predict({"z": z, "x": x})
    assert isinstance(found, dict)
    real = model(x, z)
    assert set(found) == {"scores", "value"} == set(real)
    for name, value in real.items():
        assert found[name].shape == value.shape
        assert (found[name] - value).abs().max() < 0.1 * value.abs().max()
    by_order = artifact.predict((x, z))
    assert isinstance(by_order, dict)
    assert all(torch.equal(by_order[name], found[name]) for name in found)
    assert bitport.verify(artifact.path, metric="mse")["task.drop"] >= 0


def test_example_and_batches_may_be_tuples_and_labels_dicts(tmp_path: Path) -> None:
    graph = bitport.load(small.two_inputs(), (torch.zeros(2, 6), torch.zeros(2, 4)))
    batches = [Batch((b.inputs["x"], b.inputs["z"])) for b in small.pairs()]
    labelled = [Batch(b.inputs, torch.arange(16) % 3) for b in batches]
    right = Metric(
        "right",
        True,
        per_sample=lambda outputs, labels: (outputs["scores"].argmax(1) == labels).double(),
    )
    artifact = bitport.compress(
        graph, "int8", target="null", data=batches, evaluation=labelled, metric=right, out=tmp_path / "out"
    )
    record = artifact.measurements
    assert record["task.metric"] == "right"
    expected = [
        (small.two_inputs()(*b.inputs)["scores"].argmax(1) == b.labels).double().mean() for b in labelled
    ]
    assert record["task.float"] == pytest.approx(float(torch.stack(expected).mean()))
    again = bitport.verify(artifact.path, data=labelled, metric=right)
    assert again["task.runtime"] == record["task.runtime"]


def test_a_single_result_by_name_and_positional_labels_need_one_input(tmp_path: Path) -> None:
    graph = bitport.load(small.two_inputs(), (torch.zeros(2, 6), torch.zeros(2, 4)))
    bare = [(torch.zeros(4, 6), torch.zeros(4, 4))]
    with pytest.raises(DataError, match=r"bare tuple.*yield a dict of inputs, or Batch") as caught:
        bitport.compress(graph, "int8", target="null", data=bare, out=tmp_path / "out")
    assert caught.value.batch == 0
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------- verdicts


def test_a_network_that_holds(tmp_path: Path) -> None:
    record = small.compressed(tmp_path / "out", max_drop=0.1).measurements
    assert record["task.verdict"] == "holds"
    assert record["task.ci95"][1] <= 0.1
    assert record["verdict"]["passed"] is True


def test_a_network_that_fails(tmp_path: Path) -> None:
    narrow = {"format": "int2", "elsewhere": "int2"}
    step = StepSpec("quantize", {"weights": {"format": "int2"}, "activations": narrow})
    coarse, judged = Recipe(steps=(step,), name="mine"), small.evaluation(512)
    with pytest.raises(GateFailed, match="rejected: mine on null loses") as caught:
        small.compressed(tmp_path / "out", recipe=coarse, evaluation=judged, max_drop=0.01, effort="plain")
    task = caught.value.measurements["task"]
    assert task["verdict"] == "fails"
    assert task["ci95"][0] > 0.01
    assert caught.value.measurements["verdict"]["passed"] is False


def test_a_network_that_is_undecided_says_how_many_samples_would_decide(tmp_path: Path) -> None:
    with pytest.raises(GateFailed, match=r"undecided: .* samples would decide") as caught:
        small.compressed(tmp_path / "out", max_drop=0.01)
    task = caught.value.measurements["task"]
    assert task["verdict"] == "undecided"
    assert task["ci95"][0] <= 0.01 < task["ci95"][1]
    assert task["samples_needed"] > task["samples"]


def test_without_labels_the_float_network_judges(tmp_path: Path) -> None:
    record = small.compressed(tmp_path / "out", evaluation=None).measurements
    assert record["task.metric"] == "agreement"
    assert record["task.float"] == 1.0
    assert record["task.labels"] is False
    assert any("judged on the calibration data" in note for note in record["notes"])


def test_calibration_samples_among_the_evaluation_data_are_told(tmp_path: Path) -> None:
    record = small.compressed(tmp_path / "out", evaluation=small.calibration()).measurements
    assert any("32 samples of the calibration data are in the evaluation data" in n for n in record["notes"])


@pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf")])
def test_limits_that_mean_nothing_are_refused(tmp_path: Path, bad: float) -> None:
    with pytest.raises(RecipeError, match=r"max_drop = .*in the metric's unit"):
        small.compressed(tmp_path / "out", max_drop=bad)
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------- verify


def test_verify_with_data_metric_and_another_target(tmp_path: Path) -> None:
    out = small.compressed(tmp_path / "out", "onnxruntime", max_drop=0.2).path
    before = small.content(out)
    record = bitport.verify(out, small.evaluation(96), "nll")
    assert record["task.metric"] == "nll"
    assert record["task.samples"] == 96
    assert record["task.verdict"] is None  # the limit was one on top1: another unit
    moved = bitport.verify(out, small.evaluation(), target="null")
    assert moved["target"] == "null"
    assert moved["task.metric"] == "top1"
    assert moved["latency.speedup"] is None
    assert moved["size.ratio_reason"] == "null is a simulation: nothing was deployed"
    assert small.content(out) == before


def test_verify_judges_by_the_metric_that_the_gate_was_on(tmp_path: Path) -> None:
    out = small.compressed(tmp_path / "out", metric="nll", max_drop=1.0).path
    record = bitport.verify(out, small.evaluation())
    assert record["task.metric"] == "nll"
    assert record["task.verdict"] == "holds"


def test_verify_says_when_the_gate_can_not_be_judged(tmp_path: Path) -> None:
    mine = Metric("mine", True, per_sample=lambda y, labels: (y.argmax(1) == labels).double(), binary=True)
    out = small.compressed(tmp_path / "out", metric=mine, max_drop=0.2).path
    record = bitport.verify(out, small.evaluation())
    assert record["task.metric"] == "top1"
    assert any("'mine'" in note and "metric=" in note for note in record["notes"])
    again = bitport.verify(out, small.evaluation(), metric=mine)
    assert again["task.verdict"] == "holds"
    assert not any("'mine'" in note for note in again["notes"])


def test_verify_of_the_float_recipe_on_another_target(tmp_path: Path) -> None:
    out = small.compressed(tmp_path / "out", recipe="float").path
    record = bitport.verify(out, target="onnxruntime")
    assert record["target"] == "onnxruntime"
    assert record["task.drop"] == 0.0
    assert record["size.ratio"] == pytest.approx(1.0, abs=0.2)


# --------------------------------------------------------------------------------------------- recipes


def test_a_recipe_is_a_name_or_a_path(tmp_path: Path) -> None:
    file = tmp_path / "int8.toml"
    file.write_text(Recipe.preset("int8").to_toml())
    plans = []
    for index, given in enumerate(("int8", str(file))):
        artifact = small.compressed(tmp_path / f"out{index}", recipe=given)
        plans.append((artifact.path / "plan.json").read_bytes())
        assert artifact.manifest["recipe"] == "int8"
    assert len(set(plans)) == 1


def test_the_stored_recipe_is_explicit_and_makes_the_same_again(tmp_path: Path) -> None:
    first = small.compressed(tmp_path / "first", effort="best")
    uses = [step.use for step in first.recipe.steps]
    assert uses == [
        "fold", "quantize", "calibrate", "equalize", "choose_ranges", "reconstruct", "gptq", "self_distil",
        "correct_bias",
    ]  # fmt: skip
    again = small.compressed(tmp_path / "again", recipe=first.path / "recipe.toml")
    for name in ("plan.json", "graph.pt2", "recipe.toml"):
        assert (first.path / name).read_bytes() == (again.path / name).read_bytes(), name


@pytest.mark.parametrize(
    ("effort", "added"),
    [
        ("fast", ["equalize", "choose_ranges", "correct_bias"]),
        ("balanced", ["equalize", "choose_ranges", "gptq", "correct_bias"]),
    ],
)
def test_effort_adds_steps(tmp_path: Path, effort: str, added: list[str]) -> None:
    artifact = small.compressed(tmp_path / "out", effort=effort)
    record = artifact.measurements
    assert [step.use for step in artifact.recipe.steps] == ["fold", "quantize", "calibrate", *added]
    assert any("bias correction" in note for note in record["notes"])
    assert len(record["seconds.steps"]) == 3 + len(added)
    assert any(row["what"] == "GPTQ" for row in record["tried"]) == ("gptq" in added)
    assert record["parity.local"]["exact_share"] == 1.0


def test_an_override_keeps_a_layer_in_float_and_is_seen_everywhere(tmp_path: Path) -> None:
    plain = {"format": "float32"}
    kept = recipe(overrides=(Override(match="body*", weights=plain, activations=plain),))
    artifact = small.compressed(tmp_path / "out", "onnxruntime", recipe=kept)
    record = artifact.measurements
    islands = {item["name"]: item["reason"] for item in record["integer.float_ops"]}
    assert "body" in islands
    assert "recipe" in islands["body"]
    assert 0 < record["integer.mac_share"] < 1
    rows = {row["name"]: row for row in record["layers"]}
    assert rows["body"]["kernel"] is None
    assert rows["body"]["compressed_bytes"] == rows["body"]["float_bytes"]
    assert rows["stem"]["kernel"] is not None
    assert not any(edge.producer.startswith("body") for edge in artifact.plan.edges)
    inspected = artifact.target.inspect(artifact.path, artifact.plan)
    assert not any("QLinearConv" in kind for kind in inspected.kernels.get("body", ()))
    assert record["parity.local"]["exact_share"] == 1.0


def test_an_override_that_matches_nothing_is_an_error(tmp_path: Path) -> None:
    lost = recipe(overrides=(Override(match="bodi.*", weights={"format": "float32"}),))
    with pytest.raises(RecipeError, match=r"'bodi\.\*'.* matches no operator"):
        small.compressed(tmp_path / "out", recipe=lost)
    assert list(tmp_path.iterdir()) == []


def test_training_data_for_a_recipe_that_does_not_train_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="train= and teacher= need a step that trains"):
        small.compressed(tmp_path / "out", train=small.evaluation())


@pytest.mark.slow
def test_an_optimizer_that_moves_integers_far_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = bitport.load(small.tiny(), torch.zeros(1, 1, 8, 8))
    out = tmp_path / "out"

    def notes() -> str:
        artifact = bitport.compress(graph, "int8", target="onnxruntime", data=small.calibration(), out=out)
        assert artifact.measurements["optimizer.max_steps"] <= 2  # this runtime, this network: nothing wrong
        assert artifact.measurements["optimizer.tensor"]
        return "\n".join(artifact.measurements["notes"])

    assert "look there first" not in notes()
    monkeypatch.setattr("bitport.proof.measure.SUSPICIOUS_STEPS", -1)
    assert "optimizer moves integers of" in notes()


def test_a_device_other_than_the_processor_is_refused(tmp_path: Path) -> None:
    graph = bitport.load(small.tiny(), torch.zeros(1, 1, 8, 8))
    with pytest.raises(RecipeError, match=r"device = 'cuda'.*leave it out"):
        bitport.compress(
            graph, "int8", target="null", data=small.calibration(), out=tmp_path / "out", device="cuda"
        )
    assert not (tmp_path / "out").exists()


def test_metrics_that_can_not_be_computed(tmp_path: Path) -> None:
    def broken(outputs: Any, labels: Any) -> Tensor:
        raise ZeroDivisionError("no")

    with pytest.raises(MetricError, match="'broken' raised ZeroDivisionError"):
        small.compressed(tmp_path / "out", metric=Metric("broken", True, per_sample=broken))
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------- what stays untouched


def test_graph_model_and_random_states_are_untouched(tmp_path: Path) -> None:
    model = small.tiny().train()
    state = copy.deepcopy(model.state_dict())
    graph = bitport.load(model, torch.zeros(2, 1, 8, 8))
    digest, notes = graph.digest(), list(graph.notes)
    parameters = {name: value.clone() for name, value in graph.gm.state_dict().items()}
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    precision = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
    directory = Path.cwd()
    artifact = bitport.compress(
        graph, "int8", target="onnxruntime", data=small.calibration(), evaluation=small.evaluation(),
        effort="best", out=tmp_path / "out", seed=7,
    )  # fmt: skip
    bitport.verify(artifact.path)
    artifact.predict(torch.zeros(1, 1, 8, 8))

    assert graph.digest() == digest
    assert graph.notes == notes
    assert graph.stage == "float"
    assert all(torch.equal(value, graph.gm.state_dict()[name]) for name, value in parameters.items())
    assert model.training
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]
    assert (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()) == precision
    assert Path.cwd() == directory
    assert artifact.manifest["model_digest"] == digest
    assert artifact.manifest["seed"] == 7


def test_the_random_state_survives_a_failure(tmp_path: Path) -> None:
    graph = bitport.load(small.tiny(), torch.zeros(2, 1, 8, 8))
    before = torch.get_rng_state()

    def data() -> Any:
        torch.manual_seed(99)  # a loader that shuffles
        yield torch.rand(4, 1, 8, 8)
        raise OSError("gone")

    with pytest.raises(DataError, match="batch 1"):
        bitport.compress(graph, "int8", target="null", data=data, out=tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), before)


def test_one_graph_serves_many_runs(tmp_path: Path) -> None:
    graph = bitport.load(small.tiny(), torch.zeros(2, 1, 8, 8))
    coarse = recipe("int4", "int6")
    plans = []
    for index, chosen in enumerate(("int8", coarse, "int8")):
        out = tmp_path / str(index)
        artifact = bitport.compress(graph, chosen, target="null", data=small.calibration(), out=out)
        plans.append((artifact.path / "plan.json").read_bytes())
    assert plans[0] == plans[2] != plans[1]


# --------------------------------------------------------------------------------------------- loading, inspecting


def test_an_artifact_folder_loads_as_its_original(tmp_path: Path) -> None:
    artifact = small.compressed(tmp_path / "out", effort="best")
    graph = bitport.load(artifact.path)
    x = small.patterns(6, seed=4)[0]
    torch.testing.assert_close(graph.run(x)[0], small.tiny()(x))
    assert graph.stage == "float"
    again = bitport.compress(
        graph, "int8", target="null", data=small.calibration(), effort="best", out=tmp_path / "again"
    )
    assert read_json(again.path / "plan.json") == read_json(artifact.path / "plan.json")
    assert again.manifest["model_digest"] == artifact.manifest["model_digest"]


def test_a_pt2_file_loads(tmp_path: Path) -> None:
    model = small.tiny()
    batch = torch.export.Dim("n", min=1, max=64)
    program = torch.export.export(model, (torch.zeros(2, 1, 8, 8),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "net.pt2")
    graph = bitport.load(str(tmp_path / "net.pt2"))
    x = small.patterns(6, seed=4)[0]
    torch.testing.assert_close(graph.run(x)[0], model(x))
    artifact = bitport.compress(graph, "int8", target="null", data=small.calibration(), out=tmp_path / "out")
    assert "stem" in {row["name"] for row in artifact.measurements["layers"]}


def test_inspect_tells_what_would_run_in_integers() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.erf(self.conv(x)).mean((2, 3)))

    graph = bitport.load(Half().eval(), torch.zeros(1, 1, 8, 8))
    plain = api.inspect(graph)
    assert [row["name"] for row in plain["layers"] if row["macs"]] == ["conv", "fc"]
    assert plain["totals"]["macs"] == 4 * 9 * 36 + 12
    assert plain["totals"]["parameters"] == 4 * 9 + 4 + 15
    aimed = api.inspect(graph, "onnxruntime")
    rows = {row["op"]: row for row in aimed["layers"]}
    assert rows["conv"]["integer"]
    erf = rows["other:erf"]
    assert erf["integer"] is False
    assert "no integer kernel for erf" in erf["reason"]
    assert aimed["totals"]["mac_share"] == 1.0
    assert aimed["speed"] and aimed["speedup"] in (None, 1.0)  # it is tiny
    assert graph.stage == "float"
