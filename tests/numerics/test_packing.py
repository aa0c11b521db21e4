from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitport.errors import ArtifactError, FormatError
from bitport.numerics.packing import pack, packed_bytes, unpack

WIDTHS = range(1, 25)


def codes_of(count: int, bits: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 2**bits, count).astype(np.int32))


def stream(codes: Tensor, bits: int) -> bytes:
    """The definition: one large integer whose bits i·b … hold code i."""
    number = sum(int(code) << (i * bits) for i, code in enumerate(codes.reshape(-1)))
    return number.to_bytes(-(-codes.numel() * bits // 8), "little")


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_size_comes_back(bits: int) -> None:
    for count in range(258):
        codes = codes_of(count, bits, count)
        packed = pack(codes, bits)
        assert packed.dtype == torch.uint8
        assert packed.shape == (packed_bytes(count, bits),)
        assert torch.equal(unpack(packed, bits, count), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_across_the_edges_of_blocks(bits: int) -> None:
    for count in (2**15 - 1, 2**15, 2**15 + 1, 2**16 + 5):
        codes = codes_of(count, bits)
        assert torch.equal(unpack(pack(codes, bits), bits, count), codes)


@given(st.integers(1, 16), st.data())
def test_the_stream_is_the_documented_one(bits: int, data: st.DataObject) -> None:
    numbers = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=40))
    codes = torch.tensor(numbers, dtype=torch.int64)
    assert bytes(pack(codes, bits).tolist()) == stream(codes, bits)


def test_int4_lies_in_a_byte_as_in_onnx() -> None:
    assert pack(torch.tensor([1, 2, 15]), 4).tolist() == [0x21, 0x0F]


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64]
)
def test_any_integer_type_and_shape(dtype: torch.dtype) -> None:
    codes = torch.arange(6).to(dtype).reshape(2, 3)
    assert unpack(pack(codes, 3), 3, 6).tolist() == [0, 1, 2, 3, 4, 5]


def test_what_does_not_fit_is_refused() -> None:
    for wrong in (torch.tensor([0, 8]), torch.tensor([-1]), torch.tensor([2**32])):
        with pytest.raises(FormatError, match="doesn't fit 3 bits"):
            pack(wrong, 3)
    for bits in (0, 25, -1):
        with pytest.raises(FormatError, match="1 … 24"):
            pack(torch.tensor([0]), bits)
        with pytest.raises(FormatError, match="1 … 24"):
            unpack(torch.zeros(1, dtype=torch.uint8), bits, 1)
    with pytest.raises(FormatError, match="integers"):
        pack(torch.tensor([1.0]), 3)


def test_a_forged_stream_is_refused() -> None:
    packed = pack(torch.tensor([1, 2, 3]), 3)  # 9 bits in 2 bytes
    for count in (2, 6, -1, 0):
        with pytest.raises(ArtifactError, match="bytes"):
            unpack(packed, 3, count)
    for wrong in (packed[:1], torch.cat([packed, packed])):
        with pytest.raises(ArtifactError, match="bytes"):
            unpack(wrong, 3, 3)
    with pytest.raises(ArtifactError, match="uint8"):
        unpack(packed.int(), 3, 3)
    for bit in range(1, 8):
        forged = packed.clone()
        forged[1] |= 1 << bit
        with pytest.raises(ArtifactError, match="last byte"):
            unpack(forged, 3, 3)
