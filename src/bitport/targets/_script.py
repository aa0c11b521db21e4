"""An artifact's `run.py`: `_runner`, and behind it a runtime's own class; the folder needs nothing of bitport."""

from __future__ import annotations

from pathlib import Path

from . import _runner

FIRST = "class Network("  # of a runtime's own lines
LAST = """
if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:], Network))
"""


def script(own: Path) -> str:
    """The text of `run.py`. own: the runtime's module with the class `Network`."""
    lines = own.read_text(encoding="utf-8")
    parts = (Path(_runner.__file__).read_text(encoding="utf-8"), lines[lines.index(FIRST) :], LAST)
    return "\n\n".join(part.rstrip() + "\n" for part in parts)
