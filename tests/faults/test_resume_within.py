"""Stopped or killed inside a method: run again, it goes on behind the last finished layer, to the same bytes."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import small

from bitport import Recipe, checkpoint, interrupt
from bitport.errors import Interrupted
from bitport.recipe import StepSpec
from bitport.steps import gptq, reconstruct

NARROW = {"format": "int2"}
SAME = ("plan.json", "recipe.toml", "graph.pt2", "sample.npz")
STEP = StepSpec("quantize", {"weights": NARROW, "activations": {"format": "int4"}})
METHODS = {"gptq": StepSpec("gptq", {"above": 1000.0}), "reconstruct": StepSpec("reconstruct", {"steps": 12})}


def recipe(method: str) -> Recipe:
    return Recipe(
        steps=(StepSpec("fold"), STEP, StepSpec("calibrate"), METHODS[method]), name="narrow", effort="plain"
    )


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    small.quick(monkeypatch)
    small.without_page(monkeypatch)
    monkeypatch.setattr(checkpoint, "WORTH", 0.0)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is really done: layers solved for, blocks learned."""
    seen: list[str] = []
    solve, opened = gptq.solve, reconstruct._Learning._learn

    def counted(*args: Any, **options: Any) -> Any:
        seen.append("layer")
        return solve(*args, **options)

    def learned(learning: Any, block: Any) -> bool:
        seen.append("block")
        return opened(learning, block)

    monkeypatch.setattr(gptq, "solve", counted)
    monkeypatch.setattr(reconstruct._Learning, "_learn", learned)
    return seen


class Stopper:
    """Asks the run to stop when a task has advanced so far."""

    def __init__(self, task: str, after: int) -> None:
        self.name, self.after, self.done, self.within = task, after, 0, ""

    @contextmanager
    def task(self, name: str, total: int | None = None) -> Iterator[Stopper]:
        before, self.within = self.within, name
        yield self
        self.within = before

    def advance(self, n: int = 1) -> None:
        self.done += n * (self.within == self.name)
        if self.done == self.after and self.within == self.name:
            self.done += 1
            os.kill(os.getpid(), signal.SIGINT)


TASKS = {"gptq": "solving for weights", "reconstruct": "reconstructing blocks"}


def content(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in small.content(folder).items() if name in SAME or "model" in name}


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_it_goes_on_behind_the_last_finished_layer_to_the_same_bytes(
    method: str, killed: bool, tmp_path: Path, work: list[str]
) -> None:
    whole = content(small.compressed(tmp_path / "whole", "null", recipe=recipe(method)).path)
    everything = len(work)
    out, place = tmp_path / "out", tmp_path / ".out.checkpoint"
    work.clear()
    with interrupt.handled(), pytest.raises(Interrupted, match="interrupted behind step 3 of 4"):
        small.compressed(out, "null", recipe=recipe(method), progress=Stopper(TASKS[method], 1))
    first = len(work)
    assert 0 < first < everything and list(place.glob("layers-*/*.safetensors"))
    if killed:  # nobody asked: no step in front of it was kept either
        for generation in place.iterdir():
            if generation.name.isdigit():
                shutil.rmtree(generation)
    work.clear()
    again = small.compressed(out, "null", recipe=recipe(method))
    assert content(again.path) == whole
    assert len(work) == everything - first  # none is done twice
    assert not place.exists()


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["a byte", "cut", "a link", "another run"])
def test_a_damaged_layer_is_done_again(damage: str, tmp_path: Path, work: list[str]) -> None:
    whole = content(small.compressed(tmp_path / "whole", "null", recipe=recipe("gptq")).path)
    everything, out = len(work), tmp_path / "out"
    with interrupt.handled(), pytest.raises(Interrupted):
        small.compressed(out, "null", recipe=recipe("gptq"), progress=Stopper(TASKS["gptq"], 1))
    for path in (tmp_path / ".out.checkpoint").glob("layers-*/*.safetensors"):
        held = path.read_bytes()
        if damage == "a byte":
            path.write_bytes(held[:-1] + bytes([held[-1] ^ 1]))
        elif damage == "cut":
            path.write_bytes(held[: len(held) // 2])
        elif damage == "a link":
            elsewhere = tmp_path / "elsewhere"
            path.rename(elsewhere)
            path.symlink_to(elsewhere)
        else:
            shutil.move(path.parent, path.parent.with_name("layers-0003-" + 32 * "0"))
            break
    work.clear()
    assert content(small.compressed(out, "null", recipe=recipe("gptq")).path) == whole
    assert len(work) == everything


def test_short_steps_leave_nothing_behind_when_they_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "WORTH", 60.0)
    kept = checkpoint.Finished(tmp_path / "place", 3, dict, str)
    kept.keep("a", {"x": torch.ones(2)})
    assert kept.found("a") is None and not (tmp_path / "place").exists()


def test_what_is_kept_comes_back_to_the_bit(tmp_path: Path) -> None:
    kept = checkpoint.Finished(tmp_path / "place", 3, lambda: {"seed": 0}, str)
    tensors = {"w": torch.randn(3, 4)[:, ::2], "none": torch.zeros(0), "one": torch.tensor(-0.0)}
    kept.keep("a", tensors)
    kept.keep("b", {})
    found = kept.found("a")
    assert found is not None and set(found) == set(tensors)
    for name, value in tensors.items():
        assert torch.equal(found[name], value) and found[name].shape == value.shape
    assert kept.found("b") == {} and kept.found("c") is None
    assert checkpoint.Finished(tmp_path / "place", 3, lambda: {"seed": 1}, str).found("a") is None
    assert checkpoint.Finished(tmp_path / "place", 4, lambda: {"seed": 0}, str).found("a") is None
    kept.discard()
    assert kept.found("a") is None


def test_a_disk_that_refuses_stops_no_run(tmp_path: Path) -> None:
    (tmp_path / "place").write_text("a file is in the way")
    kept = checkpoint.Finished(tmp_path / "place", 3, dict, str)
    kept.keep("a", {"x": torch.ones(2)})
    assert kept.found("a") is None
