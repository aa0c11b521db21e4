from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from bitport.errors import DataError, FormatError, WeightsError
from bitport.formats import Format
from bitport.numerics.quantize import (
    bias_qparams,
    dequantize,
    fake_quantize,
    qparams,
    quantize,
    quantize_bias,
    raise_weight_scale_for_bias,
    requantized_qparams,
)

FLOATS = st.floats(-1e4, 1e4, width=32)
ANY_FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)
FORMATS = st.sampled_from(
    [
        "int8",
        "int8 symmetric",
        "int8n symmetric",
        "uint8",
        "uint8 symmetric",
        "int4",
        "int2 symmetric",
        "uint1",
        "int16",
        "int[-16,15]",
        "int[-4,10] symmetric",
    ]
).map(Format.parse)
RANGES = st.tuples(FLOATS, FLOATS).map(sorted)


def tensors(low: float, high: float) -> tuple[Tensor, Tensor]:
    return torch.tensor(low), torch.tensor(high)


@given(FORMATS, RANGES, st.lists(FLOATS, min_size=1, max_size=40))
def test_error_is_at_most_half_a_step_inside_the_range(
    fmt: Format, ends: list[float], values: list[float]
) -> None:
    scale, zero_point = qparams(*tensors(*ends), fmt)
    x = torch.tensor(values)
    lowest = dequantize(torch.tensor(fmt.low), scale, zero_point)
    highest = dequantize(torch.tensor(fmt.high), scale, zero_point)
    x = x.clamp(lowest, highest)
    back = dequantize(quantize(x, scale, zero_point, fmt.low, fmt.high), scale, zero_point)
    slack = 1e-6 * (x.abs().double() + float(scale))
    assert ((x.double() - back.double()).abs() <= scale.double() / 2 + slack).all()


@given(FORMATS, RANGES)
def test_grid_values_are_fixed_points(fmt: Format, ends: list[float]) -> None:
    scale, zero_point = qparams(*tensors(*ends), fmt)
    codes = torch.arange(fmt.low, fmt.high + 1, max(1, fmt.levels // 500), dtype=torch.int32)
    grid = dequantize(codes, scale, zero_point)
    assert torch.equal(quantize(grid, scale, zero_point, fmt.low, fmt.high), codes)
    once = fake_quantize(grid, scale, zero_point, fmt.low, fmt.high)
    assert torch.equal(once, grid)


@given(FORMATS, RANGES, st.lists(ANY_FINITE, min_size=2, max_size=40))
def test_monotone(fmt: Format, ends: list[float], values: list[float]) -> None:
    scale, zero_point = qparams(*tensors(*ends), fmt)
    q = quantize(torch.tensor(values).sort().values, scale, zero_point, fmt.low, fmt.high)
    assert (q.diff() >= 0).all()
    assert q.min() >= fmt.low
    assert q.max() <= fmt.high


@example(Format.parse("int8"), [5.0, 6.0])
@example(Format.parse("int8"), [-6.0, -5.0])
@example(Format.parse("int8"), [0.0, 1e-45])
@example(Format.parse("int8"), [-3e38, 3e38])
@example(Format.parse("int8 symmetric"), [0.0, 0.0])
@given(FORMATS, st.tuples(ANY_FINITE, ANY_FINITE).map(sorted))
def test_qparams_are_sound_for_every_finite_range(fmt: Format, ends: list[float]) -> None:
    scale, zero_point = qparams(*tensors(*ends), fmt)
    assert scale.dtype == torch.float32
    assert zero_point.dtype == torch.int32
    for number in (float(scale), float(1 / scale)):
        assert 2.0**-126 <= number < math.inf
    assert fmt.low <= int(zero_point) <= fmt.high
    assert (
        float(
            dequantize(quantize(torch.tensor(0.0), scale, zero_point, fmt.low, fmt.high), scale, zero_point)
        )
        == 0
    )
    codes = torch.tensor([fmt.low, fmt.high])
    assert torch.isfinite(dequantize(codes, scale, zero_point)).all()


@given(FORMATS, RANGES)
def test_ends_are_kept_to_half_a_step(fmt: Format, ends: list[float]) -> None:
    """No range is cut by more than the rounding of its zero point."""
    scale, zero_point = qparams(*tensors(*ends), fmt)
    x = torch.tensor(ends)
    error = (fake_quantize(x, scale, zero_point, fmt.low, fmt.high) - x).abs()
    assert (error <= float(scale) * 0.5001 + 1e-6 * x.abs().max()).all()


@given(RANGES)
def test_asymmetric_formula(ends: list[float]) -> None:
    low, high = min(ends[0], 0.0), max(ends[1], 0.0)
    scale, zero_point = qparams(*tensors(*ends), Format.parse("int8"))
    if high - low > 1e-30:
        assert float(scale) == np.float32((high - low) / 255)
        assert int(zero_point) == round(-128 - low / ((high - low) / 255))
    if low == 0:
        assert int(zero_point) == -128
    if high == 0 and low < -1e-30:
        assert int(zero_point) == 127


@pytest.mark.parametrize(
    ("text", "ends", "scale", "zero_point"),
    [
        ("int8 symmetric", (-1.0, 0.5), 1 / 127, 0),
        ("int8n symmetric", (-1.0, 0.5), 1 / 127, 0),
        ("uint8 symmetric", (-1.0, 0.5), 1 / 127, 128),
        ("int[-16,15] symmetric", (-3.0, 0.0), 3 / 15, 0),
        ("int[-4,10] symmetric", (-1.0, 5.0), 0.5, 0),
        ("int[-4,10] symmetric", (-4.0, 5.0), 1.0, 0),
        ("int8", (2.0, 5.1), 0.02, -128),
        ("uint8", (-5.1, -2.0), 0.02, 255),
        ("int8", (0.0, 0.0), 1.0, -128),
        ("int8 symmetric", (0.0, 0.0), 1.0, 0),
    ],
)
def test_qparams_examples(text: str, ends: tuple[float, float], scale: float, zero_point: int) -> None:
    found = qparams(*tensors(*ends), Format.parse(text))
    assert float(found[0]) == np.float32(scale)
    assert int(found[1]) == zero_point


@pytest.mark.parametrize("text", ["uint1", "int2", "int2 symmetric", "int8", "int16"])
def test_huge_ranges_are_clipped_on_both_sides_alike(text: str) -> None:
    fmt = Format.parse(text)
    for end in (3.4e38, 1e300):
        low, high = (torch.tensor(e, dtype=torch.float64) for e in (-end, end))
        scale, zero_point = qparams(low, high, fmt)
        assert float(scale) <= 2.0**126
        ends = dequantize(torch.tensor([fmt.low, fmt.high]), scale, zero_point)
        assert torch.isfinite(ends).all()
        assert (ends.abs() <= torch.finfo(torch.float32).max).all()
        assert abs(int(zero_point) - (fmt.low + fmt.high) / 2) <= 0.5


def test_qparams_per_channel() -> None:
    low, high = torch.tensor([-1.0, 0.0, 0.0]), torch.tensor([1.0, 2.55, 0.0])
    scale, zero_point = qparams(low, high, Format.parse("int8"))
    for channel in range(3):
        alone = qparams(low[channel], high[channel], Format.parse("int8"))
        assert torch.equal(alone[0], scale[channel])
        assert torch.equal(alone[1], zero_point[channel])


def test_qparams_refuse_what_has_no_answer() -> None:
    int8 = Format.parse("int8")
    for low, high in ((0.0, math.inf), (math.nan, 1.0), (2.0, 1.0)):
        with pytest.raises(DataError, match="can't be quantized"):
            qparams(*tensors(low, high), int8)
    with pytest.raises(FormatError, match="float32"):
        qparams(*tensors(0.0, 1.0), Format.parse("float32"))


@given(st.lists(FLOATS, min_size=1, max_size=60), st.integers(-10, 10), st.integers(-128, 127))
def test_equals_torch_fake_quantize(values: list[float], exponent: int, zero_point: int) -> None:
    """torch multiplies by the reciprocal, so a power of two makes both exact: ties included."""
    scale = 2.0**exponent
    x = torch.tensor(values + [scale * (k + 0.5) for k in range(-6, 6)])
    expected = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, -128, 127)
    found = fake_quantize(x, torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32), -128, 127)
    assert torch.equal(found, expected)


def test_per_channel_equals_torch() -> None:
    x = torch.randn(3, 5, 4)
    scale, zero_point = torch.tensor([0.5, 0.25, 0.125, 1.0, 2.0]), torch.tensor([0, 3, -4, 100, -128]).int()
    expected = torch.fake_quantize_per_channel_affine(x, scale, zero_point, 1, -128, 127)
    assert torch.equal(fake_quantize(x, scale, zero_point, -128, 127, axis=1), expected)
    q = quantize(x, scale, zero_point, -128, 127, axis=1)
    assert torch.equal(dequantize(q, scale, zero_point, axis=1), expected)
    assert q.dtype == torch.int32


def test_computes_in_float32_with_a_division() -> None:
    """numpy's float32 division is IEEE 754; multiplying by the reciprocal differs on some of these."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=200_000).astype(np.float32)
    scale = np.float32(0.0123)
    steps = np.rint(x / scale)
    expected = np.clip(steps + np.float32(7), -128, 127).astype(np.int32)
    found = quantize(torch.from_numpy(x), torch.tensor(scale), torch.tensor(7).int(), -128, 127)
    assert np.array_equal(found.numpy(), expected)
    ties = (np.arange(-50, 50, dtype=np.float32) + np.float32(0.5)) * scale
    divided, multiplied = np.rint(ties / scale), np.rint(ties * (np.float32(1) / scale))
    assert (divided != multiplied).any()
    found = quantize(torch.from_numpy(ties), torch.tensor(scale), torch.tensor(0).int(), -128, 127)
    assert np.array_equal(found.numpy(), divided.astype(np.int32))


def test_non_finite_values() -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, 1e38])
    scale, zero_point = torch.tensor(1e-3), torch.tensor(5).int()
    assert quantize(x, scale, zero_point, -128, 127).tolist() == [5, 127, -128, 127]


def test_wide_formats_do_not_wrap() -> None:
    fmt = Format.parse("int32 symmetric")
    scale, zero_point = qparams(*tensors(-1.0, 1.0), fmt)
    q = quantize(torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]), scale, zero_point, fmt.low, fmt.high)
    assert q[0] == fmt.low
    assert q[2] == 0
    assert q[4] == fmt.high
    assert (q.long().diff() >= 0).all()


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3)])
def test_scalars_and_empty_tensors(shape: tuple[int, ...]) -> None:
    q = quantize(torch.ones(shape), torch.tensor(0.5), torch.tensor(0).int(), -128, 127)
    assert q.shape == shape
    assert (q == 2).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types(dtype: torch.dtype) -> None:
    x = torch.randn(64).to(dtype)
    args = (torch.tensor(0.02), torch.tensor(3).int(), -128, 127)
    assert torch.equal(quantize(x, *args), quantize(x.float(), *args))
    assert fake_quantize(x, *args).dtype == torch.float32


@given(st.lists(FLOATS, min_size=1, max_size=30), RANGES)
def test_fake_quantize_is_quantize_then_dequantize(values: list[float], ends: list[float]) -> None:
    fmt = Format.parse("int8")
    scale, zero_point = qparams(*tensors(*ends), fmt)
    x = torch.tensor(values)
    expected = dequantize(quantize(x, scale, zero_point, fmt.low, fmt.high), scale, zero_point)
    assert torch.equal(fake_quantize(x, scale, zero_point, fmt.low, fmt.high), expected)


def test_straight_through_gradient() -> None:
    x = torch.tensor([-100.0, -12.9, -12.8, 0.3, 12.7, 12.9, math.nan, math.inf], requires_grad=True)
    weights = torch.arange(1.0, 9.0)
    (fake_quantize(x, torch.tensor(0.1), torch.tensor(0).int(), -128, 127) * weights).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 0, 3, 4, 5, 0, 0, 0]


def test_gradient_equals_torch() -> None:
    ours, theirs = (torch.linspace(-5, 5, 801).requires_grad_() for _ in range(2))
    fake_quantize(ours, torch.tensor(0.03125), torch.tensor(10).int(), -128, 127).square().sum().backward()
    torch.fake_quantize_per_tensor_affine(theirs, 0.03125, 10, -128, 127).square().sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad)


@given(
    st.lists(st.floats(-10, 10, width=32), min_size=3, max_size=3),
    st.floats(2.0**-13, 1.0, width=32),
    st.lists(st.floats(2.0**-17, 1.0, width=32), min_size=3, max_size=3),
)
def test_bias_error_is_half_a_step(bias: list[float], scale_x: float, scales_w: list[float]) -> None:
    b, x, w = torch.tensor(bias), torch.tensor(scale_x), torch.tensor(scales_w)
    w = raise_weight_scale_for_bias(b, x, w)
    scale, zero_point = bias_qparams(x, w)
    q = quantize_bias(b, x, w)
    assert q.dtype == torch.int32
    assert (zero_point == 0).all()
    back = q.double() * scale.double()
    assert ((back - b.double()).abs() <= scale.double() * 0.5001).all()


def test_weight_scale_is_raised_for_an_overflowing_bias() -> None:
    bias, scale_x = torch.tensor([5.0, -5.0, 0.0, 0.01]), torch.tensor(0.02)
    scale_w = torch.tensor([7.8e-10, 7.8e-10, 7.8e-10, 1e-3])
    with pytest.raises(WeightsError, match="2 channels, first 0"):
        quantize_bias(bias, scale_x, scale_w)
    raised = raise_weight_scale_for_bias(bias, scale_x, scale_w)
    assert torch.equal(raised[2:], scale_w[2:])
    q = quantize_bias(bias, scale_x, raised)
    assert q[0] > 2**31 - 2**9
    assert q[1] == -q[0]
    smaller = torch.nextafter(raised, torch.zeros(4))
    with pytest.raises(WeightsError, match="2 channels"):
        quantize_bias(bias, scale_x, smaller)


def test_weight_scale_of_a_whole_tensor_is_raised_for_its_worst_channel() -> None:
    bias = torch.tensor([1e-3, 50.0, -2.0])
    raised = raise_weight_scale_for_bias(bias, torch.tensor(0.01), torch.tensor(1e-9))
    assert raised.shape == ()
    assert int(quantize_bias(bias, torch.tensor(0.01), raised).abs().argmax()) == 1


def test_weight_scale_without_a_bias_and_with_a_product_below_float32() -> None:
    scale_w = torch.tensor([0.1, 1e-38])
    raised = raise_weight_scale_for_bias(None, torch.tensor(0.01), scale_w)
    assert raised[0] == scale_w[0]
    assert bias_qparams(torch.tensor(0.01), raised)[0][1] >= 2.0**-126
    # 1e-10 · 1e-38 is 0 in float32.
    assert quantize_bias(torch.zeros(2), torch.tensor(1e-10), scale_w).tolist() == [0, 0]


@pytest.mark.parametrize("bias", [math.nan, math.inf])
def test_impossible_bias_is_refused(bias: float) -> None:
    with pytest.raises(WeightsError, match="keep the layer in float"):
        raise_weight_scale_for_bias(torch.tensor([bias]), torch.tensor(0.1), torch.tensor([0.1]))


@pytest.mark.parametrize(
    ("stored", "text", "same"),
    [
        ((0.1, 3, 0, 255), "int8", True),  # as many codes, moved by 128
        ((0.1, -125, -128, 127), "int8", True),
        ((0.1, 128, 0, 255), "int8 symmetric", True),
        ((0.1, 3, 0, 255), "int8 symmetric", False),
        ((0.1, 3, 0, 255), "int4", False),
        ((0.1, 0, -32768, 32767), "int8", False),
    ],
)
def test_what_was_stored_keeps_its_scale_or_its_range(
    stored: tuple[float, int, int, int], text: str, same: bool
) -> None:
    fmt, (scale, zero_point, low, high) = Format.parse(text), stored
    found, zero = requantized_qparams(*stored, fmt)
    assert (found == torch.tensor(scale)) == same
    if same:
        codes = torch.arange(low, high + 1)
        moved = codes - zero_point + zero
        assert torch.equal((moved - zero) * found, (codes - zero_point) * found)
        assert int(moved.min()) >= fmt.low and int(moved.max()) <= fmt.high
    ends = (fmt.low - int(zero)) * float(found), (fmt.high - int(zero)) * float(found)
    assert ends[0] <= (low - zero_point) * scale + float(found) and ends[1] >= (
        high - zero_point
    ) * scale - float(found)


def test_what_was_stored_does_not_become_a_small_float() -> None:
    with pytest.raises(FormatError):
        requantized_qparams(0.1, 0, -128, 127, Format.parse("fp8"))
