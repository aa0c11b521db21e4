"""Charts as Plotly figures (https://plotly.com/javascript/reference/): plain dictionaries, data and layout.

Colours are CSS variables (`var(--runtime)`); `charts.js` puts in the values of the light or the dark scheme.
Plotly reads labels as a small HTML, so every name is escaped here.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from .. import wording
from ..proof.verdict import metric_label
from .summary import section, sqnr

Record = Mapping[str, Any]
Figure = dict[str, Any]

MOST_LAYERS = 1000
"""More operators are too many for one chart and for the 6 MB of the file: the worst ones are drawn."""


_NO_STEPS: dict[str, Any] = {
    "xref": "paper",
    "yref": "y2 domain",
    "x": 0.5,
    "y": 0.5,
    "text": "0 steps: every integer equal",
    "showarrow": False,
    "font": {"color": "var(--muted)"},
}


def figures(record: Record) -> dict[str, Figure]:
    """All charts that the record has data for, by the id of their place in the page."""
    made = {
        "chart-accuracy": _accuracy(section(record, "task")),
        "chart-layers": _layers(record.get("layers") or ()),
        "chart-latency": _latency(section(record, "latency")),
        "chart-sizes": _sizes(record.get("layers") or ()),
    }
    return {name: figure for name, figure in made.items() if figure is not None}


def drawn(
    layers: Sequence[Mapping[str, Any]], most: int = MOST_LAYERS
) -> list[tuple[int, Mapping[str, Any]]]:
    """(position from 1, layer) in network order; of more than `most` the ones with the lowest SQNR."""
    numbered = list(enumerate(layers, start=1))
    if len(numbered) <= most:
        return numbered
    return sorted(sorted(numbered, key=lambda item: _or_inf(sqnr(item[1])))[:most], key=lambda item: item[0])


def _accuracy(task: Mapping[str, Any]) -> Figure | None:
    """The drop with its interval on one axis; the limit as a line."""
    if task.get("drop") is None:
        return None
    binary = bool(task.get("binary"))
    scale = 100 if binary else 1
    drop, (low, high) = task["drop"] * scale, (bound * scale for bound in task["ci95"])
    label = html.escape(metric_label(task["metric"]))
    lines = [_line(0, "no change", "var(--muted)", "solid")]
    if task.get("max_drop") is not None:
        text = f"limit {wording.change(task['max_drop'], binary)}"
        lines.append(_line(task["max_drop"] * scale, text, "var(--bad)", "dash"))
    points = {
        "type": "scatter",
        "mode": "markers",
        "x": [drop],
        "y": [0],
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [high - drop],
            "arrayminus": [drop - low],
            "color": "var(--runtime)",
            "thickness": 3,
            "width": 10,
        },
        "marker": {"size": 13, "color": "var(--runtime)"},
        "hovertemplate": f"lost {drop:.4g}<br>95 % interval {low:.4g} to {high:.4g}<extra></extra>",
    }
    return {
        "data": [points],
        "layout": {
            "height": 170,
            "showlegend": False,
            "margin": {"t": 34, "b": 46, "l": 14, "r": 14},
            "xaxis": {"title": {"text": f"{label} lost{' (points)' if binary else ''}, left is better"}},
            "yaxis": {"visible": False, "range": [-1, 1], "fixedrange": True},
            "shapes": [line["shape"] for line in lines],
            "annotations": [line["annotation"] for line in lines],
        },
    }


def _line(x: float, text: str, color: str, dash: str) -> dict[str, Any]:
    position = {"xref": "x", "yref": "paper"}
    return {
        "shape": {
            **position,
            "type": "line",
            "x0": x,
            "x1": x,
            "y0": 0,
            "y1": 1,
            "line": {"color": color, "dash": dash, "width": 2},
        },
        "annotation": {
            **position,
            "x": x,
            "y": 1,
            "yanchor": "bottom",
            "text": text,
            "showarrow": False,
            "font": {"color": color},
        },
    }


def _layers(layers: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Signal-to-noise ratio by operator, simulated and on the runtime; below it the steps between the two."""
    shown = [(number, layer) for number, layer in drawn(layers) if sqnr(layer) is not None]
    if not shown:
        return None
    x = [number for number, _ in shown]
    symbols = ["circle" if layer.get("kernel") else "diamond-open" for _, layer in shown]
    simulated = {
        "type": "scatter",
        "name": "simulated",
        "mode": "lines",
        "x": x,
        "y": [layer.get("sqnr_db") for _, layer in shown],
        "line": {"color": "var(--simulated)", "width": 5},
        "hoverinfo": "skip",
    }
    measured = any(layer.get("sqnr_runtime_db") is not None for _, layer in shown)
    runtime = {
        "type": "scatter",
        # a target that only simulates has one line; it carries the hover texts then
        "name": "on the runtime" if measured else "simulated",
        "mode": "lines+markers",
        "x": x,
        "y": [layer.get("sqnr_runtime_db" if measured else "sqnr_db") for _, layer in shown],
        "text": [_hover(number, layer) for number, layer in shown],
        "hovertemplate": "%{text}<extra></extra>",
        "line": {"color": "var(--runtime)", "width": 1.5},
        "marker": {"size": 9, "symbol": symbols, "color": "var(--runtime)", "line": {"width": 1.5}},
    }
    steps = {
        "type": "bar",
        "name": "furthest integer (steps)",
        "x": x,
        "y": [layer.get("steps_max") for _, layer in shown],
        "hovertemplate": "operator %{x}: %{y} steps<extra></extra>",
        "marker": {"color": "var(--bad)"},
        "yaxis": "y2",
    }
    most = max((layer.get("steps_max") or 0 for _, layer in shown), default=0)
    worst = min(shown, key=lambda item: _or_inf(sqnr(item[1])))
    return {
        "data": [simulated, runtime, steps] if measured else [runtime],
        "layout": {
            "height": 460 if measured else 320,
            "xaxis": {
                "title": {"text": "operator, in network order"},
                "anchor": "y2" if measured else "y",
                "tickformat": "d",
            },
            "yaxis": {
                "title": {"text": "SQNR (dB)"},
                "domain": [0.34 if measured else 0, 1],
                "rangemode": "tozero",
            },
            "yaxis2": {
                "title": {"text": "steps"},
                "domain": [0, 0.2],
                "range": [0, max(1.15, most * 1.15)],
                "dtick": max(1, -(-most // 3)),
            },
            "annotations": [
                {
                    "x": worst[0],
                    "y": sqnr(worst[1]),
                    "text": f"lowest: {html.escape(wording.tail(wording.plain(worst[1].get('name'), 400), 24))}",
                    # towards the middle: what sticks out would stretch the axis
                    "xanchor": "right" if worst[0] > x[len(x) // 2] else "left",
                    "ax": 0,
                    "ay": 38,
                    "arrowcolor": "var(--muted)",
                    "bgcolor": "var(--page)",
                },
                *([] if most or not measured else [_NO_STEPS]),
            ],
        },
    }


def _latency(latency: Mapping[str, Any]) -> Figure | None:
    """Every round's time of both networks."""
    samples = latency.get("samples_ms")
    if not samples:
        return None
    rows = (
        ("compressed", samples["compressed"], "var(--runtime)"),
        ("float", samples["float"], "var(--float)"),
    )
    boxes = [
        {
            "type": "box",
            "orientation": "h",
            "name": name,
            "x": list(values),
            "boxpoints": "all",
            "jitter": 0.6,
            "pointpos": 0,
            "marker": {"color": color, "size": 4, "opacity": 0.6},
            "line": {"color": color, "width": 2},
            "fillcolor": "rgba(0,0,0,0)",
        }
        for name, values, color in rows
    ]
    return {
        "data": boxes,
        "layout": {
            "height": 260,
            "showlegend": False,
            "xaxis": {"title": {"text": "milliseconds per call"}, "rangemode": "tozero"},
            "yaxis": {"automargin": True, "fixedrange": True},
        },
    }


def _sizes(layers: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Bytes of parameters by operator, before and after."""
    shown = [(number, layer) for number, layer in drawn(layers) if layer.get("float_bytes")]
    if not shown:
        return None
    rows = (("float", "float_bytes", "var(--float)"), ("compressed", "compressed_bytes", "var(--runtime)"))
    bars = [
        {
            "type": "bar",
            "name": name,
            "x": [number for number, _ in shown],
            "y": [layer.get(key) for _, layer in shown],
            "text": [
                f"<b>{_name(layer)}</b><br>{wording.size(layer.get('float_bytes'))} → "
                f"{wording.size(layer.get('compressed_bytes'))}"
                for _, layer in shown
            ],
            "textposition": "none",
            "hovertemplate": "%{text}<extra></extra>",
            "marker": {"color": color},
        }
        for name, key, color in rows
    ]
    return {
        "data": bars,
        "layout": {
            "height": 300,
            "barmode": "group",
            "xaxis": {"title": {"text": "operator, in network order"}, "tickformat": "d"},
            "yaxis": {"title": {"text": "bytes"}, "tickformat": "~s"},
        },
    }


def _hover(number: int, layer: Mapping[str, Any]) -> str:
    lines = [
        f"<b>{_name(layer)}</b>",
        f"{number}: {html.escape(wording.plain(layer.get('op'), 40))}, "
        + html.escape(wording.plain(layer.get("kernel") or "float", 40)),
        f"simulated {wording.decibel(layer.get('sqnr_db'))}, "
        f"runtime {wording.decibel(layer.get('sqnr_runtime_db'))}",
    ]
    if layer.get("steps_max") is not None:
        lines.append(
            f"{wording.percent(layer.get('exact_share'))} equal, furthest {layer['steps_max']} steps"
        )
    return "<br>".join(lines)


def _name(layer: Mapping[str, Any], limit: int = 80) -> str:
    return html.escape(wording.plain(layer.get("name"), limit))


def _or_inf(value: float | None) -> float:
    return float("inf") if value is None else value
