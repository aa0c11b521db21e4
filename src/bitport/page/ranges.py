"""Histograms of weights and activations with their ranges, as compact data that the page's script draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from .. import wording
from .summary import sqnr

MOST = 240
"""More tensors are too many for the 6 MB of the file and for a list to pick from: the worst ones are shown."""
_WORST = 6


@dataclass(frozen=True)
class Tensor:
    """One tensor that can be looked at: `index` into the page's data, its name, `clipped` and `text` in words."""

    index: int
    name: str
    format: str
    span: str
    clipped: str
    share: float
    text: str


@dataclass(frozen=True)
class Ranges:
    """What the page shows of the `distributions` of a record.

    Attributes:
        weights, activations: tensors to pick from, in network order.
        worst: the most clipped of both, the worst first; none where nothing is clipped.
        first: for "weights" and "activations" the index of the tensor shown first.
        data: for each tensor the numbers that the chart needs.
        total: how many tensors the record has.
    """

    weights: list[Tensor]
    activations: list[Tensor]
    worst: list[Tensor]
    first: dict[str, int]
    data: list[dict[str, Any]]
    total: int


def ranges(record: Mapping[str, Any]) -> Ranges | None:
    """None where the record has no distributions."""
    rows = record.get("distributions")
    if not rows:
        return None
    errors = {layer.get("name"): sqnr(layer) for layer in record.get("layers") or ()}

    def badness(row: Mapping[str, Any]) -> tuple[float, float]:
        error = errors.get(row.get("layer"))
        return -float(row["clipped_share"]), float("inf") if error is None else error

    ranked = sorted(rows, key=badness)
    weights, others = ([row for row in ranked if (row["what"] == "weights") is is_] for is_ in (True, False))
    room = max(MOST // 2, MOST - len(others))  # weights are seldom clipped, and still worth a look
    kept = {id(row) for row in (*weights[:room], *others[: MOST - min(room, len(weights))])}
    ranked = [row for row in ranked if id(row) in kept]
    shown = [row for row in rows if id(row) in kept]
    index = {id(row): i for i, row in enumerate(shown)}
    tensors = [_tensor(i, row) for i, row in enumerate(shown)]
    first: dict[str, int] = {}
    for row in ranked:
        first.setdefault(str(row["what"]), index[id(row)])
    return Ranges(
        weights=[tensors[i] for i, row in enumerate(shown) if row["what"] == "weights"],
        activations=[tensors[i] for i, row in enumerate(shown) if row["what"] == "activations"],
        worst=[tensors[index[id(row)]] for row in ranked[:_WORST] if row["clipped_share"] > 0],
        first=first,
        data=[_data(row, tensors[i].text) for i, row in enumerate(shown)],
        total=len(rows),
    )


def _tensor(index: int, row: Mapping[str, Any]) -> Tensor:
    share = float(row["clipped_share"])
    unit = " steps" if row.get("unit") == "steps" else ""
    span = f"{_number(row['range'][0])} to {_number(row['range'][1])}{unit}"
    clipped = wording.percent(share, 2) if share else "none"
    shared = row.get("granularity")
    scale = f"a scale per {shared}" if shared in ("channel", "group") else "one scale"
    format = wording.plain(row.get("format"), 40)
    lost = f"{clipped} of" if share else "none of"
    text = f"{format}, {scale}; range {span}; {lost} {wording.count(row.get('of'))} values clipped"
    return Tensor(index, wording.plain(row.get("tensor"), 120), format, span, clipped, share, text)


def _data(row: Mapping[str, Any], text: str) -> dict[str, Any]:
    edges: Sequence[float] = row["edges"]
    low, high = row["range"]
    # edges are rounded; a bin inside the range is at least one step wide, so its middle lies inside it
    play = 1e-5 * (high - low)
    middles = [(a + b) / 2 for a, b in pairwise(edges)]
    inside = [i for i, x in enumerate(middles) if low - play <= x <= high + play]
    return {
        "edges": [_rounded(edge) for edge in edges],
        "counts": list(row["counts"]),
        "range": [low, high],
        "inside": [inside[0], inside[-1]] if inside else [0, -1],
        "axis": "steps of its own scale" if row.get("unit") == "steps" else "value",
        "text": text,
    }


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _number(value: float) -> str:
    return wording.score(value, False).replace("-", "−")
