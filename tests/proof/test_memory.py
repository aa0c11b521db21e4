from __future__ import annotations

import time

import pytest

from bitport.errors import TargetError
from bitport.proof import memory

MB = 2**20


def touch(size: int) -> bytearray:
    """Memory that is really resident."""
    return bytearray(b"x") * size


def test_a_new_peak_is_the_kernels_own_mark() -> None:
    # above everything this process ever had, whatever ran before
    status = memory._high_water_mark()
    if status is None:
        pytest.skip("this system keeps no high-water mark")
    import psutil

    room = status - psutil.Process().memory_info().rss
    size = room + 48 * MB
    with memory.peak_memory() as peak:
        del (block := touch(size))[:]
        del block
    assert peak.exact
    assert size - 2 * MB <= peak.bytes <= size + 16 * MB


def test_a_peak_below_an_earlier_one_is_sampled() -> None:
    touch(160 * MB)
    with memory.peak_memory() as peak:
        block = touch(64 * MB)
        time.sleep(0.05)
        del block
    assert not peak.exact
    assert 60 * MB <= peak.bytes <= 80 * MB


def test_nothing_allocated_is_nothing() -> None:
    with memory.peak_memory() as peak:
        pass
    assert 0 <= peak.bytes <= 4 * MB


def test_the_peak_is_known_after_an_exception() -> None:
    def work() -> None:
        block = touch(64 * MB)
        time.sleep(0.05)
        raise KeyError(len(block))

    touch(160 * MB)
    with pytest.raises(KeyError), memory.peak_memory() as peak:
        work()
    assert peak.bytes >= 60 * MB


def test_fresh_process_counts_above_its_imports() -> None:
    setup = "import json\nballast = bytearray(b'x') * (64 * 2**20)\nprint('noise')"
    run = "block = bytearray(b'x') * int(arguments[0])\nprint('more noise', flush=True)"
    found = memory.run_memory(setup, run, [str(32 * MB)], timeout=60)
    assert 31 * MB <= found <= 40 * MB


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("raise ValueError('no such model')", "no such model"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "signal 9"),
    ],
)
def test_a_process_that_fails_says_why(run: str, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        memory.run_memory("", run, timeout=60)


def test_a_process_that_hangs_is_ended() -> None:
    with pytest.raises(TargetError, match="longer than 1 s"):
        memory.run_memory("", "import time; time.sleep(60)", timeout=1)
