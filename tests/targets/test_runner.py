"""`run.py` of an artifact: the same outputs, with the runtime and numpy alone."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.flow import Net, conv, images
from torch import nn
from torch.nn import functional as F

import bitport
from bitport.recipe import StepSpec

ALONE = """
import runpy, sys
for name in ("torch", "bitport", "onnx", "onnx_ir", "onnxscript", "scipy", "safetensors"):
    sys.modules[name] = None  # an import of it fails
script, sys.argv[:] = sys.argv[1], sys.argv[1:]
runpy.run_path(script, run_name="__main__")
"""


ENDS = [("onnxruntime", {"io": "float"}), ("onnxruntime", {"io": "integer"}), ("openvino", {}),
        ("litert", {"io": "float"}), ("litert", {"io": "integer"})]  # fmt: skip


def made(
    folder: Path, target: str = "onnxruntime", options: Any = None, **preprocessing: Any
) -> bitport.Artifact:
    torch.manual_seed(0)
    net = Net(
        lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x)))).mean((2, 3))), a=conv(), b=conv(8, 8), c=nn.Linear(8, 4)
    )
    graph = bitport.load(net, images(4))
    int8 = {"weights": {"format": "int8"}, "activations": {"format": "int8"}}
    steps = (StepSpec("quantize", int8),)
    recipe = bitport.Recipe(steps=steps, target=options or {}, preprocessing=preprocessing, name="tested")
    return bitport.compress(
        graph, recipe, target=target, data=[images(16) for _ in range(2)], out=folder, effort="plain"
    )


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", ALONE, str(folder / "run.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder.parent)


@pytest.fixture(scope="module", params=ENDS, ids=lambda ends: "-".join([ends[0], *ends[1].values()]))
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bitport.Artifact:
    target, options = request.param
    return made(tmp_path_factory.mktemp("made") / "out", target, options)


def test_the_golden_pairs_come_out_without_torch_and_bitport(artifact: bitport.Artifact) -> None:
    done = run(artifact.path)
    assert done.returncode == 0, done.stderr
    assert "100.00 % equal to the golden outputs" in done.stdout and done.stdout.endswith("ok\n")


def test_arrays_of_a_file_give_what_the_artifact_gives(artifact: bitport.Artifact, tmp_path: Path) -> None:
    x = images(5)
    np.savez(tmp_path / "in.npz", x=x.numpy())
    done = run(artifact.path, str(tmp_path / "in.npz"), str(tmp_path / "found.npz"))
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "found.npz") as found:
        assert np.allclose(found["output"], np.asarray(artifact.predict(x)), atol=1e-6)


def test_another_network_is_told(tmp_path: Path) -> None:
    artifact = made(tmp_path / "out")
    with np.load(artifact.path / "sample.npz") as sample:
        arrays = {name: value + (1 if name.startswith("output") else 0) for name, value in sample.items()}
    np.savez(artifact.path / "sample.npz", **arrays)
    done = run(artifact.path)
    assert done.returncode == 1 and "FAILED" in done.stdout


def test_anything_else_is_answered_with_how_it_is_used(tmp_path: Path) -> None:
    done = run(made(tmp_path / "out").path, "one")
    assert done.returncode == 2 and "python run.py INPUTS.npz OUTPUTS.npz" in done.stdout


def test_an_image_becomes_the_input_that_calibration_saw(tmp_path: Path) -> None:
    from PIL import Image

    from bitport.data.images import Preprocessing

    table = {"size": [8, 8], "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    artifact = made(tmp_path / "out", **table)
    spec = importlib.util.spec_from_file_location("run_of_the_artifact", artifact.path / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    wanted = Preprocessing.parse(table).apply(Image.fromarray(image))
    network = module.Network(artifact.path)
    assert np.allclose(network.pixels(image)[0], wanted, atol=1e-6)
    assert network(network.pixels(image))["output"].shape == (1, 4)
