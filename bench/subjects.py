"""Networks that a script trains, on samples that it generates: what methods of rounding are compared on.

Digits of scikit-learn (1,797, held apart before anything is generated), enlarged to 16 × 16, turned, moved, resized
and noisy: as many as are asked for, from a seed. The GPT reads bytes of the English text in `pydoc_data.topics`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TRAINED_ON = 1200  # of the digits; the others are tested on
CONTEXT = 128


@cache
def _digits() -> tuple[Tensor, Tensor, Tensor]:
    from sklearn.datasets import load_digits  # here, as other tools' environments need the networks alone

    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(5))
    return torch.tensor(found.images, dtype=torch.float32)[:, None] / 16, torch.tensor(found.target), order


def digits(count: int, seed: int, *, test: bool) -> tuple[Tensor, Tensor]:
    """(images [N, 1, 16, 16], labels [N])."""
    images, labels, order = _digits()
    from_ = order[TRAINED_ON:] if test else order[:TRAINED_ON]
    generator = torch.Generator().manual_seed(seed)

    def uniform(width: float) -> Tensor:
        return (torch.rand(count, generator=generator) - 0.5) * width

    chosen = from_[torch.randint(len(from_), (count,), generator=generator)]
    angle, size, x, y = uniform(0.7), 1 + uniform(0.4), uniform(0.4), uniform(0.4)
    rows = [[size * angle.cos(), -size * angle.sin(), x], [size * angle.sin(), size * angle.cos(), y]]
    affine = torch.stack([torch.stack(row, 1) for row in rows], 1)
    grid = F.affine_grid(affine, [count, 1, 16, 16], align_corners=False)
    made = F.grid_sample(images[chosen], grid, align_corners=False)
    return made + 0.15 * torch.randn(made.shape, generator=generator), labels[chosen]


@cache
def text() -> Tensor:
    """All topics as bytes, int64 [N]."""
    from pydoc_data import topics

    joined = "\n".join(topics.topics[key] for key in sorted(topics.topics))
    return torch.tensor(list(joined.encode()), dtype=torch.int64)


def windows(count: int, seed: int, *, test: bool, length: int = CONTEXT) -> Tensor:
    """Stretches of text, [N, length]; the last tenth of the text is the test's."""
    whole = text()
    cut = int(len(whole) * 0.9)
    low, high = (cut, len(whole) - length) if test else (0, cut - length)
    starts = torch.randint(low, high, (count,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([whole[start : start + length] for start in starts.tolist()])


def _norm_conv(inside: int, outside: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inside, outside, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outside))


class _Residual(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = _norm_conv(inside, outside, 3, stride), _norm_conv(outside, outside)
        same = inside == outside and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(inside, outside, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(F.relu(self.first(x))) + self.skip(x)
        return F.relu(y)


class ThinNet(nn.Module):
    """A residual network of 8 to 32 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_norm_conv(1, 8), nn.ReLU())
        self.layers = nn.Sequential(_Residual(8, 8, 1), _Residual(8, 16, 2), _Residual(16, 32, 2))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.layers(self.stem(x)).mean((2, 3)))
        return y


class _Mobile(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        wide = 3 * inside
        self.expand = nn.Sequential(_norm_conv(inside, wide, 1), nn.Hardswish())
        self.depth = nn.Sequential(_norm_conv(wide, wide, 3, stride, wide), nn.Hardswish())
        self.squeeze, self.excite = (
            nn.Conv2d(wide, max(4, wide // 4), 1),
            nn.Conv2d(max(4, wide // 4), wide, 1),
        )
        self.project = _norm_conv(wide, outside, 1)
        self.same = inside == outside and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.depth(self.expand(x))
        gate = self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True))))
        y = self.project(y * F.hardsigmoid(gate))
        made: Tensor = x + y if self.same else y
        return made


class MobileNet(nn.Module):
    """Depthwise convolutions, squeeze-and-excite, hardswish."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_norm_conv(1, 12), nn.Hardswish())
        self.layers = nn.Sequential(
            _Mobile(12, 12, 1), _Mobile(12, 20, 2), _Mobile(20, 20, 1), _Mobile(20, 32, 2)
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.layers(self.stem(x)).mean((2, 3)))
        return y


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        y = self.norm1(x)
        q, k, v = (
            layer(y).view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        made: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return made


class VisionTransformer(nn.Module):
    """16 patches, width 48, four blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 48, 4, 4)
        self.places = nn.Parameter(0.02 * torch.randn(1, 16, 48))
        self.blocks = nn.Sequential(*[_Block(48, 4, causal=False) for _ in range(4)])
        self.norm, self.head = nn.LayerNorm(48), nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patches(x).flatten(2).transpose(1, 2) + self.places
        scores: Tensor = self.head(self.norm(self.blocks(y)).mean(1))
        return scores


class ByteGpt(nn.Module):
    """Bytes in, bytes out: width 256, four blocks, 3.3 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, 256), nn.Embedding(CONTEXT, 256)
        self.blocks = nn.Sequential(*[_Block(256, 4, causal=True) for _ in range(4)])
        self.norm, self.head = nn.LayerNorm(256), nn.Linear(256, 256, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bytes(x) + self.places(torch.arange(x.shape[1]))
        scores: Tensor = self.head(self.norm(self.blocks(y)))
        return scores


def trained(make: Callable[[], nn.Module], seed: int, *, rate: float, epochs: int) -> nn.Module:
    """A classifier of digits, in eval mode. Half a minute to a minute on one core."""
    torch.manual_seed(seed)
    model = make()
    images, labels = digits(20_000, 1, test=False)
    _fit(model, rate, [(images, labels, epochs * (len(images) // 128), 128)], smoothing=0.05)
    return model.eval()


def trained_gpt(seed: int, steps: int) -> nn.Module:
    """A byte model of text, in eval mode. About a second a step on one core."""
    torch.manual_seed(seed)
    model = ByteGpt()
    stretches = windows(16 * steps, seed, test=False, length=CONTEXT + 1)
    _fit(model, 1e-3, [(stretches[:, :-1], stretches[:, 1:], steps, 16)])
    return model.eval()


def _fit(
    model: nn.Module, rate: float, phases: list[tuple[Tensor, Tensor, int, int]], smoothing: float = 0.0
) -> None:
    for inputs, targets, steps, batch in phases:
        optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.03)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
        generator = torch.Generator().manual_seed(7)
        for _ in range(steps):
            picked = torch.randint(len(inputs), (batch,), generator=generator)
            scores = model(inputs[picked])
            loss = F.cross_entropy(
                scores.flatten(0, -2), targets[picked].flatten(), label_smoothing=smoothing
            )
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()


def _factors(count: int, generator: torch.Generator) -> Tensor:
    """Up to 100 times apart."""
    made: Tensor = 10 ** (2 * torch.rand(count, generator=generator) - 1)
    return made


def rescaled(model: nn.Module, seed: int = 3) -> nn.Module:
    """The same function with channels up to 100 times apart: a thin net whose inner channels are scaled, and back."""
    assert isinstance(model, ThinNet)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.layers:
            assert isinstance(layer, _Residual)
            conv, norm = layer.second[0], layer.first[1]
            assert isinstance(conv, nn.Conv2d)
            assert isinstance(norm, nn.BatchNorm2d)
            factor = _factors(norm.num_features, generator)
            norm.weight.mul_(factor)
            norm.bias.mul_(factor)
            conv.weight.div_(factor[None, :, None, None])
    return model


def rescaled_mobile(model: nn.Module, seed: int = 3) -> nn.Module:
    """The same function with channels up to 100 times apart: the depthwise net's, where nothing but a sum reads them.

    Scaled are the two streams between blocks that no hardswish feeds (with every layer that adds to them), and the
    hidden channels of each gate.
    """
    assert isinstance(model, MobileNet)
    generator = torch.Generator().manual_seed(seed)
    first, second, third, fourth = (layer for layer in model.layers)
    with torch.no_grad():
        for makers, reader in (((second, third), (third, fourth)), ((fourth,), (model,))):
            factor: Tensor | None = None
            for block in makers:
                assert isinstance(block, _Mobile)
                norm = block.project[1]
                assert isinstance(norm, nn.BatchNorm2d)
                factor = _factors(norm.num_features, generator) if factor is None else factor
                norm.weight.mul_(factor)
                norm.bias.mul_(factor)
            assert factor is not None
            for block in reader:
                if isinstance(block, _Mobile):
                    first_layer = block.expand[0]
                    assert isinstance(first_layer, nn.Sequential)
                    conv = first_layer[0]
                    assert isinstance(conv, nn.Conv2d)
                    conv.weight.div_(factor[None, :, None, None])
                else:
                    model.head.weight.div_(factor[None])
        for block in (first, second, third, fourth):
            assert isinstance(block, _Mobile)
            assert block.squeeze.bias is not None
            factor = _factors(block.squeeze.out_channels, generator)
            block.squeeze.weight.mul_(factor[:, None, None, None])
            block.squeeze.bias.mul_(factor)
            block.excite.weight.div_(factor[None, :, None, None])
    return model
