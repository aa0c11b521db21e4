"""A loader that hangs is told, then ended with the index of its batch; the caller's signals stay as they were."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bitport.data import Source, patience
from bitport.errors import DataError

X = torch.ones(2, 3)


def source(data: Any) -> Source:
    return Source(data, role="calibration", names=["x"], labels="ignored")


def reading() -> None:
    mine, theirs = socket.socketpair()
    with mine, theirs:
        mine.recv(1)


def waiting() -> None:
    threading.Event().wait()


def busy() -> None:
    while True:
        pass


def stubborn() -> None:
    for _ in range(3):
        try:
            time.sleep(60)
        except BaseException:  # noqa: BLE001
            continue


HANGS: dict[str, Callable[[], None]] = {
    "sleep": lambda: time.sleep(60),
    "socket": reading,
    "lock": waiting,
    "endless loop": busy,
    "catches everything": stubborn,
}


@pytest.mark.parametrize("kind", HANGS)
def test_a_loader_that_hangs_is_ended_at_the_limit(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(patience.LIMIT, "0.2")
    monkeypatch.setattr(patience, "AGAIN_SECONDS", 0.05)
    before = signal.getsignal(signal.SIGALRM)

    def stuck() -> Iterator[Tensor]:
        yield X
        HANGS[kind]()
        yield X

    started = time.monotonic()
    with pytest.raises(
        DataError, match=r"has not given batch 1 for 0\.2 s: mend the loader, or set"
    ) as caught:
        list(source(stuck))
    assert caught.value.batch == 1
    assert 0.2 <= time.monotonic() - started < 20
    assert signal.getsignal(signal.SIGALRM) is before
    assert [thread for thread in threading.enumerate() if thread.name == "bitport-data-patience"] == []


def test_opening_may_hang_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(patience.LIMIT, "0.2")

    def never() -> Iterator[Tensor]:
        time.sleep(10)
        return iter([X])

    with pytest.raises(DataError, match="has not given batch 0"):
        list(source(never))


def slow() -> Iterator[Tensor]:
    yield X
    time.sleep(0.3)
    yield X


def test_a_slow_loader_is_told_once_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(patience, "TOLD_SECONDS", 0.05)
    with caplog.at_level(logging.WARNING, "bitport.data"):
        assert len(list(source(slow))) == 2
    assert [record.getMessage() for record in caplog.records] == [
        "the calibration data has not given batch 1 for 0 s: is its loader stuck?"
    ]


def test_work_between_batches_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(patience.LIMIT, "0.1")
    for _ in source(lambda: iter([X, X])):
        time.sleep(0.2)


def test_without_a_limit_and_in_another_thread_nothing_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(patience.LIMIT, "0")
    assert len(list(source(slow))) == 2
    monkeypatch.setenv(patience.LIMIT, "0.05")
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(len(list(source(slow)))))
    thread.start()
    thread.join()
    assert found == [2]


def test_somebody_elses_alarm_still_reaches_them(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: heard.append(number))

    def alarmed() -> Iterator[Tensor]:
        os.kill(os.getpid(), signal.SIGALRM)
        yield X

    try:
        assert len(list(source(alarmed))) == 1
        assert heard == [signal.SIGALRM]
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("limit", ["soon", "-1", "nan", ""])
def test_a_limit_that_is_none(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(patience.LIMIT, limit)
    with pytest.raises(DataError, match=rf"{patience.LIMIT} = '{limit}': give the seconds"):
        list(source(lambda: iter([X])))
