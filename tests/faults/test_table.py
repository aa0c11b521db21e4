"""docs/faults.md: each case has one row, and each test that it names exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| (\d+) \| ([^|]+) \| ([^|]+) \| ([^|]*)\|$", re.MULTILINE)
CASES = 64


def rows() -> list[tuple[int, str, list[str]]]:
    """(case, what bitport does, test ids)"""
    text = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    return [(int(case), does, re.findall(r"`([^`]+)`", tests)) for case, _, does, tests in ROW.findall(text)]


@cache
def _names(file: str) -> frozenset[str]:
    """`function` and `Class::function` of a file; read, not imported, which takes no time."""
    found = set()
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return frozenset(found)


def absent(test: str) -> bool:
    file, _, name = test.partition("::")
    return not (ROOT / file).is_file() or name.partition("[")[0] not in _names(file)


def test_each_case_has_one_row() -> None:
    assert [case for case, *_ in rows()] == list(range(1, CASES + 1))


def test_each_row_names_tests_that_exist_or_says_what_is_missing() -> None:
    missing = [(case, test) for case, _, tests in rows() for test in tests if absent(test)]
    assert missing == []
    silent = [
        case for case, does, tests in rows() if not tests and not re.search(r"open: |does not apply", does)
    ]
    assert silent == []
