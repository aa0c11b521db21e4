"""Shares of the final loss: what is rounded alone, that errors add up, what is refused and what is skipped."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests import small
from tests.flow import Net, Prepared, conv, prepare
from torch import Tensor, nn
from torch.nn import functional as F

from bitport.errors import DataError
from bitport.proof import blame
from bitport.proof.blame import Blame, count, halves, only, record_shares, relative_error, shares, take, units


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return Net(
            lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x)))).mean((2, 3))),
            a=conv(),
            b=conv(8, 8),
            c=nn.Linear(8, 4),
        )


def data(samples: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(samples, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def made() -> Prepared:
    return prepare(network(), [data()], "null")


def found(made: Prepared, batch: Tensor | None = None) -> Blame:
    given = [(data(seed=1) if batch is None else batch,)]
    return Blame(made.reference, made.work, made.plan, made.target.arithmetic(), given)


def test_units_are_what_is_rounded_in_network_order(made: Prepared) -> None:
    rows = {unit.name: unit for unit in units(made.work, made.plan)}
    assert list(rows)[:3] == ["x", "a", "b"] and list(rows)[-1] == "c"
    assert rows["x"].op == "input" and not rows["x"].weights and len(rows["x"].result) == 1
    assert rows["a"].head == "relu" and "relu" not in rows  # absorbed
    assert {edge.producer for edge in rows["a"].weights} == {"a.weight", "a.bias"}
    assert {edge.consumer for edge in rows["c"].result} == {"output"}
    every = [edge for unit in rows.values() for edge in unit.edges()]
    assert len(every) == len(set(every))


def test_a_unit_alone_rounds_nothing_else(made: Prepared) -> None:
    for unit in units(made.work, made.plan):
        assert set(only(made.plan, unit).edges) == set(unit.edges())
        assert set(only(made.plan, unit, (blame.WEIGHTS,)).edges) == set(unit.weights)


def test_the_error_of_a_unit_is_that_of_its_rounding_computed_by_hand(made: Prepared) -> None:
    rows = {unit.name: unit for unit in units(made.work, made.plan)}
    x = data(seed=1)
    net = network()
    real = net(x).detach()
    with torch.no_grad():
        net.b.weight.copy_(made.work.tensor("b.weight"))  # on its grid
        rounded = net(x)
    wanted = float((real - rounded).double().square().sum() / real.double().square().sum())
    assert found(made).error(rows["b"], (blame.WEIGHTS,)) == pytest.approx(
        wanted, rel=0.02
    )  # a bias is rounded, too
    tie = made.plan.ties[made.tie("relu#2")]
    scale, zero = tie.parameters()

    def on_grid(value: Tensor) -> Tensor:
        q = (value / scale).round() + zero
        return (q.clamp(tie.format.low, tie.format.high) - zero) * scale

    net = network()
    with torch.no_grad():
        rounded = net.c(on_grid(F.relu(net.b(F.relu(net.a(x))))).mean((2, 3)))
    wanted = float((real - rounded).double().square().sum() / real.double().square().sum())
    assert found(made).error(rows["b"], (blame.RESULT,)) == pytest.approx(wanted, rel=1e-3)


def test_errors_add_up_to_that_of_the_network(made: Prepared) -> None:
    judged = found(made)
    total = sum(judged.error(unit) for unit in units(made.work, made.plan))
    whole = relative_error(judged.floats, (made.simulator().run(inputs) for inputs in judged.batches))
    assert whole / 3 < total < whole * 3
    assert whole > 0


def test_looking_at_a_unit_leaves_no_trace(made: Prepared) -> None:
    judged, digest = found(made), made.reference.digest()
    first = [judged.error(unit) for unit in units(made.work, made.plan)]
    assert [judged.error(unit) for unit in units(made.work, made.plan)] == first
    assert made.reference.digest() == digest


@pytest.mark.parametrize(
    ("weights", "activations"),
    [
        ({"format": "int4"}, {"format": "float32"}),
        ({"format": "int8"}, {"format": "int8", "dynamic": True}),
    ],
)
def test_layers_on_floats_are_blamed_for_their_weights(weights: Any, activations: Any) -> None:
    prepared = prepare(network(), [data()], "null", weights=weights, activations=activations)
    judged = found(prepared)
    rows = units(prepared.work, prepared.plan)
    assert [unit.name for unit in rows] == ["a", "b", "c"] and not any(unit.result for unit in rows)
    errors = [judged.error(unit) for unit in rows]
    assert min(errors) > 0
    whole = relative_error(judged.floats, (prepared.simulator().run(inputs) for inputs in judged.batches))
    assert whole / 3 < sum(errors) < whole * 3


# ------------------------------------------------------------------------------------------------ the measure


def test_relative_error_counts_outputs_alike_whatever_their_scale() -> None:
    large, tiny = torch.full((4,), 1e6), torch.full((4,), 1e-6)
    found = relative_error([(large, tiny)], [(large * 1.1, tiny * 1.3)])
    assert found == pytest.approx((0.01 + 0.09) / 2, rel=1e-4)
    labels = torch.tensor([1, 2])
    assert relative_error([(labels, tiny)], [(labels + 1, tiny)]) == 0.0  # integers are no signal
    silent = torch.zeros(4)
    assert relative_error([(silent, tiny)], [(silent + 1, tiny)]) == 0.0


def test_relative_error_runs_over_batches_as_one() -> None:
    a, b = torch.tensor([1.0]), torch.tensor([3.0])
    assert relative_error([(a,), (b,)], [(a,), (b + 1,)]) == pytest.approx(1 / 10)


def test_relative_error_refuses_what_has_no_signal_and_keeps_infinity() -> None:
    with pytest.raises(DataError, match="no output"):
        relative_error([(torch.zeros(3),)], [(torch.ones(3),)])
    with pytest.raises(DataError, match="no output"):
        relative_error([(torch.ones(3, dtype=torch.int64),)], [(torch.ones(3, dtype=torch.int64),)])
    assert relative_error([(torch.ones(2),)], [(torch.tensor([1.0, math.nan]),)]) == math.inf


def test_shares_are_parts_of_one() -> None:
    assert shares({"a": 3.0, "b": 1.0}) == {"a": 0.75, "b": 0.25}
    assert shares({"a": 0.0, "b": 0.0}) == {"a": 0.0, "b": 0.0}
    assert shares({"a": math.inf, "b": 1.0, "c": math.inf}) == {"a": 0.5, "b": 0.0, "c": 0.5}
    assert shares({}) == {}


# ------------------------------------------------------------------------------------------------ samples


def test_take_counts_samples_not_batches(made: Prepared) -> None:
    batches = [(data(6),), (data(6),), (data(6),)]
    assert [count(inputs) for inputs in take(made.graph, batches, 8)] == [6, 2]
    assert [count(inputs) for inputs in take(made.graph, batches, 100)] == [6, 6, 6]


def test_halves_share_no_sample_and_take_turns(made: Prepared) -> None:
    x = torch.arange(5.0)[:, None, None, None].expand(5, 3, 8, 8)
    choose, confirm = halves(made.graph, [(x,)])
    assert choose[0][0][:, 0, 0, 0].tolist() == [0, 2, 4] and confirm[0][0][:, 0, 0, 0].tolist() == [1, 3]
    choose, confirm = halves(made.graph, [(x[:1],), (x[1:2],), (x[2:3],)])  # batches of one go whole
    assert [b[0][0, 0, 0, 0].item() for b in choose] == [0, 2] and [
        b[0][0, 0, 0, 0].item() for b in confirm
    ] == [1]


# ------------------------------------------------------------------------------------------------ the record


def rows(made: Prepared) -> list[dict[str, Any]]:
    return [{"name": name} for name in ("a", "b", "c", "nobody")]


def test_rows_get_their_shares(made: Prepared) -> None:
    table = rows(made)
    record_shares(table, made.reference, made.work, made.plan, made.target.arithmetic(), [(data(),)])
    values = [row["loss_share"] for row in table[:3]]
    assert all(0 < value < 1 for value in values) and sum(values) <= 1
    assert table[3]["loss_share"] is None and "nothing of it" in table[3]["loss_share_reason"]


def test_a_network_of_too_many_layers_is_skipped_with_the_reason(
    made: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blame, "PASSES", 4)
    table = rows(made)
    record_shares(table, made.reference, made.work, made.plan, made.target.arithmetic(), [(data(),)])
    assert all(row["loss_share"] is None for row in table)
    assert "more than 4 passes" in table[0]["loss_share_reason"]


def test_compress_records_the_shares_the_same_each_time(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.quick(monkeypatch)
    small.without_page(monkeypatch)
    found = [small.compressed(tmp_path / name).measurements["layers"] for name in ("a", "b")]
    values = [{row["name"]: row["loss_share"] for row in layers} for layers in found]
    assert values[0] == values[1]
    assert values[0]["stem"] > 0 and sum(v for v in values[0].values() if v is not None) <= 1.0001
