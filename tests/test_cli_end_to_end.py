"""The six commands on a network and data of one's own module, as a user types them."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tests import small
from tests.commands import document, run

import bitport

MODULE = """
import torch
from tests import small
from tests.commands import document, run

def net(): return small.tiny(), small.patterns(1)[0]
def data():
    print("a loader that prints")
    return small.calibration()
def judged(): return small.evaluation()
class Zoo:
    @staticmethod
    def pair(): return small.two_inputs(), {"x": torch.zeros(1, 6), "z": torch.zeros(1, 4)}
def pairs(): return small.pairs()
"""
NULL = ("--target", "null", "--recipe", "int8", "--data", "my_net:data")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_net.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    small.quick(monkeypatch)
    return tmp_path


# --------------------------------------------------------------------------------------------- as a process


def test_compress_as_a_process_writes_one_document_and_prints_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "my_net.py").write_text(MODULE)
    command = [sys.executable, "-m", "bitport", "compress", "my_net:net", *NULL, "--out", "out", "--json"]
    done = subprocess.run(
        command, cwd=tmp_path, env=small.process_environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record == bitport.Artifact.load(tmp_path / "out").measurements.record
    # quiet when not a terminal: only what the user's own code printed
    assert set(done.stderr.split("\n")) == {"a loader that prints", ""}


def test_on_a_terminal_it_draws_bars_and_then_the_summary(tmp_path: Path) -> None:
    (tmp_path / "my_net.py").write_text(MODULE)
    command = [
        sys.executable,
        "-m",
        "bitport",
        "compress",
        "my_net:net",
        "--target",
        "null",
        "--recipe",
        "int8",
    ]
    command += ["--data", "my_net:judged", "--eval", "my_net:judged", "--max-drop", "0.2", "--out", "out"]
    code, text = in_terminal(command, tmp_path)
    assert code == 0, text
    lines = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line).rstrip() for line in re.split(r"[\r\n]+", text)]
    assert any("load my_net:net" in line for line in lines)
    assert any("calibrating" in line for line in lines)
    final = [line for line in lines if line.strip()]
    assert any(line.startswith("✓ int8 on null keeps top-1 within") for line in final)
    assert any(line.split() == ["report", "out/report.html"] for line in final)
    assert any("note" in line and "64 samples of the calibration data are in" in line for line in final)
    assert max(len(line) for line in final) <= 100
    assert not any("?" in line for line in final)  # bars without an end are not drawn


def in_terminal(command: list[str], folder: Path) -> tuple[int, str]:
    """(exit code, everything that was written) in a terminal of 100 × 40."""
    import fcntl
    import struct
    import termios

    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    environment = small.process_environment(TERM="xterm-256color", COLUMNS="100", LINES="40")
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdin=slave, stdout=slave, stderr=slave, close_fds=True
    )
    os.close(slave)
    written = b""
    while process.poll() is None or select.select([master], [], [], 0.1)[0]:
        if select.select([master], [], [], 0.1)[0]:
            try:
                piece = os.read(master, 65536)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            written += piece
    os.close(master)
    return process.wait(timeout=60), written.decode(errors="replace")


# --------------------------------------------------------------------------------------------- the commands


def test_the_whole_journey(here: Path) -> None:
    forecast = document("inspect", "my_net:net", "--target", "onnxruntime")
    assert forecast["totals"]["mac_share"] == 1.0
    assert "stem" in {row["name"] for row in forecast["layers"]}

    options = ("--eval", "my_net:judged", "--metric", "top1", "--max-drop", "0.2", "--effort", "balanced")
    arguments = ("--target", "onnxruntime", "--recipe", "int8", "--data", "my_net:data", *options)
    done = run("compress", "my_net:net", *arguments, "--out", "out/deep")
    assert "✓ int8 on onnxruntime keeps top-1 within" in done.stdout
    assert "out/deep/report.html" in done.stdout
    folder = here / "out" / "deep"
    artifact = bitport.Artifact.load(folder)
    assert [step.use for step in artifact.recipe.steps][-1] == "correct_bias"
    assert artifact.measurements["task.metric"] == "top1"

    record = document("verify", "out/deep", "--data", "my_net:judged")
    assert record["task"]["runtime"] == artifact.measurements["task.runtime"]
    assert record["task"]["verdict"] == "holds"
    moved = document("verify", "out/deep", "--target", "null")
    assert moved["target"] == "null"

    (folder / "report.html").unlink()
    assert run("report", "out/deep").stdout == "out/deep/report.html\n"
    assert (folder / "report.html").is_file()
    assert document("report", "out/deep") == {"report": "out/deep/report.html"}

    again = document("inspect", "out/deep")
    assert again["totals"]["macs"] == forecast["totals"]["macs"]


def test_a_missed_gate_shows_where_the_result_lies(here: Path) -> None:
    arguments = (
        "compress",
        "my_net:net",
        *NULL,
        "--eval",
        "my_net:judged",
        "--max-drop",
        "0.001",
        "--out",
        "out",
    )
    done = run(*arguments, code=3)
    assert done.stderr == "a loader that prints\ngate missed: the result is in out.rejected\n"
    assert "? undecided: int8 on null loses 0.00 points of top-1 on 64 samples" in " ".join(
        done.stdout.split()
    )
    assert "report       out.rejected/report.html" in done.stdout
    assert document(*arguments, code=3)["task"]["verdict"] == "undecided"
    # the same data again, and the artifact that was rejected stays so
    assert (
        document("verify", "out.rejected", "--data", "my_net:judged", code=3)["task"]["verdict"]
        == "undecided"
    )


def test_a_wrong_name_is_told_before_the_network_is_loaded(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitport.api.load", lambda *_: pytest.fail("the network was loaded"))
    options = ("--recipe", "int8", "--data", "my_net:data", "--out", "out")
    found = document("compress", "my_net:net", "--target", "nul", *options, code=1)["error"]
    assert "Did you mean 'null'" in found["message"]


def test_several_inputs_and_outputs(here: Path) -> None:
    arguments = (
        "--target",
        "null",
        "--recipe",
        "int8",
        "--data",
        "my_net:pairs",
        "--metric",
        "mse",
        "--out",
        "out",
    )
    record = document("compress", "my_net:Zoo.pair", *arguments)
    assert record["task"]["metric"] == "mse"
    np.savez(here / "pairs.npz", x=np.zeros((8, 6), np.float32), z=np.ones((8, 4), np.float32))
    assert document("verify", "out", "--data", "pairs.npz")["task"]["metric"] == "mse"
    np.savez(here / "wrong.npz", x=np.zeros((8, 6), np.float32))
    found = document("verify", "out", "--data", "wrong.npz", code=1)["error"]
    assert found["type"] == "DataError"
    assert "'x', 'z'" in found["message"]
    assert document("inspect", "my_net:Zoo.pair")["totals"]["parameters"] > 0


def test_npz_data(here: Path) -> None:
    x, y = small.patterns(64, seed=2)
    np.savez(here / "calibration.npz", x=x[:32].numpy())
    np.savez(here / "test.npz", x=x.numpy(), y=y.numpy())
    files = ("--data", "calibration.npz", "--eval", "test.npz", "--max-drop", "0.2")
    record = document(
        "compress", "my_net:net", "--target", "null", "--recipe", "int8", *files, "--out", "out"
    )
    assert record["task"]["metric"] == "top1"
    assert record["task"]["samples"] == 64
    assert record["task"]["verdict"] == "holds"
    expected = (small.tiny()(x).argmax(1) == y).double().mean()
    assert record["task"]["float"] == pytest.approx(float(expected))
    assert document("verify", "out", "--data", "test.npz")["task"]["runtime"] == record["task"]["runtime"]


RECIPE = """
schema = 1
[[steps]]
use = "quantize"
[preprocessing]
color = "gray"
size = [8, 8]
mean = [0.25]
std = [0.5]
"""


def test_a_folder_of_images(here: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    x, y = small.patterns(48, seed=2)
    raw = (x[:, 0].clamp(0, 1) * 255).round().byte().numpy()
    for index, label in enumerate(y.tolist()):
        folder = here / "photos" / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        image.fromarray(raw[index]).save(folder / f"{index:03}.png")
    (here / "mine.toml").write_text(RECIPE)
    files = ("--data", "photos", "--eval", "photos")
    record = document(
        "compress", "my_net:net", "--target", "null", "--recipe", "mine.toml", *files, "--out", "out"
    )
    assert record["task"]["metric"] == "top1"
    assert record["task"]["samples"] == 48
    normal = (torch.from_numpy(raw).float()[:, None] / 255 - 0.25) / 0.5
    expected = (small.tiny()(normal).argmax(1) == y).double().mean()
    assert record["task"]["float"] == pytest.approx(float(expected))
    assert any("48 samples of the calibration data are in the evaluation data" in n for n in record["notes"])
    # how images become inputs is stored with the artifact
    assert document("verify", "out", "--data", "photos")["task"]["float"] == record["task"]["float"]


@pytest.mark.parametrize(
    ("kind", "some"),
    [
        ("targets", {"null", "onnxruntime"}),
        ("recipes", {"float", "int8", "int8-minmax"}),
        ("steps", {"fold", "quantize", "calibrate", "correct_bias"}),
        ("formats", {"int8", "float32"}),
        ("ranges", {"minmax", "mse"}),
        ("criteria", set()),
    ],
)
def test_list(here: Path, kind: str, some: set[str]) -> None:
    found = document("list", kind)[kind]
    assert some <= set(found)
    assert all(entry["summary"] for entry in found.values())
    text = run("list", kind).stdout
    assert all(name in text for name in some)


def test_demo_calls_the_demo(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the demo itself has tests of its own; here only that the command runs it and shows what it made
    from bitport import demo

    def stands_in(out: Path, progress: object) -> bitport.Artifact:
        return small.compressed(out)

    monkeypatch.setattr(demo, "run", stands_in)
    done = run("demo", "--out", "out")
    assert "out/report.html" in done.stdout
    assert document("demo", "--out", "out")["target"] == "null"


def test_wrong_commands_say_how(here: Path) -> None:
    check: list[tuple[tuple[str, ...], str]] = [
        (("compress", "my_net:net"), "Missing option '--target'"),
        (("list", "colours"), "'colours' is not one of"),
        (("verify",), "Missing argument 'DIR'"),
        (("prove", "out"), "No such command 'prove'"),
    ]
    for words, message in check:
        done = run(*words, code=2)
        assert message in done.output
        assert "Usage: " in done.output


def test_errors_are_documents_too(here: Path) -> None:
    found = document("verify", "nowhere", code=1)
    assert found["error"]["type"] == "ArtifactError"
    assert "nowhere" in found["error"]["message"]
