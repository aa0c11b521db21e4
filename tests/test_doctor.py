"""`bitport doctor`: one planted bad layer is found, cured on the runtime, and nothing is claimed where nothing is."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from tests import planted, small
from tests.planted import Planted
from torch import Tensor, nn

import bitport
from bitport import doctor
from bitport.cli import cli
from bitport.doctor import remedies, trials
from bitport.errors import ArtifactError, DataError, GateFailed, RecipeError, Tampered
from bitport.numerics.error import sqnr_db
from bitport.proof.blame import units
from bitport.recipe import Override, Recipe, StepSpec


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    small.quick(monkeypatch)
    small.without_page(monkeypatch)
    monkeypatch.setattr(trials, "SECONDS", 0.02)
    monkeypatch.setattr(trials, "ROUNDS", 8)


def data(seed: int = 1) -> list[Tensor]:
    return list(planted.images(64, seed).split(16))


def compressed(model: nn.Module, recipe: Recipe, out: Path, target: str = "onnxruntime") -> bitport.Artifact:
    graph = bitport.load(model, planted.images(2, 0))
    try:
        return bitport.compress(graph, recipe, target=target, data=data(), out=out)
    except GateFailed as failed:  # worse than plain rounding: just what a doctor is for
        return bitport.Artifact.load(failed.path)


def quality(artifact: bitport.Artifact, model: nn.Module) -> float:
    """dB at the outputs of the runtime, on images that nobody has seen."""
    x = planted.images(64, 99)
    found = artifact.predict(x)
    assert isinstance(found, Tensor)
    with torch.no_grad():
        return sqnr_db(model(x), found)


PLANTED: Mapping[str, Callable[[], Planted]] = {
    "an outlier channel": planted.outlier_channel,
    "a wrong range": planted.wrong_range,
    "a closed gate": planted.closed_gate,
}
REMEDY = {
    "an outlier channel": "weights: a scale per channel",
    "a wrong range": "range of its result: extremes of the data",
    "a closed gate": "result in 16 bits",
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_layer_is_found_and_cured(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the times of networks this small are all noise: let bytes alone be the cost
    monkeypatch.setattr(trials, "NOT_SLOWER", 0.0)
    case = PLANTED[name]()
    artifact = compressed(case.model, case.recipe, tmp_path / "bad")
    content = small.content(artifact.path)
    found = bitport.diagnose(artifact.path, data(), top=2)
    assert small.content(artifact.path) == content
    top = [row["layer"] for row in found.record["culprits"][:2]]
    assert set(case.culprit) & set(top)
    assert [row["what"] for row in found.record["chosen"]] == [REMEDY[name]]
    kept = next(row for row in found.record["remedies"] if row["outcome"] == "kept")
    assert kept["gain_db"] > 15 and kept["bytes"] is not None and kept["ms"] is not None
    assert found.record["confirmed"]["gain_db"] > 15
    assert found.path == artifact.path.with_name(f"{artifact.path.name}-doctor.toml")
    cured = bitport.compress(
        artifact.original, found.path, target="onnxruntime", data=data(), out=tmp_path / "good"
    )
    assert quality(cured, case.model) > quality(artifact, case.model) + 15
    again = found.record["confirmed"]["after_db"]
    assert quality(cured, case.model) == pytest.approx(again, abs=3)
    json.dumps(found.record, allow_nan=False)


# ------------------------------------------------------------------------------------------------ other artifacts


@pytest.mark.slow
def test_weights_alone_are_blamed_where_nothing_else_is_rounded(tmp_path: Path) -> None:
    case = planted.outlier_channel()
    options = {"weights": {"format": "int4", "granularity": "tensor"}, "activations": {"format": "float32"}}
    artifact = compressed(case.model, Recipe(steps=(StepSpec("quantize", options),)), tmp_path / "w4", "null")
    found = bitport.diagnose(artifact.path, data(), top=1, out=tmp_path / "w4.toml")
    assert found.record["culprits"][0]["layer"] == "middle" and found.record["culprits"][0]["loud"] == [
        "weights"
    ]
    assert all("result" not in row["what"] for row in found.record["remedies"])
    assert found.record["confirmed"]["gain_db"] > 10 and found.path == tmp_path / "w4.toml"
    row = next(row for row in found.record["remedies"] if row["outcome"] == "kept")
    assert row["bytes"] is None and "simulation" in row["bytes_reason"]


def test_nothing_is_written_where_nothing_is_lost(tmp_path: Path) -> None:
    model = planted.Chain()
    with torch.no_grad():
        for parameter in model.parameters():  # on the grid of int8 already
            parameter.copy_(torch.randint(-127, 128, parameter.shape).float() / 128)
            parameter.view(-1)[0] = 127 / 128
    options = {
        "weights": {"format": "int8", "granularity": "tensor"},
        "activations": {"format": "float32"},
    }
    artifact = compressed(
        model.eval(), Recipe(steps=(StepSpec("quantize", options),)), tmp_path / "exact", "null"
    )
    found = bitport.diagnose(artifact.path, data())
    assert found.recipe is None and found.path is None and not list(tmp_path.glob("*.toml"))
    assert "nothing to cure" in found.record["sentence"]
    assert all(row["share"] == 0 for row in found.record["culprits"])


def test_a_layer_whose_remedies_are_too_dear_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "PRICE_DB", 1e6)
    monkeypatch.setattr(doctor, "FREE_BYTES", -1.0)  # everything has a price
    monkeypatch.setattr(doctor, "WORTH_DB", 1e5)
    case = planted.closed_gate()
    artifact = compressed(case.model, case.recipe, tmp_path / "gate")
    found = bitport.diagnose(artifact.path, data(), top=1)
    assert found.recipe is None and not list(tmp_path.glob("*.toml"))
    assert "Nothing was written" in found.record["sentence"]
    assert {row["outcome"] for row in found.record["remedies"]} <= {"no gain", "too dear", "not possible"}


def test_a_gain_that_isnt_confirmed_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = planted.closed_gate()
    artifact = compressed(case.model, case.recipe, tmp_path / "gate", "null")
    monkeypatch.setattr(doctor._Doctor, "_confirm", lambda *_: {"gain_db": 0.4, "metric": None})
    found = bitport.diagnose(artifact.path, data(), top=1)
    assert found.recipe is None and not list(tmp_path.glob("*.toml"))
    assert "it gains too little" in found.record["sentence"]


def test_other_data_is_told_apart_from_remedies(tmp_path: Path) -> None:
    case = planted.closed_gate()
    graph = bitport.load(case.model, planted.images(2, 0))
    narrow = [0.1 * batch for batch in data()]
    artifact = bitport.compress(graph, case.recipe, target="null", data=narrow, out=tmp_path / "narrow")
    found = bitport.diagnose(artifact.path, data(5), evaluation=data(6), top=1)
    assert found.record["same_recipe_gain_db"] > 1
    assert found.record["confirmed"] is None or found.record["confirmed"]["metric"]["name"] == "agreement"


# ------------------------------------------------------------------------------------------------ refused


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        small.quick(patch)
        small.without_page(patch)
        case = planted.closed_gate()
        return compressed(case.model, case.recipe, tmp_path_factory.mktemp("doctor") / "gate", "null").path


def test_what_cant_be_treated_is_refused(simulated: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="top = 0"):
        bitport.diagnose(simulated, data(), top=0)
    with pytest.raises(RecipeError, match="metric needs evaluation"):
        bitport.diagnose(simulated, data(), metric="top1")
    with pytest.raises(DataError, match="one sample"):
        bitport.diagnose(simulated, [planted.images(1, 0)], out=tmp_path / "a.toml")
    with pytest.raises(DataError):
        bitport.diagnose(simulated, [], out=tmp_path / "a.toml")
    with pytest.raises(DataError):
        bitport.diagnose(simulated, str(tmp_path / "missing.npz"), out=tmp_path / "a.toml")
    with pytest.raises(ArtifactError, match="would lie in the artifact"):
        bitport.diagnose(simulated, data(), out=simulated / "a.toml")
    with pytest.raises(ArtifactError, match=r"must end in \.toml"):
        bitport.diagnose(simulated, data(), out=tmp_path / "a.txt")
    (tmp_path / "mine.toml").write_text("mine")
    with pytest.raises(ArtifactError, match="exists already"):
        bitport.diagnose(simulated, data(), out=tmp_path / "mine.toml")
    assert (tmp_path / "mine.toml").read_text() == "mine" and [p.name for p in tmp_path.iterdir()] == [
        "mine.toml"
    ]


def test_damaged_and_float_artifacts_are_refused(tmp_path: Path) -> None:
    plain = small.compressed(tmp_path / "plain", recipe="float")
    with pytest.raises(ArtifactError, match="nothing in 'plain' is quantized"):
        bitport.diagnose(plain.path, small.calibration())
    (plain.path / "plan.json").write_text("{}")
    with pytest.raises(Tampered, match=r"plan\.json"):
        bitport.diagnose(plain.path, small.calibration())
    with pytest.raises(ArtifactError):
        bitport.diagnose(tmp_path / "nowhere", small.calibration())


# ------------------------------------------------------------------------------------------------ the table


@pytest.fixture(scope="module")
def cases(simulated: Path) -> tuple[Recipe, dict[str, remedies.Case]]:
    opened = bitport.Artifact.load(simulated)
    every = units(opened.graph, opened.plan)
    return opened.recipe, {unit.name: remedies.Case(unit, opened.plan) for unit in every}


def test_every_remedy_makes_a_valid_recipe_or_none(cases: tuple[Recipe, dict[str, remedies.Case]]) -> None:
    recipe, every = cases
    used = set()
    for case in every.values():
        for remedy in remedies.REMEDIES:
            changed = remedy.change(recipe, case)
            if changed is not None:
                assert changed != recipe
                assert Recipe.parse(changed.to_toml()) == changed
                used.add(remedy.what)
    # these are how the network is stored already
    assert {remedy.what for remedy in remedies.REMEDIES} - used == {
        "weights: a scale per channel",
        "weights: range of the extremes",
        "scales moved between layers (equalize)",
        "range of its result: least squared error",
        "ranges of all results: least squared error",
        "result asymmetric",
    }


def test_an_input_is_mended_by_all_ranges_or_its_readers(
    cases: tuple[Recipe, dict[str, remedies.Case]],
) -> None:
    recipe, case = cases[0], cases[1]["x"]
    assert case.operators == [] and case.readers()[0] == "stem"
    found = [r.what for r in remedies.REMEDIES if r.change(recipe, case) is not None]
    assert found == ["ranges of all results: extremes", "this layer and those that read it in float"]


def test_names_are_matched_as_they_are() -> None:
    assert remedies.pattern("block[0].a*?") == "block[[]0].a[*][?]"
    recipe = remedies._with(Recipe(), ["relu#2", "a[1]"], weights={"format": "float32"})
    assert recipe is not None and [o.match for o in recipe.overrides] == ["relu#2", "a[[]1]"]


def test_the_cheaper_remedy_wins_unless_the_dear_one_gains_its_price() -> None:
    def tried(gain: float, size: float, order: int) -> doctor._Tried:
        row = {"gain_db": gain, "bytes": size, "of_bytes": 1000, "ms": 0.0, "of_ms": 1.0, "outcome": "helps"}
        return doctor._Tried(row, order)

    free, dear = tried(10.0, 0, 0), tried(15.0, 100, 1)  # a tenth more bytes ask for 6 dB
    assert doctor._choose([free, dear]) is free and free.row["outcome"] == "kept"
    assert dear.price == pytest.approx(6.0)
    free, dear = tried(10.0, 5, 0), tried(17.0, 100, 1)
    assert free.price == 0.0 and doctor._choose([free, dear]) is dear
    slow = replace(tried(5.0, 0, 0), slower=True)
    slow.row["ms"] = 0.2
    assert slow.price == pytest.approx(9.0)
    assert doctor._choose([]) is None


# ------------------------------------------------------------------------------------------------ the command


MODULE = """
from tests import planted
def data(): return list(planted.images(64, 1).split(16))
def judged(): return list(planted.images(32, 7).split(16))
"""


def run(*words: str, code: int = 0) -> Result:
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    return done


def test_the_command_ranks_tries_and_writes(
    simulated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "doctor_data.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    found: list[doctor.Diagnosis] = []
    real = doctor.diagnose

    def listening(*given: Any, **options: Any) -> doctor.Diagnosis:
        found.append(real(*given, **options))
        return found[-1]

    monkeypatch.setattr(doctor, "diagnose", listening)
    data_words = ("--data", "doctor_data:data", "--eval", "doctor_data:judged")
    words = ("doctor", str(simulated), *data_words, "--top", "1")
    done = run(*words, "--out", "better.toml")
    text = " ".join(done.stdout.split())
    assert "gate on null" in text and "1 gate sigmoid" in text and "result in 16 bits" in text
    assert "kept" in text and "confirmed:" in text and "recipe better.toml" in text and "✓" in text
    assert Recipe.load(tmp_path / "better.toml").overrides[-1].match == "gate"
    monkeypatch.setattr(doctor, "diagnose", lambda *_, **__: found[0])
    document = json.loads(run(*words, "--json").stdout)
    assert (
        document["culprits"][0]["layer"] == "gate" and document["confirmed"]["metric"]["name"] == "agreement"
    )
    monkeypatch.setattr(doctor, "diagnose", real)
    failed = json.loads(run(*words, "--out", "better.toml", "--json", code=1).stdout)
    assert failed["error"]["type"] == "ArtifactError" and "exists already" in failed["error"]["message"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "Missing option '--data'"),
        (("--data", "d.npz", "--metric", "top1"), "--metric needs --eval"),
        (("--data", "d.npz", "--out", "x.json"), "must end in .toml"),
        (("--data", "d.npz", "--top", "0"), "--top"),
    ],
)
def test_wrong_usage(simulated: Path, words: tuple[str, ...], said: str) -> None:
    assert said in " ".join(run("doctor", str(simulated), *words, code=2).output.split())


def test_overrides_of_a_shared_scale_are_all_replaced(tmp_path: Path) -> None:
    """Whatever a recipe says of one tensor of a tie holds for all, the last one in the network wins."""

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Any:
            return self.c(torch.cat([self.a(x), self.b(x)], 1))

    torch.manual_seed(0)
    bad: dict[str, Any] = {"range": {"use": "fixed", "low": -0.01, "high": 0.01}}
    recipe = Recipe(steps=(StepSpec("quantize"),), overrides=(Override("b", activations=bad),))
    artifact = compressed(Joined().eval(), recipe, tmp_path / "joined", "null")
    found = bitport.diagnose(artifact.path, data(), top=2)
    # the bias of the layer behind has learned to live with them: its own share isn't small either
    assert {row["layer"] for row in found.record["culprits"][:2]} & {"a", "b"}
    assert found.record["confirmed"]["gain_db"] > 20
