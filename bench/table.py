"""The table of all figures."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from bitport.targets._base import host


@dataclass(frozen=True)
class Row:
    what: str
    value: str
    wanted: str


def publish(text: str, path: Path | None) -> None:
    """Print a page, and write it to a file where one is asked for."""
    sys.stdout.write(text)
    if path is not None:
        path.write_text(text, encoding="utf-8")


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
