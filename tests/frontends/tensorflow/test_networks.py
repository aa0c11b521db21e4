"""SavedModels and `.tflite` files become graphs that compute the same; most of it is run by `make test-slow` alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.flow import Net, conv, images, prepare, ship
from torch import nn
from torch.nn import functional as F

import bitport
from bitport.apart import apart
from bitport.errors import LoadError, MissingDependency, UnsafeFile

BACKEND = {"KERAS_BACKEND": "tensorflow"}


def made(factory: pytest.TempPathFactory, function: str) -> Path:
    found = factory.mktemp(function)
    options: dict[str, Any] = {"folder": str(found)}
    apart(f"tests.frontends.tensorflow.made:{function}", options, factory.mktemp("answer"), BACKEND)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory, "write")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory, "hostile")


def difference(graph: Any, place: Path) -> float:
    """The largest difference, in parts of the largest output."""
    with np.load(place.with_suffix(".npz")) as arrays:
        found = graph.run(torch.from_numpy(arrays["x"]))[0].detach().numpy()
        return float(np.abs(found - arrays["y"]).max() / max(1, np.abs(arrays["y"]).max()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cnn", "depthwise", "transformer", "lstm", "gru"])
def test_a_saved_model_computes_the_same(folder: Path, name: str) -> None:
    graph = bitport.load(folder / name)
    assert difference(graph, folder / name) <= 1e-4
    assert graph.inputs[0].shape[0] == "batch"
    assert not any("StatefulPartitionedCall" in graph.name(node) for node in graph.nodes())
    if name == "lstm":
        assert [graph.op(node).kind for node in graph.nodes()].count("lstm") == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cnn", "depthwise", "transformer"])
def test_a_tflite_file_computes_the_same(folder: Path, name: str) -> None:
    graph = bitport.load(folder / f"{name}_float.tflite")
    assert difference(graph, folder / f"{name}_float.tflite") <= 1e-4
    assert graph.inputs[0].shape[0] == "batch"


@pytest.mark.slow
def test_an_8_bit_tflite_file_gives_its_float_network(folder: Path, tmp_path: Path) -> None:
    graph = bitport.load(folder / "cnn_int8.tflite")
    assert any("the file is quantized" in note for note in graph.notes)
    assert "other:round" not in [graph.op(node).kind for node in graph.nodes()]
    assert difference(graph, folder / "cnn_int8.tflite") < 0.1
    data = [torch.randn(16, 16, 16, 3, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    done = bitport.compress(
        graph, "int8", target="onnxruntime", data=data, out=tmp_path / "out", effort="plain"
    )
    assert done.measurements["integer.mac_share"] == 1.0


@pytest.mark.slow
def test_an_8_bit_tflite_file_keeps_its_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net(
        lambda m, x: m.c(F.max_pool2d(F.relu(m.b(F.relu(m.a(x)))), 2).flatten(1)),
        a=conv(3, 8, stride=2), b=conv(8, 8, groups=8), c=nn.Linear(32, 4),
    )  # fmt: skip
    first = prepare(net, [images(64)], "litert", weights={"granularity": "channel"})
    first.target.export(first.work, first.plan, tmp_path)
    x = images(64)
    (wanted,) = first.target.open(tmp_path).run((x,))
    graph = bitport.load(tmp_path / "model.tflite")
    options = {"weights": {"granularity": "channel", "range": "given"}, "activations": {"range": "given"}}
    again = ship(prepare(graph, [x], "litert", **options), x)
    assert torch.equal(again.outputs[0], wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "told"), [("python", "PyFunc"), ("reads", "ReadFile"), ("writes", "WriteFile")]
)
def test_a_program_is_refused_before_it_runs(hostile: Path, name: str, told: str) -> None:
    with pytest.raises(UnsafeFile, match=told):
        bitport.load(hostile / name)
    assert not (hostile / "written").exists()


@pytest.mark.slow
def test_damaged_files_are_told(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "saved_model.pb").write_bytes((folder / "cnn" / "saved_model.pb").read_bytes()[:5000])
    with pytest.raises(LoadError):
        bitport.load(tmp_path)
    data = (folder / "cnn_float.tflite").read_bytes()
    for length in (8, 2000, len(data) // 2):
        path = tmp_path / "cut.tflite"
        path.write_bytes(data[:length])
        with pytest.raises(LoadError):
            bitport.load(path)


def test_what_is_no_tflite_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.tflite"
    for data in (b"", b"TFL3", bytes(100)):
        path.write_bytes(data)
        with pytest.raises(LoadError, match=r"no \.tflite file"):
            bitport.load(path)


def test_links_in_a_folder_are_told(tmp_path: Path) -> None:
    (tmp_path / "saved_model.pb").write_bytes(b"")
    (tmp_path / "variables").symlink_to("/etc")
    with pytest.raises(LoadError, match="link"):
        bitport.load(tmp_path)


def test_a_tensorflow_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "saved_model.pb").write_bytes(b"")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"bitport\[tensorflow\]"):
        bitport.load(tmp_path)
