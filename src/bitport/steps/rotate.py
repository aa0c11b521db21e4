"""Spread outliers of a transformer's residual stream over all its channels: a rotation merged into the weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import GraphError
from ..graph import Graph
from ..graph.streams import Stream, find, turn
from ..numerics.rotation import random_signs
from ..plan import Plan
from ..plan.rescaled import counterpart
from ._base import Context, NoMemo, make
from ._judge import parted
from ._rewritten import SAMPLES, nearer, reasons, tell

STREAMS = "rotation of residual streams"
# what a rotation gains shows behind them: in narrow weights it trades errors along few directions, which correcting
# biases and solving for weights take back, for errors along all
FINISHING = ("gptq", "correct_bias")


@dataclass(frozen=True)
class Options:
    """Knobs of `rotate`. batches: as `calibrate`, which runs again."""

    batches: int | None = None


def run(graph: Graph, plan: Plan, context: Context, options: Options) -> tuple[Graph, Plan]:
    """Rotate each residual stream by a random Hadamard matrix (Ashkboos et al. 2024, QuaRot).

    Layers that write into it and layers that read it take the matrix up, norms' gains go into the layers behind them:
    the float function stays and no operator is added. Weights are fitted and activations measured again, for the same
    formats. A stream stays rotated only where the simulated outputs are nearer to the float network's on calibration
    batches held back, behind `gptq` and `correct_bias` where those are ahead; `tried` says which, and of a network
    without such a stream why.

    Raises GraphError before `calibrate`.
    """
    if not plan.quantized:
        tell(context, STREAMS, "left out", "nothing is quantized")
        return graph, plan
    for tie in plan.measured().values():
        tie.parameters()
    if plan.low_rank:
        why = "products stand beside layers already, which make up for weights as they are: put it in front of them"
        tell(context, STREAMS, "left out", why)
        return graph, plan
    streams, refused = find(graph)
    if not streams:
        why = reasons(refused, "in front of {!r}:", "there is no norm over channels")
        tell(context, STREAMS, "left out", f"none can be rotated: {why}")
    for index, stream in enumerate(streams):
        graph, plan = _rotated(index, stream, graph, plan, context, options)
    return graph, plan


def _rotated(
    index: int, stream: Stream, graph: Graph, plan: Plan, context: Context, options: Options
) -> tuple[Graph, Plan]:
    stored = {edge.producer for edge in plan.edges}
    what = f"{STREAMS}: in front of {stream.name!r}"
    if stream.name in plan.rotated:
        tell(context, what, "left out", "it is rotated already")
        return graph, plan
    if not any(part.tensor in stored for part in stream.parts):
        tell(context, what, "left out", "no weight around it is quantized")
        return graph, plan
    signs = random_signs(stream.width, context.seed + index)
    moved = graph.clone()
    turn(moved, stream, signs)
    # gains that scales were moved out of are ones now: what they were no longer matters
    gone = {norm.name for norm in stream.norms}
    rescaled = {name: scales for name, scales in plan.rescaled.items() if name not in gone}
    recorded = replace(plan, rescaled=rescaled, rotated={**plan.rotated, stream.name: signs})
    try:
        counterpart(context.reference_like(graph), recorded)
    except GraphError as error:
        tell(context, what, "left out", f"the network as loaded can't be rotated alike: {error}")
        return graph, plan
    _, judged = parted(context.calibration, graph, SAMPLES)
    finishing = [(use, chosen) for use, chosen in context.ahead if use in FINISHING]

    def finish(graph: Graph, plan: Plan, scratch: Context) -> tuple[Graph, Plan]:
        scratch.memo = NoMemo()
        for use, chosen in finishing:
            graph, plan = make(use, chosen)(graph, plan, scratch)
        return graph, plan

    behind = f", behind {' and '.join(use for use, _ in finishing)}" if finishing else ""
    return nearer(
        what,
        graph,
        plan,
        moved,
        recorded,
        context.original(graph, plan),
        context,
        judged,
        batches=options.batches,
        where=f"{behind}; {len(stream.parts)} weights around {stream.width} channels",
        finish=finish,
    )
