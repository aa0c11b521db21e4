"""Checkpoints: what a compression had finished when it was stopped, so that running it again goes on from there.

They lie beside the output folder, in `.<name>.checkpoint/`, one folder a generation, named by the number of steps
done. Each generation is written aside, flushed and renamed, and holds the SHA-256 of its files; the last two are
kept, so that a damaged one costs a step, not the run. Steps that go layer by layer (`gptq`, `reconstruct`) keep each as
soon as it is finished, so that a run that was killed goes on behind it. A checkpoint belongs to one run: the same
network, data, recipe, target, seed, versions and processor. Any other run is refused with the fields that differ,
because its result would be that of neither.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from . import interrupt, records, store
from . import tensors as tensor_files
from .data import Source
from .errors import ArtifactError, BitportError, Interrupted
from .graph import Graph
from .graph.archive import load_pt2, save_pt2
from .plan import Plan
from .plan.constants import on_grid
from .recipe import Recipe
from .steps import _base as steps
from .targets._base import Target, host

KEPT = 2  # generations
EVERY = 60.0  # seconds of work worth a checkpoint: writing one takes a network's export
WORTH = 2.0  # seconds of a step, before its layers are kept: what takes less is done again
GRAPH, PLAN, STATE = "graph.pt2", "plan.json", "state.json"
LAYERS = "layers-"  # what a step has finished inside itself, by the number of steps before it


@dataclass(frozen=True)
class State:
    """What a run had after `done` steps: the graph, the plan, notes and what was tried, seconds by step."""

    done: int
    graph: Graph
    plan: Plan
    notes: tuple[str, ...]
    seconds: Mapping[str, float]
    tried: tuple[Mapping[str, str], ...] = ()


def run_steps(
    graph: Graph, recipe: Recipe, runtime: Target, context: steps.Context, checkpoint: Checkpoint
) -> tuple[State, bool]:
    """All steps of a recipe, from the checkpoint on where there is one; returns (state, whether it was resumed).

    Behind the last step the weights lie on their grid. A checkpoint is written when somebody asks the run to stop,
    and at the first edge after each minute of work.

    Raises Interrupted at the edge behind which it was asked to stop; ArtifactError as `Checkpoint.resume`.
    """
    found = checkpoint.resume()
    state = found or State(0, graph.clone(), Plan.empty(runtime.name), tuple(context.notes), {})
    work, plan, seconds = state.graph, state.plan, dict(state.seconds)
    work.gm.eval()
    if found:
        context.tried[:] = [dict(row) for row in found.tried]
        context.notes[:] = [*found.notes, f"resumed behind step {found.done} of a run that was stopped"]
    written = time.monotonic()
    with interrupt.until_edge():
        for index, spec in enumerate(recipe.steps[state.done :], state.done):
            started = time.perf_counter()
            torch.manual_seed(context.seed + index)  # what a step draws doesn't depend on those before it
            # what stops inside the step is kept as it was in front of it, beside the layers that are finished
            finished = checkpoint.finished(index, partial(_stopped, checkpoint, state, recipe))
            context.memo = finished
            context.ahead = [(later.use, later.options) for later in recipe.steps[index + 1 :]]
            with context.progress.task(spec.use):
                work, plan = steps.make(spec.use, spec.options)(work, plan, context)
            seconds[f"{index} {spec.use}"] = time.perf_counter() - started
            if index + 1 == len(recipe.steps):
                on_grid(work, plan)
            state = State(index + 1, work, plan, tuple(context.notes), dict(seconds), tuple(context.tried))
            if interrupt.asked():
                interrupt.edge(_stopped(checkpoint, state, recipe))
            if time.monotonic() - written > EVERY:
                with contextlib.suppress(ArtifactError):  # a disk too full for a spare copy stops no run
                    checkpoint.save(state)
                written = time.monotonic()
                finished.discard()
    return state, found is not None


@contextlib.contextmanager
def keeping(checkpoint: Checkpoint, state: State, recipe: Recipe) -> Iterator[None]:
    """Around what follows the steps: a run that is stopped there keeps their result. Raises Interrupted then."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        raise Interrupted(_stopped(checkpoint, state, recipe)) from stopped


def identity(
    graph: Graph, calibration: Source, recipe: Recipe, target: Target, seed: int, device: str
) -> dict[str, Any]:
    """Everything that the bytes of a result depend on. Reads all calibration data if nobody has yet."""
    machine = host()
    return {
        "model": graph.digest(),
        "data": calibration.digest(),
        "recipe": tomllib.loads(recipe.to_toml()),
        "target": {"name": target.name, **target.options},
        "seed": seed,
        "device": device,
        "versions": records.versions(),
        "processor": [machine["machine"], *machine["isa"]],
        "threads": torch.get_num_threads(),
    }


def _stopped(checkpoint: Checkpoint, state: State, recipe: Recipe) -> str:
    """Save, and what to tell about it."""
    where = f"interrupted behind step {state.done} of {len(recipe.steps)}"
    if state.done:
        where += f" ({recipe.steps[state.done - 1].use})"
    try:
        checkpoint.save(state)
    except BitportError as error:
        return f"{where}; nothing was kept ({error}): run the same command again to start anew"
    return f"{where}: run the same command again to go on from there"


class Checkpoint:
    """The checkpoints of one output folder. The caller holds the folder's lock.

    out: the output folder. identity: what the run is made of; called when it is first needed, because it reads
    all data.
    """

    def __init__(self, out: Path, identity: Callable[[], Mapping[str, Any]]) -> None:
        self.place = out.parent / f".{out.name}.checkpoint"
        self._identity = identity

    def resume(self) -> State | None:
        """The newest generation that is whole; None where there is none.

        Raises ArtifactError for one of another run, naming the fields that differ, and where none is whole.
        """
        faults = []
        for folder in self._generations():
            try:
                store.verify_manifest(folder)
                known = records.load(folder / STATE)
                self._hold(known)
                return self._read(folder, known)
            except _Foreign:
                raise
            except (BitportError, KeyError, TypeError, ValueError) as error:
                faults.append(str(error))
        if faults:
            raise ArtifactError(
                f"checkpoint {self.place} is damaged ({faults[0]}): remove that folder to start again"
            )
        return None

    def save(self, state: State) -> None:
        """Write a generation and forget the oldest. Raises ArtifactError when the disk refuses."""
        fresh = self.place / "new"
        try:
            self.place.mkdir(exist_ok=True)
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir()
            save_pt2(state.graph, fresh / GRAPH)
            records.dump(fresh / PLAN, state.plan.to_record())
            known = {
                "identity": self._identity(),
                "done": state.done,
                "digest": state.graph.digest(),
                "notes": list(state.notes),
                "seconds": dict(state.seconds),
                "tried": [dict(row) for row in state.tried],
                # JSON sorts them; the order in which they were made is part of the plan
                "ties": list(state.plan.ties),
                "nodes": list(state.plan.nodes),
            }
            records.dump(fresh / STATE, known)
            records.dump(fresh / store.MANIFEST, {"files": store.manifest(fresh)})
            store.flush(fresh)
            final = self.place / f"{state.done:04d}"
            shutil.rmtree(final, ignore_errors=True)
            os.rename(fresh, final)
            for old in self._generations()[KEPT:]:
                shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            shutil.rmtree(fresh, ignore_errors=True)
            with contextlib.suppress(OSError):
                self.place.rmdir()  # if it is empty
            raise ArtifactError(
                f"checkpoint {self.place} can't be written ({error.strerror or error}): free space"
            ) from error

    def finished(self, index: int, stopped: Callable[[], str]) -> Finished:
        """What the step of an index keeps of its layers. stopped: saves, and says so, when the run is to end there."""
        return Finished(self.place, index, self._identity, stopped)

    def discard(self) -> None:
        """Remove all generations: the run is over. Somebody else's files in the folder stay."""
        for folder in (*self._generations(), self.place / "new", *self.place.glob(f"{LAYERS}*")):
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.place.rmdir()  # if it is empty

    def _generations(self) -> list[Path]:
        """Newest first."""
        if self.place.is_symlink():
            raise ArtifactError(f"checkpoint {self.place} is a link: remove it")
        if not self.place.is_dir():
            return []
        found = [entry for entry in self.place.iterdir() if entry.name.isdigit() and not entry.is_symlink()]
        return sorted(found, key=lambda entry: int(entry.name), reverse=True)

    def _hold(self, known: Mapping[str, Any]) -> None:
        """Raises _Foreign unless the checkpoint is of this very run."""
        theirs, ours = _flat(known["identity"]), _flat(self._identity())
        differing = [key for key in sorted({*theirs, *ours}) if theirs.get(key) != ours.get(key)]
        if differing:
            told = "; ".join(
                f"{key} was {_told(theirs, key)}, is {_told(ours, key)}" for key in differing[:6]
            )
            more = f"; and {len(differing) - 6} more" if len(differing) > 6 else ""
            raise _Foreign(
                f"checkpoint {self.place} is of another run ({told}{more}): "
                "repeat that run as it was, or remove that folder to start again"
            )

    def _read(self, folder: Path, known: Mapping[str, Any]) -> State:
        graph = load_pt2(folder / GRAPH)
        if graph.digest() != known["digest"]:
            # a file that is whole and reads back as another graph would give other bytes
            raise ArtifactError(f"{GRAPH} reads back otherwise than it was written")
        plan = Plan.from_record(records.load(folder / PLAN))
        plan = replace(
            plan,
            ties={name: plan.ties[name] for name in known["ties"]},
            nodes={name: plan.nodes[name] for name in known["nodes"]},
        )
        notes, tried = tuple(known["notes"]), tuple(known["tried"])
        return State(int(known["done"]), graph, plan, notes, dict(known["seconds"]), tried)


class Finished:
    """The layers that a step has finished: each in a file, which is whole or isn't there, with its own digest.

    The folder's name says of which run and step they are: others are never read. Where the disk refuses, nothing is
    kept, and the layer is done again.
    """

    def __init__(
        self, place: Path, index: int, identity: Callable[[], Mapping[str, Any]], stopped: Callable[[], str]
    ) -> None:
        self._place, self._index, self._identity, self._stopped = place, index, identity, stopped
        self._begun = time.monotonic()

    @cached_property
    def _folder(self) -> Path:
        run = hashlib.sha256(json.dumps(self._identity(), sort_keys=True, default=str).encode()).hexdigest()
        return self._place / f"{LAYERS}{self._index:04d}-{run[:32]}"

    def _file(self, key: str) -> Path:
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def found(self, key: str) -> Mapping[str, torch.Tensor] | None:
        """What was kept under a key; None where nothing was, or where it was damaged since."""
        if self._place.is_symlink() or not self._place.is_dir():
            return None
        path = self._file(key)
        if path.is_symlink() or not path.is_file():
            return None
        try:
            tensors, notes = tensor_files.read(path)
        except ArtifactError:
            return None
        return tensors if notes.get("digest") == _digest(tensors) else None

    def keep(self, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep tensors under a key. Raises Interrupted where somebody asked the run to stop."""
        if interrupt.asked() or time.monotonic() - self._begun >= WORTH:
            self._write(key, {name: value.detach().contiguous() for name, value in tensors.items()})
        if interrupt.asked():
            interrupt.edge(self._stopped())

    def _write(self, key: str, tensors: dict[str, torch.Tensor]) -> None:
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            waiting = self._file(key).with_suffix(".new")
            tensor_files.write(waiting, tensors, {"digest": _digest(tensors)})
            os.replace(waiting, self._file(key))

    def discard(self) -> None:
        """Forget the step's layers: its result is kept elsewhere."""
        if "_folder" in self.__dict__:
            shutil.rmtree(self._folder, ignore_errors=True)


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class _Foreign(ArtifactError):
    """A checkpoint of another run."""


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Leaves by dotted path: `recipe.steps[1].use`."""
    if isinstance(value, Mapping):
        parts = [(f"{path}.{key}" if path else str(key), part) for key, part in value.items()]
    elif isinstance(value, list | tuple):
        parts = [(f"{path}[{index}]", part) for index, part in enumerate(value)]
    else:
        return {path: value}
    return {key: leaf for name, part in parts for key, leaf in _flat(part, name).items()}


def _told(flat: Mapping[str, Any], key: str) -> str:
    text = repr(flat[key]) if key in flat else "absent"
    return text if len(text) <= 24 else f"{text[:16]}…"
