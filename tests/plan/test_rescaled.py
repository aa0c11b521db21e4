"""Moved scales in a plan: written and read exactly, nothing of them believed, the float network behind them rebuilt."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.flow import Net, Prepared, conv, images, prepare
from tests.spread import Embedded, plant_loud
from torch import nn
from torch.nn import functional as F

from bitport.errors import ArtifactError, GraphError
from bitport.numerics.rotation import random_signs
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


# ------------------------------------------------------------------------------------- beside layers


@pytest.fixture(scope="module")
def dense() -> Prepared:
    torch.manual_seed(0)
    return prepare(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), [torch.randn(4, 6)], "null")


def test_ranks_are_read_back(dense: Prepared) -> None:
    plan = replace(dense.plan, low_rank={"2": 3, "0": 1})
    assert Plan.from_record(json.loads(json.dumps(plan.to_record()))).low_rank == {"2": 3, "0": 1}
    assert "low_rank" not in dense.plan.to_record()


@pytest.mark.parametrize("forged", [0, -1, 1.5, True, "8", None, [8]])
def test_forged_ranks_are_refused(dense: Prepared, forged: Any) -> None:
    with pytest.raises(ArtifactError, match="the plan is malformed"):
        Plan.from_record({**dense.plan.to_record(), "low_rank": {"0": forged}})


@pytest.mark.parametrize(
    ("ranks", "message"),
    [({"0": 10**9}, "rank 1000000000"), ({"1": 2}, "1: nothing can stand beside it"), ({"x": 2}, "'x'")],
)
def test_ranks_of_another_network_are_refused(dense: Prepared, ranks: dict[str, int], message: str) -> None:
    with pytest.raises(GraphError, match=message):
        counterpart(dense.reference, replace(dense.plan, low_rank=ranks))


def test_the_counterpart_has_what_stands_beside_layers_as_zeros(dense: Prepared) -> None:
    x = torch.randn(4, 6)
    twin = counterpart(dense.reference, replace(dense.plan, low_rank={"0": 3}))
    names = [twin.name(node) for node in twin.nodes()]
    assert names == ["0", "0_low_rank.down", "0_low_rank.up", "0_low_rank.sum", "1", "2"]
    assert torch.equal(twin.run(x)[0], dense.reference.run(x)[0])
    assert len(dense.reference.nodes()) == 3


# ------------------------------------------------------------------------------------- rotated streams


@pytest.fixture(scope="module")
def streamed() -> Prepared:
    torch.manual_seed(0)
    return prepare(plant_loud(Embedded(width=64)), [torch.randn(4, 9, 8)], "null")


SIGNS = random_signs(64, 5)
STREAM = "body.layers.0.norm1"


def test_signs_are_read_back(streamed: Prepared) -> None:
    plan = replace(streamed.plan, rotated={STREAM: SIGNS})
    back = Plan.from_record(json.loads(json.dumps(plan.to_record())))
    assert list(back.rotated) == [STREAM] and torch.equal(back.rotated[STREAM], SIGNS)
    assert back.rotated[STREAM].dtype == torch.int8
    assert "rotated" not in streamed.plan.to_record()
    assert Plan.from_record(streamed.plan.to_record()).rotated == {}


@pytest.mark.parametrize("forged", [[1, 0], [2, -1], [], [0.5], [[1]], 1, "text", [None], {"a": 1}])
def test_forged_signs_are_refused(streamed: Prepared, forged: Any) -> None:
    with pytest.raises(ArtifactError, match="the plan is malformed"):
        Plan.from_record({**streamed.plan.to_record(), "rotated": {STREAM: forged}})
    with pytest.raises(ArtifactError, match="the plan is malformed"):
        Plan.from_record({**streamed.plan.to_record(), "rotated": [STREAM]})


def test_the_counterpart_is_rotated_first_and_scaled_then(streamed: Prepared) -> None:
    reference, x = streamed.reference, torch.randn(2, 9, 8)
    before = reference.digest()
    scales = {STREAM: torch.linspace(0.5, 2, 64, dtype=torch.float64)}
    twin = counterpart(reference, replace(streamed.plan, rotated={STREAM: SIGNS}, rescaled=scales))
    with torch.no_grad():
        torch.testing.assert_close(twin.run(x)[0], reference.run(x)[0], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(twin.tensor(f"{STREAM}.weight"), (1 / scales[STREAM]).float())
    assert reference.digest() == before
    with pytest.raises(GraphError, match="another one"):
        counterpart(reference, replace(streamed.plan, rotated={"b": SIGNS}))
