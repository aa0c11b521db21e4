"""How long a user's loader may take for one batch: told after a while, ended at a limit.

    patience = Patience("calibration")
    with patience:                                          # a thread that watches, for one pass
        element = patience.wait(0, lambda: next(iterator))

The loader runs where it always does, in the caller's thread: it may hold connections, locks or settings that belong
to that thread. A loader in the main thread is ended by a signal, which also wakes it from a system call; Python
gives signals to no other thread, so elsewhere a loader that hangs is told and not ended.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self, TypeVar

from bitport.errors import DataError

LIMIT = "BITPORT_DATA_SECONDS"
LIMIT_SECONDS = 600.0  # a first batch may have to unpack an archive; beyond this nobody is at work any more
TOLD_SECONDS = 30.0
AGAIN_SECONDS = 1.0  # a loader that catches everything is told again

T = TypeVar("T")
_log = logging.getLogger("bitport.data")


class _TooLong(BaseException):
    """Raised inside the loader; no Exception, so that a loader which tries again on errors doesn't swallow it."""


class Patience:
    """Watches one pass over the data of a role; data that is `held` in memory needs no watching.

    Entering raises DataError when the limit in the environment (`BITPORT_DATA_SECONDS`, 0: none) is no number.
    """

    def __init__(self, role: str, *, held: bool = False) -> None:
        self._role, self._held = role, held
        self._limit = _limit()
        self._changed = threading.Condition()
        self._since: float | None = None  # when the wait under way began
        self._batch = 0
        self._over = self._ended = False
        self._thread: threading.Thread | None = None
        self._here = False  # whether the one who waits is the main thread

    def __enter__(self) -> Self:
        if self._held:
            return self
        self._thread = threading.Thread(target=self._watch, name="bitport-data-patience", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._over = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def wait(self, batch: int, work: Callable[[], T]) -> T:
        """What `work` returns. Raises DataError naming the batch when it takes longer than the limit."""
        if self._held:
            return work()
        here = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGALRM) if here else None

        def ring(number: int, frame: FrameType | None) -> None:
            if self._since is not None and time.monotonic() - self._since >= self._limit:
                self._ended = True
                raise _TooLong
            if callable(before):  # somebody else's alarm
                before(number, frame)

        try:
            if here:
                signal.signal(signal.SIGALRM, ring)
            self._set(time.monotonic(), batch, here)
            try:
                found = work()
            finally:
                self._set(None, batch, here)
            if self._ended:  # a loader that catches everything lost more than this
                raise _TooLong
            return found
        except _TooLong:
            raise DataError(
                f"the {self._role} data has not given batch {batch} for {self._limit:g} s: mend the loader, or "
                f"set {LIMIT} to the seconds that one batch may take (0: no limit)",
                batch=batch,
            ) from None
        finally:
            if here and signal.getsignal(signal.SIGALRM) is ring:  # the loader may have set one of its own
                signal.signal(signal.SIGALRM, before or signal.SIG_DFL)

    def _set(self, since: float | None, batch: int, here: bool) -> None:
        with self._changed:
            self._since, self._batch, self._here = since, batch, here
            self._changed.notify()

    def _watch(self) -> None:
        told: float | None = None
        with self._changed:
            while not self._over:
                if self._since is None:
                    self._changed.wait()
                    continue
                waited = time.monotonic() - self._since
                if waited >= TOLD_SECONDS and told != self._since:
                    told = self._since
                    _log.warning(
                        "the %s data has not given batch %d for %d s: is its loader stuck?",
                        self._role, self._batch, waited,
                    )  # fmt: skip
                if waited >= self._limit and self._here:
                    with contextlib.suppress(OSError, RuntimeError):
                        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)
                    self._changed.wait(AGAIN_SECONDS)
                    continue
                due = [seconds for seconds in (TOLD_SECONDS, self._limit) if waited < seconds < math.inf]
                self._changed.wait(min(due) - waited if due else None)


def _limit() -> float:
    text = os.environ.get(LIMIT, str(LIMIT_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds >= 0:
        raise DataError(f"{LIMIT} = {text!r}: give the seconds that one batch may take, or 0 for no limit")
    return seconds or math.inf
