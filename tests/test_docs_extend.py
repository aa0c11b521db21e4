"""The how-to pages: their code is put where they say, found as they say, and does what they say."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import small
from tests.test_docs import Block, blocks

import bitport
from bitport import api, registry
from bitport.formats import Format
from bitport.numerics import estimators, ranges
from bitport.recipe import Recipe
from bitport.testing import check_target

SITE = "bitport_docs_example"


def package(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Block]:
    """Install a page's module with the entry point that the page shows; returns the page's blocks."""
    found = blocks(page)
    info = folder / f"{SITE}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {SITE}\nVersion: 1.0\n")
    for block in found:
        if block.name:
            (folder / block.name).write_text(block.text)
            monkeypatch.delitem(sys.modules, block.name.removesuffix(".py"), raising=False)
        if block.text.startswith("[project.entry-points"):
            group = block.text.split('"')[1]
            (info / "entry_points.txt").write_text(
                f"[{group}]\n" + block.text.split("\n", 1)[1].replace('"', "")
            )
    monkeypatch.syspath_prepend(str(folder))
    return found


def test_a_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = package("extend/target.md", tmp_path, monkeypatch)
    assert api.targets()["mini"] == {
        "summary": "convolutions and linear layers, as an example",
        "available": True,
    }
    (check,) = (block for block in found if block.language == "python" and not block.name)
    exec(compile(check.text, "target.md", "exec"), {})
    assert int(capsys.readouterr().out.split()[0]) >= 4
    small.quick(monkeypatch)
    small.without_page(monkeypatch)
    artifact = small.compressed(tmp_path / "out", "mini")
    assert artifact.measurements["parity.exact_share"] == 1
    assert artifact.measurements["integer.mac_share"] == 1


def test_a_target_that_is_wrong_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's promise: check_target raises. A runtime that is one step off must not pass."""
    package("extend/target.md", tmp_path, monkeypatch)
    module = registry.get("targets", "mini")

    def off(self: Any, inputs: Any) -> Any:
        taps: dict[str, torch.Tensor] = {}
        outputs = self.simulator.run(inputs, tap=lambda name, q: taps.setdefault(name, q))
        return outputs, {name: q + 1 for name, q in taps.items()}

    monkeypatch.setattr(module.MiniSession, "run_tapped", off)
    with pytest.raises(AssertionError, match="failures in"):
        check_target("mini")


def test_a_range_estimator(monkeypatch: pytest.MonkeyPatch) -> None:
    code, recipe = blocks("extend/range.md")
    for name in list(estimators.ESTIMATORS):
        monkeypatch.setitem(estimators.ESTIMATORS, name, estimators.ESTIMATORS[name])
    monkeypatch.setitem(estimators.ESTIMATORS, "magnitude", estimators.minmax)
    exec(compile(code.text, "range.md", "exec"), vars(estimators).copy())
    assert "n times the mean magnitude" in ranges.known()["magnitude"]
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(0)).exp()
    histogram = ranges.Histogram()
    histogram.update(values)
    fmt = Format.parse("int8")
    low, high = ranges.estimate(histogram, fmt, {"use": "magnitude", "n": 2.0})
    assert low == histogram.minimum and high == pytest.approx(2 * float(values.mean()), rel=0.02)
    wide = ranges.estimate(histogram, fmt, {"use": "magnitude", "n": 1000})
    assert wide == (histogram.minimum, histogram.maximum)
    int2 = Format.parse("int2")
    ends = [ranges.estimate(histogram, int2, spec) for spec in ("magnitude", "minmax")]
    errors = [ranges.expected_error(histogram, int2, *end) for end in ends]
    assert errors[0] < errors[1]
    rows = ranges.weight_ranges(values.reshape(2, -1), Format.parse("int8 channel(0)"), "magnitude")
    assert float(rows[1][0]) == pytest.approx(4 * float(values[:100_000].mean()), rel=0.02)
    Recipe.parse(recipe.text)
    with pytest.raises(bitport.RecipeError, match="above 0"):
        ranges.estimate(histogram, fmt, {"use": "magnitude", "n": -1.0})


def test_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = package("extend/step.md", tmp_path, monkeypatch)
    recipe = Recipe.parse(found[-1].text)
    small.quick(monkeypatch)
    small.without_page(monkeypatch)
    network = small.tiny()
    with torch.no_grad():
        network.body.weight[0, 0, 0, 0] = 50.0  # one outlier
    graph = bitport.load(network, torch.zeros(1, 1, 8, 8))
    artifact = bitport.compress(graph, recipe, target="null", data=small.calibration(), out=tmp_path / "out")
    assert any("1 outliers of weights were pulled in" in note for note in artifact.measurements["notes"])
    # the network was changed on purpose: plain rounding of the old one is no measure of it
    assert artifact.measurements["plain"] is None
    assert "'tame' changed the network" in artifact.measurements["plain_reason"]
    assert float(network.body.weight.detach().max()) == 50  # the user's network is untouched
    assert [step.use for step in artifact.recipe.steps][:3] == ["fold", "tame", "quantize"]
    with pytest.raises(bitport.RecipeError, match="sigmas"):
        Recipe.parse(found[-1].text.replace("5.0", '"many"'))


def test_weights_alone_keep_a_layer_in_float(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """recipes.md says so."""
    small.quick(monkeypatch)
    small.without_page(monkeypatch)
    text = '[[steps]]\nuse = "quantize"\n[[overrides]]\nmatch = "fc*"\nweights = {format = "float32"}\n'
    recipe = Recipe.parse(text)
    artifact = small.compressed(tmp_path / "out", "null", recipe=recipe)
    assert "fc" in [row["name"] for row in artifact.measurements["integer.float_ops"]]
