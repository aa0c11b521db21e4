from __future__ import annotations

import pytest

from bitport.progress import NullProgress, Progress


def test_the_silent_listener_follows_the_protocol(capsys: pytest.CaptureFixture[str]) -> None:
    progress: Progress = NullProgress()
    with progress.task("calibrate", total=2) as outer, progress.task("unknown length") as inner:
        outer.advance()
        inner.advance(5)
    with pytest.raises(KeyError), progress.task("fails"):
        raise KeyError("passes through")
    assert capsys.readouterr() == ("", "")
