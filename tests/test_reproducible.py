"""The same network, data, recipe and seed give the same bytes, anywhere; and no file tells whose machine it was."""

from __future__ import annotations

import getpass
import io
import re
import shutil
import socket
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests import small

import bitport

SAME = ("model.onnx", "plan.json", "recipe.toml", "graph.pt2", "reference/model.onnx", "sample.npz")
ROOT = small.SOURCE.parent

RUN = """
import sys
import torch
torch.set_num_threads(1)
from tests import small
from bitport.proof import cost
import functools
cost.latency = functools.partial(cost.latency, seconds=0.03, rounds=8)
cost.run_memory = lambda *_: 1
torch.manual_seed(int(sys.argv[2]))
small.compressed(sys.argv[1], "onnxruntime", effort="best", max_drop=0.2)
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        small.quick(patch)
        out = tmp_path_factory.mktemp("here") / "out"
        return small.compressed(out, "onnxruntime", effort="best", max_drop=0.2).path


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by another process, with another hash seed, in another folder with another folder for temporary files."""
    place = tmp_path_factory.mktemp("elsewhere in a place with spaces")
    scratch = tmp_path_factory.mktemp("scratch")
    environment = {"PYTHONHASHSEED": "4711", "TMPDIR": str(scratch), "HOME": str(scratch), "USER": "somebody"}
    done = small.python(RUN, place / "out", 5, cwd=place, **environment)
    assert done.returncode == 0, done.stderr
    # neither a forgotten temporary file nor what a runtime writes about its users into their home
    assert list(scratch.iterdir()) == []
    assert [path.name for path in place.iterdir()] == ["out"]
    return place / "out"


def test_two_runs_in_one_process_give_the_same_bytes(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.quick(monkeypatch)
    torch.manual_seed(77)
    again = small.compressed(tmp_path / "again", "onnxruntime", effort="best", max_drop=0.2)
    for name in SAME:
        assert (here / name).read_bytes() == (again.path / name).read_bytes(), name


def test_another_process_elsewhere_gives_the_same_bytes(here: Path, elsewhere: Path) -> None:
    for name in SAME:
        assert (here / name).read_bytes() == (elsewhere / name).read_bytes(), name


def test_what_differs_is_measurement_only(here: Path, elsewhere: Path) -> None:
    first, second = small.content(here), small.content(elsewhere)
    assert set(first) == set(second)
    differing = {name for name in first if first[name] != second[name]}
    assert differing <= {"measurements.json", "report.html", "manifest.json"}
    ours, theirs = (bitport.Artifact.load(folder).manifest for folder in (here, elsewhere))
    unequal = {key for key in ours if ours[key] != theirs[key]}
    assert unequal <= {"files"}
    files = {name for name, digest in ours["files"].items() if theirs["files"][name] != digest}
    assert files <= {"measurements.json", "report.html"}


@pytest.mark.slow
def test_batches_of_another_size_give_the_same_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small.quick(monkeypatch)
    x = small.patterns(32)[0]
    first = small.compressed(tmp_path / "1", data=list(x.split(16)))
    second = small.compressed(tmp_path / "2", data=list(x.split(5)))
    assert first.manifest["data_digest"] == second.manifest["data_digest"]
    other = small.compressed(tmp_path / "3", data=list((x + 0.5).split(16)))
    assert other.manifest["data_digest"] != first.manifest["data_digest"]
    assert (other.path / "plan.json").read_bytes() != (first.path / "plan.json").read_bytes()


# --------------------------------------------------------------------------------------------- whose machine it was


def pieces(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every file's name and bytes, archives' members (also of archives in archives) unpacked."""

    def unpack(name: str, content: bytes) -> Iterator[tuple[str, bytes]]:
        yield name, content
        if content[:4] == b"PK\x03\x04":
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                for member in archive.namelist():
                    yield from unpack(f"{name}/{member}", archive.read(member))

    for name, content in small.content(folder).items():
        yield from unpack(name, content)


def private(*more: object) -> list[str]:
    """What names this machine, its user, and where things lie on it."""
    places = {
        *map(str, more), str(Path.cwd()), str(ROOT), str(Path.home()), tempfile.gettempdir(), sys.prefix,
        sys.base_prefix, sysconfig.get_paths()["purelib"], str(Path(torch.__file__).parent), "site-packages",
        "/home/", "/root/", "/tmp/", "/usr/lib/python", "/work/", "tests/small", "small.py", "somebody",
    }  # fmt: skip
    return sorted(place for place in places if len(place) > 3)


@pytest.mark.parametrize("which", ["here", "elsewhere"])
def test_no_file_names_a_place_of_this_machine(which: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(which)
    words = private(folder, folder.parent, folder.parent.name)
    found = []
    names = set()
    for name, content in pieces(folder):
        names.add(name)
        # the drawing library that a report carries is not of this machine
        text = (
            re.sub(rb"<script>/\*.*?</script>", b"", content, flags=re.S)
            if name == "report.html"
            else content
        )
        found += [(name, word) for word in words if word.encode() in text]
    assert found == []
    assert len([name for name in names if name.startswith(("graph.pt2/", "sample.npz/"))]) > 4


LOCATION = re.compile(rb"[\w./-]+\.py(?:\"|'|:\d+|, line)|File \\?\"|Traceback|line \d+, in ")


def test_the_search_finds_what_torch_writes_on_its_own(tmp_path: Path) -> None:
    program = torch.export.export(small.tiny(), (torch.zeros(2, 1, 8, 8),))
    torch.export.save(program, tmp_path / "plain.pt2")
    found = [content for _, content in pieces(tmp_path)]
    assert any(LOCATION.search(content) for content in found)
    assert any(word.encode() in content for word in private() for content in found)


@pytest.mark.parametrize("which", ["here", "elsewhere"])
def test_no_file_holds_a_source_location_or_the_users_name(
    which: str, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(which)
    for name, content in pieces(folder):
        if name == "report.html":
            content = re.sub(rb"<script.*?</script>", b"", content, flags=re.S)
        if name == "manifest.json":
            content = content.replace(b'"run.py"', b"")  # a file of the artifact itself
        assert LOCATION.search(content) is None, (name, LOCATION.search(content))
        if name.endswith(".json"):
            assert socket.gethostname().encode() not in content, name
            if len(getpass.getuser()) > 4:
                assert getpass.getuser().encode() not in content, name


def test_a_failed_loader_or_model_leaves_no_path_in_a_rejected_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.quick(monkeypatch)
    with pytest.raises(bitport.GateFailed) as caught:
        small.compressed(tmp_path / "out", max_drop=0.001)
    words = private(tmp_path)
    for name, content in pieces(caught.value.path):
        if name != "report.html":
            assert [word for word in words if word.encode() in content] == [], name
    assert str(tmp_path) not in (caught.value.path / "report.html").read_text(encoding="utf-8")


def test_a_copied_artifact_is_the_same_artifact(here: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(here, tmp_path / "copy"))
    assert bitport.Artifact.load(copy).manifest == bitport.Artifact.load(here).manifest
    x = small.patterns(3)[0]
    first, second = (bitport.Artifact.load(folder).predict(x) for folder in (here, copy))
    assert isinstance(first, torch.Tensor)
    assert isinstance(second, torch.Tensor)
    assert torch.equal(first, second)
