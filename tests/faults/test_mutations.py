"""Each guard of `mutations.py` and its neighbours is there, and with it switched off its test fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.faults import (
    mutations,
    mutations_of_executorch,
    mutations_of_formats,
    mutations_of_frameworks,
    mutations_of_litert,
    mutations_of_onnx,
    mutations_of_openvino,
)
from tests.faults.mutations import Mutation
from tests.faults.test_table import ROOT, absent

MUTATIONS = (
    *mutations.MUTATIONS,
    *mutations_of_formats.MUTATIONS,
    *mutations_of_onnx.MUTATIONS,
    *mutations_of_openvino.MUTATIONS,
    *mutations_of_executorch.MUTATIONS,
    *mutations_of_litert.MUTATIONS,
    *mutations_of_frameworks.MUTATIONS,
)
PACKAGE = ROOT / "src" / "bitport"
FAILED = 1  # pytest: some test failed; other codes mean that it couldn't even run
NOT_THE_COPY = 99
RUN = f"""
import sys
import bitport
if not bitport.__file__.startswith(sys.argv[1]):
    sys.exit({NOT_THE_COPY})
import pytest
sys.exit(pytest.main(sys.argv[2:]))
"""


def test_guards_and_their_tests_are_there() -> None:
    assert len({item.guard for item in MUTATIONS}) == len(MUTATIONS)
    for item in MUTATIONS:
        assert (PACKAGE / item.file).read_text(encoding="utf-8").count(item.text) == 1, item.guard
        assert item.instead != item.text
        assert not absent(item.test), item.test


@pytest.mark.slow
@pytest.mark.parametrize("item", MUTATIONS, ids=lambda item: item.guard)
def test_without_the_guard_its_test_fails(tmp_path: Path, item: Mutation) -> None:
    copy = tmp_path / "src"
    shutil.copytree(PACKAGE, copy / "bitport", ignore=shutil.ignore_patterns("__pycache__"))
    place = copy / "bitport" / item.file
    place.write_text(place.read_text(encoding="utf-8").replace(item.text, item.instead), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    options = ["-q", "-x", "-p", "no:cacheprovider", "--timeout=120", f"--basetemp={tmp_path / 'temporary'}"]
    options += ["-m", ""]  # slow ones as well
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(copy), *options, item.test], cwd=ROOT, env=environment,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == FAILED, f"{item.guard}: {item.test} ended with {done.returncode}\n{done.stdout}"
