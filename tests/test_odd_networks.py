"""Little networks with odd wiring, from load to the integers of ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.flow import Inputs, Net, Net2, assert_exact, conv, flat, images, prepare, ship, tokens
from torch import Tensor, nn
from torch.nn import functional as F

from bitport.plan import Plan
from bitport.recipe.model import Override

Linear = nn.Linear
Odd = tuple[Callable[[], nn.Module], Callable[[int], Inputs]]


def _masked(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    y = F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x), attn_mask=mask)
    return m.b(y)  # type: ignore[no-any-return]


def _heads() -> dict[str, nn.Module]:
    return {"q": Linear(12, 8), "k": Linear(12, 8), "v": Linear(12, 8), "b": Linear(8, 4)}


def _parts(m: Any, x: Tensor) -> Tensor:
    left, right = m.a(x).chunk(2, 1)
    return m.b(left) * F.gelu(right)  # type: ignore[no-any-return]


NETWORKS: dict[str, Odd] = {
    "batch norm with two readers": (
        lambda: Net(
            lambda m, x: (lambda y: m.b(F.relu(m.n(y))) + m.d(y))(m.a(x)),
            a=conv(), n=nn.BatchNorm2d(8), b=conv(8, 4), d=conv(8, 4),
        ),
        images,
    ),
    "output is also consumed": (
        lambda: Net(lambda m, x: (lambda y: (y, m.b(y)))(m.a(x)), a=conv(), b=conv(8, 4)), images,
    ),
    "absorbed relu is an output": (
        lambda: Net(lambda m, x: (lambda y: (y, m.b(y)))(F.relu(m.a(x))), a=conv(), b=conv(8, 4)), images,
    ),
    "input is an output": (lambda: Net(lambda m, x: (x, m.a(x)), a=conv()), images),
    "one tensor, two outputs, one called as its operator": (
        lambda: Net(lambda m, x: (lambda y: {"a": y, "b": (y,)})(F.relu(m.a(x))), a=conv()), images,
    ),
    "constant output": (lambda: Net(lambda m, x: (m.a(x), m.k), a=conv(), k=torch.arange(4.0)), images),
    "a float output is moved and quantized": (
        lambda: Net(lambda m, x: (lambda y: (y, m.b(y.transpose(1, 2))))(m.n(m.a(x))), a=Linear(12, 8),
                    n=nn.LayerNorm(8), b=Linear(6, 4)), tokens,
    ),
    "the shape of one part of integers": (
        lambda: Net(lambda m, x: (lambda y: m.b(torch.ones_like(y[0]) * y[1]))(m.a(x).split((4, 4), 1)),
                    a=conv(), b=conv(4, 4)), images,
    ),
    "causal masks that torch's own layers are given": (
        lambda: Net(lambda m, x: m.e(x, mask=m.mask), mask=nn.Transformer.generate_square_subsequent_mask(6),
                    e=nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 16, batch_first=True), 1)), tokens,
    ),
    "one minus an integer mask": (
        lambda: Net2(lambda m, x, i: m.b(m.a(x) * (1.0 - i)[:, :, None]), a=Linear(12, 8), b=Linear(8, 4)),
        lambda n: (tokens(n), torch.arange(6).expand(n, 6) // 3),
    ),
    "integer input passed through": (
        lambda: Net2(lambda m, x, i: (m.a(x), i), a=conv()), lambda n: (images(n), torch.arange(n)),
    ),
    "called twice on the same input": (
        lambda: Net(lambda m, x: m.b(m.a(x) + m.a(x)), a=conv(), b=conv(8, 4)), images,
    ),
    "called twice in a row": (
        lambda: Net(lambda m, x: m.b(F.relu(m.a(F.relu(m.a(x))))), a=conv(3, 3), b=conv(3, 4)), images,
    ),
    "the same operand twice": (
        lambda: Net(lambda m, x: (lambda y: m.b(torch.cat([y + y, y * y], 1)))(m.a(x)), a=conv(), b=conv(16, 4)),
        images,
    ),
    "product with itself": (
        lambda: Net(lambda m, x: (lambda y: m.b(y @ y.transpose(1, 2)))(m.a(x)), a=Linear(12, 8), b=Linear(6, 4)),
        tokens,
    ),
    "one part stays float": (lambda: Net(_parts, a=conv(), b=conv(4, 4)), images),
    "even kernel, same padding": (
        lambda: Net(lambda m, x: m.b(m.a(x)), a=nn.Conv2d(3, 8, 4, padding="same"),
                    b=nn.Conv2d(8, 4, (2, 3), padding="same")), images,
    ),
    "reflect padding": (
        lambda: Net(lambda m, x: m.b(m.a(x)), a=conv(), b=conv(8, 4, padding_mode="reflect")), images,
    ),
    "computed weights": (
        lambda: Net(lambda m, x: F.linear(m.a(x), m.w(x[:, 0]).sum(0).view(4, 8)), a=Linear(12, 8), w=Linear(12, 32)),
        tokens,
    ),
    "computed bias": (
        lambda: Net(lambda m, x: F.linear(m.a(x), m.b.weight, m.w(x[:, 0]).sum(0)), a=Linear(12, 8), b=Linear(8, 4),
                    w=Linear(12, 4)), tokens,
    ),
    "linear on one row": (
        lambda: Net(lambda m, x: m.b(F.relu(m.a(x.sum((0, 1))))), a=Linear(12, 8), b=Linear(8, 4)), tokens,
    ),
    "parameter as a matrix": (
        lambda: Net(lambda m, x: m.b(m.v @ m.a(x)), a=Linear(12, 8), v=torch.randn(4, 6), b=Linear(8, 3)), tokens,
    ),
    "scalar buffers": (
        lambda: Net(lambda m, x: m.b(m.a(x) * m.v + m.w), a=conv(), v=torch.tensor(0.37), w=torch.tensor(-1.5),
                    b=conv(8, 4)), images,
    ),
    "negative padding": (
        lambda: Net(lambda m, x: m.b(F.pad(m.a(x), (-1, 2, 1, -1))), a=conv(), b=conv(8, 4)), images,
    ),
    "ceil-mode average pool": (
        lambda: Net(lambda m, x: m.b(F.avg_pool2d(m.a(x), 3, 2, 1, ceil_mode=True)), a=conv(), b=conv(8, 4)), images,
    ),
    "adaptive pool, even windows": (
        lambda: Net(lambda m, x: m.b(F.adaptive_avg_pool2d(m.a(x), 4)), a=conv(), b=conv(8, 4)), images,
    ),
    "adaptive pool, uneven windows": (
        lambda: Net(lambda m, x: m.b(F.adaptive_avg_pool2d(m.a(x), 3)), a=conv(), b=conv(8, 4)), images,
    ),
    "mask as an input": (
        lambda: Net2(_masked, **_heads()),
        lambda n: (tokens(n), torch.zeros(n, 6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), -1e4)),
    ),
    "bool mask as an input": (
        lambda: Net2(_masked, **_heads()), lambda n: (tokens(n), torch.ones(n, 6, 6).tril().bool()),
    ),
    "transposed convolution": (
        lambda: Net(lambda m, x: m.b(F.relu(m.a(x))), a=nn.ConvTranspose2d(3, 8, 2, 2), b=conv(8, 4)), images,
    ),
    "softmax over one element of a sum": (  # its only reader asks for the sum's size
        lambda: Net(lambda m, x: m.b((m.a(x) + m.d(x)).flatten(1, 3).mean(1)[:, None, None, None].softmax(3)
                                     * m.a(x)), a=conv(), d=conv(), b=conv(8, 4)), images,
    ),
    "zeros around a max pool": (
        lambda: Net(lambda m, x: m.b(m.n(F.max_pool2d(F.pad(m.a(x) - 3, (1, 1, 1, 1)), 3, 2)).relu()),
                    a=conv(), n=nn.GroupNorm(4, 8), b=conv(8, 4)), images,
    ),
    "zeros around a max pool of integers": (
        lambda: Net(lambda m, x: m.b(F.max_pool2d(F.pad(m.a(x), (1, 1, 1, 1)), 3, 2)), a=conv(), b=conv(8, 4)), images,
    ),
    "standardised weights": (
        lambda: Net(lambda m, x: m.b(F.conv2d(x, F.batch_norm(m.w.view(1, 8, -1), None, None, training=True)
                                              .view(8, 3, 3, 3), padding=1).relu()),
                    w=torch.randn(8, 3, 3, 3), b=conv(8, 4)), images,
    ),
    "embedding of a buffer": (
        lambda: Net(lambda m, x: m.b(m.a(x) + m.e(m.ids)), a=Linear(12, 8), e=nn.Embedding(9, 8), b=Linear(8, 4),
                    ids=torch.arange(6)), tokens,
    ),
    "three-dimensional images": (
        lambda: Net(lambda m, x: m.b(F.relu(m.a(x))), a=nn.Conv3d(1, 4, 3), b=nn.Conv3d(4, 2, 1)),
        lambda n: torch.randn(n, 1, 5, 5, 5),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_the_runtime_computes_the_simulators_integers(name: str) -> None:
    build, data = NETWORKS[name]
    prepared = prepare(build(), [data(8), data(8)])
    test = data(8)
    shipped = ship(prepared, test, data(1))
    assert_exact(shipped)
    for found, simulated in zip(shipped.outputs, prepared.simulator().run(flat(test)), strict=True):
        torch.testing.assert_close(found, simulated, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        real = prepared.graph.run(*flat(test))
    assert len(real) == len(shipped.outputs)
    for expected, found in zip(real, shipped.outputs, strict=True):
        assert expected.shape == found.shape and expected.dtype == found.dtype
        if expected.is_floating_point():
            assert float((expected - found).norm() / expected.norm()) < 0.15
        else:
            assert torch.equal(expected, found)


@pytest.mark.parametrize("kind", ["conv", "conv_transpose", "linear"])
def test_a_layer_kept_in_float_between_integers_keeps_its_weights(kind: str) -> None:
    """ONNX Runtime quantizes the weights of such a layer by itself unless it is kept from it."""
    middle = {"conv": conv(8, 8), "conv_transpose": nn.ConvTranspose2d(8, 8, 1), "linear": Linear(8, 8)}[kind]
    first, last = (Linear(8, 8), Linear(8, 8)) if kind == "linear" else (conv(8, 8), conv(8, 8))
    data = (lambda n: torch.randn(n, 8)) if kind == "linear" else (lambda n: torch.randn(n, 8, 4, 4))
    model = Net(lambda m, x: m.c(m.b(F.relu(m.a(x)))), a=first, b=middle, c=last)
    prepared = prepare(model, [data(8)], overrides=[Override(match="b", weights={"format": "float32"})])
    test = data(8)
    shipped = ship(prepared, test)
    assert_exact(shipped)
    simulated = prepared.simulator().run(flat(test))[0]
    torch.testing.assert_close(shipped.outputs[0], simulated, rtol=1e-5, atol=1e-5)


def test_weights_that_are_computed_from_constants_only_become_constants() -> None:
    build, data = NETWORKS["standardised weights"]
    prepared = prepare(build(), [data(8)])
    assert sum(1 for todo in prepared.plan.nodes.values() if todo.kernel == "QLinearConv") == 2


@pytest.mark.parametrize(
    "name",
    ["mask as an input", "adaptive pool, uneven windows", "called twice in a row", "zeros around a max pool"],
)
def test_the_float_reference_arrives_unchanged(name: str, tmp_path: Any) -> None:
    build, data = NETWORKS[name]
    prepared = prepare(build(), [data(4)])
    prepared.target.export(prepared.graph, Plan.empty("onnxruntime"), tmp_path)
    test = data(3)
    with torch.no_grad():
        real = prepared.graph.run(*flat(test))
    for expected, found in zip(real, prepared.target.open(tmp_path).run(flat(test)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["absorbed relu is an output", "one part stays float"])
def test_an_empty_batch_gives_an_empty_result(name: str) -> None:
    build, data = NETWORKS[name]
    prepared = prepare(build(), [data(8)])
    shipped = ship(prepared, data(8), data(0))
    assert_exact(shipped)
    assert shipped.parity.samples == 8
