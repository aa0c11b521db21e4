from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from bitport.errors import FormatError, RecipeError, UnknownName, WeightsError
from bitport.formats import Format
from bitport.numerics.codes import Grid, decode, encode, fit, largest, scale_bits, storage_bits, values
from bitport.numerics.quantize import qparams, quantize
from bitport.numerics.ranges import weight_ranges
from bitport.numerics.rows import restore, row_sizes, rows

INTEGERS = [
    "int8",
    "int8n symmetric",
    "uint8",
    "uint4 symmetric",
    "int4",
    "int2n symmetric",
    "ternary",
    "binary",
    "int3",
    "int[-5,9]",
    "int16 symmetric",
    "int24",
    "int32 symmetric",
]
OTHERS = [
    *["e4m3", "e5m2", "e2m1", "e3m2", "e2m3", "e3m4", "e1m0", "e2m0", "e8m2", "e4m9"],
    *["log2(2)", "log2(4)", "log2(8)", "nf4", "sign", "codebook(3)", "codebook(16)"],
]
UNSCALED = ["float32", "float16", "bfloat16"]
TABLES = [name for name in OTHERS if Format.parse(name).bits <= 8]
GRANULARITIES = ["tensor", "global", "channel(0)", "channel(-1)", "group(3,0)", "group(100,1)", "group(1,1)"]
SCALES = ["float32", "bfloat16", "e8m0", "e4m3"]
WEIGHTS = st.floats(-1e3, 1e3, width=32)
ANY_FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)


@st.composite
def tensors(draw: st.DrawFn, elements: st.SearchStrategy[float] = WEIGHTS) -> Tensor:
    shape = draw(st.lists(st.integers(0, 5), min_size=2, max_size=3))
    count = math.prod(shape)
    return torch.tensor(draw(st.lists(elements, min_size=count, max_size=count))).reshape(shape)


def formats(names: list[str], stored: list[str] = SCALES) -> st.SearchStrategy[Format]:
    parts = (st.sampled_from(names), st.sampled_from(GRANULARITIES), st.sampled_from(stored))
    return st.tuples(*parts).map(lambda words: Format.parse(f"{words[0]} {words[1]} scale({words[2]})"))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def squared_error(w: Tensor, grid: Grid) -> float:
    return float((decode(encode(w, grid), grid).double() - w.double()).square().sum())


def wide_scale(grid: Grid, w: Tensor) -> Tensor:
    """The scale of every value, in the shape of w."""
    fmt = grid.format
    if fmt.granularity not in ("channel", "group"):
        return grid.scale.expand(w.shape)
    axis = (fmt.axis or 0) % w.ndim
    moved = w.movedim(axis, 0)
    run = torch.arange(moved.numel() // max(moved.shape[0], 1)) // (fmt.group or 10**9)
    groups = grid.scale if fmt.group else grid.scale[:, None]
    return groups[:, run].reshape(moved.shape).movedim(0, axis)


# ---------------------------------------------------------------- laws of every format


@given(formats(INTEGERS + OTHERS), tensors())
def test_what_was_decoded_is_stored_as_it_is(fmt: Format, w: Tensor) -> None:
    grid = fit(w, fmt)
    codes = encode(w, grid)
    once = decode(codes, grid)
    assert codes.dtype == torch.int32 and once.dtype == torch.float32
    assert codes.shape == once.shape == w.shape
    again = encode(once, grid)
    assert torch.equal(decode(again, grid), once)


@given(formats(INTEGERS + [name for name in OTHERS if name != "sign"]), tensors(WEIGHTS | st.just(0.0)))
def test_zero_stays_zero(fmt: Format, w: Tensor) -> None:
    grid = fit(w, fmt)
    assert (decode(encode(w, grid), grid)[w == 0] == 0).all()
    zeros = torch.zeros(w.shape)
    assert torch.equal(decode(encode(zeros, fit(zeros, fmt)), fit(zeros, fmt)), zeros)


@given(formats(TABLES), tensors())
def test_the_nearest_value_is_chosen(fmt: Format, w: Tensor) -> None:
    """Against every value of the table, one by one."""
    grid = fit(w, fmt)
    table = values(fmt, grid.table)
    assert table.shape == (2**fmt.bits,)
    known = table[torch.isfinite(table)].double()
    scale = wide_scale(grid, w).double()
    distance = (known * scale[..., None] - w.double()[..., None]).abs().amin(-1)
    got = (decode(encode(w, grid), grid).double() - w.double()).abs()
    assert (got <= distance + 1e-6 * (w.abs().double() + scale)).all()


@given(formats(INTEGERS), tensors())
def test_integers_err_by_half_a_step_inside_the_range(fmt: Format, w: Tensor) -> None:
    grid = fit(w, fmt)
    codes = encode(w, grid)
    assert ((codes >= fmt.low) & (codes <= fmt.high)).all()
    error = (decode(codes, grid).double() - w.double()).abs()
    scale = wide_scale(grid, w).double()
    inside = (codes > fmt.low) & (codes < fmt.high)
    slack = 1e-6 * (w.abs().double() + scale)
    assert (error <= scale / 2 + slack)[inside].all()
    # The full range holds every weight: no code at the end was clamped by more than the zero point's rounding.
    if not (fmt.symmetric and fmt.low + fmt.high == 2 * fmt.zero_point - 1):
        assert (error <= scale + slack).all()


@given(formats(["e4m3", "e5m2", "e2m1", "e2m3", "e3m4", "e4m9"], ["float32", "e4m3"]), tensors())
def test_floats_err_by_half_the_local_step(fmt: Format, w: Tensor) -> None:
    grid = fit(w, fmt)
    scale = wide_scale(grid, w).double()
    steps = (w.double() / scale).abs().clamp(max=largest(fmt))
    inside = steps < largest(fmt)
    smallest = 2.0 ** (2 - 2 ** (fmt.exponent - 1))
    local = torch.exp2(torch.floor(torch.log2(steps.clamp(min=smallest)))) * 2.0**-fmt.mantissa
    error = (decode(encode(w, grid), grid).double() - w.double()).abs()
    assert (error <= scale * local / 2 + 1e-6 * w.abs().double())[inside].all()


@given(formats(INTEGERS + OTHERS), tensors(ANY_FINITE))
@example(
    Format.parse("int8 channel(0)"), torch.tensor([[1e-40, -3e-40], [1e30, 1e-30], [0.0, 0.0], [1.0, 1e30]])
)
@example(Format.parse("e4m3 group(2,0) scale(e4m3)"), torch.tensor([[1e-40, -3e-40, 1e30, 1e-30, 1.0]]))
@example(Format.parse("e8m2 scale(e8m0)"), torch.tensor([[3.4e38, -3.4e38, 1e-45]]))
@example(Format.parse("int8 scale(e4m3)"), torch.tensor([[3.4e38, -3.4e38, 1e-45]]))
@example(Format.parse("codebook(3) channel(0)"), torch.tensor([[3.4e38, 1e-45, 2.0, 3.0, 4.0]]))
def test_any_finite_weights_give_finite_numbers(fmt: Format, w: Tensor) -> None:
    grid = fit(w, fmt)
    assert ((grid.scale >= 2.0**-126) & (grid.scale <= 2.0**126)).all()
    assert torch.isfinite(decode(encode(w, grid), grid)).all()


@given(st.sampled_from(UNSCALED), tensors(ANY_FINITE))
def test_wide_floats_are_bit_patterns(name: str, w: Tensor) -> None:
    fmt = Format.parse(name)
    grid = fit(w, fmt)
    dtype = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]
    cut = w.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
    codes = encode(w, grid)
    wanted = cut.view(torch.int32) if name == "float32" else cut.view(torch.int16).to(torch.int32) & 0xFFFF
    assert torch.equal(codes, wanted)
    assert torch.equal(decode(codes, grid), cut.float())
    assert (scale_bits(grid), grid.scale.ndim) == (0, 0)


# ---------------------------------------------------------------- integers


@pytest.mark.parametrize("text", ["int8 symmetric channel(0)", "int8 channel(1)", "uint4 tensor", "int16"])
@pytest.mark.parametrize("spec", ["minmax", "mse", {"use": "percentile", "q": 99.0}])
def test_integers_are_those_of_quantize(text: str, spec: str | dict[str, object]) -> None:
    fmt, w = Format.parse(text), random(33, 70)
    grid = fit(w, fmt, spec)
    scale, zero_point = qparams(*weight_ranges(w, fmt, spec), fmt)
    assert torch.equal(grid.scale, scale) and torch.equal(grid.zero_point, zero_point)
    assert torch.equal(encode(w, grid), quantize(w, scale, zero_point, fmt.low, fmt.high, fmt.axis))


def test_groups_are_quantized_each_on_its_own() -> None:
    fmt, w = Format.parse("int4 group(32,0)"), random(6, 5, 3, 3)
    grid = fit(w, fmt)
    assert grid.scale.shape == (6, 2)
    flat = w.flatten(1)
    for channel in range(6):
        for start in (0, 32):
            alone = flat[channel, start : start + 32]
            own = fit(alone, Format.parse("int4"))
            assert torch.equal(encode(alone, own), encode(w, grid).flatten(1)[channel, start : start + 32])


@pytest.mark.parametrize("shape", [(1, 300_000), (700, 100), (3, 70_001)])
def test_blocks_meet_without_a_seam(shape: tuple[int, int]) -> None:
    w = random(*shape)
    for text in ("int8 channel(0)", "int8 channel(1)", "int8", "int8 group(33,0)"):
        fmt = Format.parse(text)
        grid = fit(w, fmt)
        x_RK = rows(w, fmt)
        whole = quantize(x_RK, grid.scale.reshape(-1), grid.zero_point.reshape(-1), fmt.low, fmt.high, 0)
        assert torch.equal(encode(w, grid), restore(whole, fmt, w.shape))


def test_narrow_types() -> None:
    w = random(20, 30)
    grid = fit(w, Format.parse("int8 channel(0)"))
    assert torch.equal(encode(w, grid, torch.int8).int(), encode(w, grid))
    assert encode(w, grid, torch.int8).dtype == torch.int8
    with pytest.raises(FormatError, match=r"don't fit torch\.uint8"):
        encode(w, grid, torch.uint8)
    with pytest.raises(FormatError, match="integer type"):
        encode(w, grid, torch.float32)


def test_mse_finds_a_good_ternary_scale() -> None:
    w = random(8, 4000)
    fmt = Format.parse("ternary symmetric channel(0)")
    found = squared_error(w, fit(w, fmt, "mse")) / w.numel()
    # The optimum for a normal distribution has thresholds at ±0.612 and values at ±1.224: 0.190.
    assert found < 0.193
    assert squared_error(w, fit(w, fmt)) / w.numel() > 0.5


# ---------------------------------------------------------------- scales


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "e8m0", "e4m3", "float16"])
@pytest.mark.parametrize(
    "name", ["int4", "int4 symmetric", "int2n symmetric", "e4m3", "e2m1", "log2(4)", "nf4", "uint8"]
)
@pytest.mark.parametrize("granularity", ["tensor", "channel(0)", "group(16,0)"])
def test_mse_is_never_worse_than_minmax(name: str, stored: str, granularity: str) -> None:
    fmt = Format.parse(f"{name} {granularity} scale({stored})")
    for seed, power in ((0, 1), (1, 3)):
        w = random(12, 50, seed=seed) ** power
        assert squared_error(w, fit(w, fmt, "mse")) <= squared_error(w, fit(w, fmt)) * (1 + 1e-6)


@pytest.mark.parametrize("name", ["e2m1", "nf4"])
def test_mse_helps_where_one_weight_is_far_out(name: str) -> None:
    w = random(4, 1000)
    w[:, 0] = 12.0
    fmt = Format.parse(f"{name} channel(0)")
    assert squared_error(w, fit(w, fmt, "mse")) < 0.98 * squared_error(w, fit(w, fmt))


def test_mx_block_scales() -> None:
    """OCP MX v1.0, 6.3: the block's largest power of two over the element type's."""
    w = random(4, 64) * torch.tensor([1e-3, 1.0, 7.9, 1e5])[:, None]
    for name, emax in (("mxfp8", 8), ("mxfp6", 2), ("mxfp4", 2)):
        grid = fit(w, Format.parse(name, axis=0))
        amax = w.reshape(4, 2, 32).abs().amax(-1)
        wanted = 2.0 ** (np.floor(np.log2(amax.numpy())) - emax)
        np.testing.assert_array_equal(grid.scale.numpy(), wanted.astype(np.float32))


def test_powers_of_two_of_integers_hold_the_range() -> None:
    w = random(5, 40)
    grid = fit(w, Format.parse("int8 symmetric channel(0) scale(e8m0)"))
    exact = w.abs().amax(1) / 127
    assert ((grid.scale >= exact) & (grid.scale < 2 * exact)).all()
    assert (torch.frexp(grid.scale)[0] == 0.5).all()


def test_nvfp4_blocks() -> None:
    w = random(8, 64)
    grid = fit(w, Format.parse("nvfp4", axis=0))
    amax = w.reshape(8, 4, 16).abs().amax(-1)
    factor = float(amax.max()) / (6 * 448)
    assert float(grid.scale.max()) == pytest.approx(448 * factor, rel=1e-5)
    # e4m3 keeps 3 mantissa bits: half a step is 1/16 at most.
    assert ((grid.scale * 6 / amax - 1).abs() < 1 / 16 + 1e-5).all()
    assert scale_bits(grid) == 32 * 8 + 32
    assert storage_bits(w.numel(), grid) == 512 * 4 + 288


def test_float16_scales_are_refused_where_they_would_be_lost() -> None:
    for size in (1e-6, 1e30):
        w = torch.ones(2, 4)
        w[1] *= size
        with pytest.raises(FormatError, match="float32 or bfloat16"):
            fit(w, Format.parse("int8 channel(0) scale(float16)"))
        fit(w, Format.parse("int8 channel(0) scale(bfloat16)"))
    grid = fit(torch.zeros(2, 4), Format.parse("int8 channel(0) scale(float16)"))
    assert grid.scale.tolist() == [1, 1]


# ---------------------------------------------------------------- the other kinds


def test_sign_is_the_mean_magnitude() -> None:
    w = torch.tensor([[1.0, -3.0, 0.0, 2.0, 8.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    grid = fit(w, Format.parse("sign channel(0)"))
    assert grid.scale[0] == 2.8
    assert encode(w, grid).tolist() == [[1, 0, 1, 1, 1], [1] * 5]
    assert float(decode(encode(w, grid), grid)[1].abs().max()) < 1e-37
    tails = fit(w, Format.parse("sign group(2,0)"))
    torch.testing.assert_close(tails.scale[0], torch.tensor([2.0, 1.0, 8.0]))
    for factor in (0.9, 1.1):
        other = Grid(grid.format, grid.scale * factor, grid.zero_point)
        assert squared_error(w, grid) < squared_error(w, other)


def test_nf4_is_the_published_table() -> None:
    fmt = Format.parse("nf4 channel(0)")
    table = values(fmt)
    assert (table[0], table[7], table[15]) == (-1, 0, 1)
    assert float(table[8]) == pytest.approx(0.07958029955625534)
    w = 5 * table[None]
    grid = fit(w, fmt)
    assert float(grid.scale) == 5
    assert encode(w, grid).tolist() == [list(range(16))]


def test_a_learned_table_keeps_few_values_exactly() -> None:
    w = torch.tensor([[0.5, -2.0, 4.0, 0.0, 0.5], [4.0, 4.0, -2.0, 0.5, 0.0]])
    grid = fit(w, Format.parse("codebook(5)"))
    assert torch.equal(decode(encode(w, grid), grid), w)
    assert grid.table is not None and grid.table.tolist() == [-0.5, 0, 0.125, 1, 1]
    assert scale_bits(grid) == 32 + 5 * 32


def test_a_learned_table_beats_a_uniform_one() -> None:
    w = random(20, 500)
    uniform = squared_error(w, fit(w, Format.parse("int4"), "mse"))
    assert squared_error(w, fit(w, Format.parse("codebook(16)"))) < 0.85 * uniform


def test_formats_for_normal_weights_in_the_expected_order() -> None:
    """More bits, or a table that suits the distribution, err less."""
    w = random(16, 512)
    order = ["sign", "ternary", "int3", "int4", "nf4", "e2m3", "int6", "int8", "int16"]
    errors = [squared_error(w, fit(w, Format.parse(f"{name} group(64,0)"), "mse")) for name in order]
    assert errors == sorted(errors, reverse=True)


def test_values_name_what_is_not_a_number() -> None:
    assert torch.isnan(values(Format.parse("e4m3"))).nonzero().reshape(-1).tolist() == [127, 255]
    assert (~torch.isfinite(values(Format.parse("e5m2")))).nonzero().reshape(-1).tolist() == [
        *range(124, 128),
        *range(252, 256),
    ]
    assert values(Format.parse("codebook(3)"), torch.tensor([1.0, 2.0, 5.0])).tolist() == [1, 2, 5, 5]
    for name in ("int8", "float16", "e4m9"):
        with pytest.raises(FormatError, match="no table"):
            values(Format.parse(name))
    with pytest.raises(FormatError, match="needs its table"):
        values(Format.parse("codebook(3)"), torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize(
    ("name", "most"),
    [("e4m3", 448), ("e5m2", 57344), ("e2m1", 6), ("e2m3", 7.5), ("e3m2", 28), ("float16", 65504)],
)
def test_largest(name: str, most: float) -> None:
    assert largest(Format.parse(name)) == most
    assert largest(Format.parse("log2(5)")) == largest(Format.parse("nf4")) == 1
    with pytest.raises(FormatError, match="range of integers"):
        largest(Format.parse("int8"))


def test_true_widths() -> None:
    w = random(10, 100)
    widths = {
        "int8 symmetric channel(0)": 8000 + 320,
        "int8 channel(0)": 8000 + 10 * (32 + 8),
        "int3 group(32,0) scale(float16) symmetric": 3000 + 40 * 16,
        "mxfp4": 4000 + 40 * 8,
        "sign channel(0)": 1000 + 320,
        "codebook(10)": 4000 + 32 + 320,
        "float16": 16000,
    }
    for text, bits in widths.items():
        fmt = Format.parse(text)
        fmt = fmt.with_(axis=0) if fmt.granularity == "group" else fmt
        assert storage_bits(w.numel(), fit(w, fmt)) == bits, text


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", [*INTEGERS, *OTHERS, *UNSCALED])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers(name: str, bad: float) -> None:
    fmt = Format.parse(name)
    w = random(3, 4)
    grid = fit(w, fmt)
    w[1, 2] = bad
    for spec in ("minmax", "mse"):
        with pytest.raises(WeightsError, match="NaN or infinite"):
            fit(w, fmt, spec)
    with pytest.raises(WeightsError, match="NaN or infinite"):
        encode(w, grid)


def test_other_refusals() -> None:
    w = random(3, 4)
    with pytest.raises(WeightsError, match="complex64"):
        fit(w.to(torch.complex64), Format.parse("int8"))
    with pytest.raises(FormatError, match="channel axis"):
        fit(w, Format.parse("e4m3 channel"))
    with pytest.raises(UnknownName):
        fit(w, Format.parse("e4m3"), "entropi")
    with pytest.raises(RecipeError):
        fit(w, Format.parse("nf4"), {"use": "mse", "q": 3})
    grid = fit(w, Format.parse("int8 channel(0)"))
    for wrong in (random(4, 3), random(3)[0]):
        with pytest.raises(FormatError, match=r"scales of shape|channel axis"):
            encode(wrong, grid)
        with pytest.raises(FormatError, match=r"scales of shape|channel axis"):
            decode(wrong.int(), grid)
    with pytest.raises(FormatError, match="give integers"):
        decode(w, grid)
    for name, code in (
        ("int4", 8),
        ("int4", -9),
        ("nf4", 16),
        ("codebook(3)", 3),
        ("e4m3", -1),
        ("e2m1", 16),
    ):
        grid = fit(w, Format.parse(name))
        with pytest.raises(WeightsError, match="outside those"):
            decode(torch.full((3, 4), code), grid)


def test_the_callers_tensors_and_random_state_stay() -> None:
    w = random(6, 40)
    before, state = w.clone(), torch.get_rng_state()
    for name in ("int4 group(7,0)", "codebook(4)", "e4m3 channel(1)"):
        encode(w, fit(w, Format.parse(name), "mse"))
    assert torch.equal(w, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_of_tails_are_counted() -> None:
    fmt = Format.parse("int8 group(4,0)")
    assert row_sizes(torch.Size([2, 6]), fmt).tolist() == [4, 2, 4, 2]
