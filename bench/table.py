"""The table of all figures."""

from __future__ import annotations

from dataclasses import dataclass

from bitport.targets._base import host


@dataclass(frozen=True)
class Row:
    what: str
    value: str
    wanted: str


def table(rows: list[Row]) -> str:
    info = host()
    lines = [
        "# Benchmarks",
        "",
        f"Made by `make bench`. {info['cpu']}, {', '.join(info['isa'])}; one thread for ONNX Runtime.",
        "Ratios of one run, interleaved; intervals are 95 %.",
        "",
        "| what | measured | wanted |",
        "|---|---|---|",
    ]
    lines += [f"| {row.what} | {row.value} | {row.wanted} |" for row in rows]
    return "\n".join(lines) + "\n"
