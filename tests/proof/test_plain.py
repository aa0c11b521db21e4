"""The guard against results that are worse than plain rounding: fires on broken ones, not on honest ones."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import small
from tests.flow import Net, Prepared, conv, images, prepare, tokens
from torch import Tensor, nn

import bitport
from bitport.errors import GateFailed
from bitport.graph import Graph
from bitport.numerics.error import sqnr_db
from bitport.plan import Plan
from bitport.plan.constants import on_grid
from bitport.proof.plain import SAMPLES, hint, plain_record
from bitport.simulate import Arithmetic
from bitport.steps import calibrate

FLOAT = {"format": "float32"}
GROUPS = {"format": "int4", "granularity": "group", "group": 16, "symmetric": False}


@functools.cache
def loaded() -> Graph:
    return bitport.load(small.tiny(), torch.zeros(2, 1, 8, 8))


def planned(weights: Any = None, activations: Any = None) -> Prepared:
    return prepare(
        loaded(), small.calibration(), "null", weights=weights or {}, activations=activations or {}
    )


def record(prepared: Prepared, plan: Plan | None = None, graph: Graph | None = None) -> dict[str, Any]:
    batches = [(x,) for x, _ in small.evaluation()]
    return plain_record(
        prepared.reference, graph or prepared.work, plan or prepared.plan, Arithmetic(), iter(batches)
    )


# ------------------------------------------------------------------------------------------------ honest results


@pytest.mark.parametrize(
    ("weights", "activations"),
    [
        ({}, {}),
        ({"range": "mse"}, {"range": {"use": "percentile", "q": 99.9}}),
        ({"format": "int4", "range": "mse"}, {}),
        ({"format": "int4"}, {"format": "int4", "range": "mse"}),
        ({"format": "int2", "range": "mse"}, {}),
        ({"format": "ternary", "range": "mse"}, FLOAT),
        ({"format": "binary"}, FLOAT),
        (GROUPS, FLOAT),
        ({"format": "nf4", "range": "mse"}, FLOAT),
        ({"format": "codebook(16)"}, FLOAT),
        ({}, {"dynamic": True}),
        ({"granularity": "global"}, {"granularity": "global"}),
    ],
    ids=str,
)
def test_honest_results_pass(weights: dict[str, Any], activations: dict[str, Any]) -> None:
    prepared = planned(weights, activations)
    found = record(prepared)
    assert found["holds"] is True and found["samples"] == 64
    few = [x for x, _ in small.evaluation()]
    real = torch.cat([prepared.graph.run(x)[0] for x in few])
    mine = torch.cat([prepared.simulator().run((x,))[0] for x in few])
    assert found["sqnr_db"] == pytest.approx(sqnr_db(real, mine), abs=1e-4)
    assert found["plain_sqnr_db"] is not None


def test_ranges_from_the_extremes_are_plain_rounding() -> None:
    # the same samples measured both: nothing is left between the two
    few = [x for x, _ in small.evaluation()]
    prepared = prepare(loaded(), few, "null", activations={"range": "minmax"})
    found = record(prepared)
    assert found["sqnr_db"] == found["plain_sqnr_db"] and hint(found) == []


def test_only_some_samples_are_read() -> None:
    prepared = planned()

    def endless() -> Iterator[tuple[Tensor, ...]]:
        for _ in range(SAMPLES // 16):
            yield (small.patterns(16)[0],)
        raise AssertionError("more was read than is used")

    found = plain_record(prepared.reference, prepared.work, prepared.plan, Arithmetic(), endless())
    assert found["samples"] == SAMPLES


# ------------------------------------------------------------------------------------------------ broken results


def scaled(factor: float, source: str) -> Callable[[Plan], Plan]:
    def change(plan: Plan) -> Plan:
        ties = {name: tie for name, tie in plan.ties.items() if tie.source == source}
        return plan.with_ties({n: replace(t, scale=t.parameters()[0] * factor) for n, t in ties.items()})

    return change


def shuffled(plan: Plan) -> Plan:
    """Scales of groups in another order, as a layout that was misread would give."""
    ties = {name: tie for name, tie in plan.ties.items() if tie.source == "weight"}
    return plan.with_ties({n: replace(t, scale=t.parameters()[0].flip(0, 1)) for n, t in ties.items()})


def shifted(plan: Plan) -> Plan:
    ties = {name: tie for name, tie in plan.ties.items() if tie.source == "weight"}
    return plan.with_ties({n: replace(t, zero_point=t.parameters()[1] + 4) for n, t in ties.items()})


@pytest.mark.parametrize(
    ("weights", "activations", "sabotage"),
    [
        ({}, {}, scaled(1 / 8, "measured")),
        ({}, {}, scaled(30, "measured")),
        ({}, {}, scaled(1 / 4, "weight")),
        ({}, FLOAT, scaled(20, "weight")),
        (GROUPS, FLOAT, shuffled),
        (GROUPS, FLOAT, shifted),
        ({"format": "nf4"}, FLOAT, scaled(1 / 4, "weight")),
        ({"format": "codebook(16)"}, FLOAT, scaled(1 / 4, "weight")),
    ],
)
def test_broken_parameters_are_noticed(
    weights: Any, activations: Any, sabotage: Callable[[Plan], Plan]
) -> None:
    prepared = planned(weights, activations)
    plan = sabotage(prepared.plan)
    graph = prepared.reference.clone()
    on_grid(graph, plan)
    found = record(prepared, plan, graph)
    assert found["holds"] is False and found["sqnr_db"] < found["plain_sqnr_db"] - 6
    (said,) = hint(found)
    assert f"{found['plain_sqnr_db']:.1f} dB against {found['sqnr_db']:.1f} dB" in said
    assert 'range = "minmax"' in said


def test_weights_that_a_step_spoilt_are_noticed() -> None:
    prepared = planned()
    graph = prepared.work.clone()
    graph.set_tensor("body.bias", graph.tensor("body.bias").detach() + 2)
    assert record(prepared, graph=graph)["holds"] is False


def test_results_that_are_no_numbers_are_noticed() -> None:
    prepared = planned(GROUPS, FLOAT)
    graph = prepared.work.clone()
    graph.set_tensor("fc.bias", torch.full((small.CLASSES,), torch.nan))
    found = record(prepared, graph=graph)
    assert found["holds"] is False and found["sqnr_db"] is None


def test_a_loss_where_plain_rounding_has_none_is_noticed() -> None:
    # whole numbers up to 127: plain rounding is exact, so that its decibels are infinite
    net = Net(lambda m, x: m.a(x), a=nn.Linear(12, 6))
    with torch.no_grad():
        net.a.weight.copy_(torch.randint(-127, 128, (6, 12)).float())
        net.a.weight[:, 0] = 127
    prepared = prepare(net, [tokens(16)], "null", weights={"format": "int8"}, activations=FLOAT)
    batches = [(tokens(32),)]
    found = plain_record(prepared.reference, prepared.work, prepared.plan, Arithmetic(), batches)
    assert found["holds"] is True and found["plain_sqnr_db"] is None
    broken = scaled(1 / 4, "weight")(prepared.plan)
    found = plain_record(prepared.reference, prepared.reference.clone(), broken, Arithmetic(), batches)
    assert found["holds"] is False and found["plain_sqnr_db"] is None
    assert hint(found) == []


def test_where_plain_rounding_is_impossible_it_is_said() -> None:
    net = Net(lambda m, x: m.a(x), a=conv())
    with torch.no_grad():
        net.a.weight.mul_(1e-12)  # a bias of 32 bits fits only because calibration raises the weight's scale
    prepared = prepare(net, [images(8)], "null")
    found = plain_record(prepared.reference, prepared.work, prepared.plan, Arithmetic(), [(images(8),)])
    assert found["holds"] is True and found["plain_sqnr_db"] is None
    assert "plain rounding isn't possible here: bias of 8 channels" in found["plain_sqnr_db_reason"]
    assert hint(found) == []


# ------------------------------------------------------------------------------------------------ the gate


def test_a_broken_step_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small.quick(monkeypatch)
    small.without_page(monkeypatch)
    estimate = calibrate.estimate
    monkeypatch.setattr(calibrate, "estimate", lambda *given: tuple(end / 8 for end in estimate(*given)))
    with pytest.raises(GateFailed, match="plain rounding") as caught:
        small.compressed(tmp_path / "out", metric="mse", evaluation=None)
    assert not (tmp_path / "out").exists() and caught.value.path == tmp_path / "out.rejected"
    (gate,) = [g for g in caught.value.measurements["verdict"]["gates"] if "plain" in g["name"]]
    assert gate["verdict"] == "fails" and gate["value"] < gate["limit"]
    assert any("plain rounding would be nearer" in note for note in caught.value.measurements["notes"])


def test_an_honest_result_has_no_such_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small.quick(monkeypatch)
    small.without_page(monkeypatch)
    measured = small.compressed(tmp_path / "out").measurements
    assert not [g for g in measured["verdict.gates"] if "plain" in g["name"]]
    assert measured["plain.holds"] is True
    plain = small.compressed(tmp_path / "float", recipe="float").measurements
    assert plain["plain"] is None and plain["plain_reason"] == "nothing is quantized"
