"""Does the runtime compute what the simulator says? Counted in integer steps, over every quantized tensor.

*Layer-local*: each operator is simulated from the runtime's own integers, so what differs is this operator's
doing. *End to end*: the simulator runs alone. The float network runs beside them, so that a loss is attributed:
float → simulated is what quantization cost, simulated → runtime what the conversion cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import TargetError
from ..graph import Graph
from ..graph.beside import names_beside
from ..numerics.error import ErrorStats, finite
from ..plan import Plan
from ..plan.model import LOCAL
from ..records import absent
from ..simulate import Simulator
from ..targets._base import Session


@dataclass
class Steps:
    """Counts over integers. `worst` is the largest difference in steps."""

    integers: int = 0
    equal: int = 0
    worst: int = 0

    def update(self, expected: Tensor, found: Tensor) -> None:
        difference = (expected - found).abs()
        self.integers += difference.numel()
        self.equal += int((difference == 0).sum())
        if difference.numel():
            self.worst = max(self.worst, int(difference.max()))

    @property
    def exact_share(self) -> float:
        return self.equal / self.integers if self.integers else 1.0

    def record(self) -> dict[str, Any]:
        return {"exact_share": self.exact_share, "max_steps": self.worst, "integers": self.integers}


@dataclass
class LayerError:
    """One quantized tensor: steps layer-local and end to end, error against the float network."""

    local: Steps = field(default_factory=Steps)
    end_to_end: Steps = field(default_factory=Steps)
    simulated: ErrorStats = field(default_factory=ErrorStats)
    runtime: ErrorStats = field(default_factory=ErrorStats)


class Parity:
    """Accumulates over batches.

    Args:
        reference: the float network, folded, its scales moved as in the plan, nothing rounded.
        graph, plan: the compressed network.
        simulator: of `graph` and `plan` with the runtime's arithmetic.
        session: the runtime's, opened with taps.
    """

    def __init__(self, reference: Graph, plan: Plan, simulator: Simulator, session: Session) -> None:
        self.reference, self.plan, self.simulator, self.session = reference, plan, simulator, session
        self.layers: dict[str, LayerError] = {}
        self.outputs, self.watching = ErrorStats(), ErrorStats()
        self.float_max_error = 0.0
        self.samples = 0
        # operators that take and return floats: only their weights, or also what they read, are rounded
        self.on_floats = {name for name, node in plan.nodes.items() if node.mode is not None}
        # of a layer with a product beside it the sum counts, which is what its readers get
        self.layer_of = {name: name for name in self.on_floats - plan.low_rank.keys()}
        self.layer_of |= {names_beside(layer).sum: layer for layer in plan.low_rank}

    def update(self, inputs: Sequence[Tensor], unwatched: Sequence[Tensor] = ()) -> tuple[Tensor, ...]:
        """Compare one batch. Returns the simulator's own (end to end) outputs.

        unwatched: what the runtime gives where nothing is tapped; a tap may keep it from fusing what it fuses else.

        Raises TargetError when the runtime doesn't show a tensor that the plan quantizes.
        """
        outputs, taps = self.session.run_tapped(inputs)
        for plain, watched in zip(unwatched, outputs, strict=False):
            if plain.is_floating_point():
                self.watching.update(plain, watched)
        reals: dict[str, Tensor] = {}
        wanted = set(taps) | self.on_floats

        def keep(node: fx.Node, value: Any) -> None:
            name = self.reference.name(node)
            if name in wanted:
                reals[name] = value

        with torch.no_grad():
            self.reference.run(*inputs, on_value=keep)

        found: dict[str, tuple[Tensor, Tensor]] = {}

        def local(name: str, q: Tensor) -> Tensor:
            if name not in taps:
                raise TargetError(
                    f"the runtime's file has no quantized tensor for {name!r}, which the plan quantizes"
                )
            # a runtime may hold the rows of a tensor flattened: the same integers in the same order
            taps[name] = taps[name].reshape(q.shape)
            found[name] = (q, taps[name])
            return taps[name]

        simulated = self.simulator.run(inputs, tap=local, watch=self._watching(reals))
        exact = all(torch.equal(ours, theirs) for ours, theirs in found.values())
        for name, (ours, theirs) in found.items():
            self._layer(name).local.update(ours, theirs)
        if not exact:  # else the simulator has just gone the same way as it would alone
            simulated = self.simulator.run(inputs, tap=lambda name, q: _note(found, name, q))
        for name, (ours, theirs) in found.items():
            layer = self._layer(name)
            layer.end_to_end.update(ours, theirs)
            if name in reals:
                layer.simulated.update(reals[name], self._real(name, ours))
                layer.runtime.update(reals[name], self._real(name, theirs))
        for ours, theirs in zip(simulated, outputs, strict=True):
            if ours.is_floating_point() and ours.numel():
                self.float_max_error = max(self.float_max_error, float((ours - theirs).abs().max()))
                self.outputs.update(ours, theirs)
        self.samples += len(inputs[0]) if inputs and inputs[0].dim() else 1
        return simulated

    def _watching(self, reals: dict[str, Tensor]) -> Callable[[str, Tensor], None]:
        def look(name: str, value: Tensor) -> None:
            layer = self.layer_of.get(name)
            if layer is not None and layer in reals:
                self._layer(layer).simulated.update(reals[layer], value)

        return look

    def _layer(self, name: str) -> LayerError:
        return self.layers.setdefault(name, LayerError())

    def _real(self, name: str, q: Tensor) -> Tensor:
        tie = self.plan.tie_of(name)
        assert tie is not None
        scale, zero_point = self.plan.ties[tie].parameters()
        return (q - zero_point).float() * scale

    def record(self) -> dict[str, Any]:
        """The `parity` section of a measurement. `edges`: quantized edges that activations cross; `outputs_db`: the
        simulation's outputs against their distance from the runtime's, null where they are equal."""
        local, whole = Steps(), Steps()
        for layer in self.layers.values():
            for total, part in ((local, layer.local), (whole, layer.end_to_end)):
                total.integers += part.integers
                total.equal += part.equal
                total.worst = max(total.worst, part.worst)
        edges = sum(1 for tie in self.plan.edges.values() if self.plan.ties[tie].source not in LOCAL)
        exact: dict[str, Any] = {
            "exact_share": min(local.exact_share, whole.exact_share),
            "max_steps": local.worst,
        }
        if not local.integers:
            for key in tuple(exact):
                absent(exact, key, "no activation is stored as integers: only float outputs can be compared")
        return {
            **exact,
            "outputs_db": finite(self.outputs.sqnr_db),
            "watched_db": finite(self.watching.sqnr_db),
            "edges": edges,
            "tensors": len(self.layers),
            "samples": self.samples,
            "integers": local.integers,
            "local": local.record(),
            "end_to_end": whole.record(),
            "float_max_error": self.float_max_error,
        }


def _note(found: dict[str, tuple[Tensor, Tensor]], name: str, q: Tensor) -> Tensor:
    """Put what the simulator says alone beside the runtime's integers."""
    found[name] = (q, found[name][1])
    return q
