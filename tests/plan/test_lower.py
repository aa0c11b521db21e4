"""A lowered graph, run by plain torch, computes what the simulator computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.flow import Net, Prepared, conv, flat, images, prepare, tokens
from tests.nets import build
from torch import nn
from torch.nn import functional as F

from bitport.plan import Lowered, lower
from bitport.plan.capture import capture
from bitport.plan.ops import DEQUANTIZE, QUANTIZE
from bitport.recipe.model import Override
from bitport.simulate import Arithmetic, Simulator


def steps(prepared: Prepared, lowered: Lowered, inputs: Any, offset: int) -> int:
    """The largest difference in steps over all integer tensors, each run end to end."""
    program = capture(lowered, prepared.work)
    simulated: dict[str, torch.Tensor] = {}

    def keep(name: str, q: torch.Tensor) -> torch.Tensor:
        return simulated.setdefault(name, q)

    expected = Simulator(prepared.work, prepared.plan, Arithmetic()).run(flat(inputs), tap=keep)
    with torch.no_grad():
        found = program.module()(*flat(inputs))
        values = _integers(lowered, flat(inputs))
    worst = 0
    for name, ours in simulated.items():
        if name in values:
            worst = max(worst, int((ours.flatten() - (values[name].flatten().int() - offset)).abs().max()))
    for ours, theirs in zip(expected, found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.2, atol=0.2)
    assert set(lowered.quantized) <= set(simulated)
    return worst


def _integers(lowered: Lowered, inputs: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            if n.target is QUANTIZE:
                name = n.meta["nn_module_stack"][""][0]
                if name.endswith("/q"):
                    found[name.removesuffix("/q")] = value
            return value

    Watch(lowered.module).run(*inputs)
    return found


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "hand_encoder", "decoder_1e4"])
def test_the_lowered_graph_equals_the_simulator(name: str) -> None:
    model, example = build(name, 4)
    prepared = prepare(model, [example])
    for options in (
        {},
        {"dtype": torch.uint8, "offset": 128, "flatten_linear": True, "detours": frozenset({"max_pool"})},
    ):
        lowered = lower(prepared.work, prepared.plan, **options)
        assert steps(prepared, lowered, example, options.get("offset", 0)) <= 1
        ties = {prepared.plan.tie_of(producer) for producer in lowered.quantized}
        assert None not in ties and len(set(lowered.quantized)) == len(lowered.quantized)


@pytest.mark.parametrize(
    "weights", [{"granularity": "tensor"}, {"format": "int8n"}, {"format": "int8", "range": "mse"}]
)
def test_other_weight_formats(weights: dict[str, str]) -> None:
    net = Net(lambda m, x: m.b(F.relu(m.a(x))), a=conv(bias=False), b=conv(8, 4))
    prepared = prepare(net, [images(8)], weights=weights)
    assert steps(prepared, lower(prepared.work, prepared.plan), images(4), 0) <= 1


def test_narrow_formats_saturate_at_their_own_ends() -> None:
    net = Net(lambda m, x: m.b(F.relu(m.a(x))), a=conv(), b=conv(8, 4))
    narrow = {"format": "int4", "elsewhere": "int4"}
    prepared = prepare(net, [images(8)], "null", weights={"format": "int4"}, activations=narrow)
    seen: list[torch.Tensor] = []
    prepared.simulator().run((100 * images(4),), tap=lambda name, q: seen.append(q) or q)
    assert min(int(q.min()) for q in seen) == -8 and max(int(q.max()) for q in seen) == 7
    q = prepared.simulator().constant("a.weight", "a.weight")
    assert int(q.q.abs().max()) <= 8 and q.scale.shape == (8,)
    assert steps(prepared, lower(prepared.work, prepared.plan), images(4), 0) <= 1


def test_linear_above_two_dimensions_is_flattened_with_a_bias_of_zeros() -> None:
    net = Net(lambda m, x: m.b(F.relu(m.a(x))), a=nn.Linear(12, 8, bias=False), b=nn.Linear(8, 4, bias=False))
    prepared = prepare(net, [tokens(8)])
    lowered = lower(prepared.work, prepared.plan, flatten_linear=True)
    linears = [n for n in lowered.module.graph.nodes if n.target is torch.ops.aten.linear.default]
    assert len(linears) == 2 and all(n.args[2] is not None for n in linears)
    assert steps(prepared, lowered, tokens(4), 0) <= 1
    plain = lower(prepared.work, prepared.plan)
    assert all(
        n.args[2] is None for n in plain.module.graph.nodes if n.target is torch.ops.aten.linear.default
    )


def test_every_dequantize_has_one_reader_and_absorbed_relus_are_gone() -> None:
    net = Net(lambda m, x: (lambda y: m.b(y) + m.c(y))(F.relu(m.a(x))), a=conv(), b=conv(8, 4), c=conv(8, 4))
    prepared = prepare(net, [images(8)])
    lowered = lower(prepared.work, prepared.plan)
    targets = [node.target for node in lowered.module.graph.nodes]
    assert torch.ops.aten.relu.default not in targets
    assert not [t for t in targets if isinstance(t, str) and t.startswith("m")], "no float module is left"
    for node in lowered.module.graph.nodes:
        if node.target is DEQUANTIZE:
            assert len(node.users) == 1


@pytest.mark.parametrize("kind", ["sigmoid", "matmul", "add"])
def test_a_barrier_keeps_a_float_operator_from_its_neighbours(kind: str) -> None:
    between: dict[str, Any] = {
        "sigmoid": lambda a, b: a.sigmoid(),
        "matmul": lambda a, b: a @ b,
        "add": lambda a, b: a + b,
    }
    net = Net(lambda m, x: m.c(between[kind](m.a(x), m.b(x))), a=conv(), b=conv(), c=conv(8, 4))
    keep = [Override(op=kind, activations={"format": "float32"})]
    prepared = prepare(net, [images(8)], overrides=keep)
    bare = lower(prepared.work, prepared.plan)
    guarded = lower(prepared.work, prepared.plan, barriers=frozenset({kind}))
    maximum = torch.ops.aten.maximum.default
    assert maximum not in [n.target for n in bare.module.graph.nodes]
    assert maximum in [n.target for n in guarded.module.graph.nodes]
    x = images(4)
    with torch.no_grad():
        assert torch.equal(bare.module(x)[0], guarded.module(x)[0]), "a barrier changes no value"


@pytest.mark.parametrize(
    "weights", [{"format": "nf4", "granularity": "group", "group": 16}, {"format": "int3"}]
)
def test_a_weight_that_is_computed_from_constants_is_stored_narrow(weights: dict[str, Any]) -> None:
    # it becomes a constant that the graph fetches by name, not a parameter of a module
    net = Net(
        lambda m, x: F.linear(x, m.a.weight / m.a.weight.norm(dim=1, keepdim=True), m.a.bias),
        a=nn.Linear(12, 8),
    )
    x = torch.randn(6, 12, generator=torch.Generator().manual_seed(0))
    prepared = prepare(net, [x], weights=weights, activations={"format": "float32"})
    (name,) = [name for name, node in prepared.plan.nodes.items() if node.mode == "weights"]
    lowered = lower(prepared.work, prepared.plan)
    with torch.no_grad():
        found, simulated = lowered.module(x)[0], prepared.simulator().run((x,))[0]
    torch.testing.assert_close(found, simulated)
    assert float((found - net(x)).detach().abs().max()) > 1e-3, f"{name} was not rounded"


def test_a_module_called_twice_is_stored_once() -> None:
    from bitport.plan import Plan

    net = Net(lambda m, x: m.b(m.a(m.a(x))), a=conv(3, 3), b=conv(3, 4))
    prepared = prepare(net, [images(4)])
    lowered = lower(prepared.graph, Plan.empty("onnxruntime"))
    assert len(list(lowered.module.children())) == 2
    x = images(3)
    with torch.no_grad():
        torch.testing.assert_close(lowered.module(x)[0], net(x))
