"""The output folder: whose it is, who writes to it, and what is left when the disk or the process gives up."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests import small
from torch import Tensor

import bitport
from bitport.errors import ArtifactError, Locked

X = torch.zeros(4, 1, 8, 8)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    small.quick(monkeypatch)


def test_output_folders_that_are_somebody_elses(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").write_bytes(b"mine")
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    mine = small.compressed(tmp_path / "mine").path
    (mine / "notes.txt").write_text("mine")
    before = small.content(tmp_path)
    for name, message in {
        "file": "is a file: name a folder",
        "photos": r"is not empty and not an artifact.*choose another folder",
        "link": "is a link",
        "mine": r"holds files that are not the artifact's \(notes\.txt\)",
        "file/out": "can't be written",
    }.items():
        with pytest.raises(ArtifactError, match=message):
            small.compressed(tmp_path / name)
    assert small.content(tmp_path) == before


@pytest.mark.parametrize("place", ["/proc/bitport/out", "locked/out", "locked/deep/out"])
def test_output_folders_that_can_not_be_written(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place.startswith("/proc") and not Path("/proc").is_dir():
        pytest.skip("this system has no /proc")
    if place.startswith("locked") and os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    (tmp_path / "locked").mkdir(mode=0o555)
    read = []

    def data() -> Iterator[Tensor]:
        read.append(1)
        return iter(small.calibration())

    with pytest.raises(ArtifactError, match=r"can't be written \(.*\).*choose another folder"):
        small.compressed(tmp_path / place, data=data)
    assert read == []  # refused before any work


def test_a_second_run_is_refused_at_once_and_told_of_the_first(tmp_path: Path) -> None:
    graph = bitport.load(small.tiny(), X)
    out = tmp_path / "out"
    caught: list[pytest.ExceptionInfo[Locked]] = []
    read = []

    def second() -> Iterator[Tensor]:
        read.append(1)
        return iter(small.calibration())

    def first() -> Iterator[Tensor]:
        if not caught:
            with pytest.raises(Locked, match=r"wait for it, stop it, or choose another folder") as info:
                bitport.compress(graph, "int8", target="null", data=second, out=out)
            caught.append(info)
        return iter(small.calibration())

    artifact = bitport.compress(graph, "int8", target="null", data=first, out=out)
    assert f"process {os.getpid()} on " in str(caught[0].value)
    assert str(out) in str(caught[0].value)
    assert read == []
    assert bitport.Artifact.load(artifact.path)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


FULL = """
import resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import bitport
from tests import small
from bitport.proof import cost
import functools
cost.latency = functools.partial(cost.latency, seconds=0.03, rounds=8)
cost.run_memory = lambda *_: 1
out, every = Path(sys.argv[1]), sys.argv[2] == "True"
tried = 0
for target in ("null", "onnxruntime"):
    small.compressed(out, target)
    before = small.content(out)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    some = {"null": ("graph.pt2", "report.html"), "onnxruntime": ("model.onnx",)}[target]
    sizes = {len(content) for name, content in before.items() if every or name in some}
    for limit in sorted({0, *(size * 9 // 10 for size in sizes)}):  # a report differs by a few bytes
        tried += 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            small.compressed(out, target)
            said = None
        except bitport.ArtifactError as error:
            said = str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert said is not None, f"{limit} bytes were enough"
        assert "can't be written" in said, said
        assert "what was there before is intact" in said, said
        assert small.content(out) == before
        assert [path.name for path in out.parent.iterdir()] == ["out"], list(out.parent.iterdir())
print(tried)
"""


EVERY = [False, pytest.param(True, marks=pytest.mark.slow)]


@pytest.mark.parametrize("every_size", EVERY)
def test_a_full_disk_leaves_the_artifact_and_nothing_behind(tmp_path: Path, every_size: bool) -> None:
    done = small.python(FULL, tmp_path / "out", every_size)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= (15 if every_size else 5)


KILLED = """
import os, signal, sys
from contextlib import contextmanager
from pathlib import Path
import torch
torch.set_num_threads(1)
import bitport
from bitport import store
from tests import small
out, every = Path(sys.argv[1]), sys.argv[2] == "True"

class Killer:
    def __init__(self, at):
        self.at, self.seen = at, []
    @contextmanager
    def task(self, name, total=None):
        number = len(self.seen)
        self.seen.append(name)
        if self.at == number:
            os.kill(os.getpid(), signal.SIGKILL)
        yield self
        if self.at == number + 0.5:
            os.kill(os.getpid(), signal.SIGKILL)
    def advance(self, n=1):
        pass

counter = Killer(-1)
small.compressed(out, progress=counter)
before = small.content(out)
assert len(counter.seen) >= 4, counter.seen
every_task = [number / 2 for number in range(2 * len(counter.seen))]
moments = [*(every_task if every else (0.5, len(counter.seen) - 1)), "render", "flush"]
for moment in moments:
    child = os.fork()
    if child == 0:
        die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        if moment == "render":
            bitport.api.render = die
        if moment == "flush":
            store.flush = die
        small.compressed(out, progress=Killer(moment), data=list(small.patterns(16, seed=8)[0].split(8)))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (moment, status)
    assert small.content(out) == before, moment
    bitport.Artifact.load(out)
small.compressed(out)
assert [path.name for path in out.parent.iterdir()] == ["out"], list(out.parent.iterdir())
print("killed", len(moments))
"""


@pytest.mark.parametrize("every_moment", EVERY)
def test_kill_9_at_any_moment_leaves_the_artifact(tmp_path: Path, every_moment: bool) -> None:
    done = small.python(KILLED, tmp_path / "out", every_moment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= (10 if every_moment else 4)
