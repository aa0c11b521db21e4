"""Operators that work number by number as TFLite operators, in the layout that their operands have."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ...errors import ExportError
from ._build import Size, Value, type_of
from .convert import Call, Dequantized, Row, shape_of

aten = torch.ops.aten
EXACT = 2.0**31
WITHOUT_TABLE = ("LOG", "SIN")
ERF = (0.3275911, 0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)  # p, a₁ … a₅
SMALL = 0.5  # a logarithm's argument, from 1
ODD = (1, 3, 5, 7, 9, 11, 13)  # terms of artanh's series: the next is below 1e-8 of it there
NARROW = (torch.int8, torch.uint8, torch.int16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


def operands(call: Call, given: Sequence[Any], dtype: torch.dtype) -> tuple[list[Value], bool]:
    """Operands in one layout and type, and whether that has the channels last. given: tensors, values or numbers.

    Raises ExportError for narrow integers without a scale, on which LiteRT ends the process.
    """
    if dtype in NARROW and not call.integer:
        raise ExportError(
            f"{call.name}: LiteRT computes with {dtype} only where it is quantized: make it int32"
        )
    rank = len(call.shape)
    stored = [unwrapped(value) for value in given]
    last = any(isinstance(v, Value) and v.last and v.rank == rank for v in stored)
    last = last and all(not isinstance(v, Value) or v.rank == rank or v.rank == 0 for v in stored)
    found = []
    for value, source in zip(given, stored, strict=True):
        if isinstance(value, int | float | bool):
            value = torch.tensor(value, dtype=dtype)
        if isinstance(value, Tensor):
            found.append(_constant(call, value, dtype, rank, last))
        elif isinstance(value, Dequantized) and isinstance(source, Tensor):
            placed = _wide(call, source, "table", rank) if last else source
            made = call.b.constant(
                placed, call.names.get(id(source), f"{call.name}/constant"), quant=value.quant, last=last
            )
            found.append(made if call.integer else call.b.real(made))
        else:
            read = call.take(value)
            numbers = dtype == torch.float32 or read.dtype in INTEGERS
            if numbers and read.quant is None and read.dtype != dtype:
                read = cast(call, read, dtype)
            found.append(call.b.arranged(read, last))
    return found, last


def unwrapped(value: Any) -> Any:
    return value.source if isinstance(value, Dequantized) else value


def _constant(call: Call, value: Tensor, dtype: torch.dtype, rank: int, last: bool) -> Value:
    typed = value if value.dtype == dtype else call.memo(value, f"as {dtype}", lambda t: t.to(dtype))
    placed = _wide(call, typed, "wide", rank) if last else typed
    return call.b.constant(placed, call.names.get(id(value), f"{call.name}/constant"), last=last)


def _wide(call: Call, value: Tensor, key: str, rank: int) -> Tensor:
    """With as many axes as the result, new ones in front; a single number as it is."""
    if value.dim() in (0, rank):
        return value
    return call.memo(value, key, lambda t: t.reshape([1] * (rank - t.dim()) + list(t.shape)))


def cast(call: Call, value: Value, dtype: torch.dtype) -> Value:
    s = call.b.file.s.TensorType
    return call.step(
        "CAST", [value], value.shape, dtype=dtype, last=value.last, table="Cast",
        inDataType=getattr(s, type_of(value.dtype, call.name)), outDataType=getattr(s, type_of(dtype, call.name)),
    )  # fmt: skip


def common(call: Call, keys: Sequence[str]) -> torch.dtype:
    """The type that operands are brought to: of torch's own promotion."""
    found = [call.node.args[index] if index < len(call.node.args) else None for index in range(len(keys))]
    typed: list[Any] = [value.meta["val"] if isinstance(value, fx.Node) else value for value in found]
    first, second = (v if v is not None else call[k] for v, k in zip(typed, keys, strict=True))
    return torch.result_type(first, second)


def binary(kind: str, table: str, *, fused: bool = True) -> Row:
    def write(call: Call) -> Value:
        dtype = torch.float32 if call.integer else common(call, ("self", "other"))
        given = [call["self"], call["other"]]
        alpha = call["alpha"]
        if alpha not in (None, 1):
            if not isinstance(given[1], int | float):
                raise ExportError(f"{call.name}: LiteRT gets no sum with a factor in it")
            given[1] = given[1] * alpha
        (a, b), last = operands(call, given, dtype)
        return call.give(kind, [a, b], last=last, options={"table": table})

    return write


class _Chain:
    """Steps on numbers of one shape, float32."""

    def __init__(self, call: Call, like: Value) -> None:
        self.call, self.like = call, like

    def number(self, value: float) -> Value:
        return self.call.b.constant(torch.tensor(value, dtype=torch.float32), f"{self.call.name}/{value:g}")

    def __call__(self, kind: str, *reads: Value | float, dtype: torch.dtype = torch.float32) -> Value:
        options = {} if kind in WITHOUT_TABLE else {"table": kind.capitalize()}
        given = [read if isinstance(read, Value) else self.number(read) for read in reads]
        return self.call.step(kind, given, self.like.shape, dtype=dtype, last=self.like.last, **options)

    def series(self, x: Value, factors: Sequence[float]) -> Value:
        """factors[0] + factors[1] · x + …, by Horner's rule."""
        total = self("MUL", x, factors[-1])
        for factor in factors[-2:0:-1]:
            total = self("MUL", self("ADD", total, factor), x)
        return self("ADD", total, factors[0])


def log1p(call: Call) -> Value:
    """log(1 + x); of a small x 2 · artanh(x / (2 + x)) as a series, whose digits 1 + x and its logarithm would lose."""
    x = call.read("self")
    step = _Chain(call, x)
    z = step("DIV", x, step("ADD", x, 2.0))
    series = step.series(step("MUL", z, z), [2 / odd for odd in ODD])
    near = step("LESS", step("ABS", x), SMALL, dtype=torch.bool)
    reads = [near, step("MUL", z, series), step("LOG", step("ADD", x, 1.0))]
    return call.give("SELECT_V2", reads, last=x.last, options={"table": "SelectV2"})


def erf(call: Call) -> Value:
    """1 − (a₁t + … + a₅t⁵) · e^(−x²), t = 1 / (1 + p|x|), with the sign of x: to 1.5e-7.

    Abramowitz and Stegun 1964, 7.1.26.
    """
    x = call.read("self")
    step = _Chain(call, x)
    t = step("DIV", 1.0, step("ADD", step("MUL", step("ABS", x), ERF[0]), 1.0))
    bell = step("EXP", step("NEG", step("MUL", x, x)))
    rest = step("MUL", step("MUL", t, step.series(t, ERF[1:])), bell)
    reads = [step("SIGN", x), step("SUB", 1.0, rest)]
    return call.give("MUL", reads, last=x.last, options={"table": "Mul"})


def power(call: Call) -> Value:
    exponent = call["exponent"]
    if exponent == 2:
        x = call.read("self")
        return call.give("MUL", [x, x], last=x.last, options={"table": "Mul"})
    (a, b), last = operands(call, [call["self"], exponent], torch.float32)
    return call.give("POW", [a, b], last=last, options={"table": "Pow"})


def unary(kind: str, table: str | None = None, key: str = "self") -> Callable[[Call], Value]:
    def write(call: Call) -> Value:
        x = call.read(key)
        return call.give(kind, [x], last=x.last, options=None if table is None else {"table": table})

    return write


def reciprocal(call: Call) -> Value:
    (one, x), last = operands(call, [1.0, call["self"]], torch.float32)
    return call.give("DIV", [one, x], last=last, options={"table": "Div"})


def isnan(call: Call) -> Value:
    """What differs from itself."""
    x = call.read("self")
    options = {"table": "NotEqual"}
    return call.give("NOT_EQUAL", [x, x], last=x.last, dtype=torch.bool, options=options)


def tan(call: Call) -> Value:
    x = call.read("self")
    step = _Chain(call, x)
    reads = [step("SIN", x), step("COS", x)]
    return call.give("DIV", reads, last=x.last, options={"table": "Div"})


def leaky_relu(call: Call) -> Value:
    x = call.read("self")
    options = {"table": "LeakyRelu", "alpha": float(call["negative_slope"])}
    return call.give("LEAKY_RELU", [x], last=x.last, options=options)


def elu(call: Call) -> Value:
    if (call["alpha"], call["scale"], call["input_scale"]) != (1, 1, 1):
        raise ExportError(f"{call.name}: LiteRT has ELU with alpha = 1 only")
    return unary("ELU")(call)


def gelu(call: Call) -> Value:
    x = call.read("self")
    options = {"table": "Gelu", "approximate": call["approximate"] == "tanh"}
    return call.give("GELU", [x], last=x.last, options=options)


def silu(call: Call) -> Value:
    x = call.read("self")
    gate = call.step("LOGISTIC", [x], x.shape, last=x.last)
    return call.give("MUL", [x, gate], last=x.last, options={"table": "Mul"})


def hardsigmoid(call: Call) -> Value:
    """relu6(x + 3) / 6."""
    x = call.read("self")
    inside = _scaled(call, x, "ADD", 3.0)
    inside = call.step("RELU6", [inside], x.shape, last=x.last)
    sixth = call.b.constant(torch.tensor(1 / 6), f"{call.name}/sixth")
    return call.give("MUL", [inside, sixth], last=x.last, options={"table": "Mul"})


def _scaled(call: Call, x: Value, kind: str, number: float) -> Value:
    constant = call.b.constant(torch.tensor(number, dtype=x.dtype), f"{call.name}/number")
    return call.step(kind, [x, constant], x.shape, last=x.last, table=kind.capitalize())


def clamp(call: Call) -> Value:
    low, high = (
        call[a] if call[a] is not None else call[b] for a, b in (("min", "min_val"), ("max", "max_val"))
    )
    if (low, high) == (0, 6):
        return unary("RELU6")(call)
    if (low, high) == (0, None):
        return unary("RELU")(call)
    dtype = call.result.dtype
    value = call["self"]
    for kind, end, is_last in (("MAXIMUM", low, high is None), ("MINIMUM", high, True)):
        if end is None:
            continue
        (a, b), last = operands(call, [value, end], dtype)
        if is_last:
            return call.give(kind, [a, b], last=last, options={"table": "MaximumMinimum"})
        value = call.step(kind, [a, b], call.shape, last=last, table="MaximumMinimum")
    raise ExportError(f"{call.name}: a clamp without bounds")


def rsub(call: Call) -> Value:
    (a, b), last = operands(call, [call["other"], call["self"]], common(call, ("self", "other")))
    return call.give("SUB", [a, b], last=last, options={"table": "Sub"})


def divide(call: Call) -> Value:
    mode, dtype = call["rounding_mode"], call.result.dtype
    (a, b), last = operands(call, [call["self"], call["other"]], dtype)
    if mode == "floor":
        return call.give("FLOOR_DIV", [a, b], last=last, options={"table": "FloorDiv"})
    if mode is not None and dtype.is_floating_point:
        raise ExportError(f"{call.name}: LiteRT doesn't divide with rounding_mode = {mode!r}")
    return call.give("DIV", [a, b], last=last, options={"table": "Div"})


def compare(kind: str, table: str) -> Row:
    def write(call: Call) -> Value:
        dtype = common(call, ("self", "other"))
        (a, b), last = operands(call, [call["self"], call["other"]], dtype)
        return call.give(kind, [a, b], last=last, dtype=torch.bool, options={"table": table})

    return write


def logical(kind: str, table: str) -> Row:
    def write(call: Call) -> Value:
        if call.result.dtype != torch.bool:
            raise ExportError(f"{call.name}: LiteRT has no bitwise operators")
        (a, b), last = operands(call, [call["self"], call["other"]], torch.bool)
        return call.give(kind, [a, b], last=last, options={"table": table})

    return write


def where(call: Call) -> Value:
    dtype = call.result.dtype
    (a, b), last = operands(call, [call["self"], call["other"]], dtype)
    (condition,), _ = operands(call, [call["condition"]], torch.bool)
    condition = call.b.arranged(condition, last)
    if condition.rank != len(call.shape) and last:
        a, b, last = call.b.arranged(a, False), call.b.arranged(b, False), False
    return call.give("SELECT_V2", [condition, a, b], last=last, options={"table": "SelectV2"})


def masked_fill(call: Call) -> Value:
    dtype = call.result.dtype
    value = call["value"]
    if isinstance(value, float) and math.isinf(value):
        value = torch.finfo(dtype).min if value < 0 else torch.finfo(dtype).max
    (a, b), last = operands(call, [call["self"], value], dtype)
    mask = call.b.arranged(call.take(call["mask"]), last and len(shape_of(call["mask"])) == len(call.shape))
    if mask.last != last:
        a, last = call.b.arranged(a, False), False
    return call.give("SELECT_V2", [mask, b, a], last=last, options={"table": "SelectV2"})


def convert(call: Call) -> Any:
    """A cast; a constant of 16-bit floats is stored so and decoded."""
    given = call["self"]
    if isinstance(given, Value) and given.dtype == call.result.dtype:
        return given
    if isinstance(given, Dequantized):
        if call.result.dtype == torch.float32:
            return given
    x = call.take(given)
    return cast(call, x, call.result.dtype)


def same(call: Call) -> Any:
    """Nothing to compute."""
    for key in ("self", "input", "x"):
        if key in call.args:
            return call[key]
    raise ExportError(f"{call.name}: an operator without an input")


def full_like(number: float | None) -> Row:
    def write(call: Call) -> Value:
        value = number if number is not None else call["fill_value"]
        return filled(call, value)

    return write


def filled(call: Call, value: float) -> Value:
    """A tensor of one number."""
    dtype = call.result.dtype
    if all(isinstance(size, int) for size in call.shape):
        return call.b.constant(torch.full(list(call.shape), value, dtype=dtype), f"{call.name}/full")
    one = torch.full([1] * len(call.shape), value, dtype=dtype)
    constant = call.b.constant(one, f"{call.name}/one")
    like = call.converter.inputs[0][1]
    sizes = call.b.shape_like(like, _leading(call), call.name)
    return call.give("BROADCAST_TO", [constant, sizes], options={"table": "BroadcastTo"})


def _leading(call: Call) -> list[Size]:
    shape = list(call.shape)
    if any(not isinstance(size, int) for size in shape[1:]):
        raise ExportError(
            f"{call.name}: LiteRT can't fill a tensor of shape {list(map(str, shape))} while running"
        )
    return shape


def bitwise_not(call: Call) -> Value:
    if call.result.dtype != torch.bool:
        raise ExportError(f"{call.name}: LiteRT has no bitwise operators")
    return unary("LOGICAL_NOT", "LogicalNot")(call)


def remainder(call: Call) -> Value:
    (a, b), last = operands(call, [call["self"], call["other"]], call.result.dtype)
    return call.give("FLOOR_MOD", [a, b], last=last, options={"table": "FloorMod"})


ROWS: dict[Any, Row] = {
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar), binary("ADD", "Add")),
    **dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar), binary("SUB", "Sub")),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), binary("MUL", "Mul")),
    **dict.fromkeys(
        (aten.div.Tensor, aten.div.Scalar, aten.div.Tensor_mode, aten.div.Scalar_mode), divide
    ),
    **dict.fromkeys((aten.rsub.Tensor, aten.rsub.Scalar), rsub),
    **dict.fromkeys((aten.maximum.default, aten.max.other), binary("MAXIMUM", "MaximumMinimum")),
    **dict.fromkeys((aten.minimum.default, aten.min.other), binary("MINIMUM", "MaximumMinimum")),
    **dict.fromkeys((aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor), power),
    **dict.fromkeys((aten.eq.Tensor, aten.eq.Scalar), compare("EQUAL", "Equal")),
    **dict.fromkeys((aten.ne.Tensor, aten.ne.Scalar), compare("NOT_EQUAL", "NotEqual")),
    **dict.fromkeys((aten.lt.Tensor, aten.lt.Scalar), compare("LESS", "Less")),
    **dict.fromkeys((aten.le.Tensor, aten.le.Scalar), compare("LESS_EQUAL", "LessEqual")),
    **dict.fromkeys((aten.gt.Tensor, aten.gt.Scalar), compare("GREATER", "Greater")),
    **dict.fromkeys((aten.ge.Tensor, aten.ge.Scalar), compare("GREATER_EQUAL", "GreaterEqual")),
    **dict.fromkeys(
        (aten.logical_and.default, aten.bitwise_and.Tensor, aten.__and__.Tensor), logical("LOGICAL_AND", "LogicalAnd")
    ),
    **dict.fromkeys(
        (aten.logical_or.default, aten.bitwise_or.Tensor, aten.__or__.Tensor), logical("LOGICAL_OR", "LogicalOr")
    ),
    **dict.fromkeys((aten.logical_xor.default, aten.bitwise_xor.Tensor), logical("NOT_EQUAL", "NotEqual")),
    aten.isnan.default: isnan,
    aten.reciprocal.default: reciprocal,
    aten.sign.default: unary("SIGN", "Sign"),
    aten.tan.default: tan,
    aten.logical_not.default: unary("LOGICAL_NOT", "LogicalNot"),
    aten.bitwise_not.default: bitwise_not,
    **dict.fromkeys((aten.remainder.Tensor, aten.remainder.Scalar), remainder),
    aten.floor_divide.default: lambda call: binary("FLOOR_DIV", "FloorDiv")(call),
    aten.neg.default: unary("NEG", "Neg"),
    aten.abs.default: unary("ABS", "Abs"),
    aten.exp.default: unary("EXP", "Exp"),
    aten.log.default: unary("LOG"),
    aten.log1p.default: log1p,
    aten.erf.default: erf,
    aten.sqrt.default: unary("SQRT"),
    aten.rsqrt.default: unary("RSQRT"),
    aten.sin.default: unary("SIN"),
    aten.cos.default: unary("COS", "Cos"),
    aten.tanh.default: unary("TANH"),
    aten.sigmoid.default: unary("LOGISTIC"),
    aten.floor.default: unary("FLOOR"),
    aten.ceil.default: unary("CEIL"),
    aten.round.default: unary("ROUND"),
    aten.hardswish.default: unary("HARD_SWISH", "HardSwish"),
    aten.relu.default: unary("RELU"),
    aten.relu6.default: unary("RELU6"),
    aten.leaky_relu.default: leaky_relu,
    aten.elu.default: elu,
    aten.gelu.default: gelu,
    aten.silu.default: silu,
    aten.hardsigmoid.default: hardsigmoid,
    **dict.fromkeys(
        (aten.hardtanh.default, aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default), clamp
    ),
    **dict.fromkeys((aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar), where),
    **dict.fromkeys((aten.masked_fill.Scalar, aten.masked_fill.Tensor), masked_fill),
    **dict.fromkeys(
        (aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.to.device, aten.type_as.default), convert
    ),
    **dict.fromkeys(
        (
            aten.clone.default, aten.contiguous.default, aten.dropout.default, aten.detach.default,
            aten.alias.default, aten.lift_fresh_copy.default, aten.feature_dropout.default,
        ),
        same,
    ),
    aten.zeros_like.default: full_like(0),
    aten.ones_like.default: full_like(1),
    aten.full_like.default: full_like(None),
    aten.full.default: full_like(None),
    aten.zeros.default: full_like(0),
    aten.ones.default: full_like(1),
    aten.new_zeros.default: full_like(0),
    aten.new_ones.default: full_like(1),
    aten.new_full.default: full_like(None),
}  # fmt: skip
