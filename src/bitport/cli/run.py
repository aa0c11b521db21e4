"""Runs a command's work: what it writes where, and with which exit code it ends.

The result goes to stdout (drawn for people, or with `--json` exactly one JSON document, also for an error);
progress, messages, and whatever a runtime or the user's own code prints go to stderr. No traceback ever,
unless BITPORT_DEBUG=1 asks for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from .. import interrupt
from ..errors import BitportError, GateFailed, Interrupted
from ..wording import plain

if TYPE_CHECKING:
    from ..progress import Progress

HOLDS, ERROR, GATE, INTERRUPTED = 0, 1, 3, 75
DEBUG = "BITPORT_DEBUG"
_NO_MEMORY = re.compile(r"can't allocate memory|out of memory|bad_alloc|[Ff]ailed to allocate memory")


@dataclass(frozen=True)
class Outcome:
    """What a command leaves: a document for --json, how to draw it for people, the exit code."""

    document: Mapping[str, Any]
    draw: Callable[[], None]
    code: int = HOLDS


def run(work: Callable[[Progress], Outcome], as_json: bool) -> NoReturn:
    """Do the work, write its outcome, leave with its exit code."""
    try:
        try:
            with interrupt.handled(), _stdout_to_stderr(), _progress(as_json) as progress:
                outcome = work(progress)
        except GateFailed as failed:
            # the verdict's sentence is in the outcome
            click.echo(f"gate missed: the result is in {_line(shown(failed.path))}", err=True)
            outcome = replace(measured(failed.measurements, failed.path), code=GATE)
        document = (
            json.dumps(outcome.document, indent=2, sort_keys=True, allow_nan=False) if as_json else None
        )
        _write(outcome.draw if document is None else lambda: click.echo(document))
        code = outcome.code
    except (KeyboardInterrupt, Interrupted) as stopped:
        message = str(stopped) or "interrupted: run the same command again"
        code = _fail(message, stopped, as_json, INTERRUPTED)
    except BitportError as error:
        code = _fail(str(error), error, as_json)
    # SystemExit, too: the user's own module may call sys.exit while it is imported
    except (Exception, SystemExit) as error:  # noqa: BLE001
        message = (
            _out_of_memory(error)
            or f"unexpected {type(error).__name__}: {error} ({DEBUG}=1 shows the traceback)"
        )
        code = _fail(message, error, as_json)
    sys.exit(code)


def measured(record: Mapping[str, Any], folder: Path, *, again: bool = False) -> Outcome:
    """The outcome of a measurement of an artifact folder: 0 when every gate holds, else 3.

    `again`: its report is of an earlier measurement.
    """
    from ..proof.verdict import judge

    verdict = record.get("verdict") or judge(record)
    return Outcome(
        record, lambda: terminal().summary(record, folder, again=again), HOLDS if verdict["passed"] else GATE
    )


def shown(path: Path) -> str:
    """A path as people type it: relative where it lies below the current folder."""
    with contextlib.suppress(ValueError, OSError):
        return str(path.relative_to(Path.cwd()))
    return str(path)


def terminal() -> Any:
    """The drawing module. Rich is worth its import only where something is drawn."""
    from . import terminal

    return terminal


def _fail(message: str, error: BaseException, as_json: bool, code: int = ERROR) -> int:
    if os.environ.get(DEBUG) == "1":
        import traceback

        traceback.print_exception(error)
    with contextlib.suppress(OSError):  # stderr may be gone as well
        click.echo(f"error: {_line(message)}" if code == ERROR else _line(message), err=True)
    if as_json:
        document = json.dumps({"error": {"type": type(error).__name__, "message": message}}, indent=2)
        _write(lambda: click.echo(document))
    return code


def _out_of_memory(error: BaseException) -> str | None:
    """What to say when memory ran out; torch and runtimes tell it in words only."""
    words = str(error)
    if not isinstance(error, MemoryError) and not _NO_MEMORY.search(words):
        return None
    size = re.search(r"(\d{4,}) bytes", words)
    wanted = f" ({int(size[1]):,} bytes were asked for)" if size else ""
    return f"out of memory{wanted}: use smaller batches, or a machine with more of it"


def _line(message: str) -> str:
    return plain(" ".join(message.split()), 4000)


def _write(draw: Callable[[], None]) -> None:
    """Write to stdout; a reader that went away (`| head`) changes nothing about the result."""
    try:
        draw()
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout once more at exit, which must not fail
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Keep stdout for the result: what runtimes (in C, too) and the user's code print goes to stderr."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        with contextlib.suppress(OSError):  # no such descriptors: nothing to keep clean
            kept = os.dup(1)
            stack.callback(os.close, kept)
            os.dup2(2, 1)
            stack.callback(os.dup2, kept, 1)
            stack.callback(_flush_c)
        yield


def _flush_c() -> None:
    """Write out what C code printed, before descriptor 1 is the real stdout again."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).fflush(None)


@contextlib.contextmanager
def _progress(as_json: bool) -> Iterator[Progress]:
    if as_json or not sys.stderr.isatty():
        from ..progress import NullProgress

        yield NullProgress()
        return
    with terminal().bars() as progress:
        yield progress
