"""Even out channels before they are rounded: scales move between layers, and from norms into the layers behind them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import RecipeError
from ..graph import Graph
from ..graph.pairs import Chain, find, move, move_all, ranges
from ..numerics.equalize import LARGEST, layer_scales, salience_scales, smoothing_scales, spread
from ..plan import Plan
from ._base import Context
from ._judge import Inputs, parted
from ._rewritten import SAMPLES, nearer, reasons, tell

SPREAD = 4.0  # scales of ordinary layers stay within it of their median: nothing to gain there
SETTLED = 1.01  # two layers are even
SWEEPS = 30  # depthwise layers pass a scale on from both sides
FAR = 12.0  # normal numbers reach five times a norm's usual gain; far beyond is a channel of outliers
WORTHLESS = 0.5  # outputs that err this much rank nothing: even channels are then taken for what comes behind

NARROW = 4  # bits of weights up to which the weights of loud inputs are made larger
SALIENCE, TIMES = 0.25, 3  # power of an input's mean magnitude; as often as it helps, three times at most

LAYERS, NORMS = "equalization across layers", "scales moved out of norms"
SALIENT = "weights scaled by their inputs' magnitudes"
NOTHING_BEHIND = "no layer or norm has another layer behind it"


@dataclass(frozen=True)
class Options:
    """Knobs of `equalize`.

    smooth: also move scales from norms into the layers that read them. alpha: how much of the activations' spread goes
    into the weights there, from 0 to 1. batches: as `calibrate`, which runs again.
    """

    smooth: bool = True
    alpha: float = 0.5
    batches: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise RecipeError(f"alpha is {self.alpha}; expected a number from 0 to 1")


def run(graph: Graph, plan: Plan, context: Context, options: Options) -> tuple[Graph, Plan]:
    """Move scales per channel where their ranges differ much (Nagel et al. 2019, Xiao et al. 2023).

    The float function stays; weights are fitted and activations measured again, for the same formats. Layers and norms
    are tried one after the other: the result is compared with what it was made of on calibration batches that the
    scales haven't seen, and the better is kept, said in `tried`. Where ranges are alike nothing runs.

    Where weights of few bits meet float activations, norms' scales also move by how loud their channels are on average
    (Lin et al. 2023, AWQ), a little at a time, as long as it helps.

    Raises GraphError before `calibrate`.
    """
    if not plan.quantized:
        tell(context, LAYERS, "left out", "nothing is quantized")
        return graph, plan
    for tie in plan.measured().values():
        tie.parameters()
    chains, refused = find(graph)
    chains = [chain for chain in chains if _is_rounded(chain, plan)]
    layers = [chain for chain in chains if not chain.norm]
    norms = [chain for chain in chains if chain.norm and options.smooth]
    if not layers and not norms:
        tell(
            context,
            LAYERS,
            "left out",
            f"no scale can move: {reasons(refused, 'behind {!r}', NOTHING_BEHIND)}",
        )
        return graph, plan
    if any(_spread(graph, chain) >= SPREAD for chain in layers):
        graph, plan = _kept(LAYERS, graph, plan, _even(graph, layers), context, options)
    elif layers:
        tell(context, LAYERS, "left out", _alike(len(layers), "pairs of layers"))
    uneven = [chain for chain in norms if _has_outliers(graph, plan, chain)]
    if uneven:
        graph, plan = _kept(NORMS, graph, plan, None, context, options, uneven)
    elif norms:
        tell(context, NORMS, "left out", _alike(len(norms), "norms"))
    salient = [chain for chain in norms if _stores_narrow_weights(chain, plan)]
    for _ in range(TIMES if salient else 0):
        before = plan
        learnt, _ = parted(context.calibration, graph, SAMPLES)
        scales = _salient(graph, salient, context, learnt)
        graph, plan = _kept(SALIENT, graph, plan, scales, context, options)
        if plan is before:
            break
    return graph, plan


# ------------------------------------------------------------------------------------------------ which scales


def _is_rounded(chain: Chain, plan: Plan) -> bool:
    return any(plan.node(end.name).kernel is not None for end in chain.ends)


def _spread(graph: Graph, chain: Chain) -> float:
    return spread(layer_scales(*ranges(graph, chain)))


def _has_outliers(graph: Graph, plan: Plan, chain: Chain) -> bool:
    """Whether a norm's gains are far apart, or its measured range is far beyond what they explain."""
    gain = ranges(graph, chain)[0]
    alive = gain[gain > 0]
    if not alive.numel():
        return False
    if float(alive.max() / alive.median()) >= SPREAD:
        return True
    name = plan.tie_of(chain.name)
    if name is None or plan.ties[name].scale is None or plan.ties[name].format.is_float:
        return False
    scale, zero_point = plan.ties[name].parameters()
    fmt = plan.ties[name].format
    reach = float(scale) * max(fmt.high - int(zero_point), int(zero_point) - fmt.low)
    return reach >= FAR * float(alive.median())


def _even(graph: Graph, chains: Sequence[Chain]) -> dict[str, Tensor]:
    """The scales after which both sides of every spread pair have one range, float64 [C] by producer.

    Pairs share depthwise layers, so they take turns until nothing moves.
    """
    twin = graph.clone()
    found: dict[str, Tensor] = {}
    for _ in range(SWEEPS):
        still = True
        for chain in chains:
            scales = layer_scales(*ranges(twin, chain))
            if spread(scales) < (SETTLED if chain.name in found else SPREAD):
                continue
            move(twin, chain, scales)
            found[chain.name] = found.get(chain.name, torch.ones_like(scales)) * scales
            still = False
        if still:
            break
    return {name: scales.clamp(1 / LARGEST, LARGEST) for name, scales in found.items()}


def _stores_narrow_weights(chain: Chain, plan: Plan) -> bool:
    """Whether all that reads a norm are layers of few bits whose activations stay float."""
    for end in chain.readers:
        tie = next((plan.ties[tie] for edge, tie in plan.edges.items() if edge.producer == end.weight), None)
        if (
            plan.node(end.name).mode != "weights"
            or tie is None
            or not tie.format.is_int
            or tie.format.bits > NARROW
        ):
            return False
    return True


def _salient(
    graph: Graph, chains: Sequence[Chain], context: Context, batches: Sequence[Inputs]
) -> dict[str, Tensor]:
    """The scales that make the weights of loud inputs larger than those beside them, so that rounding loses less."""
    means = _seen(graph, chains, context, batches, lambda channels: channels.mean(1))
    return {name: salience_scales(mean, SALIENCE) for name, mean in means.items()}


def _smooth(
    graph: Graph, chains: Sequence[Chain], context: Context, batches: Sequence[Inputs], alpha: float
) -> dict[str, Tensor]:
    """The scales that divide norms' outputs, from their largest magnitudes on some batches."""
    seen = _seen(graph, chains, context, batches, lambda channels: channels.amax(1))
    return {
        chain.name: smoothing_scales(seen[chain.name], ranges(graph, chain)[1], alpha) for chain in chains
    }


def _seen(
    graph: Graph,
    chains: Sequence[Chain],
    context: Context,
    batches: Sequence[Inputs],
    of: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """What `of` says of the magnitudes [C, N] of each chain's channels, the largest over the batches, float64 [C]."""
    by_name = {chain.name: chain for chain in chains}
    by_node = {node: by_name[graph.name(node)] for node in graph.nodes() if graph.name(node) in by_name}
    seen: dict[str, Tensor] = {}

    def look(node: fx.Node, value: Any) -> None:
        if node in by_node:
            chain = by_node[node]
            found = of(value.detach().movedim(chain.axis, 0).flatten(1).abs()).double().cpu()
            seen[chain.name] = torch.maximum(seen.get(chain.name, found), found)

    run = context.float_pass(graph)
    with torch.no_grad():
        for inputs in batches:
            run(inputs, look)
    return seen


# ------------------------------------------------------------------------------------------------ which is better


def _kept(
    what: str,
    graph: Graph,
    plan: Plan,
    scales: dict[str, Tensor] | None,
    context: Context,
    options: Options,
    norms: Sequence[Chain] = (),
) -> tuple[Graph, Plan]:
    """The graph and plan with the scales moved, or those that were given: whichever errs less."""
    learnt, judged = parted(context.calibration, graph, SAMPLES)
    if scales is None:
        scales = _smooth(graph, norms, context, learnt, options.alpha)
    moved = graph.clone()
    move_all(moved, scales)
    recorded = replace(plan, rescaled=_joined(plan.rescaled, scales))
    return nearer(
        what,
        graph,
        plan,
        moved,
        recorded,
        graph,
        context,
        judged,
        batches=options.batches,
        where=f"; scales behind {len(scales)} layers",
        worthless=WORTHLESS,
    )


def _joined(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {**old, **{name: scales * old.get(name, 1.0) for name, scales in new.items()}}


def _alike(count: int, of: str) -> str:
    return f"ranges are alike: the channels of {count} {of} lie within {SPREAD:g} times of their median"
