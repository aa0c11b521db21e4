"""What is special about OpenVINO: what it does unasked, its files, its errors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.flow import Net, assert_exact, conv, images, prepare, ship, tokens
from torch import Tensor, nn
from torch.nn import functional as F

import bitport
from bitport.errors import RecipeError, TargetError
from bitport.graph import Graph
from bitport.plan import Plan
from bitport.targets.openvino import OpenVino

Linear = nn.Linear
FLOAT = {"format": "float32"}


def digits() -> nn.Module:
    return Net(
        lambda m, x: m.c(F.adaptive_avg_pool2d(F.relu(m.b(F.relu(m.a(x)))), 1).flatten(1)),
        a=conv(), b=conv(8, 16), c=Linear(16, 4),
    )  # fmt: skip


def test_from_the_recipe_to_the_measured_artifact(tmp_path: Path) -> None:
    torch.manual_seed(0)
    graph = bitport.load(digits(), images(4))
    artifact = bitport.compress(
        graph,
        "int8",
        target="openvino",
        data=[images(16) for _ in range(2)],
        out=tmp_path / "out",
        effort="plain",
    )
    found = artifact.measurements
    assert found["integer"]["mac_share"] == 1.0
    assert found["parity"]["exact_share"] >= 0.999 and found["parity"]["max_steps"] <= 1
    assert {path.name for path in artifact.path.glob("model.*")} == {"model.xml", "model.bin"}
    assert found["size"]["compressed_bytes"] == sum(p.stat().st_size for p in artifact.path.glob("model.*"))
    x = images(3)
    assert torch.equal(artifact.predict(x), bitport.Artifact.load(artifact.path).predict(x))


def test_files_are_the_same_to_the_byte_and_tell_nothing_of_the_machine(tmp_path: Path) -> None:
    prepared = prepare(digits(), [images(8)], "openvino")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        prepared.target.export(prepared.work, prepared.plan, tmp_path / name)
    for file in ("model.xml", "model.bin"):
        first, second = (tmp_path / name / file for name in ("one", "two"))
        assert first.read_bytes() == second.read_bytes()
        assert str(tmp_path).encode() not in first.read_bytes()


def test_the_runtime_sees_the_names_of_the_network() -> None:
    shipped = ship(prepare(digits(), [images(8)], "openvino"), images(8))
    assert shipped.inspection.kernels["a"] == ("Convolution I8",)
    assert shipped.inspection.kernels["c"] == ("FullyConnected I8",)
    assert not shipped.inspection.missed


@pytest.mark.parametrize(
    "net",
    [
        Net(lambda m, x: m.b(F.relu(m.a(x)).transpose(1, 2)), a=Linear(12, 8), b=Linear(6, 4)),
        Net(lambda m, x: m.b(F.relu(m.a(x)).mean(1)), a=Linear(12, 8), b=Linear(8, 4)),
        Net(lambda m, x: m.b(F.relu(m.a(x)).mean(2)), a=Linear(12, 8), b=Linear(6, 4)),
        Net(lambda m, x: m.b(m.a(x).softmax(-1)), a=Linear(12, 8), b=Linear(8, 4)),
        Net(lambda m, x: m.b(torch.sigmoid(m.a(x)) * m.a(x)), a=Linear(12, 8), b=Linear(8, 4)),
        Net(lambda m, x: m.b(F.layer_norm(m.a(x), (8,))), a=Linear(12, 8), b=Linear(8, 4)),
        Net(
            lambda m, x: m.b(F.scaled_dot_product_attention(m.a(x), m.a(x), m.c(x))),
            a=Linear(12, 8), b=Linear(8, 4), c=Linear(12, 8),
        ),
    ],
    ids=["transpose", "mean-1", "mean-2", "softmax", "gate", "layer_norm", "attention"],
)  # fmt: skip
def test_what_stays_float_between_integers(net: nn.Module) -> None:
    # behind a transpose of integers it multiplies floats; it computes means of 8-bit tensors wrongly along some axes
    prepared = prepare(net, [tokens(16)], "openvino")
    shipped = ship(prepared, tokens(32))
    assert not shipped.inspection.missed
    assert shipped.inspection.counts["FullyConnected I8"] >= 2
    local = shipped.parity.record()["local"]
    assert local["integers"] and local["max_steps"] <= 1 and local["exact_share"] >= 0.999
    for a, b in zip(shipped.outputs, shipped.as_written, strict=True):
        assert float((a - b).abs().max()) <= 0.03 * float(b.abs().max())


def residual(function: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    """A convolution, what is between, a convolution."""
    return Net(
        lambda m, x: m.d(function(m, F.relu(m.a(x)))),
        a=conv(3, 16), b=conv(16, 16), c=conv(16, 16, 1), d=conv(16, 4, 1), depth=conv(16, 16, groups=16),
    )  # fmt: skip


@pytest.mark.parametrize(
    "function",
    [
        lambda m, y: F.relu(m.b(y) + y),
        lambda m, y: m.b(y) + m.c(y),
        lambda m, y: F.relu(m.b(y)) + m.c(y),
        lambda m, y: F.relu(m.depth(y) + y),
        lambda m, y: m.b(y) + y + m.c(y),
        lambda m, y: m.b(y) * m.c(y),
        lambda m, y: F.leaky_relu(m.b(y)) + y,
    ],
    ids=["identity", "two", "relu-before", "depthwise", "three", "gate", "leaky"],
)
def test_the_file_computes_what_it_computes_under_taps(function: Callable[[Any, Tensor], Tensor]) -> None:
    # without taps OpenVINO adds to a convolution's result before that is rounded
    prepared = prepare(residual(function), [images(16)], "openvino")
    x = images(32)
    shipped = ship(prepared, x)
    assert not shipped.inspection.missed and shipped.record["exact_share"] >= 0.9999
    for found, wanted in zip(shipped.outputs, prepared.simulator().run((x,)), strict=True):
        assert float(((found - wanted).abs() > 1e-5).float().mean()) <= 0.002


@pytest.mark.slow
def test_a_rounding_that_only_taps_bring_about_is_told(tmp_path: Path) -> None:
    # a plan for ONNX Runtime rounds a convolution's result before it is added; without taps OpenVINO doesn't
    torch.manual_seed(0)
    graph, data = (
        bitport.load(residual(lambda m, y: m.b(y) + m.c(y)), images(4)),
        [images(16) for _ in range(2)],
    )
    artifact = bitport.compress(
        graph, "int8", target="onnxruntime", data=data, out=tmp_path / "out", effort="plain"
    )
    assert artifact.measurements["parity.watched_db"] is None
    moved = bitport.verify(artifact.path, [images(32)], target="openvino")
    assert moved["parity.watched_db"] < 60
    assert any("without taps openvino gives other outputs" in note for note in moved["notes"])
    own = bitport.compress(graph, "int8", target="openvino", data=data, out=tmp_path / "own", effort="plain")
    assert own.measurements["parity.watched_db"] is None or own.measurements["parity.watched_db"] > 60


def test_what_is_computed_with_a_sum_is_not_rounded_and_said_so() -> None:
    plan = prepare(residual(lambda m, y: F.relu(m.b(y)) + m.c(y)), [images(16)], "openvino").plan
    assert plan.nodes["relu#2"].reason == "it is computed in one operator with what reads it"
    assert [edge.slot for edge in plan.edges if edge.consumer == "add"] == []
    assert plan.tie_of("b") is None and plan.tie_of("add") is not None


@pytest.mark.parametrize("activations", [{}, {"symmetric": True}, {"format": "int4"}])
def test_symmetric_and_narrow_activations(activations: dict[str, Any]) -> None:
    net = Net(lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))) + m.a(x))), a=conv(), b=conv(8, 8), c=conv(8, 4))
    assert_exact(ship(prepare(net, [images(8)], "openvino", activations=activations), images(16)))


@pytest.mark.parametrize(("kernel", "runs"), [(15, True), (16, False), (32, False)])
def test_long_kernels_in_groups_stay_float(kernel: int, runs: bool) -> None:
    # OpenVINO 2026.4 is wrong there by more than the largest output, where the processor has AMX
    net = Net(lambda m, x: m.a(x), a=nn.Conv1d(32, 32, kernel, groups=4))
    if not runs:
        with pytest.raises(RecipeError, match="kernels 16 and longer wrongly in 8 bits"):
            prepare(net, [torch.randn(8, 32, 40)], "openvino")
        return
    prepared = prepare(net, [torch.randn(8, 32, 40)], "openvino")
    x = torch.randn(8, 32, 40)
    (found,), (wanted,) = ship(prepared, x).outputs, prepared.simulator().run((x,))
    assert torch.allclose(found, wanted, atol=1e-5)


# ------------------------------------------------------------------------------------- weights


def packed(fmt: str, group: int) -> dict[str, Any]:
    return {"format": fmt, "granularity": "group", "group": group} if group else {"format": fmt}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "bits"),
    [
        ({"format": "int4", "granularity": "group", "group": 32}, 4),
        ({"format": "int4", "granularity": "group", "group": 32, "symmetric": False}, 4),
        ({"format": "int4"}, 4),
        ({"format": "int3", "granularity": "group", "group": 32, "symmetric": False}, 4),
        ({"format": "uint4", "granularity": "group", "group": 32, "symmetric": False}, 4),
        ({"format": "int4", "granularity": "group", "group": 48}, 4),
        ({"format": "int6", "granularity": "group", "group": 32}, 8),
        ({"format": "int8"}, 8),
        ({"format": "float16"}, 16),
        ({"format": "bfloat16"}, 16),
    ],
)
def test_narrow_weights_are_narrow_in_the_file(weights: dict[str, Any], bits: int, tmp_path: Path) -> None:
    net = Net(lambda m, x: m.b(F.relu(m.a(x))), a=Linear(128, 256), b=Linear(256, 64))
    prepared = prepare(net, [torch.randn(8, 128)], "openvino", weights=weights, activations=FLOAT)
    shipped = ship(prepared, torch.randn(8, 128))
    assert not shipped.inspection.missed
    assert shipped.parity.float_max_error <= 1e-5
    prepared.target.export(prepared.work, prepared.plan, tmp_path)
    values, group = 128 * 256 + 256 * 64, weights.get("group")
    stored = values * 144 // 128 if group == 48 else values  # whole groups
    scales = -(-stored // group) if group else 256 + 64
    assert (tmp_path / "model.bin").stat().st_size <= stored * bits // 8 + 5 * scales + 4 * (256 + 64) + 2048


def test_small_floats_are_refused() -> None:
    with pytest.raises(RecipeError, match="OpenVINO stores no e4m3"):
        prepare(
            Net(lambda m, x: m.a(x), a=Linear(32, 8)), [torch.randn(8, 32)], "openvino",
            weights={"format": "e4m3"}, activations=FLOAT,
        )  # fmt: skip


def test_a_table_that_two_layers_share_is_stored_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(64, 32)
            self.head = nn.Linear(32, 64, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.head(F.relu(self.table(x)))
            return result

    ids = torch.randint(0, 64, (8, 5))
    prepared = prepare(Tied(), [ids], "openvino", weights=packed("int4", 16), activations=FLOAT)
    shipped = ship(prepared, ids)
    assert not shipped.inspection.missed and shipped.parity.float_max_error <= 1e-6
    prepared.target.export(prepared.work, prepared.plan, tmp_path)
    assert (tmp_path / "model.bin").stat().st_size <= 64 * 32 // 2 + 64 * 2 * 5 + 2048


def test_a_weight_that_is_wide_in_the_file_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitport.targets.openvino._target.narrow", lambda *_: None)
    prepared = prepare(
        Net(lambda m, x: m.a(x), a=Linear(32, 8)), [torch.randn(8, 32)], "openvino",
        weights=packed("int4", 16), activations=FLOAT,
    )  # fmt: skip
    assert "takes 8 bits in the file, not 4" in ship(prepared, torch.randn(8, 32)).inspection.missed["a"]


def test_an_integer_layer_that_runs_in_float_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    right = OpenVino._compiled

    def as_written(target: OpenVino, folder: Path, **_: Any) -> Any:
        return right(target, folder, taps=True, lowered=False)

    monkeypatch.setattr(OpenVino, "_compiled", as_written)
    missed = ship(prepare(digits(), [images(8)], "openvino"), images(8)).inspection.missed
    assert set(missed) == {"a", "b", "c"}
    assert "did not run it as Convolution I8" in missed["a"]


# ------------------------------------------------------------------------------------- errors

SIGNALLED = """
import gc, os, signal, sys
from pathlib import Path
from bitport.targets.openvino import OpenVino

signal.signal(signal.SIGINT, lambda *_: print("answered"))
sessions = [OpenVino().open(Path(sys.argv[1])) for _ in range(2)]
while sessions:
    sessions.pop(0)
    gc.collect()
os.kill(os.getpid(), signal.SIGINT)
"""


@pytest.mark.slow
def test_a_signal_behind_closed_sessions_does_not_end_the_process(tmp_path: Path) -> None:
    prepared = prepare(digits(), [images(8)], "openvino")
    prepared.target.export(prepared.work, prepared.plan, tmp_path)
    command = [sys.executable, "-c", SIGNALLED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "answered\n"), done.stderr


def test_options() -> None:
    with pytest.raises(RecipeError, match="threads = 0: at least 1"):
        OpenVino({"threads": 0})


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"<net>" + b])
def test_a_damaged_file(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    prepared = prepare(digits(), [images(8)], "openvino")
    prepared.target.export(prepared.work, prepared.plan, tmp_path)
    path = tmp_path / "model.xml"
    path.write_bytes(damage(path.read_bytes()))
    for read in (prepared.target.open, lambda folder: prepared.target.inspect(folder, prepared.plan)):
        with pytest.raises(TargetError, match=r"can't load model\.xml"):
            read(tmp_path)


@pytest.mark.parametrize("damage", [
    lambda b: b.replace(b"<bitport>", b"<other>").replace(b"</bitport>", b"</other>"),
    lambda b: b.replace(b"rt_info", b"rt_\xff", 1),
])  # fmt: skip
def test_a_forged_file_is_refused(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    prepared = prepare(digits(), [images(8)], "openvino")
    prepared.target.export(prepared.work, prepared.plan, tmp_path)
    path = tmp_path / "model.xml"
    honest = path.read_bytes()
    path.write_bytes(damage(honest))
    assert path.read_bytes() != honest
    with pytest.raises(TargetError, match=r"can't load model\.xml"):
        prepared.target.inspect(tmp_path, prepared.plan)


def test_inputs_of_another_shape(tmp_path: Path) -> None:
    prepared = prepare(digits(), [images(8)], "openvino")
    prepared.target.export(prepared.work, prepared.plan, tmp_path)
    with pytest.raises(TargetError, match=r"input 'x' has shape \(2, 5, 8, 8\); the file takes \[\?,3,8,8\]"):
        prepared.target.open(tmp_path).run((images(2, channels=5),))


def test_a_network_that_it_refuses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such operator")

    prepared = prepare(digits(), [images(8)], "openvino")
    monkeypatch.setattr("openvino.save_model", refuse)
    with pytest.raises(bitport.BitportError, match="OpenVINO refused the network: no such operator"):
        prepared.target.export(prepared.work, prepared.plan, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_error_tells_what_not_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError(
            "Exception from src/core.cpp:84:\nCheck 'false' failed at x.cpp:1:\n-- AveragePool\nis too long"
        )

    prepared = prepare(digits(), [images(8)], "openvino")
    monkeypatch.setattr("openvino.save_model", refuse)
    with pytest.raises(bitport.BitportError, match="OpenVINO refused the network: AveragePool is too long"):
        prepared.target.export(prepared.work, prepared.plan, tmp_path)


def test_a_float_network_goes_through_as_it_is(tmp_path: Path) -> None:
    net, x = digits().eval(), images(8)
    graph: Graph = bitport.load(net, images(2))
    target = OpenVino()
    target.export(graph, Plan.empty("openvino"), tmp_path)
    (found,) = target.open(tmp_path).run((x,))
    with torch.no_grad():
        assert torch.allclose(found, net(x), atol=1e-5)


def test_casts_of_other_constants_stay() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = Linear(8, 8)
            self.register_buffer("gain", torch.arange(1, 9))

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.a(x * self.gain.float())
            return result

    shipped = ship(prepare(Scaled(), [torch.randn(8, 8)], "openvino"), torch.randn(8, 8))
    assert not shipped.inspection.missed


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False},
        {"kernel_size": 2},
        {"kernel_size": 5, "stride": 3, "ceil_mode": True},
    ],
)
def test_average_pools_round_as_it_does(options: dict[str, Any]) -> None:
    for seed in (0, 2):
        torch.manual_seed(seed)
        net = Net(lambda m, x: m.b(F.avg_pool2d(m.a(x), **options)), a=conv(), b=conv(8, 4))
        prepared = prepare(net, [images(16, size=11)], "openvino")
        assert prepared.plan.node("avg_pool2d").kernel == "Pooling"
        assert_exact(ship(prepared, images(32, size=11), images(1, size=11)))


def test_an_average_pool_that_counts_its_padding_stays_float() -> None:
    torch.manual_seed(0)
    net = Net(lambda m, x: m.b(F.avg_pool2d(m.a(x), 3, 2, 1)), a=conv(), b=conv(8, 4))
    prepared = prepare(net, [images(16)], "openvino")
    assert prepared.plan.node("avg_pool2d").reason == (
        "OpenVINO 2026.4 counts an average pool's padding as codes of 0, not as zeros"
    )
    assert_exact(ship(prepared, images(32), images(1)))


def test_integers_that_others_read_too_are_not_taken_into_such_a_pool() -> None:
    torch.manual_seed(0)
    net = Net(
        lambda m, x: (lambda y: m.b(F.avg_pool2d(y, 3, 1, 1)) + m.b(m.c(y)))(m.a(x)),
        a=conv(), b=conv(8, 4), c=conv(8, 8),
    )  # fmt: skip
    sent = ship(prepare(net, [images(16)], "openvino"), images(32), images(1))
    # floats of other roundings: it was 0.87, and -0.6 dB
    assert sent.record["exact_share"] > 0.999 and sent.record["outputs_db"] > 60


def test_a_pool_that_another_runtimes_plan_has_in_float(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net(lambda m, x: m.b(F.avg_pool2d(m.a(x), 3, 2, 1)), a=conv(), b=conv(8, 4)).eval()
    data = [images(16)]
    graph = bitport.load(net, data[0][:2])
    bitport.compress(graph, "int8", target="onnxruntime", data=data, out=tmp_path / "a", effort="plain")
    record = bitport.verify(tmp_path / "a", target="openvino")
    assert record["parity"]["exact_share"] == 1.0  # it was 0.88, and -6 dB
