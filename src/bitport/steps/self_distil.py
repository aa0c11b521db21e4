"""Learn codes, scales and biases of the whole network at once, from what the float network gives, without labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from ..errors import RecipeError
from ..fake import Fake
from ..graph import Edge, Graph
from ..graph.reading import is_float, uses_of
from ..numerics.codes import encode
from ..numerics.rows import restore, rows
from ..numerics.soft import StraightCodes, blended, relative_error
from ..plan import Plan, TensorPlan
from ..plan.constants import grid_of, settle
from ._base import Context
from ._judge import Inputs, Judge, has_batches, parted, samples_in
from .calibrate import room_for_biases

WHAT = "distilling into itself"
SMALL = 1e-3  # 30 dB: nothing worth the time is left to learn
WORK = 3e11  # multiplications of one way through all steps; a larger network learns in smaller batches, then fewer
FEWEST = 8  # samples in a batch
BLEND = 0.5  # of another sample, at most
SCALES, BIASES = 1.0, 0.1  # their rates, as shares of that of codes


@dataclass(frozen=True)
class Options:
    """Knobs of `self_distil`.

    steps: of the optimizer. batch: samples a step. rate: how many codes a weight moves a step, at most, at the start.
    blend: learn on samples between samples as well, where inputs are floats.
    samples: calibration samples that are used, a quarter of which only judge.
    """

    steps: int = 400
    batch: int = 32
    rate: float = 0.01
    blend: bool = True
    samples: int = 512

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "samples"):
            if getattr(self, name) < 1:
                raise RecipeError(f"self_distil's {name} is {getattr(self, name)}: give at least 1")
        if not 0 < self.rate <= 1:
            raise RecipeError(f"self_distil's rate is {self.rate}: give a number above 0, at most 1")


def run(graph: Graph, plan: Plan, context: Context, options: Options) -> tuple[Graph, Plan]:
    """Train what the plan stores on the calibration data, the float network's outputs as the target.

    Where inputs are floats, samples are blended with others, so that few of them say more. The result is kept where
    the simulated outputs are nearer to the float network's on samples held back.
    """
    real = context.original(graph, plan)
    fit, held = parted(context.calibration, graph, options.samples)

    def tell(outcome: str, reason: str) -> None:
        context.tried.append({"what": WHAT, "outcome": outcome, "reason": reason})

    learned = _learned_codes(graph, plan)
    if not learned or not fit:
        tell("left out", "no layer has weights whose codes can learn")
        return graph, plan
    judge = Judge(real, context.arithmetic, held)
    before = judge.error(graph, plan)
    if before <= SMALL:
        tell("left out", f"the simulated outputs err by {before:.1e} alone")
        return graph, plan
    found = _Student(real, graph, plan, context, options, learned, fit).run()
    if found is None:
        tell("left out", "its loss was no finite number")
        return graph, plan
    after = judge.error(*found)
    kept = after < before
    tell(
        "kept" if kept else "left out",
        f"error of the simulated outputs {before:.3g} without, {after:.3g} with it, on "
        f"{samples_in(held)} samples held back",
    )
    return found if kept else (graph, plan)


def _learned_codes(graph: Graph, plan: Plan) -> dict[str, tuple[str, StraightCodes]]:
    """Weight → (tie, its codes), of weights that one operator reads, as integers on a grid of their own."""
    found: dict[str, tuple[str, StraightCodes]] = {}
    readers = uses_of(graph)
    for edge, name in plan.edges.items():
        tie = plan.ties[name]
        if (
            tie.source != "weight"
            or not tie.format.is_int
            or len(tie.members) > 1
            or tie.format.scale != "float32"
        ):
            continue
        weight = graph.tensor(edge.producer).detach()
        if readers[id(graph.tensor(edge.producer))] != 1 or not weight.numel():
            continue
        grid = grid_of(tie)
        scale, zero_point = (part.reshape(-1) for part in (grid.scale, grid.zero_point))
        codes = rows(encode(weight, grid), tie.format)
        found[edge.producer] = (
            name,
            StraightCodes(codes, scale, zero_point, tie.format.low, tie.format.high),
        )
    return found


class _Student:
    """The network under a plan, all that it stores in a form that learns."""

    def __init__(
        self,
        real: Graph,
        graph: Graph,
        plan: Plan,
        context: Context,
        options: Options,
        codes: Mapping[str, tuple[str, StraightCodes]],
        fit: Sequence[Inputs],
    ) -> None:
        self.real, self.graph, self.plan = real, graph, plan
        self.context, self.options, self.codes = context, options, codes
        self.scales = {name: torch.zeros((), requires_grad=True) for name in plan.measured()}
        self.free = {name: value.requires_grad_() for name, value in self._free().items()}
        self._random = torch.Generator().manual_seed(context.seed)
        self._batched = has_batches(graph)
        self.data = [tuple(map(torch.cat, zip(*fit, strict=True)))] if self._batched else list(fit)
        floats = all(x.is_floating_point() and bool(torch.isfinite(x).all()) for x in self.data[0])
        self._blends = options.blend and self._batched and floats
        self._nodes = [node for node in graph.gm.graph.nodes if node.op.startswith("call")]
        self._outputs = [(index, node) for index, node in enumerate(graph.output_nodes()) if is_float(node)]

    def run(self) -> tuple[Graph, Plan] | None:
        """What was learned; None where it diverged."""
        steps, batch = self._effort()
        rate = self.options.rate
        codes = [learned for _, learned in self.codes.values()]
        optimizer = torch.optim.Adam(
            [
                {"params": [one.latent for one in codes], "lr": rate},
                {"params": [one.log for one in codes] + list(self.scales.values()), "lr": SCALES * rate},
                {"params": list(self.free.values()), "lr": BIASES * rate},
            ]
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        with self.context.progress.task(WHAT, steps) as task:
            for _ in range(steps):
                inputs = self._sample(batch)
                with torch.no_grad():
                    wanted = self.real.run(*inputs)
                made = self._outputs_of(inputs)
                loss = torch.stack([relative_error(made[i], wanted[i]) for i, _ in self._outputs]).sum()
                if not bool(torch.isfinite(loss.detach())):
                    return None
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                schedule.step()
                task.advance(1)
        return self._settled()

    def _free(self) -> dict[str, Tensor]:
        """Biases, and the gains of norms: parameters of operators that no plan stores on a grid of their own."""
        found: dict[str, Tensor] = {}
        parameters = {name for name, _ in self.graph.gm.named_parameters()}
        readers = uses_of(self.graph)
        for node in self.graph.nodes():
            name, op = self.graph.name(node), self.graph.op(node)
            for slot, operand in enumerate(op.operands):
                if slot == 0 or operand is None or operand.tensor not in parameters:
                    continue
                tie = self.plan.edges.get(Edge(operand.tensor, name, slot))
                value = self.graph.tensor(operand.tensor)
                planned = tie is not None and self.plan.ties[tie].source != "bias"
                if not planned and value.dim() == 1 and value.is_floating_point() and readers[id(value)] == 1:
                    found[operand.tensor] = value.detach().clone()
        return found

    def _effort(self) -> tuple[int, int]:
        """(steps, samples a step), by what one step costs."""
        inputs = self._sample(1)
        work = 0

        def look(node: fx.Node, value: object) -> None:
            nonlocal work
            op = self.graph.op(node) if node.op.startswith("call") else None
            weight = op.operands[1].tensor if op and len(op.operands) > 1 and op.operands[1] else None
            if weight is not None and weight in self.codes and isinstance(value, Tensor):
                stored = self.graph.tensor(weight)
                work += stored.numel() // max(1, stored.shape[0]) * value.numel()

        with torch.no_grad():
            self.graph.run(*inputs, on_value=look)
        options = self.options
        most = WORK / max(1, work)
        batch = max(FEWEST, min(options.batch, int(most / options.steps))) if self._batched else 1
        return max(1, min(options.steps, int(most / batch))), batch

    def _sample(self, size: int) -> Inputs:
        """A batch of random samples, or one of the batches where they can't be taken apart."""
        if not self._batched:
            return self.data[int(torch.randint(len(self.data), (), generator=self._random))]
        count = len(self.data[0][0])
        picked = torch.randint(count, (size,), generator=self._random)
        if not self._blends:
            return tuple(x[picked] for x in self.data[0])
        other = torch.randint(count, (size,), generator=self._random)
        share = BLEND * torch.rand(size, generator=self._random)
        return tuple(blended(x[picked], x[other], share) for x in self.data[0])

    def _outputs_of(self, inputs: Inputs) -> dict[int, Tensor]:
        weights = {name: self._weight(name) for name in self.codes}
        scales = {name: self.plan.ties[name].parameters()[0] * log.exp() for name, log in self.scales.items()}
        fake = Fake(self.graph, self.plan, {**weights, **self.free}, scales)
        values = dict(zip(self.graph.gm.graph.find_nodes(op="placeholder"), inputs, strict=True))
        made = fake.run(self._nodes, values)
        return {index: made[node] for index, node in self._outputs}

    def _weight(self, name: str) -> Tensor:
        tie, learned = self.codes[name]
        return restore(learned.values(), self.plan.ties[tie].format, self.graph.tensor(name).shape)

    def _settled(self) -> tuple[Graph, Plan]:
        work = self.graph.clone(sharing=True)
        ties: dict[str, TensorPlan] = {}
        with torch.no_grad():
            for name, (tie, learned) in self.codes.items():
                work.set_tensor(name, self._weight(name))
                old = self.plan.ties[tie]
                ties[tie] = replace(old, scale=learned.scale().reshape(old.parameters()[0].shape))
            for name, value in self.free.items():
                work.set_tensor(name, value.detach())
            for tie, log in self.scales.items():
                old = self.plan.ties[tie]
                ties[tie] = replace(old, scale=old.parameters()[0] * log.exp())
        return work, room_for_biases(work, settle(self.plan.with_ties(ties)), None)
