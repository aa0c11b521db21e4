"""Random models, in processes of their own: no crash, no hang, no error but bitport's, bounded memory."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

LONG = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize("kind", ["onnx", "keras", "tflite"])
@pytest.mark.parametrize(("seed", "seconds"), [(0, 10), pytest.param(1, 240, marks=LONG)])
def test_whatever_happens_to_a_file_is_told(kind: str, seed: int, seconds: int, tmp_path: Path) -> None:
    fuzzed(kind, tmp_path, seed, seconds)


@pytest.mark.parametrize(
    ("target", "seed", "seconds"),
    [
        ("onnxruntime", 0, 10),
        ("openvino", 0, 10),
        *(
            pytest.param(name, 1, 240, marks=LONG)
            for name in ("onnxruntime", "openvino", "litert", "executorch")
        ),
    ],
)
def test_whatever_happens_to_a_model_file_is_told(
    target: str, seed: int, seconds: int, tmp_path: Path
) -> None:
    fuzzed("artifact", tmp_path, seed, seconds, target)


def fuzzed(kind: str, folder: Path, seed: int, seconds: int, *more: str) -> None:
    command = [sys.executable, "-W", "ignore", "-m", f"tests.faults.fuzzing_{kind}"]
    done = subprocess.run(
        [*command, str(folder), str(seed), str(seconds), *more],
        capture_output=True,
        text=True,
        timeout=seconds + 120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    found = re.fullmatch(r"loaded (\d+) refused (\d+) peak (\d+) MB\n", done.stdout)
    assert found is not None, done.stdout
    loaded, refused, peak = map(int, found.groups())
    assert loaded > 0 and refused > 0, "some changes matter, some don't"
    assert peak < 3000
