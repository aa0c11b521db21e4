"""Transposed convolutions as convolutions: the same numbers for every geometry, in integers on the runtime."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.flow import Net, assert_exact, conv, images, prepare, ship
from torch import nn
from torch.nn import functional as F

from bitport.frontends.pytorch import load_module
from bitport.graph import Graph
from bitport.graph.simplify import simplify
from bitport.recipe.model import Override

GEOMETRIES: dict[str, dict[str, Any]] = {
    "no overlap": {"kernel_size": 2, "stride": 2},
    "overlap": {"kernel_size": 4, "stride": 2, "padding": 1},
    "output padding": {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    "an odd length": {"kernel_size": 3, "stride": 2},
    "stride 1": {"kernel_size": 4, "stride": 1},
    "stride 1, padded": {"kernel_size": 3, "stride": 1, "padding": 2},
    "gaps between the windows": {"kernel_size": 1, "stride": 2},
    "more padding than kernel": {"kernel_size": 2, "stride": 3, "padding": 3},
    "stride 3": {"kernel_size": 5, "stride": 3, "padding": 1, "output_padding": 2},
    "uneven": {"kernel_size": (4, 3), "stride": (2, 1), "padding": (0, 1), "output_padding": (1, 0)},
    "grouped": {"kernel_size": 4, "stride": 2, "padding": 1, "groups": 2},
    "depthwise": {"kernel_size": 3, "stride": 2, "groups": 8, "out_channels": 8},
    "without bias": {"kernel_size": 4, "stride": 2, "padding": 1, "bias": False},
}


def folded(model: nn.Module, *shape: int) -> Graph:
    graph = load_module(model.eval(), torch.randn(1, *shape))
    simplify(graph, phases=True)
    graph.check()
    return graph


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_convolution_is_the_transposed_one(name: str, dims: int) -> None:
    options = {"in_channels": 8, "out_channels": 6, **GEOMETRIES[name]}
    options = {k: v[:1] * dims if isinstance(v, tuple) and dims != 2 else v for k, v in options.items()}
    layer = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1](**options)
    shape = (8, *(4, 5, 3)[:dims])
    graph = folded(Net(lambda m, x: m.a(x), a=layer), *shape)
    assert not any(graph.op(node).kind == "conv_transpose" for node in graph.nodes())
    for batch in (1, 3):
        x = torch.randn(batch, *shape)
        with torch.no_grad():
            torch.testing.assert_close(graph.run(x)[0], layer(x), rtol=1e-4, atol=1e-5)


def test_a_layer_that_is_called_twice_and_one_with_dilation() -> None:
    again, wide = nn.ConvTranspose2d(3, 3, 2, 2), nn.ConvTranspose2d(3, 4, 2, dilation=2)
    model = Net(lambda m, x: m.w(m.a(F.relu(m.a(x)))), a=again, w=wide)
    graph = folded(model, 3, 4, 4)
    assert [graph.op(n).kind for n in graph.nodes()].count("conv_transpose") == 1
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(graph.run(x)[0], model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["no overlap", "overlap", "without bias", "an odd length", "grouped", "stride 1"]
)
def test_it_runs_in_integers_and_takes_the_relu_along(name: str) -> None:
    options = {"in_channels": 8, "out_channels": 8, **GEOMETRIES[name]}
    model = Net(
        lambda m, x: m.b(F.relu(m.n(m.t(m.a(x))))),
        a=conv(), t=nn.ConvTranspose2d(**options), n=nn.BatchNorm2d(8), b=conv(8, 4),
    )  # fmt: skip
    nn.init.uniform_(model.n.bias, 0.5, 1.0)
    prepared = prepare(model, [images(4, size=5)], weights={"granularity": "channel"})
    x = images(4, size=5)
    shipped = ship(prepared, x, images(1, size=5))
    assert_exact(shipped)
    assert prepared.real_error(x) < 0.05
    todo = prepared.plan.node("t")
    assert todo.kernel == "QLinearConv" and todo.absorbs == "relu"


def test_what_a_recipe_says_of_the_layer_holds_for_the_convolution() -> None:
    model = Net(lambda m, x: m.b(m.t(m.a(x))), a=conv(), t=nn.ConvTranspose2d(8, 8, 2, 2), b=conv(8, 4))
    override = Override(match="t", weights={"format": "float32"})
    prepared = prepare(model, [images(4)], overrides=[override])
    assert prepared.plan.node("t").kernel is None
    assert_exact(ship(prepared, images(4)))
