"""What the command line draws: tables, the summary, progress bars. Rich is imported here and nowhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.progress import Task as RichTask
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .. import wording
from ..page.summary import Islands, Row, comparison, islands, section, sqnr, worst_layers
from ..progress import Progress, Task
from ..proof.verdict import judge, subject
from ..rules import DECODED
from .diagnosis import draw as draw_diagnosis
from .run import shown

_FILE_WIDTH = 120
_NOTES = 3
_ISLANDS = 3
_WIDE = 100
_MUCH_CLIPPED = 0.001


class _Console(Console):
    def on_broken_pipe(self) -> None:
        # rich would end the program with 1; a reader that left is no error, and `run` knows what to do
        raise BrokenPipeError


def _console() -> Console:
    # a file or a pipe has no width: 80 columns would cut names
    return _Console(file=sys.stdout, width=None if sys.stdout.isatty() else _FILE_WIDTH, highlight=False)


def _text(value: object, style: str = "") -> Text:
    # Text, because a layer called "[red]" is a name and not markup
    return Text(wording.plain(value), style=style)


def summary(record: Mapping[str, Any], folder: Path, *, again: bool = False) -> None:
    """The table float | simulated | runtime, the verdict, and where to look next. `again`: the report in the folder
    is of an earlier measurement, and is called so."""
    console = _console()
    console.print(Text(subject(record), style="bold"))
    _comparison(console, comparison(record))
    verdict = record.get("verdict") or judge(record)
    console.print()
    console.print(_verdict(verdict))
    found = _next(record)
    if _loses(record):
        found.insert(0, ("what helps", f"bitport doctor {shown(folder)} --data D tries remedies"))
    report = folder / "report.html"
    if report.exists():
        found.insert(0, ("report of compress" if again else "report", shown(report)))
    for label, text in found:
        head = Text(f"  {label:<11}  ", style="dim")
        if label.startswith("report"):  # a path that is cut can't be copied: the window may wrap it
            console.print(head + Text(wording.plain(text, 4096), style="bold"), soft_wrap=True)
            continue
        _listed(console, [(label, text)])


def _comparison(console: Console, rows: Sequence[Row]) -> None:
    """One line for each row where the window is wide enough, else what changed on a line of its own."""
    wide = console.width >= _WIDE
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=not wide)
    for name in ("float", "simulated", "runtime"):
        table.add_column(name, justify="right", no_wrap=True)
    if wide:
        table.add_column("")
    for row in rows:
        cells = [_text(cell) for cell in (row.label, row.float, row.simulated, row.runtime)]
        table.add_row(*cells, *([_text(row.change, "dim")] if wide else []))
    if wide:
        console.print(table)
        return
    with console.capture() as drawn:
        console.print(table)
    head, *lines = drawn.get().splitlines()
    console.print(Text.from_ansi(head.rstrip()))
    if len(lines) != len(rows):  # a window so small that lines were folded
        console.print(Text.from_ansi("\n".join(lines)))
        lines = [row.label for row in rows]
    for line, row in zip(lines, rows, strict=True):
        console.print(Text.from_ansi(line.rstrip()))
        if row.change:
            console.print(Padding(_text(row.change, "dim"), (0, 0, 0, 4)))


def _verdict(verdict: Mapping[str, Any]) -> Text:
    gates = {gate["name"]: gate["verdict"] for gate in verdict.get("gates") or ()}
    if "fails" in gates.values():
        mark, style = "✗ ", "bold red"
    elif not verdict["passed"]:
        mark, style = "? ", "bold yellow"
    else:  # a result that nobody set a limit for has not passed anything
        mark, style = ("✓ ", "bold green") if "accuracy" in gates else ("• ", "bold")
    return Text(mark, style=style) + Text(wording.plain(verdict["sentence"], 1000), style="bold")


def _next(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(label, text): the places where a look is worth most."""
    found: list[tuple[str, str]] = []
    for row in worst_layers(record):
        found.append(("worst layer", f"{row['name']} ({row['op']}, {wording.decibel(sqnr(row))})"))
    clipped = max(record.get("distributions") or (), key=lambda row: row["clipped_share"], default=None)
    if clipped is not None and clipped["clipped_share"] >= _MUCH_CLIPPED:
        share = wording.percent(clipped["clipped_share"], 2)
        found.append(("clipped", f"{clipped['tensor']} ({share} of its {clipped['what']})"))
    groups = islands(record)
    found += _floats(groups[:_ISLANDS])
    if len(groups) > _ISLANDS:
        rest = len(groups) - _ISLANDS
        found.append(("", f"and {rest} more reason{'' if rest == 1 else 's'} in the report"))
    notes = record.get("notes") or ()
    found += [("note", note) for note in notes[:_NOTES]]
    if len(notes) > _NOTES:
        found.append(("", f"and {len(notes) - _NOTES} more notes in the report"))
    return found


def _loses(record: Mapping[str, Any]) -> bool:
    """Whether the loss can't be chance, or missed its limit."""
    task = section(record, "task")
    interval = task.get("ci95")
    quantized = section(record, "parity").get("edges")
    return bool(quantized and interval and (interval[0] > 0 or task.get("verdict") == "fails"))


def _floats(groups: Sequence[Islands]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for group in groups:
        more = f" and {len(group.names) - 1} more" if len(group.names) > 1 else ""
        rows.append(("" if rows else "in float", f"{group.names[0]}{more}: {group.reason}"))
    return rows


def _listed(console: Console, rows: Sequence[tuple[str, str]]) -> None:
    """Labels, and beside each its text with a hanging indent."""
    for label, text in rows:
        row = Table.grid()
        row.add_column(no_wrap=True)
        row.add_column(overflow="fold")
        row.add_row(Text(f"  {label:<11}  ", style="dim"), _text(text))
        console.print(row)


def difference(found: Mapping[str, Any]) -> None:
    """Two artifacts side by side: `found` is the record of `bitport.diff`."""
    console = _console()
    sides = [f"{found[side]['recipe']} on {found[side]['target']}" for side in ("first", "second")]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("layer", overflow="fold")
    table.add_column("operator")
    for side in sides:
        table.add_column(_text(side), justify="right")
    table.add_column("apart", justify="right")
    for layer in found["layers"]:
        worst = layer["name"] == found["worst"]
        cells = [_of_side(layer[side]) for side in ("first", "second")]
        told = "moved" if layer.get("apart_db_reason") else _decibel(layer["apart_db"])
        row = [layer["name"], layer["op"].removeprefix("other:"), *cells, told]
        table.add_row(*(_text(cell, "bold yellow" if worst else "") for cell in row))
    console.print(table)
    console.print()
    outputs = ", ".join(f"{name} {_decibel(value['apart_db'])}" for name, value in found["outputs"].items())
    console.print(
        Text("the files' outputs, apart: ", style="bold") + _text(outputs or "no floats to compare")
    )
    if found["worst"] is not None:
        console.print(Text(f"{sides[1]} loses most against {sides[0]} at ") + _text(found["worst"], "bold"))
    notes = (
        "dB: signal against what differs, of values against the float network's; formats of weights / result."
    )
    console.print(Text(notes, style="dim"))


def _of_side(side: Mapping[str, Any]) -> str:
    formats = [_short(fmt) for fmt in (side["weights"], side["result"]) if fmt is not None]
    return f"{_decibel(side['sqnr_db'])}  {' / '.join(formats)}"


def _decibel(value: float | None) -> str:
    return "equal" if value is None else f"{value:.1f} dB"


def _short(fmt: str) -> str:
    return "float" if fmt == "float32" else fmt.split(" ")[0]


def inspection(found: Mapping[str, Any]) -> None:
    """The layers of a network and what a target would make of them.

    `found` has `layers` [{name, op, shape, parameters, macs, integer, reason}], `totals` {parameters, macs,
    mac_share}, `speed` (one sentence or null) and `notes`; `integer`, `reason`, `mac_share` and `speed` only
    with a target.
    """
    console = _console()
    layers = found.get("layers") or ()
    aimed = any(layer.get("integer") is not None for layer in layers)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("layer", overflow="fold")
    table.add_column("operator")
    table.add_column("shape")
    table.add_column("parameters", justify="right")
    table.add_column("MACs", justify="right")
    # beside the other columns of a narrow window a reason would be a column of words
    wide = console.width >= _WIDE
    if aimed:
        table.add_column("runs in", overflow="fold")
    for layer in layers:
        shape = layer.get("shape")
        cells = [
            _text(layer["name"]),
            _text(layer["op"].removeprefix("other:")),
            _text("×".join(str(size) for size in shape) if shape is not None else ""),
            Text(wording.large(layer["parameters"]) if layer.get("parameters") else ""),
            Text(wording.large(layer["macs"]) if layer.get("macs") else ""),
        ]
        if aimed:
            cells.append(_runs_in(layer, with_reason=wide))
        table.add_row(*cells)
    console.print(table)
    console.print()
    totals = section(found, "totals")
    parts = [
        f"{wording.large(totals.get('parameters'))} parameters",
        f"{wording.large(totals.get('macs'))} MACs per sample",
    ]
    if totals.get("mac_share") is not None:
        parts.append(f"{wording.percent(totals['mac_share'])} of the MACs in integers")
    console.print(Text(", ".join(parts), style="bold"))
    if not wide:
        floats = [layer for layer in layers if layer.get("integer") is False and layer.get("reason")]
        _listed(console, _floats(islands({"integer": {"float_ops": floats}})))
    if found.get("speed"):
        console.print(Text("speed to expect: ") + Text(wording.plain(found["speed"], 1000)))
    for note in found.get("notes") or ():
        console.print(Text("note: ", style="dim") + Text(wording.plain(note, 1000)))


def _runs_in(layer: Mapping[str, Any], with_reason: bool) -> Text:
    if layer.get("integer") is None:
        return Text("")
    if layer["integer"]:
        return Text("integers", style="green")
    reason = layer.get("reason") if with_reason else None
    return Text("float", style="yellow") + Text(f": {wording.plain(reason)}" if reason else "", style="dim")


def diagnosis(record: Mapping[str, Any]) -> None:
    """What `bitport doctor` found."""
    draw_diagnosis(_console(), record)


def listing(kind: str, found: Mapping[str, Any]) -> None:
    """Names with their one-line summaries; what isn't available is said with the reason."""
    console = _console()
    if not found:
        console.print(f"this version has no {kind}")
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, entry in found.items():
        text = _text(entry.get("summary") or "")
        if entry.get("available") is False:
            text += Text(
                f" (not available: {wording.plain(entry.get('needs') or 'not installed')})", style="yellow"
            )
        table.add_row(_text(name, "bold"), text)
        for target, kinds in (entry.get("targets") or {}).items():
            table.add_row("", _text(f"{target}: {_way(kinds)}", "dim"))
    console.print(table)


def _way(kinds: Mapping[str, Any]) -> str:
    """What a target runs the layers of a recipe with: `linear QGemm; conv, embedding decoded to float32`."""
    if "reason" in kinds:
        return str(kinds["reason"])
    groups: dict[str, list[str]] = {}
    for kind, way in kinds.items():
        how = "decoded to float32" if way["kernel"] == DECODED else way["kernel"] or f"float: {way['reason']}"
        groups.setdefault(how, []).append(kind)
    return "; ".join(f"{', '.join(names)} → {how}" for how, names in groups.items()) or "float32 as it is"


class _BarWhereKnown(BarColumn):
    """A bar needs an end; work without one has a spinner and a clock."""

    def render(self, task: RichTask) -> ProgressBar | Text:  # type: ignore[override]
        return Text("") if task.total is None else super().render(task)


class _Done(ProgressColumn):
    """`6/100`; `6` where nobody knows the end; nothing before the first."""

    def render(self, task: RichTask) -> Text:
        done = f"{task.completed:.0f}"
        return Text(f"{done}/{task.total:.0f}" if task.total is not None else done if task.completed else "")


class _Bar:
    def __init__(self, bars: Bars, number: Any) -> None:
        self._bars, self._number = bars, number

    def advance(self, n: int = 1) -> None:
        self._bars.advance(self._number, n)


class _RichProgress:
    def __init__(self, bars: Bars) -> None:
        self._bars = bars

    @contextmanager
    def task(self, name: str, total: int | None = None) -> Iterator[Task]:
        number = self._bars.add_task(wording.plain(name, 60), total=total)
        try:
            yield _Bar(self._bars, number)
        finally:
            self._bars.remove_task(number)


@contextmanager
def bars() -> Iterator[Progress]:
    """Progress bars on stderr, gone when the work is done."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        _BarWhereKnown(bar_width=30),
        _Done(),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    # stdout and stderr are already in order (`_stdout_to_stderr`); rich must not wrap them a second time
    with Bars(
        *columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False
    ) as shown:
        yield _RichProgress(shown)
