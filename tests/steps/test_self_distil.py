"""The step `self_distil`: nearer to the float network on data it hasn't seen, on the grid, told, or left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.flow import Net, Stepped, assert_exact, images, ship
from tests.steps.test_reconstruct import network
from torch import Tensor, nn

from bitport.errors import RecipeError
from bitport.steps import self_distil
from bitport.steps._base import make

QUICK = {"steps": 60, "batch": 16}
NARROW = {"format": "int2", "granularity": "channel"}
FLOAT = {"format": "float32"}


class Distilled(Stepped):
    def __init__(
        self,
        net: nn.Module,
        batches: list[Tensor],
        target: str = "null",
        options: Any = None,
        **settings: Any,
    ) -> None:
        super().__init__("self_distil", net, batches, target, {**QUICK, **(options or {})}, **settings)
        (self.told,) = [row for row in self.tried if row["what"] == self_distil.WHAT]


@pytest.mark.parametrize(
    ("weights", "activations"),
    [
        (NARROW, {}), (NARROW, {"format": "int4"}), (NARROW, FLOAT),
        ({"format": "int2", "granularity": "group", "group": 8, "symmetric": False}, FLOAT),
        ({"format": "int3", "granularity": "tensor"}, {}),
    ],
    ids=str,
)  # fmt: skip
def test_outputs_are_nearer_on_data_it_has_not_seen(
    weights: dict[str, Any], activations: dict[str, Any]
) -> None:
    x = images(128)
    found = Distilled(network(), list(x[:96].split(16)), weights=weights, activations=activations)
    assert found.told["outcome"] == "kept"
    assert found.found.real_error(x[96:]) < 0.7 * found.plain.real_error(x[96:])


def test_every_integer_still_comes_out_on_the_runtime() -> None:
    x = images(64)
    found = Distilled(network(), list(x.split(16)), "onnxruntime", weights=NARROW)
    assert found.told["outcome"] == "kept"
    assert_exact(ship(found.found, x[:16]))
    for name, value in found.found.work.gm.named_parameters():
        if name.endswith("weight"):
            assert torch.allclose(value, found.graph.tensor(name), rtol=0, atol=1e-6), name


def test_what_is_near_already_is_left_alone() -> None:
    x = images(64)
    found = Distilled(network(), list(x.split(16)), weights={"format": "int8"}, activations=FLOAT)
    assert found.told["outcome"] == "left out" and "alone" in found.told["reason"]
    assert found.graph.digest() == found.plain.reference.digest() and found.plan is found.plain.plan


def test_a_rate_that_does_harm_is_not_kept() -> None:
    x = images(64)
    found = Distilled(
        network(), list(x.split(16)), options={"rate": 1.0, "steps": 4}, weights={"format": "int4"}
    )
    assert found.told["outcome"] == "left out"
    assert found.graph.digest() == found.plain.reference.digest()


def test_a_loss_that_is_no_number_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        self_distil, "relative_error", lambda *given: torch.tensor(float("nan"), requires_grad=True)
    )
    found = Distilled(network(), [images(32)], weights=NARROW)
    assert found.told["outcome"] == "left out" and "finite" in found.told["reason"]


def test_the_same_seed_gives_the_same_bytes() -> None:
    found = [Distilled(network(), [images(32)], weights=NARROW, options={"steps": 10}) for _ in range(2)]
    assert found[0].plan.to_record() == found[1].plan.to_record()
    assert found[0].graph.digest() == found[1].graph.digest()


def test_tokens_are_not_blended_and_learn_all_the_same() -> None:
    net = Net(
        lambda m, x: m.b(torch.relu(m.a(m.e(x)))), e=nn.Embedding(40, 12), a=nn.Linear(12, 16), b=nn.Linear(16, 5)
    )  # fmt: skip
    batches = [torch.randint(40, (16, 6)) for _ in range(4)]
    found = Distilled(net, batches, weights=NARROW, activations=FLOAT)
    assert found.told["outcome"] == "kept"


def test_batches_that_cannot_be_taken_apart_are_learned_from_whole() -> None:
    net = Net(lambda m, x: m.b(torch.relu(m.a(x))).mean(0), a=nn.Linear(6, 12), b=nn.Linear(12, 5))
    batches = [torch.randn(16, 6) for _ in range(4)]
    found = Distilled(net, batches, weights=NARROW, activations=FLOAT)
    assert found.told["outcome"] == "kept"


def test_a_large_network_learns_in_smaller_batches_then_in_fewer_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, int]] = []
    effort = self_distil._Student._effort

    def look(student: Any) -> tuple[int, int]:
        seen.append(effort(student))
        return seen[-1]

    monkeypatch.setattr(self_distil._Student, "_effort", look)
    batches = list(images(32).split(16))
    for work in (1e12, 4e7, 1e6):
        monkeypatch.setattr(self_distil, "WORK", work)
        Distilled(network(), batches, weights=NARROW, options={"steps": 20, "batch": 32})
    (first, second, third) = seen
    assert first == (20, 32) and second[0] == 20 and 8 <= second[1] < 32 and third[0] < 20 and third[1] == 8


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 0}, "steps is 0"), ({"batch": 0}, "batch is 0"), ({"samples": 0}, "samples is 0"),
        ({"rate": 0.0}, "rate is 0"),
    ],
)  # fmt: skip
def test_knobs_out_of_range(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        make("self_distil", options)
