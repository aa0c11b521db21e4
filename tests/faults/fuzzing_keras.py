"""Damages `.keras` files at random and reads them: `python -m tests.faults.fuzzing_keras FOLDER SEED SECONDS`."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

from tests.faults.fuzzing import damaged, fuzz
from tests.frontends.keras.test_archive import layer, network, saved, weights

from bitport.frontends.keras._archive import check_weights, checked, weights_of


def main(folder: Path, seed: int, seconds: float) -> None:
    dice, path = random.Random(seed), folder / "net.keras"

    def some(file: Any) -> None:
        file["layers/dense/vars/0"] = [[1.0, 2.0]]

    config, numbers = json.dumps(network(layer(units=3), layer("ReLU"))), weights(some).getvalue()
    honest = saved(path, config, numbers).read_bytes()

    def damage() -> None:
        kind = dice.random()
        if kind < 0.4:
            path.write_bytes(damaged(honest, dice))
        elif kind < 0.7:
            saved(path, damaged(config.encode(), dice).decode(errors="replace"), numbers)
        else:
            saved(path, config, damaged(numbers, dice))

    def read() -> None:
        checked(path)
        check_weights(weights_of(path), path.name)

    read()  # the honest one is read
    fuzz(seconds, damage, read)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
