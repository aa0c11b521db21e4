"""Peak memory: of a piece of work in this process, and of a model in a fresh one.

Resident memory is what the machine must have; what Python or an allocator believes to use is not. Levels are
taken after imports, because the same libraries would be loaded without the model, too.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import TargetError


@dataclass
class Peak:
    """The result of `peak_memory`, filled in when its context ends.

    Attributes:
        bytes: highest resident memory of this process, above the level when the context was entered.
        exact: True when it is the kernel's own high-water mark; False when it was sampled: a lower bound.
    """

    bytes: int = 0
    exact: bool = False


@contextmanager
def peak_memory(interval: float = 0.005) -> Iterator[Peak]:
    """Measure the peak of resident memory inside the context, in bytes above the level at its entry.

    The kernel keeps a high-water mark of the whole life of a process. When the context raised it, the mark
    *is* the peak, exactly. When something before was larger, the mark says nothing about the context; then
    the answer is the highest of samples taken every `interval` seconds by a thread (a shorter spike escapes).
    """
    import psutil

    process = psutil.Process()
    level: int = process.memory_info().rss
    before = _high_water_mark()
    peak = Peak()
    highest = level
    stop = threading.Event()

    def sample() -> None:
        nonlocal highest
        while not stop.wait(interval):
            highest = max(highest, process.memory_info().rss)

    sampler = threading.Thread(target=sample, name="bitport-peak-memory", daemon=True)
    sampler.start()
    try:
        yield peak
    finally:
        stop.set()
        sampler.join()
        highest = max(highest, process.memory_info().rss)
        after = _high_water_mark()
        if before is not None and after is not None and after > before:
            peak.exact, highest = True, max(highest, after)
        peak.bytes = highest - level


def _high_water_mark() -> int | None:
    """Bytes; None where the system has none."""
    try:
        # not ru_maxrss on Linux: across exec it inherits the mark of the *parent*
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit


def run_memory(setup: str, run: str, arguments: Sequence[str] = (), *, timeout: float = 600.0) -> int:
    """Peak resident memory of running a model in a fresh process, in bytes above the level after its imports.

    Args:
        setup: Python source executed first, for the imports; its names are visible to `run`.
        run: Python source that is measured: make the session, run it.
        arguments: strings that both see as `arguments` (paths, thread counts).
        timeout: seconds.

    Raises:
        TargetError: the process failed, was killed or took longer than `timeout`.
    """
    request = json.dumps({"setup": setup, "run": run, "arguments": list(arguments)})
    command = [sys.executable, "-c", "from bitport.proof.memory import _measure_here as m; m()"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    try:
        done = subprocess.run(
            command,
            input=request,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise TargetError(
            f"the process that measures memory took longer than {timeout:g} s: give it a smaller batch"
        ) from None
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        cause = f"was killed by signal {-done.returncode} (out of memory?)" if done.returncode < 0 else last
        raise TargetError(f"the process that measures memory failed: {cause}")
    return int(json.loads(done.stdout)["bytes"])


def _measure_here() -> None:
    """The other end of `run_memory`: request on stdin, one JSON document on stdout."""
    request = json.loads(sys.stdin.read())
    answer = os.dup(1)
    os.dup2(2, 1)  # what the measured code prints must not mix with the answer
    names: dict[str, Any] = {"__name__": "__main__", "arguments": request["arguments"]}
    exec(compile(request["setup"], "<setup>", "exec"), names)
    gc.collect()
    with peak_memory() as peak:
        exec(compile(request["run"], "<run>", "exec"), names)
    with os.fdopen(answer, "w") as stream:
        json.dump({"bytes": peak.bytes, "exact": peak.exact}, stream)
