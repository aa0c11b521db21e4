"""Every error that bitport raises on purpose.

    BitportError
    ├── LoadError            a model can't be read or captured
    │   └── UnsafeFile       a file that would need more than plain tensors to be read
    ├── GraphError           a graph breaks a law of its stage (graph/spec.py)
    ├── WeightsError         NaN or infinite parameters
    ├── DataError            calibration, training or evaluation data is unusable
    ├── MetricError          a metric can't be computed
    ├── RecipeError          a recipe is malformed or asks for something impossible
    ├── FormatError          a number format can't be parsed or constructed
    ├── UnknownName          a target, step, recipe … that nobody registered
    ├── MissingDependency    an optional runtime or framework isn't installed
    ├── TargetError          a runtime refused a model or returned something else than asked
    │   └── ExportError      the model file could not be made
    ├── ArtifactError        an artifact folder can't be read or written
    │   ├── Locked           another run is writing to the same folder
    │   └── Tampered         a file does not match its manifest
    ├── NotEnoughMemory      there is less memory left than the work takes at least
    ├── Interrupted          stopped by a signal at a step's edge
    └── GateFailed           the result exists but misses what was asked of it

Each message names the thing and the remedy, in that order.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

LONGEST = 1000  # characters of another library's error
# What other people's code raises where the parts of what it is given don't fit each other.
FOREIGN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
# What reading a damaged zip archive raises; RuntimeError also for methods and passwords that zipfile doesn't know.
UNREADABLE_ARCHIVE = (
    EOFError,
    OSError,
    RuntimeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


def first_line(error: BaseException) -> str:
    """What another library's exception says, in one line of bounded length; its type's name where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reasons = [line for line in lines[1:] if line.startswith("- ")]  # torch lists violated constraints so
    return " ".join([*lines[:1], *reasons])[:LONGEST] or type(error).__name__


class BitportError(Exception):
    """Base class of everything that bitport raises on purpose."""


class LoadError(BitportError):
    """A model can't be read or captured."""


class UnsafeFile(LoadError):
    """A file that would need more than plain tensors to be read. Nothing of it was executed."""


class GraphError(BitportError):
    """A graph breaks a law of its stage."""


class WeightsError(BitportError):
    """Parameters or buffers hold NaN or infinite values."""


class DataError(BitportError):
    """Data is unusable. `batch` is the index of the batch concerned, if one is."""

    def __init__(self, message: str, *, batch: int | None = None) -> None:
        super().__init__(message)
        self.batch = batch


class MetricError(BitportError):
    """A metric can't be computed on these outputs and labels."""


class RecipeError(BitportError):
    """A recipe is malformed or asks for something impossible."""


class FormatError(BitportError):
    """A number format can't be parsed or constructed."""


class UnknownName(BitportError):
    """A name that nobody registered. The message lists the known ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        self.kind, self.name, self.known = kind, name, tuple(sorted(known))
        close = get_close_matches(name, self.known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        super().__init__(f"unknown {kind} {name!r}.{hint} Known: {', '.join(self.known) or 'none'}.")


class MissingDependency(BitportError):
    """An optional package isn't installed; the message names the extra that brings it."""

    def __init__(self, what: str, package: str, extra: str) -> None:
        super().__init__(f"{what} needs the package {package!r}: pip install 'bitport[{extra}]'")


class TargetError(BitportError):
    """A runtime refused a model, or ran something else than what was asked."""


class ExportError(TargetError):
    """The model file could not be made."""


class ArtifactError(BitportError):
    """An artifact folder can't be read or written."""


class Locked(ArtifactError):
    """Another run is writing to the same folder."""


class Tampered(ArtifactError):
    """A file does not match the checksum in its manifest."""


class NotEnoughMemory(BitportError):
    """There is less memory left than the work takes at least; told before it begins."""


class Interrupted(BitportError):
    """Stopped by a signal at a step's edge; running again is safe."""


class GateFailed(BitportError):
    """The result exists but misses what was asked of it.

    `measurements` holds the whole record; `path` is the folder (`DIR.rejected/`) it was written to.
    """

    def __init__(self, message: str, measurements: Mapping[str, Any], path: Path) -> None:
        super().__init__(message)
        self.measurements, self.path = measurements, path
