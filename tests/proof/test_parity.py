"""The runtime computes what the simulator says: trained networks, real data, every quantized tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from sklearn.datasets import load_digits
from tests.flow import Net, Prepared, Shipped, conv, images, prepare, ship
from torch import Tensor, nn
from torch.nn import functional as F

from bitport import demo
from bitport.errors import TargetError
from bitport.progress import NullProgress
from bitport.proof.parity import Parity, Steps

SAMPLES = 256


class Plain(nn.Module):
    """The demonstration network, smaller."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(12)
        self.layers = nn.Sequential(demo.Block(12, 12, 1), demo.Block(12, 24, 2))
        self.fc = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(F.relu(self.bn(self.stem(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))  # type: ignore[no-any-return]


class Squeeze(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(width, width // 4, 1), nn.Conv2d(width // 4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))))


class Depthwise(nn.Module):
    """Depthwise convolutions, squeeze-and-excitation, hard-swish."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.deep, self.bn1 = nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False), nn.BatchNorm2d(16)
        self.squeeze = Squeeze(16)
        self.point, self.bn2 = nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.bn0(self.stem(x)))
        x = self.squeeze(F.hardswish(self.bn1(self.deep(x))))
        x = F.hardswish(self.bn2(self.point(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))  # type: ignore[no-any-return]


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (
            self.qkv(self.norm1(x))
            .view(b, t, 3, self.heads, d // self.heads)
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))  # type: ignore[no-any-return]


class Vision(nn.Module):
    """A vision transformer on 2×2 patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, 24, 2, 2)
        self.position = nn.Parameter(0.1 * torch.randn(1, 17, 24))
        self.token = nn.Parameter(torch.randn(1, 1, 24))
        self.layers = nn.Sequential(Layer(24, 4), Layer(24, 4))
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = self.layers(torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position)
        return self.head(self.norm(x)[:, 0])  # type: ignore[no-any-return]


@cache
def digits() -> tuple[Tensor, Tensor]:
    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(bunch.images).float()[order, None] / 16, torch.from_numpy(bunch.target).long()[
        order
    ]


def trained(build: Callable[[], nn.Module], epochs: int) -> nn.Module:
    torch.manual_seed(0)
    model = build().train()
    x, y = (t[:1024] for t in digits())
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(epochs):
        for chosen in torch.split(torch.randperm(len(x)), 64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
    return model.eval()


# the processors on which ONNX Runtime's float operators were measured to the bit
MEASURED = torch.backends.cpu.get_cpu_capability() == "AVX512"


@dataclass
class Trained:
    prepared: Prepared
    shipped: Shipped
    accuracy: tuple[float, float, float]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "plain": (Plain, 4), "depthwise": (Depthwise, 12), "vision": (Vision, 6),
}  # fmt: skip


@pytest.fixture(scope="session", params=NETWORKS)
def network(request: pytest.FixtureRequest) -> tuple[str, Trained]:
    torch.set_num_threads(1)
    x, y = digits()
    model = trained(*NETWORKS[request.param])
    prepared = prepare(model, list(torch.split(x[:256], 64)))
    held_out = torch.split(x[-SAMPLES:], 64)
    shipped = ship(prepared, *held_out)
    labels = y[-SAMPLES:][:64]
    with torch.no_grad():
        outputs = (model(held_out[0]), prepared.simulator().run((held_out[0],))[0], shipped.outputs[0])
    accuracy = tuple(float((out.argmax(1) == labels).float().mean()) for out in outputs)
    return request.param, Trained(prepared, shipped, accuracy)  # type: ignore[arg-type]


def test_every_integer_of_every_quantized_tensor(network: tuple[str, Trained]) -> None:
    name, found = network
    record, plan = found.shipped.record, found.prepared.plan
    assert record["samples"] == SAMPLES and record["integers"] > 100_000
    assert record["local"]["max_steps"] <= 1
    for part in ("local", "end_to_end"):
        assert record[part]["exact_share"] >= 0.999, record
        if name == "plain" or (name == "depthwise" and MEASURED):  # a float32 sum is all that may differ
            assert record[part]["exact_share"] == 1.0 and record[part]["max_steps"] == 0, record
        elif name == "depthwise":
            assert record[part]["exact_share"] >= 0.99999 and record[part]["max_steps"] <= 1, record
    produced = {
        e.producer for e, tie in plan.edges.items() if plan.ties[tie].source not in ("weight", "bias")
    }
    moved = {n for n in produced if plan.node(n).role in ("move", "scaled")}
    constant = {n for n in produced if n in dict(found.prepared.work.gm.named_parameters())}
    constant |= {n for n in produced if n in dict(found.prepared.work.gm.named_buffers())}
    assert set(found.shipped.parity.layers) == produced - moved - constant, (
        "a quantized tensor wasn't compared"
    )
    assert record["edges"] == sum(
        1 for tie in plan.edges.values() if plan.ties[tie].source not in ("weight", "bias")
    )


def test_nothing_planned_runs_elsewhere_and_accuracy_is_kept(network: tuple[str, Trained]) -> None:
    _, found = network
    assert not found.shipped.inspection.missed
    real, simulated, runtime = found.accuracy
    assert real > 0.6 and simulated == runtime and runtime > real - 0.07
    for name, layer in found.shipped.parity.layers.items():
        assert layer.simulated.sqnr_db > 10 and layer.runtime.sqnr_db > 10, name


@pytest.mark.slow
def test_the_demonstration_network() -> None:
    data = demo.Digits()
    prepared = prepare(demo.train(data, NullProgress(), epochs=3), data.calibration())
    shipped = ship(prepared, *torch.split(data.test()[0][:SAMPLES], 64))
    assert shipped.record["exact_share"] == 1.0 and shipped.record["max_steps"] == 0
    assert not shipped.inspection.missed


# ------------------------------------------------------------------------------------------------ the counting


def test_steps_count() -> None:
    steps = Steps()
    assert steps.exact_share == 1.0
    steps.update(torch.tensor([1, 2, 3]), torch.tensor([1, 2, 5]))
    steps.update(torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.int32))
    assert steps.record() == {"exact_share": 2 / 3, "max_steps": 2, "integers": 3}


def test_a_deviation_is_local_to_its_layer_and_global_behind_it() -> None:
    prepared = prepare(Net(lambda m, x: m.b(F.relu(m.a(x))), a=conv(), b=conv(8, 4)), [images(8)], "null")

    class Deviating:
        """The simulator with one wrong integer in the middle."""

        def run_tapped(self, inputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
            taps: dict[str, Tensor] = {}

            def spoil(name: str, q: Tensor) -> Tensor:
                taps[name] = q.clone()
                if name == "relu":
                    taps[name].flatten()[0] += 3
                return taps[name]

            return prepared.simulator().run(inputs, tap=spoil), taps

    parity = Parity(prepared.reference, prepared.plan, prepared.simulator(), Deviating())  # type: ignore[arg-type]
    parity.update((images(4),))
    local = {name: layer.local.worst for name, layer in parity.layers.items()}
    assert local == {"x": 0, "relu": 3, "b": 0}
    assert parity.layers["relu"].local.integers - parity.layers["relu"].local.equal == 1
    assert parity.record()["local"]["max_steps"] == 3


def test_a_tensor_that_the_runtime_does_not_show_is_an_error() -> None:
    prepared = prepare(Net(lambda m, x: m.b(F.relu(m.a(x))), a=conv(), b=conv(8, 4)), [images(8)], "null")

    class Silent:
        def run_tapped(self, inputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
            return prepared.simulator().run(inputs), {}

    parity = Parity(prepared.reference, prepared.plan, prepared.simulator(), Silent())  # type: ignore[arg-type]
    with pytest.raises(TargetError, match="no quantized tensor for 'x'"):
        parity.update((images(4),))
