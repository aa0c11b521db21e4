"""The plan with gradients gives what the exact simulator gives, up to float rounding, and what it learns arrives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.flow import Net, Prepared, conv, images, prepare, tokens
from torch import Tensor, nn
from torch.nn import functional as F

from bitport.fake import Fake
from bitport.plan import Plan
from bitport.simulate import Simulator


def residual() -> tuple[nn.Module, Tensor]:
    def run(m: Net, x: Tensor) -> Tensor:
        y = F.relu(m.a(x))
        y = F.relu(m.b(y) + y)
        made: Tensor = m.head(F.hardswish(m.c(y)).mean((2, 3)))
        return made

    return Net(run, a=conv(3, 8), b=conv(8, 8), c=conv(8, 8, groups=8), head=nn.Linear(8, 5)), images(16)


def attention() -> tuple[nn.Module, Tensor]:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.norm(x)
        q, k, v = m.qkv(y).reshape(*y.shape[:2], 3, 2, 6).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        made: Tensor = x + m.out(F.gelu(m.o(y)))
        return made

    parts = {
        "norm": nn.LayerNorm(12),
        "qkv": nn.Linear(12, 36),
        "o": nn.Linear(12, 20),
        "out": nn.Linear(20, 12),
    }
    return Net(run, **parts), tokens(16)


def outputs(fake: Fake, x: Tensor) -> Tensor:
    graph = fake.graph
    entry = next(node for node in graph.gm.graph.nodes if node.op == "placeholder")
    made: Tensor = fake.run(graph.nodes(), {entry: x})[graph.output_nodes()[0]]
    return made


MODES: list[dict[str, Any]] = [
    {}, {"activations": {"format": "int4"}}, {"activations": {"format": "float32"}},
    {"weights": {"format": "int3", "granularity": "group", "group": 4}, "activations": {"format": "float32"}},
    {"activations": {"dynamic": True}},
]  # fmt: skip


def prepared(net: tuple[nn.Module, Tensor], settings: dict[str, Any]) -> tuple[Prepared, Tensor]:
    torch.manual_seed(0)
    model, x = net
    return prepare(model, list(x.split(8)), "null", **settings), x


@pytest.mark.parametrize("settings", MODES, ids=str)
@pytest.mark.parametrize("make", [residual, attention])
def test_it_follows_the_simulator(make: Any, settings: dict[str, Any]) -> None:
    found, x = prepared(make(), settings)
    exact = found.simulator().run((x,))[0]
    real = found.graph.run(x)[0].detach()
    made = outputs(Fake(found.work, found.plan), x).detach()
    noise = float((exact - real).norm())
    assert noise > 0
    # single values may fall on the other side of a tie; they are few
    assert float((made - exact).norm()) < 0.35 * noise


@pytest.mark.parametrize("make", [residual, attention])
def test_without_a_plan_it_is_the_float_network(make: Any) -> None:
    found, x = prepared(make(), {})
    made = outputs(Fake(found.reference, Plan.empty("null")), x)
    assert torch.allclose(made, found.graph.run(x)[0], atol=1e-5)


def test_gradients_reach_weights_biases_and_scales() -> None:
    found, x = prepared(residual(), {"activations": {"format": "int4"}})
    weight = found.work.tensor("a.weight").detach().clone().requires_grad_()
    bias = found.work.tensor("a.bias").detach().clone().requires_grad_()
    tie = found.tie("relu")
    scale = found.plan.ties[tie].parameters()[0].clone().requires_grad_()
    outputs(
        Fake(found.work, found.plan, {"a.weight": weight, "a.bias": bias}, {tie: scale}), x
    ).square().sum().backward()
    for learned in (weight, bias, scale):
        assert learned.grad is not None and bool(learned.grad.abs().sum() > 0)


def test_values_that_are_left_unrounded_still_pass_the_relu() -> None:
    found, x = prepared(residual(), {"activations": {"format": "int4"}})
    seen: list[Tensor] = []

    def keep(rounded: Tensor, real: Tensor) -> Tensor:
        seen.append(real)
        return real

    made = outputs(Fake(found.work, found.plan, drop=keep), x)
    assert seen
    weights_only = Simulator(found.work, Plan.empty("null"), found.target.arithmetic()).run((x,))[0]
    assert torch.allclose(made.detach(), weights_only, atol=1e-4)
