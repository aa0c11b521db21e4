"""Codes of any width as a bit stream: least significant bit first, no gaps between codes.

Legend: N codes, B bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitport.errors import ArtifactError, FormatError

WIDEST = 16  # bits of a code


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [B] of unsigned codes, flattened.

    Args:
        codes: 0 … 2^bits − 1, any integer type and shape.
        bits: 1 … 16.

    Raises FormatError for another width or a code that doesn't fit.
    """
    _check(bits)
    flat = codes.reshape(-1).to(torch.int32)
    if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < 2**bits:
        raise FormatError(f"codes from {int(flat.min())} to {int(flat.max())} don't fit {bits} bits")
    planes = (flat[:, None] >> torch.arange(bits, dtype=torch.int32)) & 1
    stream = torch.zeros(packed_bytes(flat.numel(), bits) * 8, dtype=torch.uint8)
    stream[: planes.numel()] = planes.reshape(-1).to(torch.uint8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    return (stream.reshape(-1, 8) * weights).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """int32 [count]: the codes that `pack` was given.

    Raises ArtifactError where `packed` is not the bit stream of that many codes; FormatError for another width.
    """
    _check(bits)
    if packed.dtype != torch.uint8 or packed.numel() != packed_bytes(count, bits):
        raise ArtifactError(
            f"{count} codes of {bits} bits take {packed_bytes(count, bits)} bytes, and there are {packed.numel()} of "
            f"{packed.dtype}: make the artifact again"
        )
    stream = ((packed.reshape(-1)[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).reshape(-1)
    if bool(stream[count * bits :].any()):
        raise ArtifactError("bits are set behind the last packed code: make the artifact again")
    planes = stream[: count * bits].reshape(count, bits).to(torch.int32)
    return (planes << torch.arange(bits, dtype=torch.int32)).sum(1, dtype=torch.int32)


def _check(bits: int) -> None:
    if not 1 <= bits <= WIDEST:
        raise FormatError(f"codes of {bits} bits can't be packed: 1 … {WIDEST} bits can")
