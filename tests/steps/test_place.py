"""Integers are given up where the runtime measures them slower than float; weights stay narrow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.flow import Net, context, conv, images, prepare, ship
from torch import nn
from torch.nn import functional as F

import bitport
from bitport.errors import RecipeError
from bitport.graph import Graph
from bitport.plan import Plan
from bitport.plan.constants import on_grid
from bitport.steps._base import Context, make

INTEGERS, FLOAT = 2.0, 0.5


def network() -> nn.Module:
    torch.manual_seed(0)
    return Net(
        lambda m, x: m.c(F.adaptive_avg_pool2d(F.relu(m.b(F.relu(m.a(x)))) + m.d(x), 1).flatten(1)),
        a=conv(), b=conv(8, 8, groups=8), d=conv(3, 8, 1), c=nn.Linear(8, 4),
    )  # fmt: skip


def timed(speedups: Sequence[float], asked: list[Plan]) -> Any:
    """Speeds in the order in which they are asked for."""
    left = iter(speedups)

    def pace(graph: Graph, plan: Plan) -> dict[str, Any]:
        asked.append(plan)
        speedup = next(left)
        return {"speedup": speedup, "ci95": [0.99 * speedup, 1.01 * speedup]}

    return pace


def placed(*speedups: float, **options: Any) -> tuple[Plan, Plan, Context, list[Plan]]:
    """(plan before, plan after, context, plans that were timed)."""
    prepared, asked = prepare(network(), [images(8)]), list[Plan]()
    given = replace(context(prepared.graph, prepared.target, [images(8)]), pace=timed(speedups, asked))
    _, plan = make("place", options)(prepared.work, prepared.plan, given)
    return prepared.plan, plan, given, asked


def test_integers_that_are_faster_stay() -> None:
    before, after, given, asked = placed(INTEGERS)
    assert after is before and len(asked) == 1
    assert [row["outcome"] for row in given.tried] == ["kept"] and not given.notes


def test_integers_that_are_slower_become_narrow_weights() -> None:
    before, after, given, asked = placed(FLOAT, 1.0)
    assert asked == [before, after]
    assert {node.mode for node in after.nodes.values() if node.kernel} == {"weights"}
    assert {after.ties[tie].source for tie in after.edges.values()} == {"weight"}
    weights = {name: tie for name, tie in before.ties.items() if tie.source == "weight"}
    assert {name: after.ties[name] for name in weights} == weights  # same codes, same scales
    assert after.nodes["add"].kernel is None and "slower than float" in str(after.nodes["add"].reason)
    assert [row["outcome"] for row in given.tried] == ["left out"]
    assert "0.50 (0.49 … 0.51) times as fast" in given.notes[0]


def test_narrow_weights_that_are_slower_still_are_not_taken() -> None:
    before, after, given, _ = placed(FLOAT, FLOAT / 2)
    assert after is before and not given.notes
    assert "0.25" in given.tried[0]["reason"] and given.tried[0]["outcome"] == "kept"


def test_more_than_float_can_be_asked_for() -> None:
    before, after, _, _ = placed(1.5, 1.6, at_least=2.0)
    assert after is not before
    before, after, _, _ = placed(1.5, at_least=1.2)
    assert after is before


def test_what_was_float_between_narrow_weights_is_not_timed() -> None:
    prepared = prepare(network(), [images(8)], activations={"format": "float32"})
    given = replace(context(prepared.graph, prepared.target, [images(8)]), pace=timed([], []))
    assert make("place", {})(prepared.work, prepared.plan, given)[1] is prepared.plan


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_the_runtime_computes_it(target: str) -> None:
    prepared = prepare(network(), [images(8)], target)
    given = replace(context(prepared.graph, prepared.target, [images(8)]), pace=timed([FLOAT, 1.0], []))
    work, plan = make("place", {})(prepared.work.clone(), prepared.plan, given)
    on_grid(work, plan)
    shipped = ship(replace(prepared, work=work, plan=plan), images(16))
    assert not shipped.inspection.missed
    assert shipped.parity.float_max_error <= 1e-5


def test_from_the_preset_to_the_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, data = bitport.load(network(), images(2)), [images(8)]
    speeds = {"speedup": FLOAT, "ci95": [FLOAT, FLOAT]}
    right = bitport.api.Pace.__call__

    def slow(pace: Any, made: Graph, plan: Plan) -> dict[str, Any]:
        measured = right(pace, made, plan)
        assert measured["speedup"] > 0  # the real one runs as well
        integers = any(node.kernel and node.mode is None for node in plan.nodes.values())
        return speeds if integers else {"speedup": 1.0, "ci95": [0.9, 1.1]}

    monkeypatch.setattr(bitport.api.Pace, "__call__", slow)
    record = bitport.compress(
        graph, "int8-if-faster", target="onnxruntime", data=data, out=tmp_path / "out", effort="plain"
    ).measurements
    assert record["integer.mac_share"] == 0.0
    assert any("integers slower than float" in note for note in record["notes"])
    assert record["size.compressed_bytes"] < record["size.float_bytes"] + 4096


@pytest.mark.parametrize("at_least", [0.0, -1.0, float("nan"), 1e6])
def test_no_speed_up(at_least: float) -> None:
    with pytest.raises(RecipeError, match="give a speed-up"):
        placed(at_least=at_least)


def test_a_simulation_has_no_speed(tmp_path: Path) -> None:
    graph = bitport.load(network(), images(2))
    with pytest.raises(RecipeError, match="null is a simulation: there is nothing to measure"):
        bitport.compress(graph, "int8-if-faster", target="null", data=[images(8)], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
