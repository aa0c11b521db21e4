"""Stopping on request: a signal asks, and work that can be taken up again stops at its next edge.

    with handled():              # the command line, around all its work
        with until_edge():       # around steps: the first signal only asks
            ...
            edge("…")            # raises Interrupted if somebody asked

Outside `until_edge` the first signal ends the work at once, inside it the second one does. A program that does
not enter `handled` keeps its own handlers: its Ctrl-C is Python's KeyboardInterrupt, wherever it falls.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from bitport.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class _State:
    depth: int = 0
    asked: bool = False


_state = _State()


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Answer SIGINT and SIGTERM as described above. Does nothing outside the main thread, which gets signals."""
    before = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                # started with nohup or in the background of a script: whoever did so doesn't want to be heard
                if signal.getsignal(number) is not signal.SIG_IGN:
                    before[number] = signal.signal(number, _answer)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _state.asked = False


@contextlib.contextmanager
def until_edge() -> Iterator[None]:
    """Inside, the first signal waits for the next `edge`."""
    _state.depth += 1
    try:
        yield
    finally:
        _state.depth -= 1


def asked() -> bool:
    """Whether somebody wants this run to stop."""
    return _state.asked


def edge(message: str) -> None:
    """A place to stop at. Raises Interrupted with `message` if somebody asked for it."""
    if _state.asked:
        _state.asked = False
        raise Interrupted(message)


def _answer(number: int, frame: FrameType | None) -> None:
    if _state.depth and not _state.asked:
        _state.asked = True
        with contextlib.suppress(OSError):  # not print: a handler may interrupt a print
            os.write(2, b"stopping after this step (a second signal stops at once)\n")
        return
    raise KeyboardInterrupt
