"""What a network holds, and what a target would make of it, before any work is done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from . import registry
from .artifact import make_target
from .errors import TargetError
from .frontends.pytorch import load_module
from .graph import Graph
from .plan import Plan, decide
from .proof import cost
from .proof.integer import SILENT
from .recipe import Recipe
from .steps.quantize import ACTIVATIONS, WEIGHTS
from .targets._base import Target, has_integer_dot_product, host

SMALL = 5_000_000  # MACs: networks around a million measured anything from 0.96 to 2.3 times
FASTER = 3.0  # convolutions of 32 channels and more took 0.22 to 0.41 of float's time on four runtimes
SPEED_SHARE = 0.5  # an integer share of MACs below this seldom makes a network faster


def inspect(graph: Graph, target: str | None = None) -> dict[str, Any]:
    """Layers, parameters and MACs; with a target, what it would run in integers and the speed to expect.

    Nothing is calibrated or exported: the forecast reads the target's rules.
    """
    macs = cost.macs(graph)
    if target is None:
        layers = [
            _layer(graph, name, macs) for name in map(graph.name, graph.nodes()) if _worth(graph, name, macs)
        ]
        return {"layers": layers, "totals": _totals(graph, macs), "notes": list(graph.notes), "host": host()}
    runtime = make_target(target)
    work = graph.clone()
    registry.get("steps", "fold").fold(work, runtime.rules())
    plan = decide(work, runtime.rules(), weights=WEIGHTS, activations=ACTIVATIONS)
    macs = cost.macs(work)
    layers = [
        _layer(work, name, macs, plan) for name in map(work.name, work.nodes()) if _worth(work, name, macs)
    ]
    totals = _totals(work, macs)
    share = sum(macs[name] for name in macs if plan.node(name).kernel) / max(1, sum(macs.values()))
    speed, speedup = _forecast(work, plan, macs, share, runtime)
    return {
        "target": target,
        "layers": layers,
        "totals": {**totals, "mac_share": share},
        "speed": speed,
        "speedup": speedup,
        "notes": list(graph.notes),
        "host": host(),
    }


class _Sample(nn.Module):
    """A layer of each kind whose weights recipes speak of, wide enough for any group."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3)
        self.linear = nn.Linear(256, 256)
        self.embedding = nn.Embedding(16, 256)

    def forward(self, image: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv(image), self.linear(self.embedding(tokens))


@cache
def _sample() -> Graph:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _Sample().eval()
    return load_module(model, (torch.zeros(2, 16, 8, 8), torch.zeros(2, 4, dtype=torch.int64)))


def ways(recipe: Recipe, targets: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What each target would run a recipe's layers with: target → kind of layer → `{kernel, mode, reason}`.

    Read from the target's table with an ordinary layer of each kind; `mode` is "static", "dynamic" or "weights". A
    target that can't hold the recipe's formats has `{"reason": …}` alone. Overrides are left aside. A recipe without
    `quantize` gives no layers.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in targets:
        found[name] = {}
        rules = make_target(name, dict(recipe.target)).rules()
        for step in recipe.steps:
            if step.use != "quantize":
                continue
            weights = WEIGHTS.changed(step.options.get("weights", {}))
            activations = ACTIVATIONS.changed(step.options.get("activations", {}))
            try:
                plan = decide(_sample(), rules, weights=weights, activations=activations)
            except TargetError as error:
                found[name] = {"reason": str(error)}
                break
            for kind in ("conv", "linear", "embedding"):
                todo = plan.node(kind)
                mode = (todo.mode or "static") if todo.kernel else None
                found[name][kind] = {"kernel": todo.kernel, "mode": mode, "reason": todo.reason}
    return found


def _worth(graph: Graph, name: str, macs: Mapping[str, int]) -> bool:
    return name in macs or graph.op(graph.node(name)).kind not in SILENT


def _layer(graph: Graph, name: str, macs: Mapping[str, int], plan: Plan | None = None) -> dict[str, Any]:
    node = graph.node(name)
    op = graph.op(node)
    parameters = sum(
        graph.tensor(o.tensor).numel() for o in op.operands if o is not None and o.tensor is not None
    )
    row: dict[str, Any] = {
        "name": name,
        "op": op.kind,
        "shape": list(graph.shape(node) or ()),
        "parameters": parameters,
        "macs": macs.get(name, 0),
    }
    if plan is not None:
        todo = plan.node(name)
        fused = todo.absorbed_by
        row["kernel"] = todo.kernel or (f"fused into {fused}" if fused else None)
        row["integer"] = bool(todo.kernel or fused)
        row["reason"] = todo.reason
    return row


def _totals(graph: Graph, macs: Mapping[str, int]) -> dict[str, Any]:
    parameters = list(graph.gm.parameters())
    return {
        "parameters": sum(p.numel() for p in parameters),
        "bytes": sum(p.numel() * p.element_size() for p in parameters),
        "macs": sum(macs.values()),
    }


def _forecast(
    graph: Graph, plan: Plan, macs: Mapping[str, int], share: float, runtime: Target
) -> tuple[str, float | None]:
    """What to say of the speed, and the speed-up that is meant; None: anything."""
    if not runtime.executes_integers:
        return "none: it is a simulation", None
    if not has_integer_dot_product():
        return "little: this CPU has no 8-bit dot product (VNNI), so int8 gains mainly size", 1.0
    if share < SPEED_SHARE:
        return f"little or none: only {share:.0%} of the MACs would run in integers", 1.0
    depthwise = sum(
        count for name, count in macs.items()
        if graph.op(graph.node(name)).attrs.get("groups", 1) > 1
    )  # fmt: skip
    if depthwise > 0.1 * max(1, sum(macs.values())):
        return "uncertain: depthwise convolutions are seldom faster in int8; measure it", None
    if sum(macs.values()) < SMALL:
        return "uncertain: the network is so small that overheads decide; measure it", None
    return f"up to about {FASTER:.0f} times ({share:.0%} of the MACs in integers, VNNI present)", FASTER
