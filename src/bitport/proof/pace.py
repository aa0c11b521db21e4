"""The speed of two files of one runtime, and of a network that is still being made against its original."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..graph import Graph
from ..plan import Plan
from ..plan.constants import on_grid
from ..targets._base import Target
from . import cost


def between(
    target: Target, first: Path, second: Path, inputs: Sequence[Tensor], **options: Any
) -> dict[str, Any]:
    """`cost.latency` of two folders' models on the same inputs; options: its own. Raises TargetError."""
    sessions = [target.open(folder) for folder in (first, second)]
    feeds = [session.prepared(inputs) for session in sessions]
    return cost.latency(
        lambda: sessions[0].run_prepared(feeds[0]),
        lambda: sessions[1].run_prepared(feeds[1]),
        threads=int(target.options.get("threads", 1)),
        batch=len(inputs[0]) if inputs[0].dim() else 1,
        **options,
    )


class Pace:
    """How fast what a step has made would be on the runtime, against the original.

    Args:
        original: the float network as loaded.
        inputs: one sample.
    """

    def __init__(self, target: Target, original: Graph, inputs: Sequence[Tensor]) -> None:
        self.target, self.original, self.inputs = target, original, inputs
        self._made: tempfile.TemporaryDirectory[str] | None = None  # the original's file, once it is wanted

    def __call__(self, graph: Graph, plan: Plan) -> dict[str, Any]:
        """`cost.latency` of the original's file and of this one's. Raises ExportError, TargetError."""
        if self._made is None:
            self._made = tempfile.TemporaryDirectory()
            self.target.export(self.original, Plan.empty(self.target.name), Path(self._made.name))
        work = graph.clone()
        on_grid(work, plan)
        with tempfile.TemporaryDirectory() as scratch:
            self.target.export(work, plan, Path(scratch))
            return between(self.target, Path(self._made.name), Path(scratch), self.inputs)

    def close(self) -> None:
        """Delete what was written."""
        if self._made is not None:
            self._made.cleanup()
