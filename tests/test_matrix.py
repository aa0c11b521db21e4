"""docs/matrix.md: its diagonal is what this code measures, what fails is shown, every part is in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench import matrix
from bench.matrix import Cell, Outcome
from tests import small

import bitport

PAGE = Path(__file__).parent.parent / "docs" / "matrix.md"
DIAGONAL = matrix.diagonal()


@pytest.mark.parametrize("cell", DIAGONAL, ids=lambda cell: "-".join(vars(cell).values()))
def test_the_page_is_what_is_measured(cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small.quick(monkeypatch)  # speeds aren't compared
    small.without_page(monkeypatch)
    told = matrix.read(PAGE.read_text(encoding="utf-8"))[cell]
    found = matrix.line(cell, matrix.outcome(cell, tmp_path / "out"))
    for ours, theirs in zip(parts(matrix.without_speed(found)), parts(told), strict=True):
        # floats between integers are another processor's in the last bit
        close = isinstance(ours, float) and isinstance(theirs, float) and abs(ours - theirs) <= 1
        assert close or ours == theirs, f"{told}: run `make matrix`"


def test_the_page_has_no_other_cells() -> None:
    told = matrix.read(PAGE.read_text(encoding="utf-8"))
    assert set(told) <= set(matrix.cells())


def parts(row: str) -> list[float | str]:
    """The columns of a row; shares in percent as numbers."""
    texts = [text.strip() for text in row.strip("|").split("|")]
    return [float(text[:-2]) if text.endswith(" %") else text for text in texts]


def test_the_diagonal_has_every_part() -> None:
    assert len(DIAGONAL) == 12
    assert {cell.network for cell in DIAGONAL} == set(matrix.NETWORKS)
    assert {cell.front_end for cell in DIAGONAL} == set(matrix.FRONT_ENDS) - set(matrix.LARGE)
    assert {cell.target for cell in DIAGONAL} == set(matrix.TARGETS)
    assert {cell.recipe for cell in DIAGONAL} == set(matrix.RECIPES)
    assert len(set(DIAGONAL)) == 12


def test_every_runtime_is_in_it() -> None:
    assert set(matrix.TARGETS) == set(bitport.targets()) - {"null"}


def test_what_fails_is_shown_as_that() -> None:
    cell = Cell("cnn", "onnx", "openvino", "int8")
    row = matrix.line(cell, Outcome(failed="no | kernel"))
    assert row == "| cnn | onnx | openvino | int8 | not there: no / kernel | | | | |"
    assert matrix.read(row)[cell] == row
    found = matrix.page({cell: Outcome(failed="no"), Cell("cnn", "pytorch", "openvino", "int8"): Outcome()})
    assert "1 of 2 arrive" in found


def test_speeds_are_not_compared() -> None:
    cell = Cell("cnn", "onnx", "openvino", "int8")
    slow, fast = (matrix.line(cell, Outcome(("1", "2", "3", "4"), speed)) for speed in ("0.9×", "3.0×"))
    assert slow != fast and matrix.read(slow) == matrix.read(fast)
