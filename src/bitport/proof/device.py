"""Outputs that were produced elsewhere, on the device the network is for, from the artifact's golden inputs.

They are held against three: the golden outputs (this file on this kind of runtime), the simulation, the float
network. Differences are counted in steps of the output's scale. An output that leaves as float has none; its
step is 1/255 of the range of its golden values, what an 8-bit output would have.

Runtimes that round otherwise, or sum in another order, differ by a step or two; a wrong layout, a missing
normalisation or another file differ by dozens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .. import wording
from ..errors import DataError
from ..graph import Edge, Graph
from ..numerics.error import finite, sqnr_db
from ..plan import Plan

ALLOWED_STEPS = 2  # what sound runtimes differ by, end to end
LEVELS = 255
SAME = 1e-4  # of the range: equal but for the order of float sums
_Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Sides:
    """One output four times: float32 `[samples, …]`, and how its steps are counted."""

    found: Tensor
    golden: Tensor
    simulated: Tensor
    real: Tensor
    step: float
    step_of: str


def read_outputs(
    found: Mapping[str, Any], sample: Mapping[str, _Array], names: Sequence[str]
) -> list[_Array]:
    """The device's arrays in the network's order, held against the golden sample.

    Args:
        found: arrays or tensors named `output.<name>` or `<name>`; `input.<name>` may stand beside them.
        sample: the arrays of `sample.npz`.
        names: the network's outputs.

    Raises DataError: arrays missing or unknown, another shape or dtype, NaN or infinite values, other inputs.
    """
    arrays = {key: _array(value) for key, value in found.items()}
    known = {*sample, *names}
    chosen = [next((key for key in (f"output.{name}", name) if key in arrays), None) for name in names]
    missing = [name for name, key in zip(names, chosen, strict=True) if key is None]
    unknown = sorted(key for key in arrays if key not in known)
    if missing or unknown:
        parts = [f"has no {_listed(f'output.{name}' for name in missing)}"] * bool(missing)
        parts += [f"has unknown arrays {_listed(unknown)}"] * bool(unknown)
        expected = ", ".join(f"{_spelled(f'output.{name}', sample[f'output.{name}'])}" for name in names)
        raise DataError(f"what the device made {' and '.join(parts)}; expected: {expected}")
    for given, array in arrays.items():
        if given.startswith("input.") and not np.array_equal(array, sample[given]):
            raise DataError(f"{given!r} is not the golden input: run the device on the inputs of sample.npz")
    result = []
    for name, key in zip(names, chosen, strict=True):
        assert key is not None
        result.append(_checked(arrays[key], sample[f"output.{name}"], name))
    return result


def judge_outputs(
    found: Sequence[_Array],
    sample: Mapping[str, _Array],
    graph: Graph,
    plan: Plan,
    simulated: Sequence[Tensor],
    real: Sequence[Tensor],
) -> dict[str, Any]:
    """The record of a comparison: `samples`, `outputs` (one row each), `verdict`.

    Args:
        found: from `read_outputs`.
        graph, plan: the compressed network.
        simulated, real: results of the simulation and of the float network on the golden inputs.
    """
    rows = []
    for index, (spec, array) in enumerate(zip(graph.outputs, found, strict=True)):
        golden = sample[f"output.{spec.name}"]
        row: dict[str, Any] = {"name": spec.name, "shape": list(array.shape), "dtype": str(array.dtype)}
        sides = _sides(graph, plan, index, array, golden, simulated[index], real[index])
        rows.append({**row, **_row(sides, np.array_equal(array, golden))})
    passed = all(row["verdict"] != "differs" for row in rows)
    return {
        "samples": len(found[0]) if found and found[0].ndim else 1,
        "outputs": rows,
        "allowed_steps": ALLOWED_STEPS,
        "verdict": {
            "passed": passed,
            "sentence": _sentence(rows),
            "gates": [
                {
                    "name": f"device equals golden: {row['name']}",
                    "value": row["max_steps"],
                    "limit": ALLOWED_STEPS,
                    "verdict": "fails" if row["verdict"] == "differs" else "holds",
                }
                for row in rows
            ],
        },
    }


def _sides(
    graph: Graph, plan: Plan, index: int, found: _Array, golden: _Array, simulated: Tensor, real: Tensor
) -> Sides:
    tie = plan.edges.get(Edge(graph.name(graph.output_nodes()[index]), "output", index))
    mine, wanted = _real(found), _real(golden)
    if tie is not None:
        scale, zero_point = plan.ties[tie].parameters()
        if golden.dtype.kind in "iu":  # integer outputs: a runtime's own shift is between the formats' ends
            shift = np.iinfo(golden.dtype).min - plan.ties[tie].format.low
            mine, wanted = ((value - shift - zero_point) * scale for value in (mine, wanted))
        return Sides(mine, wanted, simulated.float(), real.float(), float(scale.max()), "scale")
    if golden.dtype.kind not in "f":
        return Sides(mine, wanted, simulated.double(), real.double(), 1.0, "integers")
    span = float(wanted.max() - wanted.min()) if wanted.numel() else 0.0
    span = span or float(wanted.abs().max() if wanted.numel() else 0) or 1.0
    return Sides(mine, wanted, simulated.float(), real.float(), span / LEVELS, "range")


def _row(sides: Sides, identical: bool) -> dict[str, Any]:
    difference = _largest(sides.found, sides.golden)
    steps = 0 if identical else math.ceil(difference / sides.step - 0.01)  # scales are rounded to float32
    row: dict[str, Any] = {
        "step": sides.step,
        "step_of": sides.step_of,
        "max_abs_difference": difference,
        "max_steps": steps,
        "equal_share": float((sides.found == sides.golden).double().mean()) if sides.found.numel() else 1.0,
        "max_abs_difference_simulated": _largest(sides.found, sides.simulated),
        "max_abs_difference_float": _largest(sides.found, sides.real),
    }
    pairs = {
        "sqnr_golden_db": (sides.golden, sides.found),
        "sqnr_float_db": (sides.real, sides.found),
        "golden_sqnr_float_db": (sides.real, sides.golden),
    }
    for key, (reference, value) in pairs.items():
        decibel = sqnr_db(reference, value)
        row[key] = finite(decibel)
        if row[key] is None:
            row[f"{key}_reason"] = "they are equal" if decibel > 0 else "the reference is zero"
    scores = sides.golden.dim() >= 2 and sides.golden.shape[-1] > 1 and sides.golden.numel() > 0
    for key, other in (("top1_agreement", sides.golden), ("top1_agreement_float", sides.real)):
        row[key] = None
        if scores and sides.step_of != "integers":
            row[key] = float((sides.found.argmax(-1) == other.argmax(-1)).double().mean())
        else:
            row[f"{key}_reason"] = "it has no class scores"
    row["verdict"] = "equal" if identical else "within" if steps <= ALLOWED_STEPS else "differs"
    row["hint"] = _hint(sides) if row["verdict"] == "differs" else None
    return row


def _hint(sides: Sides) -> str:
    """The likeliest cause, found by trying it."""
    found, golden = sides.found, sides.golden
    if _near(found, sides.real, sides):
        return "these are the float network's outputs: the device ran the original network, not this artifact"
    if golden.dim() >= 2 and found.shape[-1] > 1:
        if _near(found, golden.softmax(-1), sides):
            return "these are the golden outputs after a softmax: compare what the network itself returns"
        if _near(found, golden.softmax(-1).log(), sides):
            return "these are the golden outputs after a log-softmax: compare what the network itself returns"
    if golden.dim() >= 1 and len(golden) > 1:
        flat, wanted = found.reshape(len(found), -1), golden.reshape(len(golden), -1)
        nearest = torch.cdist(flat.double(), wanted.double()).argmin(1)
        if len(set(nearest.tolist())) == len(golden) and _near(found, golden[nearest], sides):
            return (
                "these are the golden outputs in another order: keep the samples in the order of sample.npz"
            )
        if len(golden) > 2 and bool((flat == flat[0]).all()):
            return "every sample has the same output: is one buffer read again and again? copy each result"
    if golden.dim() == 4:
        for order in ((0, 2, 3, 1), (0, 3, 1, 2)):
            if _near(found, golden.permute(order).reshape(golden.shape), sides):
                return "the values are in another layout: permute the output before it is saved"
    return (
        "compare, in this order: the model file (its SHA-256 is in manifest.json), the inputs as the device gets "
        "them (those of sample.npz are preprocessed already; layout, dtype), the order of the outputs"
    )


def _near(found: Tensor, other: Tensor, sides: Sides) -> bool:
    """Closer than the golden outputs by far, and within what rounding does."""
    largest = _largest(found, other)
    span = float(other.max() - other.min()) or 1.0
    return (
        largest <= max(SAME * span, ALLOWED_STEPS * span / LEVELS)
        and largest < _largest(found, sides.golden) / 4
    )


def _sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    bad = [row for row in rows if row["verdict"] == "differs"]
    if bad:
        worst = max(bad, key=lambda row: row["max_steps"])
        name, far = wording.plain(worst["name"]), wording.count(worst["max_steps"])
        return f"rejected: the device's {name!r} differs from the golden output by up to {far} steps; {worst['hint']}."
    steps = max((int(row["max_steps"]) for row in rows), default=0)
    if all(row["verdict"] == "equal" for row in rows):
        return "the device computes exactly the golden outputs."
    return (
        f"the device computes the golden outputs within {steps} step{'s' * (steps != 1)} "
        f"({ALLOWED_STEPS} are what another rounding makes)."
    )


def _array(value: Any) -> _Array:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def _checked(found: _Array, golden: _Array, name: str) -> _Array:
    if found.dtype != golden.dtype:
        to_do = f"save it as {golden.dtype}"
        if golden.dtype.kind == "f" and found.dtype.kind in "iu":
            to_do += ", dequantized: (q − zero_point) · scale"
        raise DataError(f"the device's {name!r} is {found.dtype}, expected {golden.dtype}: {to_do}")
    if found.shape != golden.shape:
        raise DataError(
            f"the device's {name!r} has shape {list(found.shape)}, expected {list(golden.shape)}: run every golden "
            "sample, in order, and stack the results"
        )
    bad = ~np.isfinite(found) if found.dtype.kind == "f" else np.zeros(found.shape, bool)
    if bad.any():
        sample = int(np.argwhere(bad)[0][0]) if found.ndim else 0
        raise DataError(
            f"the device's {name!r} holds {int(bad.sum())} NaN or infinite values, the first in sample {sample}: the "
            "device's computation failed"
        )
    return found


def _real(array: _Array) -> Tensor:
    return torch.from_numpy(array.astype(np.float32 if array.dtype.kind == "f" else np.float64))


def _largest(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0


def _listed(names: Any) -> str:
    return ", ".join(repr(name) for name in names)


def _spelled(key: str, array: _Array) -> str:
    return f"{key!r} {array.dtype} {list(array.shape)}"
