"""What a grid cuts off and what it can't tell from nothing, by examples and on ordinary weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitport.formats import Format
from bitport.numerics.codes import Grid, fit
from bitport.numerics.losses import Losses, losses


def grid(w: Tensor, text: str, spec: str = "minmax") -> Grid:
    return fit(w, Format.parse(text), spec)


def test_one_outlier_flushes_the_others_of_its_group() -> None:
    w = torch.full((2, 40), 0.5)
    w[0, 35] = 0.001
    w[1, 3] = 1000.0
    found = losses(w, grid(w, "int8 symmetric group(32,0)"))
    # groups of 32 and 8: the first one of channel 1 is the third row
    assert found == Losses(lost=31, row=2)
    w[1, 3] = 0.5
    assert losses(w, grid(w, "int8 symmetric group(32,0)")) == Losses()


@pytest.mark.parametrize(
    "text",
    [
        "int8 channel(0)",
        "int8",
        "int4 group(16,0)",
        "e4m3",
        "nf4 group(16,0)",
        "log2(4)",
        "mxfp4",
        "uint4 channel(0)",
    ],
)
def test_an_outlier_is_noticed_in_every_format(text: str) -> None:
    w = torch.linspace(-1, 1, 96).reshape(3, 32)
    w[1, 5] = 1e30
    text = text.replace("mxfp4", "e2m1 group(32,0) scale(e8m0)")
    found = losses(w, grid(w, text))
    assert found.lost >= 15 and not found.all and found.clipped == 0
    assert found.row in (
        {0: {0}, 1: {1}, 2: {2, 3}}[grid(w, text).scale.ndim] if "group(32" not in text else {1}
    )


def test_a_learned_table_keeps_values_for_what_lies_beside_an_outlier() -> None:
    w = torch.linspace(-1, 1, 64)
    w[5] = 1e30
    learned = grid(w, "codebook(4)")
    assert losses(w, learned) == Losses()
    table = torch.tensor([-1.0, -0.5, 0.5, 1.0])
    assert losses(w, Grid(learned.format, learned.scale, learned.zero_point, table)).lost == 63


def test_what_is_cut_off_is_counted_with_its_mass() -> None:
    w = torch.ones(2, 50)
    w[1, 7] = 99.0
    narrow = Grid(
        Format.parse("int8 symmetric channel(0)"),
        torch.full((2,), 1 / 127),
        torch.zeros(2, dtype=torch.int32),
    )
    found = losses(w, narrow)
    assert (found.clipped, found.lost) == (1, 0)
    assert found.mass == pytest.approx(98 / (50 + 49 + 99), rel=1e-3)
    # twice the range is not far
    w[1, 7] = 2.0
    assert losses(w, narrow).clipped == 0


def test_what_float16_can_not_hold() -> None:
    w = torch.full((4, 10), 1e5)
    w[0] = 0.5
    found = losses(w * 10, grid(w, "float16"))
    assert found.clipped == 30 and found.mass == pytest.approx((1e6 - 65504) * 30 / (30e6 + 50), rel=1e-4)
    tiny = torch.full((4, 10), 1e-9)
    assert losses(tiny, grid(tiny, "float16")) == Losses(lost=40, row=0, all=True)
    assert losses(tiny, grid(tiny, "bfloat16")) == Losses()
    subnormal = torch.full((4, 10), 1e-41)
    assert losses(subnormal, grid(subnormal, "int4 channel(0)")) == Losses(lost=10, row=0, all=True)


@pytest.mark.parametrize("spec", ["minmax", "mse", "percentile"])
@pytest.mark.parametrize(
    "text",
    [
        "int8 symmetric channel(0)", "int8", "int4 symmetric group(16,0)", "int4 channel(0)", "sign", "float16",
        "int3 symmetric group(16,0)", "int2 symmetric group(16,0)", "e4m3 channel(0)", "nf4 group(16,0)",
        "codebook(16)", "log2(4) channel(0)",
    ],
)  # fmt: skip
def test_ordinary_weights_lose_nothing(text: str, spec: str) -> None:
    w = torch.randn(64, 144, generator=torch.Generator().manual_seed(0))
    w[3] = 0
    found = losses(w, grid(w, text, spec))
    assert found.lost == 0
    if "int2" not in text and "int3" not in text:
        assert found.clipped == 0


def test_nothing_has_no_losses() -> None:
    for shape in ((0, 4), (4, 0)):
        w = torch.zeros(shape)
        assert losses(w, grid(w, "int8 channel(0)")) == Losses()
    w = torch.zeros(3, 20)
    assert losses(w, grid(w, "int8 channel(0)")) == Losses()


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from(
        ["int8 channel(0)", "int4 group(16,0)", "int2 symmetric", "uint4", "ternary", "int[-9,2] channel(0)"]
    ),
    st.sampled_from([1.0, 8.0, 40.0, 3000.0]),
    st.sampled_from([0.0, 0.5, 0.95]),
    st.sampled_from(["minmax", "mse", "percentile"]),
)
def test_the_quick_look_says_what_the_long_one_says(
    seed: int, text: str, outlier: float, pruned: float, spec: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(3, 20, generator=generator)
    w[torch.rand(3, 20, generator=generator) < pruned] = 0.0
    w[1, 3] = outlier
    made = grid(w, text, spec)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("bitport.numerics.losses._is_kept", lambda *_: False)
        wanted = losses(w, made)
    assert losses(w, made) == wanted
