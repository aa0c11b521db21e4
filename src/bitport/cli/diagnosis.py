"""What `bitport doctor` draws: the layers by their share of the loss, the remedies, and what was confirmed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import wording
from .run import shown

_SHOWN = 5
_STYLES = {"kept": "bold green", "helps": "green", "too dear": "yellow"}


def draw(console: Console, record: Mapping[str, Any]) -> None:
    """The tables and the sentence of `doctor.Diagnosis.record`."""
    culprits: Sequence[Mapping[str, Any]] = record["culprits"]
    console.print(Text(wording.plain(f"{record['artifact']} on {record['target']}"), style="bold"))
    console.print(_culprits(culprits))
    if len(culprits) > _SHOWN:
        rest = sum(row["share"] for row in culprits[_SHOWN:])
        console.print(
            Text(f"and {len(culprits) - _SHOWN} more, {wording.percent(rest)} together", style="dim")
        )
    console.print()
    gain = record.get("same_recipe_gain_db")
    if gain is not None:
        console.print(Text(f"the same recipe calibrated on this data: {_signed(gain)} dB"))
    tried = [row for row in record["remedies"] if row["outcome"] != "not possible"]
    refused = [row for row in record["remedies"] if row["outcome"] == "not possible"]
    if tried:
        console.print(_remedies(tried))
    for row in refused:
        said = wording.plain(f"not possible for {row['layer']}: {row['what']} ({row['reason']})", 200)
        console.print(Text(said, style="dim"))
    confirmed = record["confirmed"]
    if confirmed is not None:
        console.print()
        console.print(Text(_confirmed(confirmed)))
    console.print()
    mark = ("✓ ", "bold green") if record["recipe_file"] else ("• ", "bold")
    console.print(Text(mark[0], style=mark[1]) + Text(wording.plain(record["sentence"], 1000), style="bold"))
    if record["recipe_file"]:
        path = Text(wording.plain(shown(Path(record["recipe_file"])), 4096), style="bold")
        console.print(Text("  recipe       ", style="dim") + path, soft_wrap=True)


def _culprits(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = _table(("", True), ("layer", False), ("operator", False), ("SQNR", True), ("of the loss", True))
    for row in rows[:_SHOWN]:
        share = Text(wording.percent(row["share"]), style="bold" if row["loud"] else "")
        cells = [str(row["rank"]), wording.plain(row["layer"]), wording.plain(row["op"])]
        table.add_row(*map(Text, (*cells, wording.decibel(row["sqnr_db"]))), share)
    return table


def _remedies(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = _table(
        ("layer", False), ("remedy", False), ("gain", True), ("bytes", True), ("time", True), ("", False)
    )
    for row in rows:
        cells = [
            wording.plain(row["layer"]),
            wording.plain(row["what"]),
            _gain(row),
            _bytes(row["bytes"]),
            _time(row["ms"], row["of_ms"]),
        ]
        outcome = row["outcome"] + (f": {row['reason']}" if row["reason"] else "")
        table.add_row(
            *map(Text, cells), Text(wording.plain(outcome), style=_STYLES.get(row["outcome"], "dim"))
        )
    return table


def _table(*columns: tuple[str, bool]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, number in columns:
        table.add_column(name, justify="right" if number else "left", no_wrap=number, overflow="fold")
    return table


def _gain(row: Mapping[str, Any]) -> str:
    """What was measured, else what the simulation says, in brackets."""
    if row["gain_db"] is not None:
        return f"{_signed(row['gain_db'])} dB"
    return wording.ABSENT if row["simulated_db"] is None else f"({_signed(row['simulated_db'])} dB)"


def _bytes(count: float | None) -> str:
    return wording.ABSENT if count is None else f"{'−' if count < 0 else '+'}{wording.size(abs(count))}"


def _time(ms: float | None, of_ms: float | None) -> str:
    if ms is None or not of_ms:
        return wording.ABSENT
    return f"{'−' if ms < 0 else '+'}{wording.milliseconds(abs(ms))} ({_signed(100 * ms / of_ms, 0)} %)"


def _confirmed(found: Mapping[str, Any]) -> str:
    parts = [
        f"confirmed: {wording.decibel(found['before_db'])} → {wording.decibel(found['after_db'])}",
        f"{_bytes(found['bytes'])}",
        f"{_time(found['ms'], found['of_ms'])}",
    ]
    metric = found["metric"]
    if metric is not None:
        before, after, real = (
            wording.score(metric[key], metric["binary"]) for key in ("before", "after", "float")
        )
        parts.append(f"{wording.plain(metric['name'])} {before} → {after} (float {real})")
    return ", ".join(part for part in parts if part != wording.ABSENT)


def _signed(value: float, digits: int = 1) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")
