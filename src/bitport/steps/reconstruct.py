"""Learn the rounding of a block's weights, and the scales of its activations, from what the float block gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx

from ..errors import RecipeError
from ..fake import Fake
from ..graph import Graph
from ..numerics.rows import restore, rows
from ..numerics.soft import SoftRounding, relative_error, sharpness
from ..plan import Plan
from ..plan.constants import grid_of, settle
from . import gptq
from ._abreast import Abreast
from ._base import Context
from ._judge import Inputs, Judge, parted, samples_in, split_batches
from .calibrate import room_for_biases

WHAT = "block reconstruction"
SLOWER = 0.03  # scales and biases learn at this share of the rounding's rate


@dataclass(frozen=True)
class Options:
    """Knobs of `reconstruct`.

    steps: of the optimizer, for each block. batch: samples a step. rate: learning rate of the rounding.
    settle: weight of the term that drives each value up or down. drop: share of activations left unrounded, at random.
    samples: calibration samples that are used, a quarter of which only judge.
    narrow: only where activations have fewer than 8 bits: with others GPTQ came out ahead, and in a tenth of the time.
    """

    steps: int = 400
    batch: int = 32
    rate: float = 0.01
    settle: float = 0.1
    drop: float = 0.5
    samples: int = 512
    narrow: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "samples"):
            if getattr(self, name) < 1:
                raise RecipeError(f"reconstruct's {name} is {getattr(self, name)}: give at least 1")
        for name, high in (("rate", 1), ("settle", 1000), ("drop", 1)):
            if not 0 <= getattr(self, name) <= high:
                raise RecipeError(
                    f"reconstruct's {name} is {getattr(self, name)}: give a number from 0 to {high}"
                )


def run(graph: Graph, plan: Plan, context: Context, options: Options) -> tuple[Graph, Plan]:
    """Block after block (Li et al. 2021, arXiv:2102.05426; Wei et al. 2022, arXiv:2203.05740), on rounded inputs.

    A block whose outputs are no nearer to the float block's keeps plain rounding. The whole is held against GPTQ on
    samples held back; the better of the two is kept, and a `gptq` step behind this one then finds nothing to do.
    """
    if options.narrow and not any(
        tie.format.is_int and tie.format.bits < 8 for tie in plan.measured().values()
    ):
        reason = "no activations of fewer than 8 bits, where it gains something over GPTQ; narrow = false learns anyway"
        context.tried.append({"what": WHAT, "outcome": "left out", "reason": reason})
        return graph, plan
    layers, _ = gptq.layers_of(graph, plan, gptq.Options(above=1000))
    layers = [layer for layer in layers if plan.ties[layer.tie].format.is_int]
    wanting = {layer.name for layer in gptq.layers_of(graph, plan, gptq.Options())[0]}
    if not wanting & {layer.name for layer in layers}:
        reason = "plain rounding keeps the weights of every layer, or there is none to learn for"
        context.tried.append({"what": WHAT, "outcome": "left out", "reason": reason})
        return graph, plan
    solved = gptq.run(graph, plan, context, gptq.Options(samples=options.samples))
    fit, held = parted(context.calibration, graph, options.samples)
    learning = _Learning(graph, plan, context, options, layers, split_batches(fit, graph, options.batch))
    learned = learning.run()
    judge = Judge(context.original(graph, plan), context.arithmetic, held)
    before, after = judge.error(*solved), judge.error(*learned)
    kept = after < before
    reason = (
        f"{learning.kept} of {learning.blocks} blocks: error of the simulated outputs {after:.3g} with it, "
        f"{before:.3g} without (GPTQ), on {samples_in(held)} samples held back"
    )
    context.tried.append({"what": WHAT, "outcome": "kept" if kept else "left out", "reason": reason})
    return learned if kept else solved


@dataclass
class _Block:
    """What is learned of a block. soft: by weight; biases: by tensor; scales: log of the change, by tie."""

    nodes: list[fx.Node]
    soft: dict[str, SoftRounding] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)


class _Learning(Abreast):
    """One walk: a block is learned when its inputs have come, before it runs."""

    def __init__(
        self,
        graph: Graph,
        plan: Plan,
        context: Context,
        options: Options,
        layers: Sequence[gptq.Layer],
        batches: Sequence[Inputs],
    ) -> None:
        super().__init__(context.original(graph, plan), graph, plan, context.arithmetic, batches)
        self.context, self.options = context, options
        self.layers = {layer.name: layer for layer in layers}
        self.blocks = self.kept = 0
        self._random = torch.Generator().manual_seed(context.seed)
        self._float_node = dict(zip(self.work.gm.graph.nodes, self.real.gm.graph.nodes, strict=True))

    def run(self) -> tuple[Graph, Plan]:
        names = {self.work.name(node): node for node in self.work.nodes()}
        starts: dict[fx.Node, list[fx.Node]] = {}
        for block in self.work.blocks():
            inside = [
                names[self.work.name(node)]
                for node in block.graph_module.graph.nodes
                if node.op[:4] == "call"
            ]
            if any(self.work.name(node) in self.layers for node in inside):
                starts[inside[0]] = inside
        with self.context.progress.task("reconstructing blocks", len(starts)) as task:
            for _, node in self.walk():
                if node in starts:
                    self.blocks += 1
                    self.kept += self._block(starts[node])
                    task.advance(1)
        return self.work, room_for_biases(self.work, self.plan, None)

    def _block(self, nodes: list[fx.Node]) -> bool:
        """Learn a block, or take what was learned of it before the run was stopped."""
        block, memo = self._opened(nodes), self.context.memo
        key = f"{WHAT}: {self.work.name(nodes[0])}"
        # what is drawn for a block doesn't depend on whether those before it were learned or taken
        self._random.manual_seed(self.context.seed + self.blocks)
        known = memo.found(key)
        if known is not None:
            if known:
                self._take(known)
            return bool(known)
        found = self._learn(block)
        memo.keep(key, self._learned(block) if found else {})
        return found

    def _learned(self, block: _Block) -> dict[str, Tensor]:
        tensors = {f"tensor {name}": self.work.tensor(name).detach() for name in (*block.soft, *block.biases)}
        return tensors | {f"scale {name}": self.plan.ties[name].parameters()[0] for name in block.scales}

    def _take(self, known: Mapping[str, Tensor]) -> None:
        ties = {}
        for key, value in known.items():
            kind, _, name = key.partition(" ")
            if kind == "tensor":
                self.work.set_tensor(name, value)
            else:
                ties[name] = replace(self.plan.ties[name], scale=value)
        self.change(settle(self.plan.with_ties(ties)))

    def _opened(self, nodes: list[fx.Node]) -> _Block:
        block = _Block(nodes)
        inside = [self.work.name(node) for node in nodes]
        for layer in (self.layers[name] for name in inside if name in self.layers):
            grid, weight = grid_of(self.plan.ties[layer.tie]), self.work.tensor(layer.weight).detach()
            like = rows(weight, grid.format)
            scale, zero_point = (
                restore(part.reshape(-1, 1).expand_as(like), grid.format, weight.shape)
                for part in (grid.scale, grid.zero_point)
            )
            block.soft[layer.weight] = SoftRounding(
                weight, scale, zero_point, grid.format.low, grid.format.high
            )
            if layer.bias is not None:
                block.biases[layer.bias] = self.work.tensor(layer.bias).detach().clone().requires_grad_()
        for name, tie in self.plan.measured().items():
            if set(tie.members) <= set(inside):
                block.scales[name] = torch.zeros((), requires_grad=True)
        return block

    def _learn(self, block: _Block) -> bool:
        """Whether the block came out nearer to the float block; if not, it stays as it was."""
        cases = self._cases(block)
        if not cases:
            return False
        options = self.options
        groups = [
            {"params": [soft.v for soft in block.soft.values()], "lr": options.rate},
            {"params": [*block.biases.values(), *block.scales.values()], "lr": SLOWER * options.rate},
        ]
        optimizer = torch.optim.Adam([group for group in groups if group["params"]])
        for step in range(options.steps):
            case = cases[int(torch.randint(len(cases), (), generator=self._random))]
            inputs = {node: self._mixed(hat, x) for node, (x, hat) in case.inputs.items()}
            loss = self._loss(block, case, inputs, "soft")
            sharp = sharpness((step + 1) / options.steps)
            if sharp is not None:
                open_ = torch.stack([soft.openness(sharp) for soft in block.soft.values()])
                loss = loss + options.settle * open_.mean()
            if not bool(torch.isfinite(loss.detach())):
                return False
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        with torch.no_grad():
            hats = [{node: hat for node, (_, hat) in case.inputs.items()} for case in cases]
            plain, settled = (
                sum(float(self._loss(block, case, hat, how)) for case, hat in zip(cases, hats, strict=True))
                for how in ("plain", "settled")
            )
            if not settled < plain:
                return False
            for name, soft in block.soft.items():
                self.work.set_tensor(name, soft.settled())
            for name, bias in block.biases.items():
                self.work.set_tensor(name, bias.detach())
            ties = {
                name: replace(self.plan.ties[name], scale=scale.detach())
                for name, scale in self._scales(block).items()
            }
        self.change(settle(self.plan.with_ties(ties)))
        return True

    def _cases(self, block: _Block) -> list[_Case]:
        """For each batch what the block reads, float and rounded, and what the float block makes of it."""
        inside = set(block.nodes)
        outside = dict.fromkeys(
            used
            for node in block.nodes
            for used in node.all_input_nodes
            if used not in inside and used.op != "get_attr"
        )
        ends = [node for node in block.nodes if any(user not in inside for user in node.users)]
        twins = [self._float_node[node] for node in block.nodes]
        float_block = Fake(self.real, Plan.empty(self.plan.target))
        cases = []
        with torch.no_grad():
            for float_run, run in self.runs:
                inputs = {u: (float_run.value(self._float_node[u]), run.value(u)) for u in outside}
                made = float_block.run(twins, {self._float_node[u]: x for u, (x, _) in inputs.items()})
                wanted = {node: made[self._float_node[node]] for node in ends}
                wanted = {
                    node: y for node, y in wanted.items() if torch.is_tensor(y) and y.is_floating_point()
                }
                if wanted and all(y.numel() for y in wanted.values()):
                    cases.append(_Case(inputs, wanted))
        return cases

    def _scales(self, block: _Block) -> dict[str, Tensor]:
        return {
            name: self.plan.ties[name].parameters()[0] * change.exp() for name, change in block.scales.items()
        }

    def _loss(
        self,
        block: _Block,
        case: _Case,
        inputs: Mapping[fx.Node, Any],
        how: Literal["plain", "soft", "settled"],
    ) -> Tensor:
        """Σ over outputs of their relative squared error: plainly rounded, while learning, or with what was learned."""
        fake = Fake(self.work, self.plan)
        if how != "plain":
            weights = {name: s.values() if how == "soft" else s.settled() for name, s in block.soft.items()}
            drop = self._mixed if how == "soft" and self.options.drop else None
            fake = Fake(self.work, self.plan, {**weights, **block.biases}, self._scales(block), drop)
        made = fake.run(block.nodes, dict(inputs))
        parts = [relative_error(made[node], wanted) for node, wanted in case.wanted.items()]
        return torch.stack(parts).sum()

    def _mixed(self, rounded: Any, real: Any) -> Any:
        """Some of the values unrounded, at random."""
        if not torch.is_tensor(real) or not real.is_floating_point() or not self.options.drop:
            return rounded
        return torch.where(torch.rand(real.shape, generator=self._random) < self.options.drop, real, rounded)


@dataclass
class _Case:
    """One batch at a block. inputs: node → (float, rounded); wanted: end → the float block's value."""

    inputs: dict[fx.Node, tuple[Any, Any]]
    wanted: dict[fx.Node, Tensor]
