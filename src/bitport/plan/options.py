"""What a recipe says of each operator's numbers: defaults, then overrides in order (the last match wins)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Literal, Protocol

import torch

from ..errors import RecipeError, TargetError
from ..formats import Format
from ..graph import Graph
from ..graph.reading import type_name
from ..graph.simplify import CONTRACTIONS
from ..rules import Mode, Ruleset


@dataclass(frozen=True)
class TensorOptions:
    """What a recipe says of weights or of activations.

    Attributes:
        format: a format as `Format.parse` reads it.
        granularity: what shares a scale; None: as the format says, else per channel (weights) or tensor.
        group: how many values share a scale, where granularity is "group".
        range: range estimator (name or table).
        symmetric: whether the zero point is fixed; "auto": whichever measures a smaller error; None: as is usual
            (weights symmetric where the format can be, activations not).
        dynamic: activations are quantized while the network runs.
        elsewhere: of activations, the format of tensors that no layer multiplies by its weights (what additions,
            gates, norms and attention read); None: `format`, where that has 8 bits or more, else int8.
    """

    format: str = "int8"
    granularity: str | None = None
    group: int | None = None
    range: str | Mapping[str, Any] = "minmax"
    symmetric: bool | Literal["auto"] | None = None
    dynamic: bool = False
    elsewhere: str | None = None

    def changed(self, options: Mapping[str, Any]) -> TensorOptions:
        """These options with some replaced.

        Another granularity drops the size of groups, a format that says itself what shares a scale drops both.

        Raises FormatError for a format that can't be read.
        """
        known = dict(vars(self))
        if "granularity" in options:
            known["group"] = None
        if "format" in options and _says_granularity(options["format"], Format.parse(options["format"])):
            known["group"] = known["granularity"] = None
        return TensorOptions(**{**known, **options})

    def for_weights(self, axis: int | None) -> Format:
        """The Format of weights whose channel axis is `axis` (None: they have one scale at most).

        Raises FormatError where the words contradict each other.
        """
        fmt = self._parsed("tensor" if axis is None else "channel")
        if fmt.granularity in ("channel", "group"):
            fmt = (
                fmt.with_(granularity="tensor")
                if axis is None
                else fmt.with_(axis=axis if fmt.axis is None else fmt.axis)
            )
        if self.symmetric is None and fmt.is_int:
            fixed = fmt.high // 2 + 1 if fmt.low == 0 else 0
            return fmt.with_(symmetric=fmt.low < fixed < fmt.high)
        return fmt

    def for_activations(self) -> Format:
        """The Format of activations. Raises FormatError where the words contradict each other."""
        return self._parsed("tensor")

    def only_stored(self, ruleset: Ruleset) -> bool:
        """Whether activations are to be of one of the formats that a target stores without computing with them."""
        return not self.is_float and not self.dynamic and ruleset.only_stores(self.for_activations())

    def away_from_layers(self) -> TensorOptions:
        """The options of a tensor that no layer multiplies by its weights.

        Few bits save memory and work where weights meet activations; an addition or a gate gains nothing from them,
        and what a residual stream loses is lost for all layers behind it.
        """
        if self.elsewhere is not None:
            return self.changed({"format": self.elsewhere})
        fmt = Format.parse(self.format)
        return self.changed({"format": USUAL}) if fmt.is_int and fmt.bits < Format.parse(USUAL).bits else self

    def _parsed(self, default: str) -> Format:
        fmt = Format.parse(self.format)
        if fmt.unscaled:
            return fmt
        shared = self.granularity
        if shared is None:
            said = _says_granularity(self.format, fmt)
            shared = "group" if self.group is not None else fmt.granularity if said else default
        given = self.symmetric if isinstance(self.symmetric, bool) else None
        return Format.parse(self.format, symmetric=given, granularity=shared, group=self.group)

    @property
    def is_float(self) -> bool:
        """Whether numbers stay in float32."""
        return self.format.strip() == "float32"


def _says_granularity(text: str, fmt: Format) -> bool:
    """Whether the text of a format says what shares a scale, instead of leaving it to the default."""
    return fmt.granularity != "tensor" or "tensor" in text.split()


USUAL = "int8"  # of tensors that no layer multiplies


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


WITH_WEIGHTS = (*CONTRACTIONS, "embedding")
LONGEST_NAME = 200  # of a pattern, what is looked at for a suggestion: it takes quadratic time

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
            given = {key: getattr(override, key) for key in ("match", "op", "type", "position")}
            said = ", ".join(f"{key} = {value!r}" for key, value in given.items() if value is not None)
            near = get_close_matches(override.match[:LONGEST_NAME], [graph.name(node) for node in nodes], 1)
            raise RecipeError(
                f"overrides[{index}] ({said}) matches no operator"
                f"{f', but there is {near[0]!r}' if near else ''}; "
                "`bitport inspect MODEL` lists their names and operators"
            )
        for node in hits:
            w[node] = w[node].changed(override.weights or {})
            a[node] = a[node].changed(_wherever(override.activations or {}))
    for node in nodes:
        _check(graph, ruleset, node, w[node], a[node])
    return w, a


def _wherever(activations: Mapping[str, Any]) -> Mapping[str, Any]:
    """What an override says of one operator's result holds whoever reads it."""
    return {"elsewhere": activations["format"], **activations} if "format" in activations else activations


def mode_of(weights: TensorOptions, activations: TensorOptions) -> Mode:
    """How an operator with weights is to be run."""
    if activations.is_float:
        return "weights"
    return "dynamic" if activations.dynamic else "static"


def _check(
    graph: Graph, ruleset: Ruleset, node: torch.fx.Node, weights: TensorOptions, activations: TensorOptions
) -> None:
    for options in (activations, activations.away_from_layers()):
        if not options.is_float:
            why = ruleset.activations_objection(
                options.for_activations(), options.format, dynamic=options.dynamic
            )
            if why is not None:
                raise TargetError(why)
    if weights.is_float or graph.op(node).kind not in WITH_WEIGHTS:
        return
    mode = mode_of(weights, activations)
    why = ruleset.weights_objection(weights.for_weights(0), mode, weights.format)
    if why is not None:
        raise TargetError(why)


def _matches(graph: Graph, node: torch.fx.Node, override: Override) -> bool:
    if override.op is not None and graph.op(node).kind != override.op:
        return False
    if override.type is not None and type_name(graph, node) != override.type:
        return False
    return fnmatchcase(graph.name(node), override.match)
