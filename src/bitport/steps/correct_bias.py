"""Take back the mean shift that rounding the weights causes; kept only where the simulated outputs gain by it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import Edge, Graph, Op
from ..graph.reading import present
from ..numerics.bias import analytic_bias, shifted_bias
from ..numerics.hessian import InputMeans
from ..plan import Plan
from ..plan.constants import stored_values
from ._abreast import Abreast, has_rows, rows_of
from ._base import Context
from ._judge import output_error, parted

JUDGED = 256  # samples; the last quarter of them
POSITIONS = 2**14  # rows of inputs that a layer's means are taken from


@dataclass(frozen=True)
class Options:
    """`correct_bias` has no knobs."""


def run(graph: Graph, plan: Plan, context: Context, options: Options) -> tuple[Graph, Plan]:
    """Correct the bias of every quantized convolution and Linear that has one (Nagel et al. 2019).

    Once from the mean of each layer's inputs in the float network, and once from what the layers before it really
    give, in the network's order. Each is compared with the uncorrected network on calibration data held back; the
    best is kept, said in the notes.
    """
    if not plan.quantized:
        _tell(context, "left out", "nothing is quantized")
        return graph, plan
    fit, judged = parted(context.calibration, graph, JUDGED)
    real = context.original(graph, plan)
    candidates = {
        "analytic": corrected(graph, plan, context),
        "measured": _Measuring(real, graph, plan, context.arithmetic, fit).run(),
    }
    before = output_error(graph, plan, real, context.arithmetic, judged)
    errors = {
        how: output_error(found, plan, real, context.arithmetic, judged) for how, found in candidates.items()
    }
    best = min(errors, key=lambda how: errors[how])
    said = " and ".join(f"{errors[how]:.3g} {how}" for how in errors)
    found = (
        f"error of the simulated outputs {before:.3g} without, {said} with it, on calibration data held back"
    )
    if errors[best] < before:
        _tell(context, "kept", f"{best}: {found}")
        context.notes.append(
            f"bias correction lowered the output error from {before:.3g} to {errors[best]:.3g}"
        )
        return candidates[best], plan
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


class _Measuring(Abreast):
    """b' = b + w E[x] − q E[x̂], layer by layer: x̂ has gone through the layers that are corrected already."""

    def run(self) -> Graph:
        for real, node in self.walk():
            name = self.work.name(node) if node.op.startswith("call") else ""
            op = self.work.op(node) if name else None
            if op is not None and _is_corrected(self.plan, name, op):
                self._correct(name, op, real, node)
                self.change(self.plan)
        return self.work

    def _correct(self, name: str, op: Op, real: fx.Node, node: fx.Node) -> None:
        weight, bias = present(op, 1).tensor, present(op, 2).tensor
        assert weight is not None and bias is not None
        moments, kernel = InputMeans(), tuple(self.work.tensor(weight).shape[2:])
        most = max(1, POSITIONS // len(self.runs))
        for float_run, run in self.runs:
            x, hat = float_run.read(real, 0), run.read(node, 0)
            if x.numel():
                moments.update(rows_of(x, op.attrs, kernel, most), rows_of(hat, op.attrs, kernel, most))
        stored = stored_values(self.work, self.plan, weight, self.plan.edges[Edge(weight, name, 1)])
        shape = (op.attrs.get("groups", 1), stored.shape[0] // op.attrs.get("groups", 1), -1)
        shift = moments.mean_shift(
            self.real.tensor(weight).detach().reshape(shape), stored.reshape(shape)
        ).reshape(-1)
        old = self.real.tensor(bias).detach()
        self.work.set_tensor(bias, shifted_bias(old, shift, old.dtype))


def _is_corrected(plan: Plan, name: str, op: Op) -> bool:
    """Whether a layer runs with weights of a plan and has a bias of its own."""
    if plan.node(name).kernel is None or op.kind not in ("conv", "linear"):
        return False
    weight, bias = op.operands[1:3]
    if weight is None or weight.tensor is None or bias is None or bias.tensor is None:
        return False
    return has_rows(op) and Edge(weight.tensor, name, 1) in plan.edges


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
