"""The step `reconstruct`: nearer to the float network than plain rounding, never further than GPTQ, and told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.flow import Stepped, assert_exact, context, conv, images, prepare, ship
from torch import Tensor, nn
from torch.nn import functional as F

from bitport.errors import RecipeError
from bitport.graph import Graph
from bitport.plan import Plan
from bitport.recipe import Recipe, StepSpec
from bitport.steps import gptq, reconstruct
from bitport.steps._base import make
from bitport.steps._judge import Judge, split_batches

QUICK = {"steps": 80, "batch": 16, "narrow": False}
NARROW = {"format": "int2", "granularity": "channel"}


class Unit(nn.Module):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.a, self.b = conv(inside, outside), conv(outside, outside)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return F.relu(self.b(x) + x)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        Unit(3, 8), Unit(8, 8), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    )


class Learned(Stepped):
    def __init__(
        self,
        net: nn.Module,
        batches: list[Tensor],
        target: str = "null",
        options: Any = None,
        **settings: Any,
    ) -> None:
        super().__init__("reconstruct", net, batches, target, {**QUICK, **(options or {})}, **settings)
        self.told = {row["what"]: row for row in self.tried}


@pytest.fixture
def without_gptq(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain rounding in its place, so that what was learned is what is kept."""
    monkeypatch.setattr(gptq, "run", lambda graph, plan, *rest: (graph, plan))


@pytest.mark.parametrize("activations", [{}, {"format": "int4"}, {"format": "float32"}], ids=str)
def test_outputs_are_nearer_on_data_it_has_not_seen(without_gptq: None, activations: dict[str, Any]) -> None:
    x = images(128)
    learned = Learned(network(), list(x[:96].split(16)), weights=NARROW, activations=activations)
    assert learned.told["block reconstruction"]["outcome"] == "kept"
    assert "of 3 blocks" in learned.told["block reconstruction"]["reason"]
    assert learned.found.real_error(x[96:]) < 0.85 * learned.plain.real_error(x[96:])


def test_every_integer_still_comes_out_on_the_runtime(without_gptq: None) -> None:
    x = images(64)
    learned = Learned(network(), list(x.split(16)), "onnxruntime", weights=NARROW)
    assert learned.told["block reconstruction"]["outcome"] == "kept"
    assert_exact(ship(learned.found, x[:16]))
    learnt = 0
    for name, value in learned.found.work.gm.named_parameters():
        # a block that came out no nearer has its weights as they were
        if name.endswith("weight") and not torch.equal(
            learned.graph.tensor(name), learned.plain.reference.tensor(name)
        ):
            assert torch.equal(value, learned.graph.tensor(name)), name
            learnt += 1
    assert learnt


def test_the_better_of_it_and_gptq_is_kept() -> None:
    x = images(96)
    batches = list(x.split(16))
    learned = Learned(network(), batches, weights=NARROW)
    solved = make("gptq", {})(learned.plain.reference.clone(), learned.plain.plan, learned.context)
    held = [(batches[-1],)]

    def error(graph: Graph, plan: Plan) -> float:
        return Judge(learned.plain.reference, learned.plain.target.arithmetic(), held).error(graph, plan)

    assert (
        error(learned.graph, learned.plan) <= error(*solved) <= error(learned.plain.work, learned.plain.plan)
    )
    # and a step behind it finds nothing to do
    behind = context(learned.plain.graph, learned.plain.target, batches)
    again = make("gptq", {})(learned.graph, learned.plan, behind)
    assert again[0].digest() == learned.graph.digest()


def test_the_same_seed_gives_the_same_bytes(without_gptq: None) -> None:
    found = [Learned(network(), list(images_of(7).split(16)), weights=NARROW) for _ in range(2)]
    assert found[0].plan.to_record() == found[1].plan.to_record()
    assert found[0].graph.digest() == found[1].graph.digest()


def images_of(seed: int) -> Tensor:
    return torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_a_block_that_diverges_stays_as_it_was(without_gptq: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def loss(self: Any, *arguments: Any) -> Tensor:
        calls.append(1)
        return torch.tensor(torch.nan, requires_grad=True)

    monkeypatch.setattr(reconstruct._Learning, "_loss", loss)
    learned = Learned(network(), [images_of(1)], weights=NARROW)
    assert "0 of 3 blocks" in learned.told["block reconstruction"]["reason"]
    assert len(calls) == 3  # each ends at once
    assert learned.graph.digest() == learned.plain.reference.digest() and learned.plan == learned.plain.plan


def test_wide_weights_are_left_to_plain_rounding() -> None:
    learned = Learned(network(), [images_of(1)], weights={"format": "int8"})
    assert learned.told["block reconstruction"]["outcome"] == "left out"
    assert learned.graph.digest() == learned.plain.reference.digest()


def test_batches_of_differing_shapes_and_several_inputs(without_gptq: None) -> None:
    from tests.flow import Net2

    net = Net2(lambda m, x, y: m.b(torch.relu(m.a(x) + y)), a=nn.Linear(6, 8), b=nn.Linear(8, 3))
    batches = [(torch.randn(n, 6), torch.randn(n, 8)) for n in (16, 8, 24, 16)]
    prepared = prepare(net, batches, "null", weights=NARROW)
    settings = context(prepared.graph, prepared.target, batches)
    make("reconstruct", QUICK)(prepared.reference.clone(), prepared.plan, settings)
    assert any(row["what"] == "block reconstruction" for row in settings.tried)
    parts = split_batches(batches, prepared.graph, 10)
    assert [len(x[0]) for x in parts] == [10, 6, 8, 10, 10, 4, 10, 6]
    assert all(len(x) == len(y) for x, y in parts)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"drop": 2.0}, "drop is 2.0: give a number from 0 to 1"),
        ({"rate": -1.0}, "rate"),
    ],
)
def test_odd_options_are_refused(option: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        Recipe(steps=(StepSpec("quantize"), StepSpec("reconstruct", option))).check()


def test_wide_activations_are_left_to_gptq_unless_told_otherwise() -> None:
    x = images(64)
    wide = Learned(network(), list(x.split(16)), options={"narrow": True}, weights=NARROW)
    assert "fewer than 8 bits" in wide.told["block reconstruction"]["reason"]
    assert wide.graph.digest() == wide.plain.reference.digest()
    narrow = Learned(
        network(), list(x.split(16)), options={"narrow": True}, weights=NARROW, activations={"format": "int4"}
    )
    assert "of 3 blocks" in narrow.told["block reconstruction"]["reason"]
