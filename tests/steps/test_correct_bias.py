"""correct_bias: channels get back the mean and the spread that rounding took, and their integers stay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from tests.flow import Net, Stepped, assert_exact, conv, images, ship
from torch import Tensor, nn
from torch.nn import functional as F

from bitport.numerics.codes import encode
from bitport.plan.constants import grid_of
from bitport.recipe import Override
from bitport.steps import correct_bias

NARROW = {"format": "int2", "granularity": "channel"}
GROUPS = {"format": "int2", "granularity": "group", "group": 9, "symmetric": False}


def deep(bias: bool = True) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        conv(3, 12, bias=bias), nn.ReLU(), conv(12, 12, groups=12, bias=bias), nn.ReLU(), conv(12, 16, bias=bias),
        nn.ReLU(), nn.Flatten(), nn.Linear(16 * 8 * 8, 5, bias=bias),
    )  # fmt: skip


def seen(count: int = 96) -> Tensor:
    torch.manual_seed(7)
    return images(count)


def stepped(net: nn.Module, options: Mapping[str, Any] | None = None, **settings: Any) -> Stepped:
    return Stepped("correct_bias", net, list(seen().split(16)), "onnxruntime", options or {}, **settings)


@pytest.mark.parametrize("weights", [NARROW, GROUPS])
def test_the_spread_brings_outputs_nearer_than_the_mean_alone(weights: dict[str, Any]) -> None:
    floats = {} if weights is NARROW else {"format": "float32"}
    spread = stepped(deep(), weights=weights, activations=floats)
    mean = stepped(deep(), {"spread": False}, weights=weights, activations=floats)
    (row,) = [row for row in spread.tried if row["what"] == "bias correction"]
    assert (row["outcome"], row["reason"].startswith("measured")) == ("kept", True)
    fresh = images(64)
    plain, with_spread, with_mean = (p.real_error(fresh) for p in (spread.plain, spread.found, mean.found))
    assert with_spread < 0.95 * with_mean
    assert with_spread < 0.8 * plain


def test_codes_stay_what_they_were() -> None:
    found = stepped(deep(), weights=NARROW)
    changed = 0
    for name, tie in found.plan.ties.items():
        if tie.source == "weight":
            before = encode(found.plain.reference.tensor(name), grid_of(found.plain.plan.ties[name]))
            assert torch.equal(before, encode(found.graph.tensor(name), grid_of(tie)))
            changed += not torch.equal(tie.parameters()[0], found.plain.plan.ties[name].parameters()[0])
    assert changed == 4


def test_every_integer_still_comes_out_on_the_runtime() -> None:
    found = stepped(deep(), weights=NARROW)
    assert_exact(ship(found.found, seen()[:16]))


def test_one_scale_for_all_channels_keeps_it() -> None:
    found = stepped(deep(), weights={"format": "int2", "granularity": "tensor"})
    for name, tie in found.plan.ties.items():
        if tie.source == "weight":
            assert torch.equal(tie.parameters()[0], found.plain.plan.ties[name].parameters()[0])
            assert torch.equal(found.graph.tensor(name), found.plain.reference.tensor(name))
    assert found.found.real_error(images(32)) < found.plain.real_error(images(32))


def test_weights_with_two_readers_keep_their_scale() -> None:
    layer = nn.Linear(12, 12)
    net = Net(lambda m, x: F.relu(m.a(F.relu(m.b(F.relu(m.a(x)))))), a=layer, b=nn.Linear(12, 12))
    x = [torch.randn(16, 12) for _ in range(4)]
    found = Stepped("correct_bias", net, x, "onnxruntime", {}, weights=NARROW)
    before, after = (plan.ties["a.weight"].parameters()[0] for plan in (found.plain.plan, found.plan))
    assert torch.equal(before, after)


def test_weights_that_a_float_operator_reads_too_keep_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(20, 12), nn.Linear(12, 20)
            self.head.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.table(x)))

    x = [torch.randint(0, 20, (16, 6)) for _ in range(4)]
    errors = iter([0.3, 0.2, 0.1])  # without, analytic, measured
    monkeypatch.setattr(correct_bias.Judge, "error", lambda *rest: next(errors))
    kept = [Override(op="embedding", weights={"format": "float32"})]
    found = Stepped(
        "correct_bias", Tied(), x, "onnxruntime", {}, weights=NARROW, activations={"format": "float32"},
        overrides=kept,
    )  # fmt: skip
    assert [row["outcome"] for row in found.tried if row["what"] == "bias correction"] == ["kept"]
    assert torch.equal(found.graph.tensor("table.weight"), found.plain.graph.tensor("table.weight"))


def test_networks_without_biases_are_left_alone() -> None:
    found = stepped(deep(bias=False), weights=NARROW)
    assert found.graph.digest() == found.plain.reference.digest()
    assert [row["outcome"] for row in found.tried if row["what"] == "bias correction"] == ["left out"]


def test_wide_weights_that_lost_nothing_are_hardly_moved() -> None:
    found = stepped(deep(), weights={"format": "int8"})
    for name, tie in found.plan.ties.items():
        if tie.source == "weight":
            ratio = tie.parameters()[0] / found.plain.plan.ties[name].parameters()[0]
            assert float((ratio - 1).abs().max()) < 0.02
