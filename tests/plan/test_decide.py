"""What the planner makes of a network: rows, ties, absorbed relus, masks, overrides, reasons."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.flow import Net, Prepared, assert_exact, conv, images, prepare, ship, tokens
from tests.nets import build
from torch import Tensor, nn
from torch.nn import functional as F

from bitport.errors import RecipeError, TargetError
from bitport.graph import Edge
from bitport.plan import Plan
from bitport.recipe.model import Override

Linear = nn.Linear


def planned(model: nn.Module, data: Any = images, **options: Any) -> Prepared:
    return prepare(model, [data(8), data(8)], **options)


def chain() -> nn.Module:
    return Net(lambda m, x: m.b(F.relu(m.a(x))), a=conv(), b=conv(8, 4))


# ------------------------------------------------------------------------------------------------ absorbed relus


def test_a_relu_behind_a_convolution_is_absorbed() -> None:
    plan = planned(chain()).plan
    assert plan.node("a").absorbs == "relu" and plan.node("relu").absorbed_by == "a"
    assert plan.tie_of("a") is None and plan.tie_of("relu") == "relu"
    assert plan.edges[Edge("relu", "b", 0)] == "relu"
    scale, zero_point = plan.ties["relu"].parameters()
    assert int(zero_point) == plan.ties["relu"].format.low and float(scale) > 0


def test_a_relu_with_a_second_reader_of_the_convolution_stays() -> None:
    net = Net(lambda m, x: (lambda y: m.b(F.relu(y)) + m.c(y))(m.a(x)), a=conv(), b=conv(8, 4), c=conv(8, 4))
    plan = planned(net).plan
    assert plan.node("a").absorbs is None
    assert plan.node("relu").kernel is not None and plan.node("relu").absorbed_by is None
    assert plan.tie_of("a") != plan.tie_of("relu")


def test_a_relu_called_twice_on_one_tensor_is_one_relu() -> None:
    net = Net(
        lambda m, x: (lambda y: m.b(F.relu(y)) + m.c(F.relu(y)))(m.a(x)), a=conv(), b=conv(8, 4), c=conv(8, 4)
    )
    assert planned(net).plan.node("a").absorbs == "relu"


def test_symmetric_integers_absorb_nothing() -> None:
    # the zero point is in the middle: saturation is no relu there
    prepared = planned(chain(), activations={"symmetric": True})
    assert prepared.plan.node("a").absorbs is None
    assert int(prepared.plan.ties["relu"].parameters()[1]) == 0
    assert prepared.real_error(images(8)) < 0.05


def test_a_relu_kept_in_float_is_not_absorbed() -> None:
    plan = planned(chain(), overrides=[Override("relu", activations={"format": "float32"})]).plan
    assert plan.node("a").absorbs is None
    assert plan.node("relu").kernel is None and plan.node("relu").reason == "kept in float by the recipe"


@pytest.mark.parametrize("target", ["onnxruntime", "null"])
def test_a_relu_that_shares_its_integers_with_signed_values_stays(target: str) -> None:
    # the shared zero point is in the middle, so that saturation no longer stops negative values
    net = Net(lambda m, x: m.c(torch.cat([F.relu(m.a(x)), m.b(x)], 1)), a=conv(), b=conv(), c=conv(16, 4))
    prepared = planned(net, target=target)
    assert prepared.plan.node("a").absorbs is None
    assert prepared.tie("relu") == prepared.tie("b") == prepared.tie("cat")
    assert prepared.real_error(images(8)) < 0.05
    assert_exact(ship(prepared, images(8)))


def test_relus_that_share_their_integers_with_each_other_are_absorbed() -> None:
    net = Net(
        lambda m, x: m.c(torch.cat([F.relu(m.a(x)), F.relu(m.b(x))], 1)), a=conv(), b=conv(), c=conv(16, 4)
    )
    plan = planned(net).plan
    assert plan.node("a").absorbs == "relu" and plan.node("b").absorbs == "relu#2"


def test_a_relu6_that_shares_its_integers_with_larger_values_stays() -> None:
    net = Net(
        lambda m, x: m.c(torch.cat([F.relu6(m.a(x)), F.relu(m.b(x))], 1)), a=conv(), b=conv(), c=conv(16, 4)
    )
    prepared = planned(net, lambda n: 20 * images(n))
    assert prepared.plan.node("a").absorbs is None and prepared.plan.node("b").absorbs == "relu"
    assert prepared.real_error(20 * images(8)) < 0.05


# ------------------------------------------------------------------------------------------------ ties


def test_moves_share_and_concat_unites() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.c(torch.cat([m.a(x).transpose(2, 3), m.b(x)[:, :2]], 1))  # type: ignore[no-any-return]

    prepared = planned(Net(forward, a=conv(), b=conv(), c=conv(10, 4)), activations={"range": "minmax"})
    assert prepared.tie("a") == prepared.tie("b") == prepared.tie("transpose") == prepared.tie("cat")
    tie = prepared.plan.ties[prepared.tie("cat")]
    assert tie.source == "measured" and set(tie.members) == {"a", "b"}, (
        "a range is measured where values are made"
    )


def test_equal_fixed_ranges_share_and_different_ones_fall_back_with_the_reason() -> None:
    both = Net(
        lambda m, x: m.c(torch.cat([m.a(x).sigmoid(), m.b(x).sigmoid()], 1)),
        a=conv(),
        b=conv(),
        c=conv(16, 4),
    )
    plan = planned(both).plan
    assert plan.node("cat").kernel is not None and plan.node("cat").reason is None
    assert plan.ties[str(plan.tie_of("cat"))].source == "fixed"
    assert float(plan.ties[str(plan.tie_of("cat"))].parameters()[0]) == 1 / 256

    one = Net(lambda m, x: m.c(torch.cat([m.a(x).sigmoid(), m.b(x)], 1)), a=conv(), b=conv(), c=conv(16, 4))
    prepared = planned(one)
    assert "can't share one scale" in str(prepared.plan.node("cat").reason)
    assert prepared.plan.node("sigmoid").kernel == "QLinearSigmoid"
    assert prepared.plan.ties[prepared.tie("sigmoid")].source == "fixed"
    assert_exact(ship(prepared, images(8)))


def test_a_scaled_tensor_and_its_source_can_not_share() -> None:
    net = Net(lambda m, x: (lambda y: m.c(torch.cat([y, y * 0.5], 1)))(m.a(x)), a=conv(), c=conv(16, 4))
    plan = planned(net).plan
    assert "can't share one scale" in str(plan.node("cat").reason)
    assert plan.node("mul").reason == "its result is only used as float"


def test_a_product_with_a_constant_only_multiplies_the_scale() -> None:
    net = Net(lambda m, x: m.b((m.a(x) * 0.5 * 3).transpose(1, 2)), a=Linear(12, 8), b=Linear(6, 4))
    plan = planned(net, tokens).plan
    first, second = (plan.ties[str(plan.tie_of(name))] for name in ("a", "mul#2"))
    assert second.source == "scaled"
    assert float(second.parameters()[0]) == pytest.approx(1.5 * float(first.parameters()[0]), rel=1e-6)
    assert torch.equal(second.parameters()[1], first.parameters()[1])


@pytest.mark.parametrize(
    ("factor", "reason"),
    [(-2.0, "order"), (0.0, "order"), (1e30, "leaves no scale"), (float("inf"), "leaves no scale")],
)
def test_a_factor_that_leaves_no_scale_stays_in_float(factor: float, reason: str) -> None:
    from bitport.frontends.pytorch import load_module
    from bitport.plan import TensorOptions, decide
    from bitport.targets.null import Null

    graph = load_module(Net(lambda m, x: m.b(m.a(x) * factor), a=Linear(12, 8), b=Linear(8, 4)), tokens(2))
    options = TensorOptions()
    plan = decide(graph, Null().rules(), weights=options, activations=options)
    assert reason in str(plan.node("mul").reason)


def test_a_factor_that_depends_on_the_input_stays_in_float() -> None:
    net = Net(lambda m, x: m.b(m.a(x) * x.shape[0]), a=Linear(12, 8), b=Linear(8, 4))
    assert planned(net, tokens).plan.node("mul").reason == "its factor is computed while running"


def test_biases_are_derived_from_input_and_weight() -> None:
    plan = planned(chain()).plan
    bias = plan.ties["b.bias"]
    assert bias.source == "bias" and bias.of == ("relu", "b.weight") and str(bias.format).startswith("int32")
    x_scale, w_scale = plan.ties["relu"].parameters()[0], plan.ties["b.weight"].parameters()[0]
    assert torch.equal(bias.parameters()[0], x_scale * w_scale) and bias.parameters()[0].shape == (4,)


def test_per_tensor_weights_have_per_tensor_biases() -> None:
    plan = planned(chain(), weights={"granularity": "tensor"}).plan
    assert plan.ties["b.weight"].parameters()[0].shape == plan.ties["b.bias"].parameters()[0].shape == ()


def test_computed_weights_and_biases_stay_float_on_every_target() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        hyper = F.linear(m.a(x), m.w(x[:, 0]).sum(0).view(4, 8))
        return hyper + F.linear(m.a(x), m.b.weight, m.c(x[:, 0]).sum(0))

    for target in ("null", "onnxruntime"):
        net = Net(forward, a=Linear(12, 8), b=Linear(8, 4), c=Linear(12, 4), w=Linear(12, 32))
        plan = planned(net, tokens, target=target).plan
        reasons = {node.reason for node in plan.nodes.values()}
        assert {"its weight is computed while running", "its bias is computed while running"} <= reasons


# ------------------------------------------------------------------------------------------------ masks, constants


@pytest.mark.parametrize("value", [-1e4, float("-inf")])
def test_an_added_mask_is_kept_out_of_every_range(value: float) -> None:
    model, ids = build("decoder_1e4" if value == -1e4 else "decoder_inf", 4)
    prepared = prepare(model, [ids, ids.flip(1)])
    for name, tie in prepared.plan.measured().items():
        assert float(tie.parameters()[0]) < 1, f"{name}: the mask is in its range"
    adds = [n for n in prepared.plan.nodes if prepared.kind(n) == "add" and n.endswith("masked")]
    assert len(adds) == 2
    for name in adds:
        assert "mask" in str(prepared.plan.node(name).reason)


def test_a_mask_added_by_where_or_as_an_input_is_kept_out() -> None:
    from tests.test_odd_networks import NETWORKS

    for name in ("mask as an input", "bool mask as an input"):
        make, data = NETWORKS[name]
        prepared = prepare(make(), [data(8)])
        assert all(float(tie.parameters()[0]) < 1 for tie in prepared.plan.measured().values()), name
        masked = next(n for n in prepared.plan.nodes if n.endswith(".masked"))
        assert prepared.plan.node(masked).kernel is None


def test_a_constant_like_a_mask_names_itself() -> None:
    net = Net(lambda m, x: m.b(m.a(x) + m.far), a=Linear(12, 8), far=torch.full((8,), -1e4), b=Linear(8, 4))
    assert "far looks like a mask" in str(planned(net, tokens).plan.node("add").reason)


def test_a_constant_operand_gets_a_range_of_its_own() -> None:
    net = Net(
        lambda m, x: m.b(F.relu(m.a(x)) + m.near),
        a=Linear(12, 8),
        near=torch.linspace(-2, 3, 8),
        b=Linear(8, 4),
    )
    plan = planned(net, tokens, activations={"range": "minmax"}).plan
    tie = plan.ties[plan.edges[Edge("near", "add", 1)]]
    assert tie.members == ("near",) and tie.source == "measured"
    assert float(tie.parameters()[0]) * 255 == pytest.approx(5.0, rel=1e-5)


def test_a_tied_table_has_a_grid_for_the_embedding_and_one_for_the_head() -> None:
    model, ids = build("decoder_1e4", 4)
    prepared = prepare(model, [ids])
    users = {(edge.consumer, edge.slot): tie for edge, tie in prepared.plan.edges.items()
             if "tok.weight" in edge.producer or "head.weight" in edge.producer}  # fmt: skip
    table, head = users["tok", 1], users["head", 1]
    assert table != head
    assert (
        prepared.plan.ties[table].source == "measured" and prepared.plan.ties[table].parameters()[0].ndim == 0
    )
    assert prepared.plan.ties[head].source == "weight" and prepared.plan.ties[head].parameters()[0].shape == (
        20,
    )


def test_a_convolution_called_twice_has_one_weight_and_two_biases() -> None:
    net = Net(lambda m, x: m.b(F.relu(m.a(F.relu(m.a(x))))), a=conv(3, 3), b=conv(3, 4))
    plan = planned(net).plan
    assert plan.edges[Edge("a.weight", "a", 1)] == plan.edges[Edge("a.weight", "a#2", 1)]
    assert plan.edges[Edge("a.bias", "a", 2)] != plan.edges[Edge("a.bias", "a#2", 2)]


def test_a_list_is_integers_as_a_whole_or_not_at_all() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        left, right = m.a(x).chunk(2, 1)
        return m.b(left) * F.gelu(right)  # type: ignore[no-any-return]

    plan = planned(Net(forward, a=conv(), b=conv(4, 4))).plan
    assert all(
        plan.node(name).kernel is not None for name in ("split", "getitem", "getitem#2") if name in plan.nodes
    )
    kept = planned(
        Net(forward, a=conv(), b=conv(4, 4)),
        overrides=[Override(op="getitem", activations={"format": "float32"})],
    )
    lists = [name for name in kept.plan.nodes if kept.kind(name) == "split"]
    assert lists and all("kept in float" in str(kept.plan.node(name).reason) for name in lists)
    assert_exact(ship(kept, images(8)))


# ------------------------------------------------------------------------------------------------ overrides


def test_overrides_by_name_operator_and_type_and_the_last_match_wins() -> None:
    def formats(*overrides: Override) -> dict[str, str]:
        plan = planned(chain(), target="null", overrides=overrides).plan
        return {name: str(plan.ties[f"{name}.weight"].format).split()[0] for name in ("a", "b")}

    assert formats(Override("b", weights={"format": "int4"})) == {"a": "int8", "b": "int4"}
    assert formats(Override(op="conv", weights={"format": "int4"})) == {"a": "int4", "b": "int4"}
    assert formats(Override(type="Conv2d", weights={"format": "int4"})) == {"a": "int4", "b": "int4"}
    both = (Override(op="conv", weights={"format": "int4"}), Override("a", weights={"format": "int2"}))
    assert formats(*both) == {"a": "int2", "b": "int4"}
    assert formats(*reversed(both)) == {"a": "int4", "b": "int4"}


@pytest.mark.parametrize("name", ["a", "relu"])
def test_activations_of_an_operator_with_an_absorbed_relu_follow_either_name(name: str) -> None:
    plan = planned(chain(), overrides=[Override(name, activations={"range": "percentile"})]).plan
    assert plan.node("a").absorbs == "relu" and plan.ties["relu"].range == "percentile"
    assert plan.ties["x"].range == "mse"


def test_an_override_of_any_member_holds_for_the_whole_tie() -> None:
    net = Net(lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 1)), a=conv(), b=conv(), c=conv(16, 4))
    for name in ("b", "cat"):
        prepared = planned(net, overrides=[Override(name, activations={"range": "minmax"})])
        assert prepared.plan.ties[prepared.tie("a")].range == "minmax"


def test_an_override_that_matches_nothing_is_refused() -> None:
    for override in (
        Override("nothing*", weights={"format": "int4"}),
        Override(op="lstm", weights={"format": "int4"}),
        Override("a", type="Linear", weights={"format": "int4"}),
    ):
        with pytest.raises(RecipeError, match=r"overrides\[0\].*matches no operator"):
            planned(chain(), overrides=[override])


def test_an_override_that_nearly_matches_is_told_what_there_is() -> None:
    net = Net(lambda m, x: m.head(m.stem(x)), stem=conv(), head=conv(8, 4))
    with pytest.raises(RecipeError, match=r"\(match = 'heat'\) matches no operator, but there is 'head'; "):
        planned(net, overrides=[Override("heat", weights={"format": "float32"})])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"weights": {"format": "nf4"}},
            "no kernels for nf4 weights with integer activations .*it holds integers",
        ),
        ({"activations": {"format": "int12"}}, "no integer kernels for int12 activations"),
        ({"overrides": [Override("a", weights={"format": "int9"})]}, "no kernels for int9 weights"),
        ({"weights": {"granularity": "group", "group": 4}}, "has a scale per group"),
        ({"weights": {"symmetric": False}}, "is not symmetric"),
        (
            {"weights": {"format": "e4m3"}, "activations": {"dynamic": True}},
            "no kernels for e4m3 weights with activations quantized while running",
        ),
    ],
)
def test_formats_that_the_target_can_not_hold_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        planned(chain(), **options)


def test_everything_in_float_has_nothing_to_do() -> None:
    with pytest.raises(RecipeError, match=r"nothing to do.*kept in float by the recipe"):
        planned(chain(), overrides=[Override(weights={"format": "float32"})])


# ------------------------------------------------------------------------------------------------ float islands


def test_a_linear_that_nobody_reads_as_integers_returns_float() -> None:
    net = Net(lambda m, x: m.b(F.gelu(m.a(x))), a=Linear(12, 8), b=Linear(8, 4))
    plan = planned(net, tokens).plan
    assert plan.node("a").kernel == "QGemm" and plan.tie_of("a") is None
    assert plan.node("gelu").reason == "ONNX Runtime has no integer GELU" and plan.tie_of("gelu") is not None
    assert plan.tie_of("b") is None


def test_an_element_wise_result_that_leaves_the_network_stays_float() -> None:
    net = Net(lambda m, x: F.leaky_relu(m.a(x)), a=conv())
    assert planned(net).plan.node("leaky_relu").reason == "its result leaves the network as float"


@pytest.mark.parametrize(
    ("name", "target"),
    [("mobilenet", "onnxruntime"), ("hand_encoder", "null"), ("unet", "onnxruntime"), ("lstm", "onnxruntime"),
     ("outputs", "null")],
)  # fmt: skip
def test_every_float_operator_has_a_reason_and_the_record_is_faithful(name: str, target: str) -> None:
    model, example = build(name, 4)
    data = tuple(example.values()) if isinstance(example, dict) else example
    prepared = prepare(model, [data], target)
    for node in prepared.work.nodes():
        value, todo = node.meta.get("val"), prepared.plan.node(prepared.work.name(node))
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            ways = (todo.kernel is not None) + (todo.reason is not None) + (todo.absorbed_by is not None)
            assert ways == 1, f"{prepared.work.name(node)}: {todo}"
    assert Plan.from_record(prepared.plan.to_record()).to_record() == prepared.plan.to_record()


def test_no_integer_dot_product_narrows_weights() -> None:
    from bitport.targets.onnxruntime import OnnxRuntime

    class Narrow(OnnxRuntime):
        def rules(self) -> Any:
            return replace(super().rules(), weight_limit=63)

    prepared = planned(chain(), target=Narrow())
    fmt = prepared.plan.ties["a.weight"].format
    assert (fmt.low, fmt.high) == (-63, 63)
    assert_exact(ship(prepared, images(8)))


@pytest.mark.parametrize(("position", "name"), [("first", "a"), ("last", "c")])
def test_the_first_and_the_last_layer_can_be_named_by_position(position: Any, name: str) -> None:
    model = Net(lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))), a=conv(), b=conv(8, 8), c=conv(8, 4))
    prepared = prepare(
        model, [images(4)], overrides=[Override(position=position, weights={"format": "float32"})]
    )
    floats = [n for n in "abc" if prepared.plan.node(n).kernel is None]
    assert floats == [name]
    assert prepared.plan.node(name).reason == "kept in float by the recipe"
