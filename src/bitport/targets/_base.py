"""What a runtime has to offer to be a target. `null` is the shortest example."""

from __future__ import annotations

import platform
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from ..errors import MissingDependency, RecipeError, TargetError
from ..graph import Graph
from ..plan import Plan
from ..rules import Ruleset
from ..simulate import Arithmetic


@dataclass(frozen=True)
class Inspection:
    """What a runtime really does with a file, read from the file it optimized.

    Attributes:
        kernels: user-facing operator name → operator types that run it.
        counts: operator type → how many there are.
        integer: those operator types that compute on integers.
        computes: kernel → what it multiplies weights as, where that isn't int8.
        notes: what the runtime does unasked, for the report.
        missed: operators that the plan wanted in integers and the runtime left in float, with the reason.
    """

    kernels: Mapping[str, tuple[str, ...]]
    counts: Mapping[str, int]
    missed: Mapping[str, str] = field(default_factory=dict)
    integer: frozenset[str] = frozenset()
    computes: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def as_array(value: Tensor) -> np.ndarray[Any, Any]:
    """What runtimes are fed with. Raises TargetError for types that numpy lacks."""
    try:
        return np.asarray(value.detach().contiguous().numpy())
    except TypeError as error:
        raise TargetError(
            f"an input is {value.dtype}, of which runtimes are fed none: give float32"
        ) from error


class Session(ABC):
    """A loaded model, ready to run."""

    @abstractmethod
    def run(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Flat outputs of flat inputs."""

    def run_tapped(self, inputs: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Outputs, and by producer name the integers (bitport's signed scheme, int32) the runtime computed."""
        return self.run(inputs), {}

    def as_stored(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """(inputs, outputs) as the file itself takes and gives them: integers where its ends are integers."""
        return list(inputs), list(self.run(inputs))

    def prepared(self, inputs: Sequence[Tensor]) -> Any:
        """Inputs in the runtime's own form, so that converting them isn't timed."""
        return tuple(inputs)

    def run_prepared(self, prepared: Any) -> None:
        self.run(prepared)


@dataclass(frozen=True)
class KnownGap:
    """Something that a runtime gets wrong or lacks, and that its rules or its export work around.

    Attributes:
        what: that is wrong, and since which version it was seen.
        link: to upstream's report, or to the code that does it where none was found.
        is_open: whether it still is so, seen on the runtime itself; None: this host can't show it.
    """

    what: str
    link: str
    is_open: Callable[[], bool | None]


class Target(ABC):
    """A runtime. A class is abstract or final: nothing implemented here is overridden but what says that it may be.

    `defaults` are the options of a recipe's `[target]` table with their default values (`threads` and `io` mean the
    same everywhere, and are checked here); `modules` are what its
    files import when they run (a fair memory measurement imports them first). `runner` is a module whose class
    `Network` opens the model with the runtime and numpy alone; it ends the artifact's `run.py`. `runs_as_written`:
    nothing is optimized when a file is loaded, so that there is no other way to run it. `byte`: the type of 8-bit
    integers at the ends of its files, where those are integers. `known_gaps`: one that closes fails its test, so that
    what works around it goes.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    model_file: ClassVar[str]
    defaults: ClassVar[Mapping[str, Any]] = {}
    modules: ClassVar[tuple[str, ...]] = ()
    runner: ClassVar[Path | None] = None
    runs_as_written: ClassVar[bool] = False
    byte: ClassVar[str] = "uint8"
    known_gaps: ClassVar[tuple[KnownGap, ...]] = ()

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        options = dict(options or {})
        for key, value in options.items():
            if key not in self.defaults:
                known = ", ".join(sorted(self.defaults)) or "none"
                raise RecipeError(f"[target] {key}: {self.name} has no such option; its options are: {known}")
            if type(value) is not type(self.defaults[key]):
                wanted = type(self.defaults[key]).__name__
                raise RecipeError(f"[target] {key} = {value!r}: expected a value of type {wanted}")
        self.options: dict[str, Any] = {**self.defaults, **options}
        if self.options.get("threads", 1) < 1:
            raise RecipeError(f"[target] threads = {self.options['threads']}: at least 1")
        if self.options.get("io", "float") not in ("float", "integer"):
            raise RecipeError(f"[target] io = {self.options['io']!r}: expected 'float' or 'integer'")
        self.check_options()

    @classmethod
    def check_installed(cls) -> None:
        """Raise MissingDependency for a runtime that isn't there; imports nothing."""
        for package in cls.modules:
            if find_spec(package) is None:
                raise MissingDependency(f"the target {cls.name}", package, cls.name)

    def check_options(self) -> None:  # noqa: B027 - not every target has something to check
        """Raise RecipeError for option values the runtime can't take; may be overridden."""

    @abstractmethod
    def rules(self) -> Ruleset:
        """Its table: operator × formats × this host → kernel."""

    @abstractmethod
    def arithmetic(self) -> Arithmetic:
        """How it rounds, for the exact simulator."""

    @abstractmethod
    def export(self, graph: Graph, plan: Plan, folder: Path) -> None:
        """Write the model file(s) into `folder`. An empty plan writes the plain float model.

        Raises ExportError when the file can't be made.
        """

    @contextmanager
    def watchable(self, graph: Graph, plan: Plan, folder: Path) -> Iterator[Path]:
        """A folder to open and inspect with taps, as long as the context lasts; may be overridden.

        Args:
            folder: what `export` wrote of the graph and its plan. A runtime whose files can't be given more outputs
                afterwards exports another one.
        """
        yield folder

    @abstractmethod
    def open(self, folder: Path, *, taps: bool = False, optimize: bool = True) -> Session:
        """Load a model. `optimize=False`: run it as written.

        `taps`: make the quantized integers readable, of a folder that is `watchable`.
        """

    @abstractmethod
    def inspect(self, folder: Path, plan: Plan, *, taps: bool = False) -> Inspection:
        """Read what the runtime made of the file."""

    @property
    def executes_integers(self) -> bool:
        """Whether this is a real integer runtime: a simulation never passes for a deployed file. May be overridden."""
        return True


@cache
def host() -> dict[str, Any]:
    """The machine that measures: processor, instruction set extensions that matter for int8, cores, system."""
    flags: set[str] = set()
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                flags = set(value.split())
            elif key.strip() == "model name":
                model = value.strip()
    except OSError:
        pass  # not Linux: the extensions stay unknown and the careful choice is made
    isa = [
        name
        for name in ("avx2", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm")
        if name in flags
    ]
    return {"cpu": model, "isa": isa, "machine": platform.machine(), "os": platform.system()}


def has_integer_dot_product() -> bool:
    """Whether u8 × s8 products are summed in 32 bits: without it (x86 before VNNI) pairs saturate at 16 bits."""
    info = host()
    return info["machine"] not in ("x86_64", "AMD64") or any("vnni" in x or "amx" in x for x in info["isa"])
