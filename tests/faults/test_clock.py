"""A clock that jumps, stands at its beginning, or is far ahead: the same bytes, and nothing is taken for stale."""

from __future__ import annotations

import itertools
import os
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from tests import small

import bitport
from bitport import store

SAME = ("plan.json", "recipe.toml", "graph.pt2", "model.onnx", "reference/model.onnx", "sample.npz")
YEAR = 365 * 24 * 3600.0


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    small.quick(monkeypatch)


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    with pytest.MonkeyPatch.context() as patch:
        small.quick(patch)
        return small.content(small.compressed(tmp_path_factory.mktemp("usual") / "out", "onnxruntime").path)


def jumping(monkeypatch: pytest.MonkeyPatch, offsets: list[float]) -> None:
    """Each look at the clock finds another offset. What counts only forwards (monotonic) leaps ahead."""
    real, steady, turns = time.time, time.monotonic, itertools.cycle(offsets)
    ahead = itertools.count(0, 3600.0)

    class Jumping(datetime):
        @classmethod
        def now(cls, tz: object = None) -> Jumping:
            return cls.fromtimestamp(time.time(), UTC)

    monkeypatch.setattr(time, "time", lambda: max(0.0, real() + next(turns)))
    monkeypatch.setattr(time, "monotonic", lambda: steady() + next(ahead))
    monkeypatch.setattr(store, "datetime", Jumping)


CLOCKS = {
    "back and forth": [0.0, -5 * YEAR, YEAR, -1.0, 40 * YEAR],
    "at its beginning": [-1000 * YEAR],
    "far ahead": [150 * YEAR],
}


@pytest.mark.parametrize(
    "kind", ["back and forth", *(pytest.param(k, marks=pytest.mark.slow) for k in list(CLOCKS)[1:])]
)
def test_a_clock_that_is_wrong_or_jumps_gives_the_same_bytes(
    kind: str, usual: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jumping(monkeypatch, CLOCKS[kind])
    artifact = small.compressed(tmp_path / "out", "onnxruntime")
    found = small.content(artifact.path)
    assert {name for name in SAME if found[name] != usual[name]} == set()
    assert artifact.measurements["seconds.total"] > 0
    assert bitport.verify(artifact.path).record["golden"]["max_difference"] == 0
    assert bitport.report(artifact.path).is_file()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("when", [0.0, 1.0, 4.1e9, 7e9])
def test_files_of_another_time_are_neither_kept_nor_feared(tmp_path: Path, when: float) -> None:
    out = small.compressed(tmp_path / "out").path
    (tmp_path / ".out.99999999.tmp").mkdir()  # of a run that was killed
    (tmp_path / ".out.99999999.tmp" / "model.pt2").write_bytes(b"half")
    (tmp_path / "out.lock").touch()
    for path in (*out.rglob("*"), *tmp_path.rglob("*")):
        os.utime(path, (when, when))
    again = small.compressed(out, data=list(small.patterns(32, seed=8)[0].split(8)))
    assert bitport.Artifact.load(again.path).manifest["data_digest"] == again.manifest["data_digest"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
