"""Give channels back the mean and the spread that rounding took; kept only where the simulated outputs gain by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from ..graph import Edge, Graph, Op
from ..graph.reading import present, uses_of
from ..numerics.bias import analytic_bias, shifted_bias
from ..numerics.moments import ChannelMoments, matching, sum_of
from ..plan import Plan, TensorPlan
from ..plan.constants import settle, stored_values
from ._abreast import Abreast, has_rows, results_of, rows_of
from ._base import Context
from ._judge import Judge, parted
from .calibrate import room_for_biases

JUDGED = 256  # samples; the last quarter of them
POSITIONS = 2**14  # rows of inputs that a layer's moments are taken from
WORK = 2**28  # multiplications for a layer's moments; a large layer's are taken from fewer rows
FEWEST = 2**10  # rows, all the same


@dataclass(frozen=True)
class Options:
    """Knobs of `correct_bias`.

    spread: channels get their spread back as well, through the scales of their weights.
    """

    spread: bool = True


def run(graph: Graph, plan: Plan, context: Context, options: Options) -> tuple[Graph, Plan]:
    """Correct every quantized convolution and Linear that has a bias.

    Once analytically, from the mean of each layer's inputs in the float network (Nagel et al. 2019); once as measured,
    from what the layers before it really give, in the network's order: mean and spread, which is what BatchNorm would
    do if its statistics were estimated again (Sun et al. 2019, arXiv:1911.10125). Each is compared with the
    uncorrected network on calibration data held back; the best is kept, said in the notes.
    """
    if not plan.quantized:
        _tell(context, "left out", "nothing is quantized")
        return graph, plan
    fit, judged = parted(context.calibration, graph, JUDGED)
    real = context.original(graph, plan)
    measuring = _Measuring(real, graph, plan, context.arithmetic, fit)
    measured = measuring.run(options.spread)
    candidates = {"analytic": (_analytic(graph, plan, measuring.means), plan), "measured": measured}
    judge = Judge(real, context.arithmetic, judged)
    before = judge.error(graph, plan)
    errors = {how: judge.error(*found) for how, found in candidates.items()}
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
        return candidates[best]
    _tell(context, "left out", found)
    context.notes.append("bias correction did not help on the calibration data and was left out")
    return graph, plan


def _analytic(graph: Graph, plan: Plan, means: Mapping[str, Tensor]) -> Graph:
    """A copy whose layers have their biases corrected by the mean inputs given, [I] by name; for better or worse."""
    made = graph.clone(sharing=True)
    for node in made.nodes():
        name = made.name(node)
        if name not in means:
            continue
        op = made.op(node)
        weight, bias = present(op, 1).tensor, present(op, 2).tensor
        assert weight is not None and bias is not None
        stored = stored_values(made, plan, weight, plan.edges[Edge(weight, name, 1)])
        value, old = made.tensor(weight).detach(), made.tensor(bias).detach()
        groups = op.attrs.get("groups", 1)
        made.set_tensor(bias, analytic_bias(old, value, stored, means[name], groups))
    return made


class _Measuring(Abreast):
    """Layer by layer: what a layer reads has gone through the layers that are corrected already.

    Attributes:
        means: after `run`, each corrected layer's mean input in the float network, per channel: float64 [I] by name.
    """

    means: dict[str, Tensor]

    def run(self, spread: bool) -> tuple[Graph, Plan]:
        self.means = {}
        readers = uses_of(self.work)
        for real, node in self.walk():
            name = self.work.name(node) if node.op.startswith("call") else ""
            op = self.work.op(node) if name else None
            if op is None or not _has_bias(self.plan, name, op):
                continue
            self._see_mean(name, op, real)
            if has_rows(op):
                weight = present(op, 1).tensor
                assert weight is not None
                alone = readers[id(self.work.tensor(weight))] == 1
                self.change(self._matched(name, op, real, node, spread and alone))
        return self.work, room_for_biases(self.work, self.plan, None)

    def _see_mean(self, name: str, op: Op, real: fx.Node) -> None:
        sums, count = torch.zeros(1, dtype=torch.float64), 0
        for float_run, _ in self.runs:
            x = float_run.read(real, 0)
            axis = 1 if op.kind == "conv" else -1
            sums = sums + sum_of(x, axis).double()
            count += x.numel() // max(1, x.shape[axis])
        if count:
            self.means[name] = sums / count

    def _matched(self, name: str, op: Op, real: fx.Node, node: fx.Node, spread: bool) -> Plan:
        """The plan from this layer on. Its weights are scaled with their scales, so that codes stay."""
        weight, bias = present(op, 1).tensor, present(op, 2).tensor
        assert weight is not None and bias is not None
        key = self.plan.edges[Edge(weight, name, 1)]
        tie = self.plan.ties[key]
        old = self.real.tensor(bias).detach()
        moments = self._moments(op, real, node, stored_values(self.work, self.plan, weight, key), old)
        if moments is None:
            return self.plan
        wanted, found = moments
        scale = tie.scale
        gain, shift = matching(*wanted, *found, spread and scale is not None and _along_outputs(tie))
        values = self.work.tensor(weight).detach()
        self.work.set_tensor(bias, shifted_bias(old, shift, old.dtype))
        if scale is None or bool((gain == 1).all()):
            return settle(self.plan)
        self.work.set_tensor(weight, _scaled(values, gain))
        return settle(self.plan.with_ties({key: replace(tie, scale=_scaled(scale, gain))}))

    def _moments(
        self, op: Op, real: fx.Node, node: fx.Node, stored: Tensor, bias: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
        """(mean, deviation) of the float layer's products and of the rounded one's, each [C]; None without data."""
        floats, rounded = ChannelMoments(), ChannelMoments()
        kernel = tuple(stored.shape[2:])
        rows = max(FEWEST, min(POSITIONS, WORK // max(1, stored.numel())))
        most, groups = max(1, rows // len(self.runs)), op.attrs.get("groups", 1)
        w_BRK = stored.float().reshape(groups, len(stored) // groups, -1)
        for float_run, run in self.runs:
            y, hat = float_run.value(real), run.read(node, 0)
            if y.numel():
                floats.update(results_of(y, kernel, most) - bias, 1)
                for rows_PBK in rows_of(hat, op.attrs, kernel, most):
                    rounded.update(torch.einsum("pbk,brk->pbr", rows_PBK.float(), w_BRK).flatten(1), 1)
        return (floats.moments(), rounded.moments()) if floats.count else None


def _along_outputs(tie: TensorPlan) -> bool:
    """Whether each output channel has scales of its own that any factor may change."""
    fmt = tie.format
    return (
        fmt.axis == 0
        and fmt.granularity in ("channel", "group")
        and len(tie.members) == 1
        and fmt.scale == "float32"
        and not fmt.unscaled
    )


def _scaled(values: Tensor, gain: Tensor) -> Tensor:
    """Channels along the first axis times their gain [C]."""
    return (values.double() * gain.reshape(-1, *[1] * (values.dim() - 1))).to(values.dtype)


def _has_bias(plan: Plan, name: str, op: Op) -> bool:
    """Whether a layer runs with weights of a plan and has a bias of its own."""
    if plan.node(name).kernel is None or op.kind not in ("conv", "linear"):
        return False
    weight, bias = op.operands[1:3]
    if weight is None or weight.tensor is None or bias is None or bias.tensor is None:
        return False
    return Edge(weight.tensor, name, 1) in plan.edges


def _tell(context: Context, outcome: str, reason: str) -> None:
    context.tried.append({"what": "bias correction", "outcome": outcome, "reason": reason})
