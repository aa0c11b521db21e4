"""What is asked of every family: the original's values, gradients and names, then its integers on the runtime."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import pytest
import torch
from _pytest.mark.structures import ParameterSet
from tests.families import Inputs, build
from tests.flow import Prepared, Shipped, assert_exact, prepare, ship
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bitport.frontends.pytorch import load_module
from bitport.graph import Graph
from bitport.proof import cost


def in_turn(names: Iterable[str], fast: Iterable[str]) -> list[ParameterSet]:
    """Parameters of a test: all but the fast ones wait for `make test-slow` (the exporter takes seconds for each)."""
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names]


@functools.cache
def loaded(name: str) -> tuple[nn.Module, Graph]:
    """A family and its graph, captured from one sample: its batch must be dynamic all the same."""
    model, data = build(name)
    return model, load_module(model, data(1))


def inputs(name: str, count: int, seed: int) -> Inputs:
    torch.manual_seed(seed)
    return build(name)[1](count)


def tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def close(ours: Tensor, theirs: Tensor, scale: float) -> bool:
    return float((ours - theirs).detach().abs().max()) <= scale * max(1.0, float(theirs.detach().abs().max()))


def values_and_gradients(name: str, count: int) -> None:
    model, graph = loaded(name)
    assert not any("fixed" in note for note in graph.notes)
    example = inputs(name, count, seed=count)
    assert [spec.name for spec in graph.inputs] == list(example)
    assert all(spec.shape[0] == "batch" for spec in graph.inputs)
    ours = graph.module().eval()
    want, got = tensors(model(**example)), tensors(ours(**example))
    assert all(close(a, b, 1e-5) for a, b in zip(got, want, strict=True))
    for net, results in ((model, want), (ours, got)):
        net.zero_grad()
        torch.stack([t.square().mean() for t in results if t.is_floating_point()]).sum().backward()
    found, compared = dict(ours.named_parameters()), 0
    assert set(found) == {key for key, _ in model.named_parameters()}
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad = found[key].grad
            assert grad is not None, key
            assert close(grad, parameter.grad, 1e-4), key
            compared += int(parameter.grad.abs().max() > 0)
    assert compared > 3


@dataclass(frozen=True)
class Result:
    prepared: Prepared
    shipped: Shipped
    macs: dict[str, int]
    example: tuple[Tensor, ...]

    def share(self) -> float:
        """Integer share of the MACs, as planned and as found in the optimized file."""
        missed = self.shipped.inspection.missed
        done = sum(
            n for name, n in self.macs.items() if self.prepared.plan.node(name).kernel and name not in missed
        )
        return done / sum(self.macs.values())


def on_the_runtime(name: str) -> Result:
    """int8 with channel-wise weights on ONNX Runtime; every integer of every quantized tensor must be equal."""
    result = _arrived(name, "onnxruntime", 1e-4)
    assert_exact(result.shipped)
    return result


EXACT = {"openvino": 0.999}  # LayerNorm sums in another order elsewhere: a step here and there behind it
# Of the largest output. One step behind a norm grows through SigLIP's towers: 3 % measured, and none in a layer alone.
APART = {"siglip": 0.05}


def on(target: str, name: str) -> Result:
    """The same on another runtime: sums are exact, floats between integers a last bit apart here and there."""
    result = _arrived(name, target, APART.get(name, 0.02))
    local = result.shipped.record["local"]
    exact = EXACT.get(target, 0.995)
    assert local["integers"] > 0 and local["max_steps"] <= 1 and local["exact_share"] >= exact, local
    return result


def _arrived(name: str, target: str, apart: float) -> Result:
    """apart: how far outputs may be from the simulator's, in shares of the largest."""
    _, graph = loaded(name)
    batches = [tuple(inputs(name, 4, seed).values()) for seed in (11, 12)]
    prepared = prepare(graph, batches, target, weights={"granularity": "channel"})
    test = tuple(inputs(name, 6, seed=13).values())
    shipped = ship(prepared, test, tuple(value[:1] for value in test))
    for got, simulated in zip(shipped.outputs, prepared.simulator().run(test), strict=True):
        if got.is_floating_point():
            assert close(got, simulated, apart)
    macs = cost.macs(prepared.reference)
    islands = [n for n in prepared.reference.nodes() if (name_ := prepared.reference.name(n)) in macs
               and not prepared.plan.node(name_).kernel]  # fmt: skip
    assert all(prepared.plan.node(prepared.reference.name(n)).reason for n in islands), (
        "an island without a reason"
    )
    return Result(prepared, shipped, macs, test)
