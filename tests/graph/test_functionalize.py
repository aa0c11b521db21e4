"""In-place operators: equal values where safe, a refusal that names the node where not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitport.errors import GraphError
from bitport.frontends.pytorch import load_module


class Of(nn.Module):
    def __init__(self, body: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def _relu_chain(x: Tensor) -> Tensor:
    y = x * 2
    F.relu_(y)
    y.add_(1).mul_(3)
    return y


def _slices(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 1] = 5.0
    y[:, 2:].sub_(y[:, :2])
    return y


def _old_views_see_the_write(x: Tensor) -> Tensor:
    y = x + 1
    row, turned = y[:, 0], y.t()
    y.mul_(2)
    return row + turned.sum(0)


def _base_sees_the_view(x: Tensor) -> Tensor:
    y = x + 1
    y.t()[1].zero_()
    return y


def _view_of_view(x: Tensor) -> Tensor:
    y = x + 0
    y.unsqueeze(0).permute(2, 0, 1)[0].add_(x[:, 0])
    return y * y


def _masked(x: Tensor) -> Tensor:
    y = x.clone()
    y.masked_fill_(x > 0, -1.0).clamp_(min=-0.5)
    return y


def _copy_cast(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y.copy_((x > 0).sum(1, keepdim=True))
    return y + x


SAFE = [
    _relu_chain,
    _slices,
    _old_views_see_the_write,
    _base_sees_the_view,
    _view_of_view,
    _masked,
    _copy_cast,
]


@pytest.mark.parametrize("body", SAFE, ids=lambda f: f.__name__)
def test_safe_writes_keep_their_meaning(body: Callable[[Tensor], Tensor]) -> None:
    graph = load_module(Of(body), torch.randn(3, 4))
    graph.check()
    for batch in (2, 6):
        x = torch.randn(batch, 4)
        assert torch.equal(graph.run(x.clone())[0], body(x.clone()))


def test_a_write_to_an_input_is_said() -> None:
    graph = load_module(Of(lambda x: x.add_(1) * 2), torch.zeros(2, 3))
    x = torch.zeros(2, 3)
    assert torch.equal(graph.run(x)[0], torch.full((2, 3), 2.0))
    assert torch.equal(x, torch.zeros(2, 3))
    assert "works on a copy" in graph.notes[0]


def test_an_alias_that_may_be_a_copy_is_refused() -> None:
    def body(x: Tensor) -> Tensor:
        y = x * 2
        z = y.reshape(-1)
        z.add_(1)
        return y

    with pytest.raises(GraphError, match="may share"):
        load_module(Of(body), torch.randn(2, 3))


def test_state_is_refused() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return x * self.count

    with pytest.raises(GraphError, match="'count'"):
        load_module(Counter(), torch.randn(2, 3))
