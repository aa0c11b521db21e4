"""What a network does in training only, and its capture in eval mode therefore lost: looked for by running it once.

Dropout that torch knows survives a capture (it follows the graph's own train / eval mode). Random decisions written
by hand, as stochastic depth or noise, and Python branches on `self.training` leave no trace in eval mode.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from bitport.graph import Graph

_MOST = 4  # modules that are listed by name


def decides(model: nn.Module) -> bool:
    """Whether any module's own code speaks of training: only then `erased` has to look."""
    return any(_decides(module) for module in model.modules())


def erased(
    model: nn.Module, twin: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], graph: Graph
) -> list[str]:
    """Notes on what a model does in train mode and `graph`, captured from it in eval mode, does not.

    The model runs in eval mode, its copy `twin` in train mode, once each on the example, with the caller's random
    state kept. A model that doesn't run in train mode on this example (it may want labels) gives no notes.
    """
    try:
        random, training = _watched(twin.train(), args, kwargs)
        _, inference = _watched(model, args, kwargs)
    except Exception:  # noqa: BLE001 (the user's code in a mode that nobody asked for: whatever it raises is no error)
        return []
    kept = _kept(graph)
    lost = sorted(path for path in random if path not in kept)
    notes = []
    if lost:
        more = f" and {len(lost) - _MOST} more" if len(lost) > _MOST else ""
        names = ", ".join(path or "the network itself" for path in lost[:_MOST])
        notes.append(
            f"random in training only, so not in the graph: {names}{more} (stochastic depth or dropout written by "
            "hand): the graph infers alike and trains without it"
        )
    if training != inference:
        notes.append(
            "in training the network returns other outputs than in inference: the graph has those of inference"
        )
    return notes


def _decides(module: nn.Module) -> bool:
    """Whether a module's own forward speaks of training, directly or by an argument."""
    if type(module).__module__.startswith("torch."):
        return False
    code = getattr(type(module).forward, "__code__", None)
    return code is None or "training" in (*code.co_names, *code.co_varnames, *code.co_consts)


def _kept(graph: Graph) -> set[str]:
    """Paths of modules whose randomness is in the graph, as dropout or as attention's own."""
    kept = set()
    for node in graph.nodes():
        op = graph.op(node)
        given = (
            op.attrs.get("p", 1.0)
            if op.kind == "dropout"
            else op.attrs.get("dropout_p", op.attrs.get("dropout"))
        )
        if given:
            kept.add(str(node.meta.get("bitport_path", "")))
            kept.add(graph.name(node))
    return kept


def _watched(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[set[str], Any]:
    """(paths of modules that drew random numbers, structure and shapes of the outputs)."""
    watch = _Watch()
    with torch.random.fork_rng(devices=[]), torch.no_grad(), watch.following(model), watch:
        result = model(*args, **kwargs)
    leaves, structure = pytree.tree_flatten(result)
    shapes = [tuple(leaf.shape) if isinstance(leaf, Tensor) else None for leaf in leaves]
    return watch.random, (str(structure), shapes)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the innermost module at each operator that draws random numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.random: set[str] = set()
        self.stack: list[str] = []

    @contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        handles = []
        for path, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(lambda *_, path=path: self.stack.append(path)))
            handles.append(module.register_forward_hook(lambda *_: self._leave(), always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _leave(self) -> None:
        self.stack.pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags and not _is_harmless(func, args, kwargs or {}):
            self.random.add(self.stack[-1] if self.stack else "")
        return func(*args, **(kwargs or {}))


def _is_harmless(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Attention's kernels carry the tag whatever their rate is."""
    if "attention" not in func.__name__:
        return False
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    return not given.get("dropout_p", 0.0)
