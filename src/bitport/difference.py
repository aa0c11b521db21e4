"""Two artifacts of one network, layer by layer: `bitport.diff("a/", "b/")`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import api
from . import artifact as artifacts
from .artifact import Artifact
from .numerics.error import finite, sqnr_db
from .progress import NullProgress, Progress
from .proof.apart import apart
from .records import Measurement


def diff(
    first: str | Path, second: str | Path, data: Any = None, *, progress: Progress | None = None
) -> Measurement:
    """Where two artifacts of one network part. The folders aren't changed.

    Args:
        first, second: the artifacts; targets, recipes and formats may differ.
        data: batches or a path, of which the first one is looked at; default: the first artifact's golden inputs.

    Returns a record: `layers`, in the network's order, each {name, op, first, second, apart_db}, where `first` and
    `second` hold {sqnr_db, weights, result}: SQNR in dB against the float network (None: equal), formats of weights and
    result; `worst`, the layer at which the second loses most against the first, beyond what it has lost
    before it (None: nowhere); `outputs`,
    what the deployed files give, apart_db by name.

    Raises:
        ArtifactError: a folder is no artifact, or they are of different networks.
        Tampered: files changed since they were published.
    """
    listener = progress or NullProgress()
    opened = [Artifact.load(folder) for folder in (first, second)]
    subjects = [one.subject() for one in opened]
    graph = subjects[0].graph
    if data is None:
        inputs = artifacts.read_sample(opened[0].path, graph, opened[0].plan)
    else:
        batches = api.source(data, graph, opened[0].recipe, "evaluation", "optional")
        inputs = tuple(next(iter(batches)).inputs)
    with listener.task("comparing layers", 1) as task:
        record = apart(subjects[0], subjects[1], inputs)
        task.advance(1)
    given = [one.session.run(inputs) for one in opened]
    outputs = {}
    for spec, ours, theirs in zip(graph.outputs, *given, strict=True):
        if ours.is_floating_point() and ours.shape == theirs.shape:
            outputs[spec.name] = {"apart_db": finite(sqnr_db(ours, theirs))}
    about = [{"target": one.target.name, "recipe": one.manifest["recipe"]} for one in opened]
    return Measurement({"first": about[0], "second": about[1], **record, "outputs": outputs})
