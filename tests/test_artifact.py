"""The artifact folder: reading it back, running it, noticing that it was changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tests import small

import bitport
from bitport import Artifact
from bitport.errors import ArtifactError, BitportError, DataError, Tampered, UnsafeFile


@pytest.fixture(scope="module", params=["onnxruntime", "null"])
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        small.quick(patch)
        out = tmp_path_factory.mktemp("artifact") / "out"
        return small.compressed(out, request.param, max_drop=0.2).path


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    """A private copy, at another place: artifacts can be moved."""
    return Path(shutil.copytree(published, tmp_path / "moved"))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    small.quick(monkeypatch)


def golden(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(folder / "sample.npz", allow_pickle=False) as arrays:
        assert sorted(arrays) == ["input.x", "output.0"] or len(arrays) == 2
        (output,) = [arrays[name] for name in arrays if name.startswith("output.")]
        return arrays["input.x"], output


def test_predicting_the_golden_inputs_gives_the_golden_outputs(folder: Path) -> None:
    inputs, outputs = golden(folder)
    artifact = Artifact.load(folder)
    assert 1 <= len(inputs) <= 16
    found = artifact.predict(torch.from_numpy(inputs))
    assert isinstance(found, torch.Tensor)
    assert np.array_equal(found.numpy(), outputs)
    # a sample doesn't depend on its neighbours, and arrays are taken as well
    one = artifact.predict(inputs[:1])
    assert isinstance(one, torch.Tensor)
    assert np.allclose(one.numpy(), outputs[:1], atol=1e-6)
    by_name = artifact.predict({"x": inputs})
    assert isinstance(by_name, torch.Tensor)
    assert np.array_equal(by_name.numpy(), outputs)


def test_predict_names_the_output_that_a_network_with_several_has(tmp_path: Path) -> None:
    graph = bitport.load(small.two_inputs(), (torch.zeros(1, 6), torch.zeros(1, 4)))
    out = tmp_path / "out"
    artifact = bitport.compress(graph, "int8", target="null", data=small.pairs(), metric="mse", out=out)
    assert [item["name"] for item in artifact.manifest["outputs"]] == ["scores", "value"]
    with np.load(out / "sample.npz", allow_pickle=False) as arrays:
        assert sorted(arrays) == ["input.x", "input.z", "output.scores", "output.value"]
        found = artifact.predict((arrays["input.x"], arrays["input.z"]))
        assert isinstance(found, dict)
        assert all(np.array_equal(found[name].numpy(), arrays[f"output.{name}"]) for name in found)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.zeros(1, 1, 8, 8), torch.zeros(1)), r"has 2 inputs; the network takes 1 \('x'\)"),
        ({"image": torch.zeros(1, 1, 8, 8)}, "unknown 'image' and missing 'x'.*it takes 'x'"),
        (torch.zeros(1, 3, 8, 8), r"'x'.* expected shape \[batch, 1, 8, 8\], got \[1, 3, 8, 8\]"),
        (torch.zeros(1, 8, 8), r"'x'.* expected shape .*the batch axis is missing"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.float64), r"'x'.* expected float32, got float64.*\.float\(\)"),
        (np.zeros((1, 1, 8, 8), dtype=np.uint8), r"'x'.* expected float32, got uint8"),
        ("picture.png", r"'x'.* is of type str"),
        (None, r"'x'.* is of type NoneType"),
    ],
)
def test_predict_refuses_what_the_network_can_not_take(published: Path, inputs: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Artifact.load(published).predict(inputs)


def test_the_parts_can_be_read_back(folder: Path) -> None:
    artifact = Artifact.load(folder)
    assert [step.use for step in artifact.recipe.steps] == [
        "fold", "quantize", "calibrate", "equalize", "choose_ranges", "correct_bias",
    ]  # fmt: skip
    assert artifact.plan.quantized
    assert artifact.graph.stage == "folded"
    assert artifact.original.stage == "float"
    assert artifact.measurements["task.verdict"] == "holds"
    x = small.patterns(4)[0]
    torch.testing.assert_close(artifact.original.run(x)[0], small.tiny()(x))
    # weights lie on their grid: applying the plan to them changes nothing
    tie = artifact.plan.ties["stem.weight"]
    scale, _ = tie.parameters()
    steps = artifact.graph.tensor("stem.weight").detach().double() / scale.double().reshape(-1, 1, 1, 1)
    assert (steps - steps.round()).abs().max() < 1e-4
    assert steps.abs().max() > 0.8 * tie.format.high  # 63 where the processor has no VNNI, else 127


def test_verify_of_a_moved_folder_changes_nothing(folder: Path) -> None:
    before = small.content(folder)
    record = bitport.verify(folder)
    assert record["task.metric"] == "agreement"
    assert record["task.samples"] == len(golden(folder)[0])
    assert record["task.verdict"] is None  # a handful of golden samples decides no gate
    assert small.content(folder) == before


# --------------------------------------------------------------------------------------------- tampering


@pytest.mark.parametrize(
    "name", ["plan.json", "graph.pt2", "sample.npz", "reference/graph.pt2", "report.html"]
)
def test_a_changed_file_is_named(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    for act in (bitport.verify, Artifact.load, bitport.load):
        with pytest.raises(Tampered, match=rf"changed: {name}\): make it again"):
            act(folder)


def test_extra_and_missing_files_are_named(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    (folder / "recipe.toml").unlink()
    with pytest.raises(Tampered, match=r"missing: recipe\.toml; extra: notes\.txt"):
        bitport.verify(folder)


def test_a_runtime_that_answers_otherwise_than_when_published_is_noticed(folder: Path) -> None:
    # the golden outputs are those of the publisher's machine; a runtime may differ on another one
    with np.load(folder / "sample.npz") as arrays:
        changed = {name: value + (name.startswith("output.") * 0.5) for name, value in arrays.items()}
    with (folder / "sample.npz").open("wb") as file:
        np.savez(file, **{name: value.astype(np.float32) for name, value in changed.items()})
    manifest = json.loads((folder / "manifest.json").read_text())
    digest = bitport.artifact.records.sha256_file(folder / "sample.npz")
    manifest["files"]["sample.npz"] = digest
    (folder / "manifest.json").write_text(json.dumps(manifest))
    record = bitport.verify(folder)
    assert record["golden.max_difference"] == pytest.approx(0.5, abs=1e-4)
    assert record["golden.equal_share"] == 0.0
    assert any("golden outputs" in note for note in record["notes"])


def test_golden_outputs_that_come_again_are_said(folder: Path) -> None:
    record = bitport.verify(folder)
    assert record["golden.max_difference"] == 0.0
    assert not any("golden outputs" in note for note in record["notes"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("[]", "a JSON object was expected"),
        ('{"schema": 2, "files": {}}', "schema 2"),
        ('{"schema": 1, "files": 3}', "lists no files"),
    ],
)
def test_a_damaged_manifest_is_told(folder: Path, text: str, message: str) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match=message):
        Artifact.load(folder)


def test_a_manifest_that_forgets_facts_is_an_artifact_error(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    for key in ("target", "target_options", "inputs", "outputs"):
        (folder / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != key}))
        with pytest.raises(ArtifactError, match=rf"manifest\.json of 'moved' has no valid {key!r}"):
            Artifact.load(folder)


def test_folders_that_are_no_artifacts(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("hello")
    for act in (bitport.verify, bitport.report, Artifact.load, bitport.load):
        with pytest.raises(BitportError, match=r"no artifact|manifest\.json|measurements\.json"):
            act(tmp_path)
        with pytest.raises(BitportError, match=r"none|doesn't exist|can't be read|no artifact"):
            act(tmp_path / "none")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_graph_that_needs_unpickling_is_refused_even_with_the_right_checksum(
    folder: Path, tmp_path: Path
) -> None:
    class Canary:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (Path(tmp_path / "executed"),)  # type: ignore[return-value]

    torch.save({"weights": Canary()}, folder / "graph.pt2")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["graph.pt2"] = bitport.artifact.records.sha256_file(folder / "graph.pt2")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BitportError) as caught:
        bitport.verify(folder)
    assert not (tmp_path / "executed").exists()
    assert isinstance(caught.value, UnsafeFile) or "no readable" in str(caught.value)


def test_a_report_can_be_made_again_and_again(folder: Path) -> None:
    (folder / "report.html").unlink()
    assert bitport.report(folder) == folder / "report.html"
    first = (folder / "report.html").read_bytes()
    bitport.report(str(folder))
    assert (folder / "report.html").read_bytes() == first
    Artifact.load(folder)


def test_a_report_of_a_changed_record_is_refused(folder: Path) -> None:
    # a nice report on numbers that nobody measured would be the worst lie of all
    record = json.loads((folder / "measurements.json").read_text())
    record["task"]["drop"] = -0.5
    (folder / "measurements.json").write_text(json.dumps(record))
    with pytest.raises(Tampered, match=r"changed: measurements\.json"):
        bitport.report(folder)
