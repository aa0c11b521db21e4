"""`bitport demo`: handwritten digits, a small residual network, int8, proof. Everything it needs is bundled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import api
from .artifact import Artifact
from .progress import NullProgress, Progress

SEED = 0
EPOCHS = 12
BATCH = 64
SIZE = 32
CALIBRATION = 256
MAX_DROP = 0.01  # one point: what 899 samples can decide


class Block(nn.Module):
    """Two 3×3 convolutions with BatchNorm around a shortcut (He et al. 2016, arXiv:1512.03385)."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inside != outside:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class DigitNet(nn.Module):
    """A residual network for 1×32×32 images and 10 classes, about 0.7 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(32)
        self.layer1 = nn.Sequential(Block(32, 32, 2))
        self.layer2 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1))
        self.layer3 = nn.Sequential(Block(64, 128, 2))
        self.fc = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


class Digits:
    """scikit-learn's 1,797 handwritten digits (UCI, Alpaydin & Kaynak 1998), enlarged to 32×32, split in halves."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits  # a second of import that only the demo needs

        bunch = load_digits()
        order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(SEED))
        images = torch.from_numpy(bunch.images).float()[order, None] / 16.0
        self.images = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
        self.labels = torch.from_numpy(bunch.target).long()[order]
        self.half = len(order) // 2

    def train(self) -> tuple[Tensor, Tensor]:
        return self.images[: self.half], self.labels[: self.half]

    def test(self) -> tuple[Tensor, Tensor]:
        return self.images[self.half :], self.labels[self.half :]

    def calibration(self) -> list[Tensor]:
        """Training images without labels: what the ranges are measured on."""
        return list(torch.split(self.train()[0][:CALIBRATION], BATCH))

    def evaluation(self) -> list[tuple[Tensor, Tensor]]:
        images, labels = self.test()
        return list(zip(torch.split(images, BATCH), torch.split(labels, BATCH), strict=True))


def train(data: Digits, progress: Progress, epochs: int = EPOCHS) -> DigitNet:
    """Train the network: AdamW with a one-cycle schedule (Smith & Topin 2017, arXiv:1708.07120)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = DigitNet().train()
        images, labels = data.train()
        steps = epochs * -(-len(images) // BATCH)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=6e-3, total_steps=steps)
        with progress.task("training the network", total=steps) as task:
            for chosen in _batches(len(images), epochs):
                loss = F.cross_entropy(model(_shifted(images[chosen])), labels[chosen], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                task.advance(1)
    return model.eval()


def _batches(count: int, epochs: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(epochs):
        yield from torch.split(torch.randperm(count, generator=generator), BATCH)


def _shifted(images: Tensor) -> Tensor:
    """The same digits a few pixels aside: half of 1,797 images is little to learn from."""
    dx, dy = (int(v) for v in torch.randint(-3, 4, (2,)))
    return torch.roll(images, (dx, dy), (2, 3))


def model() -> tuple[nn.Module, Tensor]:
    """The trained network and an example, for `bitport compress bitport.demo:model`."""
    data = Digits()
    return train(data, NullProgress()), data.images[:1]


def calibration() -> list[Tensor]:
    """Calibration data, for `--data bitport.demo:calibration`."""
    return Digits().calibration()


def evaluation() -> list[tuple[Tensor, Tensor]]:
    """Held-out labelled digits, for `--eval bitport.demo:evaluation`."""
    return Digits().evaluation()


def run(out: Path = Path("out/demo"), progress: Progress | None = None) -> Artifact:
    """Train, compress to int8 for ONNX Runtime, verify, write `out`.

    Raises GateFailed when more than a point of accuracy may be lost.
    """
    progress = progress or NullProgress()
    data = Digits()
    network = train(data, progress)
    with progress.task("capturing the network"):
        graph = api.load(network, data.images[:1])
    return api.compress(
        graph,
        "int8",
        target="onnxruntime",
        data=data.calibration(),
        evaluation=data.evaluation(),
        metric="top1",
        max_drop=MAX_DROP,
        out=out,
        seed=SEED,
        progress=progress,
    )
