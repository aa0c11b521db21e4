"""Outputs that a device made of the golden inputs: who computes them, what is said about them, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tests import small

import bitport
from bitport import api
from bitport.cli import cli
from bitport.errors import DataError
from bitport.proof import device

Arrays = dict[str, Any]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`Tiny` on the simulator: quick to make, its results are the artifact's own."""
    with pytest.MonkeyPatch.context() as patch:
        small.quick(patch)
        small.without_page(patch)
        return small.compressed(tmp_path_factory.mktemp("device") / "net").path


@pytest.fixture(scope="module")
def real_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two inputs, two outputs, on ONNX Runtime."""
    with pytest.MonkeyPatch.context() as patch:
        small.quick(patch)
        small.without_page(patch)
        graph = bitport.load(small.two_inputs(), (torch.zeros(2, 6), torch.zeros(2, 4)))
        out = tmp_path_factory.mktemp("device") / "two"
        return bitport.compress(graph, "int8", target="onnxruntime", data=small.pairs(), out=out).path


def sample(folder: Path) -> Arrays:
    with np.load(folder / "sample.npz") as arrays:
        return dict(arrays)


def golden(folder: Path) -> Arrays:
    return {name: array for name, array in sample(folder).items() if name.startswith("output.")}


def only(folder: Path) -> tuple[str, np.ndarray[Any, Any]]:
    ((name, array),) = golden(folder).items()
    return name, array


def row(folder: Path, outputs: Any) -> dict[str, Any]:
    (found,) = bitport.verify(folder, outputs=outputs)["outputs"]
    return dict(found)


def test_the_golden_outputs_are_equal(artifact: Path) -> None:
    record = bitport.verify(artifact, outputs=golden(artifact))
    (found,) = record["outputs"]
    assert found["verdict"] == "equal"
    assert (found["max_steps"], found["max_abs_difference"], found["equal_share"]) == (0, 0, 1)
    assert found["sqnr_golden_db"] is None and "equal" in found["sqnr_golden_db_reason"]
    assert found["max_abs_difference_simulated"] == 0  # the target is the simulator
    assert found["max_abs_difference_float"] > 0
    assert found["sqnr_float_db"] == found["golden_sqnr_float_db"] > 15
    assert found["top1_agreement"] == 1
    assert record["verdict.passed"] and "exactly" in record["verdict.sentence"]
    json.dumps(record.record, allow_nan=False)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_step_or_two_are_another_rounding(artifact: Path, steps: int) -> None:
    name, array = only(artifact)
    changed = array.copy()
    step = row(artifact, {name: array})["step"]
    changed[3, 1] += np.float32(steps * step)
    found = row(artifact, {name: changed})
    assert (found["verdict"], found["max_steps"]) == ("within", steps)
    assert found["equal_share"] == pytest.approx(1 - 1 / array.size)
    assert found["sqnr_golden_db"] > 20


def test_more_than_that_is_another_result(artifact: Path) -> None:
    name, array = only(artifact)
    changed = array.copy()
    changed[5] = 0
    record = bitport.verify(artifact, outputs={name: changed})
    (found,) = record["outputs"]
    assert found["verdict"] == "differs" and found["max_steps"] > 2
    assert "SHA-256" in found["hint"] and "preprocessed" in found["hint"]
    assert not record["verdict.passed"]
    assert record["verdict.sentence"].startswith("rejected: ")
    assert [gate["verdict"] for gate in record["verdict.gates"]] == ["fails"]


def test_likely_causes_are_named(artifact: Path) -> None:
    name, array = only(artifact)
    softmax = torch.from_numpy(array).softmax(-1).numpy()
    inputs = torch.from_numpy(sample(artifact)["input.x"])
    causes = {
        "after a softmax": softmax,
        "after a log-softmax": np.log(softmax),
        "another order": array[::-1].copy(),
        "one buffer": np.repeat(array[:1], len(array), 0),
    }
    for words, changed in causes.items():
        assert words in row(artifact, {name: changed})["hint"]
    # a coarse plan, so that the float network's outputs are another result
    graph, plan = api.Artifact.load(artifact).graph, api.Artifact.load(artifact).plan
    real = small.tiny()(inputs).detach()
    far = {name: (array + 0.5 * (array.max() - array.min())).astype(np.float32)}
    judged = device.judge_outputs([real.numpy()], far, graph, plan, [real], [real])
    assert "the original network" in judged["outputs"][0]["hint"]


def test_layout_of_images() -> None:
    golden = torch.randn(2, 3, 5, 5)
    found = golden.permute(0, 2, 3, 1).reshape(golden.shape)
    sides = device.Sides(found, golden, golden, golden + 1, 0.01, "range")
    assert "layout" in device._hint(sides)


def test_integer_outputs_are_counted_in_their_own_steps(real_one: Path) -> None:
    """As a runtime with integer outputs would leave them: unsigned, shifted by 128."""
    opened = bitport.Artifact.load(real_one)
    graph, plan = opened.graph, opened.plan
    edge = next(edge for edge in plan.edges if plan.ties[plan.edges[edge]].source == "measured")
    name = graph.name(graph.output_nodes()[0])
    with_output = type(plan)(
        plan.target, {**plan.edges, type(edge)(name, "output", 0): plan.edges[edge]}, plan.ties, plan.nodes
    )
    scale, zero_point = plan.ties[plan.edges[edge]].parameters()
    q = np.array([[0, 128, 255]], np.uint8)
    real = (torch.from_numpy(q.astype(np.float32)) - 128 - zero_point) * scale
    other = torch.zeros(1, 1)
    spec = [f"output.{output.name}" for output in graph.outputs]
    wanted = {spec[0]: q, spec[1]: other.numpy()}
    changed = [q + np.array([[2, 0, 0]], np.uint8), other.numpy()]
    judged = device.judge_outputs(changed, wanted, graph, with_output, [real, other], [real, other])
    found = judged["outputs"][0]
    assert (found["step_of"], found["step"], found["max_steps"]) == ("scale", float(scale), 2)
    assert found["max_abs_difference_simulated"] == pytest.approx(2 * float(scale), rel=1e-5)
    changed[0] = q + np.array([[3, 0, 0]], np.uint8)
    judged = device.judge_outputs(changed, wanted, graph, with_output, [real, other], [real, other])
    assert judged["outputs"][0]["verdict"] == "differs"


def test_names_of_outputs_with_and_without_prefix(real_one: Path) -> None:
    arrays = golden(real_one)
    assert sorted(arrays) == ["output.scores", "output.value"]
    plain = {name.removeprefix("output."): torch.from_numpy(array) for name, array in arrays.items()}
    for outputs in (arrays, plain, {**arrays, **sample(real_one)}):
        assert [found["verdict"] for found in bitport.verify(real_one, outputs=outputs)["outputs"]] == [
            "equal"
        ] * 2


def _float16(arrays: Arrays) -> Arrays:
    return {name: array.astype(np.float16) for name, array in arrays.items()}


def _with(name: str, value: Any) -> Any:
    def change(arrays: Arrays) -> Arrays:
        changed = {key: array.copy() for key, array in arrays.items()}
        changed["output.scores"].flat[4] = value
        return changed if name == "scores" else {**changed, name: changed["output.scores"]}

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"output.value": a["output.value"]}, r"no 'output.scores'; expected: 'output.scores' float32"),
        (lambda a: {}, "no 'output.scores', 'output.value'"),
        (_with("logits", 0.0), r"unknown arrays 'logits'; expected"),
        (_float16, "'scores' is float16, expected float32"),
        (lambda a: {**a, "output.value": np.zeros((16, 1), np.int8)}, r"int8, expected float32.*\(q − zero_point\)"),
        (lambda a: {**a, "output.value": a["output.value"][:1]}, r"shape \[1, 1\], expected \[16, 1\].*every golden"),
        (_with("scores", np.nan), "'scores' holds 1 NaN or infinite values, the first in sample 1"),
        (_with("scores", np.inf), "'scores' holds 1 NaN or infinite"),
        (lambda a: {**a, "input.x": np.zeros((16, 6), np.float32)}, "'input.x' is not the golden input"),
        (lambda a: {**a, "output.value": np.array([{}] * 16)}, "is object, expected float32"),
    ],
)  # fmt: skip
def test_refuses(real_one: Path, change: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        bitport.verify(real_one, outputs=change(golden(real_one)))


def test_outputs_stand_alone(artifact: Path) -> None:
    with pytest.raises(DataError, match="leave out"):
        bitport.verify(artifact, outputs=golden(artifact), target="null")


# ------------------------------------------------------------------------------------------ command line


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli, [str(part) for part in arguments])


def save(path: Path, arrays: Arrays) -> Path:
    np.savez(path, **arrays)
    return path


def test_command_line(real_one: Path, tmp_path: Path) -> None:
    """What the documentation shows: run the file elsewhere, save, judge."""
    import onnxruntime

    session = onnxruntime.InferenceSession(real_one / "model.onnx", providers=["CPUExecutionProvider"])
    given = sample(real_one)
    feeds = {value.name: given[f"input.{value.name}"] for value in session.get_inputs()}
    results = session.run(None, feeds)
    names = [f"output.{value.name}" for value in session.get_outputs()]
    file = save(tmp_path / "device.npz", dict(zip(names, results, strict=True)))
    result = invoke("verify", real_one, "--outputs", file)
    assert result.exit_code == 0, result.stderr
    assert "scores: equal" in result.stdout and "✓ the device computes exactly" in result.stdout
    changed = dict(zip(names, results, strict=True))
    changed["output.scores"] = -changed["output.scores"]
    save(file, changed)
    result = invoke("verify", real_one, "--outputs", file)
    assert result.exit_code == 3
    assert (
        "scores: differs" in result.stdout
        and "value: equal" in result.stdout
        and "✗ rejected" in result.stdout
    )
    document = json.loads(invoke("verify", real_one, "--outputs", file, "--json").stdout)
    assert [found["verdict"] for found in document["outputs"]] == ["differs", "equal"]
    assert document["verdict"]["passed"] is False


def test_command_line_refuses(artifact: Path, tmp_path: Path) -> None:
    file = save(tmp_path / "device.npz", golden(artifact))
    result = invoke("verify", artifact, "--outputs", file, "--data", "d.npz")
    assert result.exit_code == 2 and "leave out the other options" in result.stderr
    for other, words in {"missing.npz": "is no .npz file here", "device.bin": "is no .npz file here"}.items():
        result = invoke("verify", artifact, "--outputs", tmp_path / other)
        assert result.exit_code == 1 and words in result.stderr and "Traceback" not in result.stderr
    # an object array would need pickle
    np.savez(file, **{"output.output": np.array([object()] * 16)})
    result = invoke("verify", artifact, "--outputs", file)
    assert result.exit_code == 1 and "never pickled objects" in result.stderr
    file.write_bytes(b"PK\x03\x04 no archive")
    assert invoke("verify", artifact, "--outputs", file).exit_code == 1


def test_a_changed_artifact_judges_nothing(artifact: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    save(copy / "sample.npz", {name: array + 1 for name, array in sample(artifact).items()})
    with pytest.raises(bitport.Tampered, match=r"sample\.npz"):
        bitport.verify(copy, outputs=golden(artifact))
