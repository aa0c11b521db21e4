"""Whether there is memory for a compression, asked before any work: what it takes at least, and what is left.

What it takes is told from the network and one batch. A run holds the weights several times (the float network, its
folded and its quantized copy, the files that are written, the runtime's sessions) and, while a batch runs, the
activations that are alive at once: in float, as integers, and in the runtime. The two factors are the smallest that
were measured on networks of weights (Linear, a large embedding) and of activations (convolutions on 128×128), so
that nothing is refused that would have fitted; a run may take half as much again.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, fx

from ..errors import BitportError, GraphError, NotEnoughMemory
from ..graph import Graph
from .cost import resolve

LIMIT = "BITPORT_MEMORY_GB"
WEIGHTS, ACTIVATIONS = 5.5, 6.0  # times that a run holds them, besides the network that was given
SMALL = 256 * 2**20  # what Python and its libraries take now and then anyway; below it nothing is asked

# They look at the memory of what they are given.
_VIEWS = frozenset(
    ["view", "transpose", "expand", "slice", "select", "squeeze", "unsqueeze", "split", "getitem", "identity", "shape"]
)  # fmt: skip


def ask(graph: Graph, batch: Sequence[Tensor]) -> None:
    """Hold what a compression takes at least against what is left.

    Args:
        batch: flat inputs of a batch that will run.

    Raises NotEnoughMemory with both figures; BitportError when `BITPORT_MEMORY_GB` is no number.
    """
    limit = _limit()
    if limit == 0:
        return
    weights, activations = weight_bytes(graph), live_bytes(graph, batch)
    wanted = WEIGHTS * weights + ACTIVATIONS * activations
    left, whose = (limit, LIMIT) if limit is not None else available()
    if wanted <= max(left, SMALL):
        return
    remedy = "take a machine with more of it" if WEIGHTS * weights > left else "use smaller batches"
    raise NotEnoughMemory(
        f"compressing this network takes at least {_gb(wanted)} of memory more than now (weights {_gb(weights)}, "
        f"activations of a batch {_gb(activations)}), and {_gb(left)} are left ({whose}): {remedy}; "
        f"{LIMIT} sets what may be taken, 0 doesn't ask"
    )


def weight_bytes(graph: Graph) -> int:
    """Bytes of all parameters and buffers; tied ones count once."""
    tensors = (*graph.gm.parameters(), *graph.gm.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def live_bytes(graph: Graph, inputs: Sequence[Tensor]) -> int:
    """The most bytes of values that are alive at once while a batch runs operator by operator.

    Views count nothing, and so do operators whose size isn't known beforehand: it is a lower bound.
    """
    sizes = {**graph.sizes}
    for spec, tensor in zip(graph.inputs, inputs, strict=True):
        sizes |= {axis: n for axis, n in zip(spec.shape, tensor.shape, strict=True) if isinstance(axis, str)}
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.gm.graph.nodes:
        last |= dict.fromkeys(node.all_input_nodes, node)
    ending: dict[fx.Node, list[fx.Node]] = {}
    for value, user in last.items():
        ending.setdefault(user, []).append(value)
    alive = most = 0
    held: dict[fx.Node, int] = {}
    for node in graph.gm.graph.nodes:
        held[node] = _bytes(graph, node, sizes)
        alive += held[node]
        most = max(most, alive)
        alive -= sum(held[value] for value in ending.get(node, ()))
    return most


def _bytes(graph: Graph, node: fx.Node, sizes: dict[str, int]) -> int:
    value = node.meta.get("val")
    if node.op in ("get_attr", "output") or not isinstance(value, Tensor):
        return 0
    if node.op != "placeholder" and graph.op(node).kind in _VIEWS:
        return 0
    try:
        return math.prod(resolve(graph, node, graph.shape(node), sizes)) * value.element_size()
    except GraphError:
        return 0


def available(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> tuple[float, str]:
    """(bytes that this process may still take, what limits it): the machine, its control group, or `ulimit -v`."""
    found = [(_machine(proc), "free on this machine")]
    found += [(left, "the control group's limit") for left in _groups(proc, groups)]
    if (left := _address_space()) is not None:
        found.append((left, "ulimit -v"))
    return min(found)


def _machine(proc: Path) -> float:
    try:
        lines = (proc / "meminfo").read_text(encoding="ascii").splitlines()
        known = {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        return known["MemAvailable"] + known.get("SwapFree", 0)
    except (OSError, ValueError, LookupError):
        import psutil

        return float(psutil.virtual_memory().available)


def _groups(proc: Path, groups: Path) -> list[float]:
    """What is left in this process's control group (version 2, else 1) and those around it."""
    try:
        lines = (proc / "self" / "cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for _, kinds, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if kinds and "memory" not in kinds.split(","):
            continue
        root = groups / "memory" if kinds else groups
        names = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes") if kinds else ("memory.max", "memory.current")
        )
        inner = root / path.strip("/")
        for folder in (inner, *inner.parents):
            if not folder.is_relative_to(root):
                break
            left = _left_in(folder, *names)
            found += [left] if left is not None else []
    return found


def _left_in(folder: Path, limit: str, used: str) -> float | None:
    try:
        most, now = int((folder / limit).read_text()), int((folder / used).read_text())
    except (OSError, ValueError):  # no such file, or "max": no limit
        return None
    try:  # files that were read are dropped when memory is wanted
        rows = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        now -= next((int(row[1]) for row in rows if row[0] in ("inactive_file", "total_inactive_file")), 0)
    except (OSError, ValueError, IndexError):
        pass
    return float(max(0, most - now))


def _address_space() -> float | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    import psutil

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    return float(max(0, limit - psutil.Process().memory_info().vms))


def _limit() -> float | None:
    text = os.environ.get(LIMIT)
    if text is None:
        return None
    try:
        gigabytes = float(text)
    except ValueError:
        gigabytes = math.nan
    if not gigabytes >= 0:
        raise BitportError(f"{LIMIT} = {text!r}: give the GB that may be taken, or 0 to not ask")
    return gigabytes * 1e9


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"
