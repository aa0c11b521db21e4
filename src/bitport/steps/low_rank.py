"""Make up for what rounding weights lost by a thin product in float beside each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import BitportError, RecipeError
from ..graph import Edge, Graph, Op
from ..graph.beside import is_free, names_beside, put_beside
from ..graph.reading import uses_of
from ..numerics.bias import analytic_bias
from ..numerics.grid import storage_bits
from ..numerics.low_rank import Factors, compensation, weighed_energy
from ..numerics.moments import ChannelMoments
from ..plan import NodePlan, Plan
from ..plan.constants import grid_of, stored_values
from ._base import Context
from ._judge import Inputs, Judge, parted, samples_in
from .gptq import listed

WHAT = "low-rank compensation"
SAMPLES = 256  # that inputs are weighed on; the last quarter of them judges
FLOAT_BYTES = 4


@dataclass(frozen=True)
class Options:
    """Knobs of `low_rank`.

    rank: directions a layer, a whole number; or below 1 that share of the shorter side of its weights.
    budget: what the products may take in all, as a share of the bytes of the stored weights; those that take away most
        of their layer's error a byte come first. None: no limit.
    weigh: weigh the error by how large each input is on the calibration data (LQER); false: by nothing.
    """

    rank: int | float = 8
    budget: float | None = None
    weigh: bool = True

    def __post_init__(self) -> None:
        whole = isinstance(self.rank, int) or float(self.rank).is_integer()
        if not (1 <= self.rank <= 2**16 if whole else 0 < self.rank < 1):
            raise RecipeError(
                f"low_rank's rank is {self.rank}: give a whole number from 1 on, or a share below 1"
            )
        if self.budget is not None and not self.budget > 0:
            raise RecipeError(
                f"low_rank's budget is {self.budget}: give a share above 0, such as 0.1, or leave it out"
            )


@dataclass(frozen=True)
class Layer:
    """A layer that a product can stand beside.

    Attributes: weight, bias: names of its tensors; tie: of its weights; source: name of what it reads; stored: bytes
    of its stored weights.
    """

    name: str
    weight: str
    bias: str | None
    tie: str
    source: str
    stored: int


@dataclass(frozen=True)
class _Product:
    """A layer's factors, its error's size and what they cost. `lost`: ‖(W − Q) s‖² / ‖W s‖²."""

    layer: Layer
    factors: Factors
    lost: float
    bias: Tensor | None

    @property
    def bytes(self) -> int:
        return FLOAT_BYTES * (self.factors.up_Or.numel() + self.factors.down_rK.numel())

    @property
    def gain(self) -> float:
        """The share of its layer's signal that it puts right."""
        return self.lost * self.factors.removed / self.factors.total if self.factors.total else 0.0


def run(graph: Graph, plan: Plan, context: Context, options: Options) -> tuple[Graph, Plan]:
    """Add y += A (B x) to Linear layers that take and give floats, A B near what rounding took from their weights.

    (Yao et al. 2023, ZeroQuant-V2; Zhang et al. 2024, LQER.) Biases are tried as they are, and with the mean that is
    still lost behind the product. The better is kept where the simulated outputs are nearer to the float network's on
    calibration samples held back; `tried` says what came of it, the notes what it costs.
    """
    layers, left = layers_of(graph, plan)
    for reason, names in left.items():
        _tell(context, "left out", f"{listed(names)}: {reason}")
    if not layers:
        if not left:
            _tell(context, "left out", "no Linear layer has quantized weights")
        return graph, plan
    fit, held = parted(context.calibration, graph, SAMPLES)
    real = context.original(graph, plan)
    products = _products(graph, plan, real, context, layers, fit, options)
    products = _worth(products, layers, graph, context, options)
    if not products:
        return graph, plan
    judge = Judge(real, context.arithmetic, held)
    before = judge.error(graph, plan)
    best, kept = before, (graph, plan)
    errors = {}
    for how in ("biases as they are", "biases corrected behind it"):
        if how.startswith("biases corrected") and not any(product.bias is not None for product in products):
            continue
        try:
            found = _with(graph, plan, products, corrected=how.startswith("biases corrected"))
        except BitportError as error:
            _tell(context, "left out", f"nothing can be put beside the layers: {error}")
            return graph, plan
        errors[how] = judge.error(*found)
        if errors[how] < best:
            best, kept = errors[how], found
    said = " and ".join(f"{error:.3g} with {how}" for how, error in errors.items())
    reason = (
        f"{len(products)} layers, rank {_ranks(products)}: error of the simulated outputs {before:.3g} without, "
        f"{said}, on {samples_in(held)} samples held back"
    )
    _tell(context, "kept" if best < before else "left out", reason)
    if best < before:
        context.notes.append(_costs(products, before, best))
    return kept


# ------------------------------------------------------------------------------------------------ which layers


def layers_of(graph: Graph, plan: Plan) -> tuple[list[Layer], dict[str, list[str]]]:
    """The layers that a product can stand beside, in order; and those with narrow weights left out, by reason."""
    layers: list[Layer] = []
    left: dict[str, list[str]] = {}
    readers = uses_of(graph)
    producers = {edge.producer for edge in plan.edges}
    for node in graph.nodes():
        name, op = graph.name(node), graph.op(node)
        weight = op.operands[1].tensor if op.kind == "linear" and op.operands[1] is not None else None
        if weight is None or plan.node(name).kernel is None:
            continue
        tie = plan.edges.get(Edge(weight, name, 1))
        if tie is None or plan.ties[tie].source != "weight":
            continue
        reason = _objection(graph, plan, name, tie, readers[id(graph.tensor(weight))], name in producers)
        if reason is not None:
            left.setdefault(reason, []).append(name)
            continue
        source = op.operands[0]
        assert source is not None and source.node is not None
        stored = -(-storage_bits(graph.tensor(weight).numel(), grid_of(plan.ties[tie])) // 8)
        bias = _own_bias(graph, plan, name, op, readers)
        layers.append(Layer(name, weight, bias, tie, graph.name(source.node), stored))
    return layers, left


def _objection(
    graph: Graph, plan: Plan, name: str, tie: str, readers: int, leaves_integers: bool
) -> str | None:
    """Why nothing is put beside a layer."""
    todo = plan.node(name)
    if todo.mode is None:
        return "it takes and gives integers, which nothing in float can be added to"
    if leaves_integers or todo.absorbs is not None:
        return "what reads it takes integers, whose range was chosen without a product"
    if plan.ties[tie].format.unscaled:
        return f"{plan.ties[tie].format} loses too little"
    if readers > 1:
        return "several operators share its weights"
    if not is_free(graph, name):
        return "something stands beside it already"
    return None


def _own_bias(graph: Graph, plan: Plan, name: str, op: Op, readers: Any) -> str | None:
    """The bias that nobody else reads and that stays float."""
    bias = op.operands[2].tensor if len(op.operands) > 2 and op.operands[2] is not None else None
    if bias is None or readers[id(graph.tensor(bias))] > 1 or Edge(bias, name, 2) in plan.edges:
        return None
    return bias


# ------------------------------------------------------------------------------------------------ what stands there


def _products(
    graph: Graph,
    plan: Plan,
    real: Graph,
    context: Context,
    layers: Sequence[Layer],
    batches: Sequence[Inputs],
    options: Options,
) -> list[_Product]:
    seen = _moments(real, context, layers, batches)
    found = []
    with context.progress.task("decomposing errors", len(layers)) as task:
        for layer in layers:
            weight = real.tensor(layer.weight).detach()
            stored = stored_values(graph, plan, layer.weight, layer.tie)
            moments = seen.get(layer.source)
            scale = moments.root_mean_square() if options.weigh and moments is not None else None
            rank = int(options.rank) if options.rank >= 1 else max(1, round(options.rank * min(weight.shape)))
            factors = compensation(weight.double() - stored.double(), scale, rank)
            signal = weighed_energy(weight, scale)
            bias = None
            if layer.bias is not None and moments is not None:
                mean = moments.moments()[0]
                now = stored.double() + factors.up_Or.double() @ factors.down_rK.double()
                bias = analytic_bias(real.tensor(layer.bias).detach(), weight, now.float(), mean.double(), 1)
            found.append(_Product(layer, factors, factors.total / signal if signal else 0.0, bias))
            task.advance(1)
    return found


def _moments(
    real: Graph, context: Context, layers: Sequence[Layer], batches: Sequence[Inputs]
) -> dict[str, ChannelMoments]:
    """Moments of every input of the layers in the float network, by what they read, where data reaches it."""
    sources = {real.node(name): name for name in dict.fromkeys(layer.source for layer in layers)}
    found: dict[str, ChannelMoments] = {}

    def look(node: fx.Node, value: Any) -> None:
        if node in sources and value.numel():
            found.setdefault(sources[node], ChannelMoments()).update(value.cpu(), -1)

    run = context.float_pass(real)
    with torch.no_grad():
        for inputs in batches:
            run(inputs, look)
    return found


def _worth(
    products: Sequence[_Product], layers: Sequence[Layer], graph: Graph, context: Context, options: Options
) -> list[_Product]:
    """Those that are worth their bytes, in the network's order."""
    sound: list[_Product] = []
    dear: list[_Product] = []
    for product in products:
        saved = FLOAT_BYTES * graph.tensor(product.layer.weight).numel() - product.layer.stored
        if product.gain > 0:
            (sound if product.bytes < saved else dear).append(product)
    lossless = [product.layer.name for product in products if not product.gain > 0]
    if lossless:
        _tell(context, "left out", f"{listed(lossless)}: rounding lost nothing there")
    if dear:
        names = listed([product.layer.name for product in dear])
        _tell(
            context, "left out", f"{names}: the product would take as many bytes as narrow weights have saved"
        )
    if options.budget is None:
        return sound
    most = options.budget * sum(layer.stored for layer in layers)
    taken: set[str] = set()
    for product in sorted(sound, key=lambda one: one.gain / one.bytes, reverse=True):
        if product.bytes <= most:
            most -= product.bytes
            taken.add(product.layer.name)
    beyond = [product.layer.name for product in sound if product.layer.name not in taken]
    if beyond:
        _tell(
            context,
            "left out",
            f"{listed(beyond)}: beyond the budget of {options.budget:g} of the stored weights",
        )
    return [product for product in sound if product.layer.name in taken]


def _with(graph: Graph, plan: Plan, products: Sequence[_Product], *, corrected: bool) -> tuple[Graph, Plan]:
    """A copy with the products beside their layers, and the plan that tells of them."""
    made = graph.clone(sharing=True)
    put_beside(made, {one.layer.name: (one.factors.down_rK, one.factors.up_Or) for one in products})
    nodes = dict(plan.nodes)
    for product in products:
        if corrected and product.bias is not None and product.layer.bias is not None:
            made.set_tensor(product.layer.bias, product.bias)
        reason = f"it makes up in float for what rounding took from {product.layer.name!r}"
        nodes |= {name: NodePlan(reason=reason) for name in names_beside(product.layer.name)}
    ranks = {one.layer.name: len(one.factors.down_rK) for one in products}
    return made, replace(plan, nodes=nodes, low_rank={**plan.low_rank, **ranks})


# ------------------------------------------------------------------------------------------------ words


def _tell(context: Context, outcome: str, reason: str) -> None:
    context.tried.append({"what": WHAT, "outcome": outcome, "reason": reason})


def _ranks(products: Sequence[_Product]) -> str:
    ranks = sorted({len(product.factors.down_rK) for product in products})
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


def _costs(products: Sequence[_Product], before: float, after: float) -> str:
    total = sum(product.bytes for product in products)
    stored = sum(product.layer.stored for product in products)
    return (
        f"{WHAT} of {len(products)} layers lowered the output error from {before:.3g} to {after:.3g}; it takes "
        f"{total:,} bytes beside {stored:,} of their weights, and {total // FLOAT_BYTES:,} multiply-accumulates in "
        "float for each row that they read"
    )
