"""Work that a framework has to be loaded for, or that may end the process, done in a process of its own.

A framework that is imported stays: it takes memory, picks its backend once for all, and brings threads and handlers of
signals. None of that reaches the user's process, and a damaged file that ends the process ends only that one.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitport import errors
from bitport.errors import BitportError, LoadError, first_line

SECONDS = 1800.0
# what a framework's own log has to say, which would hide what we have to say
QUIET = {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TF_ENABLE_ONEDNN_OPTS": "0",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONWARNINGS": "ignore",
}
RUN = "from bitport.apart import answer; answer()"


def apart(
    function: str,
    options: Mapping[str, Any],
    folder: Path,
    environment: Mapping[str, str] | None = None,
    timeout: float = SECONDS,
) -> Any:
    """What a function gives, called in a fresh process.

    Args:
        function: "module:name"; called with `options` by name; gives what JSON holds. Files travel in a folder.
        folder: where the answer is written; the caller's, and empty.
        environment: variables that are set for it.
        timeout: seconds.

    Raises:
        BitportError: of the class and with the message that the function raised.
        LoadError: the process died, or took longer than the timeout.
    """
    told = folder / "answer.json"
    variables = {**os.environ, **QUIET, **(environment or {})}
    variables["PYTHONPATH"] = os.pathsep.join(str(Path(place).absolute()) for place in sys.path if place)
    request = json.dumps({"function": function, "options": dict(options), "answer": str(told.absolute())})
    try:
        done = subprocess.run(
            [sys.executable, "-c", RUN],
            input=request,
            env=variables,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise LoadError(
            f"the process that reads it took longer than {timeout:g} s: give a smaller network, or more time"
        ) from None
    if not told.is_file():
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        cause = f"was ended by signal {-done.returncode} (out of memory, or a damaged file)"
        raise LoadError(f"the process that reads it {cause if done.returncode < 0 else f'failed: {last}'}")
    found = json.loads(told.read_text("utf-8"))
    if "error" not in found:
        return found["value"]
    kind = getattr(errors, found["error"], LoadError)
    error = kind.__new__(kind)  # some take other arguments than the message
    Exception.__init__(error, found["message"])
    raise error


def answer() -> None:
    """The other side of `apart`: reads what is asked from standard input, and writes the answer's file."""
    request = json.load(sys.stdin)
    _limit_memory()
    module, _, name = request["function"].partition(":")
    try:
        found = {"value": getattr(importlib.import_module(module), name)(**request["options"])}
    except BitportError as error:
        found = {"error": type(error).__name__, "message": str(error)}
    except (MemoryError, RecursionError) as error:
        found = {"error": "LoadError", "message": f"the network can't be read: {first_line(error)}"}
    Path(request["answer"]).write_text(json.dumps(found), "utf-8")


def _limit_memory() -> None:
    """No more than the machine has: a file that asks for more gets an error, not the machine's memory."""
    try:
        import resource
    except ImportError:  # Windows
        return
    held = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(
        resource.RLIMIT_DATA, (held if most == resource.RLIM_INFINITY else min(held, most), most)
    )
