"""Small networks that stress what real ones stress. Each builder returns (model in eval mode, example
inputs).

Seeds are the caller's business; dropout rates are 0 unless a net is about dropout, so that train-mode
outputs of a
graph and of the eager model can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Example = tuple[nn.Module, Any]


class Residual(nn.Module):
    def __init__(self, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width, momentum=0.03)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x
        return self.relu(y)


class ResNet(nn.Module):
    """A residual CNN with in-place ReLU and addition, flatten and linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8, momentum=None), nn.ReLU()
        )
        self.layer1 = nn.Sequential(Residual(8), Residual(8))
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(8 * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.layer1(self.stem(x)))
        return self.fc(x.view(x.size(0), -1))


class Squeeze(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(width, width // 4, 1)
        self.expand = nn.Conv2d(width // 4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.expand(F.relu(self.reduce(F.adaptive_avg_pool2d(x, 1)))))


class MobileNet(nn.Module):
    """Depthwise separable convolutions with squeeze-excitation, hardswish and ReLU6."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish()),
            nn.Sequential(
                nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6(), Squeeze(8),
                nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16),
            ),
            nn.Sequential(
                nn.Conv2d(16, 16, 5, 1, 2, groups=16, bias=False), nn.BatchNorm2d(16), nn.Hardswish(),
                nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16),
            ),
        )  # fmt: skip
        self.classifier = nn.Sequential(nn.Linear(16, 16), nn.Hardswish(), nn.Dropout(0.0), nn.Linear(16, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean([2, 3]))


class HandAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(y.transpose(1, 2).reshape(b, n, c))


class HandLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width, eps=1e-6)
        self.attn = HandAttention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class HandEncoder(nn.Module):
    """A transformer encoder over patches: class token by cat and expand, learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.position = nn.Parameter(torch.randn(1, 5, 16))
        self.layers = nn.ModuleList(HandLayer(16, 4) for _ in range(2))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patch(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.token.expand(y.shape[0], -1, -1), y], 1) + self.position
        for layer in self.layers:
            y = layer(y)
        return self.head(self.norm(y)[:, 0])


class TorchEncoder(nn.Module):
    """The same from torch's own layers, packed attention weights and all."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.inputs = nn.Linear(6, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.inputs(x)).mean(1))


class Decoder(nn.Module):
    """A causal language model with tied embeddings; `value` fills the masked positions."""

    mask: Tensor

    def __init__(self, value: float) -> None:
        super().__init__()
        self.tok = nn.Embedding(20, 16)
        self.pos = nn.Embedding(8, 16)
        self.layers = nn.ModuleList(HandLayer(16, 2) for _ in range(2))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.tok.weight
        self.register_buffer("mask", torch.full((8, 8), value).triu(1), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        n = ids.shape[1]
        x = self.tok(ids) + self.pos(torch.arange(n, device=ids.device))
        for layer in self.layers:
            x = layer(x, self.mask[:n, :n])
        return self.head(self.norm(x))


class Twice(nn.Module):
    """One convolution and one normalisation called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.act(self.bn(self.conv(x)))
        return x


class Outputs(nn.Module):
    """Two inputs, a dict of outputs with a nested tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(3, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Any]:
        hidden = torch.tanh(self.a(left) + self.b(right))
        return {"logits": self.head(hidden), "hidden": (hidden, hidden.softmax(-1))}


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = self._double(3, 8), self._double(8, 16)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.merge = self._double(16, 8)
        self.out = nn.Conv2d(8, 2, 1)

    @staticmethod
    def _double(a: int, b: int) -> nn.Sequential:
        layers = [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True)]
        return nn.Sequential(*layers, nn.Conv2d(b, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down1(x)
        deep = self.down2(F.max_pool2d(skip, 2))
        up = F.interpolate(self.up(deep), size=skip.shape[2:], mode="bilinear", align_corners=False)
        return self.out(self.merge(torch.cat([skip, up], 1)))


class Speech(nn.Module):
    """1-D convolutions with `padding="same"`, reflect padding and group norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv1d(1, 8, 5, stride=2, padding=2, padding_mode="reflect")
        self.b = nn.Conv1d(8, 8, 3, padding="same", dilation=2, groups=2)
        self.norm = nn.GroupNorm(2, 8)
        self.c = nn.Conv1d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.a(x), 0.1)
        return self.c(F.silu(self.norm(self.b(x)))).mean(-1)


class Recurrent(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.emb = nn.Embedding(12, 8, padding_idx=0)
        cls: Any = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[kind]
        self.rnn = cls(8, 6, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(12, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.emb(ids))[0][:, -1])


class PlainMha(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        y, weights = self.attn(x, x, x)
        return self.norm(x + y), weights


class WeightNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.new = nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 4, 3, padding=1))
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.elu(self.new(x)).mean(-1))


class SliceWrites(nn.Module):
    """Writes through slices and views of an intermediate value."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        y[:, 0] = 0.0
        y[:, 1:3].mul_(2.0)
        z = y.transpose(0, 1)
        z[4].add_(1.0)
        return y * 3 + z.t()


class Frozen(nn.Module):
    """A no_grad region, a dead buffer, a functional dropout of rate 0 and statistics-free batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 5)
        self.bn = nn.BatchNorm1d(4, affine=False)
        self.free = nn.BatchNorm1d(4, track_running_stats=False)
        self.register_buffer("unused", torch.arange(3.0))
        self.register_buffer("scale", torch.full((5,), 2.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            shift = self.bn(x * self.scale)
        return self.free(F.dropout(self.fc(x), 0.0, self.training) + shift)


def _image(batch: int, size: int = 8, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, size, size)


def _ids(batch: int, length: int = 8, vocabulary: int = 12) -> Tensor:
    return torch.arange(batch * length).reshape(batch, length) % vocabulary


NETS: dict[str, Callable[[int], Example]] = {
    "resnet": lambda b: (ResNet(), _image(b)),
    "mobilenet": lambda b: (MobileNet(), _image(b, 16)),
    "hand_encoder": lambda b: (HandEncoder(), _image(b)),
    "torch_encoder": lambda b: (TorchEncoder(), torch.randn(b, 5, 6)),
    "decoder_1e4": lambda b: (Decoder(-1e4), _ids(b)),
    "decoder_inf": lambda b: (Decoder(float("-inf")), _ids(b)),
    "twice": lambda b: (Twice(), _image(b, channels=4)),
    "outputs": lambda b: (Outputs(), {"left": torch.randn(b, 4), "right": torch.randn(b, 3)}),
    "unet": lambda b: (UNet(), _image(b)),
    "speech": lambda b: (Speech(), torch.randn(b, 1, 32)),
    "lstm": lambda b: (Recurrent("lstm"), _ids(b)),
    "gru": lambda b: (Recurrent("gru"), _ids(b)),
    "rnn": lambda b: (Recurrent("rnn"), _ids(b)),
    "mha": lambda b: (PlainMha(), torch.randn(b, 5, 8)),
    "weight_norm": lambda b: (WeightNorm(), torch.randn(b, 2, 9)),
    "slice_writes": lambda b: (SliceWrites(), torch.randn(b, 6)),
    "frozen": lambda b: (Frozen(), torch.randn(b, 4, 5)),
}


def build(name: str, batch: int = 2) -> Example:
    """The net called `name` in eval mode, with running statistics and norms moved off their defaults."""
    model, example = NETS[name](batch)
    for key, tensor in model.state_dict().items():
        if key.endswith("running_mean"):
            tensor.copy_(torch.randn_like(tensor) * 0.1)
        elif key.endswith("running_var"):
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    return model.eval(), example
