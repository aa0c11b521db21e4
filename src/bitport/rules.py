"""What a runtime can execute in integers, as data: operator kind × constraints on its tensors → kernel.

Four words constrain a tensor (the idea is torchao's `QuantizationSpec` family):

    Free      its parameters come from data
    Fixed     its real range is known before any data is seen (sigmoid, softmax)
    Shared    it has the parameters of another operand: integers pass through unchanged
    Derived   its parameters follow from others': a bias (scale_x · scale_w), a product with a constant

A target owns one `Ruleset`; `plan` decides by it and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch.fx

    from .graph import Graph, Op


@dataclass(frozen=True)
class Free:
    """An activation with parameters of its own."""


@dataclass(frozen=True)
class Weight:
    """A constant operand, quantized by itself; `axis` is its output-channel axis (None: per-tensor only)."""

    axis: int | None = 0


@dataclass(frozen=True)
class Fixed:
    """The real range is [minimum, maximum): `scale = (maximum − minimum) / number of levels`."""

    minimum: float
    maximum: float


@dataclass(frozen=True)
class Shared:
    """Same parameters as the (first) quantized operand; the integers are moved, not recomputed."""


@dataclass(frozen=True)
class Derived:
    """Follows from others: a "bias" is int32 at scale_x · scale_w; by "value", the operand's scale × attrs["value"]."""

    by: Literal["bias", "value"]


Constraint = Free | Weight | Fixed | Shared | Derived | None
Role = Literal["compute", "elementwise", "move"]
Condition = Callable[["Graph", "torch.fx.Node", "Op"], str | None]


@dataclass(frozen=True)
class OpRule:
    """One row of a target's table.

    Attributes:
        kinds: canonical operator kinds (`graph.Op.kind`) this row speaks of.
        operands: a constraint per operand slot; the last one repeats. `None` leaves the operand as it is.
        output: the constraint on the result.
        kernel: what the runtime executes; `inspect` must find exactly this in the optimized file.
        role: `compute` asks for quantized operands; `elementwise` is integer only where its operands already
            are; `move` shuffles integers.
        clamps: a following ReLU-like operator with a lower bound of 0 is absorbed by the output's saturation.
        float_output: the kernel can also return float32 where nobody wants its result as integers.
        when: gives the reason why this node can't be run so, or None.
    """

    kinds: tuple[str, ...]
    operands: tuple[Constraint, ...]
    output: Constraint
    kernel: str
    role: Role
    clamps: bool = False
    float_output: bool = False
    when: Condition | None = None

    def operand(self, slot: int) -> Constraint:
        return self.operands[min(slot, len(self.operands) - 1)]


@dataclass(frozen=True)
class Ruleset:
    """All that a target can run, with the formats it holds.

    Attributes:
        name: the target's name, used in reasons.
        rows: the table; the first row whose kinds match and whose `when` has no objection wins.
        activations, weights: names of formats that its integer kernels take.
        stored: formats of activations that it can store but not compute with: their producers and readers run in
            float between a quantize and a dequantize.
        granularities: of weights.
        reasons: kind → why this runtime has no integer kernel for it (shown in reports).
        fixed: kind → real range of its result, where a float operator's result is quantized for a reader.
        weight_limit: largest |integer| of a weight on this host, e.g. 64 where 8-bit products could saturate.
        integer_io: the network takes and gives integers: its inputs and outputs are quantized too.
    """

    name: str
    rows: tuple[OpRule, ...]
    activations: tuple[str, ...]
    weights: tuple[str, ...]
    stored: tuple[str, ...] = ()
    granularities: tuple[str, ...] = ("tensor", "channel")
    reasons: dict[str, str] = field(default_factory=dict)
    fixed: dict[str, tuple[float, float]] = field(default_factory=dict)
    weight_limit: int | None = None
    integer_io: bool = False

    def match(self, graph: Graph, node: torch.fx.Node, op: Op) -> tuple[OpRule | None, str | None]:
        """The row for a node, or the reason why there is none."""
        objection: str | None = None
        for row in self.rows:
            if op.kind in row.kinds:
                objection = row.when(graph, node, op) if row.when else None
                if objection is None:
                    return row, None
        if objection is None:
            kind = op.kind.removeprefix("other:")
            objection = self.reasons.get(op.kind, f"{self.name} has no integer kernel for {kind}")
        return None, objection


# ------------------------------------------------------------------ conditions that every integer runtime shares


def constant_parameters(graph: Graph, node: torch.fx.Node, op: Op) -> str | None:
    """Weights and biases are rounded before anything runs, so they have to be known by then."""
    for what, operand in zip(("weight", "bias"), op.operands[1:3], strict=False):
        if operand is None and what == "bias":
            continue
        if operand is None or operand.tensor is None:
            return f"its {what} is computed while running"
    return None


def zero_padding(graph: Graph, node: torch.fx.Node, op: Op) -> str | None:
    """Padding moves integers only where the padded value is 0.0, which every format stores exactly."""
    if op.kind == "pad" and (
        op.attrs.get("mode", "constant") != "constant" or op.attrs.get("value") not in (0, 0.0, None)
    ):
        return "only padding with zeros keeps the integers"
    return None


def positive_factor(graph: Graph, node: torch.fx.Node, op: Op) -> str | None:
    """A product with a constant is a change of scale, which has to be a positive number known beforehand."""
    value = op.attrs["value"]
    if not isinstance(value, int | float):
        return "its factor is computed while running"
    if not value > 0:
        return "a factor that isn't positive turns the integers' order"
    return None if math.isfinite(value) and 1e-9 < value < 1e9 else f"a factor of {value:g} leaves no scale"
