from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from bitport.errors import ArtifactError, GraphError
from bitport.frontends.pytorch import load_module
from bitport.proof import cost


class Clock:
    """A clock that moves only when work is done: timings of these tests are exact."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0
        monkeypatch.setattr(time, "perf_counter_ns", lambda: self.now)
        monkeypatch.setattr(time, "perf_counter", lambda: self.now / 1e9)

    def work(self, ms: Callable[[], float]) -> Callable[[], None]:
        def run() -> None:
            self.now += round(ms() * 1e6)

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def cycle(values: Sequence[float]) -> Callable[[], float]:
    state = {"i": -1}

    def after() -> float:
        state["i"] += 1
        return values[state["i"] % len(values)]

    return after


def test_medians_speedup_and_verdict(clock: Clock) -> None:
    slow, fast = clock.work(cycle([9.0, 10.0, 11.0])), clock.work(cycle([4.9, 5.0, 5.1]))
    found = cost.latency(slow, fast, threads=1, batch=4, seconds=4.0, rounds=30)
    assert found["float_ms"] == pytest.approx(10, rel=0.03)
    assert found["compressed_ms"] == pytest.approx(5, rel=0.03)
    assert found["speedup"] == pytest.approx(2, rel=0.05)
    assert found["ci95"][0] <= found["speedup"] <= found["ci95"][1]
    assert found["verdict"] == "faster"
    assert (found["threads"], found["batch"], found["rounds"]) == (1, 4, 30)


@pytest.mark.parametrize(
    ("compressed", "verdict"),
    [([10.0], "not faster"), ([9.9], "not faster"), ([12.0, 12.5], "slower"), ([5.0, 25.0], "not faster")],
)
def test_not_faster_is_said(clock: Clock, compressed: list[float], verdict: str) -> None:
    found = cost.latency(
        clock.work(lambda: 10.0), clock.work(cycle(compressed)), threads=1, batch=1, seconds=9.0, rounds=21
    )
    assert found["verdict"] == verdict


def test_a_processor_that_slows_down_hits_both_alike(clock: Clock) -> None:
    def throttled(ms: float) -> Callable[[], float]:
        return lambda: ms * (1 + clock.now / 2e9)  # half as fast after two seconds, and so on

    found = cost.latency(
        clock.work(throttled(12.0)), clock.work(throttled(6.0)), threads=1, batch=1, seconds=6.0, rounds=60
    )
    assert found["samples_ms"]["float"][-1] > 1.5 * found["samples_ms"]["float"][0]
    assert found["speedup"] == pytest.approx(2, rel=0.03)


def test_order_alternates_so_that_neither_is_always_first(clock: Clock) -> None:
    calls: list[str] = []

    def recorded(name: str) -> Callable[[], None]:
        work = clock.work(lambda: 10.0)

        def run() -> None:
            calls.append(name)
            work()

        return run

    cost.latency(recorded("a"), recorded("b"), threads=1, batch=1, seconds=0.1, rounds=8)
    assert "".join(calls).endswith("abba" * 4)


def test_short_calls_are_repeated_until_a_round_is_long_enough(clock: Clock) -> None:
    calls = {"n": 0}

    def tiny() -> None:
        calls["n"] += 1
        clock.now += 10_000  # 10 µs

    found = cost.latency(tiny, clock.work(lambda: 1.0), threads=1, batch=1, seconds=0.001, rounds=8)
    assert calls["n"] >= 8 * 500
    assert found["float_ms"] == pytest.approx(0.01)


def test_the_budget_ends_slow_measurements_but_never_below_eight_rounds(clock: Clock) -> None:
    calls = {"n": 0}

    def slow() -> float:
        calls["n"] += 1
        return 1000.0

    found = cost.latency(
        clock.work(slow), clock.work(lambda: 900.0), threads=1, batch=1, seconds=2.0, rounds=50
    )
    assert found["rounds"] == 8
    assert calls["n"] <= 10


def test_samples_for_plots_are_limited(clock: Clock) -> None:
    found = cost.latency(
        clock.work(lambda: 6.0), clock.work(lambda: 5.0), threads=1, batch=1, seconds=60.0, rounds=500
    )
    assert found["rounds"] == 500
    assert 100 <= len(found["samples_ms"]["float"]) <= 200
    assert len(found["samples_ms"]["float"]) == len(found["samples_ms"]["compressed"])


def test_garbage_collection_is_off_while_measuring_and_on_afterwards() -> None:
    seen: list[bool] = []
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        cost.latency(lambda: seen.append(gc.isenabled()), lambda: 1 // 0, threads=1, batch=1)
    assert seen
    assert not any(seen)
    assert gc.isenabled()


def test_real_time() -> None:
    found = cost.latency(
        lambda: time.sleep(0.004), lambda: time.sleep(0.001), threads=1, batch=1, seconds=0.3, rounds=10
    )
    assert found["float_ms"] >= 4
    assert found["verdict"] == "faster"


# --------------------------------------------------------------------------------------------- operators


def test_macs_of_convolutions_and_linear() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),  # 8·8·8 outputs × 27
        nn.Conv2d(8, 8, 3, padding=1, groups=8),  # depthwise: 8·8·8 × 9
        nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 2, stride=2),  # 8·8·8 inputs × 4·2·2
        nn.Flatten(),
        nn.Linear(4 * 16 * 16, 10),
    )
    found = cost.macs(load_module(net, torch.zeros(2, 3, 16, 16)))
    assert list(found.values()) == [512 * 27, 512 * 9, 512 * 16, 1024 * 10]
    assert list(found) == ["0", "1", "3", "5"]


def test_macs_of_products_and_attention_count_one_sample() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(8, 8, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            batch, steps, _ = x.shape
            heads = self.proj(x).view(batch * steps, 2, 4).view(batch, steps, 2, 4).transpose(1, 2)
            y = nn.functional.scaled_dot_product_attention(heads, heads, heads)  # 2·(6·6·4 + 6·6·4)
            return torch.matmul(y, y.transpose(-1, -2))  # 2·6·6 × 4

    found = cost.macs(load_module(Net(), torch.zeros(3, 6, 8)))
    assert list(found.values()) == [6 * 8 * 8, 2 * 2 * 6 * 6 * 4, 2 * 6 * 6 * 4]


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3)])
def test_macs_of_recurrent_layers(kind: type[nn.LSTM] | type[nn.GRU], gates: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = kind(5, 7, num_layers=2, bidirectional=True, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.rnn(x)[0]
            return out

    found = cost.macs(load_module(Net(), torch.zeros(2, 11, 5)))
    layer1, layer2 = gates * 7 * (5 + 7), gates * 7 * (14 + 7)
    assert sum(found.values()) == 11 * 2 * (layer1 + layer2)


def test_macs_of_a_network_without_products_are_none() -> None:
    assert cost.macs(load_module(nn.ReLU(), torch.zeros(2, 3))) == {}


def test_other_symbolic_axes_take_the_example_or_the_given_length() -> None:
    batch, steps = torch.export.Dim("batch"), torch.export.Dim("steps", min=2, max=64)
    graph = load_module(nn.Linear(8, 4), torch.zeros(2, 6, 8), dynamic_shapes=({0: batch, 1: steps},))
    axis = graph.inputs[0].shape[1]
    assert isinstance(axis, str)
    assert sum(cost.macs(graph, {axis: 10}).values()) == 10 * 32
    assert sum(cost.macs(graph).values()) == graph.sizes[axis] * 32


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("batch", 1),
        ("4*batch", 4),
        ("3*s + 2", 23),
        ("(s//2)", 3),
        ("s/7", 1),
        ("Max(1, s - 9)", 1),
        ("s**2", 49),
    ],
)
def test_sizes_written_over_axis_names(text: str, expected: int) -> None:
    assert cost._evaluate(text, {"batch": 1, "s": 7}) == expected


@pytest.mark.parametrize(
    "text", ["unknown", "__import__('os').system('true')", "s.real", "9**9**9", "s if s else 1", "1 +"]
)
def test_other_texts_are_no_sizes(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = load_module(nn.Linear(8, 4), torch.zeros(2, 8))
    monkeypatch.setattr(type(graph), "shape", lambda self, node: (text, 4))
    with pytest.raises(GraphError, match="sizes="):
        cost.macs(graph)


def test_sparsity_counts_weights_once_and_only_weights() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tok = nn.Embedding(10, 4)
            self.mid = nn.Linear(4, 4)
            self.head = nn.Linear(4, 10, bias=False)
            self.head.weight = self.tok.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head(self.mid(self.tok(ids)))
            return out

    net = Net()
    with torch.no_grad():
        net.tok.weight.fill_(1.0)
        net.mid.weight.copy_(torch.eye(4))
        net.mid.bias.zero_()
    found = cost.sparsity(load_module(net, torch.zeros(2, 3, dtype=torch.long)))
    assert found == pytest.approx(12 / (40 + 16))
    assert cost.sparsity(load_module(nn.ReLU(), torch.zeros(2, 3))) == 0


# ------------------------------------------------------------------------------------------------- files


def test_sizes_count_what_a_runtime_needs(tmp_path: Path) -> None:
    reference = tmp_path / "reference"
    reference.mkdir()
    (reference / "model.onnx").write_bytes(b"x" * 900)
    (reference / "model.onnx.data").write_bytes(b"x" * 100)
    (tmp_path / "model.xml").write_bytes(b"x" * 50)
    (tmp_path / "model.bin").write_bytes(b"x" * 150)
    (tmp_path / "weights.safetensors").write_bytes(b"x" * 50)
    for other in ("sample.npz", "report.html", "measurements.json", "graph.pt2"):
        (tmp_path / other).write_bytes(b"x" * 10_000)
    assert cost.sizes(reference, tmp_path) == {"float_bytes": 1000, "compressed_bytes": 200, "ratio": 0.2}
    (tmp_path / "model.xml").unlink()
    (tmp_path / "model.bin").unlink()  # a runtime that reads nothing but the packed weights
    assert cost.sizes(reference, tmp_path)["compressed_bytes"] == 50


def test_sizes_of_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no model file"):
        cost.sizes(tmp_path, tmp_path)
