"""One measurement record of one artifact: task, parity, integers, latency, size, memory.

Three ways, always: the original network on the same runtime (`float`), the exact simulator (`simulated`), the
compressed file on the runtime (`runtime`). A value that can't be had is null with its reason beside it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import records
from ..data import Source
from ..errors import TargetError
from ..graph import Graph
from ..metrics import Metric
from ..numerics.error import finite
from ..plan import Plan
from ..plan.rescaled import counterpart
from ..progress import Progress
from ..simulate import Simulator
from ..targets._base import Inspection, Target, host
from . import blame, cost, pace
from .distributions import distributions
from .integer import integer_record, layer_bytes, storage_record
from .network import network_record
from .parity import LayerError, Parity
from .plain import hint, plain_record
from .task import TaskAccumulator
from .verdict import judge

PARITY_SAMPLES = 256  # millions of integers; the simulator is slower than the runtime
WATCHED_ALIKE = 60.0  # dB between outputs with and without taps: float operators may be ordered otherwise
MIN_EXACT_SHARE = 0.99
MIN_FLOAT_DB = 40.0  # where only floats can be compared; unasked 8-bit activations alone cost more
SUSPICIOUS_STEPS = (
    32  # an eighth of the 8-bit range between an optimized kernel and the operators it replaces
)
REFERENCE = "reference"

# Sections that need a deployed file, and the keys of them that readers may count on.
_DEPLOYED = {
    "size": ("float_bytes", "compressed_bytes", "ratio"),
    "latency": ("float_ms", "compressed_ms", "speedup", "ci95", "threads", "batch", "verdict"),
    "memory": ("float_run_peak_bytes", "run_peak_bytes"),
}
_PARITY = ("exact_share", "max_steps", "top1_agreement", "edges")


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        folder: the artifact: model file(s), and the original network in `reference/`.
        reference: the float network folded, original weights.
        graph, plan: the compressed network.
        target: its runtime.
        facts: what the record shall say besides (recipe, seed).
    """

    folder: Path
    reference: Graph
    graph: Graph
    plan: Plan
    target: Target
    facts: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def counterpart(self) -> Graph:
        """The reference rotated and scaled as the plan says: tensor by tensor what the compressed network rounds."""
        return counterpart(self.reference, self.plan)


def measure(
    subject: Subject,
    evaluation: Source,
    metric: Metric,
    max_drop: float | None,
    progress: Progress,
    calibration: Source | None = None,
) -> dict[str, Any]:
    """Everything that can be measured on this machine. Raises TargetError when the runtime fails.

    calibration: the data that ranges were taken from, where it is at hand; plain rounding takes its own from it.
    """
    started = time.perf_counter()
    folder, graph, plan, target = subject.folder, subject.graph, subject.plan, subject.target
    macs = cost.macs(
        subject.counterpart
    )  # with what stands beside its layers, which the original doesn't have
    inspection = target.inspect(folder, plan)
    record: dict[str, Any] = {
        "schema": 1,
        "target": target.name,
        **subject.facts,
        "model": {
            "parameters": sum(p.numel() for p in subject.reference.gm.parameters()),
            "macs": sum(cost.macs(subject.reference).values()),
            "digest": subject.reference.digest(),
        },
        "host": {**host(), "threads": target.options.get("threads", 1)},
        "macs": sum(macs.values()),
        "sparsity": cost.sparsity(graph),
        "integer": integer_record(graph, plan, inspection, macs),
        "versions": records.versions(),
        "notes": list(inspection.notes),
    }
    watched = target.watchable(graph, plan, folder) if plan.quantized else nullcontext()
    with watched as shown:
        parity = _run_task(subject, shown, inspection, evaluation, metric, max_drop, progress, record)
    record["storage"] = storage_record(graph, plan, inspection)
    if not plan.quantized:
        for section in ("plain", "storage"):
            _absent(record, section, "nothing is quantized")
    elif calibration is None:
        _absent(
            record, "plain", "only compress can compare with plain rounding: it takes the calibration data"
        )
    else:
        both = ((batch.inputs for batch in source) for source in (evaluation, calibration))
        record["plain"] = plain_record(subject.reference, graph, plan, target.arithmetic(), *both)
        record["notes"] += hint(record["plain"])
    record["layers"] = _layers(subject, parity.layers if parity else {}, macs)
    inputs = (batch.inputs for batch in evaluation)
    blame.record_shares(record["layers"], subject.counterpart, graph, plan, target.arithmetic(), inputs)
    record["network"] = network_record(graph, plan, inspection)
    if plan.quantized:
        record["distributions"] = distributions(subject.counterpart, plan, evaluation, progress)
        if not record["distributions"]:
            _absent(record, "distributions", "nothing is stored as integers")
    else:
        _absent(record, "distributions", "nothing is quantized")
    if target.executes_integers:
        record["size"] = cost.sizes(folder / REFERENCE, folder)
        record["latency"] = _latency(subject, evaluation, progress)
        record["memory"] = _run_memory(subject)
    else:
        why = f"{target.name} is a simulation: nothing was deployed"
        record |= {section: _empty(keys, why) for section, keys in _DEPLOYED.items()}
    _absent(record["memory"], "compress_peak_bytes", "only compress can measure it")
    record["seconds"] = {"verify": time.perf_counter() - started}
    record["verdict"] = judge(record, _gates(record))
    return record


def _gates(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    parity, plain = record["parity"], record["plain"]
    if "local" not in parity:
        return []
    gates = []
    if parity["local"]["integers"]:
        share = parity["local"]["exact_share"]
        gates.append(_gate("runtime equals simulation", share, MIN_EXACT_SHARE, share >= MIN_EXACT_SHARE))
    elif parity["outputs_db"] is not None:
        decibel = parity["outputs_db"]
        gates.append(_gate("runtime follows simulation (dB)", decibel, MIN_FLOAT_DB, decibel >= MIN_FLOAT_DB))
    if plain is not None and not plain["holds"]:  # else it would be one more line that says nothing
        gates.append(
            _gate("no worse than plain rounding (dB)", plain["sqnr_db"], plain["plain_sqnr_db"], False)
        )
    return gates


def _gate(name: str, value: float, limit: float, holds: bool) -> dict[str, Any]:
    return {"name": name, "value": value, "limit": limit, "verdict": "holds" if holds else "fails"}


# ------------------------------------------------------------------------------------------------ task, parity


def _run_task(
    subject: Subject,
    shown: Path | None,
    inspection: Inspection,
    evaluation: Source,
    metric: Metric,
    max_drop: float | None,
    progress: Progress,
    record: dict[str, Any],
) -> Parity | None:
    target, plan = subject.target, subject.plan
    original, deployed = target.open(subject.folder / REFERENCE), target.open(subject.folder)
    simulator = Simulator(subject.graph, plan, target.arithmetic())
    parity: Parity | None = None
    if shown is not None:
        _check_taps(subject, shown, inspection)
        parity = Parity(subject.counterpart, plan, simulator, target.open(shown, taps=True))
    task = TaskAccumulator(metric, max_drop)
    agreed = compared = 0
    with progress.task("verifying on " + target.name) as bar:
        for batch in evaluation:
            inputs = batch.inputs
            real, found = original.run(inputs), deployed.run(inputs)
            if parity is not None and parity.samples < PARITY_SAMPLES:
                simulated = parity.update(inputs, found)
            else:
                simulated = simulator.run(inputs)
            task.update(
                _named(subject, real), _named(subject, simulated), _named(subject, found), batch.labels
            )
            if found[0].dim() >= 2 and found[0].is_floating_point():
                agreed += int((found[0].argmax(-1) == simulated[0].argmax(-1)).sum())
                compared += found[0].argmax(-1).numel()
            bar.advance(1)
    record["task"] = task.record()
    record["notes"] += task.doubts()
    if parity is None:
        record["parity"] = _empty(_PARITY, "nothing is quantized")
    else:
        record["parity"] = parity.record()
        _absent(record["parity"], "top1_agreement", "the network has no class scores")
        if compared:
            record["parity"]["top1_agreement"] = agreed / compared
            record["parity"].pop("top1_agreement_reason")
        watched = record["parity"]["watched_db"]
        if watched is not None and watched < WATCHED_ALIKE:
            record["notes"].append(
                f"without taps {target.name} gives other outputs, {watched:.0f} dB apart: it fuses across a rounding "
                "of the plan, so that parity, which is measured with taps, isn't that of the deployed file"
            )
    if shown is not None:
        _judge_optimizer(subject, shown, evaluation, record)
    return parity


def _named(subject: Subject, outputs: Sequence[Tensor]) -> Tensor | dict[str, Tensor]:
    if len(outputs) == 1:
        return outputs[0]
    return {spec.name: value for spec, value in zip(subject.reference.outputs, outputs, strict=True)}


def _check_taps(subject: Subject, shown: Path, plain: Inspection) -> None:
    """Watching must not change what is watched: the same kernels run with and without taps."""
    tapped = subject.target.inspect(shown, subject.plan, taps=True)
    if set(plain.missed) != set(tapped.missed):
        changed = sorted(set(plain.missed) ^ set(tapped.missed))
        raise TargetError(
            f"{subject.target.name} runs other kernels when its integers are watched ({', '.join(changed[:5])}): "
            "the comparison would not be of the deployed file"
        )


def _judge_optimizer(subject: Subject, shown: Path, evaluation: Source, record: dict[str, Any]) -> None:
    name = subject.target.name
    if subject.target.runs_as_written:
        _absent(record, "optimizer", f"{name} runs a file as it is written")
        return
    moved = _optimizer(subject, shown, evaluation)
    record["optimizer"] = moved
    if moved["max_steps"] > SUSPICIOUS_STEPS:
        record["notes"].append(
            f"{name}'s optimizer moves integers of {moved['tensor']!r} by up to {moved['max_steps']} steps "
            "against the same file run as written: look there first"
        )


def _optimizer(subject: Subject, shown: Path, evaluation: Source) -> dict[str, Any]:
    """The runtime's optimizer against the same file run as written: exposes the runtime's own bugs.

    Roundings differ by a step here and there and accumulate; a wrong kernel moves integers by dozens at once.
    """
    inputs = next(iter(evaluation)).inputs
    sessions = (subject.target.open(shown, taps=True, optimize=optimize) for optimize in (False, True))
    (written, written_taps), (optimized, taps) = (session.run_tapped(inputs) for session in sessions)
    worst = span = 0.0
    for a, b in zip(written, optimized, strict=True):
        if a.is_floating_point() and a.numel():
            worst = max(worst, float((a - b).abs().max()))
            span = max(span, float(a.abs().max()))
    steps = {
        name: int((taps[name] - q).abs().max())
        for name, q in written_taps.items()
        if name in taps and q.numel()
    }
    where = max(steps, key=lambda name: steps[name], default=None)
    return {
        "max_abs_difference": worst,
        "largest_output": span,
        "max_steps": steps[where] if where is not None else 0,
        "tensor": where,
        "checked": len(inputs[0]),
    }


def _layers(
    subject: Subject, errors: Mapping[str, LayerError], macs: Mapping[str, int]
) -> list[dict[str, Any]]:
    rows = []
    for node in subject.graph.nodes():
        name = subject.graph.name(node)
        todo = subject.plan.node(name)
        kind = subject.graph.op(node).kind
        heavy = name in macs
        if not heavy and (todo.role not in ("compute", "elementwise")):
            continue
        error = errors.get(todo.absorbs or name)
        before, after = layer_bytes(subject.graph, subject.plan, name)
        row: dict[str, Any] = {
            "name": name,
            "op": kind,
            "macs": macs.get(name, 0),
            "kernel": todo.kernel,
            "float_bytes": before,
            "compressed_bytes": after,
        }
        if error is None:
            for key in ("sqnr_db", "sqnr_runtime_db", "steps_max", "exact_share"):
                _absent(row, key, todo.reason or "its result is not quantized")
        else:
            row["sqnr_db"], row["sqnr_runtime_db"] = (
                finite(error.simulated.sqnr_db),
                finite(error.runtime.sqnr_db),
            )
            if error.local.integers:
                row["steps_max"], row["exact_share"] = error.local.worst, error.local.exact_share
            else:
                for key in ("sqnr_runtime_db", "steps_max", "exact_share"):
                    _absent(
                        row, key, "its result is float, which can't be watched without changing what runs"
                    )
        rows.append(row)
    return rows


def _absent(section: dict[str, Any], key: str, reason: str) -> None:
    section[key], section[f"{key}_reason"] = None, reason


def _empty(keys: Sequence[str], reason: str) -> dict[str, Any]:
    section: dict[str, Any] = {}
    for key in keys:
        _absent(section, key, reason)
    return section


# ------------------------------------------------------------------------------------------------ latency, memory


def one_sample(graph: Graph, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The first sample of a batch, as a batch of one where the batch axis is dynamic."""
    return tuple(
        value[:1].contiguous() if spec.shape and isinstance(spec.shape[0], str) else value
        for spec, value in zip(graph.inputs, inputs, strict=True)
    )


def _latency(subject: Subject, evaluation: Source, progress: Progress) -> dict[str, Any]:
    inputs = one_sample(subject.graph, next(iter(evaluation)).inputs)
    return pace.between(subject.target, subject.folder / REFERENCE, subject.folder, inputs, progress=progress)


_SETUP = """
import importlib, json
from pathlib import Path
import torch
from bitport import registry
from bitport.targets import _trial
_trial.expendable()
name, options, folder, shapes, modules = arguments
target = registry.get("targets", name).TARGET(json.loads(options))
for module in json.loads(modules):
    importlib.import_module(module)
inputs = [torch.zeros(shape, dtype=getattr(torch, dtype)) for shape, dtype in json.loads(shapes)]
"""
_RUN = """
session = target.open(Path(folder))
for _ in range(3):
    session.run(inputs)
"""


def _run_memory(subject: Subject) -> dict[str, Any]:
    """Peak memory of loading and running each file in a process of its own, above the level after imports."""
    shapes = [
        [_example_shape(subject.graph, spec.shape), str(spec.dtype).removeprefix("torch.")]
        for spec in subject.graph.inputs
    ]
    found: dict[str, Any] = {}
    for key, folder in (
        ("float_run_peak_bytes", subject.folder / REFERENCE),
        ("run_peak_bytes", subject.folder),
    ):
        arguments = (
            subject.target.name, json.dumps(subject.target.options), str(folder), json.dumps(shapes),
            json.dumps(subject.target.modules),
        )  # fmt: skip
        try:
            found[key] = cost.run_memory(_SETUP, _RUN, arguments)
        except TargetError as error:
            _absent(found, key, str(error))
    return found


def _example_shape(graph: Graph, shape: tuple[int | str, ...]) -> list[int]:
    """A batch of one, other symbolic axes as long as in the example the network was loaded with."""
    return [
        axis if isinstance(axis, int) else 1 if index == 0 else graph.sizes.get(axis, 2)
        for index, axis in enumerate(shape)
    ]
