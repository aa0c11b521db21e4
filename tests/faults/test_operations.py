"""Disks, memory, signals, locales and paths (section E of docs/faults.md)."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from tests import small

import bitport
from bitport import artifact, records
from bitport.errors import ArtifactError

SAME = ("plan.json", "recipe.toml", "graph.pt2", "model.onnx", "reference/model.onnx")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    small.quick(monkeypatch)
    small.without_page(monkeypatch)


@pytest.fixture(scope="module")
def existing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published artifact that no fault may touch."""
    with pytest.MonkeyPatch.context() as patch:
        small.quick(patch)
        return small.compressed(tmp_path_factory.mktemp("existing") / "out").path


# ------------------------------------------------------------------------------------- 54, 55: the disk


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("where", ["model", "record"])
def test_whatever_the_disk_refuses_the_artifact_stays(
    existing: Path, monkeypatch: pytest.MonkeyPatch, code: int, where: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    before = small.content(existing)
    monkeypatch.setattr(*((artifact, "save_pt2", refuse) if where == "model" else (records, "dump", refuse)))
    with pytest.raises(ArtifactError, match=rf"can't be written \({os.strerror(code)}\); .* is intact"):
        small.compressed(existing)
    assert small.content(existing) == before
    assert [path.name for path in existing.parent.iterdir()] == ["out"]


# ------------------------------------------------------------------------------------- 60: memory

HUNGRY = """
import torch
class Hungry(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(8, 8)
    def forward(self, x):
        return self.a(x.repeat_interleave(2, 0).unsqueeze(1).expand(-1, 1_000_000, -1).contiguous()).mean((0, 1))
def net(): return Hungry(), torch.zeros(2, 8)
def growing(): return [torch.ones(1, 8), torch.ones(1024, 8)]
def large(): return [torch.ones(1024, 8)]
"""


@pytest.mark.parametrize(
    ("data", "start", "remedy"),
    [
        ("growing", "error: out of memory (", "use smaller batches"),  # not seen before it happens
        (
            "large",
            "error: compressing this network takes at least ",
            " are left (",
        ),
    ],
)
def test_too_little_memory_is_one_line_and_the_artifact_stays(
    tmp_path: Path, data: str, start: str, remedy: str
) -> None:
    (tmp_path / "hungry_net.py").write_text(HUNGRY)
    limit = 24 * 2**30

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    command = [
        sys.executable, "-m", "bitport", "compress", "hungry_net:net", "--target", "null", "--recipe", "int8",
        "--data", f"hungry_net:{data}", "--out", "out",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=tmp_path, env=small.process_environment(), capture_output=True, text=True, timeout=120,
        check=False, preexec_fn=limited,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(start)
    assert remedy in line
    assert {path.name for path in tmp_path.iterdir()} <= {"hungry_net.py", "__pycache__"}


# ------------------------------------------------------------------------------------- 61, 62: surroundings


QUICK = """
import functools
from bitport.proof import cost
cost.latency = functools.partial(cost.latency, seconds=0.03, rounds=8)
cost.run_memory = lambda *_: 1
from bitport.cli import main
main()
"""


def test_another_locale_clock_home_and_odd_paths_give_the_same_bytes(tmp_path: Path) -> None:
    here = small.compressed(tmp_path / "here", "onnxruntime").path
    place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/a folder \xff\xc4 \xe2\x82\xac"))
    place.mkdir()
    (place / "odd_net.py").write_text(
        "from tests import small\n"
        "def net(): return small.tiny(), small.patterns(1)[0]\n"
        "def data(): return small.calibration()\n"
        "def judged(): return small.evaluation()\n"
    )
    surroundings = {
        "HOME": "/proc/nowhere", "XDG_CACHE_HOME": "/proc/nowhere", "TZ": "Pacific/Kiritimati", "LC_ALL": "tr_TR.UTF-8",
        "LANGUAGE": "tr", "PYTHONHASHSEED": "99", "COLUMNS": "20", "TERM": "dumb",
    }  # fmt: skip
    command = [
        sys.executable, "-c", QUICK, "compress", "odd_net:net", "--target", "onnxruntime", "--recipe", "int8",
        "--data", "odd_net:data", "--eval", "odd_net:judged", "--out", "the out",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=place, env=small.process_environment(**surroundings), capture_output=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in SAME:
        assert (place / "the out" / name).read_bytes() == (here / name).read_bytes(), name
    assert {entry.name for entry in place.iterdir()} - {"__pycache__"} == {"odd_net.py", "the out"}


def test_a_path_of_thousands_of_characters_works_or_is_refused(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["d" * 200] * 15)
    assert 3000 < len(str(deep)) < 3500
    artifact = small.compressed(deep / "out")
    assert bitport.Artifact.load(artifact.path)
    with pytest.raises(ArtifactError, match=r"can't be written \(File name too long\)"):
        small.compressed(deep.joinpath(*["e" * 200] * 6) / "out")


@pytest.mark.slow
def test_a_temporary_folder_that_executes_nothing(tmp_path: Path) -> None:
    """Skipped where this user may not mount one."""
    (tmp_path / "noexec").mkdir()
    mount = f"mount -t tmpfs -o noexec,size=64m tmpfs {tmp_path / 'noexec'}"
    tried = subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, check=False)
    if tried.returncode:
        pytest.skip("may not mount a file system")
    code = "from tests import small; import sys; small.compressed(sys.argv[1], 'onnxruntime')"
    script = f'{mount} && TMPDIR={tmp_path / "noexec"} exec "$0" -c "$1" "$2"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, sys.executable, code, str(tmp_path / "out")],
        env=small.process_environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert bitport.Artifact.load(tmp_path / "out")
