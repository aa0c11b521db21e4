"""Damages model files at random and runs them: `python -m tests.faults.fuzzing_artifact FOLDER SEED SECONDS TARGET`.

As in an artifact whose checksums were forged: nothing but the runtime stands behind what is read here.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch
from tests.faults.fuzzing import damaged, fuzz
from tests.flow import Net, conv, images, prepare
from torch import nn
from torch.nn import functional as F

from bitport.targets import _trial

PATIENCE = 150  # seconds for a runtime whose files are tried in another process


def main(folder: Path, seed: int, seconds: float, name: str) -> None:
    dice = random.Random(seed)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = Net(lambda m, x: m.b(F.relu(m.a(x)).mean((2, 3))), a=conv(3, 4), b=nn.Linear(4, 2))
    prepared = prepare(net, [images(4)], name)
    prepared.target.export(prepared.work, prepared.plan, folder)
    _trial._known.clear()  # as if others had written it
    honest = {path: path.read_bytes() for path in sorted(folder.glob("model.*"))}

    def damage() -> None:
        for path, content in honest.items():
            path.write_bytes(content)
        path = dice.choice(list(honest))
        path.write_bytes(damaged(honest[path], dice))

    def read() -> None:
        prepared.target.inspect(folder, prepared.plan)
        prepared.target.open(folder).run((images(2),))

    read()  # the honest one is read
    fuzz(seconds, damage, read, hang=PATIENCE)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4])
