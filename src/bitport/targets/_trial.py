"""A file that this process didn't write is tried in another first: some runtimes trust what they read.

A damaged or hostile file ends the process that runs it. What dies with the trial is only the trial.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..apart import apart
from ..errors import LoadError, TargetError

SECONDS = 120.0

_known: set[str] = set()  # digests of files that were written here, or run without harm
_expendable = False


def written(path: Path) -> None:
    """This process wrote the file: it needs no trial."""
    _known.add(_digest(path))


def tried(path: Path, probe: str, options: Mapping[str, Any], runtime: str) -> None:
    """Run a file once in a process of its own, if this one doesn't know it.

    Args:
        probe: "module:function" that runs the file; called with `path` and `options` by name.
        runtime: what the user calls it.

    Raises:
        TargetError: there is no file, the process died or took longer than `SECONDS`, or the probe raised it.
    """
    if _expendable:
        return
    try:
        digest = _digest(path)
    except OSError as error:
        raise TargetError(f"{runtime} can't load {path.name}: {error.strerror}") from error
    if digest in _known:
        return
    with tempfile.TemporaryDirectory() as scratch:
        try:
            apart(probe, {"path": str(path.absolute()), **options}, Path(scratch), timeout=SECONDS)
        except LoadError as error:
            raise TargetError(f"{runtime} can't run {path.name}: {error}; make the artifact again") from error
    _known.add(digest)


def expendable() -> None:
    """From here on nothing is tried: this process is one that a file may end, or runs what was tried before."""
    global _expendable
    _expendable = True


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
