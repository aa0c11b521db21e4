"""What is special about ExecuTorch: taps by another export, batches in parts, its files, its errors."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.flow import Net, Prepared, assert_exact, conv, images, prepare, ship, tokens
from torch import nn
from torch.nn import functional as F

import bitport
from bitport.errors import ExportError, RecipeError, TargetError
from bitport.numerics.arithmetic import QTensor
from bitport.plan import Plan
from bitport.targets.executorch import ExecuTorch, _target
from bitport.targets.executorch.arithmetic import stored_bias

Linear = nn.Linear
DYNAMIC = {"dynamic": True}


def digits() -> nn.Module:
    torch.manual_seed(0)
    return Net(
        lambda m, x: m.c(F.adaptive_avg_pool2d(F.relu(m.b(F.relu(m.a(x)))), 1).flatten(1)),
        a=conv(), b=conv(8, 16), c=Linear(16, 4),
    )  # fmt: skip


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    torch.manual_seed(0)
    return prepare(digits(), [images(8)], "executorch")


@pytest.fixture(scope="module")
def folder(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("executorch")
    prepared.target.export(prepared.work, prepared.plan, found)
    return found


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> bitport.Artifact:
    graph, data = bitport.load(digits(), images(4)), [images(16) for _ in range(2)]
    out = tmp_path_factory.mktemp("compressed") / "out"
    return bitport.compress(graph, "int8", target="executorch", data=data, out=out, effort="plain")


def test_from_the_recipe_to_the_measured_artifact(compressed: bitport.Artifact) -> None:
    found = compressed.measurements
    assert found["integer"]["mac_share"] == 1.0 and found["integer"]["float_ops"] == []
    assert found["parity"]["exact_share"] == 1.0 and found["parity"]["max_steps"] == 0
    assert found["parity"]["watched_db"] is None  # the outputs under taps are the file's own
    assert found["optimizer"] is None and "as it is written" in found["optimizer_reason"]
    assert {path.name for path in compressed.path.glob("model.*")} == {"model.pte"}
    assert found["size"]["compressed_bytes"] == (compressed.path / "model.pte").stat().st_size
    x = images(3)
    assert torch.equal(compressed.predict(x), bitport.Artifact.load(compressed.path).predict(x))


def test_its_script_runs_alone(compressed: bitport.Artifact) -> None:
    command = [sys.executable, "-W", "error::SyntaxWarning", str(compressed.path / "run.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "100.00 % equal" in done.stdout, done.stdout + done.stderr
    assert "bitport" not in (compressed.path / "run.py").read_text().partition("class Network")[2]


def test_files_are_the_same_to_the_byte_and_tell_nothing_of_the_machine(
    prepared: Prepared, folder: Path, tmp_path: Path
) -> None:
    prepared.target.export(prepared.work, prepared.plan, tmp_path)
    first, second = ((place / "model.pte").read_bytes() for place in (folder, tmp_path))
    assert first == second
    for trace in (str(tmp_path), str(Path(bitport.__file__).parent), sys.prefix, str(Path.cwd())):
        assert trace.encode() not in first


def test_the_file_tells_which_kernels_run(prepared: Prepared, folder: Path) -> None:
    inspection = prepared.target.inspect(folder, prepared.plan)
    assert not inspection.missed
    assert inspection.kernels["a"] == ("Conv2d qs8",)
    assert inspection.kernels["adaptive_avg_pool2d"] == ("GlobalAvgPooling2d qs8",)
    assert inspection.kernels["c"] == ("FullyConnected qs8",)
    assert inspection.counts["Convert"] == 2  # the input and the output: one graph holds the rest
    assert "Convert" not in inspection.integer and "Conv2d qs8" in inspection.integer


def test_an_integer_layer_that_runs_in_float_is_told(prepared: Prepared, tmp_path: Path) -> None:
    prepared.target.export(prepared.work, Plan.empty("executorch"), tmp_path)
    missed = prepared.target.inspect(tmp_path, prepared.plan).missed
    assert set(missed) == {"a", "b", "c", "adaptive_avg_pool2d"}
    assert missed["a"] == "XNNPACK does not run it as Conv2d qs8: it runs as Conv2d f32"
    x = images(5)
    (found,), (wanted,) = prepared.target.open(tmp_path).run((x,)), prepared.work.run(x)
    assert torch.allclose(found, wanted, atol=1e-5)


def test_large_batches_go_through_in_parts(prepared: Prepared, folder: Path) -> None:
    x = images(150)
    session = prepared.target.open(folder)
    (whole,), (part,) = session.run((x,)), session.run((x[100:101],))
    assert torch.equal(whole, prepared.simulator().run((x,))[0])
    assert torch.equal(part, whole[100:101])


@pytest.mark.parametrize(
    ("shape", "told"),
    [((2, 5, 8, 8), r"\(2, 5, 8, 8\)"), ((2, 3, 8), r"\(2, 3, 8\)"), ((2, 3, 8, 9), r"\(2, 3, 8, 9\)")],
)
def test_inputs_of_another_shape(shape: tuple[int, ...], told: str, prepared: Prepared, folder: Path) -> None:
    with pytest.raises(
        TargetError, match=rf"input 'x' has shape {told}; the file takes \[up to 64, 3, 8, 8\]"
    ):
        prepared.target.open(folder).run((torch.zeros(shape),))


def test_an_input_is_read_by_its_memory(prepared: Prepared, folder: Path) -> None:
    x = images(4)
    session = prepared.target.open(folder)
    strided = x.to(memory_format=torch.channels_last)
    assert torch.equal(session.run((strided,))[0], session.run((x,))[0])


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"junk" + b])
def test_a_damaged_file(
    damage: Callable[[bytes], bytes], prepared: Prepared, folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.pte"
    path.write_bytes(damage((folder / "model.pte").read_bytes()))
    with pytest.raises(TargetError, match=r"can't load model\.pte"):
        prepared.target.open(tmp_path)


def test_a_file_that_is_not_there(prepared: Prepared, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"can't load model\.pte"):
        prepared.target.open(tmp_path)


NOTE: dict[str, Any] = {
    "inputs": [["x", [None, 3], [64, None]]], "taps": [], "batch": 64, "delegated": {}, "left": {},
}  # fmt: skip


@pytest.mark.parametrize(
    "note",
    [None, [], {}, *({**NOTE, key: "x"} for key in NOTE), *({**NOTE, "inputs": [entry]} for entry in (
        "x", ["x"], ["x", [1], 2], [1, [1], [1]], ["x", [1], [1, 2]], ["x", ["a"], [1]], ["x", [True], [1]]))],
)  # fmt: skip
def test_a_note_that_bitport_did_not_write(note: Any) -> None:
    assert _target._read_note(json.dumps(NOTE)) == NOTE
    for text in (json.dumps(note), note):
        with pytest.raises(ValueError, match="'bitport' doesn't tell what bitport's exporter wrote there"):
            _target._read_note(text)


def test_a_network_that_it_refuses(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("Missing out variants: {'such::operator'}\nand more")

    monkeypatch.setattr("executorch.exir.to_edge_transform_and_lower", refuse)
    with pytest.raises(ExportError, match="ExecuTorch refused the network: Missing out variants"):
        prepared.target.export(prepared.work, prepared.plan, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["threads", "batch", "length"])
def test_options(option: str) -> None:
    with pytest.raises(RecipeError, match=f"{option} = 0: at least 1"):
        ExecuTorch({option: 0})


def test_one_pool_of_threads_for_the_process(prepared: Prepared, folder: Path) -> None:
    session = prepared.target.open(folder)
    with pytest.raises(TargetError, match="one pool of threads for the process"):
        ExecuTorch({"threads": 2}).open(folder)
    assert session.run((images(1),))


# ------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("scale", [0.25, 3e-5])
def test_biases_are_rounded_again_to_the_same_integers(scale: float) -> None:
    q = torch.randint(-(2**22), 2**22, (5000,), dtype=torch.int32)
    zero = torch.zeros((), dtype=torch.int32)
    bias = QTensor(q, torch.tensor(scale), zero, -(2**31), 2**31 - 1)
    assert torch.equal(stored_bias(bias).q, q)
    channels = QTensor(q, torch.rand(5000) * scale + 1e-9, zero.expand(5000), -(2**31), 2**31 - 1, 0)
    assert torch.equal(stored_bias(channels).q, q)


def test_the_largest_biases_do_not_wrap() -> None:
    ends = torch.tensor([-(2**31), 2**31 - 1, 2**31 - 1], dtype=torch.int32)
    zeros = torch.zeros(3, dtype=torch.int32)
    stored = stored_bias(QTensor(ends, torch.tensor([1e-30, 0.1, 7e-12]), zeros, -(2**31), 2**31 - 1, 0)).q
    assert stored[0] < -(2**30) and bool((stored[1:] > 2**30).all())


@pytest.mark.parametrize(
    ("weights", "activations"),
    [
        pytest.param({}, {"format": "int4"}, id="int4-activations"),
        pytest.param({"format": "int4"}, {}, id="int4-weights", marks=pytest.mark.slow),
        pytest.param({"granularity": "tensor"}, {"symmetric": True}, id="tensor", marks=pytest.mark.slow),
    ],
)
def test_narrow_formats_are_carried_in_8_bits(weights: dict[str, Any], activations: dict[str, Any]) -> None:
    torch.manual_seed(1)
    net = Net(
        lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))) + m.d(x))), a=conv(), b=conv(8, 8), c=conv(8, 4), d=conv()
    )
    found = prepare(net, [images(8)], "executorch", weights=weights, activations=activations)
    assert_exact(ship(found, images(16)))


@pytest.mark.parametrize(
    ("weights", "bits"),
    [
        pytest.param({}, 8, id="int8"),
        pytest.param({"format": "int4", "granularity": "group", "group": 32}, 4, id="groups"),
        pytest.param({"format": "int4"}, 4, id="int4", marks=pytest.mark.slow),
        pytest.param({"format": "int6"}, 8, id="int6", marks=pytest.mark.slow),
    ],
)
def test_ranges_taken_while_running(weights: dict[str, Any], bits: int, tmp_path: Path) -> None:
    torch.manual_seed(2)
    net = Net(lambda m, x: m.b(F.relu(m.a(x))), a=Linear(128, 256), b=Linear(256, 64, bias=False))
    found = prepare(net, [torch.randn(8, 128)], "executorch", weights=weights, activations=DYNAMIC)
    x = torch.randn(8, 128) * torch.logspace(-3, 3, 8)[:, None]
    found.target.export(found.work, found.plan, tmp_path)
    inspection = found.target.inspect(tmp_path, found.plan)
    assert not inspection.missed and inspection.counts["FullyConnected qd8"] == 2
    (got,), (wanted,) = found.target.open(tmp_path).run((x,)), found.simulator().run((x,))
    apart = (got - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert float(apart.max()) <= (1e-3 if "group" in weights else 1e-6)
    values, group = 128 * 256 + 256 * 64, weights.get("group")
    scales = 2 * values // group if group else 4 * (256 + 64)
    assert (tmp_path / "model.pte").stat().st_size <= values * bits // 8 + scales + 4 * 256 + 8192


@pytest.mark.parametrize(
    ("weights", "activations", "told"),
    [
        ({"format": "int4", "granularity": "group", "group": 48}, DYNAMIC, "multiple of 32"),
        ({"format": "int8", "granularity": "group", "group": 32}, DYNAMIC, "groups of 4-bit weights only"),
        ({"granularity": "tensor"}, DYNAMIC, "scale per tensor"),
        ({"format": "int8"}, {"format": "float32"}, "executorch"),
        ({}, {"format": "int16"}, "int16"),
        ({"symmetric": False}, {}, "not symmetric"),
    ],
)
def test_what_it_has_no_kernels_for_is_refused(
    weights: dict[str, Any], activations: dict[str, Any], told: str
) -> None:
    net = Net(lambda m, x: m.a(x), a=Linear(96, 8))
    with pytest.raises((RecipeError, TargetError), match=told):
        prepare(net, [torch.randn(8, 96)], "executorch", weights=weights, activations=activations)


@pytest.mark.slow
@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.b(m.a(x) + m.turned),  # its axes of one have strides as if they were elsewhere
        lambda m, x: m.b(torch.cat([m.first.expand(x.shape[0], -1, -1, -1), m.a(x)], 3)),
    ],
    ids=["strides", "moved-constant"],
)
def test_stored_tensors(function: Any) -> None:
    torch.manual_seed(0)
    net = Net(
        function, a=conv(), b=conv(8, 4), turned=torch.randn(1, 1, 1, 8).permute(0, 3, 1, 2),
        first=torch.randn(1, 8, 8, 1),
    )  # fmt: skip
    assert_exact(ship(prepare(net, [images(8)], "executorch"), images(4)))


@pytest.mark.slow
def test_what_stays_float_between_integers() -> None:
    torch.manual_seed(3)
    net = Net(
        lambda m, x: m.b(F.layer_norm(F.scaled_dot_product_attention(m.a(x), m.d(x), m.c(x)), (8,))),
        a=Linear(12, 8), b=Linear(8, 4), c=Linear(12, 8), d=Linear(12, 8),
    )  # fmt: skip
    shipped = ship(prepare(net, [tokens(16)], "executorch"), tokens(32))
    assert not shipped.inspection.missed
    local = shipped.parity.record()["local"]
    assert local["integers"] and local["max_steps"] <= 1 and local["exact_share"] >= 0.995


def test_the_note_in_the_file_is_plain(folder: Path, prepared: Prepared) -> None:
    session: Any = prepared.target.open(folder)
    assert json.loads(json.dumps(session.note))["inputs"] == [["x", [None, 3, 8, 8], [64, None, None, None]]]
