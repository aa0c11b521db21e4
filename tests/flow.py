"""Load → fold → quantize → calibrate → export → compare, for tests on little networks."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitport.artifact import make_target
from bitport.data import Source
from bitport.frontends.pytorch import load_module
from bitport.graph import Graph
from bitport.plan import Plan
from bitport.plan.constants import on_grid
from bitport.proof.parity import Parity
from bitport.recipe.model import Override
from bitport.simulate import Simulator
from bitport.steps._base import Context, make
from bitport.targets._base import Inspection, Target

Inputs = Tensor | tuple[Tensor, ...]


class Net(nn.Module):
    """Layers and buffers by name, and a function that connects them: `Net(lambda m, x: m.a(x), a=nn.Linear(2, 3))`."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, Tensor):
                self.register_buffer(name, part)
            else:
                self.add_module(name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class Net2(Net):
    """The same with a second input."""

    def forward(self, x: Tensor, other: Tensor) -> Any:  # type: ignore[override]
        return self.function(self, x, other)


def conv(inside: int = 3, outside: int = 8, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, kernel, padding=options.pop("padding", kernel // 2), **options)


def images(count: int, channels: int = 3, size: int = 8) -> Tensor:
    return torch.randn(count, channels, size, size)


def tokens(count: int) -> Tensor:
    return torch.randn(count, 6, 12)


def flat(inputs: Inputs) -> tuple[Tensor, ...]:
    return inputs if isinstance(inputs, tuple) else (inputs,)


@dataclass
class Prepared:
    """A planned network: `graph` as loaded, `reference` folded, `work` folded with its weights on the grid."""

    graph: Graph
    reference: Graph
    work: Graph
    plan: Plan
    target: Target

    def simulator(self) -> Simulator:
        return Simulator(self.work, self.plan, self.target.arithmetic())

    def kind(self, name: str) -> str:
        return self.work.op(self.work.node(name)).kind

    def tie(self, producer: str) -> str:
        tie = self.plan.tie_of(producer)
        assert tie is not None, f"{producer} leaves no integers"
        return tie

    def real_error(self, inputs: Inputs) -> float:
        """‖simulated − float‖ / ‖float‖ over all float outputs."""
        with torch.no_grad():
            real, found = self.graph.run(*flat(inputs)), self.simulator().run(flat(inputs))
        pairs = [(a, b) for a, b in zip(real, found, strict=True) if a.is_floating_point()]
        return max(float((a - b).norm() / a.norm().clamp(min=1e-12)) for a, b in pairs)


def context(
    graph: Graph, target: Target, batches: Sequence[Inputs], overrides: Sequence[Override] = ()
) -> Context:
    names = [spec.name for spec in graph.inputs]
    data = [dict(zip(names, flat(batch), strict=True)) for batch in batches]
    return Context(
        rules=target.rules(),
        arithmetic=target.arithmetic(),
        calibration=Source(data, role="calibration", names=names, labels="ignored"),
        reference=graph,
        overrides=overrides,
    )


def prepare(
    model: nn.Module | Graph,
    batches: Sequence[Inputs],
    target: str | Target = "onnxruntime",
    *,
    weights: Mapping[str, Any] | None = None,
    activations: Mapping[str, Any] | None = None,
    overrides: Sequence[Override] = (),
) -> Prepared:
    """Everything up to a calibrated plan. `batches`: calibration data, the first two samples are the example."""
    runtime = make_target(target) if isinstance(target, str) else target
    example = tuple(value[:2] for value in flat(batches[0]))
    graph = model if isinstance(model, Graph) else load_module(model.eval(), example)
    work, plan = graph.clone(), Plan.empty(runtime.name)
    settings = context(graph, runtime, batches, overrides)
    options = {"weights": dict(weights or {}), "activations": dict(activations or {})}
    for step, chosen in (("fold", {}), ("quantize", options), ("calibrate", {})):
        work, plan = make(step, chosen)(work, plan, settings)
    reference = work.clone()
    on_grid(work, plan)
    return Prepared(graph, reference, work, plan, runtime)


class Stepped:
    """A network with plain rounding, and with one step behind it.

    Attributes: plain, rounded; graph and plan, what the step made; found, with the weights on their grid; context;
    tried, all that was told.
    """

    def __init__(
        self,
        step: str,
        net: nn.Module,
        batches: Sequence[Any],
        target: str,
        options: Mapping[str, Any],
        **settings: Any,
    ) -> None:
        self.plain = prepare(net, batches, target, **settings)
        runtime = self.plain.target
        self.context = context(self.plain.graph, runtime, batches)
        start = self.plain.reference.clone()
        self.graph, self.plan = make(step, options)(start, self.plain.plan, self.context)
        work = self.graph.clone()
        on_grid(work, self.plan)
        self.found = Prepared(self.plain.graph, self.graph, work, self.plan, runtime)
        self.tried = self.context.tried


@dataclass
class Shipped:
    """What came of a prepared network on its runtime."""

    parity: Parity
    inspection: Inspection
    outputs: tuple[Tensor, ...]
    as_written: tuple[Tensor, ...]
    record: dict[str, Any]


def ship(prepared: Prepared, *batches: Inputs) -> Shipped:
    """Export, inspect, run on `batches` with taps, as written and optimized."""
    target, plan = prepared.target, prepared.plan
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        target.export(prepared.work, plan, folder)
        inspection = target.inspect(folder, plan)
        with target.watchable(prepared.work, plan, folder) as shown:
            parity = Parity(prepared.reference, plan, prepared.simulator(), target.open(shown, taps=True))
            for batch in batches:
                parity.update(flat(batch))
        outputs = target.open(folder).run(flat(batches[0]))
        as_written = target.open(folder, optimize=False).run(flat(batches[0]))
    return Shipped(parity, inspection, outputs, as_written, parity.record())


def assert_exact(shipped: Shipped) -> None:
    """Every integer of every quantized tensor equal, layer-local and end to end, in the kernels planned."""
    record = shipped.record
    assert not shipped.inspection.missed, shipped.inspection.missed
    assert record["integers"] > 0
    assert record["exact_share"] == 1.0 and record["max_steps"] == 0, record
