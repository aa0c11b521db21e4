"""Rewrites keep the outputs and reach the form that is quantized."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.flow import Net, Net2, conv, flat, images, tokens
from tests.nets import build
from torch import Tensor, nn
from torch.nn import functional as F

from bitport.frontends.pytorch import load_module
from bitport.graph import Graph
from bitport.graph.simplify import simplify


def shaken(model: nn.Module) -> nn.Module:
    """Running statistics and affine parameters off their defaults, so that folding has something to do."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
            if module.affine:
                nn.init.normal_(module.weight, 1, 0.3)
                nn.init.normal_(module.bias, 0, 0.3)
    return model.eval()


def simplified(model: nn.Module, inputs: Any) -> Graph:
    """The simplified graph, after checking that it keeps the outputs and that simplifying again does nothing."""
    graph = load_module(shaken(model), inputs)
    work = graph.clone()
    simplify(work)
    work.check("folded")
    leaves = flat(tuple(inputs.values()) if isinstance(inputs, dict) else inputs)
    with torch.no_grad():
        for expected, found in zip(graph.run(*leaves), work.run(*leaves), strict=True):
            bound = 1e-5 * max(1.0, float(expected.abs().max()))
            assert float((expected - found).abs().max()) <= bound
    before = work.digest()
    simplify(work)
    assert work.digest() == before, "simplifying twice must change nothing"
    return work


def kinds(graph: Graph) -> list[str]:
    return [graph.op(node).kind for node in graph.nodes()]


@pytest.mark.parametrize(
    "name", ["resnet", "mobilenet", "hand_encoder", "decoder_inf", "unet", "speech", "weight_norm", "frozen"]
)
def test_outputs_are_kept(name: str) -> None:
    model, inputs = build(name, 2)
    found = kinds(simplified(model, inputs))
    assert not {"dropout", "identity", "sdpa"} & set(found)


@pytest.mark.parametrize(
    ("layer", "norm", "data"),
    [
        (conv(), nn.BatchNorm2d(8), images(3)),
        (conv(bias=False), nn.BatchNorm2d(8), images(3)),
        (conv(6, 6, groups=6), nn.BatchNorm2d(6, eps=0.1), images(3, 6)),
        (conv(), nn.BatchNorm2d(8, affine=False), images(3)),
        (nn.ConvTranspose2d(4, 6, 2, 2, groups=2), nn.BatchNorm2d(6), images(3, 4)),
        (nn.Linear(12, 8), nn.BatchNorm1d(8), torch.randn(5, 12)),
        (nn.Linear(12, 8, bias=False), nn.BatchNorm1d(8), torch.randn(5, 12)),
        (nn.Conv1d(6, 8, 3), nn.BatchNorm1d(8), tokens(3)),
    ],
)
def test_batch_norm_folds(layer: nn.Module, norm: nn.Module, data: Tensor) -> None:
    found = kinds(simplified(Net(lambda m, x: m.n(m.a(x)), a=layer, n=norm), data))
    assert "batch_norm" not in found and len(found) == 1


def test_a_shared_or_twice_read_convolution_is_not_folded() -> None:
    shared = Net(lambda m, x: m.n(m.a(x)) + m.a(2 * x), a=conv(), n=nn.BatchNorm2d(8))
    read_twice = Net(lambda m, x: (lambda y: m.n(y) + y)(m.a(x)), a=conv(), n=nn.BatchNorm2d(8))
    for net in (shared, read_twice):
        assert "batch_norm" in kinds(simplified(net, images(3)))


def test_statistics_of_the_batch_are_not_folded() -> None:
    norm = nn.BatchNorm2d(8, track_running_stats=False)
    assert "batch_norm" in kinds(simplified(Net(lambda m, x: m.n(m.a(x)), a=conv(), n=norm), images(3)))


@pytest.mark.parametrize(
    ("layer", "shape", "data"),
    [
        (conv(), (8, 1, 1), images(3)),
        (conv(bias=False), (1, 8, 1, 1), images(3)),
        (conv(6, 6, groups=6), (6, 1, 1), images(3, 6)),
        (nn.ConvTranspose2d(4, 6, 2, 2, groups=2), (1, 6, 1, 1), images(3, 4)),
        (nn.Linear(12, 8), (8,), torch.randn(5, 12)),
        (nn.Linear(12, 8, bias=False), (1, 1, 8), tokens(3)),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_products_and_sums_of_channels_fold(
    layer: nn.Module, shape: tuple[int, ...], data: Tensor, turned: bool
) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.shift + m.scale * m.a(x) if turned else m.a(x) * m.scale + m.shift

    net = Net(forward, a=layer, scale=torch.randn(shape), shift=torch.randn(shape))
    assert len(kinds(simplified(net, data))) == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: (lambda y: y * m.scale + y)(m.a(x)),  # read twice
        lambda m, x: m.a(x) * m.one,  # the same for all: free in integers
        lambda m, x: m.a(x) * m.rows,  # along another axis
        lambda m, x: torch.add(m.a(x), m.scale, alpha=2),
        lambda m, x: m.a(x) * m.a(x).mean((2, 3), keepdim=True),  # computed
        lambda m, x: m.a(x) / m.scale,
        lambda m, x: m.a(x) + m.scale * 1e4,  # a mask
    ],
)
def test_other_products_and_sums_stay(function: Any) -> None:
    net = Net(
        function, a=conv(3, 8), scale=torch.rand(8, 1, 1) + 1, one=torch.tensor(2.0), rows=torch.randn(8)
    )
    assert len(kinds(simplified(net, images(3)))) > 1


def test_weight_norm_becomes_a_stored_weight() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(12, 8))
    work = simplified(Net(lambda m, x: m.a(x), a=layer), tokens(2))
    assert kinds(work) == ["linear"]
    weight = work.op(work.nodes()[0]).operands[1]
    assert weight is not None and weight.tensor is not None


def test_what_depends_on_no_input_is_stored() -> None:
    net = Net(lambda m, x: x * torch.sin(torch.arange(12.0)) + m.k.exp().sum(), k=torch.randn(4))
    work = simplified(net, tokens(2))
    assert sorted(kinds(work)) == ["add", "mul"]


def test_the_same_operator_twice_is_computed_once() -> None:
    net = Net(lambda m, x: m.b(F.relu(m.a(x))) + m.c(F.relu(m.a(x))), a=conv(), b=conv(8, 4), c=conv(8, 4))
    assert kinds(simplified(net, images(2))).count("relu") == 1


def test_random_operators_are_not_merged() -> None:
    net = Net(lambda m, x: x + torch.rand_like(x) - torch.rand_like(x))
    graph = load_module(net, tokens(2))
    simplify(graph)
    assert sum("rand_like" in str(node.target) for node in graph.nodes()) == 2


@pytest.mark.parametrize("mask", [None, "causal", "bool", "float", "scale", "gqa"])
def test_attention_is_split(mask: str | None) -> None:
    options: dict[str, Any] = {
        None: {}, "causal": {"is_causal": True}, "scale": {"scale": 0.3}, "gqa": {"enable_gqa": True},
        "bool": {"attn_mask": torch.ones(6, 6).tril().bool()},
        "float": {"attn_mask": torch.zeros(6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), -1e4)},
    }[mask]  # fmt: skip
    queries = 4 if mask == "gqa" else 2

    def forward(m: Any, x: Tensor, other: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, other, other * 0.5, **options)

    work = simplified(Net2(forward), (torch.randn(3, queries, 6, 5), torch.randn(3, 2, 6, 5)))
    found = kinds(work)
    assert "sdpa" not in found and found.count("matmul") == 2 and found.count("softmax") == 1
    scores = next(n for n in work.nodes() if work.op(n).kind == "matmul")
    query = work.op(scores).operands[0]
    assert query is not None and query.node is not None and work.op(query.node).kind == "mul_scalar"


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize(
    "dims", [(2, 3), (-1, -2)]
)  # PyTorch's exporter to ONNX writes the second for its pools
def test_a_mean_over_all_pixels_is_a_global_pool(dims: tuple[int, int], keepdim: bool) -> None:
    work = simplified(Net(lambda m, x: x.mean(dims, keepdim=keepdim)), images(2))
    assert kinds(work)[0] == "global_avg_pool" and "mean" not in kinds(work)


def test_other_means_stay() -> None:
    assert kinds(simplified(Net(lambda m, x: x.mean((1, 2))), images(2))) == ["mean"]


def test_a_softmax_over_one_element_is_one() -> None:
    work = simplified(Net(lambda m, x: x[:, :1].softmax(1) * 3), tokens(2))
    assert "softmax" not in kinds(work)
