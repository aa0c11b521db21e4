"""The artifact folder: what a compression leaves behind, and how it is read back.

model.onnx …          the deployed file(s) of the target
graph.pt2             float graph, weights on their grid; with plan.json applied it is the simulated network
plan.json             what is quantized and how
recipe.toml           the explicit steps that made it
reference/            the original network through the same exporter (model file and graph.pt2)
sample.npz            golden inputs and outputs of the deployed file
measurements.json     the proof; report.html renders it
manifest.json         SHA-256 of every file, versions, seed, digests, inputs and outputs
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from . import records, registry, store
from .errors import ArtifactError, GraphError
from .graph import Graph
from .graph.archive import load_pt2, save_pt2
from .graph.simplify import simplify
from .plan import Plan
from .proof.measure import REFERENCE, Subject
from .recipe import Recipe
from .records import Measurement
from .targets._base import Session, Target

GRAPH, PLAN, RECIPE, SAMPLE = "graph.pt2", "plan.json", "recipe.toml", "sample.npz"
MEASUREMENTS = "measurements.json"
MANIFEST = store.MANIFEST
SAMPLES = 16  # golden pairs kept


def make_target(name: str, options: dict[str, Any] | None = None) -> Target:
    """The target called `name`. Raises UnknownName, RecipeError for a wrong option."""
    target: Target = registry.get("targets", name).TARGET(options)
    return target


class Artifact:
    """A published artifact folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = records.load(path / MANIFEST)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Open an artifact after checking every file against the manifest.

        Raises ArtifactError for a folder that is none, Tampered naming files that changed.
        """
        store.verify_manifest(path)
        return cls(Path(path))

    @cached_property
    def plan(self) -> Plan:
        return Plan.from_record(records.load(self.path / PLAN))

    @cached_property
    def recipe(self) -> Recipe:
        return Recipe.load(self.path / RECIPE)

    @property
    def measurements(self) -> Measurement:
        return Measurement.load(self.path / MEASUREMENTS)

    @cached_property
    def graph(self) -> Graph:
        """The float graph with its weights on their grid."""
        return load_pt2(self.path / GRAPH)

    @cached_property
    def original(self) -> Graph:
        """The float network as it was loaded."""
        return load_pt2(self.path / REFERENCE / GRAPH)

    @cached_property
    def target(self) -> Target:
        return make_target(str(self.manifest["target"]), dict(self.manifest["target_options"]))

    @cached_property
    def session(self) -> Session:
        return self.target.open(self.path)

    def subject(self) -> Subject:
        """What `verify.measure` measures."""
        reference = self.original
        if self.graph.stage == "folded":
            reference.gm.eval()
            simplify(reference)
        facts = {key: self.manifest.get(key) for key in ("recipe", "seed")}
        return Subject(self.path, reference, self.graph, self.plan, self.target, facts)

    def predict(self, inputs: Any) -> Tensor | dict[str, Tensor]:
        """Run the deployed file.

        Args:
            inputs: a tensor, a tuple in the network's order, or a dict by input name.

        Returns the output tensor, or a dict by output name where there are several.

        Raises ArtifactError when inputs are missing or unknown; TargetError when the runtime fails.
        """
        names = [item["name"] for item in self.manifest["inputs"]]
        if isinstance(inputs, dict):
            if set(inputs) != set(names):
                raise ArtifactError(f"inputs {sorted(inputs)} were given; the network takes {names}")
            flat = [inputs[name] for name in names]
        else:
            flat = list(inputs) if isinstance(inputs, tuple | list) else [inputs]
        if len(flat) != len(names):
            raise ArtifactError(f"{len(flat)} inputs were given; the network takes {len(names)}: {names}")
        outputs = self.session.run([torch.as_tensor(value) for value in flat])
        if len(outputs) == 1:
            return outputs[0]
        return {item["name"]: value for item, value in zip(self.manifest["outputs"], outputs, strict=True)}


def write(folder: Path, graph: Graph, original: Graph, plan: Plan, recipe: Recipe, target: Target) -> None:
    """Write what is reproducible: model, graphs, plan, recipe, reference. Raises ExportError."""
    (folder / REFERENCE).mkdir()
    try:
        target.export(graph, plan, folder)
        target.export(original, Plan.empty(target.name), folder / REFERENCE)
        save_pt2(graph, folder / GRAPH)
        save_pt2(original, folder / REFERENCE / GRAPH)
    except GraphError as error:
        raise ArtifactError(f"the network can't be written: {error}") from error
    records.dump(folder / PLAN, plan.to_record())
    (folder / RECIPE).write_text(recipe.to_toml(), encoding="utf-8")


def write_sample(folder: Path, graph: Graph, inputs: tuple[Tensor, ...], session: Session) -> None:
    """Golden pairs: `input.<name>` and `output.<name>` arrays of the deployed file."""
    few = tuple(
        value[:SAMPLES] if spec.shape and isinstance(spec.shape[0], str) else value
        for spec, value in zip(graph.inputs, inputs, strict=True)
    )
    arrays = {f"input.{spec.name}": value.numpy() for spec, value in zip(graph.inputs, few, strict=True)}
    outputs = session.run(few)
    arrays |= {
        f"output.{spec.name}": value.numpy() for spec, value in zip(graph.outputs, outputs, strict=True)
    }
    with (folder / SAMPLE).open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def read_sample(folder: Path, graph: Graph) -> tuple[Tensor, ...]:
    """The golden inputs, in the network's order."""
    with np.load(folder / SAMPLE, allow_pickle=False) as arrays:
        return tuple(torch.from_numpy(arrays[f"input.{spec.name}"]) for spec in graph.inputs)


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """`facts` (target, seed, digests, signature …) and the SHA-256 of every file."""
    records.dump(
        folder / MANIFEST, {**facts, "versions": records.versions(), "files": store.manifest(folder)}
    )


def signature(graph: Graph) -> dict[str, Any]:
    """Inputs and outputs as a manifest lists them."""
    return {
        kind: [
            {"name": spec.name, "shape": list(spec.shape), "dtype": str(spec.dtype).removeprefix("torch.")}
            for spec in specs
        ]
        for kind, specs in (("inputs", graph.inputs), ("outputs", graph.outputs))
    }


def refresh_report(folder: Path) -> None:
    """Record a report that was rendered again."""
    text = (folder / MANIFEST).read_text(encoding="utf-8")
    manifest = json.loads(text)
    manifest["files"]["report.html"] = records.sha256_file(folder / "report.html")
    records.dump(folder / MANIFEST, manifest)
