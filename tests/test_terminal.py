"""The summary on a terminal, at several widths."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests import fixtures_measurements as fixtures

from bitport.cli import terminal

FLOATS = [
    {"name": f"encoder.layer.{i}.{op}", "op": op, "reason": f"the runtime has no integer {op}", "macs": 0}
    for i in range(12)
    for op in ("layer_norm", "softmax", "gelu", "erf")
]


def drawn(monkeypatch: pytest.MonkeyPatch, folder: Path, width: int, **changes: Any) -> list[str]:
    stream = io.StringIO()
    monkeypatch.setattr(terminal, "_console", lambda: Console(file=stream, width=width, highlight=False))
    terminal.summary(fixtures.record(**changes), folder)
    return [line.rstrip() for line in stream.getvalue().splitlines()]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_it_fits_and_says_everything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, width: int) -> None:
    fixtures.write(tmp_path / "out")
    (tmp_path / "out" / "report.html").write_text("")
    monkeypatch.chdir(tmp_path)
    lines = drawn(monkeypatch, Path("out"), width)
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    for words in (
        "98.89 % 98.78 % 98.78 %",
        "0.11 points worse (95 %: between 0.08 better and 0.40 worse)",
        "2.76 MB 724 kB",
        "2.3× faster (2.2× to 2.4×)",
        "✓ int8 on onnxruntime keeps top-1 within 0.41 points of the float network (95 % sure); "
        "its file is 0.26× the size, and it runs 2.3× as fast on 1 thread.",
        "report out/report.html",
        "worst layer layer4.add (add, 27.7 dB)",
        "in float se.gelu: onnxruntime has no integer kernel for Gelu",
    ):
        assert words in text, words
    assert "latency, 1 thread, batch 1" in text
    top1 = next(line for line in lines if line.startswith("top-1"))
    assert ("points worse" in top1) == (width == 120)


def test_a_path_to_the_report_is_never_cut(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / ("a_long_name_of_a_folder" * 6)
    fixtures.write(folder)
    (folder / "report.html").write_text("")
    assert any(line.endswith(f"{folder.name}/report.html") for line in drawn(monkeypatch, folder, 60))


def test_reasons_for_float_are_counted_not_repeated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    integer = {**fixtures.record()["integer"], "float_ops": FLOATS}
    text = " ".join(" ".join(drawn(monkeypatch, tmp_path, 100, integer=integer)).split())
    assert "encoder.layer.0.gelu and 11 more: the runtime has no integer gelu" in text
    assert text.count("no integer") == 3
    assert "and 1 more reason in the report" in text


def test_what_is_clipped_much_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [
        {**row, "clipped_share": 0.0371 if row["tensor"] == "head" else 0.0}
        for row in fixtures.distributions()
    ]
    lines = drawn(monkeypatch, tmp_path, 80, distributions=rows)
    assert "  clipped      head (3.71 % of its activations)" in lines
    assert not [line for line in drawn(monkeypatch, tmp_path, 80) if "clipped" in line]
    assert drawn(monkeypatch, tmp_path, 80, distributions=None)


def test_a_loss_that_is_no_chance_names_the_doctor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    task = fixtures.record()["task"]
    for changes, told in (
        ({"ci95": [0.01, 0.03]}, True),
        ({"ci95": [-0.01, 0.03], "verdict": "fails"}, True),
        ({"ci95": [-0.01, 0.03]}, False),
    ):
        lines = drawn(monkeypatch, tmp_path / "out", 80, task={**task, **changes})
        assert ("  what helps   bitport doctor out --data D tries remedies" in lines) == told


@pytest.mark.parametrize(
    ("gates", "passed", "mark"),
    [
        ([], True, "•"),
        ([("runtime equals simulation", "holds")], True, "•"),
        ([("accuracy", "holds"), ("runtime equals simulation", "holds")], True, "✓"),
        ([("accuracy", "undecided")], False, "?"),
        ([("accuracy", "undecided"), ("runtime equals simulation", "fails")], False, "✗"),
    ],
)
def test_a_tick_is_given_only_where_a_limit_was_set_and_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gates: list[tuple[str, str]], passed: bool, mark: str
) -> None:
    rows = [{"name": name, "value": 0.0, "limit": 0.1, "verdict": verdict} for name, verdict in gates]
    verdict = {"passed": passed, "sentence": "the sentence.", "gates": rows}
    assert f"{mark} the sentence." in drawn(monkeypatch, tmp_path, 80, verdict=verdict)


def test_the_report_of_an_earlier_measurement_is_called_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "report.html").write_text("")
    stream = io.StringIO()
    monkeypatch.setattr(terminal, "_console", lambda: Console(file=stream, width=200, highlight=False))
    terminal.summary(fixtures.record(), tmp_path, again=True)
    assert "  report of compress  " in stream.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_reasons_stand_below_the_layers_where_there_is_no_room_beside_them(
    monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(terminal, "_console", lambda: Console(file=stream, width=width, highlight=False))
    layers = [
        {"name": f"norm{i}", "op": "layer_norm", "shape": ["batch", 8], "parameters": 16, "macs": 0,
         "integer": False, "reason": "the runtime has no integer LayerNorm"}
        for i in range(3)
    ]  # fmt: skip
    terminal.inspection({"layers": layers, "totals": {"parameters": 48, "macs": 0, "mac_share": 0.0}})
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    below = "  in float     norm0 and 2 more: the runtime has no integer LayerNorm"
    assert (below in lines) == (width == 80)
    assert sum("no integer LayerNorm" in line for line in lines) == (1 if width == 80 else 3)
