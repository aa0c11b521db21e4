"""Files of others are tried in another process: once, and not where nothing is at stake."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.flow import Net, Prepared, conv, images, prepare
from torch import nn
from torch.nn import functional as F

from bitport.errors import TargetError
from bitport.targets import _trial, executorch, litert
from bitport.targets._trial import tried, written

HERE = "tests.targets.test_trial"


TRIED = {"litert": ("LiteRT", litert), "executorch": ("ExecuTorch", executorch)}


def runs(path: str, count: str) -> None:
    """A probe that is content, and counts."""
    assert Path(path).read_bytes() == b"model"
    with Path(count).open("a") as file:
        file.write("x")


def says(path: str, count: str) -> None:
    raise TargetError(f"no {Path(path).name} today")


def dies(path: str, **_: object) -> None:
    """What these runtimes do with some files."""
    assert Path(path).is_file()
    os.kill(os.getpid(), signal.SIGSEGV)


def breaks(path: str, count: str) -> None:
    raise KeyError("inside")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(_trial, "_known", set[str]())
    path = tmp_path / "model.bin"
    path.write_bytes(b"model")
    yield path
    assert sorted(entry.name for entry in tmp_path.iterdir()) in (["count", "model.bin"], ["model.bin"])


def trial(path: Path, probe: str) -> int:
    """How often `runs` ran so far."""
    count = path.with_name("count")
    tried(path, f"{HERE}:{probe}", {"count": str(count)}, "The runtime")
    return len(count.read_text()) if count.exists() else 0


def test_once_for_the_same_bytes(model: Path) -> None:
    assert trial(model, "runs") == 1
    assert trial(model, "runs") == 1
    assert trial(model.rename(model.with_name("moved")), "runs") == 1
    model.with_name("moved").rename(model)


def test_not_what_was_written_here(model: Path) -> None:
    written(model)
    assert trial(model, "dies") == 0
    model.write_bytes(b"other")
    with pytest.raises(TargetError):
        trial(model, "dies")
    model.write_bytes(b"model")


@pytest.mark.parametrize(
    ("probe", "told"),
    [
        ("says", r"^no model\.bin today$"),
        ("dies", r"^The runtime can't run model\.bin: .* signal 11 .*; make the artifact again$"),
        ("breaks", r"^The runtime can't run model\.bin: .*inside.*; make the artifact again$"),
    ],
)
def test_what_goes_wrong_is_told_each_time(probe: str, told: str, model: Path) -> None:
    for _ in range(2):
        with pytest.raises(TargetError, match=told):
            trial(model, probe)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"The runtime can't load nothing\.bin: No such file"):
        trial(tmp_path / "nothing.bin", "runs")


def test_a_process_that_may_end_tries_nothing(model: Path) -> None:
    code = (
        "from pathlib import Path; from bitport.targets import _trial; _trial.expendable(); "
        f"_trial.tried(Path({str(model)!r}), '{HERE}:dies', {{}}, 'The runtime')"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture(scope="module", params=TRIED)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Prepared, Path]:
    torch.manual_seed(0)
    net = Net(lambda m, x: m.b(F.relu(m.a(x)).mean((2, 3))), a=conv(), b=nn.Linear(8, 4))
    prepared, folder = prepare(net, [images(4)], request.param), tmp_path_factory.mktemp(request.param)
    prepared.target.export(prepared.work, prepared.plan, folder)
    return prepared, folder


def test_a_file_that_ends_the_process_ends_another_one(
    exported: tuple[Prepared, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, folder = exported
    runtime, package = TRIED[prepared.target.name]
    monkeypatch.setattr(package._target, "PROBE", f"{HERE}:dies")
    prepared.target.open(folder)  # written here: not tried
    monkeypatch.setattr(_trial, "_known", set[str]())
    told = rf"{runtime} can't run {prepared.target.model_file}: .* signal 11 .*; make the artifact again"
    with pytest.raises(TargetError, match=told):
        prepared.target.open(folder)
    if package is executorch:  # which inspects a file by loading it
        with pytest.raises(TargetError, match=told):
            prepared.target.inspect(folder, prepared.plan)


def test_a_file_from_elsewhere_is_tried_once(
    exported: tuple[Prepared, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, folder = exported
    monkeypatch.setattr(_trial, "_known", set[str]())
    x = images(3)
    (first,) = prepared.target.open(folder).run((x,))
    monkeypatch.setattr(TRIED[prepared.target.name][1]._target, "PROBE", f"{HERE}:dies")
    (second,) = prepared.target.open(folder).run((x,))
    assert torch.equal(first, second)
