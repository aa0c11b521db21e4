"""Train-only behaviour that a capture in eval mode loses is named; what it keeps is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitport.frontends.pytorch import load_module


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016) as vision libraries write it."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0 or not self.training:
            return x
        kept = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(1 - self.rate)
        return x * kept / (1 - self.rate)


class Block(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop_path = DropPath(rate)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.norm(F.relu(self.fc(x))))


class Deep(nn.Module):
    def __init__(self, rate: float, blocks: int = 2) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[Block(rate) for _ in range(blocks)])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)  # type: ignore[no-any-return]


class ByHand(nn.Module):
    """Functional dropout and attention whose rates follow `self.training`, as transformers are written."""

    def __init__(self, attention: float, functional: float) -> None:
        super().__init__()
        self.q = nn.Linear(6, 6)
        self.attention, self.functional = attention, functional

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        rate = self.attention if self.training else 0.0
        y = F.scaled_dot_product_attention(q, x, x, dropout_p=rate)
        return F.dropout(y, self.functional, self.training)


class Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return (self.a(x), self.b(x)) if self.training else self.a(x)


def notes(model: nn.Module, *shape: int) -> list[str]:
    return load_module(model, torch.randn(*shape)).notes


def test_stochastic_depth_is_named_with_its_modules() -> None:
    (note,) = notes(Deep(0.5), 4, 6)
    assert "blocks.0.drop_path, blocks.1.drop_path" in note
    assert "stochastic depth" in note
    (note,) = notes(Deep(0.5, blocks=7), 4, 6)
    assert "and 3 more" in note


def test_a_rate_of_zero_is_no_behaviour() -> None:
    assert not notes(Deep(0.0), 4, 6)


def test_dropout_that_survives_is_not_named_and_what_is_lost_is() -> None:
    assert not notes(nn.Sequential(Deep(0.0), nn.Dropout(0.5)), 4, 6)
    assert not notes(ByHand(0.0, 0.5), 2, 3, 6)
    (note,) = notes(nn.Sequential(ByHand(0.5, 0.0)), 2, 3, 6)
    assert "not in the graph: 0 " in note


def test_other_outputs_in_training_are_named() -> None:
    (note,) = notes(Auxiliary(), 4, 6)
    assert "other outputs" in note


@pytest.mark.parametrize("rate", [0.5])
def test_looking_changes_nothing_of_the_users(rate: float) -> None:
    model = Deep(rate).eval()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    graph = load_module(model, torch.randn(4, 6, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(state, torch.get_rng_state())
    assert not model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(torch.equal(before[k], v) for k, v in graph.gm.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in graph.gm.modules())


def test_a_model_that_can_not_train_on_its_example_still_loads() -> None:
    class Wants(nn.Module):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
            if self.training and labels is None:
                raise ValueError("labels, please")
            return x * 2

    assert not notes(Wants(), 2, 3)
