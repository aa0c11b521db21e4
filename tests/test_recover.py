"""An artifact without its float original: stored in other formats, or as floats again."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from tests import small
from tests.flow import Net, conv
from torch import Tensor, nn
from torch.nn import functional as F

import bitport
from bitport import artifact as artifacts
from bitport import records
from bitport.artifact import STATISTICS, Artifact, write_manifest
from bitport.errors import ArtifactError, DataError, GateFailed, Tampered, TargetError
from bitport.graph import Graph
from bitport.graph.archive import save_pt2
from bitport.numerics.codes import decode, encode, fit
from bitport.numerics.error import sqnr_db
from bitport.recipe import Recipe, StepSpec

FLOAT = {"format": "float32"}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    small.quick(monkeypatch)
    small.without_page(monkeypatch)


def recipe(weights: Mapping[str, Any], activations: Mapping[str, Any] | None = None) -> Recipe:
    """Of rounding alone: what corrects a network as well leaves recovery nothing to do."""
    options = {"weights": weights, "activations": activations or {}}
    steps = (StepSpec("quantize", options), StepSpec("calibrate", {}))
    return Recipe(steps=steps, name="mine", effort="plain")


FOUR = recipe({"format": "int4"}, FLOAT)


def plain_files(path: Path) -> dict[str, Any]:
    """The facts of a manifest, without the checksums that `write_manifest` makes."""
    manifest = records.load(path / artifacts.MANIFEST)
    return {key: value for key, value in manifest.items() if key not in ("files", "versions")}


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        small.quick(patch)
        small.without_page(patch)
        return small.compressed(tmp_path_factory.mktemp("eight") / "out").path


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory, eight: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        small.quick(patch)
        small.without_page(patch)
        return again(eight, FOUR, tmp_path_factory.mktemp("four") / "out").path


def again(source: Path, chosen: Recipe | str, out: Path, **more: Any) -> Artifact:
    given: dict[str, Any] = {"data": small.calibration(), "evaluation": small.evaluation(), **more}
    return bitport.requantize(source, chosen, out=out, **given)


# ------------------------------------------------------------------------------------------------ requantize


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, {"format": "int4", "granularity": "group", "group": 8}),
        (
            {"format": "int8", "granularity": "tensor", "symmetric": False},
            {"format": "int8", "granularity": "channel", "symmetric": True},
        ),
        ({"format": "codebook(16)"}, {"format": "nf4", "granularity": "group", "group": 5}),
    ],
    ids=str,
)
def test_the_weights_are_those_that_the_codes_stand_for(
    tmp_path: Path, eight: Path, before: dict[str, Any] | None, after: dict[str, Any]
) -> None:
    source = small.compressed(tmp_path / "first", recipe=recipe(before, FLOAT)).path if before else eight
    first, second = Artifact.load(source), again(source, recipe(after, FLOAT), tmp_path / "second")
    for name in ("stem.weight", "body.weight", "fc.weight"):
        (tie,) = (tie for tie in second.plan.ties.values() if tie.members == (name,))
        if "symmetric" in after:
            assert tie.format.symmetric is after["symmetric"]
        stored = first.graph.tensor(name).detach()
        grid = fit(stored, tie.format, tie.range)
        assert torch.equal(second.graph.tensor(name), decode(encode(stored, grid), grid))
        # `original` is what was stored, not what had been trained
        assert torch.equal(second.original.tensor(name), stored)


def test_origin_and_the_extra_loss(tmp_path: Path, eight: Path) -> None:
    first = Artifact.load(eight)
    found = again(eight, recipe({"format": "ternary"}, FLOAT), tmp_path / "out", metric="top1").measurements
    assert found["origin"] == {
        "recipe": "int8", "target": "null", "formats": ["int8 symmetric channel(0)"],
        "metric": "top1", "drop": first.measurements["task.drop"],
    }  # fmt: skip
    assert any(note.startswith("re-quantized from int8 on null (int8 symmetric") for note in found["notes"])
    # the side that is called float is the artifact as floats
    x, y = (torch.cat(parts) for parts in zip(*small.evaluation(), strict=True))
    right = (first.graph.run(x)[0].argmax(1) == y).float().mean()
    assert found["task.float"] == pytest.approx(float(right))
    assert found["task.drop"] == pytest.approx(found["task.float"] - found["task.runtime"])
    assert Artifact.load(tmp_path / "out").manifest["origin"] == found["origin"]


def test_the_float_original_is_not_looked_at(tmp_path: Path, eight: Path, four: Path) -> None:
    """Whatever `reference/` says, the result has the same bytes."""
    honest = Artifact.load(four)
    other = tmp_path / "other"
    artifacts.copy_besides_report(eight, other)
    (other / "report.html").write_text("<!doctype html>")
    graph = Artifact(other).original
    for name in ("stem.weight", "body.weight", "fc.weight"):
        graph.set_tensor(name, torch.zeros_like(graph.tensor(name)))
    place = other / "reference" / "graph.pt2"
    place.unlink()  # it shares its bytes with the artifact
    save_pt2(graph, place)
    write_manifest(other, plain_files(other))
    assert not torch.equal(
        Artifact.load(other).original.tensor("fc.weight"), honest.original.tensor("fc.weight")
    )
    found = again(other, FOUR, tmp_path / "found")
    wanted = small.content(honest.path)
    for name, content in small.content(found.path).items():
        # a run that is repeated on the same numbers gives the same bytes, whatever the original was
        if name not in ("measurements.json", "report.html", "manifest.json"):
            assert content == wanted[name], name


def test_to_another_runtime_and_narrower(tmp_path: Path, eight: Path) -> None:
    chosen = recipe({"format": "int4", "granularity": "channel", "range": "mse"})
    found = again(eight, chosen, tmp_path / "out", target="onnxruntime", max_drop=1.0)
    record = found.measurements
    assert record["target"] == "onnxruntime" and record["origin.target"] == "null"
    assert record["parity.local"]["exact_share"] == 1.0
    assert found.predict(small.patterns(4)[0]).shape == (4, 3)  # type: ignore[union-attr]


def test_a_gate_of_its_own(tmp_path: Path, eight: Path) -> None:
    with pytest.raises(GateFailed):
        again(
            eight,
            recipe({"format": "binary", "granularity": "tensor"}, FLOAT),
            tmp_path / "out",
            max_drop=0.0,
        )
    assert not (tmp_path / "out").exists()
    with pytest.raises(TargetError, match="it holds"):
        again(eight, recipe({"format": "nf4"}), tmp_path / "out", target="onnxruntime")


def test_it_can_be_done_over_and_over(tmp_path: Path, four: Path) -> None:
    back = again(four, recipe({"format": "int8"}, FLOAT), tmp_path / "eight")
    assert back.measurements["origin.formats"] == ["int4 symmetric channel(0)"]
    # 15 levels lie on a grid of 255 within half a step of it
    for name in ("stem.weight", "body.weight", "fc.weight"):
        assert sqnr_db(Artifact.load(four).graph.tensor(name), back.graph.tensor(name)) > 35


def test_what_can_not_be_taken_up(tmp_path: Path, eight: Path) -> None:
    plain = small.compressed(tmp_path / "float", recipe="float")
    with pytest.raises(ArtifactError, match="nothing in 'float' is quantized: compress it with the recipe"):
        again(plain.path, "int8", tmp_path / "out")
    with pytest.raises(ArtifactError):
        again(tmp_path, "int8", tmp_path / "out")
    spoilt = tmp_path / "spoilt"
    artifacts.copy_besides_report(eight, spoilt)
    (spoilt / "plan.json").unlink()
    (spoilt / "plan.json").write_text((eight / "plan.json").read_text().replace("0", "1", 1))
    (spoilt / "report.html").write_text("<!doctype html>")
    for act in (
        lambda: again(spoilt, "int8", tmp_path / "out"),
        lambda: bitport.dequantize(spoilt, small.calibration()),
    ):
        with pytest.raises(Tampered, match=r"plan\.json"):
            act()
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ dequantize


def trained(model: nn.Module, steps: int = 60) -> nn.Module:
    x, y = small.patterns(192)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for step in range(steps):
        some = slice(32 * (step % 6), 32 * (step % 6) + 32)
        optimizer.zero_grad()
        F.cross_entropy(model(x[some]), y[some]).backward()
        optimizer.step()
    return model.eval()


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)
    )


def depthwise() -> nn.Module:
    return nn.Sequential(
        conv(1, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8, groups=8), nn.BatchNorm2d(8), nn.ReLU(),
        conv(8, 16, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 3),
    )  # fmt: skip


def upsampling() -> nn.Module:
    return nn.Sequential(
        conv(1, 8, stride=2), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, 2), nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 2, 2, groups=2), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, 3),
    )  # fmt: skip


NETS: dict[str, Callable[[], nn.Module]] = {
    "cnn": small.Tiny, "mlp": mlp, "depthwise": depthwise, "conv_transpose": upsampling,
}  # fmt: skip


@functools.cache
def network(name: str) -> Graph:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return bitport.load(trained(NETS[name]()), torch.zeros(2, 1, 8, 8))


SEEN = list(small.patterns(128, seed=4)[0].split(32))


@pytest.fixture(
    scope="module",
    params=[("cnn", "int3"), ("mlp", "ternary"), ("depthwise", "int3"), ("conv_transpose", "int3")],
    ids=" ".join,
)
def lossy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Graph, Path]:
    """(float network, artifact)"""
    name, weights = request.param
    graph, out = network(name), tmp_path_factory.mktemp(name) / "out"
    with pytest.MonkeyPatch.context() as patch:
        small.quick(patch)
        small.without_page(patch)
        chosen = recipe({"format": weights, "range": "mse"}, FLOAT)
        return graph, bitport.compress(graph, chosen, target="null", data=SEEN, out=out).path


def test_corrected_floats_are_nearer_to_the_original(lossy: tuple[Graph, Path]) -> None:
    graph, path = lossy
    x = small.patterns(256, seed=9)[0]
    real = graph.run(x)[0]
    before, after = (
        sqnr_db(real, found.run(x)[0].detach())
        for found in (bitport.dequantize(path, correct=False), bitport.dequantize(path, SEEN))
    )
    assert after > before + 1, (before, after)


def test_the_moments_of_every_layer_are_restored(lossy: tuple[Graph, Path]) -> None:
    _, path = lossy
    corrected, reference = bitport.dequantize(path, SEEN), Artifact.load(path).subject().reference
    layers = set(artifacts.read_statistics(path))

    def moments(of: Graph) -> dict[str, tuple[Tensor, Tensor]]:
        values: dict[str, list[Tensor]] = {}
        for x in SEEN:
            of.run(x, on_value=lambda node, v: values.setdefault(of.name(node), []).append(v))
        whole = {name: torch.cat(values[name]).movedim(1, 0).flatten(1) for name in layers}
        return {name: (rows.mean(1), rows.std(1, unbiased=False)) for name, rows in whole.items()}

    with torch.no_grad():
        wanted, found = moments(reference), moments(corrected)
    assert len(layers) >= 3
    for name, (mean, deviation) in wanted.items():
        gain = deviation / found[name][1]
        # what is off by more than a factor of 2 is left at that
        near = (gain > 0.999) & (gain < 1.001)
        assert float(near.float().mean()) > 0.8, (name, gain)
        torch.testing.assert_close(found[name][0][near], mean[near], atol=1e-3, rtol=1e-3)


def test_plain_floats_are_the_stored_weights(eight: Path) -> None:
    opened, plain = Artifact.load(eight), bitport.dequantize(eight, correct=False)
    x = small.patterns(8)[0]
    assert torch.equal(plain.run(x)[0], opened.graph.run(x)[0])
    corrected = bitport.dequantize(eight, small.calibration())
    assert not torch.equal(corrected.run(x)[0], plain.run(x)[0])
    assert corrected.notes[-1] == "means and deviations of 3 layers were set to those of the float network"
    # the artifact's own graph is left alone
    assert torch.equal(opened.graph.run(x)[0], plain.run(x)[0])


def test_a_tied_weight_is_left_as_it_is(tmp_path: Path) -> None:
    first, second = nn.Linear(12, 12), nn.Linear(12, 12)
    second.weight = first.weight
    graph = bitport.load(Net(lambda m, x: m.b(F.relu(m.a(x))), a=first, b=second).eval(), torch.randn(2, 12))
    data = [torch.randn(32, 12)]
    bitport.compress(graph, recipe({"format": "int3"}, FLOAT), target="null", data=data, out=tmp_path / "out")
    plain, corrected = (
        bitport.dequantize(tmp_path / "out", correct=False),
        bitport.dequantize(tmp_path / "out", data),
    )
    assert torch.equal(corrected.tensor("a.weight"), plain.tensor("a.weight"))
    assert corrected.tensor("a.weight") is corrected.tensor("b.weight")


def test_what_comes_back_is_a_network_like_any_other(tmp_path: Path, eight: Path) -> None:
    graph = bitport.dequantize(eight, small.calibration())
    save_pt2(graph, tmp_path / "floats.pt2")
    loaded = bitport.load(tmp_path / "floats.pt2")
    x = small.patterns(8)[0]
    assert torch.equal(loaded.run(x)[0], graph.run(x)[0])
    made = bitport.compress(
        loaded,
        "int8",
        target="null",
        data=small.calibration(),
        evaluation=small.evaluation(),
        out=tmp_path / "out",
    )
    assert made.measurements["task.float"] > 0.9


def test_data_is_needed_and_must_fit(tmp_path: Path, eight: Path) -> None:
    with pytest.raises(
        ArtifactError, match=r"takes data like that of the calibration: give data=, or correct=False"
    ):
        bitport.dequantize(eight)
    with pytest.raises(DataError, match="input 'x' of batch 0: expected shape"):
        bitport.dequantize(eight, [torch.randn(4, 3)])
    with pytest.raises(DataError, match="the calibration data is empty: give at least one batch"):
        bitport.dequantize(eight, [])


BODY = {"stem.mean": torch.zeros(8), "stem.deviation": torch.ones(8)}


@pytest.mark.parametrize(
    "forged",
    [
        b"", b"{}", b"\x08" + bytes(30),
        save({"stem.mean": torch.zeros(8)}),
        save({"stem.mean": torch.zeros(8), "stem.deviation": torch.ones(7)}),
        save({"stem.mean": torch.zeros(3), "stem.deviation": torch.ones(3)}),
        save({"stem.mean": torch.zeros(8, 1), "stem.deviation": torch.ones(8, 1)}),
        save({"stem.mean": torch.full((8,), torch.nan), "stem.deviation": torch.ones(8)}),
        save({"stem.mean": torch.zeros(8), "stem.deviation": -torch.ones(8)}),
        save({"stem.mean": torch.zeros(8).int(), "stem.deviation": torch.ones(8).int()}),
        None,
    ],
)  # fmt: skip
def test_malformed_statistics_are_refused(tmp_path: Path, eight: Path, forged: bytes | None) -> None:
    spoilt = tmp_path / "spoilt"
    artifacts.copy_besides_report(eight, spoilt)
    (spoilt / "report.html").write_text("<!doctype html>")
    (spoilt / STATISTICS).unlink()
    if forged is not None:
        (spoilt / STATISTICS).write_bytes(forged)
    write_manifest(spoilt, plain_files(spoilt))
    with pytest.raises(
        ArtifactError,
        match=rf"{STATISTICS} (is malformed at|can't be read).*: (compress the network|make the artifact) again",
    ):
        bitport.dequantize(spoilt, small.calibration())


def test_statistics_are_those_of_the_float_network(eight: Path) -> None:
    opened = Artifact.load(eight)
    found = artifacts.read_statistics(eight)
    reference = opened.subject().reference
    x = torch.cat(small.calibration())
    values: dict[str, Tensor] = {}
    with torch.no_grad():
        reference.run(x, on_value=lambda node, value: values.setdefault(reference.name(node), value))
    assert found.keys() == {"stem", "body", "fc"}
    for name, (mean, deviation) in found.items():
        rows = values[name].movedim(1, 0).flatten(1)
        torch.testing.assert_close(mean, rows.mean(1), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(deviation, rows.std(1, unbiased=False), atol=1e-5, rtol=1e-5)
    assert json.loads((eight / "manifest.json").read_text())["files"].keys() >= {STATISTICS}
