"""Who is to blame for the final loss: the error of the network's outputs when one operator alone is rounded.

    error(u) = mean over float outputs of  Σ (y − y_u)² / Σ y²        y float, y_u with unit u alone rounded
    share(u) = error(u) / Σ error

Errors of rounding are small and hardly correlated, so those of the units add up to that of the whole network. A
layer's own SQNR doesn't tell this: an error that the network averages away costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import DataError
from ..graph import Edge, Graph
from ..graph.beside import names_beside
from ..graph.reading import constant_names, placeholders
from ..numerics.error import ErrorStats
from ..plan import Plan
from ..plan.model import LOCAL
from ..records import absent
from ..simulate import Arithmetic, Simulator

WEIGHTS, RESULT = "weights", "result"
BOTH = (WEIGHTS, RESULT)
PASSES = 256  # samples that `record_shares` simulates at most, over all units: as many as parity does
SAMPLES = 16  # of them per unit at most
_MOVES = ("move", "scaled")


@dataclass(frozen=True)
class Unit:
    """What is rounded together: an operator with the ReLU that it absorbed, or an input.

    Attributes:
        name: of the operator or input. op: its kind, "input" for an input. head: whose value leaves it.
        weights: edges of its constants, and of what it rounds for itself while running. result: edges that carry what
            leaves it as integers.
    """

    name: str
    op: str
    head: str
    weights: tuple[Edge, ...]
    result: tuple[Edge, ...]

    def edges(self, parts: Sequence[str] = BOTH) -> tuple[Edge, ...]:
        return (*(self.weights if WEIGHTS in parts else ()), *(self.result if RESULT in parts else ()))


def units(graph: Graph, plan: Plan) -> list[Unit]:
    """Everything that a plan rounds, in network order. Moves round nothing."""
    constants = constant_names(graph)
    own: dict[str, list[Edge]] = {}
    leaving: dict[str, list[Edge]] = {}
    for edge, tie in plan.edges.items():
        if edge.producer in constants or plan.ties[tie].source in LOCAL:
            own.setdefault(edge.consumer, []).append(edge)
        else:
            leaving.setdefault(edge.producer, []).append(edge)
    found = []
    for node in [*placeholders(graph), *graph.nodes()]:
        name = graph.name(node)
        todo = plan.node(name)
        if todo.absorbed_by is not None:
            continue
        head = todo.absorbs or name
        result = () if todo.role in _MOVES else tuple(leaving.get(head, ()))
        unit = Unit(
            name,
            "input" if node.op == "placeholder" else graph.op(node).kind,
            head,
            tuple(own.get(name, ())),
            result,
        )
        if unit.edges():
            found.append(unit)
    return found


def only(plan: Plan, unit: Unit, parts: Sequence[str] = BOTH) -> Plan:
    """The plan that rounds nothing but a unit. Its operators compute in float on what is rounded."""
    todo = plan.node(unit.name)
    # a kernel on floats rounds what it reads itself; the others would want integers of their producers
    nodes = {unit.name: todo} if todo.mode is not None and WEIGHTS in parts else {}
    return Plan(plan.target, {edge: plan.edges[edge] for edge in unit.edges(parts)}, plan.ties, nodes)


class Blame:
    """Errors of units on a few samples.

    Args:
        reference: the float network, folded, its scales moved as in the plan, nothing rounded.
        graph, plan: the compressed network.
        batches: inputs, as `take` gives them.

    Raises DataError where no output is a float tensor with a signal.
    """

    def __init__(
        self,
        reference: Graph,
        graph: Graph,
        plan: Plan,
        arithmetic: Arithmetic,
        batches: Sequence[Sequence[Tensor]],
    ) -> None:
        self.graph, self.plan, self.arithmetic, self.batches = graph, plan, arithmetic, batches
        self._mixed = reference.clone()  # its own weights, but for those of the unit that is looked at
        self._constants = constant_names(graph)
        floats = Simulator(self._mixed, Plan.empty(plan.target), arithmetic)
        self.floats = [floats.run(inputs) for inputs in batches]

    def error(self, unit: Unit, parts: Sequence[str] = BOTH) -> float:
        """`error(u)` of the legend; infinite where an output isn't finite."""
        names = [edge.producer for edge in unit.edges(parts) if edge.producer in self._constants]
        if unit.name in self.plan.low_rank and WEIGHTS in parts:
            names += names_beside(unit.name).tensors  # zeros until now
        before = {name: self._mixed.tensor(name).detach().clone() for name in names}
        try:
            for name in names:
                self._mixed.set_tensor(name, self.graph.tensor(name).detach().clone())
            simulator = Simulator(self._mixed, only(self.plan, unit, parts), self.arithmetic)
            return relative_error(self.floats, (simulator.run(inputs) for inputs in self.batches))
        finally:
            for name, value in before.items():
                self._mixed.set_tensor(name, value)


def relative_error(wanted: Iterable[Sequence[Tensor]], found: Iterable[Sequence[Tensor]]) -> float:
    """Mean over the float outputs of Σ (wanted − found)² / Σ wanted², batches one after the other.

    Each output counts alike, whatever its scale; one without a signal isn't counted. Infinite where the error isn't
    a finite number. Raises DataError where no output counts.
    """
    stats: dict[int, ErrorStats] = {}
    for real, rounded in zip(wanted, found, strict=True):
        for index, (ours, theirs) in enumerate(zip(real, rounded, strict=True)):
            if ours.is_floating_point():
                stats.setdefault(index, ErrorStats()).update(ours, theirs)
    errors = [one.noise / one.signal for one in stats.values() if one.signal > 0]
    if not errors:
        raise DataError("no output of the float network is a float tensor with other values than 0")
    mean = sum(errors) / len(errors)
    return mean if math.isfinite(mean) else math.inf


def shares(errors: Mapping[str, float]) -> dict[str, float]:
    """Each unit's part of the sum of errors, 0–1; infinite ones share it among themselves."""
    infinite = sum(math.isinf(error) for error in errors.values())
    if infinite:
        return {name: (1.0 / infinite if math.isinf(error) else 0.0) for name, error in errors.items()}
    total = sum(errors.values())
    return {name: error / total if total else 0.0 for name, error in errors.items()}


def take(graph: Graph, batches: Iterable[Sequence[Tensor]], samples: int) -> list[tuple[Tensor, ...]]:
    """The first `samples` samples, in their batches; of a network with a fixed batch whole batches, at least one."""
    found: list[tuple[Tensor, ...]] = []
    seen = 0
    for inputs in batches:
        left = samples - seen
        few = tuple(
            value[:left] if spec.shape and isinstance(spec.shape[0], str) else value
            for spec, value in zip(graph.inputs, inputs, strict=True)
        )
        found.append(few)
        seen += count(few)
        if seen >= samples:
            break
    return found


def halves(
    graph: Graph, batches: Sequence[tuple[Tensor, ...]]
) -> tuple[list[tuple[Tensor, ...]], list[tuple[Tensor, ...]]]:
    """Every second sample each; whole batches in turn where they can't be cut."""
    cut = [bool(spec.shape) and isinstance(spec.shape[0], str) for spec in graph.inputs]
    choose: list[tuple[Tensor, ...]] = []
    confirm: list[tuple[Tensor, ...]] = []
    for inputs in batches:
        if any(cut) and count(inputs) > 1:
            for offset, half in ((0, choose), (1, confirm)):
                parts = (v[offset::2].contiguous() if c else v for v, c in zip(inputs, cut, strict=True))
                half.append(tuple(parts))
        else:
            (choose if len(choose) <= len(confirm) else confirm).append(inputs)
    return choose, confirm


def count(inputs: Sequence[Tensor]) -> int:
    """Samples of a batch."""
    return len(inputs[0]) if inputs and inputs[0].dim() else 1


def record_shares(
    rows: Sequence[dict[str, Any]],
    reference: Graph,
    graph: Graph,
    plan: Plan,
    arithmetic: Arithmetic,
    batches: Iterable[Sequence[Tensor]],
) -> None:
    """Set `loss_share` of each row of `layers`: null with a reason where it has none or all would take too long.

    At most `PASSES` samples are simulated over all units, so that the cost is bounded by that of parity, and the same
    on every machine.
    """
    every = units(graph, plan)
    few = take(graph, batches, min(SAMPLES, PASSES // max(1, len(every))))
    passes = len(every) * sum(count(inputs) for inputs in few)
    reason, found = None, dict[str, float]()
    if len(every) > PASSES or passes > PASSES:
        reason = f"{len(every)} layers, each alone, are more than {PASSES} passes: `bitport doctor` tells it"
    else:
        try:
            blame = Blame(reference, graph, plan, arithmetic, few)
            found = shares({unit.name: blame.error(unit) for unit in every})
        except DataError as error:
            reason = str(error)
    for row in rows:
        if row["name"] in found:
            row["loss_share"] = found[row["name"]]
        else:
            absent(row, "loss_share", reason or "nothing of it is rounded")
