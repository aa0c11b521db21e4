"""The Plan: edge → tie, tie → Format and parameters. The only thing that says what is quantized and how.

An edge that isn't in the plan carries float. Edges with the same *tie* carry the same integers' meaning: one
format, one scale, one zero point. Integers are signed inside (`int8`: −128..127); a runtime that wants unsigned
ones shifts them at export.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import torch

from ..errors import ArtifactError, FormatError, GraphError
from ..formats import Format
from ..graph import Edge, GivenScale, Graph

GIVEN = "given"  # the range whose scales come with the graph
Source = Literal["measured", "weight", "fixed", "bias", "scaled", "dynamic"]
LOCAL = (
    "weight",
    "bias",
    "dynamic",
)  # sources of ties that one operator reads for itself: no activation's integers


@dataclass(frozen=True)
class TensorPlan:
    """How the tensors of one tie are stored.

    Attributes:
        format: the numbers' Format.
        source: where the parameters come from: `measured` on data, from the `weight` itself, `fixed` by the
            operator, a `bias` (scale_x · scale_w), `scaled` (another tie's scale times a constant), or `dynamic` (the
            tensor itself, each time the network runs).
        range: range estimator (name or table), for `measured` and `weight`.
        members: names of producers (nodes, inputs, parameters) whose values define the range.
        of: ties this one derives from: (x, weight) of a bias, (operand,) of a scaled tensor.
        factor: the constant of a `scaled` tie.
        bounds: the real range of a `fixed` tie.
        scale: float32, 0-d, [C], or [C, G] with groups; None until measured.
        zero_point: int32, same shape.
        table: float32 [size], the values of a learned codebook.
        choose: the format's symmetry is still to be chosen, by measured error.
    """

    format: Format
    source: Source
    range: str | Mapping[str, Any] = "minmax"
    members: tuple[str, ...] = ()
    of: tuple[str, ...] = ()
    factor: float = 1.0
    bounds: tuple[float, float] | None = None
    scale: torch.Tensor | None = None
    zero_point: torch.Tensor | None = None
    table: torch.Tensor | None = None
    choose: bool = False

    def given_in(self, graph: Graph) -> GivenScale | None:
        """The scale that one of the members came with (`Graph.given`), where the range asks for it."""
        if self.range != GIVEN:
            return None
        return next((graph.given[member] for member in self.members if member in graph.given), None)

    def parameters(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(scale, zero_point). Raises GraphError while they are unknown."""
        if self.scale is None or self.zero_point is None:
            raise GraphError(
                f"the range of {', '.join(self.members) or 'a tensor'} was never measured: calibrate first"
            )
        return self.scale, self.zero_point


@dataclass(frozen=True)
class NodePlan:
    """What becomes of one operator.

    Attributes:
        kernel: the integer kernel it is meant to run in; None: float.
        reason: why it stays in float.
        role: the rule's role (`compute`, `elementwise`, `move`, `scaled`), None for float.
        absorbs: the ReLU-like successor that the kernel's saturation replaces.
        absorbed_by: set on that successor.
        mode: how its kernel is fed: None for integers, else `dynamic` or `weights` (float in and out).
    """

    kernel: str | None = None
    reason: str | None = None
    role: str | None = None
    absorbs: str | None = None
    absorbed_by: str | None = None
    mode: str | None = None


@dataclass(frozen=True)
class Plan:
    """Immutable; steps return changed copies. `empty` quantizes nothing.

    `rescaled`: layer → what its output channels were divided by, float64 [C], and the weights that read them multiplied
    by (`graph.pairs`): the network computes what it did, through other weights.
    `low_rank`: layer → the rank of the product that stands beside it (`graph.beside`) and makes up for its rounding.
    `rotated`: residual stream, by its first norm → the signs, int8 [C], of the rotation that was merged into the
    weights around it (`graph.streams`), before those scales were moved.
    """

    target: str
    edges: Mapping[Edge, str]
    ties: Mapping[str, TensorPlan]
    nodes: Mapping[str, NodePlan]
    rescaled: Mapping[str, torch.Tensor] = field(default_factory=dict)
    low_rank: Mapping[str, int] = field(default_factory=dict)
    rotated: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def empty(cls, target: str) -> Plan:
        return cls(target, {}, {}, {})

    def node(self, name: str) -> NodePlan:
        return self.nodes.get(name, NodePlan())

    def makes_integers(self, name: str) -> bool:
        """Whether an operator's result comes out of an integer kernel (its own, or the one that absorbed it)."""
        node = self.node(name)
        owner = self.node(node.absorbed_by) if node.absorbed_by is not None else node
        return owner.kernel is not None and owner.mode is None

    def stored_name(self, tie: str, tensor: str) -> str:
        """What a weight is called in a model file: its tie, which several may share."""
        return f"{tie}: {tensor}" if len(self.ties[tie].members) > 1 else tie

    def tie_of(self, producer: str) -> str | None:
        """The tie that a producer's integers leave with (None: float only)."""
        return self._produced().get(producer)

    def _produced(self) -> dict[str, str]:
        cached: dict[str, str] | None = self.__dict__.get("_cache")
        if cached is None:
            cached = {edge.producer: tie for edge, tie in self.edges.items() if not self._constant(tie)}
            object.__setattr__(self, "_cache", cached)
        return cached

    def _constant(self, tie: str) -> bool:
        return self.ties[tie].source in LOCAL

    def with_ties(self, changed: Mapping[str, TensorPlan]) -> Plan:
        return replace(self, ties={**self.ties, **changed})

    def measured(self) -> dict[str, TensorPlan]:
        return {name: tie for name, tie in self.ties.items() if tie.source == "measured"}

    @property
    def quantized(self) -> bool:
        return bool(self.edges)

    def checked(self) -> Plan:
        """The plan itself. Raises GraphError where an operator runs in integers that no edge carries."""
        made, read = {edge.producer for edge in self.edges}, {edge.consumer for edge in self.edges}
        for name, node in self.nodes.items():
            moves = node.role in ("move", "scaled")
            if (moves and name not in made) or (not moves and node.kernel is not None and name not in read):
                raise GraphError(
                    f"the plan runs {name!r} in integers that no edge carries: make the artifact again"
                )
        return self

    # ------------------------------------------------------------------ text

    def to_record(self) -> dict[str, Any]:
        """A JSON-able record; `from_record` gives an equal plan back."""
        record: dict[str, Any] = {
            "schema": 1,
            "target": self.target,
            "edges": [
                {"producer": e.producer, "consumer": e.consumer, "slot": e.slot, "tie": tie}
                for e, tie in self.edges.items()
            ],
            "ties": {name: _tie_record(tie) for name, tie in self.ties.items()},
            "nodes": {
                name: {key: value for key, value in vars(node).items() if value is not None}
                for name, node in self.nodes.items()
            },
        }
        if self.rescaled:
            record["rescaled"] = {name: scales.tolist() for name, scales in self.rescaled.items()}
        if self.low_rank:
            record["low_rank"] = dict(self.low_rank)
        if self.rotated:
            record["rotated"] = {name: signs.tolist() for name, signs in self.rotated.items()}
        return record

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Plan:
        """The plan of a record, trusting nothing of it. Raises ArtifactError."""
        try:
            edges = {
                Edge(_text(e["producer"]), _text(e["consumer"]), int(e["slot"])): _text(e["tie"])
                for e in record["edges"]
            }
            ties = {str(name): _tie_from(value) for name, value in record["ties"].items()}
            nodes = {str(name): NodePlan(**value) for name, value in record["nodes"].items()}
            unknown = {*edges.values(), *(name for tie in ties.values() for name in tie.of)} - set(ties)
            if unknown:
                raise ValueError(f"tie {min(unknown)!r} is not among the ties")
            for node in nodes.values():
                if any(value is not None and not isinstance(value, str) for value in vars(node).values()):
                    raise ValueError(f"{node} holds something else than text")
            rescaled = {str(name): _scales(value) for name, value in record.get("rescaled", {}).items()}
            low_rank = {str(name): _rank(value) for name, value in record.get("low_rank", {}).items()}
            rotated = {str(name): _signs(value) for name, value in record.get("rotated", {}).items()}
            return cls(_text(record["target"]), edges, ties, nodes, rescaled, low_rank, rotated)
        except (
            FormatError,
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
            RuntimeError,
            OverflowError,
        ) as error:
            raise ArtifactError(
                f"the plan is malformed ({type(error).__name__}: {error}): make it again"
            ) from error


def _scales(value: Any) -> torch.Tensor:
    scales = torch.tensor(value, dtype=torch.float64)
    if scales.dim() != 1 or not bool((torch.isfinite(scales) & (scales > 0)).all()):
        raise ValueError("scales of channels that are no list of finite positive numbers")
    return scales


def _rank(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{value!r} is no rank")
    return value


def _signs(value: Any) -> torch.Tensor:
    signs = torch.tensor(value, dtype=torch.float64)
    if signs.dim() != 1 or not signs.numel() or not bool((signs.abs() == 1).all()):
        raise ValueError("signs of channels that are no list of 1 and -1")
    return signs.to(torch.int8)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no name")
    return value


def _tie_record(tie: TensorPlan) -> dict[str, Any]:
    record: dict[str, Any] = {"format": str(tie.format), "source": tie.source}
    if tie.source in ("measured", "weight"):
        record["range"] = dict(tie.range) if isinstance(tie.range, Mapping) else tie.range
    for key in ("members", "of", "bounds"):
        if getattr(tie, key):
            record[key] = list(getattr(tie, key))
    if tie.source == "scaled":
        record["factor"] = tie.factor
    if tie.choose:
        record["choose"] = True
    for key in ("scale", "zero_point", "table"):
        value = getattr(tie, key)
        if value is not None:
            record[key] = _numbers(value)
    return record


def _numbers(values: torch.Tensor) -> Any:
    """A short tensor as plain numbers, a long one (scales of groups) as its little-endian bytes in base64."""
    if values.ndim < 2:
        # float32 → double → shortest decimal is exact in both directions
        return values.tolist()
    array = values.contiguous().numpy()
    if (
        values.dtype == torch.int32
        and values.numel()
        and int(values.min()) >= -128
        and int(values.max()) <= 127
    ):
        array = array.astype(np.int8)
    array = array.astype(array.dtype.newbyteorder("<"))
    text = base64.b64encode(array.tobytes()).decode()
    return {"type": array.dtype.str.lstrip("<|"), "shape": list(array.shape), "base64": text}


def _tensor(record: Any, dtype: torch.dtype) -> torch.Tensor | None:
    """What `_numbers` wrote. Raises ValueError."""
    if record is None:
        return None
    if not isinstance(record, Mapping):
        return torch.tensor(record, dtype=dtype)
    shape = [int(size) for size in record["shape"]]
    if record["type"] not in ("f4", "i4", "i1") or len(shape) != 2 or min(shape) < 0:
        raise ValueError(f"{record['type']!r} of shape {shape} is no tensor of parameters")
    content = base64.b64decode(record["base64"], validate=True)
    array = np.frombuffer(content, np.dtype(record["type"]).newbyteorder("<")).reshape(shape)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="))).to(dtype)


def _tie_from(record: Mapping[str, Any]) -> TensorPlan:
    bounds, source, spec = record.get("bounds"), record["source"], record.get("range", "minmax")
    if source not in get_args(Source):
        raise ValueError(f"{source!r} is no source of a range")
    if not isinstance(spec, str | Mapping):
        raise ValueError(f"{spec!r} is no range")
    tie = TensorPlan(
        format=Format.parse(record["format"]),
        source=source,
        range=spec,
        members=tuple(map(_text, record.get("members", ()))),
        of=tuple(map(_text, record.get("of", ()))),
        factor=float(record.get("factor", 1.0)),
        bounds=(float(bounds[0]), float(bounds[1])) if bounds else None,
        scale=_tensor(record.get("scale"), torch.float32),
        zero_point=_tensor(record.get("zero_point"), torch.int32),
        table=_tensor(record.get("table"), torch.float32),
        choose=record.get("choose") is True,
    )
    if (tie.scale is None) != (tie.zero_point is None):
        raise ValueError("a scale without a zero point, or the other way round")
    if tie.scale is not None and tie.zero_point is not None:
        if tie.scale.shape != tie.zero_point.shape or tie.scale.ndim > (
            2 if tie.format.granularity == "group" else 1
        ):
            raise ValueError(f"scales {list(tie.scale.shape)} and zero points {list(tie.zero_point.shape)}")
        if not bool((torch.isfinite(tie.scale) & (tie.scale > 0)).all()):
            raise ValueError("a scale that is not a finite positive number")
        if not bool(((tie.zero_point >= tie.format.low) & (tie.zero_point <= tie.format.high)).all()):
            raise ValueError(f"a zero point outside the codes of {tie.format}")
    learned = (tie.format.size,) if tie.format.table == "learned" and tie.scale is not None else None
    if (None if tie.table is None else tuple(tie.table.shape)) != learned:
        raise ValueError(f"a table of values that doesn't fit {tie.format}")
    if tie.table is not None and not bool(torch.isfinite(tie.table).all()):
        raise ValueError("a table of values that are not all finite")
    return tie
