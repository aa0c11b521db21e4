"""What every peer's `run.py` needs: the job, its network and data, and how a result is left.

    python -m bench.peers.NAME.run JOB.json

A job is {network, seed, state, cell, calibration, test, out}; a cell {name, weights, activations, group, per_tensor}.
`state` is a state dict, `calibration` and `test` are .npy files, `out` is a folder. Written are out/outputs.npy (the
network's float32 outputs for the test samples) and out/result.json. Needs torch and numpy alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from bench import subjects

UNSUPPORTED = 3  # exit code of a cell that a tool has no way to do
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "thin": subjects.ThinNet,
    "mobile": subjects.MobileNet,
    "vit": subjects.VisionTransformer,
    "gpt": subjects.ByteGpt,
}
TWINS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "thin-twin": subjects.rescaled,
    "mobile-twin": subjects.rescaled_mobile,
}
IMAGES_AT_ONCE, TEXTS_AT_ONCE, TESTED_AT_ONCE = 32, 8, 250
Job = Mapping[str, Any]


class _Absent(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return sys.modules.get(f"{self.__name__}.{name}") or type(name, (), {})


def without(*modules: str) -> None:
    """Let a tool import modules that don't load here and that it only takes names from, as empty classes."""
    for module in modules:
        sys.modules[module] = _Absent(module)
        sys.modules[module].__spec__ = ModuleSpec(module, None)


def read_job() -> dict[str, Any]:
    """The job that the command line names; one thread from here on."""
    torch.set_num_threads(1)
    found: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    return found


def network(job: Job) -> nn.Module:
    """The trained float network, in eval mode."""
    return built(str(job["network"]), Path(job["state"]))


def built(name: str, state: Path) -> nn.Module:
    """A network, or the twin of one, from the state dict that it was trained to."""
    base = name.removesuffix("-twin")
    model = NETWORKS[base]()
    model.load_state_dict(torch.load(state, weights_only=True))
    model.eval()
    return TWINS[name](model) if name in TWINS else model


def calibration_batches(job: Job) -> list[Tensor]:
    found = torch.from_numpy(np.load(job["calibration"]))
    return list(torch.split(found, IMAGES_AT_ONCE if found.is_floating_point() else TEXTS_AT_ONCE))


def test_batches(job: Job) -> list[Tensor]:
    found = torch.from_numpy(np.load(job["test"]))
    return list(torch.split(found, TESTED_AT_ONCE if found.is_floating_point() else TEXTS_AT_ONCE))


def write(
    job: Job,
    outputs: Tensor,
    seconds: float,
    method: str,
    where: str,
    note: str = "",
    packages: tuple[str, ...] = (),
) -> None:
    """Leave the result. seconds: of quantizing alone. where: what computed outputs. packages: to tell versions of."""
    out = Path(job["out"])
    out.mkdir(parents=True, exist_ok=True)
    np.save(out / "outputs.npy", outputs.detach().float().numpy())
    record = {
        "seconds": seconds,
        "method": method,
        "where": where,
        "note": note,
        "versions": {name: version(name) for name in ("torch", *packages)},
    }
    (out / "result.json").write_text(json.dumps(record, indent=1))


def unsupported(reason: str) -> NoReturn:
    """End: the tool has no way to do this cell."""
    sys.stderr.write(f"{reason}\n")
    raise SystemExit(UNSUPPORTED)
