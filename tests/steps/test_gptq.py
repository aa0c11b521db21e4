"""The step `gptq`: every layer that it can solve for, what it leaves alone and why, and that nothing gets worse."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from tests.flow import Net, Stepped, assert_exact, context, conv, images, prepare, ship
from torch import Tensor, nn
from torch.nn import functional as F

from bitport.errors import RecipeError
from bitport.graph import Graph
from bitport.plan import Plan
from bitport.recipe import Override, Recipe, StepSpec
from bitport.steps import gptq
from bitport.steps._base import make
from bitport.steps._judge import Judge, parted

FLOAT = {"format": "float32"}
GROUPS = {"format": "int3", "granularity": "group", "group": 8, "symmetric": False}
NARROW = {"format": "int3", "granularity": "channel"}


class Both(Stepped):
    """The same network with plain rounding, and with GPTQ behind it."""

    def __init__(
        self,
        net: nn.Module,
        batches: Sequence[Tensor],
        target: str = "onnxruntime",
        options: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__("gptq", net, batches, target, options or {}, **settings)
        self.solved = self.found
        self.told = [row for row in self.tried if row["what"] == "GPTQ"]

    def errors(self, x: Tensor) -> tuple[float, float]:
        return self.plain.real_error(x), self.solved.real_error(x)


def mixed(count: int = 64, channels: int = 6, size: int = 8) -> Tensor:
    """Images whose channels hang together."""
    torch.manual_seed(3)
    mix = torch.randn(channels, channels) * torch.rand(channels)
    return F.avg_pool2d(torch.einsum("nchw,dc->ndhw", images(count, channels, size + 2), mix), 3, 1)


def deep() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        conv(6, 12), nn.ReLU(), conv(12, 12, groups=12), nn.ReLU(), conv(12, 16, 1, bias=False), nn.ReLU(),
        conv(16, 8, stride=2, groups=2), nn.ReLU(), conv(8, 8, dilation=2, padding=2), nn.Flatten(),
        nn.Linear(128, 5),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("weights", "activations", "target"),
    [
        (NARROW, {}, "onnxruntime"), (NARROW, {"format": "int4"}, "null"), (GROUPS, FLOAT, "onnxruntime"),
        (GROUPS, FLOAT, "null"), ({"format": "int3", "granularity": "tensor"}, {}, "onnxruntime"),
        ({"format": "int3", "granularity": "group", "group": 8}, {"dynamic": True}, "null"),
    ],
)  # fmt: skip
def test_outputs_are_nearer_on_data_it_has_not_seen(
    weights: dict[str, Any], activations: dict[str, Any], target: str
) -> None:
    x = mixed(128)
    both = Both(deep(), list(x[:96].split(16)), target, weights=weights, activations=activations)
    assert "kept" in [row["outcome"] for row in both.told]
    assert "6 layers" in both.told[0]["reason"]
    plain, solved = both.errors(x[96:])
    limit = 0.9 if activations else 0.8  # the noise of activations stays
    assert solved < limit * plain


@pytest.mark.parametrize("activations", [{}, {"format": "int4"}])
def test_every_integer_still_comes_out_on_the_runtime(activations: dict[str, Any]) -> None:
    x = mixed(128)
    both = Both(deep(), list(x.split(32)), weights=NARROW, activations=activations)
    assert "kept" in [row["outcome"] for row in both.told]
    assert_exact(ship(both.solved, x[:16]))


def test_what_it_solves_lies_on_the_grid_already() -> None:
    both = Both(deep(), list(mixed().split(16)), weights=NARROW)
    for name, value in both.solved.work.gm.named_parameters():
        if name.endswith("weight"):
            assert torch.equal(value, both.graph.tensor(name)), name


@pytest.mark.parametrize("ndim", [1, 3])
def test_convolutions_of_other_dimensions(ndim: int) -> None:
    torch.manual_seed(0)
    kind = {1: nn.Conv1d, 3: nn.Conv3d}[ndim]
    net = Net(lambda m, x: m.b(torch.relu(m.a(x))), a=kind(4, 8, 3, padding=1), b=kind(8, 4, 2, stride=2))
    x = torch.randn(32, 4, *[8, 6, 6][:ndim])
    both = Both(net, list(x.split(8)), "null", weights=NARROW)
    plain, solved = both.errors(x)
    assert solved < plain


def test_layers_that_read_the_same_share_their_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    class Counted(gptq.InputMoments):
        def __init__(self, losses: bool) -> None:
            super().__init__(losses)
            made.append(1)

    monkeypatch.setattr(gptq, "InputMoments", Counted)
    net = Net(
        lambda m, x: m.d(m.a(x) + m.b(x) * m.c(x)), a=nn.Linear(12, 8), b=nn.Linear(12, 8), c=nn.Linear(12, 8),
        d=nn.Linear(8, 4),
    )  # fmt: skip
    both = Both(net, list(torch.randn(32, 6, 12).split(8)), "null", weights=GROUPS, activations=FLOAT)
    assert len(made) == 2 * len(both.told)


def test_the_same_data_gives_the_same_bytes() -> None:
    found = [Both(deep(), list(mixed().split(16)), weights=NARROW) for _ in range(2)]
    assert found[0].plan.to_record() == found[1].plan.to_record()
    assert found[0].graph.digest() == found[1].graph.digest()


# ------------------------------------------------------------------------------------- what it leaves alone


def left_out(both: Both) -> dict[str, str]:
    rows = [row["reason"] for row in both.told if row["outcome"] == "left out"]
    return dict(reason.split(": ", 1) for reason in rows if "layers, shift" not in reason)


def test_weights_that_are_wide_enough_are_left_to_plain_rounding() -> None:
    both = Both(deep(), list(mixed().split(16)), weights={"format": "int8"})
    assert both.graph.digest() == both.plain.reference.digest()
    assert set(left_out(both).values()) == {"plain rounding keeps its weights to 40 dB"}
    every = Both(deep(), list(mixed().split(16)), weights={"format": "int8"}, options={"above": 1000})
    assert "6 layers" in every.told[0]["reason"]


def test_shared_weights_are_left_to_plain_rounding() -> None:
    net = Net(lambda m, x: m.b(torch.relu(m.a(torch.relu(m.a(x))))), a=nn.Linear(12, 12), b=nn.Linear(12, 4))
    both = Both(net, list(torch.randn(32, 6, 12).split(8)), weights=NARROW)
    assert "several operators share its weights" in " ".join(left_out(both).values())
    assert torch.equal(both.graph.tensor("a.weight"), both.plain.reference.tensor("a.weight"))
    assert not torch.equal(both.graph.tensor("b.weight"), both.plain.reference.tensor("b.weight"))


def test_weights_that_a_float_operator_reads_too_are_left_to_plain_rounding() -> None:
    table = nn.Embedding(20, 12)
    head = nn.Linear(12, 20)
    head.weight = table.weight
    both = Both(
        Net(lambda m, x: m.head(F.relu(m.table(x))), table=table, head=head),
        [torch.randint(0, 20, (16, 6)) for _ in range(4)],
        weights=NARROW,
        activations=FLOAT,
        overrides=[Override(op="embedding", weights=FLOAT)],
    )
    assert left_out(both) == {"head": "several operators share its weights or their scale"}


def test_other_paddings_and_long_rows_are_left_to_plain_rounding() -> None:
    net = Net(lambda m, x: m.a(x), a=nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"))
    both = Both(net, list(images(32).split(8)), "null", weights=NARROW, options={"inputs": 5})
    assert both.solved.plan.ties["a.weight"].scale is not None
    assert torch.equal(both.graph.tensor("a.weight"), both.plain.reference.tensor("a.weight"))
    both = Both(
        Net(lambda m, x: m.a(x), a=nn.Linear(12, 4)),
        [torch.randn(8, 6, 12)],
        weights=NARROW,
        options={"inputs": 11},
    )
    assert left_out(both) == {"a": "its rows have more than 11 weights"}


def test_a_result_that_is_worse_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Plan] = []

    def error(judge: Judge, candidate: Graph, plan: Plan) -> float:
        seen.append(plan)
        return 0.1 if plan is seen[0] else 0.2

    monkeypatch.setattr(gptq.Judge, "error", error)
    both = Both(deep(), list(mixed().split(16)), weights=NARROW)
    assert [row["outcome"] for row in both.told] == ["left out"] * 3
    assert "shift 1: error of the simulated outputs 0.1 without, 0.2 with it" in both.told[0]["reason"]
    assert "shift 0.5: error of the simulated outputs 0.1 without, 0.2 with it" in both.told[1]["reason"]
    rounded, planned = make("correct_bias", {})(
        both.plain.reference.clone(),
        both.plain.plan,
        context(both.plain.graph, both.plain.target, list(mixed().split(16))),
    )
    assert both.graph.digest() == rounded.digest()
    assert both.plan.to_record() == planned.to_record()
    assert "bias correction" in {row["what"] for row in both.tried}


@pytest.mark.parametrize(
    ("errors", "tried", "kept"),
    [
        ([0.5, 0.3, 0.4], ["1", "0.5", "0"], ["1", "0.5"]),
        ([0.3, 0.4], ["1", "0.5"], ["1"]),
        ([1.5, 0.9, 0.8], ["1", "0.5", "0"], ["0.5", "0"]),
        ([math.nan, math.nan, 0.8], ["1", "0.5", "0"], ["0"]),
    ],
)
def test_weights_are_moved_less_as_long_as_that_is_better(
    errors: list[float], tried: list[str], kept: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter([1.0, *errors])
    monkeypatch.setattr(gptq.Judge, "error", lambda *_: next(left))
    monkeypatch.setattr(gptq, "_bias_corrected", lambda graph, plan, context: ((graph, plan), context))
    both = Both(deep(), list(mixed(16).split(4)), weights=NARROW)
    outcomes = {row["reason"].split("shift ")[1].split(":")[0]: row["outcome"] for row in both.told}
    assert list(outcomes) == tried
    assert [share for share, outcome in outcomes.items() if outcome == "kept"] == kept


def test_a_large_network_with_a_plain_gain_is_solved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "FEW", 0)
    monkeypatch.setattr(gptq, "PLAINLY", 0.9)
    both = Both(deep(), list(mixed(64).split(16)), weights=NARROW)
    (row,) = [row for row in both.told if "shift" in row["reason"]]
    assert row["outcome"] == "kept"


# ------------------------------------------------------------------------------------- odd data


def test_inputs_that_are_always_zero() -> None:
    x = mixed(64)
    x[:, 2] = 0
    both = Both(deep(), list(x.split(16)), weights=NARROW)
    plain, solved = both.errors(x)
    assert solved < plain
    # and what a dead input's weights are rounded to is the nearest code: other data may wake them
    dead = both.solved.work.tensor("0.weight")[:, 2] - both.plain.reference.tensor("0.weight")[:, 2]
    scale, _ = both.plan.ties["0.weight"].parameters()
    assert (
        float((dead.detach().abs() / scale[:, None, None]).max()) <= 3.5
    )  # within the format's range, never far off


@pytest.mark.parametrize("count", [1, 2, 5])
def test_fewer_samples_than_inputs(count: int) -> None:
    net = Net(lambda m, x: m.b(torch.relu(m.a(x))), a=nn.Linear(40, 40), b=nn.Linear(40, 3))
    x = torch.randn(count, 40)
    both = Both(net, [x], weights=NARROW)
    plain, solved = both.errors(x)
    assert solved <= 1.05 * plain


def test_data_that_says_nothing() -> None:
    net = Net(lambda m, x: m.b(torch.relu(m.a(x))), a=nn.Linear(6, 8), b=nn.Linear(8, 3))
    both = Both(net, [torch.zeros(8, 6)] * 4, "null", weights=GROUPS, activations=FLOAT)
    assert "say nothing" in left_out(both)["a and 1 more"]
    assert torch.equal(both.graph.tensor("a.weight"), both.plain.reference.tensor("a.weight"))


def test_activations_too_large_to_be_squared() -> None:
    net = Net(lambda m, x: m.b(m.a(x)), a=nn.Linear(6, 8), b=nn.Linear(8, 3))
    both = Both(net, [1e25 * torch.randn(8, 6)] * 4, "null", weights=GROUPS, activations=FLOAT)
    assert "not finite, or too large to be squared" in left_out(both)["a and 1 more"]


def test_a_bias_that_needs_coarse_scales_keeps_them() -> None:
    net = Net(lambda m, x: m.b(torch.relu(m.a(x))), a=nn.Linear(6, 8), b=nn.Linear(8, 3))
    with torch.no_grad():
        net.a.weight.mul_(1e-9)
        net.a.bias.fill_(3.0)
    both = Both(net, list(torch.randn(32, 6).split(8)), weights=NARROW)
    x = torch.randn(16, 6)
    assert_exact(ship(both.solved, x))
    plain, solved = both.errors(x)
    assert solved <= plain * 1.05


# ------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"damping": -1.0}, "damping is -1.0: give a number from 0 to 10"),
        ({"shift": 2.0}, "shift is 2.0"),
        ({"rounds": -1}, "rounds is -1"),
        ({"samples": 0}, "samples is 0: give at least 1"),
        ({"order": 3}, "order"),
        ({"nope": 1}, "nope"),
    ],
)
def test_odd_options_are_refused(option: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        Recipe(steps=(StepSpec("quantize"), StepSpec("gptq", option))).check()


def test_parts_of_the_data_are_held_back() -> None:
    net = Net(lambda m, x: m.a(x), a=nn.Linear(12, 4))
    prepared = prepare(net, [torch.randn(8, 6, 12)])
    graph, runtime = prepared.graph, prepared.target

    def sizes(counts: list[int], samples: int = 1000) -> tuple[list[int], list[int]]:
        batches = [torch.randn(count, 6, 12) for count in counts]
        fit, held = parted(context(graph, runtime, batches).calibration, graph, samples)
        return [len(x[0]) for x in fit], [len(x[0]) for x in held]

    assert sizes([8] * 8) == ([8] * 6, [8] * 2)
    assert sizes([8, 8]) == ([8], [8])
    assert sizes([8]) == ([6], [2])
    assert sizes([2]) == ([1], [1])
    assert sizes([1]) == ([1], [1])
    assert sizes([8] * 8, samples=30) == ([8] * 3, [8])


def test_the_error_of_outputs_is_noise_against_signal() -> None:
    net = Net(lambda m, x: m.a(x), a=nn.Linear(12, 4))
    prepared = prepare(net, [torch.randn(8, 6, 12)], weights=NARROW)
    x = (torch.randn(4, 6, 12),)
    arithmetic = prepared.target.arithmetic()
    found = Judge(prepared.reference, arithmetic, [x]).error(prepared.work, prepared.plan)
    assert found == pytest.approx(prepared.real_error(x) ** 2, rel=1e-4)
    assert Judge(prepared.reference, arithmetic, [x]).error(prepared.reference, Plan.empty("null")) < 1e-10
