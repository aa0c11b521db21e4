"""Weights at their true width: what a Plan stores, as plain tensors of bit streams.

    <tie>.codes        uint8, `numerics.packing` of the codes (integers as q − low, other kinds as they are)
    <tie>.scale        float32, float16 or bfloat16; e8m0 and e4m3 as their codes, uint8
    <tie>.factor       float32: what all e4m3 scales of the tensor are multiplied by
    <tie>.zero_point   packed as the codes are; left out where it is fixed or the format has none
    <tie>.table        float32, of a learned codebook

and one line of JSON for each tie: format, shape, and the parameters that it stands for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import ArtifactError, FormatError
from ..formats import Format
from ..graph import Graph
from ..numerics import scales
from ..numerics.codes import Grid
from ..numerics.packing import pack, unpack
from .constants import Coded, constant_codes
from .model import Plan

SCHEMA = "1"
_SCALES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def packed_weights(graph: Graph, plan: Plan) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, notes) of every weight that the plan stores, in the order of its ties."""
    tensors: dict[str, Tensor] = {}
    notes = {"schema": SCHEMA}
    for name, tie in plan.ties.items():
        if tie.source != "weight" or tie.scale is None:
            continue
        for member in tie.members:
            coded = constant_codes(graph, plan, member, name)
            key = name if len(tie.members) == 1 else f"{name}: {member}"
            notes[key] = json.dumps(
                {"format": str(tie.format), "shape": list(coded.codes.shape), "parameter": member}
            )
            tensors |= {f"{key}.{part}": value for part, value in _parts(coded).items()}
    return tensors, notes


def unpacked_weight(tensors: Mapping[str, Tensor], notes: Mapping[str, str], key: str) -> Coded:
    """What `packed_weights` stored under a key. Raises ArtifactError where it isn't that."""
    try:
        note = json.loads(notes[key])
        fmt, shape = Format.parse(note["format"]), [int(size) for size in note["shape"]]
        count, low = torch.Size(shape).numel(), fmt.low if fmt.is_int else 0
        codes = (unpack(tensors[f"{key}.codes"], fmt.bits, count) + low).reshape(shape)
        scale = torch.ones(())
        if not fmt.unscaled:
            scale = tensors[f"{key}.scale"]
            if fmt.scale in _SCALES:
                scale = scale.float()
            else:
                factor = tensors.get(f"{key}.factor", torch.tensor(1.0))
                scale = scales.from_parts(scale.to(torch.int32), factor, fmt.scale)
        if f"{key}.zero_point" in tensors:
            zeros = unpack(tensors[f"{key}.zero_point"], fmt.bits, scale.numel()) + low
            zero_point = zeros.reshape(scale.shape)
        else:
            zero_point = torch.full_like(scale, fmt.zero_point if fmt.is_int else 0, dtype=torch.int32)
        return Coded(codes, Grid(fmt, scale, zero_point, tensors.get(f"{key}.table")))
    except (LookupError, TypeError, ValueError, AttributeError, FormatError) as error:
        raise ArtifactError(f"the packed weight {key!r} is malformed ({error}): make it again") from error


def _parts(coded: Coded) -> dict[str, Tensor]:
    grid, fmt = coded.grid, coded.grid.format
    low = fmt.low if fmt.is_int else 0
    parts = {"codes": pack(coded.codes - low, fmt.bits) if fmt.bits <= 16 else coded.codes}
    if not fmt.unscaled:
        codes, factor = scales.parts(grid.scale, fmt.scale)
        floats = _SCALES.get(fmt.scale)
        parts["scale"] = codes.to(torch.uint8) if floats is None else grid.scale.to(floats)
        if fmt.scale == "e4m3":
            parts["factor"] = factor
    if fmt.is_int and not fmt.symmetric:
        parts["zero_point"] = pack(grid.zero_point - low, fmt.bits)
    if grid.table is not None:
        parts["table"] = grid.table
    return {part: value.clone(memory_format=torch.contiguous_format) for part, value in parts.items()}
