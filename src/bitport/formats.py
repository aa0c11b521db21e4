"""How one number is stored. A `Format` is frozen data: it knows no tensor, no range and no algorithm.

Grammar of `Format.parse` (words are separated by blanks, the options come in any order):

    format   = name {option}
    name     = int1 … int32        two's complement: int8 is −128 … 127
             | int2n … int32n      narrow, without the lowest code: int8n is −127 … 127
             | uint1 … uint16      unsigned: uint8 is 0 … 255
             | int[LOW,HIGH]       any range of integers, both ends included
             | ternary | binary    int[-1,1] and uint1
             | float32 | float16 | bfloat16
             | eXmY                a small float of X exponent and Y mantissa bits: e4m3, e5m2, e2m1 …
             | log2(N)             N bits: a sign and a power of two, or 0
             | nf4 | sign          fixed tables: 16 quantiles of a normal distribution; −1 and +1
             | codebook(N)         N values that are learned from the tensor
             | mxfp8 | mxfp6 | mxfp4 | nvfp4     e4m3, e2m3 and e2m1 with the block scales of the OCP MX and NVFP4 specs
    option   = symmetric | bits(N)
             | tensor | channel | channel(AXIS) | group(SIZE) | group(SIZE,AXIS) | global
             | scale(float32 | float16 | bfloat16 | e8m0 | e4m3)

An integer q stands for r = (q − zero_point) · scale; a code of the other kinds for r = value(code) · scale.
`symmetric` means that the zero point is fixed: 0 where the range has negative codes, the centre where it starts at 0
(uint8: 128). What shares one scale is the granularity: the model (global), a tensor, a channel, or a group of SIZE
consecutive values of one channel (a shorter tail is a group too). float32, float16 and bfloat16 have no scale.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from bitport.errors import FormatError

# name -> (exponent bits, mantissa bits); one more bit holds the sign. These are stored as they are, without a scale.
FLOATS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {"float32": (8, 23), "float16": (5, 10), "bfloat16": (8, 7)}
)
GRANULARITIES = ("global", "tensor", "channel", "group")
SCALES = ("float32", "float16", "bfloat16", "e8m0", "e4m3")
# Names that stand for several fields. Sources: OCP Microscaling Formats (MX) v1.0, 2023; NVIDIA's NVFP4.
ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "ternary": "int[-1,1]",
        "binary": "uint1",
        "mxfp8": "e4m3 group(32) scale(e8m0)",
        "mxfp6": "e2m3 group(32) scale(e8m0)",
        "mxfp4": "e2m1 group(32) scale(e8m0)",
        "nvfp4": "e2m1 group(16) scale(e4m3)",
    }
)
TABLES: Mapping[str, int] = MappingProxyType({"nf4": 16, "sign": 2})  # name -> number of values
_MOST_LEVELS = 256
_INT32 = (-(2**31), 2**31 - 1)
_REMEDY = (
    "write int1 … int32, int8n (narrow), uint1 … uint16, int[LOW,HIGH], ternary, binary, float32, float16, bfloat16, "
    "eXmY, log2(N), nf4, sign or codebook(N), followed by the options symmetric, tensor, channel, channel(AXIS), "
    "group(SIZE), group(SIZE,AXIS), global, bits(N), scale(NAME)"
)

_NAMED = re.compile(r"u?int(\d{1,2})n?")
_EXPLICIT = re.compile(r"int\[\s*(-?\d{1,10})\s*,\s*(-?\d{1,10})\s*\]")
_SMALL = re.compile(r"e(\d{1,2})m(\d{1,2})")
_COUNTED = re.compile(r"(log2|codebook)\(\s*(\d{1,4})\s*\)")
_OPTION = re.compile(r"([a-z]+)(?:\(\s*([^()]*?)\s*\))?")
# A name, then options. Blanks separate them, except inside brackets.
_TEXT = re.compile(r"\s*(\w+(?:\[[^\[\]]*\]|\(\s*\d{1,4}\s*\))?)((?:\s+[a-z]+(?:\([^()]*\))?)*)\s*")


@dataclass(frozen=True)
class Format:
    """One number format; equal formats compare and hash equal, and `Format.parse(str(f)) == f`.

    Attributes:
        kind: "int", "float", "log2" or "codebook".
        low, high: the range of integers, both included (kind "int"; 0 and 0 for the others).
        bits: storage width in bits; 0 asks for the smallest that holds the codes.
        exponent, mantissa: field widths in bits (kind "float").
        table: "nf4", "sign" or "learned" (kind "codebook").
        size: how many values a codebook has.
        symmetric: whether the zero point is fixed (kind "int"; see the module's text).
        granularity: what shares one scale: "global", "tensor", "channel" (one scale per index of `axis`) or "group".
        axis: the channel axis; None leaves it to the operator's own channel axis.
        group: how many consecutive values of a channel share a scale (granularity "group"). A channel is what is left
            when `axis` is taken out, flattened in the order of the axes.
        scale: how scales are stored: "float32", "float16", "bfloat16", "e8m0" (powers of two), "e4m3" (beside one
            float32 for the tensor); "none" where there are none.

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
    table: str = ""
    size: int = 0
    group: int = 0
    scale: str = "float32"

    def __post_init__(self) -> None:
        check = {"int": self._check_int, "float": self._check_float, "log2": self._check_log2}.get(self.kind)
        if self.kind == "codebook":
            check = self._check_codebook
        if check is None:
            raise FormatError(
                f"format kind {self.kind!r} is unknown: use 'int', 'float', 'log2' or 'codebook'"
            )
        check()
        if (self.exponent, self.mantissa) not in FLOATS.values():
            self._check_scales()

    def _check_int(self) -> None:
        name = f"int[{self.low},{self.high}]"
        for field in ("low", "high", "bits"):
            if type(getattr(self, field)) is not int:
                raise FormatError(f"format field {field} is {getattr(self, field)!r}: give an int")
        if self.exponent or self.mantissa:
            raise FormatError(f"{name} has exponent or mantissa bits: leave them 0, or use kind 'float'")
        self._refuse("table", "size")
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
        if self.symmetric and not self.low < self.zero_point < self.high:
            raise FormatError(
                f"{name} can't be symmetric: its zero point would be {self.zero_point}, which lacks codes on "
                "one side, so that 0.0 or one of the signs can't be stored; drop 'symmetric' or widen it"
            )

    def _check_scales(self) -> None:
        name = self._name()
        if self.granularity not in GRANULARITIES:
            raise FormatError(
                f"granularity {self.granularity!r} is unknown: use {' or '.join(GRANULARITIES)}"
            )
        if self.axis is not None and self.granularity not in ("channel", "group"):
            raise FormatError(
                f"{name} has axis {self.axis} without a channel granularity: write channel(AXIS)"
            )
        if self.granularity == "group":
            if type(self.group) is not int or self.group < 1:
                raise FormatError(
                    f"{name} has groups of {self.group!r} values: write group(SIZE), at least 1"
                )
        elif self.group:
            raise FormatError(
                f"{name} has a group size without the granularity group: write group({self.group})"
            )
        if self.scale not in SCALES:
            raise FormatError(f"{name} has scales in {self.scale!r}: use {', '.join(SCALES)}")

    def _check_float(self) -> None:
        fields = (self.exponent, self.mantissa)
        if fields not in FLOATS.values() and not (1 <= self.exponent <= 8 and 0 <= self.mantissa <= 10):
            raise FormatError(
                f"float format with {fields[0]} exponent and {fields[1]} mantissa bits is not supported: use 1 … 8 "
                f"exponent and up to 10 mantissa bits, or {', '.join(FLOATS)}"
            )
        if fields in FLOATS.values():
            object.__setattr__(self, "scale", "none")
            if (
                self.low
                or self.high
                or self.symmetric
                or self.granularity != "tensor"
                or self.axis is not None
            ):
                raise FormatError(
                    f"{self._name()} has no integer range and no scale: drop low, high, symmetric and channel"
                )
        self._refuse("low", "high", "symmetric", "table", "size")
        self._set_bits(1 + sum(fields))

    def _check_log2(self) -> None:
        self._refuse("low", "high", "symmetric", "table", "size", "exponent", "mantissa")
        if type(self.bits) is not int or not 2 <= self.bits <= 8:
            raise FormatError(f"log2({self.bits}): give 2 … 8 bits")

    def _check_codebook(self) -> None:
        self._refuse("low", "high", "symmetric", "exponent", "mantissa")
        if self.table in TABLES:
            object.__setattr__(self, "size", TABLES[self.table])
        elif self.table != "learned":
            raise FormatError(f"codebook table {self.table!r} is unknown: use {', '.join(TABLES)} or learned")
        if type(self.size) is not int or not 2 <= self.size <= _MOST_LEVELS:
            raise FormatError(f"codebook({self.size}): give 2 … {_MOST_LEVELS} values")
        self._set_bits((self.size - 1).bit_length())

    def _refuse(self, *fields: str) -> None:
        given = [field for field in fields if getattr(self, field)]
        if given:
            raise FormatError(f"a format of kind {self.kind!r} has no {', '.join(given)}: leave them away")

    def _set_bits(self, needed: int) -> None:
        if self.bits == 0:
            object.__setattr__(self, "bits", needed)
        elif self.bits != needed:
            raise FormatError(f"{self._name()} takes {needed} bits, not {self.bits}: leave bits away")

    @classmethod
    def parse(
        cls,
        text: str,
        *,
        symmetric: bool | None = None,
        granularity: str | None = None,
        axis: int | None = None,
        group: int | None = None,
    ) -> Format:
        """Read a format from `text` (grammar: the module's text).

        The keywords, where not None, replace the options written in `text`. float32, float16 and bfloat16 have
        neither a scale nor a zero point, so the keywords do not concern them and are ignored (and `symmetric` any
        format but integers); written in `text` they are an error.

        Raises:
            FormatError: `text` is malformed, or names a range that can't store 0.0.
        """
        if not isinstance(text, str):
            raise FormatError(f"format {text!r} is not a string: {_REMEDY}")
        parts = _TEXT.fullmatch(text)
        if parts is None:
            raise FormatError(f"format {text!r} is malformed: {_REMEDY}")
        name, words = parts[1], parts[2]
        if name in ALIASES:
            name, _, more = ALIASES[name].partition(" ")
            words = f" {more}{words}"
        options = _parse_options(text, words)
        if name in FLOATS:
            if options:
                raise FormatError(f"format {text!r}: {name} has no options; write {name!r} alone")
            exponent, mantissa = FLOATS[name]
            return cls("float", exponent=exponent, mantissa=mantissa)
        named = _parse_name(text, name)
        if "bits" in named.keys() & options.keys():
            raise FormatError(f"format {text!r} gives its bits twice: leave bits(…) away")
        options = named | options
        if symmetric is not None and options["kind"] == "int":
            options["symmetric"] = symmetric
        if granularity is not None:
            options["granularity"] = granularity
            if granularity not in ("channel", "group"):
                options.pop("axis", None)
            if granularity != "group":
                options.pop("group", None)
        if axis is not None:
            options["axis"] = axis
        if group is not None:
            options["group"] = group
        return cls(**options)

    def with_(
        self,
        *,
        low: int | None = None,
        high: int | None = None,
        bits: int | None = None,
        symmetric: bool | None = None,
        granularity: str | None = None,
        axis: int | None = None,
        group: int | None = None,
    ) -> Format:
        """This format with the given fields replaced; None leaves a field as it is.

        A new range without `bits` gets the smallest width; granularity "tensor" or "global" drops the axis, and
        any but "group" the group's size.

        Raises:
            FormatError: the result contradicts itself.
        """
        given = {"low": low, "high": high, "bits": bits, "symmetric": symmetric, "granularity": granularity}
        changed: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        if (low is not None or high is not None) and bits is None:
            changed["bits"] = 0
        shared = changed.get("granularity", self.granularity)
        changed["axis"] = axis if axis is not None else self.axis if shared in ("channel", "group") else None
        changed["group"] = group if group is not None else self.group if shared == "group" else 0
        return replace(self, **changed)

    @property
    def is_float(self) -> bool:
        """Whether numbers are stored as floating point of some width."""
        return self.kind == "float"

    @property
    def is_int(self) -> bool:
        """Whether numbers are stored as integers with a scale and a zero point."""
        return self.kind == "int"

    @property
    def unscaled(self) -> bool:
        """Whether numbers are stored without any scale (float32, float16, bfloat16)."""
        return self.scale == "none"

    @property
    def levels(self) -> int:
        """The number of codes.

        Raises:
            FormatError: this is a float format.
        """
        if self.is_float:
            raise FormatError(f"{self} has no integer levels: ask is_int first")
        if self.is_int:
            return self.high - self.low + 1
        return self.size or 2**self.bits

    @property
    def zero_point(self) -> int:
        """The code of 0.0 where `symmetric` fixes it: 0, or the centre of a range that starts at 0.

        The centre of an even number of codes is the upper of the middle two, so that uint8 is int8 + 128.
        """
        return (self.high + 1) // 2 if self.low == 0 else 0

    def _name(self) -> str:
        if self.kind == "log2":
            return f"log2({self.bits})"
        if self.kind == "codebook":
            return self.table if self.table in TABLES else f"codebook({self.size})"
        if self.is_float:
            named = (name for name, fields in FLOATS.items() if fields == (self.exponent, self.mantissa))
            return next(named, f"e{self.exponent}m{self.mantissa}")
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
        axis = "" if self.axis is None else f"{self.axis}"
        if self.granularity == "channel":
            words.append(f"channel({axis})" if axis else "channel")
        elif self.granularity == "group":
            words.append(f"group({self.group},{axis})" if axis else f"group({self.group})")
        elif self.granularity == "global":
            words.append("global")
        if self.scale not in ("float32", "none"):
            words.append(f"scale({self.scale})")
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


def _parse_name(text: str, name: str) -> dict[str, Any]:
    """The fields that the name of a format stands for."""
    if name in TABLES:
        return {"kind": "codebook", "table": name}
    if found := _COUNTED.fullmatch(name):
        number = int(found[2])
        if found[1] == "log2":
            return {"kind": "log2", "bits": number}
        return {"kind": "codebook", "table": "learned", "size": number}
    if found := _SMALL.fullmatch(name):
        return {"kind": "float", "exponent": int(found[1]), "mantissa": int(found[2])}
    if found := _EXPLICIT.fullmatch(name):
        return {"kind": "int", "low": int(found[1]), "high": int(found[2])}
    if found := _NAMED.fullmatch(name):
        width = int(found[1])
        limits = _named_ranges(width).get(name) if 1 <= width <= 32 else None
        if limits is not None:
            return {"kind": "int", "low": limits[0], "high": limits[1]}
    raise FormatError(f"format {text!r}: {name!r} is no format name: {_REMEDY}")


def _parse_options(text: str, words: str) -> dict[str, Any]:
    """The options of a format as keyword arguments of `Format`."""
    options: dict[str, Any] = {}
    for found in _OPTION.finditer(words):
        fields = _option(found[1], found[2])
        if fields is None:
            raise FormatError(f"format {text!r}: {found[0]!r} is no option: {_REMEDY}")
        if fields.keys() & options.keys():
            raise FormatError(f"format {text!r} gives {found[1]!r} twice, or two granularities: keep one")
        options |= fields
    return options


def _option(name: str, value: str | None) -> dict[str, Any] | None:
    """The fields that one option stands for; None: there is no such option."""
    if name == "scale":
        return {"scale": value} if value in SCALES else None
    numbers = [] if value is None else re.split(r"\s*,\s*", value)
    if not all(re.fullmatch(r"-?\d{1,10}", number) for number in numbers):
        return None
    given = [int(number) for number in numbers]
    if name == "symmetric" and value is None:
        return {"symmetric": True}
    if name in ("tensor", "global") and value is None:
        return {"granularity": name}
    if name == "channel" and len(given) <= 1:
        return {"granularity": "channel", **({"axis": given[0]} if given else {})}
    if name == "group" and 1 <= len(given) <= 2 and given[0] > 0:
        return {"granularity": "group", "group": given[0], **({"axis": given[1]} if len(given) == 2 else {})}
    if name == "bits" and len(given) == 1 and given[0] > 0:
        return {"bits": given[0]}
    return None
