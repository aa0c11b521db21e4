"""The table of all figures."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from bitport.targets._base import host

CONTEST = "## The contest"  # the section that another command writes


@dataclass(frozen=True)
class Row:
    what: str
    value: str
    wanted: str


def publish(text: str, path: Path | None) -> None:
    """Print a page, and write it to a file where one is asked for, which keeps its section of the contest."""
    sys.stdout.write(text)
    if path is not None:
        kept = path.read_text(encoding="utf-8") if path.exists() else ""
        sections = kept.partition(CONTEST)
        path.write_text(text + (f"\n{CONTEST}{sections[2]}" if sections[1] else ""), encoding="utf-8")


def publish_section(text: str, path: Path | None, heading: str) -> None:
    """Print a section, and put it into a page, in the place of the one with that heading, or at its end."""
    sys.stdout.write(text)
    if path is None:
        return
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    path.write_text(f"{before.partition(heading)[0].rstrip()}\n\n{text}", encoding="utf-8")


def table(rows: list[Row]) -> str:
    info = host()
    lines = [
        "# Benchmarks",
        "",
        f"Made by `make bench`. {info['cpu']}, {', '.join(info['isa'])}; one thread for each runtime.",
        "Ratios of one run, interleaved; intervals are 95 %.",
        "",
        "| what | measured | wanted |",
        "|---|---|---|",
    ]
    lines += [f"| {row.what} | {row.value} | {row.wanted} |" for row in rows]
    return "\n".join(lines) + "\n"
