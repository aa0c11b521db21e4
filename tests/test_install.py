"""The wheel: the same bytes wherever it is built, and whole; importing the package does nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tests import small

ROOT = Path(__file__).parents[1]


def built(place: Path, **environment: str) -> Path:
    """A wheel of a copy of the sources in `place`."""
    place.mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place)
    shutil.copytree(ROOT / "src", place / "src", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", "dist"],
        cwd=place, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (wheel,) = (place / "dist").iterdir()
    return wheel


def test_a_wheel_is_the_same_wherever_and_whenever_it_is_built(tmp_path: Path) -> None:
    first = built(tmp_path / "a", SOURCE_DATE_EPOCH="1700000000")
    before = os.umask(0o077)
    try:
        second = built(
            tmp_path / "another place", SOURCE_DATE_EPOCH="1700000000", TZ="Pacific/Kiritimati", PYTHONHASHSEED="7",
            LC_ALL="C",
        )  # fmt: skip
    finally:
        os.umask(before)
    assert first.name == second.name
    assert first.read_bytes() == second.read_bytes()
    # all of the package and nothing else; a .pth file would run code whenever Python starts
    names = set(zipfile.ZipFile(first).namelist())
    package = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src" / "bitport").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if ".dist-info/" not in name} == package


@pytest.mark.parametrize(
    ("first", "what"),
    [
        ("sys", "bitport"),
        # PyTorch's CUDA build starts ldconfig, to find its own libraries
        ("torch", "bitport.api, bitport.cli.commands"),
        ("torch", "bitport.targets.onnxruntime"),
    ],
)
def test_importing_reaches_no_network_and_starts_no_process(first: str, what: str) -> None:
    code = f"""
import sys
import {first}
WATCHED = ("socket.", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "urllib.")
seen = []
sys.addaudithook(lambda event, args: seen.append((event, str(args)[:200])) if event.startswith(WATCHED) else None)
import {what}
print(seen)
"""
    done = small.python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
