"""What can be tried against one operator's error: a table, each row of which makes another recipe.

A new remedy is a new row. `change` gives the changed recipe, or None where the row has nothing to change: the operator
is like that already, or has no such part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..plan import Plan, TensorPlan
from ..proof.blame import RESULT, WEIGHTS, Unit
from ..recipe import Override, Recipe, StepSpec

_MOVES = ("move", "scaled")
_FLOAT: Mapping[str, Any] = {"format": "float32"}
_PERCENTILE: Mapping[str, Any] = {"use": "percentile", "q": 99.9}


@dataclass(frozen=True)
class Case:
    """What a remedy is for: the unit, and the plan that it is a part of."""

    unit: Unit
    plan: Plan

    @property
    def weight(self) -> TensorPlan | None:
        """The tie of its weight."""
        ties = (self.plan.ties[self.plan.edges[edge]] for edge in self.unit.weights)
        return next((tie for tie in ties if tie.source == "weight"), None)

    @property
    def result(self) -> TensorPlan | None:
        """The tie of its result."""
        return self.plan.ties[self.plan.edges[self.unit.result[0]]] if self.unit.result else None

    @property
    def operators(self) -> list[str]:
        """Its operators: itself and the ReLU that it absorbed; an input has none."""
        return [] if self.unit.op == "input" else list(dict.fromkeys((self.unit.name, self.unit.head)))

    def sharing(self) -> list[str]:
        """Operators whose results have the same parameters: whatever a recipe says of one of them holds for all."""
        tie = self.plan.edges[self.unit.result[0]]
        return [name for name in self.plan.nodes if self.plan.tie_of(name) == tie]

    def readers(self) -> list[str]:
        """Operators that compute on its result, behind any moves."""
        found: dict[str, None] = {}
        seen, waiting = set[str](), [self.unit.head]
        while waiting:
            producer = waiting.pop()
            for edge in self.plan.edges:
                if edge.producer == producer and edge.consumer not in {"output", *seen}:
                    seen.add(edge.consumer)
                    if self.plan.node(edge.consumer).role in _MOVES:
                        waiting.append(edge.consumer)
                    else:
                        found |= dict.fromkeys(
                            (edge.consumer, self.plan.node(edge.consumer).absorbs or edge.consumer)
                        )
        return list(found)


Change = Callable[[Recipe, Case], Recipe | None]


@dataclass(frozen=True)
class Remedy:
    """One row.

    Attributes:
        what: in words, for tables and notes.
        part: which of the unit's errors it is for: "weights", "result", or "" for both.
        change: see the file's first lines.
    """

    what: str
    part: str
    change: Change

    def fits(self, parts: tuple[str, ...]) -> bool:
        return not self.part or self.part in parts


def pattern(name: str) -> str:
    """The pattern that matches this name and no other."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _with(
    recipe: Recipe,
    names: list[str],
    weights: Mapping[str, Any] | None = None,
    activations: Mapping[str, Any] | None = None,
) -> Recipe | None:
    more = tuple(Override(match=pattern(name), weights=weights, activations=activations) for name in names)
    return replace(recipe, overrides=(*recipe.overrides, *more)) if more else None


def _weights(holds: Callable[[TensorPlan], bool], **options: Any) -> Change:
    """Other options of its weights, unless they hold already."""

    def change(recipe: Recipe, case: Case) -> Recipe | None:
        tie = case.weight
        return None if tie is None or holds(tie) else _with(recipe, [case.unit.name], weights=options)

    return change


def _result(holds: Callable[[TensorPlan], bool], **options: Any) -> Change:
    """Other options of its result, where data decides it, unless they hold already."""

    def change(recipe: Recipe, case: Case) -> Recipe | None:
        tie = case.result
        if tie is None or tie.source != "measured" or holds(tie):
            return None
        said = any(override.activations is not None for override in recipe.overrides)
        names = case.sharing() if said and case.operators else case.operators
        return _with(recipe, list(dict.fromkeys((*case.operators, *names))), activations=options)

    return change


def _every_result(holds: Callable[[TensorPlan], bool], **options: Any) -> Change:
    """Other options of all activations, for an input: no override can name one."""

    def change(recipe: Recipe, case: Case) -> Recipe | None:
        tie = case.result
        if case.operators or tie is None or tie.source != "measured" or holds(tie):
            return None
        steps = [
            replace(
                step,
                options={**step.options, "activations": {**step.options.get("activations", {}), **options}},
            )
            if step.use == "quantize"
            else step
            for step in recipe.steps
        ]
        return replace(recipe, steps=tuple(steps))

    return change


def _step(use: str, behind: tuple[str, ...]) -> Change:
    """One more step, behind the last of those that are named; it looks at the whole network."""

    def change(recipe: Recipe, case: Case) -> Recipe | None:
        uses = [step.use for step in recipe.steps]
        places = [index for index, known in enumerate(uses) if known in behind]
        if use in uses or not places or case.weight is None:
            return None
        steps = list(recipe.steps)
        steps.insert(places[-1] + 1, StepSpec(use))
        return replace(recipe, steps=tuple(steps))

    return change


def _stored(**options: Any) -> Change:
    """Another format of its result, which it is stored in between float operators."""

    def change(recipe: Recipe, case: Case) -> Recipe | None:
        return _with(recipe, case.operators, activations=options) if case.result is not None else None

    return change


def _decoded(recipe: Recipe, case: Case) -> Recipe | None:
    if case.weight is None or case.weight.format.bits >= 16:
        return None
    return _in_float(recipe, case, case.operators, {"format": "float16"})


def _float(recipe: Recipe, case: Case) -> Recipe | None:
    return _in_float(recipe, case, case.operators)


def _float_with_readers(recipe: Recipe, case: Case) -> Recipe | None:
    names = case.readers() if case.result is not None else []
    return _in_float(recipe, case, [*case.operators, *names]) if names else None


def _in_float(
    recipe: Recipe, case: Case, names: list[str], weights: Mapping[str, Any] = _FLOAT
) -> Recipe | None:
    """Operators computed in float; those that have weights store them as `weights` says."""
    heavy = {edge.consumer for edge, tie in case.plan.edges.items() if case.plan.ties[tie].source == "weight"}
    for name in dict.fromkeys(names):
        more = Override(pattern(name), activations=_FLOAT, weights=weights if name in heavy else None)
        recipe = replace(recipe, overrides=(*recipe.overrides, more))
    return recipe if names else None


def _range(spec: str | Mapping[str, Any]) -> Callable[[TensorPlan], bool]:
    return lambda tie: tie.range == spec


REMEDIES: tuple[Remedy, ...] = (
    Remedy("range of its result: extremes of the data", RESULT, _result(_range("minmax"), range="minmax")),
    Remedy("range of its result: least squared error", RESULT, _result(_range("mse"), range="mse")),
    Remedy(
        "range of its result: 99.9 % of the data", RESULT, _result(_range(_PERCENTILE), range=_PERCENTILE)
    ),
    Remedy("result asymmetric", RESULT, _result(lambda tie: not tie.format.symmetric, symmetric=False)),
    Remedy("ranges of all results: extremes", RESULT, _every_result(_range("minmax"), range="minmax")),
    Remedy("ranges of all results: least squared error", RESULT, _every_result(_range("mse"), range="mse")),
    Remedy(
        "weights: a scale per channel",
        WEIGHTS,
        _weights(lambda tie: tie.format.granularity in ("channel", "group"), granularity="channel"),
    ),
    Remedy("weights: range by least squared error", WEIGHTS, _weights(_range("mse"), range="mse")),
    Remedy("weights: range of the extremes", WEIGHTS, _weights(_range("minmax"), range="minmax")),
    Remedy("weights asymmetric", WEIGHTS, _weights(lambda tie: not tie.format.symmetric, symmetric=False)),
    Remedy(
        "weights: a scale per 32 values",
        WEIGHTS,
        _weights(lambda tie: (tie.format.group or 64) <= 32, granularity="group", group=32),
    ),
    Remedy("scales moved between layers (equalize)", "", _step("equalize", ("calibrate",))),
    Remedy(
        "weights rounded on what they read (gptq)",
        WEIGHTS,
        _step("gptq", ("calibrate", "equalize", "reconstruct")),
    ),
    Remedy("rounding learned (reconstruct)", "", _step("reconstruct", ("calibrate", "equalize"))),
    Remedy("result in 16 bits", RESULT, _stored(format="int16")),
    Remedy("weights in 16 bits, computed in float", "", _decoded),
    Remedy("this layer in float", "", _float),
    Remedy("this layer and those that read it in float", RESULT, _float_with_readers),
)
"""The table, from the cheapest remedy to the dearest; of two that cost alike the first is preferred."""
