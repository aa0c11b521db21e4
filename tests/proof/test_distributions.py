"""What the record says of a tensor is what a plain count of its values says."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from tests.flow import Net, Prepared, conv, images, prepare
from torch import Tensor, nn
from torch.nn import functional as F

from bitport.data import Source
from bitport.plan import Plan
from bitport.progress import NullProgress
from bitport.proof import distributions as module
from bitport.proof.distributions import distributions

Row = dict[str, Any]


def network() -> Net:
    return Net(lambda m, x: m.b(F.relu(m.a(x))), a=conv(3, 8), b=conv(8, 4))


def seen(prepared: Prepared, data: list[Tensor], plan: Plan | None = None) -> dict[str, Row]:
    source = Source(
        data,
        role="evaluation",
        names=[spec.name for spec in prepared.graph.inputs],
        labels="optional",
        specs=prepared.graph.inputs,
    )
    rows = distributions(prepared.reference, plan or prepared.plan, source, NullProgress())
    return {row["tensor"]: row for row in rows}


def sound(row: Row, bins: int = module.MOST_BINS) -> None:
    """Edges ascend and hold the range and every count; what lies beyond the range's bins is what is clipped."""
    edges, counts, (low, high) = row["edges"], row["counts"], row["range"]
    assert len(edges) == len(counts) + 1 <= bins + 1
    assert all(a < b for a, b in pairwise(edges))
    assert edges[0] <= low < high <= edges[-1]
    assert sum(counts) == row["of"]
    play = 1e-5 * (high - low)
    middles = [(a + b) / 2 for a, b in pairwise(edges)]
    beyond = sum(n for n, x in zip(counts, middles, strict=True) if not low - play <= x <= high + play)
    assert beyond == round(row["clipped_share"] * row["of"])


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    torch.manual_seed(0)
    return prepare(network(), [images(8), images(8)], "null")


def test_every_weight_and_activation_in_network_order(prepared: Prepared) -> None:
    rows = seen(prepared, [images(8)])
    assert list(rows) == ["x", "a.weight", "relu", "b.weight", "b"]
    assert [row["what"] for row in rows.values()] == [
        "activations", "weights", "activations", "weights", "activations",
    ]  # fmt: skip
    assert {row["layer"] for row in rows.values()} == {"x", "a", "relu", "b"}
    for row in rows.values():
        sound(row)
    assert rows["x"]["of"] == 8 * 3 * 64


def test_activations_are_counted_as_by_hand(prepared: Prepared) -> None:
    data = [2 * images(8), 3 * images(5)]
    row = seen(prepared, data)["x"]
    tie = prepared.plan.ties["x"]
    scale, zero_point = (float(value) for value in tie.parameters())
    low, high = ((code - zero_point) * scale for code in (-128, 127))
    values = torch.cat([x.flatten() for x in data])
    clipped = ((values < low - scale / 2) | (values > high + scale / 2)).double().mean()
    assert row["range"] == pytest.approx([low, high])
    assert row["clipped_share"] == pytest.approx(float(clipped)) and row["clipped_share"] > 0.05
    by_hand = torch.histogram(values, torch.tensor(row["edges"])).hist
    assert float((by_hand - torch.tensor(row["counts"])).abs().sum()) < 0.02 * len(values)
    assert row["edges"][0] <= float(values.min()) and row["edges"][-1] >= float(values.max())
    assert (row["format"], row["granularity"], row["unit"]) == ("int8", "tensor", "value")


def test_weights_with_a_scale_per_channel_are_in_steps(prepared: Prepared) -> None:
    row = seen(prepared, [images(2)])["a.weight"]
    assert (row["unit"], row["granularity"], row["range"]) == ("steps", "channel", [-128, 127])
    assert row["clipped_share"] == 0
    assert row["edges"][0] == pytest.approx(-128.5) and row["edges"][-1] == pytest.approx(127.5)
    scale, _ = prepared.plan.ties["a.weight"].parameters()
    steps = prepared.reference.tensor("a.weight").detach() / scale.reshape(-1, 1, 1, 1)
    by_hand = torch.histogram(steps, torch.tensor(row["edges"])).hist
    assert float((by_hand - torch.tensor(row["counts"])).abs().sum()) <= 4


def test_a_weight_with_one_scale_that_is_too_small_is_clipped(prepared: Prepared) -> None:
    tie = prepared.plan.ties["a.weight"]
    weight = prepared.reference.tensor("a.weight").detach()
    narrow = replace(
        tie,
        format=tie.format.with_(granularity="tensor"),
        scale=(weight.abs().max() / 254).reshape(()),
        zero_point=torch.tensor(0, dtype=torch.int32),
    )
    row = seen(prepared, [images(2)], prepared.plan.with_ties({"a.weight": narrow}))["a.weight"]
    sound(row)
    assert row["unit"] == "value"
    assert row["range"][1] == pytest.approx(float(weight.abs().max()) / 2, rel=0.01)
    assert 0.2 < row["clipped_share"] < 0.8


def test_an_outlier_takes_the_tails_and_leaves_the_range_its_bins(prepared: Prepared) -> None:
    x = images(4)
    x[0, 0, 0, 0], x[0, 0, 0, 1] = 1e6, -3e3
    row = seen(prepared, [x])["x"]
    low, high = row["range"]
    inside = [edge for edge in row["edges"] if low <= edge <= high]
    assert len(inside) >= module.MOST_BINS // 4 - 1
    assert row["edges"][-1] >= 1e6 and row["edges"][0] <= -3e3
    assert sum(n > 0 for n in row["counts"]) > 10
    sound(row)


def test_what_is_not_finite_is_left_out(prepared: Prepared) -> None:
    x = images(4)
    x[0, 0, 0, 0], x[1, 0, 0, 0] = float("inf"), float("nan")
    tie = module._of("x", "x", "activations", prepared.plan.ties["x"])
    tie.update(x)
    assert tie.count == x.numel() - 2
    tie.update(torch.full((4,), float("nan")))
    tie.update(torch.zeros(0))
    assert tie.count == x.numel() - 2


def test_it_stops_behind_enough_samples(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLES", 10)
    assert seen(prepared, [images(8)] * 5)["x"]["of"] == 16 * 3 * 64


def test_many_tensors_get_fewer_bins(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ENOUGH", 5 * 20)
    for row in seen(prepared, [images(8)]).values():
        sound(row, 20)
    monkeypatch.setattr(module, "_ENOUGH", 1)
    assert all(len(row["counts"]) <= 16 for row in seen(prepared, [images(8)]).values())


@pytest.mark.parametrize("shared", [{"granularity": "channel"}, {"granularity": "group", "group": 5}])
@pytest.mark.parametrize("fmt", ["int4", "uint4", "int8n"])
def test_a_zero_point_of_its_own_moves_each_group(fmt: str, shared: dict[str, Any]) -> None:
    """A range over all values clips none of them, wherever its zero point lies."""
    torch.manual_seed(1)
    layer = nn.Linear(23, 6)
    network = Net(lambda m, x: m.a(x), a=layer)
    with torch.no_grad():
        layer.weight.add_(torch.linspace(-3, 3, 6)[:, None])
    asked = {"format": fmt, "symmetric": False, **shared}
    prepared = prepare(network, [torch.randn(8, 23)], "null", weights=asked)
    _, zero_point = prepared.plan.ties["a.weight"].parameters()
    assert len(set(zero_point.flatten().tolist())) > 1
    row = seen(prepared, [torch.randn(8, 23)])["a.weight"]
    assert row["clipped_share"] == 0
    assert row["range"][1] - row["range"][0] == prepared.plan.ties["a.weight"].format.levels - 1
    sound(row)


def test_few_codes_are_one_bar_each() -> None:
    torch.manual_seed(0)
    small = prepare(
        Net(lambda m, x: m.a(x), a=nn.Linear(12, 8)), [torch.randn(4, 6, 12)], "null",
        weights={"format": "int4", "granularity": "tensor"},
    )  # fmt: skip
    row = seen(small, [torch.randn(4, 6, 12)])["a.weight"]
    sound(row)
    assert len(row["counts"]) == 16
