"""The conformance suite that every target has to pass, built in or third-party.

    from bitport.testing import check_target
    check_target("onnxruntime")

Every row of a target's table becomes a tiny network: exported, opened (which kernels run?), run, and compared
with the simulator integer by integer, with scales as measured and with power-of-two scales. Only the latter make
ties, and only ties tell rounding rules apart.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .artifact import make_target
from .data import Source
from .frontends.pytorch import load_module
from .graph import Graph
from .graph.experts import EXPERT_LINEAR
from .plan import Plan
from .plan.constants import on_grid, settle
from .proof.parity import Parity
from .rules import Mode
from .simulate import Simulator
from .steps._base import Context, make
from .targets._base import Target

SAMPLES = 24
ALLOWED_STEPS = 0
FLOAT_DB = 50.0  # a float that is rounded to 8 bits on the way may fall on the other side of a tie
IN_GROUPS = {"format": "int4", "granularity": "group", "group": 16, "symmetric": False}
Forward = Callable[[nn.ModuleDict, Tensor], Tensor]


class Tiny(nn.Module):
    """Layers by name and a function that connects them."""

    def __init__(self, layers: dict[str, nn.Module], forward: Forward) -> None:
        super().__init__()
        self.layers, self.function = nn.ModuleDict(layers), forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layers, x)


@dataclass(frozen=True)
class Specimen:
    """A tiny network that exercises one operator kind. `ids`: its input is integers below that number."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    ids: int | None = None

    def inputs(self, count: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if self.ids is not None:
            return torch.randint(0, self.ids, (count, *self.shape), generator=generator)
        return torch.randn(count, *self.shape, generator=generator)


def _between(function: Callable[[Tensor], Tensor], after: nn.Module | None = None) -> Callable[[], nn.Module]:
    """conv → function → conv: what is in the middle reads and leaves integers."""

    def build() -> nn.Module:
        layers = {"a": nn.Conv2d(3, 8, 3, padding=1), "b": after or nn.Conv2d(8, 4, 1)}
        return Tiny(layers, lambda m, x: m["b"](function(m["a"](x))))

    return build


def _tokens(function: Callable[[Tensor], Tensor], width: int = 8) -> Callable[[], nn.Module]:
    """linear → function → linear on [batch, 6, 12]."""

    def build() -> nn.Module:
        return Tiny(
            {"a": nn.Linear(12, 8), "b": nn.Linear(width, 5)}, lambda m, x: m["b"](function(m["a"](x)))
        )

    return build


def _two(function: Callable[[Tensor, Tensor], Tensor], width: int = 8) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layers: dict[str, nn.Module] = {
            "a": nn.Conv2d(3, 8, 3, padding=1),
            "b": nn.Conv2d(3, 8, 1),
            "c": nn.Conv2d(width, 4, 1),
        }
        return Tiny(layers, lambda m, x: m["c"](function(m["a"](x), m["b"](x))))

    return build


def _one(layer: Callable[[], nn.Module], *, relu: bool = False) -> Callable[[], nn.Module]:
    return lambda: Tiny({"a": layer()}, lambda m, x: F.relu(m["a"](x)) if relu else m["a"](x))


def _attention(m: nn.ModuleDict, x: Tensor) -> Tensor:
    scores: Tensor = m["q"](x) @ m["k"](x).transpose(1, 2)
    return m["o"](scores)  # type: ignore[no-any-return]


def _experts(m: nn.ModuleDict, x: Tensor) -> Tensor:
    """Three experts with a third of the rows each: one stack of matrices [3 · 5, 8]."""
    ends = torch.arange(1, 4) * x.shape[0] // 3
    stack = m["w"].weight
    assert isinstance(stack, Tensor)
    scores: Tensor = m["b"](EXPERT_LINEAR(m["a"](x), stack, ends))
    return scores


IMAGE, TOKENS = (3, 9, 9), (6, 12)
SPECIMENS: dict[str, dict[str, Specimen]] = {
    "conv": {
        "plain": Specimen(_one(lambda: nn.Conv2d(3, 8, 3, padding=1)), IMAGE),
        "relu": Specimen(_one(lambda: nn.Conv2d(3, 8, 3, stride=2), relu=True), IMAGE),
        "no-bias": Specimen(_one(lambda: nn.Conv2d(3, 8, 3, bias=False)), IMAGE),
        "pointwise": Specimen(_one(lambda: nn.Conv2d(16, 24, 1)), (16, 5, 5)),
        "depthwise": Specimen(_one(lambda: nn.Conv2d(16, 16, 3, padding=1, groups=16)), (16, 7, 7)),
        "grouped": Specimen(_one(lambda: nn.Conv2d(16, 8, 3, padding=2, dilation=2, groups=4)), (16, 7, 7)),
        "1d": Specimen(_one(lambda: nn.Conv1d(5, 7, 3, padding=1)), (5, 20)),
    },
    "linear": {
        "rows": Specimen(_one(lambda: nn.Linear(12, 8)), (12,)),
        "tokens": Specimen(_tokens(F.relu), TOKENS),
        "no-bias": Specimen(_one(lambda: nn.Linear(12, 8, bias=False)), TOKENS),
    },
    "experts": {
        "thirds": Specimen(
            lambda: Tiny({"a": nn.Linear(12, 8), "w": nn.Linear(8, 15), "b": nn.Linear(5, 4)}, _experts),
            (12,),
        ),
    },
    "matmul": {
        "scores": Specimen(
            lambda: Tiny({"q": nn.Linear(12, 8), "k": nn.Linear(12, 8), "o": nn.Linear(6, 4)}, _attention),
            TOKENS,
        ),
    },
    "add": {
        "residual": Specimen(_two(torch.add), IMAGE),
        "relu": Specimen(_two(lambda a, b: F.relu(a + b)), IMAGE),
    },
    "mul": {"gate": Specimen(_two(torch.mul), IMAGE)},
    "global_avg_pool": {"head": Specimen(_between(lambda y: F.adaptive_avg_pool2d(y, 1)), IMAGE)},
    "avg_pool": {
        "plain": Specimen(_between(lambda y: F.avg_pool2d(y, 3)), IMAGE),
        "padded": Specimen(_between(lambda y: F.avg_pool2d(y, 3, 2, 1, count_include_pad=False)), IMAGE),
    },
    "leaky_relu": {"plain": Specimen(_between(F.leaky_relu), IMAGE)},
    "relu": {"alone": Specimen(_two(lambda a, b: F.relu(torch.cat([a, b], 1)), 16), IMAGE)},
    "sigmoid": {"plain": Specimen(_between(torch.sigmoid), IMAGE)},
    "softmax": {"last": Specimen(_tokens(lambda y: y.softmax(-1)), TOKENS)},
    "mul_scalar": {"scale": Specimen(_tokens(lambda y: y * 0.3), TOKENS)},
    "embedding": {
        "table": Specimen(
            lambda: Tiny(
                {"e": nn.Embedding(30, 12), "a": nn.Linear(12, 8), "b": nn.Linear(8, 5)},
                lambda m, x: m["b"](F.relu(m["a"](m["e"](x)))),
            ),
            (6,),
            30,
        ),
    },
    "view": {"flatten": Specimen(_between(lambda y: y.flatten(1), nn.Linear(648, 5)), IMAGE)},
    "transpose": {"swap": Specimen(_tokens(lambda y: y.transpose(1, 2), 6), TOKENS)},
    "expand": {"rows": Specimen(_tokens(lambda y: y[:, :1].expand(-1, 4, -1)), TOKENS)},
    "slice": {"half": Specimen(_tokens(lambda y: y[:, ::2]), TOKENS)},
    "select": {"first": Specimen(_tokens(lambda y: y[:, 0]), TOKENS)},
    "squeeze": {"one": Specimen(_tokens(lambda y: y[:, :1].squeeze(1)), TOKENS)},
    "unsqueeze": {"one": Specimen(_tokens(lambda y: y.unsqueeze(1)), TOKENS)},
    "split": {"half": Specimen(_tokens(lambda y: y.chunk(2, -1)[1], 4), TOKENS)},
    "getitem": {"second": Specimen(_tokens(lambda y: torch.split(y, [3, 5], -1)[1], 5), TOKENS)},
    "cat": {"channels": Specimen(_two(lambda a, b: torch.cat([a, b], 1), 16), IMAGE)},
    "stack": {"axis": Specimen(_tokens(lambda y: torch.stack([y[:, :3], y[:, 3:]], 1)), TOKENS)},
    "max_pool": {"padded": Specimen(_between(lambda y: F.max_pool2d(y, 3, 2, 1)), IMAGE)},
    "pad": {"zeros": Specimen(_between(lambda y: F.pad(y, (1, 2, 0, 1))), IMAGE)},
    # without dilation a target may want it as convolutions instead
    "conv_transpose": {"dilated": Specimen(_one(lambda: nn.ConvTranspose2d(3, 8, 3, 2, dilation=2)), IMAGE)},
}


@dataclass(frozen=True)
class Case:
    """One row of a target's table on one tiny network, with one sort of scales.

    Attributes:
        power_of_two: scales are rounded to powers of two.
        mode: the row's. Kernels that take and return floats are compared by their float results.
        kernel: the row's, as the plan must name it.
        weights: what is asked of weights.
        options: of the target, as in a recipe's `[target]` table.
    """

    target: str
    kind: str
    specimen: str
    power_of_two: bool
    mode: Mode = "static"
    kernel: str = ""
    weights: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        scales = "ties" if self.power_of_two else "measured"
        return f"{self.kind}-{self.specimen}-{scales if self.mode == 'static' else self.kernel}"

    def run(self) -> None:
        """Export, open, run, compare. Raises AssertionError telling what differs."""
        specimen = SPECIMENS[self.kind][self.specimen]
        runtime = make_target(self.target, dict(self.options))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(len(self.id))
            model = specimen.make().eval()
        graph = load_module(model, specimen.inputs(2, 1))
        work, plan = self._planned(graph, runtime, specimen)
        wanted = [
            name
            for name, todo in plan.nodes.items()
            if todo.kernel is not None
            and (todo.mode or "static") == self.mode
            and (self.mode == "static" or todo.kernel == self.kernel)
            and work.op(work.node(name)).kind == self.kind
        ]
        assert wanted, f"{self.id}: the plan runs no {self.kind} in integers: " + "; ".join(
            f"{name}: {todo.reason}" for name, todo in plan.nodes.items() if todo.reason
        )
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            reference = work.clone()
            on_grid(work, plan)
            runtime.export(work, plan, folder)
            inspection = runtime.inspect(folder, plan)
            assert not inspection.missed, f"{self.id}: {inspection.missed}"
            simulator = Simulator(work, plan, runtime.arithmetic())
            with runtime.watchable(work, plan, folder) as shown:
                parity = Parity(reference, plan, simulator, runtime.open(shown, taps=True))
                parity.update((specimen.inputs(SAMPLES, 2),))
        if self.mode != "static":
            decibel = parity.record()["outputs_db"]
            assert decibel is None or decibel >= FLOAT_DB, f"{self.id}: outputs differ by {decibel:.1f} dB"
            return
        record = parity.record()["local"]
        assert record["integers"] > 0, f"{self.id}: nothing was compared"
        assert record["max_steps"] <= ALLOWED_STEPS, f"{self.id}: {record}"

    def _planned(self, graph: Graph, runtime: Target, specimen: Specimen) -> tuple[Graph, Plan]:
        data = [specimen.inputs(SAMPLES, 0)]
        names = [spec.name for spec in graph.inputs]
        context = Context(
            rules=runtime.rules(),
            arithmetic=runtime.arithmetic(),
            calibration=Source(data, role="calibration", names=names, labels="ignored"),
            reference=graph,
        )
        work, plan = graph.clone(), Plan.empty(runtime.name)
        activations: dict[Mode, dict[str, Any]] = {
            "static": {},
            "dynamic": {"dynamic": True},
            "weights": {"format": "float32"},
        }
        options = {"weights": self.weights, "activations": activations[self.mode]}
        for step in ("fold", "quantize", "calibrate"):
            work, plan = make(step, options if step == "quantize" else {})(work, plan, context)
        return work, _with_ties(plan) if self.power_of_two else plan


def _with_ties(plan: Plan) -> Plan:
    """The same plan with every scale rounded to a power of two."""
    changed = {
        name: replace(tie, scale=torch.exp2(tie.scale.log2().round()))
        for name, tie in plan.ties.items()
        if tie.scale is not None and tie.source in ("measured", "weight")
    }
    return settle(plan.with_ties(changed))


def target_cases(target: str, options: Mapping[str, Any] | None = None) -> Iterator[Case]:
    """Every case of a target: each kind of each row of its table, each specimen, both sorts of scales."""
    seen: set[tuple[str, str, str]] = set()
    rules = make_target(target, dict(options or {})).rules()
    for row in rules.rows:
        for kind in row.kinds:
            key = (kind, row.mode, row.kernel if row.mode != "static" else "")
            if key in seen:
                continue
            seen.add(key)
            # a row of stored weights that doesn't take every one takes groups of integers, where there are any
            stored = row.takes is not None and row.mode == "weights"
            grouped = stored and "group" in rules.weights[row.mode].granularities
            weights = IN_GROUPS if grouped else {}
            for specimen in SPECIMENS.get(kind, {}):
                for ties in (False, True) if row.mode == "static" else (False,):
                    yield Case(target, kind, specimen, ties, row.mode, row.kernel, weights, options or {})


def uncovered(target: str) -> set[str]:
    """Kinds in a target's table for which there is no tiny network."""
    kinds = {kind for row in make_target(target).rules().rows for kind in row.kinds}
    return kinds - set(SPECIMENS)


def check_target(target: str, options: Mapping[str, Any] | None = None) -> int:
    """Run every case of a target; returns how many ran.

    Raises AssertionError listing all cases that fail, and rows without a tiny network.
    """
    failures = [f"no tiny network for: {', '.join(sorted(uncovered(target)))}"] if uncovered(target) else []
    count = 0
    for case in target_cases(target, options):
        count += 1
        try:
            case.run()
        except AssertionError as error:
            failures.append(str(error))
    assert not failures, f"{len(failures)} failures in {count} cases of {target!r}:\n" + "\n".join(failures)
    return count
