"""`device=`: float passes elsewhere give the same plan; a device that isn't there is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests import small

import bitport
from bitport.errors import RecipeError


def test_a_device_that_is_not_here_is_refused_before_any_work(tmp_path: Path) -> None:
    missing = "cuda:17" if torch.cuda.is_available() else "cuda"
    for device in (missing, "gpu"):
        with pytest.raises(RecipeError, match="leave it out to calibrate on the CPU"):
            small.compressed(tmp_path / "out", device=device)
    assert not (tmp_path / "out").exists()


def test_the_way_through_another_device_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`cpu:0` is the CPU under another name, so that the graph is moved and its nodes are mapped back."""
    monkeypatch.setattr("bitport.steps._base.usable_device", lambda device: device or "cpu")
    first, second = (
        small.compressed(tmp_path / name, recipe="int8", effort="balanced", device=device)
        .subject()
        .plan.to_record()
        for name, device in (("a", None), ("b", "cpu:0"))
    )
    assert first == second


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_calibration_on_a_gpu_gives_the_same_plan_within_a_step(tmp_path: Path) -> None:
    ours, theirs = (
        small.compressed(tmp_path / str(device), effort="balanced", device=device).subject().plan
        for device in ("cpu", "cuda")
    )
    assert ours.edges == theirs.edges and ours.nodes == theirs.nodes
    for name, tie in ours.ties.items():
        scale, zero_point = tie.parameters()
        other, other_zero = theirs.ties[name].parameters()
        levels = tie.format.high - tie.format.low
        assert float(((scale - other).abs() / scale).max()) * levels <= 1, name
        assert int((zero_point - other_zero).abs().max()) <= 1, name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_graph_that_was_loaded_to_a_gpu_compresses(tmp_path: Path) -> None:
    graph = bitport.load(small.tiny(), small.patterns(1)[0], device="cuda")
    made = bitport.compress(
        graph,
        "int8",
        target="null",
        data=small.calibration(),
        evaluation=small.evaluation(),
        out=tmp_path / "out",
    )
    assert next(graph.gm.parameters()).device.type == "cuda"
    assert made.measurements["task.float"] is not None
