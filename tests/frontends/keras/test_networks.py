"""Networks of Keras become graphs that compute the same, train, and lose the permutes of channels last."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bitport
from bitport.apart import apart
from bitport.graph import Graph
from bitport.graph.archive import load_pt2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("keras")
    scratch = tmp_path_factory.mktemp("answer")
    apart("tests.frontends.keras.made:write", {"folder": str(found), "convert": True}, scratch,
          {"KERAS_BACKEND": "torch"})  # fmt: skip
    return found


def kinds(graph: Graph) -> list[str]:
    return [graph.op(node).kind for node in graph.nodes()]


def held(folder: Path, name: str) -> tuple[torch.Tensor, list[Any]]:
    with np.load(folder / f"{name}.npz") as arrays:
        return torch.from_numpy(arrays["x"]), [arrays[key] for key in arrays.files if key != "x"]


@pytest.mark.parametrize("name", ["cnn", "depthwise", "transformer", "recurrent", "masked"])
def test_outputs_are_those_of_keras(folder: Path, name: str) -> None:
    graph = load_pt2(folder / f"{name}.pt2")
    x, wanted = held(folder, name)
    found = graph.run(x)
    assert len(found) == len(wanted)
    for mine, theirs in zip(found, wanted, strict=True):
        assert np.abs(mine.detach().numpy() - theirs).max() <= 1e-4 * max(1, np.abs(theirs).max())
    assert graph.inputs[0].shape[0] == "batch"
    assert graph.run(x[:1])[0].shape[0] == 1
    module = graph.module().train()
    result = module(x)
    outputs = list(result.values()) if isinstance(result, dict) else [result]
    sum(output.square().sum() for output in outputs).backward()
    learnt = {key for key, parameter in module.named_parameters() if parameter.requires_grad}
    assert not [key for key in learnt if module.get_parameter(key).grad is None]
    assert len(learnt) > len(list(module.parameters())) - 2  # a norm without a gain has one that stays 1


def test_the_convolutions_stay_channels_first(folder: Path) -> None:
    graph = load_pt2(folder / "cnn.pt2")
    assert kinds(graph).count("transpose") == 1  # of the input
    assert kinds(graph).count("batch_norm") == 2
    assert "identity" not in kinds(graph)
    names = [name for name, _ in graph.gm.named_parameters()]
    assert {"stem.weight", "stem_bn.weight", "stem_bn.bias", "inner.bias", "head.weight"} <= set(names)
    assert dict(graph.gm.named_modules())["stem_bn"].momentum == pytest.approx(0.01)
    assert (
        kinds(load_pt2(folder / "depthwise.pt2")).count("transpose") == 2
    )  # of the input, and before Flatten


def test_recurrent_layers_are_torchs_own(folder: Path) -> None:
    graph = load_pt2(folder / "recurrent.pt2")
    assert kinds(graph).count("lstm") == 3
    assert kinds(graph).count("gru") == 1
    assert {spec.name for spec in graph.outputs} == {"head", "lstm"}
    masked = load_pt2(folder / "masked.pt2")
    assert "lstm" not in kinds(masked)
    assert any("a mask reaches" in note for note in masked.notes)


def test_mixed_precision_is_computed_in_float32(folder: Path) -> None:
    graph = load_pt2(folder / "mixed.pt2")
    x, wanted = held(folder, "mixed")
    assert np.abs(graph.run(x)[0].detach().numpy() - wanted[0]).max() < 0.01
    assert {parameter.dtype for parameter in graph.gm.parameters()} == {torch.float32}
    assert any("mixed_float16" in note for note in graph.notes)


def test_a_file_is_loaded_apart_and_compressed_to_integers(folder: Path, tmp_path: Path) -> None:
    x, wanted = held(folder, "cnn")
    graph = bitport.load(folder / "cnn.keras", x)
    assert not {"keras", "tensorflow"} & set(sys.modules)
    assert "image" in graph.examples
    assert np.abs(graph.run(x)[0].detach().numpy() - wanted[0]).max() < 1e-4
    data = [torch.randn(16, 16, 16, 3, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    done = bitport.compress(
        graph, "int8", target="onnxruntime", data=data, out=tmp_path / "out", effort="plain"
    )
    assert done.measurements["integer.mac_share"] == 1.0


@pytest.mark.slow
def test_the_command_line_takes_a_file(folder: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "bitport",
        "inspect",
        str(folder / "cnn.keras"),
        "--target",
        "onnxruntime",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "stem" in done.stdout
