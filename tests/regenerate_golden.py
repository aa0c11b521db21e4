"""What the tiny models become today. `python -m tests.regenerate_golden` writes it to `tests/golden.json`.

Run it only where a change of plans or files is intended, and say in the commit what changed and why.
Weights and data are small multiples of powers of two: every sum is exact in float32 in any order, so that plans
and files don't depend on the processor. (Torch, onnx and onnxruntime versions are pinned; with them they may.)
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tests.flow import Inputs, Net, Prepared, conv, prepare
from tests.nets import build
from torch import Tensor, nn
from torch.nn import functional as F

from bitport.rules import Ruleset
from bitport.targets.onnxruntime import OnnxRuntime

GOLDEN = Path(__file__).with_name("golden.json")
COUNTED = ("resnet", "mobilenet", "hand_encoder", "decoder_1e4", "unet")
LAYOUT = ("ReorderInput", "ReorderOutput")  # where float operators get a layout of their own, by processor


class AnyHost(OnnxRuntime):
    """Weights of 8 bits on every processor."""

    def rules(self) -> Ruleset:
        return replace(super().rules(), weight_limit=None)


def dyadic(shape: tuple[int, ...], seed: int, step: float) -> Tensor:
    """Multiples of `step` between −2 and 2 steps."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, shape, generator=generator).float() * step


def exact(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(dyadic(tuple(parameter.shape), index, 0.5))
    return model.eval()


def residual() -> tuple[nn.Module, Inputs]:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.stem(x))
        y = F.max_pool2d(F.relu(m.right(y) + y), 2)
        return m.head(F.adaptive_avg_pool2d(y, 1).flatten(1))  # type: ignore[no-any-return]

    net = Net(forward, stem=conv(2, 4), right=conv(4, 4, bias=False), head=nn.Linear(4, 3))
    return exact(net), dyadic((8, 2, 8, 8), 99, 0.25)


def sequence() -> tuple[nn.Module, Inputs]:
    def forward(m: Any, ids: Tensor) -> Tensor:
        x = m.table(ids)
        q, k = m.qk(x).chunk(2, -1)
        scores = (q * 0.25) @ k.transpose(1, 2)
        return m.head(torch.cat([F.relu(m.mix(scores)), x], -1))  # type: ignore[no-any-return]

    net = Net(
        forward, table=nn.Embedding(16, 8), qk=nn.Linear(8, 16), mix=nn.Linear(6, 4), head=nn.Linear(12, 3)
    )
    ids = torch.randint(0, 16, (8, 6), generator=torch.Generator().manual_seed(5))
    return exact(net), ids


HASHED: dict[str, Callable[[], tuple[nn.Module, Inputs]]] = {"residual": residual, "sequence": sequence}


def _file(prepared: Prepared) -> tuple[str, dict[str, int]]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepared.target.export(prepared.work, prepared.plan, folder)
        digest = hashlib.sha256((folder / prepared.target.model_file).read_bytes()).hexdigest()
        counts = prepared.target.inspect(folder, prepared.plan).counts
    return digest, {kind: n for kind, n in sorted(counts.items()) if kind not in LAYOUT}


def hashes(name: str) -> dict[str, str]:
    """SHA-256 of the plan's record and of the model file of a network with exactly representable numbers."""
    model, data = HASHED[name]()
    prepared = prepare(model, [data], AnyHost(), activations={"range": "minmax"})
    plan = json.dumps(prepared.plan.to_record(), sort_keys=True)
    return {"plan": hashlib.sha256(plan.encode()).hexdigest(), "model": _file(prepared)[0]}


def counts(name: str) -> dict[str, int]:
    """Operator types of the file that ONNX Runtime optimized."""
    torch.manual_seed(0)
    model, example = build(name, 4)
    return _file(prepare(model, [example], AnyHost()))[1]


def main() -> None:
    torch.set_num_threads(1)
    golden = {
        "hashes": {name: hashes(name) for name in HASHED},
        "operators": {name: counts(name) for name in COUNTED},
    }
    GOLDEN.write_text(json.dumps(golden, indent=2) + "\n")


if __name__ == "__main__":
    main()
