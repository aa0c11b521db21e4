"""Recipes that are tried: from the float network through the steps to the runtime's file, and what that computes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import api
from ..artifact import Artifact
from ..checkpoint import Checkpoint, State, run_steps
from ..data import Source
from ..errors import DataError
from ..graph import Graph
from ..plan import Plan
from ..progress import Progress
from ..proof import cost, pace
from ..proof.blame import halves, relative_error, take
from ..proof.measure import one_sample
from ..recipe import Recipe
from ..records import absent, dumps
from ..simulate import Simulator
from ..steps import _base as steps

SAMPLES = 64  # of the data, half of them to choose by and half to confirm with
NOT_SLOWER = 0.98  # two runs of one program differ by 1–2 %
SECONDS, ROUNDS = 0.5, 16  # of timing one remedy
_SMALLEST = 1e-20


@dataclass(frozen=True)
class Trial:
    """A recipe and what came of it: graph and plan, the folder of its model file.

    simulated, error: how far the outputs are from the float ones (`blame.relative_error`), in the simulation and on
    the runtime.
    """

    recipe: Recipe
    graph: Graph
    plan: Plan
    folder: Path
    simulated: float
    error: float


class Bench:
    """Runs recipes on an artifact's float network and holds them against it.

    Args:
        opened: the artifact.
        data: what ranges are taken from. Half of its first samples choose; the others confirm, unless there is
            evaluation data.
        evaluation: None, or data that confirms.
        scratch: a folder for the files.

    Raises DataError where the data is unusable, or too little to choose and to confirm.
    """

    def __init__(
        self, opened: Artifact, data: Any, evaluation: Any, scratch: Path, progress: Progress
    ) -> None:
        self.opened, self.scratch, self.progress = opened, scratch, progress
        self.original, self.target = opened.original, opened.target
        self.source = self._source(data, "calibration", "ignored")
        taken = take(self.original, (batch.inputs for batch in self.source), SAMPLES)
        self.choosing, self.confirming = halves(self.original, taken)
        self.judged: Source | None = None
        if evaluation is not None:
            self.judged = self._source(evaluation, "evaluation", "optional")
            self.confirming = take(self.original, (batch.inputs for batch in self.judged), SAMPLES // 2)
        if not self.confirming:
            raise DataError("one sample can't both choose and confirm: give more data, or evaluation data")
        self._wanted = self.floats(self.choosing)
        self._number = 0

    def _source(self, data: Any, role: str, labels: str) -> Source:
        return api.source(data, self.original, self.opened.recipe, role, labels)

    def floats(self, batches: Sequence[Sequence[Tensor]]) -> list[tuple[Tensor, ...]]:
        """Outputs of the float network."""
        self.original.gm.eval()
        with torch.no_grad():
            return [self.original.run(*inputs) for inputs in batches]

    def as_it_is(self) -> Trial:
        """The artifact itself: nothing is run again but its file."""
        opened = self.opened
        state = State(0, opened.graph, opened.plan, (), {})
        found = relative_error(self._wanted, map(opened.session.run, self.choosing))
        return Trial(opened.recipe, opened.graph, opened.plan, opened.path, self.simulated(state), found)

    def steps(self, recipe: Recipe) -> State:
        """What a recipe's steps make of the float network. Raises as they do."""
        self._number += 1
        recipe.check()
        measured = pace.Pace(self.target, self.original, one_sample(self.original, self.choosing[0]))
        context = steps.Context(
            rules=self.target.rules(),
            arithmetic=self.target.arithmetic(),
            calibration=self.source,
            reference=self.original,
            overrides=recipe.overrides,
            seed=int(self.opened.manifest.get("seed") or 0),
            pace=measured,
        )
        kept = Checkpoint(self.scratch / str(self._number), dict)
        with contextlib.closing(measured):
            return run_steps(self.original, recipe.expand(), self.target, context, kept)[0]

    def simulated(self, state: State) -> float:
        """How far the simulated outputs are from the float ones."""
        simulator = Simulator(state.graph, state.plan, self.target.arithmetic())
        return relative_error(self._wanted, map(simulator.run, self.choosing))

    def deployed(self, recipe: Recipe, state: State, simulated: float | None = None) -> Trial:
        """The runtime's file of a state, and its outputs. Raises TargetError."""
        folder = self.scratch / f"{self._number}.model"
        folder.mkdir()
        self.target.export(state.graph, state.plan, folder)
        found = relative_error(self._wanted, map(self.target.open(folder).run, self.choosing))
        simulated = self.simulated(state) if simulated is None else simulated
        return Trial(recipe, state.graph, state.plan, folder, simulated, found)

    def costs(self, row: dict[str, Any], before: Trial, after: Trial) -> bool:
        """Put `bytes` and `ms` (differences), `of_bytes` and `of_ms` (before) into a row; whether it got slower for
        certain."""
        row |= dict.fromkeys(("of_bytes", "of_ms"))
        if not self.target.executes_integers:
            for key in ("bytes", "ms"):
                absent(row, key, f"{self.target.name} is a simulation: nothing was deployed")
            return False
        found = cost.sizes(before.folder, after.folder)
        row["bytes"], row["of_bytes"] = found["compressed_bytes"] - found["float_bytes"], found["float_bytes"]
        inputs = one_sample(self.original, self.choosing[0])
        timed = pace.between(self.target, before.folder, after.folder, inputs, seconds=SECONDS, rounds=ROUNDS)
        row["ms"], row["of_ms"] = timed["compressed_ms"] - timed["float_ms"], timed["float_ms"]
        return bool(timed["ci95"][1] < NOT_SLOWER)


def fingerprint(graph: Graph, plan: Plan) -> tuple[str, str]:
    """Equal for states that compute the same."""
    return dumps(plan.to_record()), graph.digest()


def decibel(error: float) -> float:
    """An error as a ratio of signal to noise, at most 200 dB either way."""
    return -10 * math.log10(min(max(error, _SMALLEST), 1 / _SMALLEST))


def gain_db(before: float, after: float) -> float:
    return decibel(after) - decibel(before)
