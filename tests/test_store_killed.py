"""Killed at any moment, an output folder holds the old artifact whole or the new one whole."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.test_store import names, publish, version_of

from bitport import store
from bitport.store import Workspace, verify_manifest

KILLED = """
import itertools, os, random, signal, sys, time
from pathlib import Path
from bitport import records, store
out, two_renames = Path(sys.argv[1]), sys.argv[2] == "two renames"
if two_renames:
    store._exchange = lambda first, second: False

def run_forever(first, told):
    for number in itertools.count(first):
        with store.Workspace(out) as workspace:
            version = "ab"[number % 2]
            (workspace.path / "reference").mkdir()
            for name in ("model.onnx", "plan.json", "reference/model.onnx"):
                (workspace.path / name).write_text(version * 1000)
            records.dump(workspace.path / "manifest.json", {"files": store.manifest(workspace.path)})
            workspace.publish()
        os.write(told, b"x")

random.seed(7)
seen = set()
for attempt in range(20):
    heard, told = os.pipe()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        run_forever(attempt, told)
    os.read(heard, 1)  # one publication is done; the kill falls somewhere into the next ones
    time.sleep(random.uniform(0.0, 2.0) * (time.monotonic() - start))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(heard)
    os.close(told)
    if two_renames:  # the next run repairs
        with store.Workspace(out):
            pass
    store.verify_manifest(out)
    texts = {path.read_text() for path in out.rglob("*.onnx")} | {(out / "plan.json").read_text()}
    (text,) = texts
    seen.add(text[0])
    left = [entry.name for entry in out.parent.iterdir() if entry != out]
    assert all(name == "out.lock" or name.startswith(".out.") for name in left), left
with store.Workspace(out):
    pass
assert [entry.name for entry in out.parent.iterdir()] == ["out"]
assert seen == {"a", "b"}, seen
"""


@pytest.mark.parametrize("way", ["exchange", "two renames"])
def test_kill_9_at_random_instants_leaves_the_old_or_the_new_whole(tmp_path: Path, way: str) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out"), way], check=True, timeout=120)
    verify_manifest(tmp_path / "out")


KILLED_AT_EACH_CALL = """
import os, signal, sys
from pathlib import Path
from bitport import records, store
out, two_renames = Path(sys.argv[1]), sys.argv[2] == "two renames"
if two_renames:
    store._exchange = lambda first, second: False

def publish(version):
    with store.Workspace(out) as workspace:
        (workspace.path / "model.onnx").write_text(version * 1000)
        (workspace.path / "plan.json").write_text(version * 1000)
        records.dump(workspace.path / "manifest.json", {"files": store.manifest(workspace.path)})
        workspace.publish()

def killed_before_call(number):
    calls = 0
    def counted(function):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)
        return call
    for name in ("open", "mkdir", "rename", "fsync", "unlink", "rmdir", "ftruncate", "pwrite", "close"):
        setattr(os, name, counted(getattr(os, name)))
    store._exchange = counted(store._exchange)
    publish("b")
    os._exit(0)

history, missing, number = "", 0, 0
while True:
    number += 1
    publish("a")
    child = os.fork()
    if child == 0:
        killed_before_call(number)
    _, status = os.waitpid(child, 0)
    if two_renames and not out.exists():
        missing += 1
        with store.Workspace(out):  # the next run repairs
            pass
    store.verify_manifest(out)
    (text,) = {(out / name).read_text() for name in ("model.onnx", "plan.json")}
    history += text[0]
    if os.WIFEXITED(status):
        break
assert os.WEXITSTATUS(status) == 0
assert number > 20, number
assert "ba" not in history and "ab" in history, history
assert missing == int(two_renames), missing
with store.Workspace(out):
    pass
assert [entry.name for entry in out.parent.iterdir()] == ["out"]
"""


@pytest.mark.parametrize("way", ["exchange", "two renames"])
def test_kill_9_before_each_system_call_leaves_the_old_or_the_new_whole(tmp_path: Path, way: str) -> None:
    """At one call, the exchange, the old becomes the new; between two renames there is once neither."""
    command = [sys.executable, "-c", KILLED_AT_EACH_CALL, str(tmp_path / "out"), way]
    subprocess.run(command, check=True, timeout=120)


def test_a_run_killed_between_two_renames_is_repaired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path / "out", "1")
    os.rename(tmp_path / "out", tmp_path / ".out.old")
    with Workspace(tmp_path / "out"):
        assert version_of(tmp_path / "out") == "1"
    os.rename(tmp_path / "out", tmp_path / ".out.old")
    publish(tmp_path / "out", "2")
    assert version_of(tmp_path / "out") == "2"
    assert names(tmp_path) == ["out"]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "renameat2"), reason="no exchange on this system")
def test_the_exchange_is_one_step(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "who").write_text(name)
    assert store._exchange(tmp_path / "a", tmp_path / "b")
    assert [(tmp_path / name / "who").read_text() for name in "ab"] == ["b", "a"]
    with pytest.raises(FileNotFoundError):
        store._exchange(tmp_path / "a", tmp_path / "absent")
