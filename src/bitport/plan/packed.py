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

from ..errors import ArtifactError, BitportError
from ..formats import Format
from ..graph import Graph
from ..numerics import scales
from ..numerics.codes import Grid
from ..numerics.packing import pack, unpack
from ..numerics.rows import scale_shape
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
        fmt, shape = Format.parse(note["format"]), _shape(note["shape"])
        low = fmt.low if fmt.is_int else 0
        codes = unpack(tensors[f"{key}.codes"], fmt.bits, shape.numel()) + low
        scale = _scale(tensors, key, fmt, shape)
        zero_point = torch.full_like(scale, fmt.zero_point if fmt.is_int else 0, dtype=torch.int32)
        if fmt.is_int and not fmt.symmetric:
            zero_point = unpack(tensors[f"{key}.zero_point"], fmt.bits, scale.numel()) + low
        grid = Grid(fmt, scale, zero_point.reshape(scale.shape), _table(tensors, key, fmt))
        return Coded(codes.reshape(shape), grid)
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        RuntimeError,
        OverflowError,
        BitportError,
    ) as error:
        raise ArtifactError(f"the packed weight {key!r} is malformed ({error}): make it again") from error


def _shape(sizes: object) -> torch.Size:
    """Raises ValueError."""
    if not isinstance(sizes, list) or any(type(size) is not int or size < 0 for size in sizes):
        raise ValueError(f"{sizes!r} is no shape")
    return torch.Size(sizes)


def _scale(tensors: Mapping[str, Tensor], key: str, fmt: Format, shape: torch.Size) -> Tensor:
    """The scales of a stored tensor, float32. Raises ValueError where they are none."""
    if fmt.unscaled:
        return torch.ones(())
    stored, dtype = tensors[f"{key}.scale"], _SCALES.get(fmt.scale, torch.uint8)
    wanted = scale_shape(shape, fmt)
    if stored.dtype != dtype or tuple(stored.shape) != wanted:
        raise ValueError(
            f"scales of {stored.dtype} and shape {list(stored.shape)}, not of {dtype} and {list(wanted)}"
        )
    scale = stored.float()
    if fmt.scale not in _SCALES:
        factor = tensors[f"{key}.factor"].float().reshape(()) if fmt.scale == "e4m3" else torch.tensor(1.0)
        scale = scales.from_parts(stored.to(torch.int32), factor, fmt.scale)
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ValueError("a scale that is not a finite positive number")
    return scale


def _table(tensors: Mapping[str, Tensor], key: str, fmt: Format) -> Tensor | None:
    """The values of a learned codebook. Raises ValueError where they are none."""
    if fmt.table != "learned":
        return None
    table = tensors[f"{key}.table"]
    if table.dtype != torch.float32 or table.shape != (fmt.size,) or not bool(torch.isfinite(table).all()):
        raise ValueError(f"a table that is not of {fmt.size} finite numbers")
    return table


def _parts(coded: Coded) -> dict[str, Tensor]:
    grid, fmt = coded.grid, coded.grid.format
    low = fmt.low if fmt.is_int else 0
    parts = {"codes": pack(coded.codes - low, fmt.bits)}
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
