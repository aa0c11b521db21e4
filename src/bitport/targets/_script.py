"""An artifact's `run.py`: `_runner` with a runtime's own lines in it, so that the folder needs nothing of bitport."""

from __future__ import annotations

from pathlib import Path

from . import _runner

FIRST = "def load("  # of a runtime's lines, and of those that they take the place of
GAP = "\n\n\n"  # behind a function


def script(own: Path) -> str:
    """The text of `run.py`. own: the runtime's module with `load`."""
    text, lines = Path(_runner.__file__).read_text(encoding="utf-8"), own.read_text(encoding="utf-8")
    before, behind = text.split(FIRST, 1)
    return before + lines[lines.index(FIRST) :].rstrip() + GAP + behind.split(GAP, 1)[1]
