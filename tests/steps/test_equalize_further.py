"""The step `equalize`: residual streams, outputs too bad to rank by, and weights of loud inputs."""

from __future__ import annotations

import pytest
import torch
from tests.flow import Net, context, conv, images, prepare
from torch import Tensor, nn

from bitport.steps import _rewritten, equalize
from bitport.steps._base import make
from bitport.steps._judge import Judge
from bitport.steps.equalize import LAYERS


def test_a_residual_stream_that_lies_far_apart_is_evened_out() -> None:
    torch.manual_seed(0)
    net = Net(
        lambda m, x: m.d(m.a(x) + m.c(torch.relu(m.b(m.a(x))))),
        a=conv(3, 8), b=conv(8, 6), c=conv(6, 8), d=conv(8, 4),
    )  # fmt: skip
    factor = torch.logspace(-1, 1, 8)
    with torch.no_grad():
        for layer in (net.a, net.c):
            layer.weight.mul_(factor[:, None, None, None])
            layer.bias.mul_(factor)
        for layer in (net.b, net.d):
            layer.weight.div_(factor[None, :, None, None])
    x = images(64)
    weights = {"format": "int8", "granularity": "tensor"}
    prepared = prepare(net, list(x.split(16)), "null", weights=weights)
    settings = context(prepared.graph, prepared.target, list(x.split(16)))
    graph, plan = make("equalize", {})(prepared.reference.clone(), prepared.plan, settings)
    assert next(row for row in settings.tried if row["what"] == LAYERS)["outcome"] == "kept"
    assert "a" in plan.rescaled and "c" not in plan.rescaled  # one scale for both
    held = [(x[48:],)]
    errors = [
        Judge(prepared.reference, settings.arithmetic, held).error(found, planned)
        for found, planned in ((prepared.reference, prepared.plan), (graph, plan))
    ]
    assert errors[1] < 0.2 * errors[0]


def test_outputs_that_err_too_much_to_rank_anything_keep_even_channels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = iter((2.0, 3.0))
    monkeypatch.setattr(_rewritten.Judge, "error", lambda *given: next(found))
    net = Net(lambda m, x: m.b(torch.relu(m.a(x))), a=conv(3, 8), b=conv(8, 4))
    with torch.no_grad():
        net.a.weight[0] *= 100
        net.b.weight[:, 0] /= 100
    x = images(64)
    prepared = prepare(net, list(x.split(16)), "null", weights={"format": "int2"})
    settings = context(prepared.graph, prepared.target, list(x.split(16)))
    _, plan = make("equalize", {})(prepared.reference.clone(), prepared.plan, settings)
    assert plan.rescaled and not any("lowered" in note for note in settings.notes)


class Loud(nn.Module):
    """A norm with a few loud channels, less than four times their median, in front of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(64), nn.Linear(64, 48)
        with torch.no_grad():
            self.norm.weight[::16] = 3.5

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(self.norm(x))
        return y


@pytest.mark.parametrize(("bits", "tried"), [(3, True), (8, False)])
def test_weights_of_loud_inputs_grow_where_they_are_narrow(bits: int, tried: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(128, 64)
    weights = {"format": f"int{bits}", "granularity": "group", "group": 32, "symmetric": False}
    prepared = prepare(
        Loud(), list(x[:96].split(16)), "null", weights=weights, activations={"format": "float32"}
    )
    settings = context(prepared.graph, prepared.target, list(x[:96].split(16)))
    graph, plan = make("equalize", {})(prepared.reference.clone(), prepared.plan, settings)
    rows = [row for row in settings.tried if row["what"] == equalize.SALIENT]
    assert bool(rows) is tried
    if not tried:
        assert plan is prepared.plan
        return
    assert rows[0]["outcome"] == "kept" and 1 <= len(rows) <= equalize.TIMES
    held = [(x[96:],)]
    errors = [
        Judge(prepared.reference, settings.arithmetic, held).error(found, planned)
        for found, planned in ((prepared.reference, prepared.plan), (graph, plan))
    ]
    assert errors[1] < 0.95 * errors[0]


def test_integer_activations_leave_loud_inputs_alone() -> None:
    x = torch.randn(64, 64)
    prepared = prepare(Loud(), [x], "null", weights={"format": "int3"})
    settings = context(prepared.graph, prepared.target, [x])
    make("equalize", {})(prepared.reference.clone(), prepared.plan, settings)
    assert not [row for row in settings.tried if row["what"] == equalize.SALIENT]
