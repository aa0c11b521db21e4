"""The step `low_rank`: nearer outputs where an error has directions, nothing where that doesn't help, and its cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from tests.flow import Net, Prepared, Stepped, conv, images, ship
from torch import Tensor, nn

from bitport.errors import RecipeError
from bitport.plan import Plan
from bitport.recipe import Recipe, StepSpec
from bitport.steps import low_rank
from bitport.steps._judge import parted

FLOAT = {"format": "float32"}


def groups(bits: int) -> dict[str, Any]:
    return {"format": f"int{bits}", "granularity": "group", "group": 32, "symmetric": False}


class Both(Stepped):
    """The same network with plain rounding, and with products beside its layers."""

    def __init__(
        self,
        net: nn.Module,
        batches: Sequence[Any],
        target: str = "null",
        options: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        settings = {"weights": groups(2), "activations": FLOAT} | settings
        super().__init__("low_rank", net, batches, target, options or {}, **settings)
        self.told = [row for row in self.tried if row["what"] == low_rank.WHAT]

    def errors(self, x: Tensor) -> tuple[float, float]:
        return self.plain.real_error(x), self.found.real_error(x)

    @property
    def outcomes(self) -> list[str]:
        return [row["outcome"] for row in self.told]


def mlp(bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 96, bias=bias),
        nn.ReLU(),
        nn.Linear(96, 96, bias=bias),
        nn.GELU(),
        nn.Linear(96, 48, bias=bias),
    )


def loud(count: int, width: int = 64, seed: int = 1) -> Tensor:
    """Rows whose inputs hang together and are of very different sizes, around a mean."""
    g = torch.Generator().manual_seed(seed)
    mix = (
        torch.randn(width, width, generator=torch.Generator().manual_seed(9))
        * torch.linspace(-3, 1, width).exp()
    )
    return torch.randn(count, width, generator=g) @ mix + 0.5


def batches(count: int = 128) -> list[Tensor]:
    return list(loud(count).split(16))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_are_nearer_on_data_it_has_not_seen(bits: int, bias: bool) -> None:
    both = Both(mlp(bias), batches(), weights=groups(bits))
    assert both.outcomes == ["kept"]
    assert both.plan.low_rank == {"0": 8, "2": 8, "4": 8}
    plain, found = both.errors(loud(64, seed=7))
    assert found < 0.8 * plain
    assert "3 layers, rank 8: error of the simulated outputs" in both.told[0]["reason"]
    assert ("biases corrected behind it" in both.told[0]["reason"]) == bias


def test_dynamic_layers_gain_too() -> None:
    weights = {"format": "int4", "granularity": "channel"}
    both = Both(mlp(), batches(), "onnxruntime", weights=weights, activations={"dynamic": True})
    assert both.outcomes == ["kept"]
    assert {both.plan.node(name).mode for name in both.plan.low_rank} == {"dynamic"}
    plain, found = both.errors(loud(64, seed=7))
    assert found < 0.8 * plain


def test_more_rank_is_nearer() -> None:
    x = loud(64, seed=7)
    found = [Both(mlp(), batches(), options={"rank": rank}).errors(x)[1] for rank in (1, 4, 12)]
    assert found[0] > found[1] > found[2]


def test_layers_keep_their_rounded_weights_and_their_names() -> None:
    both = Both(mlp(), batches())
    names = [both.graph.name(node) for node in both.graph.nodes() if "low_rank" not in both.graph.name(node)]
    assert names == [both.plain.reference.name(node) for node in both.plain.reference.nodes()]
    for name in ("0.weight", "2.weight", "4.weight"):
        assert torch.equal(both.graph.tensor(name), both.plain.reference.tensor(name))
        tie = both.plan.edges[next(edge for edge in both.plan.edges if edge.producer == name)]
        scale, plain = both.plan.ties[tie].scale, both.plain.plan.ties[tie].scale
        assert scale is not None and plain is not None and torch.equal(scale, plain)
    reason = both.plan.node("0_low_rank.up").reason
    assert reason == "it makes up in float for what rounding took from '0'"


def test_what_it_costs_is_told() -> None:
    both = Both(mlp(), batches())
    numbers = 8 * (64 + 96 + 96 + 96 + 96 + 48)
    (note,) = [note for note in both.context.notes if low_rank.WHAT in note]
    assert f"it takes {4 * numbers:,} bytes beside" in note
    assert f"and {numbers:,} multiply-accumulates in float for each row" in note
    made = sum(value.numel() for name, value in both.graph.gm.named_parameters() if "low_rank" in name)
    assert made == numbers


def test_the_original_is_still_found_behind_it() -> None:
    """Steps behind it compare with the float network operator by operator, which has zeros there."""
    both = Both(mlp(), batches())
    original = both.context.original(both.graph, both.plan)
    assert [original.name(n) for n in original.nodes()] == [both.graph.name(n) for n in both.graph.nodes()]
    assert (original.tensor("0_low_rank.up.weight") == 0).all()
    x = loud(8)
    assert torch.equal(original.run(x)[0], both.plain.graph.run(x)[0])


# ------------------------------------------------------------------------------------- where it doesn't help


def judged(both: Both, prepared: Prepared) -> float:
    """The error on the samples that the step held back."""
    _, held = parted(both.context.calibration, both.plain.graph, low_rank.SAMPLES)
    return max(prepared.real_error(inputs) for inputs in held)


def test_white_noise_gains_what_its_rank_is_worth_and_no_more() -> None:
    """Gauss weights and independent inputs: eight of 96 directions hold a fifth of the error, not most of it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(96, 96, bias=False))
    nn.init.normal_(net[0].weight)
    x = list(torch.randn(256, 96).split(64))
    both = Both(net, x, options={"rank": 8})
    plain, found = both.errors(torch.randn(512, 96))
    assert both.outcomes == (
        ["kept"] if judged(both, both.found) < judged(both, both.plain) else ["left out"]
    )
    assert 0.8 * plain < found <= plain


def test_a_product_that_errs_more_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    made = low_rank.compensation

    def wrong(error: Tensor, scale: Tensor | None, rank: int) -> low_rank.Factors:
        return made(-error, scale, rank)

    monkeypatch.setattr(low_rank, "compensation", wrong)
    both = Both(mlp(bias=False), batches())
    assert both.outcomes == ["left out"]
    assert both.graph.digest() == both.plain.reference.digest()
    assert not both.plan.low_rank and not both.context.notes


def test_integer_layers_are_left_out_with_the_reason() -> None:
    both = Both(mlp(), batches(), "onnxruntime", weights={}, activations={})
    assert both.outcomes == ["left out"]
    assert both.told[0]["reason"] == (
        "0 and 2 more: it takes and gives integers, which nothing in float can be added to"
    )
    assert both.plan == both.plain.plan


def test_networks_without_linear_layers_and_without_rounding() -> None:
    both = Both(nn.Sequential(conv()), [images(8)], weights=groups(4))
    assert [row["reason"] for row in both.told] == ["no Linear layer has quantized weights"]
    graph, plan = both.plain.graph, Plan.empty("null")
    assert low_rank.run(graph, plan, both.context, low_rank.Options()) == (graph, plan)
    assert both.tried[-1] == both.told[0]


def test_shared_weights_and_tiny_layers_are_left_out() -> None:
    net = Net(lambda m, x: m.head(m.a(torch.relu(m.a(x)))), a=nn.Linear(64, 64), head=nn.Linear(64, 4))
    both = Both(net, batches())
    reasons = {row["reason"].partition(": ")[0]: row["reason"] for row in both.told}
    assert "several operators share its weights" in reasons["a and 1 more"]
    assert "as many bytes as narrow weights have saved" in reasons["head"]
    assert not both.plan.low_rank


def test_what_is_read_as_integers_is_left_out() -> None:
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    both = Both(net, batches(), "onnxruntime", weights={}, activations={"dynamic": True})
    assert "0: what reads it takes integers" in both.told[0]["reason"]
    assert list(both.plan.low_rank) == ["1"]


def test_float16_loses_too_little() -> None:
    both = Both(mlp(), batches(16), weights={"format": "float16"})
    assert both.outcomes == ["left out"] and "float16 loses too little" in both.told[0]["reason"]


def test_weights_on_their_grid_have_lost_nothing() -> None:
    net = nn.Sequential(nn.Linear(64, 64))
    with torch.no_grad():
        net[0].weight.copy_(torch.arange(64 * 64).reshape(64, 64) % 16 - 8)
    both = Both(net, batches(32), weights=groups(4))
    assert [row["reason"] for row in both.told] == ["0: rounding lost nothing there"]


def test_twice_is_once() -> None:
    both = Both(mlp(), batches())
    rows = len(both.tried)
    graph, plan = low_rank.run(both.graph, both.plan, both.context, low_rank.Options())
    assert graph is both.graph and plan is both.plan
    assert "something stands beside it already" in both.tried[rows]["reason"]


# ------------------------------------------------------------------------------------- options


def test_a_budget_takes_those_that_gain_most_a_byte() -> None:
    every = Both(mlp(), batches())
    one = Both(mlp(), batches(), options={"budget": 1.4})
    assert 0 < len(one.plan.low_rank) < len(every.plan.low_rank)
    assert any("beyond the budget of 1.4" in row["reason"] for row in one.told)
    none = Both(mlp(), batches(), options={"budget": 1e-6})
    assert none.outcomes == ["left out"] and not none.plan.low_rank


def test_a_share_is_of_the_shorter_side() -> None:
    both = Both(mlp(), batches(), options={"rank": 0.1})
    assert both.plan.low_rank == {"0": 6, "2": 10, "4": 5}
    assert "rank 5 to 10" in both.told[0]["reason"]


def test_without_weighing_it_is_another_product() -> None:
    weighed, plain = Both(mlp(False), batches()), Both(mlp(False), batches(), options={"weigh": False})
    assert plain.outcomes == ["kept"]
    name = "0_low_rank.down.weight"
    assert not torch.allclose(weighed.graph.tensor(name), plain.graph.tensor(name))
    x = loud(64, seed=7)
    assert weighed.errors(x)[1] < plain.errors(x)[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0: give a whole number"),
        ({"rank": -0.5}, "rank is -0.5"),
        ({"rank": 1.5}, "or a share below 1"),
        ({"rank": True}, "rank"),
        ({"budget": 0.0}, "budget is 0.0"),
        ({"weigh": 1}, "true or false"),
        ({"ranks": 8}, "ranks is unknown; known: budget, rank, weigh"),
    ],
)
def test_options_are_held_to_their_ranges(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe((StepSpec("quantize"), StepSpec("low_rank", options))).check()


# ------------------------------------------------------------------------------------- on a runtime


@pytest.mark.parametrize(
    "settings",
    [
        {"weights": groups(2)},
        {"weights": groups(4)},
        {"weights": {"format": "int8"}, "activations": {"dynamic": True}},
    ],
)
def test_the_runtime_computes_it(settings: dict[str, Any]) -> None:
    from bitport.targets.onnxruntime import TARGET

    net = mlp()
    both = Both(net, batches(), TARGET({"accuracy_level": 0}), **settings)
    assert both.outcomes == ["kept"]
    x = loud(16, seed=7)
    shipped = ship(both.found, x)
    assert not shipped.inspection.missed
    assert torch.allclose(shipped.outputs[0], both.found.simulator().run([x])[0], rtol=1e-3, atol=1e-4)
    assert torch.allclose(shipped.outputs[0], shipped.as_written[0], rtol=1e-3, atol=1e-4)
