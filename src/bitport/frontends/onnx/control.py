"""If, Loop and Scan: what they come to, where shapes and constants decide how often, and which way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from ._calls import Call, Value, is_known, operator, tensor

MOST = 1024  # iterations of all loops of a network: each is written out, so that more would be no network to work with
REMEDY = "export the network with torch.onnx.export(..., dynamo=True), which writes out what branches and loops come to"


class Body(Protocol):
    """A node's own graph. captured: so many of its inputs, the last ones, are values of the graph around it."""

    captured: int

    def run(self, values: Sequence[Value]) -> list[Value]: ...


Bodies = Mapping[str, Body]


class Budget:
    """The iterations that are left to a network's loops."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        self.left = MOST

    def spend(self, call: Call) -> None:
        self.left -= 1
        if self.left < 0:
            call.refuse(f"the network's loops go on for more than {MOST} iterations")


def reachable(call: Call, bodies: Mapping[str, Any], known: Mapping[int, Value]) -> Mapping[str, Any]:
    """Those of a node's graphs that can run."""
    if call.kind != "If" or 0 not in known:
        return bodies
    name = branch(call, known[0])
    return {name: bodies[name]}


def branch(call: Call, condition: Value) -> str:
    """The name of the graph that an If runs."""
    return "then_branch" if holds(call, condition) else "else_branch"


def holds(call: Call, condition: Value) -> bool:
    """The value of a condition that needn't be given."""
    if condition is None:
        return True
    if not is_known(condition):
        call.refuse(
            f"its condition depends on data; only what shapes and constants give can be taken: {REMEDY}"
        )
    return bool(np.asarray(condition).all())


@operator("If", controls=True)
def choice(call: Call, bodies: Bodies, budget: Budget, condition: Value, *captured: Value) -> Any:
    """The branch that is taken."""
    return bodies[branch(call, condition)].run(captured)


@operator("Loop", controls=True)
def loop(call: Call, bodies: Bodies, budget: Budget, *values: Value) -> Any:
    """Iteration after iteration: loop-carried values, then what each adds to a stack."""
    body = bodies["body"]
    count = len(values) - 2 - body.captured
    trips, condition, carried, captured = values[0], values[1], values[2 : 2 + count], values[2 + count :]
    trip_count = None if trips is None else int(call.number(trips, "iterations"))
    stacks: list[list[Value]] = []
    at = 0
    while (trip_count is None or at < trip_count) and holds(call, condition):
        budget.spend(call)
        started = np.array(True) if condition is None else condition
        given = body.run([np.array(at, np.int64), started, *carried, *captured])
        condition, carried = given[0], tuple(given[1 : 1 + count])
        stacks.append(given[1 + count :])
        at += 1
    return [*carried, *_stacked(call, stacks, [0] * (call.outputs - count))]


@operator("Scan", controls=True)
def scan(call: Call, bodies: Bodies, budget: Budget, *values: Value) -> Any:
    """A loop over slices of inputs; what each iteration gives is put together again."""
    if call.opset < 9:
        call.refuse("its form of opset 8, with lengths of sequences")
    body, scanned = bodies["body"], int(call.attr("num_scan_inputs"))
    first = len(values) - body.captured - scanned
    states, inputs, captured = values[:first], values[first : first + scanned], values[first + scanned :]
    results = call.outputs - first
    axes = call.sides("scan_input_axes", scanned, 0)
    turned = call.sides("scan_input_directions", scanned, 0)
    rows = [tensor(value).movedim(axis, 0) for value, axis in zip(inputs, axes, strict=True)]
    stacks: list[list[Value]] = []
    for at in range(len(rows[0])):
        budget.spend(call)
        read = [row[len(row) - 1 - at if back else at] for row, back in zip(rows, turned, strict=True)]
        given = body.run([*states, *read, *captured])
        states = tuple(given[:first])
        stacks.append(given[first:])
    ends = call.sides("scan_output_axes", results, 0)
    found = _stacked(call, stacks, ends)
    backwards = call.sides("scan_output_directions", results, 0)
    return [
        *states,
        *(part.flip(axis) if back else part for part, axis, back in zip(found, ends, backwards, strict=True)),
    ]


def _stacked(call: Call, stacks: Sequence[Sequence[Value]], axes: Sequence[int]) -> list[Value]:
    if axes and not stacks:
        call.refuse("it has no iterations, so that nothing tells the shape of what it gives")
    return [torch.stack([tensor(given[place]) for given in stacks], axis) for place, axis in enumerate(axes)]
