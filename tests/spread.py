"""Networks whose channels lie far apart, by factors that cancel out: the same functions as their even twins."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Separable(nn.Module):
    """Depthwise-separable convolutions on 3×8×8 images, ten classes."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.dw1 = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.pw1 = nn.Conv2d(width, 2 * width, 1)
        self.dw2 = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.pw2 = nn.Conv2d(2 * width, width, 1)
        self.fc = nn.Linear(width, 10)
        self.f = activation()
        for layer in self.children():
            if isinstance(layer, nn.Conv2d | nn.Linear):  # else the outputs are hardly more than their biases
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.stem, self.dw1, self.pw1, self.dw2, self.pw2):
            x = self.f(layer(x))
        made: Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return made


class Block(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width: int, heads: int, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = norm(width), norm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        y = self.norm1(x)
        parts = (
            layer(y).view(b, t, self.heads, d // self.heads).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        x = x + self.out(F.scaled_dot_product_attention(*parts).transpose(1, 2).reshape(b, t, d))
        made: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return made


class Transformer(nn.Module):
    """Two layers on sequences of 32 numbers, ten classes a position."""

    def __init__(self, width: int = 32, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.layers = nn.Sequential(Block(width, 4, norm), Block(width, 4, norm))
        self.norm, self.head = norm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.head(self.norm(self.layers(x)))
        return made


class Embedded(nn.Module):
    """The same on a linear embedding of 8 numbers a position: its residual stream is its own."""

    def __init__(self, width: int = 64, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.position = nn.Parameter(0.3 * torch.randn(1, 9, width))
        self.body = Transformer(width, norm)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.body(self.embed(x) + self.position)
        return made


@torch.no_grad()
def rescale(model: Separable, factor: float = 100.0, seed: int = 0) -> Separable:
    """Channels up to `factor` apart, in place. The function stays where the activation is positively homogeneous."""
    generator = torch.Generator().manual_seed(seed)
    layers = (model.stem, model.dw1, model.pw1, model.dw2, model.pw2, model.fc)
    for made, read in pairwise(layers):
        size = factor ** torch.rand(len(made.weight), generator=generator)
        made.weight.mul_(size.view(-1, 1, 1, 1))
        assert made.bias is not None
        made.bias.mul_(size)
        depthwise = read.weight.shape[1] == 1
        shape = (-1, 1, 1, 1) if depthwise else (1, -1, *[1] * (read.weight.dim() - 2))
        read.weight.div_(size.view(shape))
    return model


@torch.no_grad()
def plant_outliers(model: Transformer, factor: float = 60.0) -> Transformer:
    """Two channels of each layer's norms made `factor` times as large, and read by weights as much smaller."""
    for block in model.layers:
        for norm, read in ((block.norm1, (block.q, block.k, block.v)), (block.norm2, (block.up,))):
            norm.weight[[3, 17]] *= factor
            norm.bias[[3, 17]] *= factor
            for layer in read:
                layer.weight[:, [3, 17]] /= factor
    return model


@torch.no_grad()
def plant_loud(model: Embedded, factor: float = 20.0) -> Embedded:
    """Two channels of the residual stream made louder, and read by weights as much smaller."""
    loud, body = [5, 40], model.body
    model.embed.weight[loud] *= factor
    model.embed.bias[loud] *= factor
    behind = [(body.norm, (body.head,))]
    for block in body.layers:
        behind += [(block.norm1, (block.q, block.k, block.v)), (block.norm2, (block.up,))]
    for norm, readers in behind:
        norm.weight.mul_(factor * (2 / norm.weight.numel()) ** 0.5)  # what the larger deviation takes
        norm.weight.mul_(torch.linspace(0.7, 1.4, norm.weight.numel()))
        if getattr(norm, "bias", None) is not None:
            norm.bias.uniform_(-0.3, 0.3)
        for layer in readers:
            layer.weight[:, loud] /= factor
    return model
