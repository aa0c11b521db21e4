"""How long work tells that it moves on: one tiny protocol, and the listener that ignores it.

The library never prints. Whoever calls it may pass a `Progress`; the command line passes one that draws bars.

    with progress.task("calibrate", total=32) as task:
        for batch in source:
            ...
            task.advance()
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """One piece of work under way."""

    def advance(self, n: int = 1) -> None:
        """`n` more units (batches, layers, rounds) are done."""


class Progress(Protocol):
    """Listens to work."""

    def task(self, name: str, total: int | None = None) -> AbstractContextManager[Task]:
        """Announce work called `name` of `total` units (None: unknown); it is over when the context ends,
        also when it ends by an exception."""


class _NullTask:
    def advance(self, n: int = 1) -> None:
        pass


class NullProgress:
    """Listens to nothing: the default everywhere."""

    @contextmanager
    def task(self, name: str, total: int | None = None) -> Iterator[Task]:
        yield _NullTask()
