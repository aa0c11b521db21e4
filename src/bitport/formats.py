"""How one number is stored. A `Format` is frozen data: it knows no tensor, no range and no algorithm.

Grammar of `Format.parse` (words are separated by blanks, the options come in any order):

    format   = name [bits(N)] [symmetric] [channel | channel(AXIS)]
    name     = int1 … int32        two's complement: int8 is −128 … 127
             | int2n … int32n      narrow, without the lowest code: int8n is −127 … 127
             | uint1 … uint16      unsigned: uint8 is 0 … 255
             | int[LOW,HIGH]       any range of integers, both ends included
             | float32 | float16 | bfloat16

A real number r is stored as the integer q with r = (q − zero_point) · scale. `symmetric` means that the
zero point is fixed: 0 where the range has negative codes, the centre where it starts at 0 (uint8: 128).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from bitport.errors import FormatError

# name -> (exponent bits, mantissa bits); one more bit holds the sign.
_FLOATS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {"float32": (8, 23), "float16": (5, 10), "bfloat16": (8, 7)}
)
_GRANULARITIES = ("tensor", "channel")
_INT32 = (-(2**31), 2**31 - 1)
_REMEDY = (
    "write int1 … int32, int8n (narrow), uint1 … uint16, int[LOW,HIGH], float32, float16 or bfloat16, "
    "followed by the options symmetric, channel, channel(AXIS), bits(N)"
)

_NAMED = re.compile(r"u?int(\d{1,2})n?")
_EXPLICIT = re.compile(r"int\[\s*(-?\d{1,10})\s*,\s*(-?\d{1,10})\s*\]")
_OPTION = re.compile(r"([a-z]+)(?:\(\s*(-?\d{1,10})\s*\))?")
# A name, then options. Blanks separate them, except inside brackets.
_TEXT = re.compile(r"\s*(\w+(?:\[[^\[\]]*\])?)((?:\s+[a-z]+(?:\([^()]*\))?)*)\s*")


@dataclass(frozen=True)
class Format:
    """One number format; equal formats compare and hash equal, and `Format.parse(str(f)) == f`.

    Attributes:
        kind: "int" or "float".
        low, high: the range of integers, both included (kind "int"; 0 and 0 for floats).
        bits: storage width in bits; 0 asks for the smallest that holds the range.
        exponent, mantissa: field widths in bits (kind "float").
        symmetric: whether the zero point is fixed (see the module's text).
        granularity: what shares one scale: "tensor", or "channel" (one scale per index of `axis`).
        axis: the channel axis; None leaves it to the operator's own channel axis.

    Raises:
        FormatError: the fields contradict each other.
    """

    kind: str
    low: int = 0
    high: int = 0
    bits: int = 0
    exponent: int = 0
    mantissa: int = 0
    symmetric: bool = False
    granularity: str = "tensor"
    axis: int | None = None

    def __post_init__(self) -> None:
        if self.kind == "int":
            self._check_int()
        elif self.kind == "float":
            self._check_float()
        else:
            raise FormatError(f"format kind {self.kind!r} is unknown: use 'int' or 'float'")

    def _check_int(self) -> None:
        name = f"int[{self.low},{self.high}]"
        for field in ("low", "high", "bits"):
            if type(getattr(self, field)) is not int:
                raise FormatError(f"format field {field} is {getattr(self, field)!r}: give an int")
        if self.exponent or self.mantissa:
            raise FormatError(f"{name} has exponent or mantissa bits: leave them 0, or use kind 'float'")
        if self.low > self.high:
            raise FormatError(f"{name} is empty (low > high): swap the two ends")
        if self.low == self.high:
            raise FormatError(f"{name} holds a single code, which can't store a value: use two codes or more")
        if self.low < _INT32[0] or self.high > _INT32[1]:
            raise FormatError(f"{name} exceeds 32 bits: stay within {_INT32[0]} … {_INT32[1]}")
        needed = _width(self.low, self.high)
        if self.bits == 0:
            object.__setattr__(self, "bits", needed)
        elif not needed <= self.bits <= 32:
            raise FormatError(f"{name} does not fit bits({self.bits}): give {needed} … 32 bits")
        if self.granularity not in _GRANULARITIES:
            raise FormatError(
                f"granularity {self.granularity!r} is unknown: use {' or '.join(_GRANULARITIES)}"
            )
        if self.axis is not None and self.granularity != "channel":
            raise FormatError(
                f"{name} has axis {self.axis} without a channel granularity: write channel(AXIS)"
            )
        if self.symmetric and not self.low < self.zero_point < self.high:
            raise FormatError(
                f"{name} can't be symmetric: its zero point would be {self.zero_point}, which lacks codes on "
                "one side, so that 0.0 or one of the signs can't be stored; drop 'symmetric' or widen it"
            )

    def _check_float(self) -> None:
        fields = (self.exponent, self.mantissa)
        if fields not in _FLOATS.values():
            raise FormatError(
                f"float format with {fields[0]} exponent and {fields[1]} mantissa bits is not supported: "
                f"use {', '.join(_FLOATS)}"
            )
        if self.low or self.high or self.symmetric or self.granularity != "tensor" or self.axis is not None:
            raise FormatError(
                f"{self._name()} has no integer range and no scale: drop low, high, symmetric and channel"
            )
        if self.bits == 0:
            object.__setattr__(self, "bits", 1 + sum(fields))
        elif self.bits != 1 + sum(fields):
            raise FormatError(
                f"{self._name()} takes {1 + sum(fields)} bits, not {self.bits}: leave bits away"
            )

    @classmethod
    def parse(
        cls,
        text: str,
        *,
        symmetric: bool | None = None,
        granularity: str | None = None,
        axis: int | None = None,
    ) -> Format:
        """Read a format from `text` (grammar: the module's text).

        The keywords, where not None, replace the options written in `text`. A float format has neither a
        scale nor a zero point, so the keywords do not concern it and are ignored; written in `text` they
        are an error.

        Raises:
            FormatError: `text` is malformed, or names a range that can't store 0.0.
        """
        if not isinstance(text, str):
            raise FormatError(f"format {text!r} is not a string: {_REMEDY}")
        parts = _TEXT.fullmatch(text)
        if parts is None:
            raise FormatError(f"format {text!r} is malformed: {_REMEDY}")
        name, options = parts[1], _parse_options(text, parts[2])
        if name in _FLOATS:
            if options:
                raise FormatError(f"format {text!r}: {name} has no options; write {name!r} alone")
            exponent, mantissa = _FLOATS[name]
            return cls("float", exponent=exponent, mantissa=mantissa)
        low, high = _parse_range(text, name)
        if symmetric is not None:
            options["symmetric"] = symmetric
        if granularity is not None:
            options["granularity"] = granularity
            if granularity != "channel":
                options.pop("axis", None)
        if axis is not None:
            options["axis"] = axis
        return cls("int", low, high, **options)

    def with_(
        self,
        *,
        low: int | None = None,
        high: int | None = None,
        bits: int | None = None,
        symmetric: bool | None = None,
        granularity: str | None = None,
        axis: int | None = None,
    ) -> Format:
        """This format with the given fields replaced; None leaves a field as it is.

        A new range without `bits` gets the smallest width, and granularity "tensor" drops the axis.

        Raises:
            FormatError: the result contradicts itself.
        """
        ranged = low is not None or high is not None
        width = bits if bits is not None else (0 if ranged else self.bits)
        shared = self.granularity if granularity is None else granularity
        kept_axis = self.axis if shared == "channel" else None
        return Format(
            self.kind,
            self.low if low is None else low,
            self.high if high is None else high,
            width,
            self.exponent,
            self.mantissa,
            self.symmetric if symmetric is None else symmetric,
            shared,
            kept_axis if axis is None else axis,
        )

    @property
    def is_float(self) -> bool:
        """Whether numbers are stored as floating point (no scale, no zero point)."""
        return self.kind == "float"

    @property
    def is_int(self) -> bool:
        """Whether numbers are stored as integers with a scale and a zero point."""
        return self.kind == "int"

    @property
    def levels(self) -> int:
        """The number of integer codes.

        Raises:
            FormatError: this is a float format.
        """
        if self.is_float:
            raise FormatError(f"{self} has no integer levels: ask is_int first")
        return self.high - self.low + 1

    @property
    def zero_point(self) -> int:
        """The code of 0.0 where `symmetric` fixes it: 0, or the centre of a range that starts at 0.

        The centre of an even number of codes is the upper of the middle two, so that uint8 is int8 + 128.
        """
        return (self.high + 1) // 2 if self.low == 0 else 0

    def _name(self) -> str:
        if self.is_float:
            return next(name for name, fields in _FLOATS.items() if fields == (self.exponent, self.mantissa))
        width = _width(self.low, self.high)
        # int5 is read, but written int[-16,15]: widths without hardware behind them are clearer spelt out.
        if width.bit_count() == 1:
            for name, limits in _named_ranges(width).items():
                if limits == (self.low, self.high):
                    return name
        return f"int[{self.low},{self.high}]"

    def __str__(self) -> str:
        words = [self._name()]
        if self.is_int and self.bits != _width(self.low, self.high):
            words.append(f"bits({self.bits})")
        if self.symmetric:
            words.append("symmetric")
        if self.granularity == "channel":
            words.append("channel" if self.axis is None else f"channel({self.axis})")
        return " ".join(words)


def _width(low: int, high: int) -> int:
    """The smallest width in bits that holds low … high, unsigned if low >= 0, else two's complement."""
    return max(high.bit_length(), 1) if low >= 0 else 1 + max((-low - 1).bit_length(), high.bit_length(), 0)


def _named_ranges(width: int) -> dict[str, tuple[int, int]]:
    """The ranges that have a name at `width` bits."""
    half = 2 ** (width - 1)
    named = {f"int{width}": (-half, half - 1)}
    if width >= 2:
        named[f"int{width}n"] = (1 - half, half - 1)
    if width <= 16:
        named[f"uint{width}"] = (0, 2**width - 1)
    return named


def _parse_range(text: str, name: str) -> tuple[int, int]:
    """(low, high) of the name of an integer format."""
    if found := _EXPLICIT.fullmatch(name):
        return int(found[1]), int(found[2])
    if found := _NAMED.fullmatch(name):
        width = int(found[1])
        limits = _named_ranges(width).get(name) if 1 <= width <= 32 else None
        if limits is not None:
            return limits
    raise FormatError(f"format {text!r}: {name!r} is no format name: {_REMEDY}")


def _parse_options(text: str, words: str) -> dict[str, Any]:
    """The options of a format as keyword arguments of `Format`."""
    options: dict[str, Any] = {}
    for found in _OPTION.finditer(words):
        name, value = found[1], found[2]
        if name == "symmetric" and value is None:
            fields: dict[str, Any] = {"symmetric": True}
        elif name == "channel":
            fields = {"granularity": "channel", "axis": None if value is None else int(value)}
        elif name == "bits" and value is not None and int(value) > 0:
            fields = {"bits": int(value)}
        else:
            raise FormatError(f"format {text!r}: {found[0]!r} is no option: {_REMEDY}")
        if fields.keys() & options.keys():
            raise FormatError(f"format {text!r} gives {name!r} twice: keep one")
        options |= fields
    return options
