"""What a runtime can execute in integers, as data: operator kind × constraints on its tensors → kernel.

A few words constrain a tensor (the idea is torchao's `QuantizationSpec` family):

    Free      its parameters come from data
    Ranged    its parameters are taken from the tensor itself while the network runs
    Fixed     its real range is known before any data is seen (sigmoid, softmax)
    Shared    it has the parameters of another operand: integers pass through unchanged
    Derived   its parameters follow from others': a bias (scale_x · scale_w), a product with a constant

A target owns one `Ruleset`; `plan` decides by it and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from .formats import GRANULARITIES, Format

if TYPE_CHECKING:
    import torch.fx

    from .graph import Graph, Op


@dataclass(frozen=True)
class Free:
    """An activation with parameters of its own."""


@dataclass(frozen=True)
class Ranged:
    """An activation that is quantized while the network runs, with a range of its own each time."""


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


Constraint = Free | Ranged | Weight | Fixed | Shared | Derived | None
# static: integers in, integers out, ranges from calibration data. dynamic: float in and out, ranges taken while
# running. weights: weights alone are stored narrow.
Mode = Literal["static", "dynamic", "weights"]
MODES: Mapping[Mode, str] = {
    "static": "integer activations",
    "dynamic": "activations quantized while running",
    "weights": "float activations",
}
# A float kernel whose weights are stored narrow and decoded when the file is loaded.
DECODED = "decoded"
Role = Literal["compute", "elementwise", "move"]
Condition = Callable[["Graph", "torch.fx.Node", "Op"], str | None]
FormatCondition = Callable[["Graph", "torch.fx.Node", "Op", Format], str | None]


@dataclass(frozen=True)
class Holds:
    """The formats that a kind of tensor can be stored in.

    Attributes:
        kinds: of formats.
        low, high: the widest range of integers. What is narrower is carried in it.
        bits: widths that are held, for integers and codes; empty: any within the range.
        granularities: what may share a scale.
        groups: sizes of groups; empty: any.
        symmetric: integers have a fixed zero point.
        exact: texts of formats; where given, these and no others.
    """

    kinds: tuple[str, ...] = ("int",)
    low: int = -128
    high: int = 127
    bits: tuple[int, ...] = ()
    granularities: tuple[str, ...] = ("global", "tensor", "channel")
    groups: tuple[int, ...] = ()
    symmetric: bool = False
    exact: tuple[str, ...] = ()

    def objection(self, fmt: Format) -> str | None:
        """Why `fmt` isn't held, or None."""
        if self.exact and str(fmt) not in self.exact:
            return f"{fmt} is not {' or '.join(self.exact)}"
        if fmt.kind not in self.kinds:
            return f"{fmt} is no {' or '.join(self.kinds)} format"
        if fmt.is_int and not self.low <= fmt.low < fmt.high <= self.high:
            return f"{fmt} exceeds the integers {self.low} … {self.high}"
        if self.bits and fmt.bits not in self.bits:
            return f"{fmt} takes {fmt.bits} bits"
        if not fmt.unscaled and fmt.granularity not in self.granularities:
            return f"{fmt} has a scale per {fmt.granularity}"
        if self.groups and fmt.group and fmt.group not in self.groups:
            return f"{fmt} has groups of {fmt.group}, not {', '.join(map(str, self.groups))}"
        if self.symmetric and fmt.is_int and not fmt.symmetric:
            return f"{fmt} is not symmetric"
        return None

    def __str__(self) -> str:
        if self.exact:
            return ", ".join(self.exact)
        integers = f"integers within {self.low} … {self.high}{' (symmetric)' if self.symmetric else ''}"
        kinds = [integers if kind == "int" else kind for kind in self.kinds]
        widths = f" of {', '.join(map(str, self.bits))} bits" if self.bits else ""
        return f"{', '.join(kinds)}{widths} with a scale per {' or '.join(self.granularities)}"


# Whatever has a file of its own width and becomes float when it is read.
ANY_WEIGHT = Holds(
    ("int", "float", "log2", "codebook"), low=-(2**15), high=2**16 - 1, granularities=GRANULARITIES
)


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
        fuses: kinds of operators that the runtime computes together with this one where nothing else reads them: such
            an operand comes as it is, without being rounded.
        mode: "dynamic" and "weights" kernels take and return float32, whoever makes or reads it.
        takes: gives the reason why it can't run this node with weights of a format, where that is less than the
            ruleset's mode says.
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
    fuses: frozenset[str] = frozenset()
    mode: Mode = "static"
    takes: FormatCondition | None = None

    def operand(self, slot: int) -> Constraint:
        return self.operands[min(slot, len(self.operands) - 1)]


@dataclass(frozen=True)
class Ruleset:
    """All that a target can run, with the formats it holds.

    Attributes:
        name: the target's name, used in reasons.
        rows: the table; the first row whose kinds match and whose `when` has no objection wins.
        activations: formats of activations that its integer kernels take.
        weights: formats of weights by mode; a mode that isn't there doesn't exist on the runtime.
        stored: formats of activations that it can store but not compute with: their producers and readers run in
            float between a quantize and a dequantize.
        dynamic: formats of activations that are quantized while running; None: as `activations`.
        reasons: kind → why this runtime has no integer kernel for it (shown in reports).
        fixed: kind → real range of its result, where a float operator's result is quantized for a reader.
        widths: bits of weights that its model file stores as they are; the others are packed beside it.
        weight_limit: largest |integer| of a weight that is multiplied by integers on this host, e.g. 64 where 8-bit
            products could saturate; weights that are decoded before (mode `weights`) have none.
        integer_io: the network takes and gives integers: its inputs and outputs are quantized too.
    """

    name: str
    rows: tuple[OpRule, ...]
    activations: Holds
    weights: Mapping[Mode, Holds]
    stored: tuple[str, ...] = ()
    dynamic: Holds | None = None
    reasons: dict[str, str] = field(default_factory=dict)
    fixed: dict[str, tuple[float, float]] = field(default_factory=dict)
    widths: tuple[int, ...] = (8, 16)
    weight_limit: int | None = None
    integer_io: bool = False

    def computes(self, kind: str) -> bool:
        """Whether there is an integer kernel for a kind of operator, conditions aside."""
        return any(kind in row.kinds and row.role == "compute" and row.mode == "static" for row in self.rows)

    def only_stores(self, fmt: Format) -> bool:
        """Whether activations of a format are held, but not computed with."""
        return str(fmt).split()[0] in self.stored

    def weights_objection(self, fmt: Format, mode: Mode, called: str) -> str | None:
        """Why no kernel multiplies by weights of a format, which the user calls so; or None."""
        held = self.weights.get(mode)
        if held is None:
            return (
                f"{self.name} can't run {MODES[mode]}; it can run {', '.join(MODES[m] for m in self.weights)}"
            )
        objection = held.objection(fmt)
        if objection is None:
            return None
        return (
            f"{self.name} has no kernels for {called} weights with {MODES[mode]} ({objection}); it holds {held} "
            "(or float32)"
        )

    def activations_objection(self, fmt: Format, called: str, *, dynamic: bool = False) -> str | None:
        """Why no activations of a format are held, which the user calls so; or None. dynamic: rounded while running."""
        held = self.dynamic if dynamic and self.dynamic else self.activations
        objection = held.objection(fmt)
        if objection is None or (self.only_stores(fmt) and not dynamic):
            return None
        stored = () if dynamic else self.stored
        return (
            f"{self.name} has no integer kernels for {called} activations ({objection}); it holds "
            f"{', '.join([str(held), *stored])} (or float32)"
        )

    def match(
        self, graph: Graph, node: torch.fx.Node, op: Op, mode: Mode = "static", weights: Format | None = None
    ) -> tuple[OpRule | None, str | None]:
        """The row for a node in a mode, or the reason why there is none. `weights`: the format they shall have.

        An operator without a dynamic kernel can still have its weights stored narrow.
        """
        objection: str | None = None
        for tried in (mode, "weights") if mode == "dynamic" else (mode,):
            for row in self.rows:
                if op.kind in row.kinds and row.mode == tried:
                    objection = row.when(graph, node, op) if row.when else None
                    if objection is None and row.takes is not None and weights is not None:
                        objection = row.takes(graph, node, op, weights)
                    if objection is None:
                        return row, None
        if objection is None and mode == "static":
            kind = op.kind.removeprefix("other:")
            objection = self.reasons.get(op.kind, f"{self.name} has no integer kernel for {kind}")
        return None, objection


# ------------------------------------------------------------------ rows that several runtimes share


def decoding(takes: FormatCondition | None = None) -> tuple[OpRule, ...]:
    """Layers whose weights alone are stored narrow, and decoded when the file is loaded."""
    axes = (("conv", 0), ("linear", 0), ("conv_transpose", 1))
    layers = (
        OpRule(
            (kind,), (None, Weight(axis), None), None, DECODED, "compute",
            mode="weights", when=constant_weight, takes=takes,
        )
        for kind, axis in axes
    )  # fmt: skip
    table = OpRule(
        ("embedding",), (None, Weight(0)), None, DECODED, "compute",
        mode="weights", when=constant_weight, takes=takes,
    )  # fmt: skip
    return (*layers, table)


def moving(moves: tuple[str, ...], lookup: str) -> tuple[OpRule, ...]:
    """What passes integers on. lookup: the kernel that takes rows of a table."""
    return (
        OpRule(("embedding",), (None, Shared()), Shared(), lookup, "move"),
        OpRule(moves, (Shared(),), Shared(), "", "move", when=zero_padding),
    )


def scaling() -> OpRule:
    """A product with a constant is the same integers on another scale."""
    return OpRule(("mul_scalar",), (Free(),), Derived("value"), "", "move", when=positive_factor)


# ------------------------------------------------------------------ conditions that every integer runtime shares


def constant_parameters(graph: Graph, node: torch.fx.Node, op: Op) -> str | None:
    """Weights and biases are rounded before anything runs, so they have to be known by then."""
    for what, operand in zip(("weight", "bias"), op.operands[1:3], strict=False):
        if operand is None and what == "bias":
            continue
        if operand is None or operand.tensor is None:
            return f"its {what} is computed while running"
    return None


def constant_weight(graph: Graph, node: torch.fx.Node, op: Op) -> str | None:
    """Weights are stored before anything runs, so they have to be known by then."""
    weight = op.operands[1]
    return "its weight is computed while running" if weight is None or weight.tensor is None else None


def zero_padding(graph: Graph, node: torch.fx.Node, op: Op) -> str | None:
    """Padding moves integers only where the padded value is 0.0, which every format stores exactly."""
    if op.kind == "pad" and (
        op.attrs.get("mode", "constant") != "constant" or op.attrs.get("value") not in (0, 0.0, None)
    ):
        return "only padding with zeros keeps the integers"
    return None


def zero_padded_contraction(graph: Graph, node: torch.fx.Node, op: Op) -> str | None:
    """Constant parameters, and what a convolution pads with is zeros, which every format stores exactly."""
    objection = constant_parameters(graph, node, op)
    if objection is None and op.kind == "conv" and op.attrs.get("padding_mode", "zeros") != "zeros":
        return f"{op.attrs['padding_mode']} padding has no integer kernel"
    return objection


def plain_sum(graph: Graph, node: torch.fx.Node, op: Op) -> str | None:
    """a + b, not a + alpha · b."""
    alpha = op.attrs.get("alpha", 1)
    return None if alpha == 1 else f"add with alpha = {alpha} has no integer kernel"


def positive_factor(graph: Graph, node: torch.fx.Node, op: Op) -> str | None:
    """A product with a constant is a change of scale, which has to be a positive number known beforehand."""
    value = op.attrs["value"]
    if not isinstance(value, int | float):
        return "its factor is computed while running"
    if not value > 0:
        return "a factor that isn't positive turns the integers' order"
    return None if math.isfinite(value) and 1e-9 < value < 1e9 else f"a factor of {value:g} leaves no scale"
