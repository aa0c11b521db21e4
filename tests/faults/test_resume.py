"""Stopped at a step's edge and run again: the same bytes as a run that nobody stopped, or a refusal that says why."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import small
from torch import nn

import bitport
from bitport import Recipe, api, checkpoint, interrupt, steps
from bitport.errors import ArtifactError, GateFailed, Interrupted
from bitport.plan import Plan

SAME = ("plan.json", "recipe.toml", "graph.pt2", "sample.npz", "reference/graph.pt2")
RECIPE = Recipe.preset("int8").expand("best")  # fold, quantize, calibrate, correct_bias
STEPS = [step.use for step in RECIPE.steps]
LAST_TWO = [f"{len(STEPS) - 1:04}", f"{len(STEPS):04}"]
FAST = [("calibrate", "null"), ("verifying", "null"), ("fold", "onnxruntime")]  # the others are slow tests


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    small.quick(monkeypatch)
    small.without_page(monkeypatch)


class Stopper:
    """Sends a signal to this process when a task of a name begins."""

    def __init__(self, name: str, number: int = signal.SIGINT, times: int = 1) -> None:
        self.name, self.number, self.times = name, number, times

    @contextmanager
    def task(self, name: str, total: int | None = None) -> Iterator[Stopper]:
        if name.startswith(self.name):
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)
        yield self

    def advance(self, n: int = 1) -> None:
        pass


def stopped(out: Path, name: str, target: str = "null", **options: Any) -> pytest.ExceptionInfo[Interrupted]:
    with interrupt.handled(), pytest.raises(Interrupted) as caught:
        small.compressed(out, target, recipe=RECIPE, progress=Stopper(name), **options)
    return caught


def files(folder: Path) -> dict[str, bytes]:
    """What is reproducible."""
    return {name: data for name, data in small.content(folder).items() if name in SAME or "model" in name}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """The files of runs that nobody stopped, by target."""
    with pytest.MonkeyPatch.context() as patch:
        small.quick(patch)
        small.without_page(patch)
        place = tmp_path_factory.mktemp("whole")
        return {
            target: files(small.compressed(place / target, target, recipe=RECIPE).path)
            for target in ("null", "onnxruntime")
        }


MOMENTS = [
    pytest.param(use, target, marks=[] if (use, target) in FAST else pytest.mark.slow)
    for use in (*STEPS, "verifying")
    for target in ("null", "onnxruntime")
]


@pytest.mark.parametrize(("use", "target"), MOMENTS)
def test_stopped_in_any_step_and_run_again_gives_the_same_bytes(
    tmp_path: Path, whole: dict[str, dict[str, bytes]], use: str, target: str
) -> None:
    out = tmp_path / "out"
    said = str(stopped(out, use, target).value)
    done = len(STEPS) if use == "verifying" else STEPS.index(use) + 1
    assert (
        f"interrupted behind step {done} of {len(STEPS)} ({STEPS[done - 1]}): run the same command again"
        in said
    )
    assert [path.name for path in tmp_path.iterdir()] == [".out.checkpoint"]
    ran: list[str] = []

    class Listener(Stopper):
        @contextmanager
        def task(self, name: str, total: int | None = None) -> Iterator[Stopper]:
            ran.append(name)
            yield self

    artifact = small.compressed(out, target, recipe=RECIPE, progress=Listener(""))
    assert [name for name in ran if name in STEPS] == STEPS[done:]
    assert files(artifact.path) == whole[target]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    record = artifact.measurements
    assert f"resumed behind step {done} of a run that was stopped" in record["notes"]
    assert len(record["seconds.steps"]) == len(STEPS)
    assert record["memory.compress_peak_bytes"] is None


@pytest.mark.slow
def test_stopped_twice_resumes_twice(tmp_path: Path, whole: dict[str, dict[str, bytes]]) -> None:
    out = tmp_path / "out"
    for use in STEPS:
        stopped(out, use)
    assert sorted(path.name for path in (tmp_path / ".out.checkpoint").iterdir()) == LAST_TWO
    assert files(small.compressed(out, recipe=RECIPE).path) == whole["null"]


@pytest.mark.slow
def test_an_old_artifact_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    out = small.compressed(tmp_path / "out").path
    before = small.content(out)
    stopped(out, "calibrate")
    assert small.content(out) == before
    with pytest.raises(GateFailed):
        small.compressed(out, recipe=RECIPE, max_drop=0.001)
    assert small.content(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.rejected"]


def test_a_second_signal_stops_at_once_and_keeps_what_was_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    stopped(out, "fold")
    before = small.content(tmp_path)
    with interrupt.handled(), pytest.raises(KeyboardInterrupt):
        small.compressed(out, recipe=RECIPE, progress=Stopper("calibrate", times=2))
    assert small.content(tmp_path) == before


def test_without_our_handlers_an_interrupt_is_pythons_own(tmp_path: Path) -> None:
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            small.compressed(tmp_path / "out", recipe=RECIPE, progress=Stopper("calibrate"))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, previous)
    assert list(tmp_path.iterdir()) == []


def test_handlers_are_given_back_and_an_ignored_signal_stays_ignored() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupt.handled():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not before[0]
        assert signal.getsignal(signal.SIGTERM) is before[0]
    finally:
        signal.signal(signal.SIGINT, before[1])
    found: list[object] = []

    def elsewhere() -> None:
        with interrupt.handled():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [before[0]]


# --------------------------------------------------------------------------------------------- another run


def double(x: list[torch.Tensor]) -> list[torch.Tensor]:
    return [2 * part for part in x]


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ({"data": double(small.calibration())}, ["data was '"]),
        (
            {"recipe": "int8"},
            ["recipe.effort was 'best', is 'fast'", "recipe.steps[5].use was 'reconstruct', is 'correct_bias'"],
        ),
        ({"seed": 1}, ["seed was 0, is 1"]),
        ({"target": "onnxruntime"}, ["target.name was 'null', is 'onnxruntime'", "target.threads was absent, is 1"]),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_run_is_refused_naming_what_differs(
    tmp_path: Path, change: dict[str, Any], fields: list[str]
) -> None:
    out = tmp_path / "out"
    stopped(out, "quantize")
    before = small.content(tmp_path / ".out.checkpoint")
    given = {"recipe": RECIPE, "target": "null", **change}
    with pytest.raises(
        ArtifactError, match=r"is of another run .*repeat that run as it was, or remove"
    ) as caught:
        small.compressed(out, given.pop("target"), **given)
    assert [text for text in fields if text not in str(caught.value)] == []
    assert [path.name for path in tmp_path.iterdir()] == [".out.checkpoint"]
    assert small.content(tmp_path / ".out.checkpoint") == before


def test_changed_weights_and_versions_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    stopped(out, "fold")
    model = small.tiny()
    with torch.no_grad():
        model.fc.bias[0] += 1
    graph = bitport.load(model, small.patterns(1)[0])
    with pytest.raises(ArtifactError, match=r"another run \(model was '\w+…, is '\w+…\)"):
        bitport.compress(graph, RECIPE, target="null", data=small.calibration(), out=out)
    versions = {**bitport.records.versions(), "torch": "1.0"}
    monkeypatch.setattr(checkpoint.records, "versions", lambda: versions)
    with pytest.raises(ArtifactError, match=r"another run \(versions\.torch was '\d\.\S+', is '1\.0'\)"):
        small.compressed(out, recipe=RECIPE)


def test_what_only_judges_may_change(tmp_path: Path, whole: dict[str, dict[str, bytes]]) -> None:
    out = tmp_path / "out"
    stopped(out, "calibrate")
    found = small.compressed(out, recipe=RECIPE, evaluation=small.evaluation(32), metric="nll", max_drop=5.0)
    assert {n: b for n, b in files(found.path).items() if n != "sample.npz"} == {
        n: b for n, b in whole["null"].items() if n != "sample.npz"
    }


# --------------------------------------------------------------------------------------------- damage


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def two_generations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds the checkpoint of `out`."""
    folder = tmp_path_factory.mktemp("generations")
    graph = bitport.load(nn.Sequential(nn.Linear(4, 2)), torch.zeros(2, 4))
    kept = checkpoint.Checkpoint(folder / "out", lambda: {"seed": 0})
    for done in (1, 2, 3):
        kept.save(checkpoint.State(done, graph, Plan.empty("null"), (f"note {done}",), {}, ({"what": "it"},)))
    return folder


@pytest.mark.parametrize("name", ["graph.pt2", "plan.json", "state.json", "manifest.json"])
@pytest.mark.parametrize("way", ["flipped", "truncated", "missing"])
def test_a_damaged_generation_costs_a_step_two_are_refused(
    tmp_path: Path, two_generations: Path, name: str, way: str
) -> None:
    damage = {
        "flipped": flip, "truncated": lambda path: os.truncate(path, 40), "missing": Path.unlink,
    }[way]  # fmt: skip
    shutil.copytree(two_generations, tmp_path, dirs_exist_ok=True)
    kept = checkpoint.Checkpoint(tmp_path / "out", lambda: {"seed": 0})
    generations = sorted(kept.place.iterdir())
    assert [path.name for path in generations] == ["0002", "0003"]
    newest = kept.resume()
    assert newest is not None and newest.done == 3
    damage(generations[1] / name)
    older = kept.resume()
    assert older is not None
    assert (older.done, older.notes, older.tried) == (2, ("note 2",), ({"what": "it"},))
    damage(generations[0] / name)
    with pytest.raises(
        ArtifactError, match=r"\.out\.checkpoint is damaged \(.*remove that folder to start again"
    ):
        kept.resume()


def test_a_graph_that_reads_back_otherwise_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    stopped(out, "quantize")

    def other(path: Path) -> bitport.graph.Graph:
        return bitport.load(nn.Sequential(nn.Linear(2, 2)), torch.zeros(1, 2))

    monkeypatch.setattr(checkpoint, "load_pt2", other)
    with pytest.raises(ArtifactError, match="reads back otherwise than it was written"):
        small.compressed(out, recipe=RECIPE)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "0001").mkdir()
    (tmp_path / ".out.checkpoint").symlink_to(tmp_path / "mine")
    with pytest.raises(ArtifactError, match="is a link: remove it"):
        small.compressed(tmp_path / "out")
    assert (tmp_path / "mine" / "0001").is_dir()


def test_somebodys_files_in_the_folder_stay(tmp_path: Path) -> None:
    (tmp_path / ".out.checkpoint").mkdir()
    (tmp_path / ".out.checkpoint" / "notes.txt").write_text("mine")
    small.compressed(tmp_path / "out")
    assert small.content(tmp_path / ".out.checkpoint") == {"notes.txt": b"mine"}


# --------------------------------------------------------------------------------------------- when it is written


@pytest.mark.slow
def test_after_a_minute_of_work_a_step_is_kept_without_being_asked(
    tmp_path: Path, whole: dict[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "EVERY", 0.0)
    out = tmp_path / "out"

    class Dies(Stopper):
        @contextmanager
        def task(self, name: str, total: int | None = None) -> Iterator[Stopper]:
            if name == "correct_bias":
                raise MemoryError
            yield self

    with pytest.raises(MemoryError):
        small.compressed(out, recipe=RECIPE, progress=Dies(""))
    assert sorted(path.name for path in (tmp_path / ".out.checkpoint").iterdir()) == [
        f"{len(STEPS) - 2:04}",
        f"{len(STEPS) - 1:04}",
    ]
    assert files(small.compressed(out, recipe=RECIPE).path) == whole["null"]


def test_a_checkpoint_that_can_not_be_written_stops_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "EVERY", 0.0)
    monkeypatch.setattr(checkpoint, "save_pt2", full)
    assert small.compressed(tmp_path / "out", recipe=RECIPE)
    said = str(stopped(tmp_path / "two", "fold").value)
    assert "nothing was kept (" in said
    assert "No space left on device" in said
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_a_step_draws_the_same_whatever_ran_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[float] = []
    make = steps._base.make

    def drawing(use: str, options: Any) -> Any:
        step = make(use, options)

        def run(graph: Any, plan: Any, context: Any) -> Any:
            if use == "calibrate":
                drawn.append(float(torch.rand(())))
            elif use == "fold":
                torch.rand(7)
            return step(graph, plan, context)

        return run

    monkeypatch.setattr(steps._base, "make", drawing)
    stopped(tmp_path / "whole", "calibrate")
    stopped(tmp_path / "resumed", "quantize")
    stopped(tmp_path / "resumed", "calibrate")
    stopped(tmp_path / "other", "calibrate", seed=9)
    assert drawn[0] == drawn[1] != drawn[2]


# --------------------------------------------------------------------------------------------- as a process

NET = """
import os, sys, time
sys.path.insert(0, os.getcwd())
from tests import small
from bitport.proof import cost
import functools
cost.latency = functools.partial(cost.latency, seconds=0.03, rounds=8)
cost.run_memory = lambda *_: 1

def net(): return small.tiny(), small.patterns(1)[0]
def data():
    if os.path.exists("told"):
        open("told", "a").write("x")  # a step reads the data; give the other process time to signal
        time.sleep(float(os.environ["PAUSE"]))
    return iter(small.calibration())
"""


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_the_command_ends_with_75_and_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "slow_net.py").write_text(NET)
    (tmp_path / "told").write_text("")
    command = [
        sys.executable, "-m", "bitport", "compress", "slow_net:net", "--target", "null", "--recipe", "int8",
        "--data", "slow_net:data", "--out", "out", "--effort", "best",
    ]  # fmt: skip

    def start(pause: float) -> subprocess.Popen[str]:
        environment = small.process_environment(PAUSE=str(pause))
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)

    process = start(1.0)
    deadline = time.monotonic() + 60
    while (tmp_path / "told").read_text().count("x") < 3:  # the first batch's look, the metric's, a step's
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "stopping after this step" in said and "run the same command again to go on" in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()
    again = start(0.0)
    _, said = again.communicate(timeout=60)
    assert again.returncode == 0, said
    notes = bitport.Artifact.load(tmp_path / "out").measurements["notes"]
    assert any(note.startswith("resumed behind step") for note in notes)
    assert not (tmp_path / ".out.checkpoint").exists()


def test_room_is_asked_for_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "REPORT_BYTES", 2**62)
    with pytest.raises(ArtifactError, match=r"needs about [\d,]+ bytes and the disk has [\d,]+: free space"):
        small.compressed(tmp_path / "out", data=lambda: pytest.fail("the data was read"))
