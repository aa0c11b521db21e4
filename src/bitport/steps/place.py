"""Integers only where they are faster: else float arithmetic on weights that stay narrow in the file.

Depthwise convolutions and gates gain little from 8 bits, and what quantizes around them costs; which side wins only
the runtime on the machine itself tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import RecipeError
from ..graph import Graph
from ..plan import Plan
from ..plan.decoded import decoded
from ._base import Context

WHAT = "integer arithmetic"
REASON = "integers are slower than float here, as measured: its weights are stored narrow and computed with in float"


@dataclass(frozen=True)
class Options:
    """Knobs of `place`.

    at_least: the speed-up over the float network that integers must reach.
    """

    at_least: float = 1.0


def run(graph: Graph, plan: Plan, context: Context, options: Options) -> tuple[Graph, Plan]:
    """Measure the network on the runtime, and give its integers up where they don't reach `at_least`.

    The decision is this machine's: times that are near the limit may fall on either side.

    Raises RecipeError where nothing can be measured: no runtime, or an option that is no speed-up.
    """
    if not 0 < options.at_least < 1000:
        raise RecipeError(f"place: at_least = {options.at_least}: give a speed-up, such as 1.0")
    if context.pace is None:
        raise RecipeError(
            f"place: {plan.target} is a simulation: there is nothing to measure; leave the step out"
        )
    if not any(node.kernel is not None and node.mode is None for node in plan.nodes.values()):
        return graph, plan
    timed = context.pace(graph, plan)
    told = f"{_speed(timed)} with it"
    if timed["ci95"][1] >= options.at_least:
        context.tried.append({"what": WHAT, "outcome": "kept", "reason": told})
        return graph, plan
    found = decoded(plan, graph, context.rules, REASON)
    without = context.pace(graph, found)
    slower = without["speedup"] <= timed["speedup"]
    context.tried.append(
        {
            "what": WHAT,
            "outcome": "kept" if slower else "left out",
            "reason": f"{told}, {_speed(without)} from narrow weights in float",
        }
    )
    if slower:
        return graph, plan
    context.notes.append(
        f"{plan.target} runs this network's integers slower than float on this processor ({_speed(timed)}), so its "
        f"weights are stored in integers and computed with in float ({_speed(without)})"
    )
    return graph, found


def _speed(timed: Mapping[str, Any]) -> str:
    low, high = timed["ci95"]
    return f"{timed['speedup']:.2f} ({low:.2f} … {high:.2f}) times as fast as the float network"
