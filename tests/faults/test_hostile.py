"""A hostile user: odd words on the command line, callables that misbehave, artifacts that somebody took apart."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from tests import small

import bitport
from bitport import records, store
from bitport.cli import cli
from bitport.errors import ArtifactError, LoadError, UnknownName

MODULE = """
import sys
import torch
from torch import nn
from tests import small

def net(): return small.tiny(), small.patterns(1)[0]
def empty(): return small.tiny(), torch.zeros(0, 1, 8, 8)
def leaves(): sys.exit(0)
def data(): return small.calibration()
def judged(): return small.evaluation()
def leaving():
    yield small.calibration()[0]
    sys.exit(0)
def worded(): return [(x, ["cat"] * len(x)) for x in small.calibration()]
def infinite(): return [torch.full((16, 1, 8, 8), float("inf"))] * 2
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    small.quick(monkeypatch)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "hostile_net.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(done: Result) -> str:
    """The one line on stderr; nothing on stdout, exit code 1."""
    assert done.exit_code == 1, done.output
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert "unexpected" not in line
    return line


@pytest.mark.parametrize(
    ("model", "change", "words"),
    [
        ("leaves", {}, "could not be called (SystemExit: 0)"),
        ("empty", {}, "the example inputs hold no sample: give a batch of one at least"),
        ("net", {"data": "leaving"}, "raised at batch 1 (SystemExit: 0): mend the loader"),
        ("net", {"data": "leaves"}, "'hostile_net:leaves' raised (SystemExit: 0): mend the callable"),
        ("net", {"data": "infinite"}, "are NaN (16 samples in all): check the data, and the network in float"),
        ("net", {"eval": "worded"}, "mend it, or the labels that it is given"),
        ("net", {"eval": "judged", "metric": "mse"}, "give labels of the output's shape, or another metric"),
        ("net", {"eval": "judged", "metric": "top1:nope"}, "unknown output 'nope'. Known: output"),
        ("net", {"eval": "judged", "metric": "top1:"}, "unknown output ''. Known: output"),
        ("net", {"max-drop": "1e308"}, "max_drop = 1e+308: give a number from 0 to 1e+15"),
        ("net", {"max-drop": "-1"}, "max_drop = -1.0: give a number from 0 to 1e+15"),
    ],
)  # fmt: skip
def test_callables_and_words_that_misbehave(
    here: Path, model: str, change: dict[str, str], words: str
) -> None:
    options = {"target": "null", "recipe": "int8", "data": "data", "out": "out", **change}
    for key in ("data", "eval"):
        if key in options:
            options[key] = f"hostile_net:{options[key]}"
    flags = [word for key, value in options.items() for word in (f"--{key}", value)]
    assert words in told(CliRunner().invoke(cli, ["compress", f"hostile_net:{model}", *flags]))
    assert {path.name for path in here.iterdir()} <= {"hostile_net.py", "__pycache__"}


@pytest.mark.parametrize("command", ["inspect", "verify", "report"])
@pytest.mark.parametrize("folder", ["", ".", "/"])
def test_folders_without_a_name_are_named(here: Path, command: str, folder: str) -> None:
    line = told(CliRunner().invoke(cli, [command, folder]))
    assert f"'{folder or '.'}' is no artifact: it has no manifest.json" in line


def test_the_outputs_of_a_metric_are_the_network_s(tmp_path: Path) -> None:
    artifact = small.compressed(tmp_path / "out", metric="top1:output")
    with pytest.raises(UnknownName, match="unknown output 'nope'"):
        bitport.verify(artifact.path, data=small.evaluation(), metric="top1:nope")


# ------------------------------------------------------------------------------------- artifacts taken apart


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Never modified."""
    with pytest.MonkeyPatch.context() as patch:
        small.quick(patch)
        return small.compressed(tmp_path_factory.mktemp("good") / "out", "onnxruntime").path


def _gone(path: Path) -> None:
    path.unlink()


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _garbage(path: Path) -> None:
    path.write_bytes(b"\x00\xff{[garbage" * 20)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


FILES = [
    "graph.pt2", "manifest.json", "measurements.json", "model.onnx", "plan.json", "recipe.toml", "reference/graph.pt2",
    "reference/model.onnx", "report.html", "sample.npz",
]  # fmt: skip


def vouched(folder: Path) -> None:
    """The manifest says what is there, as somebody would write it who wants to be believed."""
    known = records.load(folder / "manifest.json")
    records.dump(folder / "manifest.json", {**known, "files": store.manifest(folder)})


@pytest.mark.parametrize("damage", [_gone, _empty, _garbage, _folder])
@pytest.mark.parametrize("name", FILES)
def test_whatever_is_taken_from_an_artifact_is_told_or_not_needed(
    good: Path, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    folder = tmp_path / "taken"
    shutil.copytree(good, folder)
    damage(folder / name)
    if name != "manifest.json":
        vouched(folder)
    for command in ("verify", "report", "inspect"):
        before = small.content(folder)
        done = CliRunner().invoke(cli, [command, str(folder), "--json"])
        document = json.loads(done.stdout)
        if done.exit_code == 0:
            continue
        assert done.exit_code == 1, done.output
        message = document["error"]["message"]
        assert "unexpected" not in message
        assert ".tmp" not in message  # of a folder that is gone by now
        assert small.content(folder) == before


def _without(arrays: dict[str, np.ndarray]) -> None:
    del arrays["input.x"]


def _without_output(arrays: dict[str, np.ndarray]) -> None:
    del arrays["output.output"]


def _of_another_shape(arrays: dict[str, np.ndarray]) -> None:
    arrays["input.x"] = arrays["input.x"][:, :, 1:]


def _of_another_type(arrays: dict[str, np.ndarray]) -> None:
    arrays["input.x"] = arrays["input.x"].astype(np.float64)


def _of_objects(arrays: dict[str, np.ndarray]) -> None:
    arrays["input.x"] = np.array([object()])


@pytest.mark.parametrize(
    "change", [_without, _without_output, _of_another_shape, _of_another_type, _of_objects]
)
def test_a_golden_sample_that_is_not_the_network_s(
    good: Path, tmp_path: Path, change: Callable[[dict[str, np.ndarray]], None]
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(good, folder)
    with np.load(folder / "sample.npz") as stored:
        arrays = dict(stored)
    change(arrays)
    with zipfile.ZipFile(folder / "sample.npz", "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array)
    vouched(folder)
    with pytest.raises(ArtifactError, match=r"sample.*: compress the network again"):
        bitport.verify(folder)


def test_a_golden_sample_of_a_scalar_is_read(tmp_path: Path) -> None:
    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Linear(6, 4)

        def forward(self, x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
            return self.a(x) * by

    graph = bitport.load(Scaled().eval(), (torch.randn(2, 6), torch.tensor(0.5)))
    data = [bitport.Batch((torch.randn(16, 6), torch.tensor(0.5)))]
    artifact = bitport.compress(
        graph, "int8", target="onnxruntime", data=data, metric="mse", out=tmp_path / "out"
    )
    assert bitport.verify(artifact.path).record["golden"]["max_difference"] == 0


def test_an_example_without_a_sample_is_refused() -> None:
    with pytest.raises(LoadError, match="hold no sample"):
        bitport.load(small.tiny(), torch.zeros(0, 1, 8, 8))
