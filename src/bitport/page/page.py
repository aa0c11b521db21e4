"""`report.html`: one file, no request to anywhere, made from the records of an artifact folder."""

from __future__ import annotations

import json
import os
import shlex
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from .. import records, wording
from ..errors import ArtifactError
from ..proof.verdict import judge, metric_label, subject
from .figures import drawn, figures
from .network import picture
from .ranges import ranges
from .summary import (
    Row,
    bits_per_weight,
    comparison,
    gates,
    islands,
    outputs_follow,
    reason,
    section,
    spread,
    sqnr,
    storage,
)

_TEMPLATES = Path(__file__).parent / "templates"
_MOST_ROWS = 500
_SOURCES = {
    "measured": "activations, range measured on the calibration data",
    "fixed": "activations whose range the operator fixes",
    "scaled": "activations that follow from another tensor by a constant",
    "weight": "weights",
    "bias": "biases, on the grid of input × weight",
}


def render(folder: Path) -> Path:
    """Write `report.html` into an artifact folder and return its path.

    Reads `measurements.json` (required), `plan.json`, `manifest.json` and `recipe.toml`; what isn't there is
    said on the page. The same records give the same bytes.

    Raises:
        ArtifactError: the folder has no measurements, or a record can't be read or the page written.
    """
    folder = Path(folder)
    if not (folder / "measurements.json").is_file():
        raise ArtifactError(
            "measurements.json is missing, which the report is drawn from: compress the network again"
        )
    page = to_html(
        records.load(folder / "measurements.json"),
        plan=_optional(folder / "plan.json"),
        manifest=_optional(folder / "manifest.json"),
        recipe=_text(folder / "recipe.toml"),
    )
    return _write(folder / "report.html", page)


def to_html(
    record: Mapping[str, Any],
    *,
    plan: Mapping[str, Any] | None = None,
    manifest: Mapping[str, Any] | None = None,
    recipe: str | None = None,
) -> str:
    """The page as text, from the records themselves."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in (
        "about",
        "size",
        "milliseconds",
        "count",
        "large",
        "percent",
        "times",
        "decibel",
        "plain",
        "threads",
    ):
        environment.filters[name] = getattr(wording, name)
    environment.filters["name"] = _breakable
    layers = record.get("layers") or []
    verdict = record.get("verdict") or judge(record)
    made, tensors = figures(record), ranges(record)
    return environment.get_template("page.html.j2").render(
        record=record,
        verdict=verdict,
        status=_status(verdict),
        # the badge says it already
        sentence=str(verdict["sentence"]).removeprefix("rejected: ").removeprefix("undecided: "),
        subject=subject(record),
        cards=_cards(record),
        rows=comparison(record),
        gates=gates(record, verdict),
        task=section(record, "task"),
        label=metric_label(section(record, "task").get("metric") or "accuracy"),
        parity=section(record, "parity"),
        rounding=section(record, "plain"),
        storage=storage(record),
        follow=outputs_follow(section(record, "parity")),
        again=_origin(record),
        integer=section(record, "integer"),
        islands=islands(record),
        latency=section(record, "latency"),
        spread=spread(record),
        size=section(record, "size"),
        memory=section(record, "memory"),
        optimizer=section(record, "optimizer"),
        layers=[
            {**layer, "number": number, "sqnr": sqnr(layer)} for number, layer in drawn(layers, _MOST_ROWS)
        ],
        layer_total=len(layers),
        shares=any(layer.get("loss_share") is not None for layer in layers),
        formats=_formats(plan),
        provenance=_provenance(record, manifest),
        # not its own: a page can't hold the checksum of itself
        files={k: v for k, v in section(manifest or {}, "files").items() if k != "report.html"},
        recipe=None if recipe is None else "\n".join(wording.plain(s, 400) for s in recipe.splitlines()),
        command=_command(record),
        why=lambda name, key=None: reason(record, name, key),
        figures=made,
        figures_json=_script_json(made),
        ranges=tensors,
        tensors_json=_script_json(tensors.data if tensors else []),
        picture=picture(record.get("network")),
        steps=_steps_taken(record),
        plotly=_plotly() if made or tensors else "",
        style=_template("style.css"),
        charts=_template("charts.js"),
        boxes=_template("network.js"),
        paper=_template("paper.js"),
    )


def _optional(path: Path) -> Mapping[str, Any] | None:
    if not path.is_file():
        return None
    loaded: Mapping[str, Any] = records.load(path)
    return loaded


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path.name} can't be read ({error}): compress the network again") from error


def _write(path: Path, page: str) -> Path:
    """Old whole or new whole, also when the disk is full."""
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", errors="replace", dir=path.parent, prefix=".report.", delete=False
        ) as stream:
            temporary = Path(stream.name)
            stream.write(page)
        # a temporary file is private; the report is as readable as its neighbours
        os.chmod(temporary, (path.parent / "measurements.json").stat().st_mode & 0o666)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise ArtifactError(
            f"{path} can't be written ({error.strerror}): free the disk or its permissions"
        ) from error
    return path


def _breakable(name: object, limit: int = 200) -> Markup:
    """A name, or words with names in them, that lines may break after dots and underscores."""
    text = str(escape(wording.plain(name, limit)))
    return Markup(text.replace(".", ".<wbr>").replace("_", "_<wbr>"))


def _template(name: str) -> Markup:
    return Markup((_TEMPLATES / name).read_text(encoding="utf-8"))


def _plotly() -> Markup:
    from plotly.offline import get_plotlyjs

    # the library is put inside a script element, which these letters would end
    return Markup(get_plotlyjs().replace("</script", "<\\/script"))


def _script_json(value: object) -> Markup:
    """JSON that can stand inside a script element: no tag, comment or entity can start in it."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text)


def _status(verdict: Mapping[str, Any]) -> str:
    """`holds`, `fails`, `undecided`, or `measured` when no limit was set for the accuracy."""
    gates = {gate["name"]: gate["verdict"] for gate in verdict.get("gates") or ()}
    if "fails" in gates.values():
        return "fails"
    if not verdict["passed"]:
        return "undecided"
    return "holds" if "accuracy" in gates else "measured"


def _cards(record: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(figure, what it is, detail) for the five questions that people ask first."""
    task, latency = section(record, "task"), section(record, "latency")
    binary = bool(task.get("binary"))
    size = section(record, "size")
    drop = task.get("drop")
    # the sign is the metric's own direction of worse, so that "−" always means lost
    lost = wording.ABSENT if drop is None else f"{'+' if drop < 0 else '−' if drop > 0 else ''}"
    return [
        (
            lost if drop is None else f"{lost}{wording.change(abs(drop), binary)}",
            ("points of " if binary else "") + metric_label(task.get("metric") or "accuracy"),
            reason(record, "task", "drop")
            if drop is None
            else f"on {wording.count(task.get('samples'))} samples",
        ),
        (
            wording.times(latency.get("speedup")),
            "speed",
            latency.get("verdict") or reason(record, "latency", "speedup"),
        ),
        (
            wording.times(size.get("ratio")),
            "file size",
            reason(record, "size", "ratio")
            if size.get("ratio") is None
            else wording.size(size.get("compressed_bytes")),
        ),
        _integer_card(record),
        _parity_card(record),
    ]


def _integer_card(record: Mapping[str, Any]) -> tuple[str, str, str]:
    integer, bits = section(record, "integer"), bits_per_weight(record)
    share, floats = integer.get("mac_share"), len(integer.get("float_ops") or ())
    if share is None:
        return wording.ABSENT, "of the MACs in integers", reason(record, "integer", "mac_share")
    if share == 0 and bits is not None:
        return f"{bits:.2f}", "bits a weight", "computed in floats as before"
    operators = f"{floats} operator{'' if floats == 1 else 's'} in float"
    return wording.percent(share), "of the MACs in integers", operators


def _parity_card(record: Mapping[str, Any]) -> tuple[str, str, str]:
    parity = section(record, "parity")
    why = reason(record, "parity", "exact_share")
    if parity.get("exact_share") is None and (follow := outputs_follow(parity)) is not None:
        return follow, "outputs against the simulation", why
    steps = parity.get("max_steps")
    detail = why if steps is None else f"furthest: {_steps(steps)}"
    return wording.percent(parity.get("exact_share")), "equal to the simulation", detail


def _steps(number: int) -> str:
    return f"{number} step{'' if number == 1 else 's'}"


def _steps_taken(record: Mapping[str, Any]) -> list[tuple[str, float]]:
    """(step, milliseconds) in the order in which they ran; `2 calibrate` is the third."""
    taken = section(section(record, "seconds"), "steps")

    def place(name: str) -> tuple[bool, int]:
        number = name.partition(" ")[0]
        return not number.isdigit(), int(number) if number.isdigit() else 0

    return [(name.lstrip("0123456789 "), taken[name] * 1000) for name in sorted(taken, key=place)]


def _formats(plan: Mapping[str, Any] | None) -> list[tuple[str, str, int]]:
    """(what, format, number of tensors) of the plan, most frequent first."""
    counts: dict[tuple[str, str], int] = {}
    for tie in section(plan or {}, "ties").values():
        key = (_SOURCES.get(tie.get("source"), str(tie.get("source"))), str(tie.get("format")))
        counts[key] = counts.get(key, 0) + 1
    return [(what, fmt, n) for (what, fmt), n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]


def _origin(record: Mapping[str, Any]) -> str:
    """What an artifact that was re-quantized comes from, and what that one had lost already."""
    origin = section(record, "origin")
    if not origin:
        return ""
    drop, metric = origin.get("drop"), wording.plain(origin.get("metric"))
    lost = "" if drop is None else f"; its own loss of {metric_label(metric)}: {wording.loss(drop, False)}"
    formats = ", ".join(wording.plain(name) for name in origin.get("formats") or ())
    source = f"{wording.plain(origin.get('recipe'))} on {wording.plain(origin.get('target'))} ({formats})"
    return f"Made from the artifact {source}{lost}. Float here means that artifact as floats: losses come on top."


def _provenance(record: Mapping[str, Any], manifest: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Everything needed to make it again, as (key path, value)."""
    kept = {key: record.get(key) for key in ("model", "host", "seed", "versions", "seconds")}
    others = {k: v for k, v in (manifest or {}).items() if k not in ("files", "schema", *kept)}
    return [item for key, value in {**kept, **others}.items() for item in _flat(key, value)]


def _flat(path: str, value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{path}.{key}", inner)
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        for index, inner in enumerate(value):
            yield from _flat(f"{path}[{index}]", inner)
    elif isinstance(value, list | tuple):
        yield path, ", ".join(wording.plain(item) for item in value)
    elif isinstance(value, float):
        yield path, f"{value:.6g}"
    elif value is not None:
        yield path, wording.plain(value)


def _command(record: Mapping[str, Any]) -> str:
    """The command that makes this artifact again; capitals stand for the user's own files."""
    if record.get("command"):
        return wording.plain(record["command"], 2000)
    task = section(record, "task")
    target = shlex.quote(wording.plain(record.get("target")))
    parts = [f"bitport compress MODEL --target {target} --recipe recipe.toml --data DATA"]
    if task.get("metric"):
        parts.append(f"--eval EVAL --metric {shlex.quote(wording.plain(task['metric']))}")
    if task.get("max_drop") is not None:
        parts.append(f"--max-drop {task['max_drop']:g}")
    return " ".join([*parts, "--out OUT"])


__all__ = ["Row", "render", "to_html"]
