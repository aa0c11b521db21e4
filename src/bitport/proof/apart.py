"""Where two artifacts of one network part: what each layer gives in both, beside the float network's values.

    first, second:  SQNR of a layer's simulated values against those of the float network          dB
    apart:          SQNR of the second artifact's values against the first one's                   dB

The simulator of each artifact has its runtime's arithmetic, so what two runtimes round otherwise is seen as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import ArtifactError
from ..graph import Edge
from ..graph.reading import producer_name
from ..numerics.error import finite, sqnr_db
from ..plan.options import WITH_WEIGHTS
from ..records import absent
from ..simulate import Simulator
from .measure import Subject

ALIKE = 60.0  # dB from which on float values are the same, but for the order of sums
MATTERS = 1.0  # dB that a layer has to lose to be called the worst
EQUAL = 200.0  # dB that stand for no difference
SIDES = ("first", "second")


def apart(first: Subject, second: Subject, inputs: Sequence[Tensor]) -> dict[str, Any]:
    """Layers of both, in the network's order, and the one at which the second loses most against the first.

    Raises ArtifactError where they aren't of one network: inputs or layers differ.
    """
    subjects = dict(zip(SIDES, (first, second), strict=True))
    specs = [[(spec.name, spec.dtype, len(spec.shape)) for spec in s.graph.inputs] for s in (first, second)]
    if specs[0] != specs[1]:
        raise ArtifactError("the artifacts are of different networks: their inputs differ")
    reals = {side: _float_values(subject, inputs) for side, subject in subjects.items()}
    found = {side: _simulated(subject, inputs) for side, subject in subjects.items()}
    layers = [
        _layer(
            name,
            subjects,
            {side: reals[side][name] for side in SIDES},
            {side: found[side][name] for side in SIDES},
        )
        for name in found["first"]
        if all(name in reals[side] and name in found[side] for side in SIDES)
        if reals["first"][name].shape == reals["second"][name].shape
    ]
    if not layers:
        raise ArtifactError("the artifacts are of different networks: no layer of one is in the other")
    return {
        "layers": layers,
        "worst": _worst(layers),
        "samples": len(inputs[0]) if inputs and inputs[0].dim() else 1,
    }


def _layer(
    name: str, subjects: Mapping[str, Subject], reals: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> dict[str, Any]:
    record: dict[str, Any] = {
        "name": name,
        "op": subjects["first"].graph.op(subjects["first"].graph.node(name)).kind,
    }
    for side in SIDES:
        record[side] = {
            "sqnr_db": finite(_db(reals[side], found[side])),
            **_formats(subjects[side], name),
        }
    if _db(reals["first"], reals["second"]) >= ALIKE:
        record["apart_db"] = finite(_db(found["first"], found["second"]))
    else:
        absent(record, "apart_db", "scales were moved or turned there in one of them: its values are others")
    return record


def _worst(layers: Sequence[Mapping[str, Any]]) -> str | None:
    """The layer at which the second falls back most against the first, beyond what it has lost before."""
    worst, most, behind = None, MATTERS, 0.0
    for layer in layers:
        before, after = (layer[side]["sqnr_db"] for side in SIDES)
        gap = 0.0 if after is None else (EQUAL if before is None else before) - after
        if gap - behind > most:
            worst, most = str(layer["name"]), gap - behind
        behind = max(behind, gap)
    return worst


def _db(reference: Tensor, value: Tensor) -> float:
    """SQNR over what is finite in both: masks hold infinities."""
    where = torch.isfinite(reference) & torch.isfinite(value)
    return sqnr_db(reference[where], value[where])


def _formats(subject: Subject, name: str) -> dict[str, str | None]:
    """What the plan stores a layer's weights (None: it has none) and its result in."""
    graph, plan = subject.graph, subject.plan
    node = graph.node(name)
    weight = graph.op(node).operands[1] if graph.op(node).kind in WITH_WEIGHTS else None
    stored = None
    if weight is not None:
        tie = plan.edges.get(Edge(producer_name(graph, weight), name, 1))
        stored = str(plan.ties[tie].format) if tie is not None else "float32"
    tie = plan.tie_of(plan.node(name).absorbs or name)
    result = str(plan.ties[tie].format) if tie is not None else "float32"
    return {"weights": stored, "result": result}


def _heads(subject: Subject) -> dict[fx.Node, str]:
    """The operators whose values count → whose layer's they are: a ReLU that was absorbed gives its layer's."""
    graph, found = subject.graph, {}
    for node in graph.nodes():
        name = graph.name(node)
        todo = subject.plan.node(name)
        if todo.absorbs is None:
            found[node] = todo.absorbed_by or name
    return found


def _simulated(subject: Subject, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    run = Simulator(subject.graph, subject.plan, subject.target.arithmetic()).begin(inputs)
    heads, found = _heads(subject), {}
    with torch.no_grad():
        for node in subject.graph.gm.graph.nodes:
            if node.op == "output":
                break
            run.step(node)
            if node in heads and node.users:
                value = run.value(node)
                if isinstance(value, Tensor) and value.is_floating_point():
                    found[heads[node]] = value
    return found


def _float_values(subject: Subject, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    graph = subject.counterpart
    names = {subject.graph.name(node): name for node, name in _heads(subject).items()}
    found: dict[str, Tensor] = {}

    def keep(node: fx.Node, value: object) -> None:
        name = names.get(graph.name(node))
        if name is not None and isinstance(value, Tensor) and value.is_floating_point():
            found[name] = value

    with torch.no_grad():
        graph.run(*inputs, on_value=keep)
    return found
