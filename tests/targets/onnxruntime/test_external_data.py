"""Weights beside the model file: every stage finds them, and they are part of the artifact as the file itself is."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import onnx
import psutil
import pytest
import torch
from tests import small

import bitport
from bitport import errors
from bitport.targets import _onnx

DATA = "model.onnx.data"


@pytest.fixture
def artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bitport.Artifact:
    small.quick(monkeypatch)
    small.without_page(monkeypatch)
    monkeypatch.setattr(_onnx, "EXTERNAL_ABOVE", 10)
    return small.compressed(tmp_path / "out", "onnxruntime")


def test_every_stage_finds_weights_that_lie_beside_the_file(
    artifact: bitport.Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (artifact.path, artifact.path / "reference"):
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        onnx.checker.check_model(folder / "model.onnx")
        places = {
            entry.value
            for t in model.graph.initializer
            for entry in t.external_data
            if entry.key == "location"
        }
        assert places == {DATA}
    record = artifact.measurements
    assert record["parity"]["exact_share"] == 1.0
    assert record["integer.mac_share"] == 1.0
    # the bytes beside the file are counted
    assert record["size.compressed_bytes"] == sum(f.stat().st_size for f in artifact.path.glob("model.onnx*"))
    assert {DATA, f"reference/{DATA}"} <= set(artifact.manifest["files"])
    # the same network as in one file
    monkeypatch.setattr(_onnx, "EXTERNAL_ABOVE", 1 << 30)
    whole = small.compressed(tmp_path / "whole", "onnxruntime")
    assert not (whole.path / DATA).exists()
    x = small.patterns(8, seed=4)[0]
    found, expected = artifact.predict(x), whole.predict(x)
    assert isinstance(found, torch.Tensor) and isinstance(expected, torch.Tensor)
    assert torch.equal(found, expected)
    again = bitport.verify(artifact.path).record
    assert again["golden"]["max_difference"] == 0
    assert again["parity"]["exact_share"] == 1.0


def test_they_travel_and_are_checked_with_the_artifact(artifact: bitport.Artifact, tmp_path: Path) -> None:
    x = small.patterns(8, seed=4)[0]
    expected = artifact.predict(x)
    # to a folder whose name is no valid Unicode, which ONNX Runtime can't be told
    place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/moved \xff"))
    shutil.copytree(artifact.path, place)
    moved = bitport.Artifact.load(place)
    found = moved.predict(x)
    assert isinstance(found, torch.Tensor) and isinstance(expected, torch.Tensor)
    assert torch.equal(found, expected)
    assert bitport.verify(place).record["parity"]["exact_share"] == 1.0
    content = bytearray((place / DATA).read_bytes())
    content[-1] ^= 1
    (place / DATA).write_bytes(content)
    with pytest.raises(errors.Tampered, match=DATA):
        bitport.Artifact.load(place)
    (place / DATA).unlink()
    with pytest.raises(errors.Tampered, match=DATA):
        bitport.verify(place)


BIG = """
import functools, json, sys
import torch
torch.set_num_threads(2)
from pathlib import Path
from torch import nn
import bitport
from bitport import api
from bitport.proof import cost
from bitport.recipe import Override, StepSpec
cost.latency = functools.partial(cost.latency, seconds=0.1, rounds=8)
cost.run_memory = lambda *_: 1
api.render = lambda folder: (folder / "report.html").write_text("<!doctype html>")

class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(33_000, 16_384, _weight=torch.zeros(33_000, 16_384))
        self.head = nn.Linear(16_384, 8)
    def forward(self, x):
        return self.head(self.table(x).mean(1))

torch.manual_seed(0)
model = Table().eval()
with torch.no_grad():
    model.table.weight[-8:].normal_()  # the others are pages that nobody wrote
graph = bitport.load(model, torch.zeros(1, 4, dtype=torch.long))
del model
words = {"format": "float32"}
recipe = bitport.Recipe(
    steps=(StepSpec("quantize"),), overrides=(Override(match="table*", weights=words, activations=words),)
)
data = [33_000 - 1 - torch.randint(0, 8, (32, 4))]
artifact = bitport.compress(
    graph, recipe, target="onnxruntime", data=data, metric="mse", out=sys.argv[1]
)
with torch.no_grad():
    real = graph.run(data[0])[0]
del graph
found = artifact.predict(data[0])
record = artifact.measurements
files = {p.name: p.stat().st_size for p in artifact.path.rglob("*") if p.is_file()}
place = artifact.path / "model.onnx.data"
with place.open("r+b") as file:
    file.seek(2**31 + 12345)
    file.write(b"x")
try:
    bitport.Artifact.load(artifact.path)
    tampered = ""
except bitport.Tampered as error:
    tampered = str(error)
print(json.dumps({
    "files": files, "tampered": tampered, "mac_share": record["integer.mac_share"],
    "exact": record["parity"]["exact_share"], "error": float((found - real).abs().max() / real.abs().max()),
}))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)  # it reads and writes some 20 GB
def test_a_network_above_2_gib(tmp_path: Path) -> None:
    """A table of 2.16 GB kept in float, which both the compressed and the reference file hold."""
    if psutil.virtual_memory().available < 16e9 or shutil.disk_usage(tmp_path).free < 12e9:
        pytest.skip("needs 16 GB of memory and 12 GB of disk")
    try:
        done = small.python(BIG, tmp_path / "out", seconds=580)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
    finally:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert found["files"][DATA] > 2**31 > found["files"]["model.onnx"]
    assert found["files"]["graph.pt2"] > 2**31
    assert found["mac_share"] == 1.0
    assert found["exact"] == 1.0
    assert found["error"] < 0.02
    assert DATA in found["tampered"]
