"""Take back the mean shift that rounding the weights causes; kept only where the simulated outputs gain by it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import Edge, Graph, Op
from ..numerics.bias import analytic_bias
from ..plan import Plan
from ..plan.constants import stored_values
from ._base import Context
from ._judge import output_error, parted

JUDGED = 256  # samples; the last quarter of them


@dataclass(frozen=True)
class Options:
    """`correct_bias` has no knobs."""


def run(graph: Graph, plan: Plan, context: Context, options: Options) -> tuple[Graph, Plan]:
    """Correct the bias of every quantized convolution and Linear that has one (Nagel et al. 2019).

    The corrected network is compared with the uncorrected one on calibration data; the better is kept, said in
    the notes.
    """
    if not plan.quantized:
        _tell(context, "left out", "nothing is quantized")
        return graph, plan
    better = corrected(graph, plan, context)
    _, judged = parted(context.calibration, graph, JUDGED)
    before, after = (
        output_error(candidate, plan, graph, context.arithmetic, judged) for candidate in (graph, better)
    )
    found = f"error of the simulated outputs {before:.3g} without, {after:.3g} with it, on calibration data"
    if after < before:
        _tell(context, "kept", found)
        context.notes.append(f"bias correction lowered the output error from {before:.3g} to {after:.3g}")
        return better, plan
    _tell(context, "left out", found)
    context.notes.append("bias correction did not help on the calibration data and was left out")
    return graph, plan


def corrected(graph: Graph, plan: Plan, context: Context) -> Graph:
    """A copy whose quantized layers have their biases corrected, for better or worse."""
    made = graph.clone()
    means = _mean_inputs(graph, plan, context)
    for node in made.nodes():
        name, op = made.name(node), made.op(node)
        if name in means:
            _correct(made, plan, name, op, means[name])
    return made


def _tell(context: Context, outcome: str, reason: str) -> None:
    context.tried.append({"what": "bias correction", "outcome": outcome, "reason": reason})


def _mean_inputs(graph: Graph, plan: Plan, context: Context) -> dict[str, Tensor]:
    """Mean input per channel [I] of every quantized layer with a bias, over the calibration data."""
    layers: dict[fx.Node, list[tuple[str, int]]] = {}
    for node in graph.nodes():
        name, op = graph.name(node), graph.op(node)
        if plan.node(name).kernel is None or op.kind not in ("conv", "linear") or op.operands[2] is None:
            continue
        source = op.operands[0]
        if source is not None and source.node is not None:
            layers.setdefault(source.node, []).append((name, 1 if op.kind == "conv" else -1))
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def look(node: fx.Node, value: Any) -> None:
        for name, axis in layers.get(node, ()):
            channels = value.cpu().movedim(axis, 0).flatten(1).double()
            sums[name] = sums.get(name, torch.zeros(())) + channels.sum(1)
            counts[name] = counts.get(name, 0) + channels.shape[1]

    run = context.float_pass(graph)
    with torch.no_grad():
        for batch in context.calibration:
            run(batch.inputs, look)
    return {name: total / counts[name] for name, total in sums.items()}


def _correct(graph: Graph, plan: Plan, name: str, op: Op, mean: Tensor) -> None:
    weight, bias = op.operands[1], op.operands[2]
    assert weight is not None and weight.tensor is not None and bias is not None and bias.tensor is not None
    value = graph.tensor(weight.tensor).detach()
    stored = stored_values(graph, plan, weight.tensor, plan.edges[Edge(weight.tensor, name, 1)])
    old = graph.tensor(bias.tensor).detach()
    graph.set_tensor(bias.tensor, analytic_bias(old, value, stored, mean, op.attrs.get("groups", 1)))
