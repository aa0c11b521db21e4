"""What a layer computes in each mode, against the same sums done by hand on the original weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from tests.flow import Net, Prepared, conv, images, prepare, tokens
from torch import Tensor, nn
from torch.nn import functional as F

from bitport.frontends.pytorch import load_module
from bitport.graph import Edge, Graph
from bitport.numerics.codes import decode, encode, fit
from bitport.plan import Plan
from bitport.recipe.model import Override

FLOAT = {"format": "float32"}
DYNAMIC = {"format": "int8", "dynamic": True}
Options = Mapping[str, Any]


def ids(count: int) -> Tensor:
    return torch.randint(0, 11, (count, 5))


# kind → (layer, data, the layer's function of x, weight and bias, channel axis of its weight)
LAYERS: dict[str, tuple[Callable[[], nn.Module], Any, Callable[..., Tensor], int]] = {
    "conv": (lambda: conv(3, 7), images, lambda x, w, b: F.conv2d(x, w, b, padding=1), 0),
    "conv without bias": (
        lambda: conv(3, 7, bias=False), images, lambda x, w, b: F.conv2d(x, w, b, padding=1), 0,
    ),
    "strided conv": (
        lambda: conv(3, 5, stride=2, dilation=2, padding=2), images,
        lambda x, w, b: F.conv2d(x, w, b, 2, 2, 2), 0,
    ),
    "depthwise": (
        lambda: conv(3, 6, groups=3), images, lambda x, w, b: F.conv2d(x, w, b, padding=1, groups=3), 0,
    ),
    "grouped conv": (
        lambda: conv(4, 6, groups=2), lambda n: images(n, 4),
        lambda x, w, b: F.conv2d(x, w, b, padding=1, groups=2), 0,
    ),
    "conv 1-d": (
        lambda: nn.Conv1d(6, 5, 3), tokens, lambda x, w, b: F.conv1d(x, w, b), 0,
    ),
    "conv_transpose": (
        lambda: nn.ConvTranspose2d(3, 5, 3, 2), images, lambda x, w, b: F.conv_transpose2d(x, w, b, 2), 1,
    ),
    "grouped conv_transpose": (
        lambda: nn.ConvTranspose2d(4, 6, 2, 2, groups=2), lambda n: images(n, 4),
        lambda x, w, b: F.conv_transpose2d(x, w, b, 2, groups=2), 1,
    ),
    "linear": (lambda: nn.Linear(13, 5), lambda n: torch.randn(n, 13), F.linear, 0),
    "linear without bias": (
        lambda: nn.Linear(13, 5, bias=False), lambda n: torch.randn(n, 13), F.linear, 0,
    ),
    "linear 3-d": (lambda: nn.Linear(12, 9), tokens, F.linear, 0),
    "embedding": (lambda: nn.Embedding(11, 6), ids, lambda x, w, b: F.embedding(x, w), 0),
}  # fmt: skip
CONTRACTIONS = [kind for kind in LAYERS if kind != "embedding"]

WEIGHTS: tuple[Options, ...] = (
    {"format": "int8"},
    {"format": "int8", "granularity": "tensor", "symmetric": False},
    {"format": "int4", "granularity": "group", "group": 5, "symmetric": False},
    {"format": "int3", "granularity": "global"},
    {"format": "int[-16,15]", "symmetric": False, "range": "mse"},
    {"format": "uint4"},
    {"format": "int4", "granularity": "group", "group": 1000},
    {"format": "int4 group(4) scale(float16)"},
    {"format": "float16"},
    {"format": "bfloat16"},
    {"format": "e4m3"},
    {"format": "e5m10", "granularity": "channel"},
    {"format": "e8m10", "granularity": "tensor"},
    {"format": "nf4", "granularity": "group", "group": 8},
    {"format": "mxfp4"},
    {"format": "nvfp4"},
    {"format": "log2(4)"},
    {"format": "codebook(6)"},
    {"format": "binary"},
    {"format": "sign"},
    {"format": "ternary", "range": "mse"},
)


def named(options: Options) -> str:
    return " ".join(str(value) for value in options.values())


@functools.cache
def captured(kind: str) -> tuple[Graph, nn.Module]:
    """A network of one layer; capturing it takes longer than all the rest."""
    make, data, *_ = LAYERS[kind]
    layer = make()
    return load_module(Net(lambda m, x: m.a(x), a=layer).eval(), data(2)), layer


def one(kind: str, **options: Any) -> tuple[Prepared, Tensor, nn.Module, Callable[..., Tensor], int]:
    """A network of one layer, planned on `null`: (prepared, inputs, layer, function, channel axis)."""
    graph, layer = captured(kind)
    _, data, function, axis = LAYERS[kind]
    return prepare(graph, [data(8)], "null", **options), data(4), layer, function, axis


def stored(prepared: Prepared, layer: nn.Module, axis: int) -> Tensor:
    """The layer's weight on the grid that its format asks for, made from the weight itself."""
    (tie,) = (tie for tie in prepared.plan.ties.values() if tie.source == "weight")
    if tie.format.granularity in ("channel", "group"):
        assert tie.format.axis == axis
    grid = fit(layer.weight.detach(), tie.format, tie.range)
    return decode(encode(layer.weight.detach(), grid), grid)


def by_hand(x: Tensor, low: int = -128, high: int = 127) -> Tensor:
    """ONNX DynamicQuantizeLinear and back, in plain Python numbers."""
    least, most = min(0.0, float(x.min())), max(0.0, float(x.max()))
    scale = torch.tensor((most - least) / (high - low), dtype=torch.float32)
    zero_point = float(torch.round(torch.tensor(low - least / float(scale))).clamp(low, high))
    return ((torch.round(x / scale) + zero_point).clamp(low, high) - zero_point) * scale


def on_int32(bias: Tensor | None, plan: Plan) -> Tensor | None:
    """A bias as a static layer has it: int32 on the grid scale_x · scale_w, where the weight makes such a grid."""
    ties = [tie for tie in plan.ties.values() if tie.source == "bias"]
    if bias is None or not ties:
        return bias
    scale, _ = ties[0].parameters()
    return torch.round(bias.double() / scale.double()).float() * scale


EVERY_FORMAT = [(kind, weights) for kind in ("depthwise", "conv_transpose") for weights in WEIGHTS]
EVERY_LAYER = [(kind, weights) for kind in LAYERS for weights in (WEIGHTS[2], WEIGHTS[-4], WEIGHTS[-8])]


@pytest.mark.parametrize(
    ("kind", "weights"), EVERY_FORMAT + EVERY_LAYER, ids=lambda v: v if isinstance(v, str) else named(v)
)
def test_weights_alone(kind: str, weights: Options) -> None:
    prepared, x, layer, function, axis = one(kind, weights=weights, activations=FLOAT)
    assert prepared.plan.node("a").mode == "weights"
    with torch.no_grad():
        (found,) = prepared.simulator().run((x,))
        w = stored(prepared, layer, axis)
        assert torch.equal(found, function(x, w, getattr(layer, "bias", None)))
        assert not torch.equal(w, layer.weight)
        # the graph that an artifact keeps has the same numbers
        assert torch.equal(prepared.work.tensor("a.weight"), w)
        assert torch.equal(prepared.work.run(x)[0], found)


@pytest.mark.parametrize("weights", WEIGHTS[:3], ids=named)
@pytest.mark.parametrize("kind", CONTRACTIONS)
def test_activations_quantized_while_running(kind: str, weights: Options) -> None:
    prepared, x, layer, function, axis = one(kind, weights=weights, activations=DYNAMIC)
    assert prepared.plan.node("a").mode == "dynamic"
    with torch.no_grad():
        for scaled in (x, 30 * x, x.clamp(min=0), torch.zeros_like(x)):
            (found,) = prepared.simulator().run((scaled,))
            reference = function(
                by_hand(scaled) if scaled.any() else scaled, stored(prepared, layer, axis), layer.bias
            )
            torch.testing.assert_close(found, reference, atol=1e-6, rtol=1e-6)
    assert not prepared.plan.measured()


@pytest.mark.parametrize("weights", [*WEIGHTS[1:4], {"format": "nf4"}], ids=named)
@pytest.mark.parametrize("kind", CONTRACTIONS)
def test_integers_in_and_out(kind: str, weights: Options) -> None:
    prepared, x, layer, function, axis = one(kind, weights=weights)
    assert prepared.plan.node("a").mode is None
    ties = prepared.plan.ties
    (x_scale, x_zero), (scale, zero) = ties["x"].parameters(), ties["a"].parameters()
    with torch.no_grad():
        read = ((torch.round(x / x_scale) + x_zero).clamp(-128, 127) - x_zero) * x_scale
        reference = function(read, stored(prepared, layer, axis), on_int32(layer.bias, prepared.plan))
        whole = (torch.round(reference / scale) + zero).clamp(-128, 127)
        found: dict[str, Tensor] = {}
        prepared.simulator().run((x,), tap=lambda name, q: found.setdefault(name, q))
    assert torch.equal(found["a"].float(), whole)


def test_an_override_gives_each_layer_a_mode_of_its_own() -> None:
    net = Net(
        lambda m, x: m.e(F.relu(m.d(F.relu(m.c(F.relu(m.b(F.relu(m.a(x))))))))),
        a=nn.Linear(12, 16), b=nn.Linear(16, 16), c=nn.Linear(16, 16), d=nn.Linear(16, 16), e=nn.Linear(16, 4),
    )  # fmt: skip
    overrides = [
        Override("b", weights={"format": "int4", "granularity": "group", "group": 8}, activations=FLOAT),
        Override("c", weights=FLOAT),
        Override("d", activations={"dynamic": True}),
    ]
    prepared = prepare(net, [tokens(16)], "null", overrides=overrides)
    plan = prepared.plan
    modes = {name: (plan.node(name).kernel, plan.node(name).mode) for name in "abcde"}
    assert modes == {
        "a": ("simulated", None),
        "b": ("decoded", "weights"),
        "c": (None, None),
        "d": ("simulated", "dynamic"),
        "e": ("simulated", None),
    }
    assert plan.node("c").reason == "kept in float by the recipe"
    formats = {tie: str(plan.ties[tie].format) for tie in plan.ties if plan.ties[tie].source == "weight"}
    assert formats["b.weight"] == "int4 symmetric group(8,0)" and "c.weight" not in formats
    assert plan.ties["d.x"].source == "dynamic"
    # what a static layer reads is integers, what the others read is float
    assert {
        e.consumer for e in plan.edges if e.slot == 0 and plan.ties[plan.edges[e]].source == "measured"
    } >= {"a", "e"}
    assert prepared.real_error(tokens(16)) < 0.15
    back = Plan.from_record(plan.to_record())
    assert back.nodes == plan.nodes and back.edges == plan.edges


def test_a_weight_that_two_layers_share_has_a_grid_for_each_that_differs() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(11, 12), nn.Linear(12, 11, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.table(x))

    model = Tied()
    weights = {"format": "int4", "granularity": "group", "group": 5}
    alike = prepare(model, [ids(4)], "null", weights=weights, activations=FLOAT)
    (tie,) = (tie for tie in alike.plan.ties.values() if tie.source == "weight")
    grid = fit(model.table.weight.detach(), tie.format, tie.range)
    w = decode(encode(model.table.weight.detach(), grid), grid)
    x = ids(4)
    assert torch.equal(alike.simulator().run((x,))[0], F.linear(F.embedding(x, w), w))

    overrides = [Override("head", weights={"format": "int8", "granularity": "channel"})]
    mixed = prepare(model, [ids(4)], "null", weights=weights, activations=FLOAT, overrides=overrides)
    formats = sorted(str(tie.format) for tie in mixed.plan.ties.values() if tie.source == "weight")
    assert formats == ["int4 symmetric group(5,0)", "int8 symmetric channel(0)"]
    with torch.no_grad():
        fine = fit(
            model.table.weight.detach(),
            mixed.plan.ties[mixed.plan.edges[Edge("head.weight", "head", 1)]].format,
        )
        v = decode(encode(model.table.weight.detach(), fine), fine)
        assert torch.equal(mixed.simulator().run((x,))[0], F.linear(F.embedding(x, w), v))
        # it has no single grid to lie on
        assert torch.equal(mixed.work.tensor("table.weight"), model.table.weight)


@pytest.mark.parametrize("activations", [FLOAT, DYNAMIC, {}], ids=["weights", "dynamic", "static"])
def test_a_module_called_twice_has_one_weight(activations: Options) -> None:
    layer = nn.Linear(12, 12)
    net = Net(lambda m, x: m.a(F.relu(m.a(x))), a=layer)
    weights = {"format": "int4", "granularity": "channel"}
    prepared = prepare(net, [tokens(16)], "null", weights=weights, activations=activations)
    ties = [name for name, tie in prepared.plan.ties.items() if tie.source == "weight"]
    assert ties == ["a.weight"]
    if activations == FLOAT:
        w = stored(prepared, layer, 0)
        x = tokens(3)
        with torch.no_grad():
            reference = F.linear(F.relu(F.linear(x, w, layer.bias)), w, layer.bias)
            assert torch.equal(prepared.simulator().run((x,))[0], reference)
    else:
        assert prepared.real_error(tokens(16)) < 0.3


def test_one_global_scale_really_is_one() -> None:
    net = Net(lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))), a=conv(), b=conv(8, 8), c=conv(8, 4))
    with torch.no_grad():
        net.b.weight.mul_(3)
    options = {"format": "int8", "granularity": "global"}
    prepared = prepare(net, [images(16)], "null", weights=options, activations=options)
    ties = prepared.plan.ties.values()
    (weight,) = (tie for tie in ties if tie.source == "weight")
    (values,) = (tie for tie in ties if tie.source == "measured")
    assert weight.members == ("a.weight", "b.weight", "c.weight")
    largest = max(float(layer.weight.detach().abs().max()) for layer in (net.a, net.b, net.c))
    assert float(weight.parameters()[0]) == pytest.approx(largest / 127)
    assert values.scale is not None and values.scale.ndim == 0
    assert prepared.real_error(images(16)) < 0.1


@pytest.mark.parametrize("other", ["int4", "e4m3"])
def test_layers_of_another_format_have_a_global_scale_of_their_own(other: str) -> None:
    net = Net(lambda m, x: m.c(m.b(m.a(x))), a=nn.Linear(12, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 4))
    prepared = prepare(
        net, [tokens(8)], "null", weights={"format": "int8", "granularity": "global"}, activations=FLOAT,
        overrides=[Override("b", weights={"format": other, "granularity": "global"})],
    )  # fmt: skip
    of = {edge.consumer: prepared.plan.ties[tie] for edge, tie in prepared.plan.edges.items()}
    assert str(of["a"].format) == "int8 symmetric global" and str(of["b"].format).startswith(other)
    assert of["a"].members == ("a.weight", "c.weight") and of["b"].members == ("b.weight",)
    assert of["a"] is of["c"]


def test_the_channel_axis_can_be_given() -> None:
    layer = nn.Linear(13, 5)
    for text, shape in (
        ("int4 channel(1)", (13,)),
        ("int4 group(2,1)", (13, 3)),
        ("int4 group(4,-1)", (13, 2)),
    ):
        net = Net(lambda m, x: m.a(x), a=layer)
        prepared = prepare(net, [torch.randn(4, 13)], "null", weights={"format": text}, activations=FLOAT)
        (tie,) = prepared.plan.ties.values()
        scale, _ = tie.parameters()
        assert scale.shape == shape
        grid = fit(layer.weight.detach(), tie.format)
        x = torch.randn(3, 13)
        with torch.no_grad():
            reference = F.linear(x, decode(encode(layer.weight, grid), grid), layer.bias)
            assert torch.equal(prepared.simulator().run((x,))[0], reference)


def sized(inside: int, outside: int) -> nn.Linear:
    """A Linear of any size; torch warns when it initialises one without values."""
    layer = nn.Linear(1, 1)
    layer.in_features, layer.out_features = inside, outside
    layer.weight, layer.bias = nn.Parameter(torch.randn(outside, inside)), nn.Parameter(torch.randn(outside))
    return layer


@functools.cache
def captured_size(inside: int, outside: int) -> tuple[Graph, nn.Linear]:
    layer = sized(inside, outside)
    return load_module(Net(lambda m, x: m.a(x), a=layer).eval(), torch.randn(2, inside)), layer


@pytest.mark.parametrize("activations", [FLOAT, DYNAMIC, {}], ids=["weights", "dynamic", "static"])
@pytest.mark.parametrize(
    "weights",
    [
        {"format": "int8"}, {"format": "int8", "symmetric": "auto"}, {"format": "binary", "range": "mse"},
        {"format": "int4", "group": 5}, {"format": "int4", "group": 1000, "symmetric": False},
        {"format": "codebook(4)"}, {"format": "nvfp4"}, {"format": "sign"}, {"format": "int8", "granularity": "global"},
    ],
    ids=named,
)  # fmt: skip
@pytest.mark.parametrize(("inside", "outside"), [(1, 1), (1, 5), (13, 1), (0, 4), (4, 0)])
def test_dimensions_of_one_and_none(
    inside: int, outside: int, weights: Options, activations: Options
) -> None:
    graph, layer = captured_size(inside, outside)
    prepared = prepare(graph, [torch.randn(4, inside)], "null", weights=weights, activations=activations)
    x = torch.randn(3, inside)
    (found,) = prepared.simulator().run((x,))
    assert found.shape == (3, outside) and bool(torch.isfinite(found).all())
    (tie,) = (tie for tie in prepared.plan.ties.values() if tie.source == "weight")
    grid = fit(layer.weight.detach(), tie.format, tie.range)
    kept = decode(encode(layer.weight.detach(), grid), grid)
    assert torch.equal(prepared.work.tensor("a.weight"), kept)
    if activations == FLOAT:
        assert torch.equal(found, F.linear(x, kept, layer.bias.detach()))
