"""What a step is: a file with `Options` (its knobs, a frozen dataclass) and `run`.

    run(graph, plan, context, options) -> (graph, plan)

A step may change the graph it is given (it is a private copy) and returns a changed plan. Everything else it
needs is in the context. After each step the graph's laws are checked, so a failure names its step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from .. import registry
from ..data import Source
from ..errors import BitportError, RecipeError, first_line
from ..graph import Graph
from ..plan import Override, Plan
from ..plan.rescaled import counterpart
from ..progress import NullProgress, Progress
from ..rules import Ruleset
from ..simulate import Arithmetic

OnValue = Callable[[fx.Node, Any], Any]


class Memo(Protocol):
    """What a step has finished inside itself, so that a run that was stopped there doesn't do it twice."""

    def found(self, key: str) -> Mapping[str, Tensor] | None:
        """What was kept under a key, to the bit; None where nothing was."""
        ...

    def keep(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under a key. May raise Interrupted, where somebody asked the run to stop."""
        ...


class NoMemo:
    """Nothing is kept."""

    def found(self, key: str) -> None:
        """Nothing."""

    def keep(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Nothing is done."""


@dataclass
class Context:
    """What steps may use.

    Attributes:
        rules: the target's table.
        arithmetic: the target's rounding, made `rough`: a step weighs errors that are far above a float's last bit.
        calibration: unlabelled batches; its labels, if any, are ignored.
        train, evaluation: labelled batches, where given.
        reference: the float network as loaded.
        overrides: the recipe's exceptions.
        device: where float passes run, as torch names it; integers are decided on the CPU all the same.
        seed: for every random choice; the caller's global generators are never touched.
        notes: sentences for the report; steps append.
        memo: where a step keeps what it has finished of its layers.
        tried: what a step tried, `{what, outcome, reason}`: what was kept, what was left out, and why; steps append.
        pace: (graph, plan) → `proof.cost.latency` of the original's file and that one's on the runtime; None where
            there is no runtime to measure.
        ahead: the steps that will run behind this one, `(name, options)`, so that a choice can be judged by what they
            will make of it.
    """

    rules: Ruleset
    arithmetic: Arithmetic
    calibration: Source
    reference: Graph
    train: Source | None = None
    evaluation: Source | None = None
    overrides: Sequence[Override] = ()
    device: str = "cpu"
    seed: int = 0
    progress: Progress = field(default_factory=NullProgress)
    notes: list[str] = field(default_factory=list)
    tried: list[dict[str, str]] = field(default_factory=list)
    memo: Memo = field(default_factory=NoMemo)
    pace: Callable[[Graph, Plan], Mapping[str, Any]] | None = None
    ahead: Sequence[tuple[str, Mapping[str, Any]]] = ()
    _folded: Graph | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.arithmetic = self.arithmetic.rough()

    def remember_folded(self, graph: Graph) -> None:
        """Keep the float network as `fold` leaves it; the tensors are shared until a step replaces its own."""
        self._folded = graph.clone(sharing=True)

    def reference_like(self, graph: Graph) -> Graph:
        """The float network in the form of `graph`: folded where that is, its own weights."""
        if graph.stage == self.reference.stage:
            return self.reference
        if self._folded is None:
            self._folded = self.reference.clone(sharing=True)
            registry.get("steps", "fold").fold(self._folded, self.rules)
        return self._folded

    def original(self, graph: Graph, plan: Plan) -> Graph:
        """The float network that `graph` under `plan` stands for, operator by operator, with its own weights.

        Steps that choose weights change them in the graph: what they leave is no float network to compare with. Where
        a step gave the network other operators there is no such network, and `graph` itself is returned.
        """
        base = self.reference_like(graph)
        if not plan.low_rank and _layout(base) != _layout(graph):
            return graph
        twin = counterpart(base, plan)
        return twin if not plan.low_rank or _layout(twin) == _layout(graph) else graph

    def float_pass(self, graph: Graph) -> Callable[[Sequence[Tensor], OnValue], tuple[Tensor, ...]]:
        """A function that runs a float graph on the device: (inputs, on_value) → flat outputs, as `Graph.run`.

        `on_value` is told the nodes of the graph that was given; its values and the outputs are on the device.
        """
        if self.device == "cpu":
            return lambda inputs, on_value: graph.run(*inputs, on_value=on_value)
        twin = graph.to(self.device)
        twin.gm.eval()
        original = dict(zip(twin.gm.graph.nodes, graph.gm.graph.nodes, strict=True))

        def run(inputs: Sequence[Tensor], on_value: OnValue) -> tuple[Tensor, ...]:
            # tensor cores round float32 to 10 bits unless told not to, which would move every range
            with torch.backends.cudnn.flags(allow_tf32=False):
                moved = [value.to(self.device) for value in inputs]
                return twin.run(*moved, on_value=lambda node, value: on_value(original[node], value))

        return run


def _layout(graph: Graph) -> list[tuple[str, str]]:
    nodes = graph.gm.graph.nodes
    tensors = [(str(tuple(tensor.shape)), name) for name, tensor in graph.gm.named_parameters()]
    return [(node.op, graph.name(node)) for node in nodes if node.op != "output"] + sorted(tensors)


def usable_device(device: str | None) -> str:
    """The device's name, tried out. Raises RecipeError where torch has none such here."""
    try:
        return str(torch.ones(1, device=device or "cpu").device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RecipeError(
            f"device = {device!r} can't be used here ({first_line(error)}): leave it out to calibrate on the CPU"
        ) from error


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
