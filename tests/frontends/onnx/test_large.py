"""Large files: how long they take, and how much memory, in processes that have loaded what is imported once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tests.frontends.onnx.made import model

LAYERS = 4
CODE = """
import json, sys, time
import bitport
from bitport.proof.memory import peak_memory
bitport.load(sys.argv[1])
started = time.monotonic()
with peak_memory() as peak:
    graph = bitport.load(sys.argv[2])
count = sum(p.numel() for p in graph.gm.parameters())
print(json.dumps({"seconds": time.monotonic() - started, "bytes": peak.bytes, "numbers": count}))
"""


def products(folder: Path, size: int, *, external: bool, layers: int = LAYERS) -> Path:
    """A chain of products [size, size], with zeros as weights; those outside take no room on the disk."""
    names = ["x", *(f"h{index}" for index in range(layers - 1)), "y"]
    nodes = [helper.make_node("MatMul", [names[i], f"l{i}.weight"], [names[i + 1]]) for i in range(layers)]
    proto = model(nodes, shape=("batch", size))
    for index in range(layers):
        tensor = proto.graph.initializer.add(
            name=f"l{index}.weight", data_type=TensorProto.FLOAT, dims=[size, size]
        )
        if external:
            tensor.data_location = TensorProto.EXTERNAL
            where = {"location": "net.data", "offset": index * size * size * 4, "length": size * size * 4}
            for key, value in where.items():
                tensor.external_data.add(key=key, value=str(value))
        else:
            tensor.raw_data = np.zeros((size, size), np.float32).tobytes()
    folder.mkdir()
    if external:
        (folder / "net.data").touch()
        os.truncate(folder / "net.data", layers * size * size * 4)
    path = folder / "net.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def loaded(path: Path, folder: Path) -> dict[str, Any]:
    small = products(folder / "small", 8, external=False)
    command = [sys.executable, "-W", "ignore", "-c", CODE, str(small), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(("external", "layers"), [(False, 4), (True, 1)], ids=["inside", "external"])
def test_100_mb_take_less_than_two_and_a_half_times_as_much(
    external: bool, layers: int, tmp_path: Path
) -> None:
    size = int((25e6 / layers) ** 0.5)
    found = loaded(products(tmp_path / "net", size, external=external, layers=layers), tmp_path)
    assert found["numbers"] == layers * size * size
    assert found["bytes"] < 2.5 * 1e8
    assert found["seconds"] < 10  # 1 on an idle machine


@pytest.mark.slow
def test_more_than_2_gb_are_read(tmp_path: Path) -> None:
    size = 23500
    found = loaded(products(tmp_path / "net", size // 2, external=True), tmp_path)
    total = LAYERS * (size // 2) ** 2
    assert total * 4 > 2**31 and found["numbers"] == total
    assert found["bytes"] < 2.5 * total * 4


def test_a_file_that_protobuf_could_not_hold_is_refused_unread(tmp_path: Path) -> None:
    from bitport.errors import LoadError
    from bitport.frontends.onnx import load_onnx

    path = tmp_path / "net.onnx"
    path.touch()
    os.truncate(path, 2**40)
    with pytest.raises(LoadError, match="larger than 2 GB: save the model again, with external data"):
        load_onnx(path)


def test_external_data_that_no_memory_holds_is_refused_unread(tmp_path: Path) -> None:
    from bitport.errors import NotEnoughMemory
    from bitport.frontends.onnx import load_onnx

    path = products(tmp_path / "net", 8, external=True, layers=1)
    proto = onnx.ModelProto.FromString(path.read_bytes())
    proto.graph.initializer[0].dims[:] = [2**19, 2**19]
    proto.graph.initializer[0].external_data[2].value = str(2**40)
    path.write_bytes(proto.SerializeToString())
    os.truncate(path.parent / "net.data", 2**40)
    with pytest.raises(NotEnoughMemory, match=r"external data takes 1099\.5 GB"):
        load_onnx(path)
