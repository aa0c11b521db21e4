"""Moved scales in a plan: written and read exactly, nothing of them believed, the float network behind them rebuilt."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.flow import Net, Prepared, conv, images, prepare
from torch.nn import functional as F

from bitport.errors import ArtifactError, GraphError
from bitport.plan import Plan
from bitport.plan.rescaled import counterpart

SCALES = torch.logspace(-2, 2, 8, dtype=torch.float64) / 3


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    torch.manual_seed(0)
    return prepare(Net(lambda m, x: m.b(F.relu(m.a(x))), a=conv(), b=conv(8, 4)), [images(4)], "null")


def test_scales_are_read_back_to_the_bit(prepared: Prepared) -> None:
    plan = replace(prepared.plan, rescaled={"a": SCALES})
    back = Plan.from_record(json.loads(json.dumps(plan.to_record())))
    assert list(back.rescaled) == ["a"] and torch.equal(back.rescaled["a"], SCALES)
    assert "rescaled" not in prepared.plan.to_record()
    assert Plan.from_record(prepared.plan.to_record()).rescaled == {}


@pytest.mark.parametrize(
    "forged",
    [[1.0, 0.0], [1.0, -2.0], [float("nan")], [float("inf")], [[1.0]], 3.0, "text", [None], {"a": 1}],
)
def test_forged_scales_are_refused(prepared: Prepared, forged: Any) -> None:
    record = {**prepared.plan.to_record(), "rescaled": {"a": forged}}
    with pytest.raises(ArtifactError, match="the plan is malformed"):
        Plan.from_record(record)
    with pytest.raises(ArtifactError, match="the plan is malformed"):
        Plan.from_record({**record, "rescaled": ["a"]})


def test_the_counterpart_computes_the_same_through_other_weights(prepared: Prepared) -> None:
    reference, x = prepared.reference, images(2)
    before = reference.digest()
    assert counterpart(reference, prepared.plan) is reference
    twin = counterpart(reference, replace(prepared.plan, rescaled={"a": SCALES}))
    with torch.no_grad():
        torch.testing.assert_close(twin.run(x)[0], reference.run(x)[0], rtol=1e-4, atol=1e-5)
    wanted = reference.tensor("a.weight") / SCALES.float().view(-1, 1, 1, 1)
    torch.testing.assert_close(twin.tensor("a.weight"), wanted)
    assert reference.digest() == before
    with pytest.raises(GraphError, match="another one"):
        counterpart(reference, replace(prepared.plan, rescaled={"b": SCALES[:4]}))
