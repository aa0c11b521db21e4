"""`bitport requantize` and `bitport dequantize`, as a user types them, and what `bitport list` says of formats."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tests import small
from tests.commands import document, run
from torch import Tensor

import bitport
from bitport import formats, store
from bitport.errors import ArtifactError
from bitport.formats import Format

MODULE = """
from tests import small
from tests.commands import document, run
def data(): return small.calibration()
def judged(): return small.evaluation()
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_data.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    small.quick(monkeypatch)
    return tmp_path


# ------------------------------------------------------------------------------------------------ requantize


def test_requantize_stores_other_formats_and_says_where_it_comes_from(here: Path) -> None:
    small.compressed(here / "first")
    before = small.content(here / "first")
    options = ("--data", "my_data:data", "--eval", "my_data:judged", "--metric", "top1", "--max-drop", "0.2")
    done = run("requantize", "first", "--recipe", "int4-weights", *options, "--out", "second")
    assert "int4-weights on null" in done.stdout and "second/report.html" in done.stdout
    record = bitport.Artifact.load(here / "second").measurements.record
    assert record["target"] == "null"
    assert record["origin"]["recipe"] == "int8"
    assert record["origin"]["drop"] == bitport.Artifact.load(here / "first").measurements["task.drop"]
    assert "int4 group(32,0)" in {row["format"] for row in record["storage"]}
    assert small.content(here / "first") == before


def test_requantize_for_another_runtime_and_a_missed_gate(here: Path) -> None:
    small.compressed(here / "first")
    options = ("--recipe", "w4a8", "--target", "onnxruntime", "--data", "my_data:data", "--out", "second")
    record = document(
        "requantize", "first", *options, "--eval", "my_data:judged", "--max-drop", "0.0001", code=3
    )
    assert record["target"] == "onnxruntime" and record["task"]["verdict"] != "holds"
    assert (here / "second.rejected" / "model.onnx").is_file() and not (here / "second").exists()


def test_requantize_prepares_images_as_the_artifact_did(here: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    (here / "photos" / "a").mkdir(parents=True)
    for index in range(32):
        pixels = np.random.default_rng(index).integers(0, 255, (8, 8), np.uint8)
        image.fromarray(pixels).save(here / "photos" / "a" / f"{index}.png")
    recipe = bitport.Recipe(
        steps=bitport.Recipe.preset("int8").steps, preprocessing={"color": "gray", "size": (8, 8), "std": 0.5}
    )
    small.compressed(here / "first", recipe=recipe, data="photos", evaluation=None)
    run("requantize", "first", "--recipe", "int8-weights", "--data", "photos", "--out", "second")
    assert bitport.Artifact.load(here / "second").recipe.preprocessing == recipe.preprocessing
    run("dequantize", "first", "--data", "photos", "--out", "floats.pt2")


def test_an_artifact_without_integers_is_refused(here: Path) -> None:
    small.compressed(here / "first", recipe="float")
    options = ("--recipe", "int8", "--data", "my_data:data", "--out", "second")
    assert (
        "nothing in 'first' is quantized"
        in document("requantize", "first", *options, code=1)["error"]["message"]
    )
    found = document("dequantize", "first", "--no-correct", "--out", "floats.pt2", code=1)
    assert "nothing in 'first' is quantized" in found["error"]["message"]
    assert {path.name for path in here.iterdir()} <= {"__pycache__", "first", "my_data.py"}


# ------------------------------------------------------------------------------------------------ dequantize


def test_dequantize_gives_floats_that_can_be_compressed_again(here: Path) -> None:
    artifact = small.compressed(here / "first", recipe="int4-weights", effort="plain")
    x, y = small.patterns(64, seed=7)
    found = document("dequantize", "first", "--data", "my_data:data", "--out", "sub/floats.pt2")
    assert found["model"] == "sub/floats.pt2" and found["corrected"] is True
    assert found["bytes"] == (here / "sub" / "floats.pt2").stat().st_size
    graph = bitport.load(here / "sub" / "floats.pt2")
    with torch.no_grad():
        (floats,), real = graph.run(x), small.tiny()(x)
    plain = artifact.predict(x)
    assert isinstance(plain, torch.Tensor)
    assert float((floats - real).norm()) < float((plain - real).norm())  # correcting helped
    assert not torch.equal(floats, real)
    again = bitport.compress(
        graph, "int8", target="onnxruntime", data=small.calibration(), out=here / "again"
    )
    assert again.measurements["task.drop"] is not None
    found = again.predict(x)
    assert isinstance(found, Tensor)
    assert (found.argmax(1) == y).double().mean() > 0.8


def test_dequantize_without_data_gives_the_numbers_as_they_are_stored(here: Path) -> None:
    artifact = small.compressed(here / "first", recipe="int8-weights")
    assert run("dequantize", "first", "--no-correct", "--out", "floats.pt2").stdout == "floats.pt2\n"
    x = small.patterns(8, seed=7)[0]
    with torch.no_grad():
        (floats,) = bitport.load(here / "floats.pt2").run(x)
    torch.testing.assert_close(floats, artifact.predict(x))


def test_a_file_that_is_there_is_kept(here: Path) -> None:
    small.compressed(here / "first")
    (here / "mine.pt2").write_text("the only float network I have")
    found = document("dequantize", "first", "--no-correct", "--out", "mine.pt2", code=1)
    assert "exists already and is not replaced" in found["error"]["message"]
    assert (here / "mine.pt2").read_text() == "the only float network I have"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "Missing option '--out'"),
        (("--out", "x.pt2"), "one of the two"),
        (("--out", "x.pt2", "--no-correct", "--data", "d.npz"), "one of the two"),
        (("--out", "x.onnx", "--no-correct"), "must end in .pt2"),
    ],
)
def test_wrong_usage(here: Path, words: tuple[str, ...], said: str) -> None:
    assert said in " ".join(run("dequantize", "first", *words, code=2).output.split())


# ------------------------------------------------------------------------------------------------ new files


def written(out: Path, work: Callable[[Path], None]) -> None:
    with store.new_file(out) as place:
        work(place)


def test_a_new_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "a.bin"

    def half(place: Path) -> None:
        place.write_bytes(b"half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        written(out, half)
    assert list(out.parent.iterdir()) == []
    with store.new_file(out) as place:
        assert not out.exists()
        place.write_bytes(b"whole")
    assert out.read_bytes() == b"whole" and list(out.parent.iterdir()) == [out]


def test_a_new_file_doesnt_replace_one_that_appears_meanwhile(tmp_path: Path) -> None:
    out = tmp_path / "a.bin"

    def late(place: Path) -> None:
        place.write_bytes(b"mine")
        out.write_bytes(b"theirs")

    with pytest.raises(ArtifactError, match="exists already"):
        written(out, late)
    assert out.read_bytes() == b"theirs" and list(tmp_path.iterdir()) == [out]


def test_a_new_file_on_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with store.new_file(tmp_path / "a.bin") as place:
        place.write_bytes(b"whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_a_folder_that_cant_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="can't be written"), store.new_file(tmp_path / "file" / "a.bin"):
        pytest.fail("there is no place")


# ------------------------------------------------------------------------------------------------ list


def test_recipes_say_what_each_target_runs_them_with(here: Path) -> None:
    found = document("list", "recipes")["recipes"]
    kernels = {
        name: {kind: way["kernel"] for kind, way in entry["targets"]["onnxruntime"].items()}
        for name, entry in found.items()
    }
    assert kernels["int8"] == {"conv": "QLinearConv", "linear": "QGemm", "embedding": "Gather"}
    assert kernels["int4-weights"] == {"conv": "decoded", "linear": "MatMulNBits", "embedding": "decoded"}
    assert kernels["int8-dynamic"]["linear"] == "DynamicQuantizeMatMul"
    assert kernels["nf4"]["linear"] == "decoded"
    assert kernels["float"] == {}
    assert found["int8-dynamic"]["targets"]["onnxruntime"]["conv"]["mode"] == "weights"
    text = " ".join(run("list", "recipes").stdout.split())
    assert "onnxruntime: conv, embedding → decoded to float32; linear → MatMulNBits" in text


def test_a_format_that_a_target_lacks_is_told_with_the_reason() -> None:
    from bitport.forecast import ways

    step = {"weights": {"format": "int4"}, "activations": {"format": "int12"}}
    recipe = bitport.Recipe(steps=(bitport.recipe.StepSpec("quantize", step),))
    found = ways(recipe, ["onnxruntime", "null"])
    assert "has no integer kernels for int12 activations" in found["onnxruntime"]["reason"]
    assert found["null"]["linear"]["kernel"] == "simulated"


def test_formats_are_those_of_the_grammar(here: Path) -> None:
    found = document("list", "formats")["formats"]
    named = {name for name, entry in found.items() if "kind" in entry}
    assert {*formats.ALIASES, *formats.TABLES, *formats.FLOATS} <= named
    for name in named:
        assert Format.parse(name).bits == found[name]["bits"]
    assert {found[name]["kind"] for name in named} == {"int", "float", "log2", "codebook"}
    for option in (*formats.GRANULARITIES, *(f"scale({name})" for name in formats.SCALES), "symmetric"):
        assert found[option]["summary"].startswith("option: ")
        if option != "group":
            Format.parse(f"int8 {option}")
