"""What a recipe says of each operator's numbers: defaults, then overrides in order (the last match wins)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Protocol

import torch

from ..errors import RecipeError, TargetError
from ..formats import Format
from ..graph import Graph
from ..graph.reading import type_name
from ..graph.simplify import CONTRACTIONS
from ..rules import Ruleset


@dataclass(frozen=True)
class TensorOptions:
    """What a recipe says of weights or of activations."""

    format: str = "int8"
    granularity: str = "tensor"
    range: str | Mapping[str, Any] = "minmax"
    symmetric: bool = False

    def changed(self, options: Mapping[str, Any]) -> TensorOptions:
        return TensorOptions(**{**vars(self), **options})

    @property
    def is_float(self) -> bool:
        return Format.parse(self.format).kind == "float"


class Override(Protocol):
    """A recipe's exception for some operators (`recipe.Override` is one)."""

    @property
    def match(self) -> str: ...
    @property
    def op(self) -> str | None: ...
    @property
    def type(self) -> str | None: ...
    @property
    def position(self) -> str | None: ...
    @property
    def weights(self) -> Mapping[str, Any] | None: ...
    @property
    def activations(self) -> Mapping[str, Any] | None: ...


PerNode = dict[torch.fx.Node, TensorOptions]


def resolve(
    graph: Graph,
    ruleset: Ruleset,
    weights: TensorOptions,
    activations: TensorOptions,
    overrides: Sequence[Override],
) -> tuple[PerNode, PerNode]:
    """Options of every operator's weights and of its result.

    Raises:
        RecipeError: an override matches nothing.
        TargetError: the target's integer kernels can't hold a format that was asked for.
    """
    nodes = graph.nodes()
    layers = [node for node in nodes if graph.op(node).kind in CONTRACTIONS]
    ends = {"first": layers[:1], "last": layers[-1:]}
    w, a = dict.fromkeys(nodes, weights), dict.fromkeys(nodes, activations)
    for index, override in enumerate(overrides):
        candidates = nodes if override.position is None else ends[override.position]
        hits = [node for node in candidates if _matches(graph, node, override)]
        if not hits:
            raise RecipeError(
                f"overrides[{index}] (match={override.match!r}, op={override.op!r}, type={override.type!r}, "
                f"position={override.position!r}) "
                "matches no operator; `bitport inspect MODEL` lists their names, operators and types"
            )
        for node in hits:
            w[node] = w[node].changed(override.weights or {})
            a[node] = a[node].changed(override.activations or {})
    _check(ruleset, w, ruleset.weights, "weights")
    _check(ruleset, a, (*ruleset.activations, *ruleset.stored), "activations")
    return w, a


def _check(ruleset: Ruleset, options: PerNode, allowed: tuple[str, ...], what: str) -> None:
    for chosen in options.values():
        if not chosen.is_float and chosen.format not in allowed:
            raise TargetError(
                f"{ruleset.name} has no integer kernels for {chosen.format} {what}; "
                f"it holds {', '.join(allowed)} (or float32)"
            )
        if what == "weights" and chosen.granularity not in ruleset.granularities:
            raise TargetError(
                f"{ruleset.name} holds weights per {' or '.join(ruleset.granularities)}, "
                f"not per {chosen.granularity}"
            )


def _matches(graph: Graph, node: torch.fx.Node, override: Override) -> bool:
    if override.op is not None and graph.op(node).kind != override.op:
        return False
    if override.type is not None and type_name(graph, node) != override.type:
        return False
    return fnmatchcase(graph.name(node), override.match)
