"""Two artifacts side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tests import small
from tests.flow import images
from tests.spread import Separable, rescale
from torch import nn

import bitport
from bitport.cli import cli
from bitport.errors import ArtifactError
from bitport.recipe import Recipe, StepSpec
from bitport.recipe.model import Override

INT8 = {"weights": {"format": "int8"}, "activations": {"format": "int8"}}
STEPS = (
    StepSpec("fold"),
    StepSpec("quantize", {"weights": {"granularity": "tensor"}}),
    StepSpec("calibrate"),
)
NARROW = {"weights": {"format": "int2"}}


def recipe(*overrides: Override) -> Recipe:
    return Recipe(steps=(StepSpec("quantize", INT8),), overrides=overrides, name="tested")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("diff")
    wanted = {
        "plain": ("null", recipe()),
        "narrow": ("null", recipe(Override(match="body", weights=NARROW["weights"]))),
        "openvino": ("openvino", recipe()),
    }
    # no step that keeps what a judge prefers: it may prefer something else for each of them
    return {
        name: small.compressed(root / name, target, recipe=steps, effort="plain").path
        for name, (target, steps) in wanted.items()
    }


def test_an_artifact_is_like_itself(folders: dict[str, Path]) -> None:
    found = bitport.diff(folders["plain"], folders["plain"])
    assert [layer["name"] for layer in found["layers"]]
    assert all(layer["apart_db"] is None and "apart_db_reason" not in layer for layer in found["layers"])
    assert found["worst"] is None
    assert all(output["apart_db"] is None for output in found["outputs"].values())


def test_the_layer_that_was_made_narrow_is_where_they_part(folders: dict[str, Path]) -> None:
    found = bitport.diff(folders["plain"], folders["narrow"])
    layers = {layer["name"]: layer for layer in found["layers"]}
    assert found["worst"] == "body"
    assert layers["stem"]["apart_db"] is None
    assert layers["body"]["apart_db"] < 25
    assert layers["body"]["second"]["weights"].startswith("int2")
    assert layers["body"]["first"]["sqnr_db"] > layers["body"]["second"]["sqnr_db"] + 10
    back = bitport.diff(folders["narrow"], folders["plain"])
    assert back["worst"] != "body"


def test_two_runtimes(folders: dict[str, Path]) -> None:
    found = bitport.diff(folders["plain"], folders["openvino"], small.evaluation())
    assert (found["first.target"], found["second.target"]) == ("null", "openvino")
    assert all(layer["apart_db"] is None or layer["apart_db"] > 30 for layer in found["layers"])
    (output,) = found["outputs"].values()
    assert output["apart_db"] is None or output["apart_db"] > 30


def test_masks_of_infinities_are_equal(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scores = self.a(x).masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
            result: torch.Tensor = self.b(scores.softmax(-1))
            return result

    x = torch.randn(8, 6, 6)
    artifact = bitport.compress(
        bitport.load(Masked(), x), recipe(), target="null", data=[x], out=tmp_path / "out"
    )
    layers = bitport.diff(artifact.path, artifact.path)["layers"]
    assert any(layer["op"] not in ("linear", "softmax") for layer in layers)
    assert all(layer["apart_db"] is None and "apart_db_reason" not in layer for layer in layers)


def test_moved_scales_are_not_compared(tmp_path: Path) -> None:
    torch.manual_seed(0)
    graph, x = bitport.load(rescale(Separable()).eval(), images(2)), [images(16) for _ in range(2)]
    plain, moved = (
        bitport.compress(
            graph,
            Recipe(steps, name=name),
            target="null",
            data=x,
            metric="mse",
            effort="plain",
            out=tmp_path / name,
        )
        for name, steps in (("plain", STEPS), ("moved", (*STEPS, StepSpec("equalize"))))
    )
    assert moved.plan.rescaled and not plain.plan.rescaled
    layers = {layer["name"]: layer for layer in bitport.diff(plain.path, moved.path)["layers"]}
    assert all("scales were moved" in layers[name]["apart_db_reason"] for name in ("stem", "dw1"))
    assert layers["fc"]["apart_db"] is not None  # what leaves the network is comparable again
    assert layers["fc"]["second"]["sqnr_db"] > layers["fc"]["first"]["sqnr_db"]


def test_other_networks_are_refused(tmp_path: Path, folders: dict[str, Path]) -> None:
    x = torch.randn(8, 5)
    graph = bitport.load(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)), x)
    other = bitport.compress(graph, recipe(), target="null", data=[x], out=tmp_path / "other", effort="plain")
    with pytest.raises(ArtifactError, match="of different networks: their inputs differ"):
        bitport.diff(folders["plain"], other.path)


def test_on_the_command_line(folders: dict[str, Path]) -> None:
    done = CliRunner().invoke(cli, ["diff", str(folders["plain"]), str(folders["narrow"])])
    assert done.exit_code == 0, done.output
    assert "loses most against" in done.output and "body" in done.output and "int2" in done.output
    done = CliRunner().invoke(cli, ["diff", str(folders["plain"]), str(folders["narrow"]), "--json"])
    assert json.loads(done.stdout)["worst"] == "body"
    done = CliRunner().invoke(cli, ["diff", str(folders["plain"]), str(folders["plain"].parent)])
    assert done.exit_code == 1 and "Traceback" not in done.output
