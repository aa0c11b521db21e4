"""Codes of any width as a continuous stream of bits, and back.

Code i takes the bits i·b … (i+1)·b − 1 of the stream, its lowest bit first; bit k of the stream is bit k mod 8 of byte
k // 8. So two 4-bit codes fill a byte with the first in the low half, as ONNX stores int4. The last byte is filled up
with zeros.

Legend: b bits a code; n codes. Eight codes fill b bytes exactly: the stream is computed as rows of 8 codes ⇄ b bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitport.errors import ArtifactError, FormatError

WIDEST = 24  # bits of a code: shifted by up to 7 more it still fits int32
# So many octets of codes at a time: the temporary int32 values stay in the processor's cache.
_BLOCK = 2**12


def packed_bytes(count: int, bits: int) -> int:
    """The bytes that `count` codes of `bits` bits take."""
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes as a stream of bits.

    Args:
        codes: any shape (flattened) and integer type, 0 ≤ code < 2^bits.
        bits: 1 … 24.

    Returns: uint8 [ceil(n · bits / 8)].

    Raises:
        FormatError: the width is outside 1 … 24, the codes are no integers, or one doesn't fit the width.
    """
    _check_width(bits)
    if codes.is_floating_point() or codes.is_complex():
        raise FormatError(f"codes of type {codes.dtype} can't be packed: give integers")
    flat = codes.detach().reshape(-1)
    count, octets = flat.numel(), -(-flat.numel() // 8)
    packed = torch.empty(octets, bits, dtype=torch.uint8, device=flat.device)
    for start in range(0, octets, _BLOCK):
        part = flat[8 * start : 8 * (start + _BLOCK)].to(torch.int64)
        if bool(((part < 0) | (part >= 2**bits)).any()):
            raise FormatError(f"a code doesn't fit {bits} bits: give codes of 0 … {2**bits - 1}")
        octet = _whole_octets(part.to(torch.int32))
        target = packed[start : start + octet.shape[0]]
        for byte in range(bits):
            value = torch.zeros_like(octet[:, 0])
            for code in range(8 * byte // bits, (8 * byte + 7) // bits + 1):
                value |= _shifted(octet[:, code], code * bits - 8 * byte)
            target[:, byte] = value & 255
    return packed.reshape(-1)[: packed_bytes(count, bits)].clone() if count % 8 else packed.reshape(-1)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The codes of a stream that `pack` made, int32 [count].

    Args:
        packed: uint8 [ceil(count · bits / 8)].
        bits: 1 … 24. count: how many codes the stream holds.

    Raises:
        FormatError: the width is outside 1 … 24.
        ArtifactError: the stream isn't uint8, is longer or shorter than its codes, or its last byte holds more bits.
    """
    _check_width(bits)
    if packed.dtype != torch.uint8:
        raise ArtifactError(f"packed codes are {packed.dtype}: give the uint8 that pack made")
    packed = packed.reshape(-1)
    size = packed_bytes(count, bits) if count >= 0 else -1
    if packed.numel() != size:
        raise ArtifactError(
            f"{count} codes of {bits} bits take {max(size, 0)} bytes, but {packed.numel()} were given: the stream "
            "was cut or belongs to another tensor; make the artifact again"
        )
    padding = 8 * size - count * bits
    if padding and int(packed[-1]) >> (8 - padding):
        raise ArtifactError(
            f"the last byte of {count} codes of {bits} bits holds more than their bits: the stream belongs to "
            "another tensor or another width; make the artifact again"
        )
    octets = -(-count // 8)
    codes = torch.empty(octets, 8, dtype=torch.int32, device=packed.device)
    for start in range(0, octets, _BLOCK):
        part = packed[start * bits : (start + _BLOCK) * bits].to(torch.int32)
        wanted = min(_BLOCK, octets - start) * bits
        if part.numel() < wanted:
            part = torch.cat([part, part.new_zeros(wanted - part.numel())])
        row = part.reshape(-1, bits)
        target = codes[start : start + row.shape[0]]
        for code in range(8):
            value = torch.zeros_like(row[:, 0])
            for byte in range(code * bits // 8, ((code + 1) * bits - 1) // 8 + 1):
                value |= _shifted(row[:, byte], 8 * byte - code * bits)
            target[:, code] = value & (2**bits - 1)
    return codes.reshape(-1)[:count].clone() if count % 8 else codes.reshape(-1)


def _shifted(value: Tensor, left: int) -> Tensor:
    """value · 2^left, what falls below bit 0 dropped."""
    return value << left if left >= 0 else value >> -left


def _whole_octets(codes: Tensor) -> Tensor:
    """Codes as [n/8, 8], zeros at the end."""
    if missing := -codes.numel() % 8:
        codes = torch.cat([codes, codes.new_zeros(missing)])
    return codes.reshape(-1, 8)


def _check_width(bits: int) -> None:
    if type(bits) is not int or not 1 <= bits <= WIDEST:
        raise FormatError(f"codes of {bits!r} bits can't be packed: give 1 … {WIDEST} bits")
