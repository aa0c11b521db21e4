from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitport.errors import FormatError
from bitport.formats import SCALES, Format

INT32 = st.integers(-(2**31), 2**31 - 1)
AXES = st.one_of(st.none(), st.integers(-4, 4))


@st.composite
def integer_formats(draw: st.DrawFn) -> Format:
    low, high = sorted(draw(st.lists(INT32 | st.integers(-300, 300), min_size=2, max_size=2, unique=True)))
    fmt = Format("int", low, high)
    if draw(st.booleans()):
        fmt = fmt.with_(bits=draw(st.integers(fmt.bits, 32)))
    if draw(st.booleans()) and low < fmt.zero_point < high:
        fmt = fmt.with_(symmetric=True)
    granularity = draw(st.sampled_from(["global", "tensor", "channel", "group"]))
    axis = draw(AXES) if granularity in ("channel", "group") else None
    group = draw(st.integers(1, 10**6)) if granularity == "group" else None
    fmt = fmt.with_(granularity=granularity, axis=axis, group=group)
    return replace(fmt, scale=draw(st.sampled_from(SCALES)))


@st.composite
def other_formats(draw: st.DrawFn) -> Format:
    """Formats of any kind but integers, as fields."""
    kind = draw(st.sampled_from(["float", "log2", "table", "learned"]))
    fields: dict[str, Any] = {"kind": "codebook"}
    if kind == "float":
        fields = {"kind": kind, "exponent": draw(st.integers(1, 8)), "mantissa": draw(st.integers(0, 10))}
    elif kind == "log2":
        fields = {"kind": kind, "bits": draw(st.integers(2, 8))}
    elif kind == "table":
        fields["table"] = draw(st.sampled_from(["nf4", "sign"]))
    else:
        fields |= {"table": "learned", "size": draw(st.integers(2, 256))}
    if (fields.get("exponent"), fields.get("mantissa")) in ((5, 10), (8, 7)):
        return Format(**fields)
    granularity = draw(st.sampled_from(["global", "tensor", "channel", "group"]))
    if granularity in ("channel", "group"):
        fields["axis"] = draw(AXES)
    if granularity == "group":
        fields["group"] = draw(st.integers(1, 10**6))
    return Format(**fields, granularity=granularity, scale=draw(st.sampled_from(SCALES)))


FORMATS = integer_formats() | other_formats()


@given(FORMATS)
def test_text_round_trip(fmt: Format) -> None:
    again = Format.parse(str(fmt))
    assert again == fmt
    assert hash(again) == hash(fmt)


@given(integer_formats())
def test_bits_are_the_smallest_that_hold_the_range(fmt: Format) -> None:
    smallest = Format("int", fmt.low, fmt.high).bits

    def holds(bits: int) -> bool:
        if fmt.low >= 0:
            return fmt.high < 2**bits
        return -(2 ** (bits - 1)) <= fmt.low and fmt.high < 2 ** (bits - 1)

    assert holds(smallest)
    assert not holds(smallest - 1) or smallest == 1
    assert fmt.bits >= smallest
    assert fmt.levels == len(range(fmt.low, fmt.high + 1))


WORDS = [
    *[
        "int8",
        "int4n",
        "uint4",
        "int[-3,9]",
        "ternary",
        "float16",
        "e4m3",
        "e2m1",
        "e8m0",
        "log2(4)",
        "nf4",
        "sign",
    ],
    *["codebook(5)", "mxfp4", "nvfp4", "symmetric", "tensor", "global", "channel", "channel(1)", "group(32)"],
    *[
        "group(8,-1)",
        "group( 8 , 1 )",
        "bits(5)",
        "bits(8)",
        "scale(e8m0)",
        "scale(float16)",
        "scale(none)",
        "group(0)",
    ],
]


@given(
    st.text(max_size=30)
    | st.from_regex(r"u?int[0-9n\[\],() a-z-]{0,24}", fullmatch=True)
    | st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(" ".join)
)
def test_any_text_gives_a_format_or_a_format_error(text: str) -> None:
    try:
        fmt = Format.parse(text)
    except FormatError:
        return
    assert Format.parse(str(fmt)) == fmt


@pytest.mark.parametrize(
    ("text", "low", "high", "bits"),
    [
        ("int8", -128, 127, 8),
        ("int8n", -127, 127, 8),
        ("uint8", 0, 255, 8),
        ("int1", -1, 0, 1),
        ("uint1", 0, 1, 1),
        ("int4", -8, 7, 4),
        ("int5", -16, 15, 5),
        ("int16", -32768, 32767, 16),
        ("uint16", 0, 65535, 16),
        ("int32", -(2**31), 2**31 - 1, 32),
        ("int[-16,15]", -16, 15, 5),
        ("int[ -3 , 4 ]", -3, 4, 4),
        ("int[0,255]", 0, 255, 8),
        ("int[1,255]", 1, 255, 8),
        ("int[-16,15] bits(8)", -16, 15, 8),
    ],
)
def test_names(text: str, low: int, high: int, bits: int) -> None:
    fmt = Format.parse(text)
    assert (fmt.kind, fmt.low, fmt.high, fmt.bits) == ("int", low, high, bits)
    assert fmt.is_int
    assert not fmt.is_float


@pytest.mark.parametrize(
    ("text", "exponent", "mantissa", "bits"),
    [("float32", 8, 23, 32), ("float16", 5, 10, 16), ("bfloat16", 8, 7, 16)],
)
def test_floats(text: str, exponent: int, mantissa: int, bits: int) -> None:
    fmt = Format.parse(text)
    assert (fmt.exponent, fmt.mantissa, fmt.bits) == (exponent, mantissa, bits)
    assert fmt.is_float
    assert str(fmt) == text
    with pytest.raises(FormatError, match="no integer levels"):
        _ = fmt.levels


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("int8 symmetric channel(0)", "int8 symmetric channel(0)"),
        ("  int8   channel( 0 )  symmetric ", "int8 symmetric channel(0)"),
        ("int[-16,15] symmetric", "int[-16,15] symmetric"),
        ("int[-127,127]", "int8n"),
        ("int[0,255]", "uint8"),
        ("int8 channel", "int8 channel"),
        ("int8 bits(8)", "int8"),
        ("int8 bits(16)", "int8 bits(16)"),
    ],
)
def test_text_is_canonical(text: str, canonical: str) -> None:
    assert str(Format.parse(text)) == canonical


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "malformed"),
        ("int", "no format name"),
        ("int0", "no format name"),
        ("int33", "no format name"),
        ("uint17", "no format name"),
        ("int08", "no format name"),
        ("int1n", "no format name"),
        ("INT8", "no format name"),
        ("int[5,4]", "empty"),
        ("int[5,5]", "single code"),
        ("int[0,4294967295]", "exceeds 32 bits"),
        ("int[-99999999999,0]", "no format name"),
        ("int8 wide", "no option"),
        ("int8 symmetric(1)", "no option"),
        ("int8 bits(0)", "no option"),
        ("int8 bits(4)", "does not fit"),
        ("int8 bits(33)", "does not fit"),
        ("int8 symmetric symmetric", "twice"),
        ("int8 channel channel(1)", "twice"),
        ("int1 symmetric", "one side"),
        ("uint1 symmetric", "one side"),
        ("int[-8,0] symmetric", "one side"),
        ("int[3,9] symmetric", "one side"),
        ("float32 symmetric", "no options"),
        ("float8", "no format name"),
        ("int8(", "malformed"),
        ("int8; uint8", "malformed"),
        ("int8 channel(0,1)", "no option"),
        ("int8 group", "no option"),
        ("int8 group(0)", "no option"),
        ("int8 group(-4)", "no option"),
        ("int8 group(4,1,2)", "no option"),
        ("int8 group(4) channel", "two granularities"),
        ("int8 global tensor", "two granularities"),
        ("int8 scale(float64)", "no option"),
        ("int8 scale(none)", "no option"),
        ("int8 scale", "no option"),
        ("mxfp4 scale(float32)", "twice"),
        ("nvfp4 channel", "two granularities"),
        ("e0m3", "not supported"),
        ("e9m2", "not supported"),
        ("e4m11", "not supported"),
        ("e4m3 symmetric", "no symmetric"),
        ("e4m3 bits(16)", "takes 8 bits"),
        ("log2(1)", "2 … 8"),
        ("log2(9)", "2 … 8"),
        ("log2", "no format name"),
        ("log2(4) bits(5)", "twice"),
        ("codebook(1)", "2 … 256"),
        ("codebook(257)", "2 … 256"),
        ("codebook(16) bits(8)", "takes 4 bits"),
        ("nf4(16)", "no format name"),
        ("nf4 symmetric", "no symmetric"),
        ("float16 scale(float32)", "no options"),
        ("bfloat16 group(4)", "no options"),
    ],
)
def test_malformed_text_is_refused(text: str, why: str) -> None:
    with pytest.raises(FormatError, match=why):
        Format.parse(text)


def test_not_a_string() -> None:
    with pytest.raises(FormatError, match="not a string"):
        Format.parse(8)  # type: ignore[arg-type]


def test_keywords_replace_what_the_text_says() -> None:
    fmt = Format.parse("int8 symmetric channel(1)", symmetric=False, granularity="tensor")
    assert fmt == Format.parse("int8")
    assert Format.parse("int8", granularity="channel", axis=0) == Format.parse("int8 channel(0)")
    with pytest.raises(FormatError, match="channel granularity"):
        Format.parse("int8", axis=0)
    with pytest.raises(FormatError, match="granularity 'row'"):
        Format.parse("int8", granularity="row")


def test_keywords_do_not_concern_floats() -> None:
    assert Format.parse("float32", symmetric=True, granularity="channel", axis=0) == Format.parse("float32")


def test_with_replaces_fields() -> None:
    fmt = Format.parse("int8 symmetric channel(0)")
    assert fmt.with_(low=-127) == Format.parse("int8n symmetric channel(0)")
    assert fmt.with_(low=-8, high=7).bits == 4
    assert fmt.with_(granularity="tensor") == Format.parse("int8 symmetric")
    assert fmt.with_(axis=1).axis == 1
    assert fmt.with_() == fmt
    with pytest.raises(FormatError, match="one side"):
        fmt.with_(high=0)


@pytest.mark.parametrize(("text", "zero_point"), [("int8", 0), ("int8n", 0), ("uint8", 128), ("uint4", 8)])
def test_zero_point_of_symmetric_formats(text: str, zero_point: int) -> None:
    assert Format.parse(text, symmetric=True).zero_point == zero_point


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"kind": "cookbook"}, "kind 'cookbook'"),
        ({"kind": "codebook"}, "table ''"),
        ({"kind": "int", "low": 0.5, "high": 3}, "low is 0.5"),
        ({"kind": "int", "low": -1, "high": 3, "mantissa": 2}, "mantissa"),
        ({"kind": "float", "exponent": 9, "mantissa": 3}, "not supported"),
        ({"kind": "float", "exponent": 8, "mantissa": 23, "bits": 16}, "takes 32 bits"),
        ({"kind": "float", "exponent": 8, "mantissa": 23, "symmetric": True}, "no integer range"),
        ({"kind": "float", "exponent": 4, "mantissa": 3, "low": -8}, "no low"),
        ({"kind": "float", "exponent": 4, "mantissa": 3, "table": "nf4"}, "no table"),
        ({"kind": "float", "exponent": 5, "mantissa": 10, "granularity": "channel"}, "no integer range"),
        ({"kind": "int", "low": -8, "high": 7, "table": "nf4"}, "no table"),
        ({"kind": "int", "low": -8, "high": 7, "scale": "none"}, "scales in 'none'"),
        ({"kind": "float", "exponent": 4, "mantissa": 3, "scale": "none"}, "scales in 'none'"),
        ({"kind": "int", "low": -8, "high": 7, "scale": "float64"}, "scales in 'float64'"),
        ({"kind": "int", "low": -8, "high": 7, "granularity": "group"}, "groups of 0"),
        ({"kind": "int", "low": -8, "high": 7, "granularity": "group", "group": 2.5}, "groups of 2.5"),
        ({"kind": "int", "low": -8, "high": 7, "group": 4}, "without the granularity group"),
        ({"kind": "int", "low": -8, "high": 7, "granularity": "global", "axis": 0}, "without a channel"),
        ({"kind": "log2", "bits": 4, "exponent": 3}, "no exponent"),
        ({"kind": "codebook", "table": "nf4", "mantissa": 3}, "no mantissa"),
        ({"kind": "codebook", "table": "learned", "size": 2.5}, "codebook"),
    ],
)
def test_contradictory_fields_are_refused(fields: dict[str, object], why: str) -> None:
    with pytest.raises(FormatError, match=why):
        Format(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "bits", "canonical"),
    [
        ("e4m3", 8, "e4m3"),
        ("e2m1 group(16) scale(e4m3)", 4, "e2m1 group(16) scale(e4m3)"),
        ("mxfp4", 4, "e2m1 group(32) scale(e8m0)"),
        ("e5m10", 16, "float16"),
        ("ternary", 2, "int2n"),
        ("binary channel", 1, "uint1 channel"),
        ("log2(4) channel(1)", 4, "log2(4) channel(1)"),
        ("nf4 group(64)", 4, "nf4 group(64)"),
        ("sign", 1, "sign"),
        ("codebook(10) channel", 4, "codebook(10) channel"),
        ("int4 group( 128 , 1 )", 4, "int4 group(128,1)"),
        ("int8 global", 8, "int8 global"),
        ("int4 tensor", 4, "int4"),
        ("int8 scale(e8m0) symmetric", 8, "int8 symmetric scale(e8m0)"),
    ],
)
def test_other_kinds_and_granularities(text: str, bits: int, canonical: str) -> None:
    fmt = Format.parse(text)
    assert (fmt.bits, str(fmt)) == (bits, canonical)
    assert Format.parse(canonical) == fmt


@pytest.mark.parametrize(
    ("text", "levels"),
    [("int8n", 255), ("ternary", 3), ("nf4", 16), ("sign", 2), ("codebook(10)", 10), ("log2(4)", 16)],
)
def test_levels(text: str, levels: int) -> None:
    assert Format.parse(text).levels == levels
    with pytest.raises(FormatError, match="no integer levels"):
        _ = Format.parse("e4m3").levels


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("int4", (True, False, False)),
        ("e4m3", (False, True, False)),
        ("float16", (False, True, True)),
        ("e5m10", (False, True, True)),
        ("float32", (False, True, True)),
        ("nf4", (False, False, False)),
        ("log2(3)", (False, False, False)),
    ],
)
def test_kinds(text: str, kinds: tuple[bool, bool, bool]) -> None:
    fmt = Format.parse(text)
    assert (fmt.is_int, fmt.is_float, fmt.unscaled) == kinds


def test_microscaling_names_stand_for_their_parts() -> None:
    for name, element, size, scale in (
        ("mxfp8", "e4m3", 32, "e8m0"),
        ("mxfp6", "e2m3", 32, "e8m0"),
        ("mxfp4", "e2m1", 32, "e8m0"),
        ("nvfp4", "e2m1", 16, "e4m3"),
    ):
        fmt = Format.parse(name)
        assert (fmt.group, fmt.scale, fmt.granularity) == (size, scale, "group")
        assert fmt.with_(granularity="tensor") == replace(Format.parse(element), scale=scale)


def test_granularity_by_keyword() -> None:
    grouped = Format.parse("int4 group(32,1)")
    assert Format.parse("int4", granularity="group", group=32, axis=1) == grouped
    assert Format.parse("int4 group(32,1)", granularity="channel") == Format.parse("int4 channel(1)")
    assert Format.parse("int4 group(32,1)", granularity="global") == Format.parse("int4 global")
    assert grouped.with_(granularity="channel") == Format.parse("int4 channel(1)")
    assert grouped.with_(granularity="global") == Format.parse("int4 global")
    assert grouped.with_(group=8).group == 8
    assert grouped.with_(bits=8) == Format.parse("int4 bits(8) group(32,1)")
    with pytest.raises(FormatError, match="groups of 0"):
        Format.parse("int4", granularity="group")
    assert Format.parse("nf4", symmetric=True, granularity="channel") == Format.parse("nf4 channel")


def test_frozen() -> None:
    with pytest.raises(AttributeError):
        Format.parse("int8").low = 0  # type: ignore[misc]
