from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from bitport.errors import FormatError
from bitport.numerics.scales import BITS, from_parts, parts, stored

NAMES = ["float32", "float16", "bfloat16", "e8m0", "e4m3"]
SCALES = st.floats(2.0**-126, 2.0**126, width=32)
MODERATE = st.floats(2.0**-10, 2.0**10, width=32)
TYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@given(st.sampled_from(NAMES), st.lists(MODERATE, min_size=1, max_size=10), st.booleans())
def test_scales_are_kept_to_the_precision_of_their_type(name: str, numbers: list[float], up: bool) -> None:
    wanted = torch.tensor(numbers)
    got = stored(wanted, name, up=up)
    relative = {"float32": 0, "float16": 2.0**-10, "bfloat16": 2.0**-7, "e8m0": 1.0, "e4m3": 2.0**-3}[name]
    floor = float(wanted.max()) / 448 / 64  # e4m3's smallest normal number
    kept = wanted >= floor if name == "e4m3" else wanted > 0
    assert (got <= wanted * (1 + relative))[kept].all()
    if up and name != "float32":
        assert (got >= wanted * (1 - 1e-6)).all()
    else:
        assert (got >= wanted * (1 - relative / 2))[kept].all()
    assert torch.equal(stored(got, name, up=up), got)


@given(st.sampled_from(["float32", "bfloat16", "e8m0", "e4m3"]), st.lists(SCALES, min_size=1), st.booleans())
@example("e4m3", [2.0**-126, 2.0**-126], True)
@example("e4m3", [2.0**126, 2.0**-126], False)
@example("e8m0", [2.0**126, 2.0**-126], True)
def test_every_scale_is_stored_and_found_again(name: str, numbers: list[float], up: bool) -> None:
    got = stored(torch.tensor(numbers), name, up=up)
    assert ((got >= 2.0**-126) & (got <= 2.0**126)).all()
    codes, factor = parts(got, name)
    assert torch.equal(from_parts(codes, factor, name), got)
    if name != "float32":
        assert int(codes.min()) >= 0 and int(codes.max()) < 2 ** BITS[name]


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@given(st.lists(MODERATE, min_size=1, max_size=10))
def test_nearest_is_that_of_numpy(name: str, numbers: list[float]) -> None:
    wanted = np.array(numbers, dtype=np.float32).astype(TYPES[name])
    got = stored(torch.tensor(numbers), name, up=False)
    np.testing.assert_array_equal(got.numpy(), wanted.astype(np.float32))
    np.testing.assert_array_equal(parts(got, name)[0].numpy(), wanted.view(np.uint16).astype(np.int32))


def test_e8m0_codes_are_those_of_the_specification() -> None:
    scale = torch.tensor([2.0**k for k in range(-126, 127)])
    codes = parts(scale, "e8m0")[0].numpy().astype(np.uint8)
    np.testing.assert_array_equal(codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float32), scale.numpy())
    assert stored(torch.tensor([1.0, 1.0001, 1.49, 1.51, 2.0]), "e8m0", up=True).tolist() == [1, 2, 2, 2, 2]
    assert stored(torch.tensor([1.0, 1.0001, 1.49, 1.51, 2.0]), "e8m0", up=False).tolist() == [1, 1, 1, 2, 2]


def test_e4m3_has_a_factor_for_the_tensor() -> None:
    wanted = torch.tensor([[3.0, 1.0], [0.02, 2.9]])
    codes, factor = parts(stored(wanted, "e4m3", up=False), "e4m3")
    assert float(factor) == pytest.approx(3 / 448, rel=1e-5)
    assert int(codes[0, 0]) == 0x7E  # 448
    assert codes.shape == wanted.shape


def test_rounding_up_stays_below_what_makes_codes_infinite() -> None:
    for name in ("bfloat16", "e8m0", "e4m3"):
        most = 1.9 * 2.0**100
        assert float(stored(torch.tensor(most * (1 - 1e-6)), name, up=True, most=most)) <= most


@pytest.mark.parametrize("size", [1e-9, 9e-7, 65505.0, 1e30])
def test_float16_refuses_what_it_would_lose(size: float) -> None:
    with pytest.raises(FormatError, match="float32 or bfloat16"):
        stored(torch.tensor([1.0, size]), "float16", up=True)
    assert math.isfinite(float(stored(torch.tensor([65504.0, 1e-6]), "float16", up=True).max()))


def test_scales_of_another_type_have_no_parts() -> None:
    for name in ("float16", "bfloat16", "e8m0", "e4m3"):
        with pytest.raises(FormatError, match="aren't numbers"):
            parts(torch.tensor([1.0, math.pi]), name)


def test_none() -> None:
    for name in NAMES:
        assert stored(torch.zeros(2, 0), name, up=True).shape == (2, 0)
        assert parts(torch.zeros(0), name)[0].shape == (0,)
