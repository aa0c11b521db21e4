from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitport.errors import FormatError
from bitport.formats import Format
from bitport.numerics.rows import restore, row_sizes, rows, scale_shape

SHAPES = st.lists(st.integers(0, 6), min_size=1, max_size=4).map(torch.Size)


@given(SHAPES, st.sampled_from(["tensor", "global", "channel", "group"]), st.integers(1, 9), st.data())
def test_rows_come_back(shape: torch.Size, granularity: str, size: int, data: st.DataObject) -> None:
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    options = {"channel": f"channel({axis})", "group": f"group({size},{axis})"}
    fmt = Format.parse(f"int8 {options.get(granularity, granularity)}")
    w = torch.arange(1.0, shape.numel() + 1).reshape(shape)
    x_RK = rows(w, fmt)
    scales = scale_shape(shape, fmt)
    assert x_RK.ndim == 2
    assert x_RK.shape[0] == torch.Size(scales).numel()
    assert torch.equal((x_RK != 0).sum(1), row_sizes(shape, fmt))
    again = restore(x_RK, fmt, shape)
    assert again.is_contiguous()
    assert torch.equal(again, w)


def test_groups_are_runs_of_a_channel() -> None:
    w = torch.arange(1.0, 25).reshape(2, 3, 4)
    x_RK = rows(w, Format.parse("int8 group(5,1)"))
    channel = w.movedim(1, 0).flatten(1)[2]  # 9 10 11 12 21 22 23 24
    assert x_RK.shape == (6, 5)
    assert x_RK[4:].tolist() == [channel[:5].tolist(), [*channel[5:].tolist(), 0, 0]]


def test_a_group_larger_than_the_channel_takes_no_more_memory() -> None:
    w = torch.ones(3, 7)
    assert rows(w, Format.parse("int8 group(1000000000,0)")).shape == (3, 7)


@pytest.mark.parametrize("text", ["int8 channel", "int8 channel(2)", "int8 group(4)", "int8 group(4,-3)"])
def test_an_axis_that_is_not_there(text: str) -> None:
    with pytest.raises(FormatError, match="channel axis"):
        rows(torch.ones(2, 3), Format.parse(text))
