"""No runtime: the simulator alone. For formats no runtime holds, and as the shortest example of a target.

Every operator is computed in float32 on the integers' real values and rounded once. Its result is never called
a deployed file: `executes_integers` is False.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from .. import records
from ..graph import Graph
from ..graph.archive import load_pt2, save_pt2
from ..plan import Plan
from ..rules import (
    ANY_WEIGHT,
    DECODED,
    Derived,
    Fixed,
    Free,
    Holds,
    Mode,
    OpRule,
    Ranged,
    Ruleset,
    Shared,
    Weight,
    constant_parameters,
    constant_weight,
    positive_factor,
    zero_padding,
)
from ..simulate import Arithmetic, Simulator
from ._base import Inspection, Session, Target

MOVES = (
    "view", "transpose", "expand", "slice", "select", "squeeze", "unsqueeze", "split", "getitem", "cat", "stack",
    "max_pool", "pad",
)  # fmt: skip
PLAN_FILE = "null.plan.json"


class Null(Target):
    name = "null"
    summary = (
        "the exact simulator, no runtime: what no runtime can hold, and the shortest example of a target"
    )
    model_file = "null.pt2"

    def rules(self) -> Ruleset:
        free = (Free(),)
        rows = (
            OpRule(
                ("conv", "linear"),
                (Free(), Weight(0), Derived("bias")),
                Free(),
                "simulated",
                "compute",
                clamps=True,
                when=constant_parameters,
            ),
            OpRule(
                ("conv_transpose",),
                (Free(), Weight(None), Derived("bias")),
                Free(),
                "simulated",
                "compute",
                clamps=True,
                when=constant_parameters,
            ),
            *(
                OpRule(
                    (kind,),
                    (None if mode == "weights" else Ranged(), Weight(axis), None),
                    None,
                    DECODED if mode == "weights" else "simulated",
                    "compute",
                    mode=mode,
                    when=constant_weight,
                )
                for mode in ("dynamic", "weights")
                for kind, axis in (("conv", 0), ("linear", 0), ("conv_transpose", 1))
            ),
            OpRule(
                ("embedding",),
                (None, Weight(0)),
                None,
                DECODED,
                "compute",
                mode="weights",
                when=constant_weight,
            ),
            OpRule(("matmul",), free, Free(), "simulated", "compute"),
            OpRule(("add", "mul"), free, Free(), "simulated", "elementwise", clamps=True),
            OpRule(
                ("avg_pool", "global_avg_pool", "leaky_relu", "relu"),
                free,
                Free(),
                "simulated",
                "elementwise",
            ),
            OpRule(("sigmoid", "softmax"), free, Fixed(0.0, 1.0), "simulated", "elementwise"),
            OpRule(("mul_scalar",), free, Derived("value"), "none", "move", when=positive_factor),
            OpRule(("embedding",), (None, Shared()), Shared(), "simulated", "move"),
            OpRule(MOVES, (Shared(),), Shared(), "simulated", "move", when=zero_padding),
        )
        modes: tuple[Mode, ...] = ("static", "dynamic", "weights")
        return Ruleset(
            self.name,
            rows,
            activations=Holds(low=-(2**15), high=2**16 - 1, granularities=("global", "tensor")),
            weights=dict.fromkeys(modes, ANY_WEIGHT),
            widths=(),
        )

    def arithmetic(self) -> Arithmetic:
        return Arithmetic()

    def export(self, graph: Graph, plan: Plan, folder: Path) -> None:
        save_pt2(graph, folder / self.model_file)
        records.dump(folder / PLAN_FILE, plan.to_record())

    def open(self, folder: Path, *, taps: bool = False, optimize: bool = True) -> Session:
        plan = Plan.from_record(records.load(folder / PLAN_FILE))
        return _Simulated(load_pt2(folder / self.model_file), plan, self.arithmetic())

    def inspect(self, folder: Path, plan: Plan, *, taps: bool = False) -> Inspection:
        kernels = {name: (node.kernel,) for name, node in plan.nodes.items() if node.kernel is not None}
        return Inspection(
            kernels, Counter(kernel for (kernel,) in kernels.values()), integer=frozenset({"simulated"})
        )

    @property
    def executes_integers(self) -> bool:
        return False


class _Simulated(Session):
    def __init__(self, graph: Graph, plan: Plan, arithmetic: Arithmetic) -> None:
        self.simulator = Simulator(graph, plan, arithmetic)

    def run(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return self.simulator.run(inputs)

    def run_tapped(self, inputs: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        found: dict[str, Tensor] = {}

        def keep(name: str, q: Tensor) -> Tensor:
            found[name] = q
            return q

        return self.simulator.run(inputs, tap=keep), found


TARGET = Null
