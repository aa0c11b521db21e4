"""Where a scale per channel can move, and where it can't: the outputs stay, or the pair is refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests import nets
from tests.flow import Net, conv
from torch import Tensor, nn
from torch.nn import functional as F

from bitport.errors import GraphError
from bitport.frontends.pytorch import load_module
from bitport.graph import Graph
from bitport.graph.pairs import Chain, find, move_all, ranges
from bitport.graph.simplify import simplify

X = torch.randn(2, 3, 8, 8)
T = torch.randn(2, 5, 12)


def folded(model: nn.Module, x: Tensor) -> Graph:
    graph = load_module(model.eval(), x)
    simplify(graph)
    return graph


def chains(graph: Graph) -> dict[str, Chain]:
    return {chain.name: chain for chain in find(graph)[0]}


def moved(graph: Graph, seed: int = 0) -> Graph:
    """Every chain scaled by factors up to a hundred apart."""
    generator = torch.Generator().manual_seed(seed)
    twin = graph.clone()
    scales = {
        name: 10 ** (2 * torch.rand(len(ranges(graph, chain)[0]), generator=generator).double() - 1)
        for name, chain in chains(graph).items()
    }
    move_all(twin, scales)
    for name, chain in chains(twin).items():
        assert not torch.equal(
            graph.tensor(chain.producers[0].weight), twin.tensor(chain.producers[0].weight)
        ), name
    return twin


def same(graph: Graph, x: Tensor) -> None:
    with torch.no_grad():
        for real, found in zip(graph.run(x), moved(graph).run(x), strict=True):
            torch.testing.assert_close(found, real, rtol=1e-3, atol=1e-4 * float(real.abs().max()))


def rms(m: Any, x: Tensor) -> Tensor:
    return m.b(m.gain * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)))


def _two(**more: nn.Module) -> dict[str, Any]:
    return {"a": conv(), "b": conv(8, 4), **more}


# name → network, input, what each producer's output is read by
MOVES: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[str, list[str]]]] = {
    "relu": (lambda: Net(lambda m, x: m.b(F.relu(m.a(x))), **_two()), X, {"a": ["b"]}),
    "leaky relu": (lambda: Net(lambda m, x: m.b(F.leaky_relu(m.a(x), 0.2)), **_two()), X, {"a": ["b"]}),
    "prelu": (lambda: Net(lambda m, x: m.b(m.p(m.a(x))), **_two(p=nn.PReLU(8))), X, {"a": ["b"]}),
    "nothing": (lambda: Net(lambda m, x: m.b(m.a(x)), **_two()), X, {"a": ["b"]}),
    "clamp at 0": (lambda: Net(lambda m, x: m.b(m.a(x).clamp(min=0)), **_two()), X, {"a": ["b"]}),
    "batch norm": (
        lambda: Net(lambda m, x: m.b(F.relu(m.n(m.a(x)))), **_two(n=nn.BatchNorm2d(8))), X, {"a": ["b"]},
    ),
    "max pool": (lambda: Net(lambda m, x: m.b(F.max_pool2d(F.relu(m.a(x)), 2)), **_two()), X, {"a": ["b"]}),
    "average pool": (lambda: Net(lambda m, x: m.b(F.avg_pool2d(m.a(x), 3, 1, 1)), **_two()), X, {"a": ["b"]}),
    "padding": (lambda: Net(lambda m, x: m.b(F.pad(m.a(x), (1, 2, 0, 1))), **_two()), X, {"a": ["b"]}),
    "a slice of pixels": (lambda: Net(lambda m, x: m.b(m.a(x)[..., 2:]), **_two()), X, {"a": ["b"]}),
    "times 3": (lambda: Net(lambda m, x: m.b(F.relu(m.a(x)) * 3 / 2), **_two()), X, {"a": ["b"]}),
    "two readers": (
        lambda: Net(lambda m, x: m.b(F.relu(m.a(x))) + m.c(m.a(x)), **_two(c=conv(8, 4, 1))), X, {"a": ["b", "c"]},
    ),
    "a sum": (lambda: Net(lambda m, x: m.b(m.a(x) + m.c(x)), **_two(c=conv())), X, {"a": ["b"]}),
    "a sum behind a move": (
        lambda: Net(lambda m, x: m.b(m.a(x) + m.c(x).transpose(2, 3)), **_two(c=conv())), X, {"a": ["b"]},
    ),
    "a sum through relus": (
        lambda: Net(lambda m, x: m.b(F.relu(F.relu(m.a(x)) - F.relu(m.c(x)))), **_two(c=conv())), X, {"a": ["b"]},
    ),
    "a sum of three": (
        lambda: Net(lambda m, x: m.b((m.a(x) + m.c(x)) + (m.d(x) + m.a(x))), **_two(c=conv(), d=conv())), X,
        {"a": ["b"]},
    ),
    "a sum and its parts": (
        lambda: Net(lambda m, x: m.b(m.a(x) + m.c(x)) + m.e(m.c(x)), **_two(c=conv(), e=conv(8, 4))), X,
        {"a": ["b", "e"]},
    ),
    "a stream": (
        lambda: Net(
            lambda m, x: m.b(m.a(x) + m.d(F.relu(m.c(m.a(x))))), **_two(c=conv(8, 6), d=conv(6, 8))
        ), X, {"a": ["b", "c"], "c": ["d"]},
    ),
    "groups": (
        lambda: Net(lambda m, x: m.b(F.relu(m.a(x))), a=conv(), b=conv(8, 4, groups=2)), X, {"a": ["b"]},
    ),
    "depthwise": (
        lambda: Net(
            lambda m, x: m.b(F.relu(m.d(F.relu(m.a(x))))), **_two(d=conv(8, 8, groups=8))
        ), X, {"a": ["d"], "d": ["b"]},
    ),
    "transposed": (
        lambda: Net(
            lambda m, x: m.b(F.relu(m.t(F.relu(m.a(x))))), **_two(t=nn.ConvTranspose2d(8, 8, 2, 2, groups=2))
        ), X, {"a": ["t"], "t": ["b"]},
    ),
    "flattened pixels": (
        lambda: Net(lambda m, x: m.f(F.relu(m.a(x)).flatten(1)), a=conv(), f=nn.Linear(8 * 64, 5)), X, {"a": ["f"]},
    ),
    "pooled and flattened": (
        lambda: Net(
            lambda m, x: m.f(F.adaptive_avg_pool2d(F.relu(m.a(x)), 1).flatten(1)), a=conv(), f=nn.Linear(8, 5)
        ), X, {"a": ["f"]},
    ),
    "pixels as tokens": (
        lambda: Net(lambda m, x: m.f(m.a(x).flatten(2).transpose(1, 2)), a=conv(), f=nn.Linear(8, 5)), X, {"a": ["f"]},
    ),
    "mean over pixels": (
        lambda: Net(lambda m, x: m.f(m.a(x).mean((2, 3))), a=conv(), f=nn.Linear(8, 5)), X, {"a": ["f"]},
    ),
    "linear": (
        lambda: Net(lambda m, x: m.b(F.relu(m.a(x))), a=nn.Linear(12, 8), b=nn.Linear(8, 4)), T, {"a": ["b"]},
    ),
    "layer norm": (
        lambda: Net(
            lambda m, x: m.b(m.n(x)) + m.c(m.n(x)), n=nn.LayerNorm(12), b=nn.Linear(12, 4), c=nn.Linear(12, 4)
        ), T, {"n": ["b", "c"]},
    ),
    "class token": (
        lambda: Net(lambda m, x: m.b(m.n(x)[:, 0]), n=nn.LayerNorm(12), b=nn.Linear(12, 4)), T, {"n": ["b"]},
    ),
    "rms norm": (
        lambda: Net(lambda m, x: m.b(m.n(x)), n=nn.RMSNorm(12), b=nn.Linear(12, 4)), T, {"n": ["b"]},
    ),
    "rms norm spelled out": (
        lambda: Net(rms, b=nn.Linear(12, 4), gain=nn.Parameter(torch.rand(12) + 0.5)), T, {"mul#2": ["b"]},
    ),
    "group norm": (
        lambda: Net(lambda m, x: m.b(F.relu(m.n(m.a(x)))), **_two(n=nn.GroupNorm(2, 8))), X, {"n": ["b"]},
    ),
    "batch norm in front": (
        lambda: Net(lambda m, x: m.b(F.relu(m.n(x))), n=nn.BatchNorm2d(3), b=conv(3, 4)), X, {"n": ["b"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MOVES)
def test_scales_move_and_the_outputs_stay(name: str) -> None:
    build, x, wanted = MOVES[name]
    graph = folded(build(), x)
    found = {key: sorted(end.name for end in chain.readers) for key, chain in chains(graph).items()}
    assert found == wanted, find(graph)
    same(graph, x)


REFUSED: dict[str, tuple[Callable[[], nn.Module], Tensor, str]] = {
    "hardswish": (lambda: Net(lambda m, x: m.b(F.hardswish(m.a(x))), **_two()), X, "doesn't keep a scale per channel"),
    "gelu": (lambda: Net(lambda m, x: m.b(F.gelu(m.a(x))), **_two()), X, "doesn't keep a scale per channel"),
    "sigmoid": (lambda: Net(lambda m, x: m.b(m.a(x).sigmoid()), **_two()), X, "doesn't keep a scale per channel"),
    "relu6": (lambda: Net(lambda m, x: m.b(F.relu6(m.a(x))), **_two()), X, "each would need a bound of its own"),
    "clamp": (lambda: Net(lambda m, x: m.b(m.a(x).clamp(-1, 1)), **_two()), X, "each would need a bound of its own"),
    "a shift": (lambda: Net(lambda m, x: m.b(m.a(x) + 1), **_two()), X, "doesn't keep a scale per channel"),
    "padding with ones": (
        lambda: Net(lambda m, x: m.b(F.pad(m.a(x), (1, 1), value=1.0)), **_two()), X, "doesn't keep",
    ),
    "padded channels": (
        lambda: Net(lambda m, x: m.b(F.pad(m.a(x), (0, 0, 0, 0, 1, 1))), a=conv(), b=conv(10, 4)), X, "doesn't keep",
    ),
    "a sum with something else": (
        lambda: Net(lambda m, x: m.b(m.a(x) + F.gelu(m.c(x))), **_two(c=conv())), X, "can't be scaled alike",
    ),
    "a sum with the input": (lambda: Net(lambda m, x: m.b(m.a(x) + x), a=conv(3, 3), b=conv(3, 4)), X, "scaled alike"),
    "a sum with a parameter": (
        lambda: Net(lambda m, x: m.b(m.a(x) + m.p), p=nn.Parameter(torch.rand(8, 8, 8)), **_two()), X, "joins it",
    ),
    "a sum that leaves": (lambda: Net(lambda m, x: (m.b(m.a(x) + m.c(x)), m.c(x)), **_two(c=conv())), X, "leaves the"),
    "itself": (lambda: Net(lambda m, x: m.b(m.a(x) * m.a(x)), **_two()), X, "joins it with other tensors"),
    "concatenation": (
        lambda: Net(lambda m, x: m.b(torch.cat([m.a(x), x], 1)), a=conv(), b=conv(11, 4)), X, "joins it",
    ),
    "an output": (lambda: Net(lambda m, x: (m.b(m.a(x)), m.a(x)), **_two()), X, "leaves the network"),
    "one reader of two": (
        lambda: Net(lambda m, x: (m.b(m.a(x)), F.gelu(m.a(x))), **_two()), X, "doesn't keep a scale per channel",
    ),
    "mean over channels": (lambda: Net(lambda m, x: m.b(m.a(x).mean(1, True)), a=conv(), b=conv(1, 4)), X, "doesn't"),
    "another axis": (lambda: Net(lambda m, x: m.f(m.a(x)), a=conv(), f=nn.Linear(8, 5)), X, "mixes another axis"),
    "mixed pixels": (
        lambda: Net(
            lambda m, x: m.f(m.a(x).permute(0, 2, 3, 1).flatten(1)), a=conv(), f=nn.Linear(8 * 64, 5)
        ), X, "doesn't keep a scale per channel",
    ),
    "called twice": (lambda: Net(lambda m, x: m.a(F.relu(m.a(x))), a=conv(3, 3)), X, "is shared"),
    "no affine part": (
        lambda: Net(lambda m, x: m.b(m.n(x)), n=nn.LayerNorm(12, elementwise_affine=False), b=nn.Linear(12, 4)),
        T, "no weights of its own",
    ),
    "a norm of two axes": (
        lambda: Net(lambda m, x: m.b(m.n(x)), n=nn.LayerNorm((5, 12)), b=nn.Linear(12, 4)), T, "several axes",
    ),
    "post-norm residual": (
        lambda: Net(lambda m, x: m.b(m.n(x)) + m.n(x), n=nn.LayerNorm(12), b=nn.Linear(12, 12)), T, "joins it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_the_outputs_is_refused_with_the_reason(name: str) -> None:
    build, x, why = REFUSED[name]
    found, refused = find(folded(build(), x))
    first = "n" if "n" in refused else "a"
    assert first not in {chain.name for chain in found}
    assert why in refused[first], refused


class Tied(nn.Module):
    """Two layers with one weight, a third with its own."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        if bias:
            self.b.bias = self.a.bias
        else:
            self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


@pytest.mark.parametrize("bias", [True, False])
def test_tied_parameters_are_left_alone(bias: bool) -> None:
    found, refused = find(folded(Tied(bias), torch.randn(4, 6)))
    assert found == [] and "is shared" in refused["a"] and "is shared" in refused["b"]


BUILDERS: dict[str, Callable[[], nets.Example]] = {
    "residual": lambda: (nets.ResNet().eval(), torch.randn(2, 3, 8, 8)),
    "mobile": lambda: (nets.MobileNet().eval(), torch.randn(2, 3, 32, 32)),
    "encoder": lambda: (nets.HandEncoder().eval(), torch.randn(2, 3, 8, 8)),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_whole_networks_stay_what_they_are(name: str) -> None:
    model, x = BUILDERS[name]()
    graph = folded(model, x)
    found, refused = find(graph)
    assert found and refused
    same(graph, x)
    assert not {chain.name for chain in found} & set(refused)


def test_a_residual_stream_has_one_scale_behind_all_that_adds_to_it() -> None:
    graph = folded(nets.ResNet().eval(), torch.randn(2, 3, 8, 8))
    found = chains(graph)
    assert sorted(found) == ["layer1.0.conv1", "layer1.1.conv1", "stem.0"]
    stream = found["stem.0"]
    assert [end.name for end in stream.producers] == ["stem.0", "layer1.0.conv2", "layer1.1.conv2"]
    assert {"layer1.0.conv1", "layer1.1.conv1"} < {end.name for end in stream.readers}
    made, _ = ranges(graph, stream)
    weights = [graph.tensor(end.weight).detach().flatten(1).abs().amax(1) for end in stream.producers]
    assert torch.equal(made, torch.stack(weights).amax(0).double())  # the largest of all that make a channel


def test_scales_of_another_network_are_refused() -> None:
    graph = folded(Net(lambda m, x: m.b(F.relu(m.a(x))), **_two()), X)
    before = graph.digest()
    for scales in ({"c": torch.ones(8)}, {"a": torch.ones(7)}):
        with pytest.raises(GraphError, match="another one than the scales were chosen for"):
            move_all(graph, scales)
    assert graph.digest() == before
