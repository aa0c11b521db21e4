"""The artifact folder: what a compression leaves behind, and how it is read back.

model.onnx …          the deployed file(s) of the target
graph.pt2             float graph, weights on their grid; with plan.json applied it is the simulated network
plan.json             what is quantized and how
recipe.toml           the explicit steps that made it
statistics.safetensors  means and deviations of the float network's layers on calibration samples
reference/            the original network through the same exporter (model file and graph.pt2)
sample.npz            golden inputs and outputs of the deployed file
run.py                runs the model with the runtime and numpy alone, and compares it with the golden pairs
measurements.json     the proof; report.html renders it
weights.safetensors   weights at their true width, where the model file can't hold it
manifest.json         SHA-256 of every file, versions, seed, digests, inputs and outputs
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, fx

from . import records, registry, store
from . import tensors as tensor_files
from .data import Batch, Source, read_arrays
from .data.batch import check_inputs, to_flat
from .errors import ArtifactError, DataError, GraphError
from .graph import Graph
from .graph.archive import load_pt2, save_pt2
from .graph.beside import names_beside
from .graph.graph import InputSpec
from .graph.simplify import CONTRACTIONS
from .numerics.moments import ChannelMoments
from .plan import Plan
from .plan.constants import Coded
from .plan.lower import BYTE
from .plan.packed import SCHEMA, packed_weights, unpacked_weight
from .plan.rescaled import counterpart
from .proof.measure import REFERENCE, Subject
from .recipe import Recipe
from .records import Measurement
from .steps.fold import fold
from .targets._base import Session, Target
from .targets._script import script

GRAPH, PLAN, RECIPE, SAMPLE = "graph.pt2", "plan.json", "recipe.toml", "sample.npz"
WEIGHTS, STATISTICS = "weights.safetensors", "statistics.safetensors"
RUNNER = "run.py"
STATISTIC_SAMPLES = 256
MEASUREMENTS, REPORT = "measurements.json", "report.html"
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
        for key, kind in _FACTS.items():
            if not isinstance(self.manifest.get(key), kind):
                raise ArtifactError(
                    f"{MANIFEST} of {path.name!r} has no valid {key!r}: compress the network again"
                )
        self._inputs, self._outputs = _specs(self.manifest["inputs"]), _specs(self.manifest["outputs"])

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Open an artifact after checking every file against the manifest.

        Raises ArtifactError for a folder that is none, Tampered naming files that changed.
        """
        store.verify_manifest(path)
        return cls(Path(path))

    @cached_property
    def plan(self) -> Plan:
        return Plan.from_record(records.load(self.path / PLAN)).checked()

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

    def weights(self) -> dict[str, Coded]:
        """The packed weights beside the model file, by tie; empty where the model file holds them itself.

        Raises ArtifactError for a file that is malformed.
        """
        path = self.path / WEIGHTS
        if not path.exists():
            return {}
        tensors, notes = tensor_files.read(path)
        return {key: unpacked_weight(tensors, notes, key) for key in notes if key != "schema"}

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
            fold(reference, self.target.rules())
        facts = {key: self.manifest.get(key) for key in ("recipe", "seed")}
        return Subject(self.path, reference, self.graph, self.plan, self.target, facts)

    def predict(self, inputs: Any) -> Tensor | dict[str, Tensor]:
        """Run the deployed file.

        Args:
            inputs: a tensor, a tuple in the network's order, or a dict by input name; arrays do as well.

        Returns the output tensor, or a dict by output name where there are several.

        Raises DataError when inputs are missing, unknown, or of another shape or dtype than the network takes;
        TargetError when the runtime fails.
        """
        flat, _ = to_flat(Batch(inputs), [spec.name for spec in self._inputs])
        outputs = self.session.run(check_inputs(flat, self._inputs))
        if len(outputs) == 1:
            return outputs[0]
        return {spec.name: value for spec, value in zip(self._outputs, outputs, strict=True)}


_FACTS = {"target": str, "target_options": dict, "inputs": list, "outputs": list}


def _specs(items: list[Any]) -> list[InputSpec]:
    """Inputs or outputs as `signature` wrote them. Raises ArtifactError."""
    try:
        return [InputSpec(str(item["name"]), tuple(item["shape"]), _dtype(item["dtype"])) for item in items]
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{MANIFEST} lists inputs or outputs that can't be read ({error}): compress the network again"
        ) from error


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise TypeError(f"{name!r} is no number format")
    return found


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
    widths = target.rules().widths
    if any(tie.source == "weight" and tie.format.bits not in widths for tie in plan.ties.values()):
        tensors, notes = packed_weights(graph, plan)
        tensor_files.write(folder / WEIGHTS, tensors, notes)
    (folder / RECIPE).write_text(recipe.to_toml(), encoding="utf-8")
    if target.runner is not None:
        (folder / RUNNER).write_text(script(target.runner), encoding="utf-8")


def write_statistics(folder: Path, reference: Graph, plan: Plan, calibration: Source) -> None:
    """Mean and deviation per channel of what each layer of the float network puts out, on calibration samples.

    reference: the float network folded, its own weights. Where the plan moved scales, the layers are looked at behind
    that, as the artifact has them.

    They are what is needed to make floats of the artifact again (`recover.dequantize`). Of layers that something stands
    beside there are none: what they have lost is made up for already.
    """
    if not plan.quantized:
        return
    reference = counterpart(reference, plan)
    compensated = {name for layer in plan.low_rank for name in (layer, *names_beside(layer))}
    layers = {
        node: reference.name(node)
        for node in reference.nodes()
        if reference.op(node).kind in CONTRACTIONS and reference.name(node) not in compensated
    }
    found = {name: ChannelMoments() for name in layers.values()}

    def look(node: fx.Node, value: Any) -> None:
        if node in layers:
            found[layers[node]].update(value, channel_axis(reference.op(node).kind))

    reference.gm.eval()
    with torch.no_grad():
        for inputs in few_samples(calibration):
            reference.run(*inputs, on_value=look)
    tensors: dict[str, Tensor] = {}
    for name, moments in found.items():
        tensors[f"{name}.mean"], tensors[f"{name}.deviation"] = moments.moments()
    tensor_files.write(folder / STATISTICS, tensors, {"schema": SCHEMA})


def read_statistics(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """(mean, deviation) by layer, float32 [C]. Raises ArtifactError where they are missing or malformed."""
    tensors, _ = tensor_files.read(folder / STATISTICS)
    names = dict.fromkeys(key.rpartition(".")[0] for key in tensors)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name in names:
        pair = tensors.pop(f"{name}.mean", None), tensors.pop(f"{name}.deviation", None)
        mean, deviation = pair
        if mean is None or deviation is None or not _are_moments(mean, deviation):
            raise ArtifactError(f"{STATISTICS} is malformed at {name!r}: compress the network again")
        found[name] = mean, deviation
    if tensors:
        raise ArtifactError(f"{STATISTICS} is malformed at {min(tensors)!r}: compress the network again")
    return found


def _are_moments(mean: Tensor, deviation: Tensor) -> bool:
    alike = (
        mean.dtype == deviation.dtype == torch.float32 and mean.dim() == 1 and mean.shape == deviation.shape
    )
    return alike and bool((torch.isfinite(mean) & torch.isfinite(deviation) & (deviation >= 0)).all())


def channel_axis(kind: str) -> int:
    """Which axis of a layer's output has the channels."""
    return -1 if kind == "linear" else 1


def few_samples(source: Source) -> Iterator[tuple[Tensor, ...]]:
    """Inputs of the first batches, until there are `STATISTIC_SAMPLES` of them."""
    seen = 0
    for batch in source:
        inputs = tuple(batch.inputs)
        yield inputs
        seen += len(inputs[0]) if inputs and inputs[0].dim() else 1
        if seen >= STATISTIC_SAMPLES:
            return


def write_sample(folder: Path, graph: Graph, inputs: tuple[Tensor, ...], session: Session) -> None:
    """Golden pairs: `input.<name>` and `output.<name>` arrays, as the deployed file takes and gives them."""
    few = tuple(
        value[:SAMPLES] if spec.shape and isinstance(spec.shape[0], str) else value
        for spec, value in zip(graph.inputs, inputs, strict=True)
    )
    taken, outputs = session.as_stored(few)
    arrays = {f"input.{spec.name}": value.numpy() for spec, value in zip(graph.inputs, taken, strict=True)}
    arrays |= {
        f"output.{spec.name}": value.numpy() for spec, value in zip(graph.outputs, outputs, strict=True)
    }
    with (folder / SAMPLE).open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def read_sample(folder: Path, graph: Graph, plan: Plan) -> tuple[Tensor, ...]:
    """The golden inputs as the network takes them, in its order: integers that stand for floats are dequantized.

    Raises ArtifactError for a sample that is missing, damaged, hostile, or of another network.
    """
    arrays, found = _sample(folder), []
    for spec in graph.inputs:
        value = _of_sample(arrays, f"input.{spec.name}")
        stored = stored_as(plan, spec.name, str(value.dtype).removeprefix("torch."))
        if stored is not None and spec.dtype.is_floating_point and not value.is_floating_point():
            value = (value.to(torch.int32) - stored["zero_point"]).float() * stored["scale"]
        found.append(value)
    try:
        return tuple(check_inputs(found, graph.inputs))
    except DataError as error:
        raise ArtifactError(
            f"{SAMPLE} is not this network's ({error}): compress the network again"
        ) from error


def _sample(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    try:
        return read_arrays(folder / SAMPLE)
    except DataError as error:
        raise ArtifactError(
            f"the golden sample can't be read ({error}): compress the network again"
        ) from error


def _of_sample(arrays: Mapping[str, np.ndarray[Any, Any]], name: str) -> Tensor:
    if name not in arrays:
        raise ArtifactError(f"{SAMPLE} has no {name!r}: compress the network again")
    return torch.from_numpy(arrays[name])


def stored_as(plan: Plan, producer: str, byte: str) -> dict[str, Any] | None:
    """`{dtype, scale, zero_point}` of a quantized tensor at an integer end of a file; None: it is no integer.

    byte: "uint8" or "int8", as the file has bytes there; wider integers are signed.
    """
    tie = plan.tie_of(producer)
    if tie is None:
        return None
    scale, zero_point = plan.ties[tie].parameters()
    fmt = plan.ties[tie].format
    dtype = byte if fmt.bits <= BYTE else "int16"
    offset = -fmt.low if dtype == "uint8" else 0
    return {"dtype": dtype, "scale": float(scale), "zero_point": int(zero_point) + offset}


def golden(folder: Path, graph: Graph, plan: Plan, session: Session) -> dict[str, Any]:
    """How far this machine's outputs are from the golden ones: `samples`, `max_difference`, `equal_share`.

    Both are null, with the reason, where an output has another shape or isn't finite.
    """
    arrays = _sample(folder)
    wanted = [_of_sample(arrays, f"output.{spec.name}") for spec in graph.outputs]
    inputs = read_sample(folder, graph, plan)
    _, found = session.as_stored(inputs)
    record: dict[str, Any] = {"samples": len(inputs[0]) if inputs and inputs[0].dim() else 1}
    worst, equal, count = 0.0, 0, 0
    for mine, theirs in zip(found, wanted, strict=True):
        if mine.shape != theirs.shape or not bool(torch.isfinite(mine.double() - theirs.double()).all()):
            for key in ("max_difference", "equal_share"):
                records.absent(
                    record, key, "an output is not finite or has another shape than the golden one"
                )
            return record
        if mine.numel():
            worst = max(worst, float((mine.double() - theirs.double()).abs().max()))
        equal, count = equal + int((mine == theirs).sum()), count + mine.numel()
    return {**record, "max_difference": worst, "equal_share": equal / count if count else 1.0}


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """`facts` (target, seed, digests, signature …) and the SHA-256 of every file."""
    records.dump(
        folder / MANIFEST, {**facts, "versions": records.versions(), "files": store.manifest(folder)}
    )


def signature(graph: Graph, plan: Plan, byte: str | None) -> dict[str, Any]:
    """Inputs and outputs as a manifest lists them; `stored` is what an integer end is in the file.

    byte: "uint8" or "int8", as the file has bytes there; None: its ends are floats.
    """
    made: dict[str, list[tuple[Any, str]]] = {
        "inputs": [(spec, spec.name) for spec in graph.inputs],
        "outputs": [
            (spec, graph.name(node)) for spec, node in zip(graph.outputs, graph.output_nodes(), strict=True)
        ],
    }
    found: dict[str, Any] = {}
    for kind, ends in made.items():
        found[kind] = []
        for spec, producer in ends:
            row = {
                "name": spec.name,
                "shape": list(spec.shape),
                "dtype": str(spec.dtype).removeprefix("torch."),
            }
            stored = stored_as(plan, producer, byte) if byte and spec.dtype.is_floating_point else None
            found[kind].append(row | ({"stored": stored} if stored else {}))
    return found


def copy_besides_report(source: Path, place: Path) -> dict[str, Any]:
    """Copy an artifact without its report and manifest; returns the manifest."""

    def skip(folder: str, names: list[str]) -> set[str]:
        return {REPORT, MANIFEST} & set(names) if Path(folder) == source else set()

    shutil.copytree(source, place, ignore=skip, copy_function=_link, dirs_exist_ok=True)
    manifest = records.load(source / MANIFEST)
    records.dump(place / MANIFEST, manifest)
    return manifest


def add_report(folder: Path, manifest: dict[str, Any]) -> None:
    """Put the checksum of a report that was rendered into the manifest."""
    manifest["files"][REPORT] = records.sha256_file(folder / REPORT)
    records.dump(folder / MANIFEST, manifest)


def _link(source: str, place: str) -> None:
    """A second name of the same file where the file system allows it, else a copy: models are large."""
    try:
        os.link(source, place)
    except OSError:
        shutil.copy2(source, place)
