"""What a measurement record says, as rows of text. The page and the terminal show the same ones."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import wording
from ..proof.verdict import metric_label

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One line of the before/after table; an empty cell is the empty string."""

    label: str
    float: str = ""
    simulated: str = ""
    runtime: str = ""
    change: str = ""


def section(record: Record, name: str) -> Mapping[str, Any]:
    """A section of the record; empty where it is null or missing."""
    value = record.get(name)
    return value if isinstance(value, Mapping) else {}


def reason(record: Record, name: str, key: str | None = None) -> str:
    """Why a section, or a key of it, has no value."""
    inside = section(record, name).get(f"{key}_reason") if key else None
    found = inside or record.get(f"{name}_reason") or "not measured"
    return wording.plain(found, 400)


def comparison(record: Record) -> list[Row]:
    """Before and after: metric, sizes, times, memory, integer work, parity. A row without value says why."""
    return [
        *_task(record),
        *_size(record),
        *_weights(record),
        *_latency(record),
        *_memory(record),
        *_integer(record),
        *_parity(record),
    ]


def _task(record: Record) -> list[Row]:
    task = section(record, "task")
    if task.get("drop") is None:
        return [Row("accuracy", change=reason(record, "task", "drop"))]
    binary = bool(task.get("binary"))
    direction = "" if task.get("higher_is_better", True) else " (lower is better)"
    return [
        Row(
            metric_label(task["metric"]) + direction,
            wording.score(task.get("float"), binary),
            wording.score(task.get("simulated"), binary),
            wording.score(task.get("runtime"), binary),
            f"{wording.loss(task['drop'], binary, 'points ' if binary else '')} "
            f"(95 %: {wording.losses(task['ci95'], binary)})",
        )
    ]


def _size(record: Record) -> list[Row]:
    size = section(record, "size")
    if size.get("ratio") is None:
        return [Row("file", change=reason(record, "size", "ratio"))]
    return [
        Row(
            "file",
            wording.size(size["float_bytes"]),
            "",
            wording.size(size["compressed_bytes"]),
            f"{wording.times(size['ratio'])} the size",
        )
    ]


def storage(record: Record) -> list[Mapping[str, Any]]:
    """How weights are stored, a row for each format and what it is multiplied as; older records have none."""
    return list(record.get("storage") or ())


def bits_per_weight(record: Record) -> float | None:
    """Bits that a narrow weight takes on average, scales and zero points counted."""
    rows = storage(record)
    values = sum(row["values"] for row in rows)
    return 8 * sum(row["bytes"] for row in rows) / values if values else None


def _weights(record: Record) -> list[Row]:
    rows, bits = storage(record), bits_per_weight(record)
    if bits is None:
        return []
    values = sum(row["values"] for row in rows)
    shares: dict[str, int] = {}
    for row in rows:
        shares[row["computes_in"]] = shares.get(row["computes_in"], 0) + row["values"]
    named = [
        name + (f" ({wording.percent(number / values, 0)})" if len(shares) > 1 else "")
        for name, number in sorted(shares.items(), key=lambda item: -item[1])
    ]
    before, after = wording.size(4 * values), wording.size(sum(row["bytes"] for row in rows))
    text = f"{bits:.2f} bits a value; computed in {' and '.join(named)}"
    return [Row("weights", before, "", after, text)]


def _latency(record: Record) -> list[Row]:
    latency = section(record, "latency")
    if latency.get("speedup") is None:
        return [Row("latency", change=reason(record, "latency", "speedup"))]
    low, high = latency["ci95"]
    verdict = {"faster": "faster", "slower": "the speed: slower"}.get(
        latency["verdict"], "the speed: not faster"
    )
    return [
        Row(
            f"latency, {wording.threads(latency.get('threads'))}, batch {latency.get('batch')}",
            wording.milliseconds(latency["float_ms"]),
            "",
            wording.milliseconds(latency["compressed_ms"]),
            f"{wording.times(latency['speedup'])} {verdict} ({wording.times(low)} to {wording.times(high)})",
        )
    ]


def _memory(record: Record) -> list[Row]:
    memory = section(record, "memory")
    if memory.get("run_peak_bytes") is None:
        return []
    before, after = memory.get("float_run_peak_bytes"), memory["run_peak_bytes"]
    ratio = f"{wording.times(after / before)} the memory" if before else ""
    return [Row("memory to run", wording.size(before), "", wording.size(after), ratio)]


def _integer(record: Record) -> list[Row]:
    integer = section(record, "integer")
    if integer.get("mac_share") is None:
        return [Row("MACs in integers", change=reason(record, "integer", "mac_share"))]
    islands = len(integer.get("float_ops") or ())
    text = f"{islands} operator{'' if islands == 1 else 's'} in float" if islands else "nothing left in float"
    return [Row("MACs in integers", "", "", wording.percent(integer["mac_share"]), text)]


def _parity(record: Record) -> list[Row]:
    parity = section(record, "parity")
    if parity.get("exact_share") is None:
        why = reason(record, "parity", "exact_share")
        return [Row("runtime = simulation", "", "", outputs_follow(parity) or "", why)]
    steps = parity.get("max_steps")
    return [
        Row(
            "runtime = simulation",
            "",
            "",
            wording.percent(parity["exact_share"]),
            f"of {wording.count(parity.get('end_to_end', {}).get('integers'))} integers; "
            f"furthest: {steps} step{'' if steps == 1 else 's'}",
        )
    ]


def outputs_follow(parity: Mapping[str, Any]) -> str | None:
    """How near the runtime's float outputs are to the simulated ones, where no integers can be compared."""
    if "outputs_db" not in parity:
        return None
    return "equal" if parity["outputs_db"] is None else wording.decibel(parity["outputs_db"])


def gates(record: Record, verdict: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(gate, value, limit, verdict) of each gate, in the words of the table above it. What is held against the
    limit of accuracy is the interval, so it stands there too."""
    task = section(record, "task")
    binary = bool(task.get("binary"))
    unit = "points " if binary else ""
    rows = []
    for gate in verdict.get("gates") or ():
        value, limit = gate.get("value"), gate.get("limit")
        if gate["name"] == "accuracy" and value is not None:
            allowed = wording.ABSENT if limit is None else f"at most {wording.loss(limit, binary, unit)}"
            low, high = (wording.loss(bound, binary) for bound in task["ci95"])
            shown = (f"{wording.loss(value, binary, unit)} (95 %: {low} to {high})", allowed)
        elif gate["name"] == "runtime equals simulation":
            shown = (wording.percent(value), f"at least {wording.percent(limit)}")
        else:
            shown = (_signed(value), _signed(limit))
        rows.append((wording.plain(gate["name"]), *shown, wording.plain(gate["verdict"])))
    return rows


def _signed(value: float | None) -> str:
    return wording.score(value, False).replace("-", "−")


def spread(record: Record) -> list[tuple[str, list[str]]]:
    """(network, [fastest, a quarter below, half, three quarters, slowest]) of the times that were measured."""
    samples = section(record, "latency").get("samples_ms") or {}
    rows = []
    for name in ("float", "compressed"):
        times = sorted(samples.get(name) or ())
        if len(times) > 1:
            marks = [times[0], *statistics.quantiles(times, n=4, method="inclusive"), times[-1]]
            rows.append((name, [wording.milliseconds(mark) for mark in marks]))
    return rows


_FOLLOWS = re.compile(r"its operand .+ is float")
"""The reason of an operator that is float because what feeds it is: each names another operand, and all are one."""
_FOLLOWING = "what it reads is float already"


@dataclass(frozen=True)
class Islands:
    """Operators that stay in float for one reason, in network order; `op` is their kind, or kinds."""

    op: str
    reason: str
    names: list[str]
    macs: int


def islands(record: Record) -> list[Islands]:
    """The float operators by kind and reason; those that cost the most work first, then the most frequent, and
    last those that are float only because their operands are."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in section(record, "integer").get("float_ops") or ():
        op, why = str(row.get("op")).removeprefix("other:"), str(row.get("reason"))
        follows = _FOLLOWS.fullmatch(why) is not None
        found.setdefault(("", _FOLLOWING) if follows else (op, why), []).append(row)
    made = []
    for (op, why), rows in found.items():
        kinds = dict.fromkeys(str(row.get("op")).removeprefix("other:") for row in rows)
        names = [str(row.get("name")) for row in rows]
        made.append(Islands(op or ", ".join(kinds), why, names, sum(row.get("macs") or 0 for row in rows)))
    return sorted(made, key=lambda group: (-group.macs, group.reason == _FOLLOWING, -len(group.names)))


def worst_layers(record: Record, number: int = 1) -> Sequence[Mapping[str, Any]]:
    """The layers with the lowest signal-to-noise ratio, worst first."""
    found = [row for row in record.get("layers") or () if sqnr(row) is not None]
    return sorted(found, key=lambda row: sqnr(row) or 0.0)[:number]


def sqnr(row: Mapping[str, Any]) -> float | None:
    """A layer's signal-to-noise ratio in dB as it arrived: on the runtime, else simulated."""
    value = row.get("sqnr_runtime_db")
    value = row.get("sqnr_db") if value is None else value
    return None if value is None else float(value)
