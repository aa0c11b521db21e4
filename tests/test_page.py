from __future__ import annotations

import errno
import itertools
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from tests import fixtures_measurements as fixtures
from tests import small

from bitport.errors import ArtifactError
from bitport.page import render
from bitport.page.figures import drawn, figures
from bitport.page.page import to_html
from bitport.page.ranges import MOST, ranges
from bitport.page.summary import comparison, islands, spread, worst_layers

HOSTILE = "<script>alert(1)</script>\x1b[31m'\"&amp;</script>{{7*7}}"
BASE = fixtures.record()


class Page(HTMLParser):
    """Elements of a page: ids, links, sources, headings, visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self._silent = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._silent += tag in ("script", "style")
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("href", "src", "srcset", "action", "poster", "data"):
                self.links.append(str(value))

    def handle_endtag(self, tag: str) -> None:
        self._silent -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.text += data


def page(**changes: Any) -> Page:
    return Page(to_html(fixtures.record(**changes)))


def test_render_writes_one_self_contained_file(tmp_path: Path) -> None:
    path = render(fixtures.write(tmp_path / "a"))
    assert path == tmp_path / "a" / "report.html"
    text = path.read_text(encoding="utf-8")
    assert path.stat().st_size <= 6_000_000
    found = Page(text)
    assert [link for link in found.links if not link.startswith(("#", "data:"))] == []
    assert "default-src 'none'" in text
    assert text.count("Plotly.react") >= 1
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "manifest.json",
        "measurements.json",
        "plan.json",
        "recipe.toml",
        "report.html",
    ]


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (render(fixtures.write(tmp_path / name)).read_bytes() for name in ("a", "b"))
    assert first == second
    assert str(tmp_path).encode() not in first


def test_structure_for_keyboards_and_screen_readers() -> None:
    found = page()
    assert len(set(found.ids)) == len(found.ids)
    anchors = {link[1:] for link in found.links if link.startswith("#")}
    assert anchors <= set(found.ids)
    assert {"main", "nav", "header"} <= set(found.tags)
    levels = [int(tag[1]) for tag in found.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(later - earlier <= 1 for earlier, later in itertools.pairwise(levels))


def test_the_verdict_comes_first_and_everything_is_there() -> None:
    text = page().text
    sentence = BASE["verdict"]["sentence"]
    assert sentence in text
    assert text.index(sentence) < text.index("Before and after")
    for words in (
        "98.89 %",
        "98.78 %",
        "2.62 ms",
        "1.14 ms",
        "100 %",
        "99.996 %",
        "48,212,992",
        "se.gelu",
        "no integer kernel for Gelu",
        "QLinearConv",
        "layer4.add",
        "27.7 dB",
        "model.digest",
        "5f" * 32,
        "bitport compress MODEL --target onnxruntime --recipe recipe.toml --data DATA "
        "--eval EVAL --metric top1 --max-drop 0.005 --out OUT",
        "all others are fixed by the example",
    ):
        assert words in text, words


def test_plan_manifest_and_recipe_are_shown() -> None:
    text = Page(
        to_html(BASE, plan=fixtures.plan(), manifest=fixtures.manifest(), recipe=fixtures.RECIPE)
    ).text
    assert "int8 symmetric channel(0)" in text
    assert "data.evaluation" in text
    assert "e5" * 32 in text
    assert "a1" * 32 in text
    assert 'granularity = "channel"' in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"verdict": "fails", "drop": 0.031, "ci95": [0.024, 0.038]}, ["✗ rejected", "loses 3.10 points"]),
        (
            {"verdict": "undecided", "drop": 0.004, "ci95": [-0.001, 0.013], "samples_needed": 3512},
            ["? undecided", "about 4,000 samples would decide"],
        ),
        (
            {"verdict": None, "verdict_reason": "no max_drop was given"},
            ["no limit was set", "no max_drop was given"],
        ),
    ],
)
def test_bad_news_is_said_plainly(changes: dict[str, Any], words: list[str]) -> None:
    text = page(verdict=None, task={**BASE["task"], **changes}).text
    for word in words:
        assert word in text


def test_not_faster_is_said() -> None:
    slow = {**BASE["latency"], "speedup": 0.97, "ci95": [0.93, 1.01], "verdict": "not faster"}
    text = page(verdict=None, latency=slow).text
    assert "not faster than float (0.97× its speed on 1 thread)" in text
    assert "Not faster:" in text


SECTIONS = ("task", "parity", "integer", "latency", "size", "layers", "distributions", "network")


@pytest.mark.parametrize("name", SECTIONS)
def test_a_missing_section_shows_its_reason(name: str) -> None:
    found = page(verdict=None, **{name: None, f"{name}_reason": f"the reason of {name} was XYZ"})
    assert f"the reason of {name} was XYZ" in found.text


def test_nothing_at_all_still_makes_a_page() -> None:
    found = Page(to_html({"schema": 1}))
    assert "not measured" in found.text
    assert "script" not in found.tags


def test_hostile_names_are_only_text(tmp_path: Path) -> None:
    layers = [{**layer, "name": HOSTILE + layer["name"], "op": HOSTILE} for layer in fixtures.layers()]
    hostile = {
        "layers": layers,
        "target": HOSTILE,
        "recipe": HOSTILE,
        "model": {"name": HOSTILE},
        "notes": [HOSTILE],
        "host": {HOSTILE: HOSTILE},
        "integer": {
            **BASE["integer"],
            "float_ops": [{"name": HOSTILE, "op": HOSTILE, "reason": HOSTILE, "macs": 0}],
            "kernels": {HOSTILE: 1},
        },
        "distributions": [
            {**row, "tensor": HOSTILE + row["tensor"], "format": HOSTILE} for row in fixtures.distributions()
        ],
        "network": {
            "nodes": [
                {
                    **node,
                    "name": HOSTILE,
                    "op": HOSTILE,
                    "module": HOSTILE,
                    "kernel": HOSTILE,
                    "reason": HOSTILE,
                }
                for node in fixtures.network()["nodes"]
            ],
            "edges": fixtures.network()["edges"],
        },
        "tried": [{"what": HOSTILE, "outcome": HOSTILE, "reason": HOSTILE}],
        "seconds": {"steps": {HOSTILE: 1.0}},
        "task": {**BASE["task"], "metric": HOSTILE, "verdict": "undecided"},
        "verdict": None,
    }
    before, after = to_html(BASE), to_html(fixtures.record(**hostile), recipe=HOSTILE)
    assert Page(after).tags.count("script") == Page(before).tags.count("script")
    assert "\x1b" not in after
    assert "alert(1)" in Page(after).text
    assert "{{7*7}}" in Page(after).text
    embedded = re.search(r'<script type="application/json" id="figures">(.*?)</script>', after, re.DOTALL)
    assert embedded is not None
    hover = json.loads(embedded[1])["chart-layers"]["data"][1]["text"][0]
    assert "<script>" not in hover
    assert "&lt;script&gt;" in hover


def test_a_huge_network_stays_within_six_megabytes(tmp_path: Path) -> None:
    layers = [
        {**layer, "name": f"{'very_long_module_name.' * 9}{i}", "sqnr_runtime_db": 20 + (i % 977) / 50}
        for i, layer in enumerate(fixtures.layers(1300))
    ]
    assert len(layers) > 3500
    long = "very_long_module_name." * 9
    network, distributions = fixtures.network(1300), fixtures.distributions(1300)
    for node in network["nodes"]:
        node["name"], node["module"] = long + node["name"], long + node["module"]
    for row in distributions:
        row["tensor"] = long + row["tensor"]
    path = render(fixtures.write(tmp_path, layers=layers, network=network, distributions=distributions))
    assert path.stat().st_size <= 6_000_000
    assert f"{len(layers):,}" in path.read_text(encoding="utf-8")


def test_of_too_many_layers_the_worst_are_drawn_in_order() -> None:
    layers = [{"name": str(i), "sqnr_runtime_db": float((i * 7) % 10)} for i in range(10)]
    shown = drawn(layers, 4)
    assert [number for number, _ in shown] == sorted(number for number, _ in shown)
    assert {layer["sqnr_runtime_db"] for _, layer in shown} == {0.0, 1.0, 2.0, 3.0}
    assert [number for number, _ in drawn(layers, 10)] == list(range(1, 11))


def test_figures_are_what_plotly_knows_and_show_the_numbers() -> None:
    made = figures(BASE)
    assert set(made) == {"chart-accuracy", "chart-layers", "chart-latency", "chart-sizes"}
    for figure in made.values():
        go.Figure(figure)  # refuses unknown properties and values
    rows = BASE["layers"]
    simulated, runtime, steps = made["chart-layers"]["data"]
    assert simulated["y"] == [row["sqnr_db"] for row in rows]
    assert runtime["y"] == [row["sqnr_runtime_db"] for row in rows]
    assert steps["y"] == [row["steps_max"] for row in rows]
    assert runtime["x"] == list(range(1, len(rows) + 1))
    assert [
        rows[i]["name"] for i, symbol in enumerate(runtime["marker"]["symbol"]) if symbol != "circle"
    ] == ["se.gelu"]
    error = made["chart-accuracy"]["data"][0]
    assert error["x"][0] + error["error_x"]["array"][0] == pytest.approx(100 * BASE["task"]["ci95"][1])
    assert error["x"][0] - error["error_x"]["arrayminus"][0] == pytest.approx(100 * BASE["task"]["ci95"][0])
    assert made["chart-latency"]["data"][1]["x"] == BASE["latency"]["samples_ms"]["float"]
    assert sum(made["chart-sizes"]["data"][0]["y"]) == sum(row["float_bytes"] for row in rows)


def test_a_target_that_only_simulates_has_one_line() -> None:
    layers = [{**row, "sqnr_runtime_db": None, "steps_max": None} for row in BASE["layers"]]
    only = figures(fixtures.record(layers=layers))["chart-layers"]["data"]
    assert [trace["name"] for trace in only] == ["simulated"]
    assert only[0]["y"] == [row["sqnr_db"] for row in layers]
    assert "layer4.add" in only[0]["text"][12]


def test_a_record_from_before_there_were_pictures_renders() -> None:
    old = {key: value for key, value in BASE.items() if key not in ("distributions", "network", "tried")}
    found = Page(to_html(old))
    assert {"ranges", "network", "tried"} <= set(found.ids)
    assert "98.89 %" in found.text
    assert "svg" not in found.tags and "select" not in found.tags


def test_what_was_tried_is_told_with_times_in_order() -> None:
    steps = {"0 fold": 0.3, "2 calibrate": 4.2, "10 correct_bias": 0.05, "1 quantize": 0.1}
    text = page(seconds={"steps": steps}).text
    places = [text.index(word) for word in ("fold", "quantize", "calibrate", "correct_bias")]
    tried = text.index("What was tried")
    assert [text.index(word, tried) for word in ("fold", "quantize", "calibrate", "correct_bias")] == sorted(
        text.index(word, tried) for word in ("fold", "quantize", "calibrate", "correct_bias")
    )
    assert places and "4.20 s" in text and "50.0 ms" in text
    for words in ("bias correction", "left out", "error 0.0123 without, 0.0131 with it"):
        assert words in text
    assert "No step had to choose" in page(tried=[]).text


def test_float_operators_are_grouped_by_reason_and_all_named() -> None:
    rows = [{"name": f"block{i}.gelu", "op": "gelu", "reason": "no kernel", "macs": 0} for i in range(12)]
    rows.append({"name": "head", "op": "linear", "reason": "an override", "macs": 1000})
    record = fixtures.record(integer={**BASE["integer"], "float_ops": rows})
    assert [(group.op, len(group.names), group.macs) for group in islands(record)] == [
        ("linear", 1, 1000),
        ("gelu", 12, 0),
    ]
    text = Page(to_html(record)).text
    assert "and 11 more" in text
    for row in rows:
        assert row["name"] in text


def test_what_is_float_because_its_operand_is_makes_one_group() -> None:
    rows = [
        {"name": f"block{i}.{op}", "op": op, "reason": f"its operand block{i}.norm is float", "macs": 0}
        for i in range(3)
        for op in ("add", "other:silu")
    ]
    rows.append({"name": "norm", "op": "layer_norm", "reason": "the runtime has no LayerNorm", "macs": 0})
    record = fixtures.record(integer={**BASE["integer"], "float_ops": rows})
    first, last = islands(record)
    assert (first.op, first.reason) == ("layer_norm", "the runtime has no LayerNorm")
    assert (last.op, len(last.names), last.reason) == ("add, silu", 6, "what it reads is float already")
    text = Page(to_html(record)).text
    for row in rows:
        assert row["name"] in text


def test_times_are_told_in_a_table_too() -> None:
    samples = {"float": [4.0, 1.0, 2.0, 3.0, 5.0], "compressed": [0.5]}
    found = spread(fixtures.record(latency={**BASE["latency"], "samples_ms": samples}))
    assert found == [("float", ["1.00 ms", "2.00 ms", "3.00 ms", "4.00 ms", "5.00 ms"])]
    assert "1.00 ms" in page(latency={**BASE["latency"], "samples_ms": samples}).text
    assert spread(fixtures.record(latency=None)) == []


def test_what_casts_doubt_stands_beside_the_verdict() -> None:
    text = page(notes=["the float network only guesses"]).text
    assert text.index("the float network only guesses") < text.index("Before and after", text.index("Origin"))
    assert "Worth knowing" not in page(notes=[]).text


def test_gates_are_in_the_words_of_the_table() -> None:
    gates = [
        {"name": "accuracy", "value": 0.00111, "limit": 0.005, "verdict": "holds"},
        {"name": "runtime equals simulation", "value": 0.97, "limit": 0.99, "verdict": "fails"},
        {"name": "other", "value": -0.25, "limit": None, "verdict": "holds"},
    ]
    verdict = {**BASE["verdict"], "passed": False, "gates": gates}
    text = " ".join(page(verdict=verdict).text.split())
    for words in (
        "0.11 points worse (95 %: 0.08 better to 0.40 worse) at most 0.50 points worse",
        "97 % at least 99 %",
        "other−0.25–",
    ):
        assert words.replace(" ", "") in text.replace(" ", ""), words


def test_the_worst_tensors_are_picked_first() -> None:
    made = ranges(BASE)
    assert made is not None
    rows = BASE["distributions"]
    assert made.total == len(rows) == len(made.data)
    assert [t.name for t in made.weights] == [row["tensor"] for row in rows if row["what"] == "weights"]
    # no weight is clipped: the one of the layer with the lowest ratio comes first
    first = {what: made.data[index] for what, index in made.first.items()}
    assert rows[made.first["weights"]]["tensor"] == "layer4.conv1.weight"
    assert rows[made.first["activations"]]["clipped_share"] == max(row["clipped_share"] for row in rows)
    assert first["weights"]["inside"] == [0, 59] and first["weights"]["range"] == [-128, 127]
    low, high = first["activations"]["inside"]
    assert (low, high) == (0, 54)
    assert [tensor.share for tensor in made.worst] == sorted((t.share for t in made.worst), reverse=True)
    assert "none of" in made.weights[0].text and "a scale per channel" in made.weights[0].text


def test_of_very_many_tensors_the_worst_of_both_kinds_are_kept() -> None:
    record = fixtures.record(distributions=fixtures.distributions(200))
    made = ranges(record)
    assert made is not None
    assert len(made.data) == MOST < made.total
    assert len(made.weights) == MOST // 2
    few = ranges(
        fixtures.record(distributions=[r for r in fixtures.distributions(200) if r["what"] == "weights"])
    )
    assert few is not None and len(few.data) == MOST
    assert f"{MOST} worst of {made.total:,}" in Page(to_html(record)).text


def test_rows_and_worst_layers() -> None:
    rows = {row.label: row for row in comparison(BASE)}
    assert rows["top-1"].change == "0.11 points worse (95 %: between 0.08 better and 0.40 worse)"
    assert rows["file"].runtime == "724 kB"
    assert [layer["name"] for layer in worst_layers(BASE, 2)] == ["layer4.add", "layer4.conv1"]
    better = fixtures.record(task={**BASE["task"], "drop": -0.002})
    assert "0.20 points better" in comparison(better)[0].change
    same = fixtures.record(task={**BASE["task"], "drop": 0.0})
    assert comparison(same)[0].change.startswith("no change")


def test_without_measurements_there_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"measurements\.json"):
        render(tmp_path)


def test_a_full_disk_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fixtures.write(tmp_path / "a")
    (folder / "report.html").write_text("old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ArtifactError, match="No space left"):
        render(folder)
    assert (folder / "report.html").read_text() == "old"
    assert not list(folder.glob(".report*"))


def test_a_real_artifact_has_every_section(tmp_path: Path) -> None:
    made = small.compressed(tmp_path / "a", effort="balanced")
    record, text = made.measurements.record, (tmp_path / "a" / "report.html").read_text(encoding="utf-8")
    assert {row["what"] for row in record["distributions"]} == {"weights", "activations"}
    assert {node["name"] for node in record["network"]["nodes"]} >= {"x", "stem", "body", "fc", "output"}
    assert "bias correction" in [row["what"] for row in record["tried"]]
    found = Page(text)
    for words in ("bias correction", "correct_bias", "int8 symmetric channel(0), a scale per channel"):
        assert words in found.text
    assert found.tags.count("svg") == 1 and found.tags.count("select") == 2
