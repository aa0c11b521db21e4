"""Random damage: only a BitportError may come out of reading; on the command line one line and exit code 1 or 2."""

from __future__ import annotations

import io
import json
import struct
import tempfile
import time
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import small
from torch import nn

import bitport
from bitport import Recipe, records, store
from bitport.artifact import Artifact
from bitport.cli import cli
from bitport.data import Source, open_data
from bitport.errors import BitportError
from bitport.graph.archive import load_pt2
from bitport.plan import Plan
from bitport.records import Measurement

SECONDS = 10.0  # one example; the slowest honest one takes well below a second
LONG = 1500


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    small.quick(monkeypatch)
    small.without_page(monkeypatch)


def only_ours(work: Callable[[], object]) -> None:
    """Nothing but a BitportError, and in time."""
    started = time.monotonic()
    said = "fine"
    try:
        work()
    except BitportError as error:
        said = str(error)
    assert 0 < len(said) < 5000
    assert time.monotonic() - started < SECONDS


def both(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A fast test of so many examples and a slow one of many, by a parameter."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        def run(many: bool) -> None:
            settings(max_examples=LONG if many else examples)(function)()

        run.__doc__ = function.__doc__
        run.__name__ = function.__name__
        return pytest.mark.parametrize("many", [False, pytest.param(True, marks=[pytest.mark.slow])])(run)

    return decorate


# ------------------------------------------------------------------------------------- bytes and their damage


@cache
def npz() -> bytes:
    stream = io.BytesIO()
    x, y = small.patterns(6)
    np.savez(stream, x=x.numpy(), y=y.numpy())
    return stream.getvalue()


@cache
def pt2(ours: bool) -> bytes:
    model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval(), torch.zeros(2, 4)
    if not ours:
        stream = io.BytesIO()
        torch.export.save(torch.export.export(model, (x,)), stream)
        return stream.getvalue()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.pt2"
        bitport.graph.archive.save_pt2(bitport.load(model, x), path)
        return path.read_bytes()


EDIT = st.tuples(
    st.sampled_from(["set", "cut", "insert", "swap", "number"]), st.floats(0, 1), st.binary(max_size=9)
)


def damaged(content: bytes, edits: list[tuple[str, float, bytes]]) -> bytes:
    for kind, share, part in edits:
        at = int(share * max(0, len(content) - 1))
        if kind == "set":
            content = content[:at] + part + content[at + len(part) :]
        elif kind == "cut":
            content = content[:at]
        elif kind == "insert":
            content = content[:at] + part + content[at:]
        elif kind == "swap":
            content = content[:at] + content[at : at + 64][::-1] + content[at + 64 :]
        else:  # a length field of all ones
            content = content[:at] + struct.pack("<I", 0xFFFFFFFF) + content[at + 4 :]
    return content


def repacked(content: bytes, which: int, edits: list[tuple[str, float, bytes]]) -> bytes:
    """The archive with one member damaged and every checksum right: it gets further than random bytes."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w") as new:
        names = old.namelist()
        for name in names:
            data = old.read(name)
            new.writestr(name, damaged(data, edits) if name == names[which % len(names)] else data)
    return stream.getvalue()


EDITS = st.lists(EDIT, min_size=1, max_size=4)


def at(content: bytes, name: str, work: Callable[[Path], object]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        only_ours(lambda: work(path))


def read_data(path: Path) -> None:
    for _ in Source(open_data(str(path), names=["x"]), role="evaluation", names=["x"], labels="optional"):
        pass


@both(120)
@given(edits=EDITS, which=st.none() | st.integers(0, 1))
def test_npz(edits: list[Any], which: int | None) -> None:
    content = damaged(npz(), edits) if which is None else repacked(npz(), which, edits)
    at(content, "d.npz", read_data)


@both(40)
@given(edits=EDITS, which=st.none() | st.integers(0, 30), ours=st.booleans())
def test_pt2(edits: list[Any], which: int | None, ours: bool) -> None:
    content = damaged(pt2(ours), edits) if which is None else repacked(pt2(ours), which, edits)
    at(content, "m.pt2", load_pt2)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=6), part, max_size=3),
    max_leaves=6,
)


def replaced(value: Any, path: list[int], new: Any) -> Any:
    """`value` with the leaf that `path` leads to replaced."""
    if isinstance(value, dict) and value and path:
        key = sorted(value)[path[0] % len(value)]
        return {**value, key: replaced(value[key], path[1:], new)}
    if isinstance(value, list) and value and path:
        index = path[0] % len(value)
        return [*value[:index], replaced(value[index], path[1:], new), *value[index + 1 :]]
    return new


@cache
def program() -> dict[str, Any]:
    with zipfile.ZipFile(io.BytesIO(pt2(True))) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("models/model.json")]
        return {"name": name, "record": json.loads(archive.read(name))}


@both(40)
@given(path=st.lists(st.integers(0, 40), min_size=1, max_size=9), new=JSON)
def test_the_program_inside_a_pt2(path: list[int], new: Any) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(pt2(True))) as old, zipfile.ZipFile(stream, "w") as changed:
        for name in old.namelist():
            data = old.read(name)
            if name == program()["name"]:
                data = json.dumps(replaced(program()["record"], path, new)).encode()
            changed.writestr(name, data)
    at(stream.getvalue(), "m.pt2", load_pt2)


# ------------------------------------------------------------------------------------- texts

TOML = [Recipe.preset(name).to_toml() for name in Recipe.presets()] + [
    '[[steps]]\nuse = "quantize"\nweights = {format = "int8", granularity = "channel"}\n'
    '[[overrides]]\nmatch = "head.*"\nop = "conv"\nactivations = {range = {use = "percentile", q = 99.9}}\n'
    "[target]\nthreads = 2\n[preprocessing]\nsize = 32\nmean = [0.5]\n"
]
WORD = st.sampled_from([
    "int8", "fold", "quantize", "calibrate", "weights", "format", "uint4", "percentile", "q", "use", "match", "*",
    "steps", "overrides", "threads", "schema", "size", "mean", "std",
])  # fmt: skip
VALUE = st.recursive(
    WORD | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda part: st.lists(part, max_size=3) | st.dictionaries(WORD, part, max_size=3),
    max_leaves=8,
)


@both(100)
@given(text=st.sampled_from(TOML), edits=EDITS)
def test_damaged_recipes(text: str, edits: list[Any]) -> None:
    at(damaged(text.encode(), edits), "r.toml", lambda path: Recipe.of(path).expand())


@both(100)
@given(table=st.dictionaries(WORD, VALUE, max_size=4), step=st.dictionaries(WORD, VALUE, max_size=3))
def test_recipes_of_random_tables(table: dict[str, Any], step: dict[str, Any]) -> None:
    import tomli_w

    text = tomli_w.dumps({**table, "steps": [{"use": "quantize", **step}]})
    only_ours(lambda: Recipe.parse(text).expand())


@both(100)
@given(text=st.text(max_size=40) | st.lists(WORD, max_size=6).map(" ".join))
def test_formats_and_specs(text: str) -> None:
    only_ours(lambda: bitport.Format.parse(text))
    only_ours(lambda: Recipe.of(text))
    only_ours(lambda: bitport.load(text))
    only_ours(lambda: open_data(text.replace(":", "")))


# ------------------------------------------------------------------------------------- artifact folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        small.quick(patch)
        return small.compressed(tmp_path_factory.mktemp("folder") / "out").path


@pytest.mark.parametrize("name", ["plan.json", "measurements.json", "manifest.json"])
@pytest.mark.parametrize("many", [False, pytest.param(True, marks=[pytest.mark.slow])])
def test_records_of_an_artifact(folder: Path, name: str, many: bool) -> None:
    """Changed, and with its checksum made right again, so that the guards behind the checksum are reached."""
    original = {path: (folder / path).read_bytes() for path in (name, "manifest.json")}
    record = json.loads(original[name])

    @settings(max_examples=LONG if many else 25)
    @given(path=st.lists(st.integers(0, 20), min_size=1, max_size=6), new=JSON)
    def change(path: list[int], new: Any) -> None:
        (folder / name).write_text(json.dumps(replaced(record, path, new)))
        if name != "manifest.json":
            manifest = json.loads(original["manifest.json"])
            manifest["files"][name] = records.sha256_file(folder / name)
            (folder / "manifest.json").write_text(json.dumps(manifest))
        only_ours(lambda: store.verify_manifest(folder))

        def use() -> None:
            artifact = Artifact.load(folder)
            assert isinstance(artifact.plan, Plan)
            assert isinstance(artifact.measurements, Measurement)

        only_ours(use)

    try:
        change()
    finally:
        for path, content in original.items():
            (folder / path).write_bytes(content)


# ------------------------------------------------------------------------------------- shapes, dtypes, ranges

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool,
    torch.complex64,
]  # fmt: skip


@st.composite
def batches(draw: st.DrawFn) -> list[torch.Tensor]:
    found = []
    for _ in range(draw(st.integers(0, 3))):
        shape = [
            draw(st.sampled_from([4, 1, 2, 0])),
            *draw(st.sampled_from([(5,), (5,), (5,), (4,), (2, 5), ()])),
        ]
        dtype = draw(st.sampled_from([torch.float32] * 6 + DTYPES))
        size = draw(st.sampled_from([0.0, 1e-40, 1e-20, 1.0, 1e4, 1e20, 3e38, float("inf"), float("nan")]))
        x = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 9)))) * size
        found.append(x.to(dtype) if dtype != torch.bool else x > 0)
    return found


@cache
def dense() -> bitport.graph.Graph:
    torch.manual_seed(0)
    return bitport.load(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).eval(), torch.zeros(2, 5))


@both(12)
@given(data=batches(), weights=st.sampled_from(["int8", "int4", "int2", "uint8", "int16"]))
def test_batches_of_any_shape_type_and_range(data: list[torch.Tensor], weights: str) -> None:
    options = {"weights": {"format": weights}}
    recipe = Recipe(steps=(bitport.recipe.StepSpec("quantize", options),))

    def work() -> None:
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "out"
            artifact = bitport.compress(dense(), recipe, target="null", data=data, metric="mse", out=out)
            for tie in artifact.plan.ties.values():
                assert bool(torch.isfinite(tie.parameters()[0]).all())

    only_ours(work)


# ------------------------------------------------------------------------------------- the command line


@both(25)
@given(
    edits=EDITS,
    part=st.sampled_from(["model", "data", "recipe"]),
    words=st.lists(st.text(max_size=5), max_size=2),
)
def test_the_command_line_prints_one_line_and_no_traceback(
    edits: list[Any], part: str, words: list[str]
) -> None:
    contents = {"model": pt2(True), "data": npz(), "recipe": TOML[0].encode()}
    contents[part] = damaged(contents[part], edits)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        names = {"model": place / "m.pt2", "data": place / "d.npz", "recipe": place / "r.toml"}
        for key, path in names.items():
            path.write_bytes(contents[key])
        command = [
            "compress", str(names["model"]), "--data", str(names["data"]), "--recipe", str(names["recipe"]),
            "--target", "null", "--out", str(place / "out"), *words,
        ]  # fmt: skip
        done = CliRunner().invoke(cli, command)
        # the data never fits the network: whatever is undamaged is refused as well
        assert done.exit_code in (1, 2), done.output
        assert "Traceback" not in done.output
        assert "error: unexpected" not in done.output
        assert not (place / "out").exists()
        if done.exit_code == 1:
            assert len(done.stderr.strip().splitlines()) == 1
