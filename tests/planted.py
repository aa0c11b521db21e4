"""Networks with one planted bad layer each, for tests of what finds and cures it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitport.recipe import Override, Recipe, StepSpec


class Chain(nn.Module):
    """Three convolutions, a pool, a Linear: 3×8×8 images, 5 outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.middle = nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = F.relu6(self.middle(x))  # no scale can move through it
        x = F.relu(self.last(x))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Gated(nn.Module):
    """A squeeze-and-excite block whose gates are nearly closed: a step of 1/256 is as large as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.squeeze = nn.Linear(16, 8)
        self.excite = nn.Linear(8, 16)
        self.gate = nn.Sigmoid()
        self.mix = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        scale = self.gate(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        x = F.relu(self.mix(x * scale[:, :, None, None]))
        return self.head(x.mean((2, 3)))


@dataclass(frozen=True)
class Planted:
    """`culprit`: names of the operators that are to be found, any of them."""

    model: nn.Module
    recipe: Recipe
    culprit: tuple[str, ...]


def _seeded(kind: type[nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind().eval()


def _int8(*overrides: Override, weights: str = "channel") -> Recipe:
    options = {
        "weights": {"format": "int8", "granularity": weights},
        "activations": {"format": "int8", "range": "mse"},
    }
    return Recipe(steps=(StepSpec("quantize", options),), overrides=overrides, name="planted")


@torch.no_grad()
def outlier_channel() -> Planted:
    """A channel of a convolution that its ReLU always silences is 200 times as large as the others.

    Such channels come from folding a BatchNorm whose variance is nearly 0.
    """
    model = _seeded(Chain, 1)
    assert isinstance(model, Chain)
    model.middle.weight[3] *= 200
    model.middle.bias[3] = -1000
    return Planted(model, _int8(weights="tensor"), ("middle",))


def wrong_range() -> Planted:
    """The recipe gives a layer's result a range that most of its values lie beyond."""
    bad = {"range": {"use": "fixed", "low": 0.0, "high": 0.05}}
    return Planted(_seeded(Chain, 2), _int8(Override("middle", activations=bad)), ("middle",))


@torch.no_grad()
def closed_gate() -> Planted:
    """The gates lie around 0.01, which 8 bits over [0, 1) round to 2 or 3 steps; the next layer is as much larger."""
    model = _seeded(Gated, 3)
    assert isinstance(model, Gated)
    model.excite.weight *= 2
    model.excite.bias -= 5
    model.mix.weight *= 100
    return Planted(model, _int8(), ("gate",))


def images(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
