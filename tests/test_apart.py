"""Work in another process: its answers, its errors, and its end."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from bitport.apart import apart
from bitport.errors import LoadError, MissingDependency, UnsafeFile


def double(number: int) -> int:
    return 2 * number


def refuse() -> None:
    raise UnsafeFile("not this one")


def lack() -> None:
    raise MissingDependency("it", "keras", "keras")


def end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def break_down() -> None:
    sys.exit("broken")


def stay() -> None:
    time.sleep(60)


def test_answers_and_errors_come_back(tmp_path: Path) -> None:
    assert apart(f"{__name__}:double", {"number": 21}, tmp_path) == 42
    with pytest.raises(UnsafeFile, match="not this one"):
        apart(f"{__name__}:refuse", {}, tmp_path)


def test_errors_with_other_arguments_come_back(tmp_path: Path) -> None:
    with pytest.raises(MissingDependency, match=r"bitport\[keras\]"):
        apart(f"{__name__}:lack", {}, tmp_path)


@pytest.mark.parametrize(
    ("function", "told"), [("end", "signal 9"), ("break_down", "broken"), ("stay", "longer than")]
)
def test_a_process_that_ends_is_told(tmp_path: Path, function: str, told: str) -> None:
    with pytest.raises(LoadError, match=told):
        apart(f"{__name__}:{function}", {}, tmp_path, timeout=15 if function != "stay" else 3)
