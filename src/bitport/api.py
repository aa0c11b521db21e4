"""The Python interface: load → compress → verify → report."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import artifact as artifacts
from . import metrics, registry, store, synthetic
from .artifact import Artifact, make_target
from .checkpoint import Checkpoint, identity, keeping, run_steps
from .data import Batch, Source, open_data, read_arrays
from .errors import BitportError, DataError, GateFailed, LoadError, RecipeError
from .forecast import inspect
from .frontends import keras, onnx, pytorch, tensorflow
from .graph import Graph
from .graph.archive import load_pt2
from .graph.program import spans
from .graph.weights import check_weights
from .metrics import Metric
from .page import render
from .plan.retarget import retargeted, saturating
from .progress import NullProgress, Progress
from .proof import cost, device, doubts, preflight
from .proof.measure import Subject, measure, one_sample
from .proof.pace import Pace
from .proof.task import rehearse_on
from .recipe import Recipe
from .records import Measurement
from .simulate import Simulator
from .steps import _base as steps
from .targets._base import Target

__all__ = ["compress", "inspect", "load", "report", "targets", "verify"]

SAME_FUNCTION = ("fold", "equalize", "rotate")  # steps that only rewrite a network
LARGEST_DROP = 1e15  # beyond it nothing is judged, and figures of it don't fit into a report
REPORT_BYTES = 8 * 2**20


def load(
    model: nn.Module | str | Path,
    example_inputs: Any = None,
    *,
    dynamic_shapes: Any = "batch",
    device: str = "cpu",
    nonfinite: str = "refuse",
) -> Graph:
    """Bring a network into bitport.

    Args:
        model: an `nn.Module` (with `example_inputs`), a `.pt2`, `.onnx`, `.keras` or `.tflite` file, a SavedModel
            folder, or an artifact folder (its original network).
        example_inputs: a tensor, a tuple, or a dict of keyword arguments. A file needs them only where it leaves a
            shape open.
        dynamic_shapes: "batch" (axis 0 of every input), or what `torch.export.export` takes.
        device: where the graph lives.
        nonfinite: what to do about weights that are NaN or infinite: "refuse", or "zero": they become 0, and a note
            names each tensor with its counts. Running statistics are refused all the same.

    Raises:
        LoadError: it can't be read or captured; UnsafeFile when reading it would execute code.
        WeightsError: parameters hold NaN or infinite values.
        MissingDependency: the framework that the file is of isn't installed.
    """
    if isinstance(model, nn.Module):
        if example_inputs is None:
            raise LoadError(
                "an nn.Module needs example_inputs: a tensor, a tuple, or a dict of keyword arguments"
            )
        return pytorch.load_module(model, example_inputs, dynamic_shapes, device, nonfinite)
    if not isinstance(model, str | Path):
        raise LoadError(f"a {type(model).__name__} can't be loaded: give an nn.Module or the path of a file")
    path = Path(model)
    if not path.exists():
        raise LoadError(
            f"{path} doesn't exist: give a .pt2, .onnx, .keras or .tflite file, a SavedModel or artifact folder, or "
            "module:callable"
        )
    if path.is_dir() and tensorflow.is_saved_model(path):
        return tensorflow.load_saved_model(path, example_inputs, dynamic_shapes, device, nonfinite)
    if path.is_dir():
        return Artifact.load(path).original
    if path.suffix == ".pt2":
        return load_pt2(path, device, nonfinite)
    if path.suffix == ".keras":
        return keras.load_keras(path, example_inputs, dynamic_shapes, device, nonfinite)
    if path.suffix == ".tflite":
        return tensorflow.load_tflite(path, example_inputs, dynamic_shapes, device, nonfinite)
    if path.suffix == ".onnx":
        return onnx.load_onnx(path, example_inputs, dynamic_shapes, device, nonfinite)
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        raise LoadError(
            f"{path.name} holds pickled objects, which could run code: save the network with "
            "torch.export.save(torch.export.export(model, example_inputs), 'model.pt2')"
        )
    if path.suffix in (".h5", ".hdf5"):
        raise LoadError(
            f"{path.name} is of an older Keras: load it there, and save the network by model.save('net.keras')"
        )
    if path.suffix == ".py":
        raise LoadError(
            f"{path.name} is Python: name the function in it that returns (model, example_inputs), as {path.stem}:make"
        )
    raise LoadError(
        f"{path.name}: no front end reads {path.suffix or 'such'} files; .pt2, .onnx, .keras and .tflite files, "
        "SavedModel and artifact folders are read"
    )


def compress(
    graph: Graph,
    recipe: str | Path | Recipe,
    *,
    target: str,
    data: Any,
    train: Any = None,
    evaluation: Any = None,
    metric: str | Metric | None = None,
    max_drop: float | None = None,
    out: str | Path,
    teacher: Graph | None = None,
    effort: str | None = None,
    device: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Artifact:
    """Compress a network for a runtime, run it there, and publish the artifact with its proof.

    Args:
        graph: from `load`; never modified.
        recipe: a preset's name, a `Recipe`, or the path of a `.toml` file.
        target: the runtime's name (`bitport list targets`).
        data: calibration batches; labels are ignored. "synthetic": inputs are made up (`synthetic.inputs`).
        train, teacher: for steps that train.
        evaluation: batches that judge the result; without them the calibration data is used, without labels.
        metric: name or `Metric`; default: top1 with integer labels, agreement with the float network without.
        max_drop: the largest loss allowed, in the metric's unit; None: measured, not judged.
        out: the artifact folder: replaced whole, or left as it was.
        effort: "plain", "fast", "balanced" or "best": the steps that the recipe is expanded with.
        device: where the float passes of calibration run, as torch names it ("cuda"); the proof is of the runtime.
        seed: of every random choice. The caller's own random state is untouched.
        progress: listens to long work.

    Raises:
        WeightsError: parameters hold NaN or infinite values.
        GateFailed: a gate failed or is undecided; the result lies in `<out>.rejected/` with its report.
        NotEnoughMemory: less is left than the run takes at least; told before any work.
        Interrupted: stopped at a step's edge; the same call goes on from there.
        BitportError: anything else that is wrong; `out` is as it was.
    """
    started = time.perf_counter()
    progress = progress or NullProgress()
    check_weights(graph.gm)  # they may have been changed since the network was loaded
    _check_precision(graph)
    explicit, runtime = prepare(recipe, target, effort)
    made_up = isinstance(data, str) and data == synthetic.WORD
    if made_up and evaluation is None and max_drop is not None:
        raise DataError("max_drop can't be judged on synthetic data: give evaluation data as well")
    calibration = source(
        synthetic.inputs(graph, seed, progress) if made_up else data,
        graph,
        explicit,
        "calibration",
        "ignored",
    )
    judged = (
        source(evaluation, graph, explicit, "evaluation", "optional")
        if evaluation is not None
        else calibration
    )
    if train is not None or teacher is not None:
        raise RecipeError(
            "train= and teacher= need a step that trains, and this recipe has none: leave them out"
        )
    device = steps.usable_device(device)
    graph = graph.on_cpu()
    if max_drop is not None and not 0 <= max_drop <= LARGEST_DROP:
        raise RecipeError(
            f"max_drop = {max_drop}: give a number from 0 to {LARGEST_DROP:g}, in the metric's unit"
        )
    with (
        store.Workspace(out, need_bytes=_bytes_needed(graph)) as workspace,
        torch.random.fork_rng(devices=[]),
        contextlib.ExitStack() as ending,
    ):
        checkpoint = Checkpoint(
            workspace.out, lambda: identity(graph, calibration, explicit, runtime, seed, device)
        )
        first = _first(judged)
        given = [judged] if judged is calibration else [judged, calibration]
        preflight.ask(graph, first.inputs)
        chosen = _metric(metric, first.labels, graph)
        rehearse_on(graph, first, chosen)
        for other in given[1:]:
            preflight.ask(graph, _first(other).inputs)
        context = steps.Context(
            rules=runtime.rules(),
            arithmetic=runtime.arithmetic(),
            calibration=calibration,
            reference=graph,
            overrides=explicit.overrides,
            device=device,
            seed=seed,
            progress=progress,
            notes=list(graph.notes),
            pace=ending.enter_context(
                contextlib.closing(Pace(runtime, graph, one_sample(graph, first.inputs)))
            )
            if runtime.executes_integers
            else None,
        )
        with cost.peak_memory() as peak:
            state, resumed = run_steps(graph, explicit, runtime, context, checkpoint)
            work, plan = state.graph, state.plan
            ending.enter_context(keeping(checkpoint, state, explicit))
            artifacts.write(workspace.path, work, graph, plan, explicit, runtime)
        reference = context.reference_like(work)
        artifacts.write_statistics(workspace.path, reference, plan, calibration)
        facts = {"recipe": explicit.name, "seed": seed, **({"origin": graph.origin} if graph.origin else {})}
        subject = Subject(workspace.path, reference, work, plan, runtime, facts)
        artifacts.write_sample(workspace.path, work, tuple(first.inputs), runtime.open(workspace.path))
        changed = _changes_before_rounding(explicit)
        record = measure(subject, judged, chosen, max_drop, progress, None if changed else calibration)
        if changed and plan.quantized:
            record["plain_reason"] = f"{changed!r} changed the network on purpose before it was quantized"
        record["notes"] = [
            *context.notes,
            *doubts.of_data(calibration, judged, evaluation is not None, made_up),
            *(note for data in given for note in doubts.of_scale(data, graph.examples, "the example inputs")),
            *doubts.of_task(record["task"], graph),
            *doubts.of_limit(max_drop, chosen),
            *record["notes"],
        ]
        record["tried"] = context.tried
        record["seconds"] = {
            "total": time.perf_counter() - started,
            "steps": dict(state.seconds),
            **record["seconds"],
        }
        proof = Measurement(record)
        if resumed:
            proof.absent(
                "memory", "compress_peak_bytes", "the run was resumed: its first part wasn't measured"
            )
        else:
            proof.set("memory", "compress_peak_bytes", peak.bytes)
        proof.save(workspace.path / artifacts.MEASUREMENTS)
        manifest = {
            "target": runtime.name,
            "target_options": runtime.options,
            **facts,
            "metric": chosen.name,
            "max_drop": max_drop,
            "model_digest": graph.digest(),
            "data_digest": calibration.digest(),
            **artifacts.signature(
                work, plan, runtime.byte if runtime.options.get("io") == "integer" else None
            ),
        }
        artifacts.write_manifest(workspace.path, manifest)
        render(workspace.path)
        artifacts.write_manifest(workspace.path, manifest)
        if record["verdict"]["passed"]:
            place = workspace.publish()
        else:
            place = workspace.publish_as(workspace.out.with_name(workspace.out.name + ".rejected"))
        checkpoint.discard()
    if record["verdict"]["passed"]:
        return Artifact(place)
    raise GateFailed(f"{record['verdict']['sentence']} The result is in {place}", record, place)


def verify(
    folder: str | Path,
    data: Any = None,
    metric: str | Metric | None = None,
    target: str | None = None,
    *,
    outputs: str | Path | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Measurement:
    """Run an artifact again on this machine and measure it against its float network. The folder isn't changed.

    Args:
        folder: the artifact.
        data: evaluation batches or a path; default: the artifact's golden inputs, judged by agreement.
        metric: default: the one that the artifact was judged by, where it is a built-in and `data` allows it; else
            as in `compress`.
        target: run the same plan on another runtime.
        outputs: nothing is run: judge these outputs, which a device made of the inputs in `sample.npz`. An `.npz`, or
            a mapping, with an array `output.<name>` for each output. The record is that of `proof.device`.

    Raises:
        Tampered: files of the folder changed since it was published.
        TargetError: the runtime fails.
        DataError: `outputs` lacks an output, or has one of another shape or dtype, or not finite.

    What this machine makes of the golden inputs is told in `golden`; a difference is a note, not an error, because
    float operators may round otherwise on another processor.
    """
    opened = Artifact.load(folder)
    if outputs is not None:
        if (data, metric, target) != (None, None, None):
            raise DataError(
                "outputs= are judged by the golden sample alone: leave out data=, metric= and target="
            )
        return _judge_device(opened, outputs)
    subject = opened.subject()
    given = data is not None
    if data is None:
        data = [Batch(artifacts.read_sample(opened.path, subject.graph, opened.plan))]
    judged = source(data, subject.graph, opened.recipe, "evaluation", "optional")
    listener = progress or NullProgress()
    # a handful of golden samples can't decide the artifact's gate; data that was given can
    chosen, limit, notes = _gate(opened, _first(judged), metric, given, subject.graph)
    if target is None or target == opened.target.name:
        record = measure(subject, judged, chosen, limit, listener)
        record["golden"] = artifacts.golden(opened.path, subject.graph, opened.plan, opened.session)
        if record["golden"]["max_difference"] != 0:
            notes.append(
                "this machine's results of the golden inputs differ from the golden outputs (see `golden`)"
            )
    else:
        with tempfile.TemporaryDirectory() as scratch:
            moved = _moved(opened, subject, target, Path(scratch))
            record = measure(moved, judged, chosen, limit, listener)
        wide = saturating(moved.plan, moved.target.rules())
        if wide:
            notes.append(
                f"this processor's {target} adds pairs of products in 16 bits, which 8-bit weights can exceed "
                f"({', '.join(wide[:3])}{' …' if len(wide) > 3 else ''}): compressed for {target} here, they get 7 bits"
            )
        record["golden"] = None
        record["golden_reason"] = f"the golden outputs are of {opened.target.name}, not of {target}"
    if given:
        sample = artifacts.read_sample(opened.path, subject.graph, opened.plan)
        known = spans(sample, [spec.name for spec in subject.graph.inputs])
        notes += doubts.of_scale(judged, known, "the artifact's golden sample")
    record["notes"] = [*notes, *record["notes"]]
    return Measurement(record)


def report(folder: str | Path) -> Path:
    """Render `report.html` of an artifact from its records; returns its path.

    Raises Tampered when anything but the report changed since it was published; ArtifactError for a folder that is
    no artifact or can't be written; Locked while another run writes to it.
    """
    path = Path(folder)
    store.verify_manifest(path, besides=(artifacts.REPORT,))
    with store.Workspace(path.resolve()) as workspace:
        manifest = artifacts.copy_besides_report(path, workspace.path)
        render(workspace.path)
        artifacts.add_report(workspace.path, manifest)
        workspace.publish()
    return path / artifacts.REPORT


def targets() -> dict[str, dict[str, Any]]:
    """Known targets: name → `summary`, `available`, and what it `needs` when it isn't."""
    found: dict[str, dict[str, Any]] = {}
    for name in registry.names("targets"):
        try:
            target = registry.get("targets", name).TARGET
            target.check_installed()
            found[name] = {"summary": target.summary, "available": True}
        except (BitportError, ImportError) as error:
            found[name] = {
                "summary": registry.summary("targets", name),
                "available": False,
                "needs": str(error),
            }
    return found


# ------------------------------------------------------------------------------------------------ parts


def prepare(recipe: str | Path | Recipe, target: str, effort: str | None = None) -> tuple[Recipe, Target]:
    """The explicit recipe, and the target with its options; loads nothing.

    Raises UnknownName, RecipeError, and MissingDependency before any work where the runtime isn't installed.
    """
    explicit = Recipe.of(recipe).expand(effort)
    runtime = make_target(target, dict(explicit.target))
    runtime.check_installed()
    return explicit, runtime


def source(data: Any, graph: Graph, recipe: Recipe, role: str, labels: str) -> Source:
    """Data in the caller's form, or the path of it, as batches for a network; images as the recipe prepares them.

    Raises DataError.
    """
    names = [spec.name for spec in graph.inputs]
    if isinstance(data, str | Path):
        data = open_data(data, names=names, preprocessing=recipe.preprocessing)
    return Source(data, role=role, names=names, labels=labels, specs=graph.inputs)


def _first(source: Source) -> Batch:
    try:
        return next(iter(source))
    except StopIteration:
        raise DataError(f"the {source.role} data is empty: give at least one batch") from None


def _check_precision(graph: Graph) -> None:
    """Integer kernels begin and end in float32. Raises LoadError for a network of another precision."""
    floats = [*((spec.name, spec.dtype) for spec in graph.inputs)]
    floats += [(name, parameter.dtype) for name, parameter in graph.gm.named_parameters()]
    for name, dtype in floats:
        if dtype.is_floating_point and dtype != torch.float32:
            raise LoadError(
                f"{name!r} is {str(dtype).removeprefix('torch.')}: compression starts from float32; "
                "call model.float(), give float32 inputs, and load the network again"
            )


def _bytes_needed(graph: Graph) -> int:
    """What a run writes at most: three float copies of the network, its integers, the report."""
    tensors = [*graph.gm.parameters(), *graph.gm.buffers()]
    return REPORT_BYTES + sum(t.numel() * t.element_size() for t in tensors) * 13 // 4


def _changes_before_rounding(recipe: Recipe) -> str | None:
    """The first step before `quantize` that may change what the network computes; None where there is none.

    Plain rounding of the original network says nothing of such a result: a pruned one is further away by intent.
    """
    uses = [step.use for step in recipe.steps]
    before = uses[: uses.index("quantize")] if "quantize" in uses else []
    return next((use for use in before if use not in SAME_FUNCTION), None)


def _metric(metric: str | Metric | None, labels: Any, graph: Graph) -> Metric:
    """As `metrics.get`, for the outputs of a network."""
    shapes, names = [spec.shape for spec in graph.outputs], [spec.name for spec in graph.outputs]
    return metrics.get(metric, labels is not None, labels, shapes, names)


def _gate(
    opened: Artifact,
    first: Batch,
    metric: str | Metric | None,
    given: bool,
    graph: Graph,
) -> tuple[Metric, float | None, list[str]]:
    """(metric, limit, notes) to verify with: the artifact's own, unless another was asked for or it can't be."""
    own, limit = str(opened.manifest.get("metric")), opened.manifest.get("max_drop")
    labels = first.labels
    if metric is None and given and own.partition(":")[0] in metrics.known():
        with contextlib.suppress(DataError):  # it needs labels and there are none
            metric = metrics.get(own, labels is not None, labels)
    chosen = _metric(metric, labels, graph)
    if not given or limit is None:
        return chosen, None, []
    if chosen.name != own:
        return (
            chosen,
            None,
            [f"the artifact's gate is on {own!r} and was not judged: give metric= and its data"],
        )
    return chosen, float(limit), []


def _judge_device(opened: Artifact, outputs: str | Path | Mapping[str, Any]) -> Measurement:
    found = outputs if isinstance(outputs, Mapping) else read_arrays(outputs)
    sample = read_arrays(opened.path / artifacts.SAMPLE)
    graph, inputs = opened.graph, artifacts.read_sample(opened.path, opened.graph, opened.plan)
    arrays = device.read_outputs(found, sample, [spec.name for spec in graph.outputs])
    simulated = Simulator(graph, opened.plan, opened.target.arithmetic()).run(inputs)
    with torch.no_grad():
        real = opened.original.run(*inputs)
    record = device.judge_outputs(arrays, sample, graph, opened.plan, simulated, real)
    facts = {key: opened.manifest.get(key) for key in ("recipe", "target")}
    return Measurement({**facts, **record, "notes": []})


def _moved(opened: Artifact, subject: Subject, target: str, scratch: Path) -> Subject:
    other = make_target(target)
    other.check_installed()
    plan = retargeted(subject.plan, subject.graph, other.rules())
    artifacts.write(scratch, subject.graph, opened.original, plan, opened.recipe, other)
    return Subject(scratch, subject.reference, subject.graph, plan, other, subject.facts)
