"""What can still be done with an artifact when the float network is gone: another format, or floats again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from . import api
from . import artifact as artifacts
from .artifact import Artifact
from .data import Source
from .errors import ArtifactError
from .graph import Graph, Op
from .graph.simplify import CONTRACTIONS
from .metrics import Metric
from .numerics.moments import ChannelMoments, matching
from .plan import Plan
from .progress import NullProgress, Progress
from .recipe import Recipe


def requantize(
    folder: str | Path,
    recipe: str | Path | Recipe,
    *,
    data: Any,
    out: str | Path,
    target: str | None = None,
    evaluation: Any = None,
    metric: str | Metric | None = None,
    max_drop: float | None = None,
    effort: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Artifact:
    """Store an artifact's network in other formats, without the float original.

    What the network was before its first quantization isn't looked at: its weights are the ones that the artifact's
    codes stand for. So every loss in the record is an extra loss, against the artifact as floats, and the record's
    `origin` says what the artifact had lost itself.

    Args:
        folder: the artifact.
        recipe, data, out, evaluation, metric, max_drop, effort, seed, progress: as `compress` takes them. A recipe
            without preprocessing gets the artifact's.
        target: another runtime than the artifact's.

    Raises as `compress`, and:
        Tampered: files of the artifact changed since it was published.
        ArtifactError: nothing in it is quantized.
    """
    opened = Artifact.load(folder)
    if not opened.plan.quantized:
        raise ArtifactError(
            f"nothing in {opened.path.name!r} is quantized: compress it with the recipe instead"
        )
    record = opened.measurements
    origin = {
        "recipe": opened.manifest.get("recipe"),
        "target": opened.manifest.get("target"),
        "formats": _formats(opened.plan),
        "metric": record["task.metric"],
        "drop": record["task.drop"],
    }
    graph = opened.graph.clone()
    graph.origin = origin
    graph.notes.append(
        f"re-quantized from {origin['recipe']} on {origin['target']} ({', '.join(origin['formats'])}): the losses "
        "here come on top of that one's"
    )
    chosen = Recipe.of(recipe)
    if not chosen.preprocessing:  # it belongs to the data, not to the formats
        chosen = replace(chosen, preprocessing=opened.recipe.preprocessing)
    return api.compress(
        graph,
        chosen,
        target=target or opened.target.name,
        data=data,
        evaluation=evaluation,
        metric=metric,
        max_drop=max_drop,
        out=out,
        effort=effort,
        seed=seed,
        progress=progress,
    )


def dequantize(
    folder: str | Path, data: Any = None, *, correct: bool = True, progress: Progress | None = None
) -> Graph:
    """The network of an artifact as floats: the best estimate of the float original that the artifact allows.

    Codes become the numbers that they stand for. Rounding them shifted and spread what each layer puts out; with
    `correct` the layers get their mean and their standard deviation per channel back, as they were recorded of the
    float network on the calibration data, one after the other in the order of the network.

    Args:
        folder: the artifact.
        data: unlabelled batches like those that calibrated it, or a path; needed to correct.
        correct: False gives the plain numbers.

    Raises:
        Tampered: files of the artifact changed since it was published.
        ArtifactError: nothing in it is quantized, or it has no statistics. DataError: the data doesn't fit the network.
    """
    opened = Artifact.load(folder)
    if not opened.plan.quantized:
        raise ArtifactError(f"nothing in {opened.path.name!r} is quantized: bitport.load gives its floats")
    graph = opened.graph.clone()
    if not correct:
        return graph
    wanted = artifacts.read_statistics(opened.path)
    if data is None:
        raise ArtifactError(
            "correcting the floats takes data like that of the calibration: give data=, or correct=False"
        )
    source = api.source(data, graph, opened.recipe, "calibration", "ignored")
    graph.gm.eval()
    listener = progress or NullProgress()
    layers = [
        node for node in graph.nodes() if graph.op(node).kind in CONTRACTIONS and graph.name(node) in wanted
    ]
    with listener.task("correcting layers", len(layers)) as task:
        for node in layers:
            found = _moments(graph, node, source)
            if found[0].shape != wanted[graph.name(node)][0].shape:
                raise ArtifactError(
                    f"{artifacts.STATISTICS} is malformed at {graph.name(node)!r}, which has {len(found[0])} "
                    "channels: compress the network again"
                )
            _correct(graph, graph.op(node), *matching(*wanted[graph.name(node)], *found))
            task.advance(1)
    graph.notes.append(f"means and deviations of {len(layers)} layers were set to those of the float network")
    return graph


def _formats(plan: Plan) -> list[str]:
    """What weights are stored in, each once."""
    return sorted({str(tie.format) for tie in plan.ties.values() if tie.source == "weight"})


def _moments(graph: Graph, layer: fx.Node, source: Source) -> tuple[Tensor, Tensor]:
    moments, axis = ChannelMoments(), artifacts.channel_axis(graph.op(layer).kind)

    def look(node: fx.Node, value: Any) -> None:
        if node is layer:
            moments.update(value, axis)

    with torch.no_grad():
        for inputs in artifacts.few_samples(source):
            graph.run(*inputs, on_value=look)
    return moments.moments()


def _correct(graph: Graph, op: Op, gain: Tensor, shift: Tensor) -> None:
    """Fold `gain · y + shift` into a layer that nobody shares. Without a bias only the gain has a place."""
    weight, bias = op.operands[1], op.operands[2]
    if weight is None or weight.tensor is None or _shared(graph, weight.tensor):
        return
    value = graph.tensor(weight.tensor).detach()
    if op.kind == "conv_transpose":
        groups = int(op.attrs.get("groups", 1))
        per_group = gain.reshape(groups, -1).repeat_interleave(value.shape[0] // groups, 0)
        wide = per_group.reshape(value.shape[0], value.shape[1], *[1] * (value.dim() - 2))
    else:
        wide = gain.reshape(-1, *[1] * (value.dim() - 1))
    graph.set_tensor(weight.tensor, (value.double() * wide).to(value.dtype))
    if bias is not None and bias.tensor is not None and not _shared(graph, bias.tensor):
        old = graph.tensor(bias.tensor).detach()
        graph.set_tensor(bias.tensor, (old.double() * gain + shift).to(old.dtype))


def _shared(graph: Graph, tensor: str) -> bool:
    """Whether more than one operand is this tensor, under any of the names that a tied one has."""
    value = graph.tensor(tensor)
    operands = (operand for node in graph.nodes() for operand in graph.op(node).operands)
    return (
        sum(o is not None and o.tensor is not None and graph.tensor(o.tensor) is value for o in operands) > 1
    )
