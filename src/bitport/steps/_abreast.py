"""Float and simulated network side by side on the calibration data, operator by operator, with weights that change.

What a step learns of a layer it learns on the inputs that the layers before it will really give, and the data goes
through both networks once. Alive are the values that somebody still reads, of every batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import fx

from ..graph import Graph
from ..plan import Plan
from ..simulate import Arithmetic, Run, Simulator
from ._judge import Inputs


class Abreast:
    """Attributes: graph, the float network; work, its copy whose weights may change; plan, the one in force;
    runs, the (float, simulated) run of every batch."""

    def __init__(self, graph: Graph, plan: Plan, arithmetic: Arithmetic, batches: Sequence[Inputs]) -> None:
        self.graph, self.work, self.plan = graph, graph.clone(), plan
        self._simulator = Simulator(self.work, plan, arithmetic)
        floats = Simulator(graph, Plan.empty(plan.target), Arithmetic())
        self.runs: list[tuple[Run, Run]] = [
            (floats.begin(batch), self._simulator.begin(batch)) for batch in batches
        ]

    def walk(self) -> Iterator[tuple[fx.Node, fx.Node]]:
        """(float node, its copy) in the network's order, each before it runs; the output isn't among them."""
        for real, node in zip(self.graph.gm.graph.nodes, self.work.gm.graph.nodes, strict=True):
            if node.op == "output":
                return
            yield real, node
            with torch.no_grad():
                for float_run, run in self.runs:
                    float_run.step(real)
                    run.step(node)

    def change(self, plan: Plan) -> None:
        """Go on with another plan, and with the weights of `work` as they are now."""
        self.plan = plan
        self._simulator.change(plan)
