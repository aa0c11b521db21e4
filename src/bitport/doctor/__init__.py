"""Which layers cost an artifact most, what helps against it, and a recipe that does.

Each remedy is tried on the real thing: the float network goes through the changed recipe to the runtime's file, whose
outputs, size and time are held against those of the file before it. What the simulation sees no gain in is not
exported. Remedies are chosen on one half of the samples and confirmed on the other, or on the evaluation data.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import metrics, store, wording
from ..artifact import Artifact
from ..data import Batch
from ..errors import (
    ArtifactError,
    BitportError,
    Interrupted,
    NotEnoughMemory,
    RecipeError,
    first_line,
)
from ..metrics import Metric
from ..progress import NullProgress, Progress
from ..proof.blame import BOTH, Blame, Unit, count, relative_error, shares, take, units
from ..proof.task import TaskAccumulator
from ..recipe import Recipe
from .remedies import REMEDIES, Case, Remedy
from .trials import Bench, Trial, decibel, fingerprint, gain_db

WORTH_DB = 1.0  # what a remedy must gain
# What it must gain besides, where it costs: half the error, and as much again for each tenth of the file or the time.
PRICE_DB, PRICE_SHARE = 3.0, 0.1
FREE_BYTES = 0.01  # of the file: more is a cost
PASSES, LEAST = 1024, 8  # samples that rank the layers: over all of them, and for each at least
LOUD = 0.05  # a layer with less of the loss than this isn't treated
PART = 0.1  # nor is a part of a layer with less of its error


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Attributes:
        record: JSON-able: `culprits`, `remedies`, `chosen`, `confirmed`, `sentence`, `recipe_file`.
        recipe: the better recipe; None where nothing helps.
        path: the file that it was written to.
    """

    record: Mapping[str, Any]
    recipe: Recipe | None = None
    path: Path | None = None


def diagnose(
    folder: str | Path,
    data: Any,
    *,
    evaluation: Any = None,
    metric: str | Metric | None = None,
    top: int = 3,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Diagnosis:
    """Rank the layers of an artifact by what they cost, try remedies for the worst, and write a better recipe.

    Args:
        folder: the artifact; it isn't changed.
        data: calibration data, as the artifact's; labels are ignored. At least two samples.
        evaluation: data that confirms the recipe; default: the half of `data` that it wasn't chosen by.
        metric: on the evaluation data, as in `compress`; it must not get worse.
        top: how many layers are treated.
        out: the recipe's file; default: `<folder>-doctor.toml` beside the folder. Nothing is written where nothing
            helps.

    Raises:
        Tampered: files of the artifact changed since it was published.
        ArtifactError: nothing in it is quantized, or `out` exists or lies in it.
        RecipeError: top < 1, or a metric without evaluation data.
        DataError: the data is unusable. TargetError: the runtime fails.
    """
    listener = progress or NullProgress()
    if top < 1:
        raise RecipeError(f"top = {top}: treat one layer at least")
    if metric is not None and evaluation is None:
        raise RecipeError("a metric needs evaluation data: give evaluation=, or leave the metric out")
    opened = Artifact.load(folder)
    place = _place(opened.path, out)
    if not opened.plan.quantized:
        raise ArtifactError(f"nothing in {opened.path.name!r} is quantized: there is no loss to look for")
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory(prefix="bitport-doctor-") as scratch:
        try:
            return _Doctor(Bench(opened, data, evaluation, Path(scratch), listener), metric).run(top, place)
        except Interrupted as stopped:
            raise Interrupted("interrupted: nothing was written; run the same command again") from stopped


def _place(folder: Path, out: str | Path | None) -> Path:
    """Where the recipe goes. Raises ArtifactError before any work."""
    whole = Path(os.path.abspath(folder))
    place = Path(os.path.abspath(out)) if out is not None else whole.with_name(f"{whole.name}-doctor.toml")
    if place.suffix != ".toml":
        raise ArtifactError(f"{place.name!r} is no name for a recipe: it must end in .toml")
    if place.resolve().is_relative_to(whole.resolve()):
        raise ArtifactError(
            f"{place.name!r} would lie in the artifact, which is never changed: name another file"
        )
    store.refuse_taken(place)
    return place


@dataclass
class _Tried:
    """A remedy that was tried, as a row of the record, and its trial where it came to one."""

    row: dict[str, Any]
    order: int
    trial: Trial | None = None
    slower: bool = False

    @property
    def gain(self) -> float:
        return float(self.row["gain_db"])

    @property
    def price(self) -> float:
        """What it must gain to be worth its cost (dB)."""
        share = max(0.0, (self.row["bytes"] or 0) / (self.row["of_bytes"] or 1))
        share = share if share > FREE_BYTES else 0.0
        if self.slower:
            share += max(0.0, self.row["ms"] / self.row["of_ms"])
        return PRICE_DB * (1 + share / PRICE_SHARE) if share else 0.0

    @property
    def worth(self) -> float:
        """Its gain behind its price (dB)."""
        return self.gain - self.price


class _Doctor:
    def __init__(self, bench: Bench, metric: str | Metric | None) -> None:
        self.bench, self.metric = bench, metric
        self.opened, self.original = bench.opened, bench.original
        self.rows: list[dict[str, Any]] = []

    # ------------------------------------------------------------------ the whole

    def run(self, top: int, place: Path) -> Diagnosis:
        record, ranked, parts = self._ranking()
        first = current = self.bench.as_it_is()
        if self.bench.source.digest() != self.opened.manifest.get("data_digest"):
            # on other data the same recipe gives other ranges: a remedy's gain must not be that of the data
            current = self.bench.deployed(self.opened.recipe, self.bench.steps(self.opened.recipe))
            record["same_recipe_gain_db"] = gain_db(first.error, current.error)
        record |= {"remedies": self.rows, "chosen": []}
        start = current
        loud = [unit for unit in ranked[:top] if parts[unit.name][0] >= LOUD]
        for unit in loud:
            best = self._treat(unit, parts[unit.name][1], current)
            if best is not None and best.trial is not None:
                current = best.trial
                record["chosen"].append({key: best.row[key] for key in ("layer", "what", "gain_db")})
        return self._conclude(record, first, start, current, place)

    def _ranking(self) -> tuple[dict[str, Any], list[Unit], dict[str, tuple[float, tuple[str, ...]]]]:
        """The record's beginning; units, worst first; by name each one's share and the parts of it that are loud."""
        subject = self.opened.subject()
        every = units(subject.graph, subject.plan)
        blame = Blame(
            subject.counterpart,
            subject.graph,
            subject.plan,
            self.bench.target.arithmetic(),
            take(self.original, self.bench.choosing, max(LEAST, PASSES // len(every))),
        )
        errors: dict[str, float] = {}
        with self.bench.progress.task("each layer alone", len(every)) as task:
            for unit in every:
                errors[unit.name] = blame.error(unit)
                task.advance()
        share = shares(errors)
        ranked = sorted(every, key=lambda unit: -errors[unit.name])
        own = {row["name"]: row for row in self.opened.measurements.get("layers") or ()}
        parts: dict[str, tuple[float, tuple[str, ...]]] = {}
        culprits = []
        for rank, unit in enumerate(ranked, 1):
            by_part = (
                shares({part: blame.error(unit, (part,)) for part in BOTH})
                if share[unit.name] >= LOUD
                else {}
            )
            parts[unit.name] = share[unit.name], tuple(part for part in BOTH if by_part.get(part, 0) >= PART)
            row = own.get(unit.name, {})
            db = row.get("sqnr_runtime_db")
            culprits.append(
                {
                    "rank": rank,
                    "layer": unit.name,
                    "op": unit.op,
                    "sqnr_db": row.get("sqnr_db") if db is None else db,
                    "share": share[unit.name],
                    "output_db": decibel(errors[unit.name]),
                    "loud": list(parts[unit.name][1]),
                }
            )
        record = {
            "artifact": self.opened.path.name,
            "recipe": self.opened.manifest.get("recipe"),
            "target": self.bench.target.name,
            "samples": {
                "choose": sum(map(count, self.bench.choosing)),
                "confirm": sum(map(count, self.bench.confirming)),
            },
            "culprits": culprits,
        }
        return record, ranked, parts

    def _treat(self, unit: Unit, parts: tuple[str, ...], current: Trial) -> _Tried | None:
        """Try every remedy for a unit; the one to keep, None where none is worth it."""
        here = {found.name: found for found in units(current.graph, current.plan)}.get(unit.name)
        if here is None:  # what was kept before has put it into float
            return None
        case = Case(here, current.plan)
        wanted = [(i, r) for i, r in enumerate(REMEDIES) if r.fits(parts)]
        seen = {fingerprint(current.graph, current.plan)}
        tried: list[_Tried] = []
        with self.bench.progress.task(f"remedies for {unit.name}", len(wanted)) as task:
            for order, remedy in wanted:
                recipe = remedy.change(current.recipe, case)
                if recipe is not None:
                    best = max((one.worth for one in tried if one.trial is not None), default=0.0)
                    tried.append(self._try(order, remedy, unit, recipe, current, seen, best))
                    self.rows.append(tried[-1].row)
                task.advance()
        return _choose(tried)

    def _try(
        self,
        order: int,
        remedy: Remedy,
        unit: Unit,
        recipe: Recipe,
        current: Trial,
        seen: set[tuple[str, str]],
        best: float,
    ) -> _Tried:
        """One remedy on top of what was kept. What can't exceed `best`, the worth so far, isn't exported."""
        row: dict[str, Any] = {"layer": unit.name, "what": remedy.what, "outcome": "no gain", "reason": None}
        row |= dict.fromkeys(("gain_db", "simulated_db", "bytes", "of_bytes", "ms", "of_ms"))
        try:
            state = self.bench.steps(recipe)
            key = fingerprint(state.graph, state.plan)
            if key in seen:
                return _Tried(row | {"reason": "it changes nothing that others don't"}, order)
            seen.add(key)
            simulated = self.bench.simulated(state)
            row["simulated_db"] = gain_db(current.simulated, simulated)
            if row["simulated_db"] < WORTH_DB / 2:
                return _Tried(row | {"reason": "none in the simulation"}, order)
            if row["simulated_db"] < best + WORTH_DB / 2:
                return _Tried(
                    row | {"outcome": "not needed", "reason": "another gains as much, its cost counted"},
                    order,
                )
            trial = self.bench.deployed(recipe, state, simulated)
        except (Interrupted, NotEnoughMemory):
            raise
        except BitportError as error:
            return _Tried(row | {"outcome": "not possible", "reason": first_line(error)}, order)
        row["gain_db"] = gain_db(current.error, trial.error)
        tried = _Tried(row, order, trial)
        tried.slower = self.bench.costs(row, current, trial)
        if tried.gain < WORTH_DB:
            row["reason"] = f"less than {WORTH_DB:g} dB"
        elif tried.worth < 0:
            row["outcome"], row["reason"] = "too dear", f"its cost asks for {tried.price:.1f} dB"
        else:
            row["outcome"] = "helps"
        return tried

    # ------------------------------------------------------------------ the end

    def _conclude(
        self, record: dict[str, Any], first: Trial, start: Trial, last: Trial, place: Path
    ) -> Diagnosis:
        record |= {"confirmed": None, "recipe_file": None}
        if not record["chosen"]:
            return Diagnosis(record | {"sentence": _nothing(record, first, start)})
        layers = ", ".join(dict.fromkeys(row["layer"] for row in record["chosen"]))
        name = f"{last.recipe.name or 'recipe'}-doctor"
        text = replace(last.recipe, name=name, summary=f"Mended by bitport doctor: {layers}").to_toml()
        recipe = Recipe.parse(text)
        final = self.bench.deployed(recipe, self.bench.steps(recipe))
        found = self._confirm(first, final)
        record["confirmed"] = found
        measure = found["metric"]
        worse = measure is not None and measure["worse"]
        if found["gain_db"] < WORTH_DB or worse:
            why = (
                f"its {measure['name']} is worse" if measure is not None and worse else "it gains too little"
            )
            told = (
                f"Nothing was written: on data that it wasn't chosen by {why} ({found['gain_db']:+.1f} dB)."
            )
            return Diagnosis(record | {"sentence": told})
        with store.new_file(place) as file:
            file.write_text(text, encoding="utf-8")
        gained = f"{wording.decibel(found['before_db'])} → {wording.decibel(found['after_db'])}"
        record |= {
            "recipe_file": str(place),
            "sentence": f"{layers}: outputs {gained} on data it wasn't chosen by.",
        }
        return Diagnosis(record, recipe, place)

    def _confirm(self, first: Trial, final: Trial) -> dict[str, Any]:
        """The artifact against the new recipe's file, on data that chose nothing."""
        sessions = [self.bench.target.open(trial.folder) for trial in (first, final)]
        wanted = self.bench.floats(self.bench.confirming)
        errors = [relative_error(wanted, map(session.run, self.bench.confirming)) for session in sessions]
        row: dict[str, Any] = {
            "before_db": decibel(errors[0]),
            "after_db": decibel(errors[1]),
            "gain_db": gain_db(*errors),
        }
        self.bench.costs(row, first, final)
        row["metric"] = self._task(*sessions) if self.bench.judged is not None else None
        return row

    def _task(self, before: Any, after: Any) -> dict[str, Any]:
        """The metric of the float network and of both files, on all evaluation data; `loss` > 0: worse than before."""
        assert self.bench.judged is not None
        names = [spec.name for spec in self.original.outputs]
        accumulators: list[TaskAccumulator] = []
        for batch in self.bench.judged:
            if not accumulators:
                chosen = self._metric(batch, names)
                accumulators = [TaskAccumulator(chosen, None) for _ in range(2)]
            (real,) = self.bench.floats([batch.inputs])
            for accumulator, session in zip(accumulators, (before, after), strict=True):
                found = session.run(batch.inputs)
                accumulator.update(_named(names, real), None, _named(names, found), batch.labels)
        old, new = (accumulator.record() for accumulator in accumulators)
        return {
            "name": old["metric"],
            "binary": old["binary"],
            "float": old["float"],
            "before": old["runtime"],
            "after": new["runtime"],
            "loss": new["drop"] - old["drop"],
            # a sample that falls the other way says nothing
            "worse": new["drop"] > old["drop"] and new["ci95"][0] > 0,
        }

    def _metric(self, batch: Batch, names: list[str]) -> Metric:
        shapes = [spec.shape for spec in self.original.outputs]
        return metrics.get(self.metric, batch.labels is not None, batch.labels, shapes, names)


def _named(names: list[str], outputs: Sequence[Tensor]) -> Tensor | dict[str, Tensor]:
    return outputs[0] if len(outputs) == 1 else dict(zip(names, outputs, strict=True))


def _choose(tried: Sequence[_Tried]) -> _Tried | None:
    """The remedy that gains most, its cost counted; of two alike the one that stands first in the table."""
    helping = [one for one in tried if one.row["outcome"] == "helps"]
    if not helping:
        return None
    chosen = max(helping, key=lambda one: (round(one.worth, 1), -one.order))
    chosen.row["outcome"] = "kept"
    return chosen


def _nothing(record: Mapping[str, Any], first: Trial, start: Trial) -> str:
    """Why there is no better recipe."""
    gain = record.get("same_recipe_gain_db")
    if gain is not None and gain >= WORTH_DB:
        return (
            f"The same recipe calibrated on this data gains {gain:.1f} dB, and nothing else helps: compress again with "
            "this data. Nothing was written."
        )
    if first.error == 0 and start.error == 0:
        return "The outputs equal those of the float network: there is nothing to cure. Nothing was written."
    if not record["remedies"]:
        return "No layer stands out: each has a small share of the loss. Nothing was written."
    return "No remedy for these layers is worth its cost. Nothing was written."
