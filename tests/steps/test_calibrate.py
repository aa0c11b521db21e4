"""Ranges from data: batches in order, constants of a tie, symmetric or not by measured error."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.flow import Net, Prepared, context, conv, images, prepare
from torch.nn import functional as F

from bitport.numerics.ranges import estimate
from bitport.steps._base import make
from bitport.steps.calibrate import observe

AVERAGE = {"use": "moving_average", "momentum": 0.5}


def joined() -> Prepared:
    """A concatenation of an activation and a constant, which share a tie."""
    net = Net(
        lambda m, x: m.b(torch.cat([m.a(x), m.c.expand(x.shape[0], -1, -1, -1)], 1)),
        a=conv(),
        b=conv(9, 4),
        c=torch.full((1, 1, 8, 8), 25.0),
    )
    return prepare(net, [images(4)], activations={"range": AVERAGE})


def test_each_batch_is_one_update_in_order() -> None:
    prepared = prepare(Net(lambda m, x: m.b(F.relu(m.a(x))), a=conv(), b=conv(8, 4)), [images(4)])
    batches = [images(2) * factor for factor in (1.0, 5.0, 2.0)]
    histograms = observe(
        prepared.reference, prepared.plan, context(prepared.reference, prepared.target, batches)
    )
    updates = histograms["x"].updates
    assert [update.high for update in updates] == [float(batch.max()) for batch in batches]
    assert [update.number for update in updates] == [batch.numel() for batch in batches]
    assert all(len(histogram.updates) == 3 for histogram in histograms.values())


def test_moving_average_reaches_the_plan() -> None:
    batches = [images(2), images(2) * 8, images(2)]
    prepared = prepare(
        Net(lambda m, x: m.b(F.relu(m.a(x))), a=conv(), b=conv(8, 4)), batches, activations={"range": AVERAGE}
    )
    ends = [(float(batch.min()), float(batch.max())) for batch in batches]
    low, high = (0.25 * ends[0][i] + 0.25 * ends[1][i] + 0.5 * ends[2][i] for i in (0, 1))
    assert float(prepared.plan.ties["x"].parameters()[0]) == pytest.approx((high - low) / 255, rel=1e-6)


def test_constants_of_a_tie_belong_to_every_batch_and_are_counted_once() -> None:
    prepared = joined()
    batches = [images(2), images(2), images(2)]
    histograms = observe(
        prepared.reference, prepared.plan, context(prepared.reference, prepared.target, batches)
    )
    shared = [h for h in histograms.values() if h.maximum == 25.0]
    assert shared
    for histogram in shared:
        assert [update.high for update in histogram.updates] == [25.0] * 3
        assert histogram.count == 6 * 8 * 64 + 64
        assert sum(update.number for update in histogram.updates) == histogram.count
        assert estimate(histogram, prepared.plan.ties["x"].format, AVERAGE)[1] == 25.0


def test_symmetry_is_chosen_by_measured_error_where_the_plan_leaves_it_open() -> None:
    net = Net(lambda m, x: m.b(F.relu(m.a(x))), a=conv(), b=conv(8, 4))
    half = images(8)
    batches = [torch.cat([half, -half])]
    prepared = prepare(net, batches)
    names = list(prepared.plan.measured())
    relu = next(name for name in names if name != "x" and "b" not in prepared.plan.ties[name].members)
    opened = prepared.plan.with_ties(
        {
            name: replace(tie, choose=True)
            for name, tie in prepared.plan.measured().items()
            if name in ("x", relu)
        }
    )
    settings = context(prepared.reference, prepared.target, batches)
    _, plan = make("calibrate", {})(prepared.reference.clone(), opened, settings)
    assert plan.ties["x"].format.symmetric and int(plan.ties["x"].parameters()[1]) == 0
    assert not plan.ties[relu].format.symmetric and int(plan.ties[relu].parameters()[1]) == -128
    assert not any(tie.choose for tie in plan.ties.values())
    for name in set(names) - {"x", relu}:
        assert plan.ties[name].format == prepared.plan.ties[name].format
    assert {"1 tensors symmetric, 1 asymmetric, each by its expected error"} <= {
        row["reason"] for row in settings.tried
    }


def test_symmetry_stays_as_planned_otherwise() -> None:
    net = Net(lambda m, x: m.b(F.relu(m.a(x))), a=conv(), b=conv(8, 4))
    half = images(8)
    prepared = prepare(net, [torch.cat([half, -half])])
    assert not prepared.plan.ties["x"].format.symmetric
    assert not any(tie.choose for tie in prepared.plan.ties.values())
    settings = context(prepared.reference, prepared.target, [half])
    _, plan = make("calibrate", {})(prepared.reference.clone(), prepared.plan, settings)
    assert not plan.ties["x"].format.symmetric
    assert all(row["what"] != "symmetric ranges" for row in settings.tried)


def test_a_recipe_can_ask_for_the_choice() -> None:
    half = images(8)
    net = Net(lambda m, x: m.b(F.relu(m.a(x))), a=conv(), b=conv(8, 4))
    prepared = prepare(net, [torch.cat([half, -half])], activations={"symmetric": "auto"})
    found = {name: prepared.plan.ties[name].format.symmetric for name in prepared.plan.measured()}
    assert found["x"] and not all(found.values())


def test_where_nothing_is_measured_no_data_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    x = images(4)
    net = Net(lambda m, x: m.a(x.flatten(1)), a=torch.nn.Linear(192, 5))
    weights = {"format": "int4", "granularity": "group", "group": 32}
    prepared = prepare(net, [x], weights=weights, activations={"format": "float32"})
    settings = context(prepared.reference, prepared.target, [x])
    monkeypatch.setattr(settings, "float_pass", lambda graph: pytest.fail("a float pass"))
    assert observe(prepared.reference, prepared.plan, settings) == {}
