"""Residual streams: what belongs to one, what it computes once rotated, and what can't be."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.flow import Net
from tests.spread import Embedded, plant_loud
from torch import Tensor, nn
from torch.nn import functional as F

from bitport.errors import GraphError
from bitport.frontends.pytorch import load_module
from bitport.graph import Graph
from bitport.graph.simplify import simplify
from bitport.graph.streams import Stream, find, turn, turn_all
from bitport.numerics.rotation import random_signs

WIDTH = 24


class Spelled(nn.Module):
    """RMSNorm as language models write it out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.5 * torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        return made


def gained(width: int, bias: bool = True) -> nn.LayerNorm:
    norm = nn.LayerNorm(width, bias=bias)
    nn.init.uniform_(norm.weight, 0.5, 2)
    if bias:
        nn.init.normal_(norm.bias)
    return norm


class Language(nn.Module):
    """Token ids, a scaled embedding, positions, a gated feed-forward layer: no layer has a bias."""

    def __init__(self, norm: Callable[[int], nn.Module], width: int = 56, tied: bool = False) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(50, width), nn.Embedding(16, width)
        self.norm1, self.norm2 = norm(width), norm(width)
        self.gate, self.up = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down, self.head = nn.Linear(2 * width, width, bias=False), nn.Linear(width, 50, bias=False)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids) * 3 + self.position(torch.arange(ids.shape[1]))
        y = self.norm1(x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        made: Tensor = self.head(self.norm2(x))
        return made


class Vision(nn.Module):
    """Patches by a convolution, a class token, positions, torch's own layers, a head on one token."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 4, 4)
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pos = nn.Parameter(torch.randn(1, 5, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 40, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = gained(WIDTH), nn.Linear(WIDTH, 10)
        for name, bias in self.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patch(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.cls.expand(len(x), -1, -1), y], 1) + self.pos
        made: Tensor = self.head(self.norm(self.layers(y))[:, 0])
        return made


def folded(model: nn.Module, x: Any) -> Graph:
    graph = load_module(model.eval(), x if isinstance(x, tuple) else (x,))
    simplify(graph)
    return graph


def only(graph: Graph) -> Stream:
    (stream,), refused = find(graph)
    assert not refused
    return stream


def reason(model: nn.Module, x: Tensor) -> str:
    """Why the first norm's stream is refused; all norms of one stream say the same."""
    streams, refused = find(folded(model, x))
    assert not streams and refused
    return next(iter(refused.values()))


def sequences() -> Tensor:
    return torch.randn(4, 9, 8)


IDS = torch.arange(32).reshape(2, 16)


@pytest.mark.parametrize(
    ("build", "x", "parts", "norms"),
    [
        (lambda: plant_loud(Embedded(norm=nn.LayerNorm)), sequences(), 20, 5),
        (lambda: plant_loud(Embedded(norm=nn.RMSNorm)), sequences(), 20, 5),
        (lambda: Language(Spelled), IDS, 6, 2),
        (lambda: Language(nn.RMSNorm), IDS, 6, 2),
        (lambda: Language(gained), IDS, 6, 2),
        (lambda: Language(lambda width: nn.LayerNorm(width, elementwise_affine=False)), IDS, 6, 2),
        (Vision, torch.randn(2, 3, 8, 8), 17, 5),
    ],
    ids=["layer", "rms", "spelled", "language rms", "norm keeps its bias", "no gain", "vision"],
)
def test_the_outputs_stay_and_no_operator_comes(
    build: Callable[[], nn.Module], x: Tensor, parts: int, norms: int
) -> None:
    torch.manual_seed(0)
    graph = folded(build(), x)
    stream = only(graph)
    assert (len(stream.parts), len(stream.norms)) == (parts, norms)
    twin = graph.clone()
    turn_all(twin, {stream.name: random_signs(stream.width, 3)})
    assert [(n.op, twin.name(n)) for n in twin.nodes()] == [(n.op, graph.name(n)) for n in graph.nodes()]
    with torch.no_grad():
        torch.testing.assert_close(twin.run(x)[0], graph.run(x)[0], rtol=1e-4, atol=2e-5)
    for part in stream.parts:
        assert not torch.allclose(twin.tensor(part.tensor), graph.tensor(part.tensor), atol=1e-3), part
    for norm in stream.norms:
        assert norm.gain is None or bool((twin.tensor(norm.gain) == 1).all())


def test_biases_of_norms_go_into_layers_that_have_one() -> None:
    graph = folded(plant_loud(Embedded()), sequences())
    stream = only(graph)
    turn(graph, stream, random_signs(64, 0))
    for norm in stream.norms:
        assert norm.bias is not None and not bool(graph.tensor(norm.bias).any())


def test_layer_norm_needs_the_mean_and_rms_norm_does_not() -> None:
    assert only(folded(Language(gained), IDS)).centred
    assert not only(folded(Language(Spelled), IDS)).centred


def test_a_stream_of_layers_that_both_read_and_write_it() -> None:
    net = Net(
        lambda m, x: m.head(m.norm(m.mix(m.embed(x)) + m.embed2(x) + m.mix2(m.norm0(m.embed3(x))))),
        embed=nn.Linear(8, WIDTH), embed2=nn.Linear(8, WIDTH), embed3=nn.Linear(8, WIDTH),
        mix=nn.Linear(WIDTH, WIDTH), mix2=nn.Linear(WIDTH, WIDTH), norm0=gained(WIDTH), norm=gained(WIDTH),
        head=nn.Linear(WIDTH, 5),
    )  # fmt: skip
    x = sequences()
    graph = folded(net, x)
    streams, refused = find(graph)
    assert sorted(stream.name for stream in streams) == ["norm", "norm0"] and not refused
    twin = graph.clone()
    turn_all(twin, {stream.name: random_signs(WIDTH, index) for index, stream in enumerate(streams)})
    with torch.no_grad():
        torch.testing.assert_close(twin.run(x)[0], graph.run(x)[0], rtol=1e-4, atol=2e-5)


# ------------------------------------------------------------------------------------------------ what can't be


def residual(function: Callable[[Any, Tensor], Any], **parts: Any) -> Net:
    """`function` of x = embed(…), with a norm and a head."""
    made = {"embed": nn.Linear(8, WIDTH), "norm": gained(WIDTH), "head": nn.Linear(WIDTH, 5), **parts}
    return Net(lambda m, x: function(m, m.embed(x)), **made)


@pytest.mark.parametrize(
    ("net", "why"),
    [
        (Net(lambda m, x: m.a(m.n(x)), n=gained(8), a=nn.Linear(8, 5)), "network's input 'x' is part of it"),
        (residual(lambda m, x: m.head(m.last(m.norm(x) + m.add(m.norm(x)))), add=nn.Linear(WIDTH, WIDTH),
                  last=gained(WIDTH)), r"add#2 \(add\) reads norm, and is no linear layer"),
        (residual(lambda m, x: (m.head(m.norm(x)), x)), "embed leaves the network"),
        (residual(lambda m, x: m.norm(x)), "norm, which reads it, leaves the network"),
        (residual(lambda m, x: m.head(m.norm(F.relu(x)))), r"relu \(relu\) is part of it"),
        (residual(lambda m, x: m.head(m.norm(x)) + F.gelu(x).sum()), r"gelu \(gelu\) reads it"),
        (residual(lambda m, x: m.head(F.relu(m.norm(x)))), r"relu \(relu\) reads norm"),
        (residual(lambda m, x: m.head(m.norm(x * m.g)), g=torch.rand(9, WIDTH)), r"\(mul\) is part of it"),
        (residual(lambda m, x: m.head(m.norm(x + 1.0))), r"\(add_scalar\) is part of it"),
        (residual(lambda m, x: m.head(m.norm(x + x.mean(-1, keepdim=True)))), "mean"),
        (residual(lambda m, x: m.head(m.norm(x + m.s)), s=torch.ones(9, 1)), "added to all its channels alike"),
        (residual(lambda m, x: m.head(m.norm(torch.cat([x[..., :12], x[..., 12:]], -1)))), r"\(cat\)"),
        (residual(lambda m, x: m.head(m.norm(m.a(m.a(x)))), a=nn.Linear(WIDTH, WIDTH)), "a.weight of a.* is shared"),
    ],
    ids=["input", "post-norm", "output", "norm leaves", "relu", "gelu", "relu behind", "gate", "scalar", "mean",
         "column", "cat", "shared"],
)  # fmt: skip
def test_refusals_name_what_stands_in_the_way(net: nn.Module, why: str) -> None:
    found = reason(net, sequences())
    assert re.search(why, found), found


def test_tied_embeddings_are_refused() -> None:
    assert "is shared" in reason(Language(Spelled, tied=True), IDS)


def test_a_bias_over_a_gain_of_nothing_needs_layers_with_biases() -> None:
    dead = gained(56)
    with torch.no_grad():
        dead.weight[3] = 0
    model = Language(lambda _: dead)
    model.norm2 = gained(56)
    assert "gains near 0" in reason(model, IDS)


def test_grouped_convolutions_are_no_writers() -> None:
    net = Net(
        lambda m, x: m.head(m.norm(m.patch(x).flatten(2).transpose(1, 2))),
        patch=nn.Conv2d(3, WIDTH, 4, 4, groups=3), norm=gained(WIDTH), head=nn.Linear(WIDTH, 5),
    )  # fmt: skip
    assert "patch (conv) is part of it" in reason(net, torch.randn(2, 3, 8, 8))


def test_a_rotation_of_another_network_is_refused() -> None:
    graph = folded(Language(Spelled), IDS)
    name = only(graph).name
    for rotated in ({"other": random_signs(56, 0)}, {name: random_signs(24, 0)}):
        with pytest.raises(GraphError, match="another one"):
            turn_all(graph, rotated)
