"""What other libraries' exceptions become in our messages: one line, whatever they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import small

import bitport
from bitport.errors import ExportError, GraphError, first_line
from bitport.plan import Plan, lower
from bitport.plan.capture import capture


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError(), "RuntimeError"),
        (AssertionError("  \n \n"), "AssertionError"),
        (ValueError("first\nsecond"), "first"),
        (ValueError("violated!\n  - batch is 2\n  see the log"), "violated! - batch is 2"),
    ],
)
def test_one_line_of_an_exception(error: Exception, line: str) -> None:
    assert first_line(error) == line


def test_an_exporter_that_fails_without_a_word_is_an_export_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*args: Any, **kwargs: Any) -> None:
        raise AssertionError

    graph = bitport.load(small.tiny(), torch.zeros(1, 1, 8, 8))
    lowered = lower(graph, Plan.empty("null"))
    monkeypatch.setattr(torch.export, "export", silent)
    with pytest.raises(ExportError, match="AssertionError"):
        capture(lowered, graph)
    with pytest.raises(GraphError, match="AssertionError"):
        graph.export()
