"""Permutes sink and cancel; what a network computes stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.flow import Net, conv
from torch import Tensor, nn
from torch.nn import functional as F

import bitport
from bitport.graph.layout import cancel_permutes


def first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def run(forward: Callable[[Any, Tensor], Any], **parts: Any) -> tuple[Any, list[str]]:
    torch.manual_seed(0)
    net = Net(forward, a=conv(3, 8), b=conv(8, 8), **parts).eval()
    x = torch.randn(2, 6, 6, 3)
    graph = bitport.load(net, x)
    wanted = graph.run(x)
    names = [graph.name(node) for node in graph.nodes()]
    cancel_permutes(graph)
    for mine, theirs in zip(graph.run(x), wanted, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert graph.run(torch.randn(5, 6, 6, 3))[0].shape[0] == 5
    graph.check()
    kept = [graph.name(node) for node in graph.nodes() if graph.op(node).kind != "transpose"]
    assert set(kept) - {name for name in kept if ".turned" in name} <= set(names)
    return graph, [graph.op(node).kind for node in graph.nodes()]


@pytest.mark.parametrize(
    "between",
    [
        F.relu,
        F.hardswish,
        lambda x: x + 1.0,
        lambda x: x + x.mean((1, 2), keepdim=True),
        lambda x: F.softmax(x, -1),
        lambda x: torch.cat([x, x.sigmoid()], -1)[..., :8],
        lambda x: F.pad(x, (0, 0, 1, 2, 3, 0)),
        lambda x: x.transpose(1, 2).transpose(2, 1),
        lambda x: torch.where(x > 0, x, x * 0.1),
    ],
)
def test_between_two_convolutions_nothing_is_left(between: Callable[[Tensor], Tensor]) -> None:
    _, kinds = run(lambda m, x: m.b(first(between(last(m.a(first(x)))))))
    assert kinds.count("transpose") == 1


def test_stored_tensors_are_turned() -> None:
    gain = nn.Parameter(torch.randn(8))
    graph, kinds = run(lambda m, x: m.b(first(last(m.a(first(x))) * m.gain)), gain=gain)
    assert kinds.count("transpose") == 2  # of the input and of the gain, which is folded later
    module = graph.module()
    module(torch.randn(2, 6, 6, 3)).sum().backward()
    assert module.gain.grad is not None


def test_means_drop_axes() -> None:
    _, kinds = run(lambda m, x: last(m.a(first(x))).mean((1, 2)))
    assert kinds.count("transpose") == 1
    _, kinds = run(lambda m, x: last(m.a(first(x))).amax(3))
    assert kinds.count("transpose") == 1


def test_the_output_keeps_its_order() -> None:
    _, kinds = run(lambda m, x: last(m.b(first(last(m.a(first(x))).relu()))))
    assert kinds.count("transpose") == 2


def test_operands_in_different_orders_stay() -> None:
    _, kinds = run(lambda m, x: m.b(first(last(m.a(first(x))) + F.layer_norm(last(m.a(first(x))), (8,)))))
    assert kinds.count("transpose") >= 3
