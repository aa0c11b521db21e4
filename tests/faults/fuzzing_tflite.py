"""Damages `.tflite` files at random and reads them: `python -m tests.faults.fuzzing_tflite FOLDER SEED SECONDS`."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch
from tests.faults.fuzzing import damaged, fuzz
from tests.flow import Net, conv, images, prepare
from torch import nn
from torch.nn import functional as F

from bitport.targets.litert.inspect import inspected
from bitport.targets.litert.reading import read_model


def main(folder: Path, seed: int, seconds: float) -> None:
    dice, path = random.Random(seed), folder / "model.tflite"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = Net(lambda m, x: m.b(F.relu(m.a(x)).mean((2, 3))), a=conv(3, 4), b=nn.Linear(4, 2))
    prepared = prepare(net, [images(4)], "litert")
    prepared.target.export(prepared.work, prepared.plan, folder)
    honest = path.read_bytes()

    def read() -> None:
        inspected(read_model(path.read_bytes(), path.name), prepared.plan)

    read()  # the honest one is read
    fuzz(seconds, lambda: path.write_bytes(damaged(honest, dice)), read)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
