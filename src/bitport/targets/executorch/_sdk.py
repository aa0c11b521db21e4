"""The door to ExecuTorch's packages, which say more than anybody wants to know."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from ...errors import MissingDependency

PACKAGE = "executorch"


@contextmanager
def quiet() -> Iterator[None]:
    """Import and use its packages: their warnings are about themselves, and they set up logging for everybody.

    Raises MissingDependency where they aren't installed.
    """
    root, disabled = logging.getLogger(), logging.root.manager.disable
    handlers, level = list(root.handlers), root.level
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != PACKAGE:
            raise
        raise MissingDependency("the target executorch", PACKAGE, PACKAGE) from error
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.disable(disabled)


@contextmanager
def muted() -> Iterator[None]:
    """Without what its libraries write to the process's error output; what went wrong they raise as well."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def runtime() -> ModuleType:
    """Its Python runtime, with the operators that read and write 8-bit integers.

    What `portable_lib` has it from: that one imports the exporter as well, for its warnings, which takes five seconds.
    """
    with quiet(), muted():
        import executorch.extension.pybindings._C as module
        from executorch.kernels import quantized

        assert quantized is not None  # imported for what it registers
    found: ModuleType = module
    return found
