"""Operators that take each element by itself: arithmetic, comparisons, activations, casts."""

from __future__ import annotations

import operator as python
from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ._calls import Array, Call, Value, operator, tensor

# TensorProto.DataType → torch's; what torch lacks isn't here
DTYPES: dict[int, torch.dtype] = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 4: torch.uint16, 5: torch.int16, 6: torch.int32, 7: torch.int64,
    9: torch.bool, 10: torch.float16, 11: torch.float64, 12: torch.uint32, 13: torch.uint64, 16: torch.bfloat16,
}  # fmt: skip
EIGHT_BITS: dict[int, torch.dtype] = {
    17: torch.float8_e4m3fn, 18: torch.float8_e4m3fnuz, 19: torch.float8_e5m2, 20: torch.float8_e5m2fnuz,
}  # fmt: skip
NARROW = {21: (4, False), 22: (4, True), 25: (2, False), 26: (2, True)}  # bits, and whether there is a sign
NUMPY: dict[int, Any] = {
    1: np.float32, 2: np.uint8, 3: np.int8, 4: np.uint16, 5: np.int16, 6: np.int32, 7: np.int64, 9: np.bool_,
    10: np.float16, 11: np.float64, 12: np.uint32, 13: np.uint64,
}  # fmt: skip

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs, "Acos": torch.acos, "Acosh": torch.acosh, "Asin": torch.asin, "Asinh": torch.asinh,
    "Atan": torch.atan, "Atanh": torch.atanh, "Ceil": torch.ceil, "Cos": torch.cos, "Cosh": torch.cosh,
    "Erf": torch.erf, "Exp": torch.exp, "Floor": torch.floor, "IsNaN": torch.isnan, "Log": torch.log,
    "Neg": torch.neg, "Not": torch.logical_not, "Reciprocal": torch.reciprocal,
    "Relu": torch.relu, "Round": torch.round, "Sigmoid": torch.sigmoid, "Sign": torch.sign, "Sin": torch.sin,
    "Sinh": torch.sinh, "Softsign": F.softsign, "Sqrt": torch.sqrt, "Tan": torch.tan, "Tanh": torch.tanh,
    "HardSwish": F.hardswish, "Mish": F.mish,
}  # fmt: skip
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "And": torch.logical_and, "Or": torch.logical_or,
    "Xor": torch.logical_xor, "Equal": torch.eq, "Greater": torch.gt, "GreaterOrEqual": torch.ge, "Less": torch.lt,
    "LessOrEqual": torch.le, "BitwiseAnd": torch.bitwise_and, "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
}  # fmt: skip
KNOWN: dict[str, Callable[..., Any]] = {
    "Add": python.add, "Sub": python.sub, "Mul": python.mul, "Neg": python.neg, "Abs": np.abs, "Equal": python.eq,
    "Greater": python.gt, "GreaterOrEqual": python.ge, "Less": python.lt, "LessOrEqual": python.le, "Floor": np.floor,
    "Ceil": np.ceil, "Sqrt": np.sqrt, "Not": np.logical_not, "And": np.logical_and, "Or": np.logical_or,
    "Relu": lambda x: np.maximum(x, 0),
}  # fmt: skip


def _unary(compute: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    return lambda call, x: compute(tensor(x))


WIDE = (torch.uint16, torch.uint32, torch.uint64)  # torch hardly computes in them


def _binary(compute: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    def run(call: Call, a: Value, b: Value) -> Value:
        x, y = tensor(a), tensor(b)
        if x.dtype not in WIDE:
            return compute(x, y)
        found = compute(x.to(torch.int64), y.to(torch.int64))
        return found if found.dtype == torch.bool else found.to(x.dtype)

    return run


def _known(compute: Callable[..., Any] | None) -> Callable[..., Any] | None:
    return None if compute is None else lambda call, *arrays: np.asarray(compute(*arrays))


def _bitwise_not(x: Tensor) -> Tensor:
    return torch.bitwise_not(x.to(torch.int64)).to(x.dtype) if x.dtype in WIDE else torch.bitwise_not(x)


UNARY["BitwiseNot"] = _bitwise_not
for _name, _compute in UNARY.items():
    operator(_name, known=_known(KNOWN.get(_name)))(_unary(_compute))
for _name, _pair in BINARY.items():
    operator(_name, known=_known(KNOWN.get(_name)))(_binary(_pair))


def _divided(call: Call, a: Array, b: Array) -> Array:
    if a.dtype.kind == "f" or b.dtype.kind == "f":
        return np.asarray(a / b)
    return np.asarray(a // b)  # sizes are positive


@operator("Div", known=_divided)
def div(call: Call, a: Value, b: Value) -> Value:
    """Whole numbers are divided towards zero."""
    x, y = tensor(a), tensor(b)
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc").to(x.dtype)


@operator("Identity", known=lambda call, x: x)
def identity(call: Call, x: Value) -> Value:
    return x


@operator("Mod", known=lambda call, a, b: np.asarray(a % b))
def mod(call: Call, a: Value, b: Value) -> Value:
    x, y = tensor(a), tensor(b)
    return torch.fmod(x, y) if call.attr("fmod", 0) else torch.remainder(x, y)


@operator("Pow")
def power(call: Call, a: Value, b: Value) -> Value:
    x, y = tensor(a), tensor(b)
    if isinstance(b, np.ndarray) and b.size == 1 and float(b.reshape(-1)[0]) == 2.0:
        return x * x
    return torch.pow(x, y).to(x.dtype)


@operator("BitShift")
def bit_shift(call: Call, a: Value, b: Value) -> Value:
    x, y = tensor(a), tensor(b)
    left, bits = call.attr("direction") == "LEFT", 8 * x.dtype.itemsize
    if x.dtype == torch.uint64:
        call.refuse("torch can't shift 64 bits without a sign")
    wide, by = x.to(torch.int64), y.to(torch.int64)
    beyond = (by >= bits) | (by < 0)
    safe = torch.where(beyond, torch.zeros_like(by), by)
    moved = torch.bitwise_left_shift(wide, safe) if left else torch.bitwise_right_shift(wide, safe)
    rest = torch.zeros_like(moved) if left else torch.where(wide < 0, -1, 0)
    return torch.where(beyond, rest, moved).to(x.dtype)


@operator("Where", known=lambda call, c, a, b: np.where(c.astype(bool), a, b))
def where(call: Call, condition: Value, a: Value, b: Value) -> Value:
    return torch.where(tensor(condition), tensor(a), tensor(b))


@operator("Max", known=lambda call, *xs: reduce(np.maximum, xs))
def maximum(call: Call, *values: Value) -> Value:
    return reduce(torch.maximum, map(tensor, values))


@operator("Min", known=lambda call, *xs: reduce(np.minimum, xs))
def minimum(call: Call, *values: Value) -> Value:
    return reduce(torch.minimum, map(tensor, values))


@operator("Sum")
def total(call: Call, *values: Value) -> Value:
    return reduce(torch.add, map(tensor, values))


@operator("Mean")
def mean(call: Call, *values: Value) -> Value:
    return reduce(torch.add, map(tensor, values)) / len(values)


@operator("IsInf")
def is_inf(call: Call, x: Value) -> Value:
    found, negative, positive = tensor(x), call.attr("detect_negative", 1), call.attr("detect_positive", 1)
    if negative and positive:
        return torch.isinf(found)
    if negative or positive:
        return torch.isneginf(found) if negative else torch.isposinf(found)
    return torch.zeros_like(found, dtype=torch.bool)


@operator("Clip")
def clip(call: Call, x: Value, low: Value = None, high: Value = None) -> Value:
    found = tensor(x)
    low, high = (call.attr(name) if given is None else given for name, given in (("min", low), ("max", high)))
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        found = found if low is None else torch.maximum(found, tensor(low))
        return found if high is None else torch.minimum(found, tensor(high))
    least, most = (None if end is None else np.asarray(end).reshape(-1)[0].item() for end in (low, high))
    if least is None and most is None:
        return found
    if (least, most) == (0, 6) and found.is_floating_point():
        return F.relu6(found)
    if least is not None and most is not None and least > most:
        return torch.full_like(found, most)  # the upper end wins
    return torch.clamp(found, least, most)


# --------------------------------------------------------------------------- activations


@operator("LeakyRelu")
def leaky_relu(call: Call, x: Value) -> Value:
    return F.leaky_relu(tensor(x), call.attr("alpha", 0.01))


@operator("PRelu", params={1: "weight"})
def prelu(call: Call, x: Value, slope: Value) -> Value:
    x, slope = tensor(x), tensor(slope)
    per_channel = slope.dim() and slope.numel() == slope.shape[0] and slope.dim() == x.dim() - 1
    if slope.numel() == 1 or (per_channel and x.dim() > 1 and slope.shape[0] == x.shape[1]):
        return F.prelu(x, slope.reshape(-1))
    return torch.where(x < 0, x * slope, x)


@operator("Elu")
def elu(call: Call, x: Value) -> Value:
    return F.elu(tensor(x), call.attr("alpha", 1.0))


@operator("Celu")
def celu(call: Call, x: Value) -> Value:
    return F.celu(tensor(x), call.attr("alpha", 1.0))


@operator("Selu")
def selu(call: Call, x: Value) -> Value:
    x = tensor(x)
    alpha, gamma = (
        call.attr("alpha", 1.67326319217681884765625),
        call.attr("gamma", 1.05070102214813232421875),
    )
    return gamma * F.elu(x, alpha)


@operator("Gelu")
def gelu(call: Call, x: Value) -> Value:
    return F.gelu(tensor(x), approximate=call.attr("approximate", "none"))


@operator("Swish")
def swish(call: Call, x: Value) -> Value:
    x, alpha = tensor(x), call.attr("alpha", 1.0)
    return F.silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x)


@operator("Softplus")
def softplus(call: Call, x: Value) -> Value:
    return F.softplus(tensor(x))


@operator("HardSigmoid")
def hard_sigmoid(call: Call, x: Value) -> Value:
    x, alpha, beta = tensor(x), call.attr("alpha", 0.2), call.attr("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return F.hardsigmoid(x)
    return torch.clamp(alpha * x + beta, 0, 1)


@operator("ThresholdedRelu")
def thresholded_relu(call: Call, x: Value) -> Value:
    x = tensor(x)
    return torch.where(x > call.attr("alpha", 1.0), x, torch.zeros_like(x))


@operator("Shrink")
def shrink(call: Call, x: Value) -> Value:
    x, bias, edge = tensor(x), call.attr("bias", 0.0), call.attr("lambd", 0.5)
    below = torch.where(x < -edge, x + bias, torch.zeros_like(x))
    return torch.where(x > edge, x - bias, below).to(x.dtype)


def _along(call: Call, x: Tensor, compute: Callable[..., Tensor]) -> Value:
    """Along one axis; up to opset 12 over all axes from there on, together."""
    if call.opset >= 13:
        return compute(x, dim=call.attr("axis", -1))
    axis = call.attr("axis", 1) % max(1, x.dim())
    if axis == x.dim() - 1:
        return compute(x, dim=axis)
    return compute(x.flatten(axis), dim=axis).reshape(x.shape)


@operator("Softmax")
def softmax(call: Call, x: Value) -> Value:
    return _along(call, tensor(x), torch.softmax)


@operator("LogSoftmax")
def log_softmax(call: Call, x: Value) -> Value:
    return _along(call, tensor(x), torch.log_softmax)


@operator("Hardmax")
def hardmax(call: Call, x: Value) -> Value:
    def first(x: Tensor, dim: int) -> Tensor:
        largest = x.argmax(dim, keepdim=True)
        return torch.zeros_like(x).scatter(dim, largest, 1.0)

    return _along(call, tensor(x), first)


# --------------------------------------------------------------------------- types


def _cast_known(call: Call, x: Array) -> Any:
    wanted = NUMPY.get(call.attr("to"))
    if x.dtype == object:
        return x if wanted in (np.int64, np.int32) else tensor(x).to(DTYPES[call.attr("to")])
    return x.astype(wanted) if wanted is not None else cast(call, x)


@operator("Cast", known=_cast_known)
def cast(call: Call, x: Value) -> Value:
    return convert(call, tensor(x), call.attr("to"))


def convert(call: Call, x: Tensor, kind: Any) -> Value:
    if kind in DTYPES:
        if x.dtype.itemsize == 1 and x.is_floating_point():
            x = x.float()
        return x.to(DTYPES[kind])
    if kind in EIGHT_BITS:
        wanted = EIGHT_BITS[kind]
        x = x.float()
        if call.attr("saturate", 1):
            largest = torch.finfo(wanted).max
            x = torch.where(x.isnan(), x, x.clamp(-largest, largest))
        elif wanted == torch.float8_e4m3fn:  # it has no infinity, and torch would take the largest number
            x = torch.where(x.abs() > 464, torch.nan, x)
        return x.to(wanted)
    if kind in NARROW:
        bits, signed = NARROW[kind]
        low = (x.float().trunc() if x.is_floating_point() else x).to(torch.int32) & (2**bits - 1)
        return (low - ((low >> (bits - 1)) << bits) if signed else low).to(
            torch.int8 if signed else torch.uint8
        )
    return call.refuse(f"there are no tensors of data type {kind} here")


def _like_known(call: Call, x: Array, like: Array) -> Any:
    plain = x.dtype != object and like.dtype in map(np.dtype, NUMPY.values())
    return x.astype(like.dtype) if plain else cast_like(call, x, like)


@operator("CastLike", known=_like_known)
def cast_like(call: Call, x: Value, like: Value) -> Value:
    """What lies in bytes for want of a type of its own can't be told from bytes."""
    x, wanted = tensor(x), tensor(like).dtype
    kind = next(
        (kind for kinds in (DTYPES, EIGHT_BITS) for kind, dtype in kinds.items() if dtype == wanted), None
    )
    return x.to(wanted) if kind is None else convert(call, x, kind)
