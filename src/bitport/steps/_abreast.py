"""Float and simulated network side by side on the calibration data, operator by operator, with weights that change.

What a step learns of a layer it learns on the inputs that the layers before it will really give, and the data goes
through both networks once. Alive are the values that somebody still reads, of every batch: where they are large, fewer
batches go through.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import Graph, Op
from ..numerics.hessian import patches, spread_evenly
from ..plan import Plan
from ..simulate import Arithmetic, Run, Simulator
from ._judge import Inputs, has_batches

MOST = 2**30  # bytes of activations that are alive at once, about
FEW = 2  # samples that tell how large activations are, of a batch of more
ALIVE = 6  # of the largest activation: an operator's operands and result, in both networks


class Abreast:
    """Attributes: real, the float network; work, the copy whose weights may change; plan, the one in force;
    runs, the (float, simulated) run of every batch."""

    def __init__(
        self, real: Graph, graph: Graph, plan: Plan, arithmetic: Arithmetic, batches: Sequence[Inputs]
    ) -> None:
        self.real, self.work, self.plan = real, graph.clone(sharing=True), plan
        self._simulator = Simulator(self.work, plan, arithmetic)
        floats = Simulator(real, Plan.empty(plan.target), Arithmetic())
        self.runs: list[tuple[Run, Run]] = [
            (floats.begin(batch), self._simulator.begin(batch)) for batch in affordable(real, batches)
        ]

    def walk(self) -> Iterator[tuple[fx.Node, fx.Node]]:
        """(float node, its copy) in the network's order, the copy before it runs; the output isn't among them.

        What the float node gives is known, and what it reads is still there.
        """
        for real, node in zip(self.real.gm.graph.nodes, self.work.gm.graph.nodes, strict=True):
            if node.op == "output":
                return
            with torch.no_grad():
                for float_run, _ in self.runs:
                    float_run.compute(real)
            yield real, node
            with torch.no_grad():
                for float_run, run in self.runs:
                    float_run.drop(real)
                    run.step(node)

    def change(self, plan: Plan) -> None:
        """Go on with another plan, and with the weights of `work` as they are now."""
        self.plan = plan
        self._simulator.change(plan)


def affordable(graph: Graph, batches: Sequence[Inputs]) -> list[Inputs]:
    """As many of the batches, evenly spread, as may be alive in two networks at once; one at least."""
    largest, inputs, times = 0, batches[0], 1
    if has_batches(graph) and len(inputs[0]) > FEW:
        inputs, times = tuple(x[:FEW] for x in inputs), -(-len(inputs[0]) // FEW)

    def look(node: fx.Node, value: object) -> None:
        nonlocal largest
        if isinstance(value, Tensor):
            largest = max(largest, value.numel() * value.element_size())

    with torch.no_grad():
        graph.run(*inputs, on_value=look)
    count = max(1, MOST // max(1, ALIVE * largest * times))
    return [batches[int(index)] for index in spread_evenly(len(batches), count)]


def has_rows(op: Op) -> bool:
    """Whether a layer multiplies plain windows of what it reads, which `rows_of` takes."""
    zeros = op.attrs.get("padding_mode", "zeros") == "zeros"
    return zeros and isinstance(op.attrs.get("padding", ()), Sequence)


def results_of(y: Tensor, kernel: tuple[int, ...], most: int) -> Tensor:
    """What a layer makes of the rows that `rows_of` takes: [P, C], of its output."""
    flat = y.movedim(1, -1) if kernel else y
    flat = flat.reshape(-1, flat.shape[-1])
    return _some(flat, most)


def _some(flat: Tensor, most: int) -> Tensor:
    return flat if len(flat) <= most else flat.index_select(0, spread_evenly(len(flat), most))


def rows_of(x: Tensor, attrs: Mapping[str, Any], kernel: tuple[int, ...], most: int) -> Iterator[Tensor]:
    """What a layer multiplies its weights by, some at a time: [P, B, K], P of `most` at most in all.

    `kernel` is empty for a Linear.
    """
    if not kernel:
        yield _some(x.reshape(-1, 1, x.shape[-1]), most)
        return
    stride, padding, dilation = (tuple(attrs[key]) for key in ("stride", "padding", "dilation"))
    yield from patches(x, kernel, stride, padding, dilation, attrs["groups"], most)
