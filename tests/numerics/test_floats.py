from __future__ import annotations

import math
import struct

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitport.errors import FormatError
from bitport.formats import Format
from bitport.numerics.floats import from_bits, largest_number, layout, to_bits

REFERENCES = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e3m4": ml_dtypes.float8_e3m4,
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
}
SMALL = [
    "e1m0",
    "e1m2",
    "e1m6",
    "e2m0",
    "e2m5",
    "e3m0",
    "e3m1",
    "e4m0",
    "e6m1",
    "e7m0",
    "log2(2)",
    "log2(5)",
    "log2(8)",
]
REALS = st.floats(allow_nan=False, allow_infinity=False, width=32)


def patterns(name: str) -> Tensor:
    return torch.arange(2 ** Format.parse(name).bits, dtype=torch.int32)


def reference(name: str, codes: Tensor) -> np.ndarray:
    bits = Format.parse(name).bits
    return (
        codes.numpy().astype(np.uint8 if bits <= 8 else np.uint16).view(REFERENCES[name]).astype(np.float32)
    )


def encoded_by_reference(name: str, x: np.ndarray) -> np.ndarray:
    stored = x.astype(REFERENCES[name])
    return stored.view(np.uint8 if stored.itemsize == 1 else np.uint16).astype(np.int32)


@pytest.mark.parametrize("name", REFERENCES)
def test_every_pattern_means_what_ml_dtypes_says(name: str) -> None:
    codes, fields = patterns(name), layout(Format.parse(name))
    wanted, got = reference(name, codes), from_bits(codes, fields).numpy()
    np.testing.assert_array_equal(got, wanted)
    number = ~np.isnan(wanted)
    np.testing.assert_array_equal(np.signbit(got)[number], np.signbit(wanted)[number])
    finite = np.isfinite(wanted)
    assert np.array_equal(to_bits(torch.tensor(wanted[finite]), fields).numpy(), codes.numpy()[finite])
    assert largest_number(fields) == wanted[finite].max()


@pytest.mark.parametrize("name", REFERENCES)
def test_halfway_and_its_neighbours_round_as_ml_dtypes(name: str) -> None:
    fields = layout(Format.parse(name))
    known = reference(name, patterns(name))
    known = np.unique(known[np.isfinite(known)]).astype(np.float64)
    halfway = ((known[1:] + known[:-1]) / 2).astype(np.float32)
    x = np.concatenate([np.nextafter(halfway, np.float32(side)) for side in (-np.inf, np.inf)] + [halfway])
    np.testing.assert_array_equal(to_bits(torch.tensor(x), fields).numpy(), encoded_by_reference(name, x))


@pytest.mark.parametrize("name", REFERENCES)
def test_all_exponents_round_as_ml_dtypes(name: str) -> None:
    fields = layout(Format.parse(name))
    random = np.random.default_rng(0)
    x = random.integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    x = np.concatenate([x, random.standard_normal(50_000).astype(np.float32) * 3])
    x = x[np.abs(x) <= largest_number(fields)]
    assert len(x) > 100_000
    np.testing.assert_array_equal(to_bits(torch.tensor(x), fields).numpy(), encoded_by_reference(name, x))


@pytest.mark.parametrize("name", REFERENCES)
@given(st.lists(REALS, min_size=1, max_size=30))
def test_reals_round_as_ml_dtypes_and_saturate(name: str, numbers: list[float]) -> None:
    fields = layout(Format.parse(name))
    x = np.array(numbers, dtype=np.float32)
    cut = np.clip(x, -largest_number(fields), largest_number(fields)).astype(np.float32)
    np.testing.assert_array_equal(to_bits(torch.tensor(x), fields).numpy(), encoded_by_reference(name, cut))


@pytest.mark.parametrize("name", [*REFERENCES, *SMALL])
def test_infinity_becomes_the_largest_number(name: str) -> None:
    fields = layout(Format.parse(name))
    top = largest_number(fields)
    got = from_bits(to_bits(torch.tensor([math.inf, -math.inf, 3.4e38, -3.4e38]), fields), fields)
    assert got.tolist() == [top, -top, top, -top]


@pytest.mark.parametrize("name", SMALL)
@given(st.lists(REALS | st.floats(-4, 4, width=32), min_size=1, max_size=30))
def test_the_nearest_value_is_chosen_and_ties_go_to_the_even_pattern(name: str, numbers: list[float]) -> None:
    fields = layout(Format.parse(name))
    known = from_bits(patterns(name), fields)
    codes = patterns(name)[torch.isfinite(known)]
    known = known[torch.isfinite(known)].double()
    x = torch.tensor(numbers)
    got = to_bits(x, fields)
    distance = (known[None] - x.double()[:, None]).abs()
    assert torch.equal((from_bits(got, fields).double() - x.double()).abs(), distance.amin(1))
    for i, code in enumerate(got.tolist()):
        tied = distance[i] == distance[i].amin()
        if abs(numbers[i]) <= largest_number(fields) and len(known[tied].unique()) > 1:
            assert code % 2 == 0, codes[tied]


@pytest.mark.parametrize("name", [*REFERENCES, *SMALL])
def test_patterns_come_back(name: str) -> None:
    fields = layout(Format.parse(name))
    codes = patterns(name)
    known = from_bits(codes, fields)
    finite = torch.isfinite(known)
    if not fields.negative_zero:
        finite &= codes != 2 ** (Format.parse(name).bits - 1)
    assert torch.equal(to_bits(known[finite], fields), codes[finite])


def test_float32_is_its_own_pattern() -> None:
    x = torch.tensor([1.0, -2.5, 1e-45, -0.0])
    fields = layout(Format.parse("float32"))
    assert to_bits(x, fields).tolist() == [struct.unpack("i", struct.pack("f", v))[0] for v in x.tolist()]
    assert torch.equal(from_bits(to_bits(x, fields), fields), x)


def test_log2_levels() -> None:
    fmt = Format.parse("log2(4)")
    halves = [2.0**-k for k in range(6, -1, -1)]
    assert from_bits(patterns("log2(4)"), layout(fmt)).tolist() == [0, *halves, 0, *[-v for v in halves]]
    assert to_bits(torch.tensor([-0.0, -1e-9, 0.7501, 0.7499]), layout(fmt)).tolist() == [0, 0, 7, 6]


def test_sizes_without_infinity_or_nan() -> None:
    for name in ("e2m1", "e3m2", "e1m2", "e5m0"):
        assert torch.isfinite(from_bits(patterns(name), layout(Format.parse(name)))).all()
    assert torch.isnan(from_bits(patterns("e4m3"), layout(Format.parse("e4m3")))).nonzero().reshape(
        -1
    ).tolist() == [127, 255]


def test_integers_have_no_layout() -> None:
    with pytest.raises(FormatError, match="no exponent"):
        layout(Format.parse("int8"))


def test_subnormal_inputs_do_not_depend_on_flushing() -> None:
    x = torch.tensor([1e-40, -1e-45, 2.0**-9, 2.0**-10, 3e-3])
    for name in ("e4m3", "e2m1", "e5m2", "float16"):
        fields = layout(Format.parse(name))
        kept = to_bits(x, fields)
        torch.set_flush_denormal(True)
        try:
            flushed = to_bits(x, fields)
        finally:
            torch.set_flush_denormal(False)
        assert torch.equal(kept, flushed)
