"""What a step is: a file with `Options` (its knobs, a frozen dataclass) and `run`.

    run(graph, plan, context, options) -> (graph, plan)

A step may change the graph it is given (it is a private copy) and returns a changed plan. Everything else it
needs is in the context. After each step the graph's laws are checked, so a failure names its step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from .. import registry
from ..data import Source
from ..errors import BitportError, RecipeError
from ..graph import Graph
from ..plan import Override, Plan
from ..progress import NullProgress, Progress
from ..rules import Ruleset
from ..simulate import Arithmetic


@dataclass
class Context:
    """What steps may use.

    Attributes:
        rules: the target's table.
        arithmetic: the target's rounding.
        calibration: unlabelled batches; its labels, if any, are ignored.
        train, evaluation: labelled batches, where given.
        reference: the float network as loaded.
        overrides: the recipe's exceptions.
        seed: for every random choice; the caller's global generators are never touched.
        notes: sentences for the report; steps append.
        tried: what a step tried, `{what, outcome, reason}`: what was kept, what was left out, and why; steps append.
    """

    rules: Ruleset
    arithmetic: Arithmetic
    calibration: Source
    reference: Graph
    train: Source | None = None
    evaluation: Source | None = None
    overrides: Sequence[Override] = ()
    seed: int = 0
    progress: Progress = field(default_factory=NullProgress)
    notes: list[str] = field(default_factory=list)
    tried: list[dict[str, str]] = field(default_factory=list)


Run = Callable[[Graph, Plan, Context, Any], tuple[Graph, Plan]]


def make(use: str, options: Mapping[str, Any]) -> Callable[[Graph, Plan, Context], tuple[Graph, Plan]]:
    """The step named `use` with its options, ready to run.

    Raises:
        UnknownName: no such step; the known ones are listed.
        RecipeError: an option it doesn't have.
    """
    module: ModuleType = registry.get("steps", use)
    try:
        chosen = module.Options(**options)
    except TypeError as error:
        raise RecipeError(f"step {use!r}: {error}") from error

    def run(graph: Graph, plan: Plan, context: Context) -> tuple[Graph, Plan]:
        try:
            graph, plan = module.run(graph, plan, context, chosen)
            graph.check()
        except BitportError as error:
            error.add_note(f"in step {use!r}")
            raise
        return graph, plan

    return run
