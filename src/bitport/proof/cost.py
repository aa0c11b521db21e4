"""What a network costs: time against the original network, memory, multiply-accumulates, sparsity, sizes.

Times are compared, never quoted alone: both networks run in one process, in short alternating rounds (A B,
B A, A B …), so that a warm or a throttled processor hits both alike. The speed-up is the ratio of the medians
with a 95 % interval from a bootstrap over the *pairs* of rounds.
"""

from __future__ import annotations

import ast
import gc
import math
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import ArtifactError, GraphError
from ..graph import Graph, Operand
from ..numerics.intervals import ratio_of_medians
from ..progress import NullProgress, Progress
from .memory import Peak, peak_memory, run_memory

__all__ = ["FASTER_FROM", "Peak", "latency", "macs", "peak_memory", "run_memory", "sizes", "sparsity"]

FASTER_FROM = 1.02
"""The lower bound of a speed-up called faster exceeds this: two runs of one program differ by 1–2 %."""

_ROUND_MS = 5.0
_MIN_ROUNDS = 8
_KEPT_SAMPLES = 200


# -------------------------------------------------------------------------------------------------- time


def latency(
    run_float: Callable[[], object],
    run_compressed: Callable[[], object],
    *,
    threads: int,
    batch: int,
    seconds: float = 4.0,
    rounds: int = 100,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare the time of two calls.

    Args:
        run_float: one call of the original network; sessions and inputs are made beforehand.
        run_compressed: one call of the compressed one, on inputs of the same size.
        threads: threads both were given (recorded only).
        batch: samples per call (recorded only).
        seconds: stop after about that long. At least 8 rounds are made however slow a call is.
        rounds: stop after so many rounds. A round repeats each call until it lasts about 5 ms.

    Returns:
        `float_ms` and `compressed_ms` (medians per call), `speedup` = float / compressed, `ci95` of it,
        `verdict` (`faster`: the lower bound is above 1.02; `slower`: the upper bound is below 1; else
        `not faster`), `threads`, `batch`, `rounds` and `samples_ms` (≤ 200 of each, in order, for plots).
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        repeats_float = _warm_up(run_float, seconds / 8)
        repeats_compressed = _warm_up(run_compressed, seconds / 8)
        float_ms: list[float] = []
        compressed_ms: list[float] = []
        pair = ((run_float, repeats_float, float_ms), (run_compressed, repeats_compressed, compressed_ms))
        end = time.perf_counter() + seconds
        with (progress or NullProgress()).task("measure latency", total=max(rounds, _MIN_ROUNDS)) as task:
            for index in range(max(rounds, _MIN_ROUNDS)):
                if index >= _MIN_ROUNDS and index % 2 == 0 and time.perf_counter() > end:
                    break
                for run, repeats, samples in pair if index % 2 == 0 else reversed(pair):
                    samples.append(_time_ms(run, repeats))
                task.advance()
    finally:
        if collecting:
            gc.enable()
    speedup, low, high = (float(v) for v in ratio_of_medians(float_ms, compressed_ms))
    return {
        "float_ms": _median(float_ms),
        "compressed_ms": _median(compressed_ms),
        "speedup": speedup,
        "ci95": [low, high],
        "verdict": "faster" if low > FASTER_FROM else "slower" if high < 1 else "not faster",
        "threads": threads,
        "batch": batch,
        "rounds": len(float_ms),
        "samples_ms": {"float": _thin(float_ms), "compressed": _thin(compressed_ms)},
    }


def _warm_up(run: Callable[[], object], seconds: float) -> int:
    """Call until caches, arenas and clocks have settled; returns the calls that make one round."""
    end = time.perf_counter() + seconds
    best = _time_ms(run, 1)
    calls = 1
    while calls < 3 or (time.perf_counter() < end and calls < 200):
        if calls and best > seconds * 1000:
            break  # one call is longer than the whole warm-up: a second teaches nothing
        best = min(best, _time_ms(run, 1))
        calls += 1
    return max(1, math.ceil(_ROUND_MS / max(best, 1e-4)))


def _time_ms(run: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter_ns()
    for _ in range(repeats):
        run()
    return (time.perf_counter_ns() - start) / repeats / 1e6


def _median(values: Sequence[float]) -> float:
    ordered, middle = sorted(values), len(values) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _thin(values: list[float]) -> list[float]:
    step = math.ceil(len(values) / _KEPT_SAMPLES)
    return [round(v, 6) for v in values[::step]]


# --------------------------------------------------------------------------------------------- operators


def macs(graph: Graph, sizes: Mapping[str, int] | None = None) -> dict[str, int]:
    """Multiply-accumulates of one sample (batch 1), by operator name in network order.

    Counted are convolutions, linear layers, matrix products, attention (both products) and the gate products
    of recurrent layers; biases and element-wise work are not. Operators that don't depend on an input count
    nothing.
    A batch that is fixed in the graph stays as it is.

    Args:
        graph: shapes must be propagated.
        sizes: lengths of other symbolic axes than the batch, by name; default: those of the example.

    Raises:
        GraphError: the length of a symbolic axis is unknown.
    """
    known = {**graph.sizes, **(sizes or {})}
    batch = graph.inputs[0].shape[0] if graph.inputs and graph.inputs[0].shape else None
    if isinstance(batch, str):
        known[batch] = 1
    found = {}
    for node in graph.nodes():
        op = graph.op(node)
        if op.kind in _MACS and not graph.is_constant(node):
            shapes = [_concrete(graph, node, operand, known) for operand in op.operands]
            number = _MACS[op.kind](shapes, resolve(graph, node, graph.shape(node), known))
        elif op.kind.startswith("other:") and not graph.is_constant(node):
            number = _unknown(graph, node, known)
        else:
            continue
        if number:
            found[graph.name(node)] = number
    return found


def _unknown(graph: Graph, node: fx.Node, known: Mapping[str, int]) -> int:
    """MACs of an operator without a formula here: it is run on tensors without data under torch's own counter.

    So that a product in disguise can't make an integer share look whole.
    """
    from torch.utils.flop_counter import FlopCounterMode

    def stand_in(value: fx.Node) -> Any:
        example = value.meta.get("val")
        if isinstance(example, Tensor):
            shape = resolve(graph, node, graph.shape(value), known)
            return torch.empty(shape, dtype=example.dtype, device="meta")
        return example.node.hint if isinstance(example, torch.SymInt) else example

    assert callable(node.target)
    counter = FlopCounterMode(display=False)
    try:
        args, kwargs = fx.map_arg((node.args, node.kwargs), stand_in)
        with counter:
            node.target(*args, **kwargs)
    except Exception:  # noqa: BLE001 (operators without a meta kernel raise anything; they are no products)
        return 0
    return int(counter.get_total_flops()) // 2


def _convolution(operands: list[_Shape], out: _Shape) -> int:
    weight = operands[1]  # [O, I/groups, *kernel]
    return math.prod(out) * math.prod(weight[1:])


def _transposed(operands: list[_Shape], out: _Shape) -> int:
    x, weight = operands[:2]  # [I, O/groups, *kernel]: each element of the input meets all but the first axis
    return math.prod(x) * math.prod(weight[1:])


def _product(operands: list[_Shape], out: _Shape) -> int:
    # linear: x [.., I]; matmul: a [.., M, K]. Each element of the result sums over the first one's last axis.
    return math.prod(out) * operands[0][-1]


def _attention(operands: list[_Shape], out: _Shape) -> int:
    q, k, v = operands[:3]  # [.., L, E], [.., S, E], [.., S, V]
    return math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def _recurrent(operands: list[_Shape], out: _Shape) -> int:
    # each step multiplies once with every matrix of every layer and direction; states are 3-D, biases 1-D
    return math.prod(operands[0][:-1]) * sum(math.prod(w) for w in operands[1:] if len(w) == 2)


_Shape = tuple[int, ...]
_MACS: dict[str, Callable[[list[_Shape], _Shape], int]] = {
    "conv": _convolution,
    "conv_transpose": _transposed,
    "linear": _product,
    "matmul": _product,
    "addmm": _product,
    "grouped_mm": _product,  # each row meets the matrix of one expert
    "experts": _product,
    "sdpa": _attention,
    "lstm": _recurrent,
    "gru": _recurrent,
    "rnn": _recurrent,
}


def _concrete(graph: Graph, node: fx.Node, operand: Operand | None, known: Mapping[str, int]) -> _Shape:
    """The shape of an operand with every symbolic axis put in; () where it is absent."""
    if operand is None:
        return ()
    if operand.node is None:
        return tuple(graph.tensor(str(operand.tensor)).shape)
    return resolve(graph, node, graph.shape(operand.node), known)


def resolve(
    graph: Graph, node: fx.Node, shape: tuple[int | str, ...] | None, known: Mapping[str, int]
) -> _Shape:
    """A shape of a node with the lengths of its symbolic axes put in. Raises GraphError where one is unknown."""
    try:
        return tuple(axis if isinstance(axis, int) else _evaluate(axis, known) for axis in shape or ())
    except (KeyError, SyntaxError, TypeError, ZeroDivisionError) as error:
        raise GraphError(
            f"{graph.name(node)}: the length of an axis of {shape} is unknown ({error}): "
            "give the lengths of symbolic axes as sizes={name: length}"
        ) from error


def _power(base: int, exponent: int) -> int:
    if not 0 <= exponent <= 8:
        raise TypeError(f"a size to the power {exponent} can't be meant")
    return int(base**exponent)


_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "Max": max,
    "Min": min,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "CeilDiv": lambda a, b: -(-a // b),
    "floor": math.floor,
    "ceiling": math.ceil,
}


def _evaluate(text: str, known: Mapping[str, int]) -> int:
    """A size written over axis names, as `2*batch + 1`. Parsed, not evaluated: names come from files."""

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.Name):
            return known[node.id]
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.BinOp):
            return _OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return _FUNCTIONS[node.func.id](*(value(argument) for argument in node.args))
        raise TypeError(f"{ast.unparse(node)!r} can't be read")

    return int(value(ast.parse(text, mode="eval").body))


def sparsity(graph: Graph) -> float:
    """Share of exact zeros, 0–1, in the weights of operators that multiply and of embeddings; a tensor used
    twice counts once. 0.0 for a network without weights."""
    # by identity, because a tied weight has several names
    weights = {
        id(weight := graph.tensor(operand.tensor)): weight
        for node in graph.nodes()
        if (op := graph.op(node)).kind in _MACS or op.kind == "embedding"
        for operand in op.operands
        if operand is not None and operand.tensor is not None
    }
    tensors = [w for w in weights.values() if w.ndim >= 2 and w.is_floating_point()]
    total = sum(w.numel() for w in tensors)
    return sum(int((w == 0).sum()) for w in tensors) / total if total else 0.0


# ------------------------------------------------------------------------------------------------- files


def sizes(reference: Path, folder: Path) -> dict[str, Any]:
    """Bytes of the files a runtime needs: `model.*`, else `weights.safetensors`.

    Args:
        reference: folder of the original network, exported for the same runtime.
        folder: the artifact folder. Its own reference, samples and records are not counted.

    Returns: `float_bytes`, `compressed_bytes`, `ratio` = compressed / float.

    Raises:
        ArtifactError: one of the folders holds no model file.
    """
    before, after = _model_bytes(Path(reference)), _model_bytes(Path(folder))
    return {"float_bytes": before, "compressed_bytes": after, "ratio": after / before}


def _model_bytes(folder: Path) -> int:
    files = [p for p in sorted(folder.glob("model.*")) if p.is_file()]
    if not files:
        files = [p for p in (folder / "weights.safetensors",) if p.is_file()]
    total = sum(p.stat().st_size for p in files)
    if total == 0:
        raise ArtifactError(f"{folder} holds no model file (model.*): run compress again")
    return total
