"""Round weights so that layers keep their outputs: GPTQ in one pass, every layer on what those before it have lost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from ..errors import DataError, RecipeError
from ..graph import Edge, Graph, Op
from ..graph.reading import uses_of
from ..numerics.codes import decode, encode
from ..numerics.error import sqnr_db
from ..numerics.gptq import by_rows, solve, spans
from ..numerics.grid import Grid
from ..numerics.hessian import InputMoments, damped, shifted
from ..plan import Plan, TensorPlan
from ..plan.constants import grid_of, settle
from . import correct_bias
from ._abreast import Abreast, has_rows, rows_of
from ._base import Context
from ._judge import Inputs, Judge, parted, samples_in
from .calibrate import room_for_biases

WHAT = "GPTQ"
SHARES = (1.0, 0.5, 0.0)  # of `shift` that are tried
FEW = 2**19  # weights up to which all of them are; beyond, a plain gain is enough
PLAINLY = 0.5  # of the error is left then, or less


@dataclass(frozen=True)
class Options:
    """Knobs of `gptq`.

    damping: share of the mean of the Hessian's diagonal that is added to it.
    order: take the inputs with the largest activations first; scales of groups are then those of plain rounding.
    shift: how far weights are moved first, so that rounded inputs give the float outputs; 0 … 1.
    rounds: of scales by least squares and codes by coordinate descent, after the sweep.
    above: layers whose weights plain rounding keeps better than this many dB are left to it; 0: none are tried.
    samples: calibration samples that are used, a quarter of which only judge.
    positions: rows of inputs that a layer's moments are taken from.
    inputs: layers with more weights than this in a row are left to plain rounding.
    """

    damping: float = 0.01
    order: bool = False
    shift: float = 1.0
    rounds: int = 2
    above: float = 40.0
    samples: int = 512
    positions: int = 2**16
    inputs: int = 8192

    def __post_init__(self) -> None:
        for name, low, high in (("damping", 0, 10), ("shift", 0, 1), ("rounds", 0, 100), ("above", 0, 1000)):
            if not low <= getattr(self, name) <= high:
                raise RecipeError(
                    f"gptq's {name} is {getattr(self, name)}: give a number from {low} to {high}"
                )
        for name in ("samples", "positions", "inputs"):
            if getattr(self, name) < 1:
                raise RecipeError(f"gptq's {name} is {getattr(self, name)}: give at least 1")


@dataclass(frozen=True)
class Layer:
    """A layer whose weights are to be solved for."""

    name: str
    node: fx.Node
    weight: str
    bias: str | None
    tie: str
    groups: int


def run(graph: Graph, plan: Plan, context: Context, options: Options) -> tuple[Graph, Plan]:
    """GPTQ for every convolution and Linear with narrow weights, in the network's order.

    Float and simulated network go through the calibration data side by side, operator by operator, so that each layer
    is solved on the rounded inputs that it will read, and the data is read once. The result is kept where the simulated
    outputs are nearer to the float network's, on samples held back, than those of plain rounding with its biases
    corrected; that is what comes out otherwise. Where little data says more than is true, moving weights before they
    are rounded (`shift`) does harm: half of it is tried as well, and none where half was better than all of it; on
    large networks only until there is a plain gain.
    """
    layers, left = layers_of(graph, plan, options)
    for reason, names in left.items():
        _tell(context, False, f"{listed(names)}: {reason}")
    if not layers:
        return graph, plan
    fit, held = parted(context.calibration, graph, options.samples)
    real = context.original(graph, plan)
    error = Judge(real, context.arithmetic, held).error
    samples = samples_in(held)
    rounded, told = _bias_corrected(
        graph, plan, context
    )  # what lower efforts end with: nothing here may be worse
    before = error(*rounded)
    nearest, best = rounded, math.inf
    small = sum(graph.tensor(layer.weight).numel() for layer in layers) <= FEW
    for share in dict.fromkeys(options.shift * part for part in SHARES):
        solving = _Solving(graph, plan, context, replace(options, shift=share), layers, fit)
        with context.progress.task("solving for weights", len(layers)) as task, torch.no_grad():
            found = solving.run(task.advance)
        after = error(*found)
        reason = (
            f"{len(layers) - len(solving.refused)} layers, shift {share:g}: error of the simulated outputs "
            f"{before:.3g} without, {after:.3g} with it, on {samples} samples held back"
        )
        _tell(context, after < min(before, best), reason)
        if after < best:
            nearest, best = found, after
        elif nearest is not rounded:
            break
        if best < PLAINLY * before and not small:
            break
    for why, names in _by_reason(solving.refused).items():
        _tell(context, False, f"{listed(names)}: {why}")
    if best < before:
        return nearest
    polished, also = _bias_corrected(*nearest, context)
    after = error(*polished)
    _tell(
        context,
        after < before,
        f"with its biases corrected as well: {before:.3g} without, {after:.3g} with it",
    )
    kept, corrections = (polished, also) if after < before else (rounded, told)
    context.tried += corrections.tried
    context.notes += corrections.notes
    return kept


def _bias_corrected(graph: Graph, plan: Plan, context: Context) -> tuple[tuple[Graph, Plan], Context]:
    """What `correct_bias` makes of it, and a context that holds what it told."""
    apart = replace(context, notes=[], tried=[])
    return correct_bias.run(graph, plan, apart, correct_bias.Options()), apart


def _tell(context: Context, kept: bool, reason: str) -> None:
    context.tried.append({"what": WHAT, "outcome": "kept" if kept else "left out", "reason": reason})


def _by_reason(refused: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, reason in refused.items():
        found.setdefault(reason, []).append(name)
    return found


def listed(names: Sequence[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]


def layers_of(graph: Graph, plan: Plan, options: Options) -> tuple[list[Layer], dict[str, list[str]]]:
    """The layers to solve for, in order; and those left out, by reason."""
    layers: list[Layer] = []
    left: dict[str, list[str]] = {}
    readers = uses_of(graph)
    for node in graph.nodes():
        name, op = graph.name(node), graph.op(node)
        tie = _weight_tie(plan, name, op)
        if tie is None or plan.node(name).kernel is None or op.kind not in ("conv", "linear"):
            continue
        operand, bias = op.operands[1], op.operands[2]
        assert operand is not None and operand.tensor is not None
        weight = graph.tensor(operand.tensor).detach()
        count = readers[id(graph.tensor(operand.tensor))]
        reason = _objection(op, weight, plan.ties[tie], count, options)
        if reason is not None:
            left.setdefault(reason, []).append(name)
            continue
        groups = op.attrs.get("groups", 1)
        own = bias.tensor if bias is not None and bias.tensor is not None else None
        layers.append(Layer(name, node, operand.tensor, own, tie, groups))
    return layers, left


def _weight_tie(plan: Plan, name: str, op: Op) -> str | None:
    operand = op.operands[1] if len(op.operands) > 1 else None
    if operand is None or operand.tensor is None:
        return None
    tie = plan.edges.get(Edge(operand.tensor, name, 1))
    return tie if tie is not None and plan.ties[tie].source == "weight" else None


def _objection(op: Op, weight: Tensor, tie: TensorPlan, readers: int, options: Options) -> str | None:
    """Why a layer is left to plain rounding."""
    fmt = tie.format
    if readers > 1 or len(tie.members) > 1:
        return "several operators share its weights or their scale"
    if fmt.unscaled:
        return f"{fmt} has no scales to solve for"
    if fmt.granularity in ("channel", "group") and (fmt.axis or 0) % weight.dim() != 0:
        return "its scales don't run along its outputs"
    if not weight.numel() or not has_rows(op):
        return "it has no weights, or pads with something else than zeros"
    if math.prod(weight.shape[1:]) > options.inputs:
        return f"its rows have more than {options.inputs} weights"
    grid = grid_of(tie)
    if sqnr_db(weight, decode(encode(weight, grid), grid)) >= options.above:
        return f"plain rounding keeps its weights to {options.above:g} dB"
    return None


class _Solving(Abreast):
    """One pass: the float and the simulated network abreast, layer by layer."""

    def __init__(
        self,
        graph: Graph,
        plan: Plan,
        context: Context,
        options: Options,
        layers: Sequence[Layer],
        batches: Sequence[Inputs],
    ) -> None:
        super().__init__(context.original(graph, plan), graph, plan, context.arithmetic, batches)
        self.options, self.memo = options, context.memo
        self.layers = {layer.name: layer for layer in layers}
        self.refused: dict[str, str] = {}
        self._last: tuple[object, InputMoments] | None = None

    def run(self, advance: Callable[[int], object]) -> tuple[Graph, Plan]:
        ahead = len(self.layers)
        for real, node in self.walk():
            if not ahead:
                break
            layer = self.layers.get(self.work.name(node)) if node.op.startswith("call") else None
            if layer is None:
                continue
            ahead -= 1
            key = f"{WHAT}, shift {self.options.shift:g}: {layer.name}"
            known = self.memo.found(key)
            if known is not None:
                self._take(layer, known)
            else:
                try:
                    self._solve(layer, real, node)
                    self.memo.keep(key, self._solved(layer))
                except DataError as error:
                    self.refused[layer.name] = str(error)
            advance(1)
        return self.work, self.plan

    def _solve(self, layer: Layer, real: fx.Node, node: fx.Node) -> None:
        moments = self._moments(layer, real, node)
        if not moments.count:
            raise DataError("the calibration data never reaches it")
        hessian, cross = moments.settled(centred=layer.bias is not None)
        definite = damped(hessian, self.options.damping)
        weight = self.work.tensor(layer.weight).detach()
        shape = (layer.groups, weight.shape[0] // layer.groups, -1)
        original = weight.reshape(shape).double()
        tie = self.plan.ties[layer.tie]
        plain = decode(encode(weight, grid_of(tie)), grid_of(tie)).reshape(shape)
        if definite is None:
            self._correct(layer, original, plain, moments)
            raise DataError(
                "its inputs are the same in all of the calibration data, and say nothing of its weights"
            )
        target = shifted(original, hessian, cross, definite, self.options.shift)
        rows = (*shape[:2], len(spans(plain.shape[2], tie.format)))
        scale, zero_point = (by_rows(part, rows) for part in tie.parameters())
        grid = Grid(tie.format, scale, zero_point, tie.table)
        found = solve(
            target, definite, plain, grid, order=self.options.order, rounds=self.options.rounds,
            least=self._least(layer, rows),
        )  # fmt: skip
        self.work.set_tensor(layer.weight, found.values.reshape(weight.shape))
        self._correct(layer, original, found.values, moments)
        if tie.scale is not None and tie.scale.ndim:
            like = tie.scale.shape
            changed = replace(tie, scale=found.scale.reshape(like), zero_point=found.zero_point.reshape(like))
            self.change(settle(self.plan.with_ties({layer.tie: changed})))
        else:
            self.change(self.plan)

    def _solved(self, layer: Layer) -> dict[str, Tensor]:
        """All that solving for a layer has changed."""
        scale, zero_point = self.plan.ties[layer.tie].parameters()
        found = {"weight": self.work.tensor(layer.weight).detach(), "scale": scale, "zero_point": zero_point}
        return found if layer.bias is None else {**found, "bias": self.work.tensor(layer.bias).detach()}

    def _take(self, layer: Layer, known: Mapping[str, Tensor]) -> None:
        self.work.set_tensor(layer.weight, known["weight"])
        if layer.bias is not None:
            self.work.set_tensor(layer.bias, known["bias"])
        tie = self.plan.ties[layer.tie]
        changed = replace(tie, scale=known["scale"], zero_point=known["zero_point"])
        self.change(settle(self.plan.with_ties({layer.tie: changed})))

    def _moments(self, layer: Layer, real: fx.Node, node: fx.Node) -> InputMoments:
        """Second moments of what the layer reads; those of the layer before where both read the same."""
        op = self.work.op(node)
        source = op.operands[0]
        assert source is not None
        kernel = tuple(self.work.tensor(layer.weight).shape[2:])
        tie = self.plan.edges.get(Edge(self.work.name(source.node), layer.name, 0)) if source.node else None
        key = (source.node, tie, kernel, str(sorted(op.attrs.items(), key=str)) if kernel else "")
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        moments = InputMoments(losses=self.options.shift > 0)
        most = max(1, self.options.positions // max(1, len(self.runs)))
        for float_run, run in self.runs:
            x, hat = float_run.read(real, 0), run.read(node, 0)
            if x.numel():
                pairs = (rows_of(values, op.attrs, kernel, most) for values in (x, hat))
                for x_PBK, hat_PBK in zip(*pairs, strict=True):
                    moments.update(x_PBK, hat_PBK)
        self._last = (key, moments)
        return moments

    def _correct(self, layer: Layer, original: Tensor, values: Tensor, moments: InputMoments) -> None:
        """Give the bias what the mean of the outputs has lost: b' = b + w E[x] − q E[x̂]."""
        if layer.bias is None:
            return
        shift = moments.mean_shift(original, values).reshape(-1)
        bias = self.work.tensor(layer.bias).detach()
        self.work.set_tensor(layer.bias, (bias.double() + shift).to(bias.dtype))

    def _least(self, layer: Layer, rows: tuple[int, int, int]) -> Tensor | None:
        """Scales that the layer's bias needs at least, [B, R, G]; None where it has room."""
        tie = self.plan.ties[layer.tie]
        scale, _ = tie.parameters()
        tiny = self.plan.with_ties({layer.tie: replace(tie, scale=torch.full_like(scale, 2.0**-100))})
        raised = room_for_biases(self.work, tiny, None).ties[layer.tie].scale
        assert raised is not None
        return None if bool((raised <= 2.0**-100).all()) else by_rows(raised, rows)
