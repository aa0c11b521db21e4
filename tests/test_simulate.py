"""The simulator's own behaviour; that it equals a runtime is tested in targets/ and proof/."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from tests.flow import Net, context, conv, images, prepare
from tests.nets import build
from torch import Tensor
from torch.nn import functional as F

from bitport.plan import Plan
from bitport.simulate import Arithmetic, Simulator
from bitport.steps.calibrate import observe


def test_an_empty_plan_is_the_float_network() -> None:
    model, example = build("hand_encoder", 3)
    prepared = prepare(model, [example])
    with torch.no_grad():
        expected = prepared.graph.run(example)
    found = Simulator(prepared.graph, Plan.empty("null"), Arithmetic()).run((example,))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_a_tap_sees_each_quantized_tensor_once_and_may_replace_it() -> None:
    net = Net(lambda m, x: m.b(F.relu(m.a(x))), a=conv(), b=conv(8, 4))
    prepared = prepare(net, [images(8)])
    x = images(4)
    seen: list[str] = []
    plain = prepared.simulator().run((x,), tap=lambda name, q: seen.append(name) or q)[0]
    assert seen == ["x", "relu", "b"]
    lowest = prepared.plan.ties["relu"].format.low

    def silence(name: str, q: Tensor) -> Tensor:
        return torch.full_like(q, lowest) if name == "relu" else q

    silenced = prepared.simulator().run((x,), tap=silence)[0]
    assert not torch.equal(plain, silenced)
    assert torch.equal(silenced, silenced[:1].expand_as(silenced)), "only the bias of the last one is left"


def test_a_targets_own_formula_is_used() -> None:
    net = Net(lambda m, x: m.b(F.relu(m.a(x))), a=conv(), b=conv(8, 4))
    prepared = prepare(net, [images(8)])
    kernels = prepared.target.arithmetic().kernels
    wrong = Arithmetic({**kernels, "conv": lambda call: kernels["conv"](call) + 1})
    x = images(4)
    right, off = (
        Simulator(prepared.work, prepared.plan, a).run((x,))[0] for a in (Arithmetic(kernels), wrong)
    )
    assert not torch.equal(right, off)


@pytest.mark.slow
def test_values_are_freed_after_their_last_reader() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        for _ in range(6):
            x = F.relu(m.a(x))
        return m.b(x)  # type: ignore[no-any-return]

    prepared = prepare(Net(forward, a=conv(3, 3), b=conv(3, 4)), [images(4)])
    alive: list[weakref.ref[Tensor]] = []
    peak = 0

    def watch(name: str, q: Tensor) -> Tensor:
        nonlocal peak
        alive.append(weakref.ref(q))
        gc.collect()
        peak = max(peak, sum(ref() is not None for ref in alive))
        return q

    prepared.simulator().run((images(4),), tap=watch)
    assert len(alive) == 8 and peak <= 3


def test_calibration_keeps_no_activations() -> None:
    model, example = build("resnet", 4)
    prepared = prepare(model, [example])
    alive: list[weakref.ref[Tensor]] = []
    peak = 0
    original = prepared.work.run

    def run(*inputs: Tensor, on_value: Any = None) -> Any:
        def watched(node: Any, value: Any) -> Any:
            nonlocal peak
            if isinstance(value, Tensor):
                alive.append(weakref.ref(value))
                peak = max(peak, sum(ref() is not None for ref in alive))
            return on_value(node, value)

        return original(*inputs, on_value=watched)

    prepared.work.run = run  # type: ignore[method-assign]
    batches = [images(4), images(4), images(4)]
    settings = context(prepared.graph, prepared.target, batches)
    histograms = observe(prepared.work, prepared.plan, settings)
    assert len(histograms) == len(prepared.plan.measured())
    gc.collect()
    assert sum(ref() is not None for ref in alive) == 0, "an activation outlived its calibration pass"
    assert peak <= 5, "more than a residual block's tensors were alive at once"


def test_rough_arithmetic_keeps_integers_and_moves_floats_by_a_last_bit() -> None:
    net = Net(lambda m, x: F.gelu(m.b(F.relu(m.a(x)))), a=conv(), b=conv(8, 4))
    prepared = prepare(net, [images(8)])
    exact = prepared.target.arithmetic()
    x = images(64)
    seen: list[dict[str, Tensor]] = []
    outputs = []
    for arithmetic in (exact, exact.rough()):
        taps: dict[str, Tensor] = {}
        simulator = Simulator(prepared.work, prepared.plan, arithmetic)
        outputs.append(simulator.run((x,), tap=lambda name, q, taps=taps: taps.setdefault(name, q))[0])
        seen.append(taps)
    assert exact.rough().kernels is exact.kernels and not exact.rough().floats
    integers = [name for name in seen[0] if name in ("x", "a", "b")]
    assert integers and all(torch.equal(seen[0][name], seen[1][name]) for name in integers)
    assert torch.allclose(*outputs, rtol=1e-5, atol=1e-6)
