"""Float operators against ONNX Runtime: the same bits, all of them, where the docstrings say so."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from tests.targets.onnxruntime.one_op import OneOp
from torch import Tensor
from torch.nn import functional as F

from bitport.targets.onnxruntime.float_ops import FLOAT_OPS, TILE, ordered_sum

# the kernels of other instruction sets add in another order
pytestmark = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="measured on x86-64 with AVX-512"
)

SHAPES = [(64, 500), (7,), (3, 13), (1, 1), (4103,), (2, 3, 5)]
SPREADS = (1.0, 3.0, 10.0, 40.0)


def run(op: str, x: Tensor, *constants: Tensor | np.ndarray[Any, Any], **attrs: Any) -> Tensor:
    graph = OneOp()
    names = [graph.constant(np.asarray(c)) for c in constants]
    graph.floating(graph.op(op, graph.input(x.numpy()), *names, **attrs))
    return graph.run()[0]


def different_bits(got: Tensor, want: Tensor) -> int:
    assert got.shape == want.shape
    return int((got.view(torch.int32) != want.contiguous().view(torch.int32)).sum())


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(*shape, generator=generator) * spread for shape in SHAPES for spread in SPREADS]
    return [*drawn, torch.linspace(-100, 88, 4001), torch.linspace(-1.5, 1.5, 4001)]


@pytest.mark.parametrize(
    ("kind", "op", "attrs"),
    [
        ("sigmoid", "Sigmoid", {}),
        ("tanh", "Tanh", {}),
        ("erf", "Erf", {}),
        ("exp", "Exp", {}),
        ("gelu", "Gelu", {}),
        ("gelu", "Gelu", {"approximate": "tanh"}),
        ("hardswish", "HardSwish", {}),
    ],
)
def test_elementwise(kind: str, op: str, attrs: dict[str, Any]) -> None:
    for x in inputs():
        assert different_bits(run(op, x.clamp(max=88), **attrs), FLOAT_OPS[kind](attrs, x.clamp(max=88))) == 0


@pytest.mark.parametrize("kind", ["sigmoid", "tanh", "exp", "erf", "gelu", "silu"])
def test_large_tensors_are_computed_in_tiles_to_the_same_bits(kind: str) -> None:
    x = 3 * torch.randn(3, TILE, generator=torch.Generator().manual_seed(1))[:, 5:].mT
    found = FLOAT_OPS[kind]({}, x)
    assert found.shape == x.shape and x.numel() > 2 * TILE
    rows = torch.cat([FLOAT_OPS[kind]({}, part) for part in torch.split(x, 1000)])
    assert torch.equal(found, rows)


def test_exp_reaches_zero_the_denormals_and_infinity() -> None:
    x = torch.tensor([-1000.0, -103.97, -100.0, -88.0, 88.7, 89.0, 1000.0] * 5)
    got = FLOAT_OPS["exp"]({}, x)
    assert different_bits(run("Exp", x), got) == 0
    assert bool((got == 0).any()) or float(got.min()) < 1e-44
    assert bool(got.isinf().any())


def test_hardsigmoid() -> None:
    for x in inputs():
        got = run("HardSigmoid", x, alpha=1 / 6, beta=0.5)
        assert different_bits(got, FLOAT_OPS["hardsigmoid"]({}, x)) == 0


def test_silu_as_sigmoid_and_mul() -> None:
    for x in inputs():
        graph = OneOp()
        name = graph.input(x.numpy())
        graph.floating(graph.op("Mul", name, graph.op("Sigmoid", name)))
        assert different_bits(graph.run()[0], FLOAT_OPS["silu"]({}, x)) == 0


def test_torch_gives_other_bits() -> None:
    """Were torch's the same, these formulas would be superfluous."""
    x = inputs()[0]
    for kind, op in [("sigmoid", torch.sigmoid), ("tanh", torch.tanh), ("gelu", F.gelu), ("silu", F.silu)]:
        assert different_bits(op(x), FLOAT_OPS[kind]({}, x)) > x.numel() // 10


@pytest.mark.parametrize("length", [1, 2, 3, 8, 15, 16, 17, 31, 48, 50, 64, 65, 197, 1000])
def test_softmax(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(5, length, 3, generator=generator) * 4
    assert different_bits(run("Softmax", x, axis=1), FLOAT_OPS["softmax"]({"dim": 1}, x)) == 0
    rows = x.movedim(1, -1).contiguous()
    assert different_bits(run("Softmax", rows, axis=-1), FLOAT_OPS["softmax"]({"dim": -1}, rows)) == 0


@pytest.mark.parametrize("length", [1, 2, 5, 7, 8, 9, 11, 12, 15, 16, 20, 31, 64, 100, 197, 768])
def test_layer_norm(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(3, 40, length, generator=generator) * 2 + 0.7
    weight, bias = torch.rand(length, generator=generator) + 0.5, torch.randn(length, generator=generator)
    for eps in (1e-5, 1e-6):
        attrs = {"normalized_shape": (length,), "eps": eps}
        got = run("LayerNormalization", x, weight, bias, axis=-1, epsilon=eps)
        assert different_bits(got, FLOAT_OPS["layer_norm"](attrs, x, weight, bias)) == 0
        plain = run("LayerNormalization", x, weight, axis=-1, epsilon=eps)
        assert int((plain != FLOAT_OPS["layer_norm"](attrs, x, weight, None)).sum()) == 0


def test_layer_norm_over_two_dimensions() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(6, 4, 5, generator=generator), torch.rand(4, 5, generator=generator)
    got = run("LayerNormalization", x, weight, weight - 0.5, axis=1, epsilon=1e-5)
    want = FLOAT_OPS["layer_norm"]({"normalized_shape": (4, 5), "eps": 1e-5}, x, weight, weight - 0.5)
    assert different_bits(got, want) == 0


@pytest.mark.parametrize("length", [4, 16, 33, 100])
def test_rms_norm(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    x, weight = torch.randn(3, 20, length, generator=generator), torch.rand(length, generator=generator)
    graph = OneOp()
    name = graph.input(x.numpy())
    square = graph.op("Pow", name, graph.constant(np.float32(2)))
    average = graph.op("ReduceMean", square, graph.constant(np.array([-1])), keepdims=1)
    root = graph.op("Sqrt", graph.op("Add", average, graph.constant(np.float32(1e-5))))
    scaled = graph.op("Mul", name, graph.op("Reciprocal", root))
    graph.floating(graph.op("Mul", scaled, graph.constant(weight.numpy())))
    got, kinds = graph.run()
    assert "Reciprocal" in kinds, "ONNX Runtime fuses RMSNorm now: reproduce its kernel"
    want = FLOAT_OPS["rms_norm"]({"normalized_shape": (length,), "eps": 1e-5}, x, weight)
    assert different_bits(got, want) == 0


def _adjacent(shape: Sequence[int], dims: Sequence[int]) -> bool:
    """Whether the reduced dimensions are next to each other, those of size 1 aside, and not all of them."""
    inner = [d for d, size in enumerate(shape) if size > 1]
    reduced = [i for i, d in enumerate(inner) if d in dims]
    return not reduced or (reduced[-1] - reduced[0] + 1 == len(reduced) < len(inner))


@pytest.mark.parametrize(
    "shape", [(50, 7), (3, 49), (4, 50, 64), (2, 3, 5, 7), (3, 5, 7, 11), (2, 300, 33), (2, 9, 1)]
)
def test_mean(shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 2 + 0.7
    for count in range(1, len(shape) + 1):
        for dims in combinations(range(len(shape)), count):
            for keepdim in (True, False):
                got = run("ReduceMean", x, np.array(dims), keepdims=int(keepdim))
                want = FLOAT_OPS["mean"]({"dim": dims, "keepdim": keepdim}, x)
                if _adjacent(shape, dims):
                    assert different_bits(got, want) == 0
                else:
                    assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)


def test_mean_takes_a_negative_or_no_dimension() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(FLOAT_OPS["mean"]({"dim": -1, "keepdim": False}, x), torch.tensor([1.0, 4.0]))
    assert FLOAT_OPS["mean"]({"dim": None}, x).item() == 2.5


def test_ordered_sum_is_left_to_right() -> None:
    x = torch.tensor([2.0**24, 1.0, 1.0, -(2.0**24)])
    assert ordered_sum(x).item() == 0.0
    assert ordered_sum(x.flip(0)).item() == 2.0


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("number", [torch.float32, torch.int64])
def test_equal_values_keep_their_order_when_sorted(largest: bool, number: torch.dtype) -> None:
    """The router of a mixture of experts sorts small integers: torch leaves the order of equal ones open."""
    x = torch.randint(0, 4, (5, 300), generator=torch.Generator().manual_seed(2)).to(number)
    for count in (300, 7):
        graph = OneOp()
        operands = [graph.input(x.numpy()), graph.constant(np.array([count]))]
        graph.nodes.append(helper.make_node("TopK", operands, ["values", "places"], largest=int(largest)))
        graph.outputs.append(helper.make_tensor_value_info("places", TensorProto.INT64, None))
        places = graph.run()[0]
        attrs = {"dim": 1, "k": count, "largest": largest, "descending": largest}
        found = FLOAT_OPS["topk"](attrs, x)
        assert torch.equal(found[1], places) and torch.equal(found[0], x.gather(1, places))
        if count == 300:
            assert torch.equal(FLOAT_OPS["sort"](attrs, x)[1], places)
            assert torch.equal(FLOAT_OPS["argsort"](attrs, x), places)


@pytest.mark.parametrize("shape", [(4, 16, 9, 9), (3, 5, 7), (6, 33), (2, 64, 1, 1)])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm(shape: tuple[int, ...], affine: bool) -> None:
    channels = shape[1]
    x, mean, var = torch.randn(shape), torch.randn(channels), torch.rand(channels) + 0.1
    gamma, beta = (torch.randn(channels), torch.randn(channels)) if affine else (None, None)
    stored = (torch.ones(channels), torch.zeros(channels)) if gamma is None or beta is None else (gamma, beta)
    want = run("BatchNormalization", x, *stored, mean, var, epsilon=1e-5)
    assert different_bits(want, FLOAT_OPS["batch_norm"]({"eps": 1e-5}, x, gamma, beta, mean, var)) == 0


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize(
    ("size", "scales"),
    [
        ((13, 7), None),
        ((31, 40), None),
        ((9, 22), None),
        (None, (2.0, 2.0)),
        (None, (1.7, 0.6)),
        ((1, 1), None),
    ],
)
def test_resize_bilinear(
    size: tuple[int, int] | None, scales: tuple[float, float] | None, align: bool
) -> None:
    x = torch.randn(2, 5, 9, 11)
    graph = OneOp()
    given = [graph.input(x.numpy()), ""]
    if scales is None:
        given += ["", graph.constant(np.array([2, 5, *(size or ())]))]
    else:
        given += [graph.constant(np.array([1, 1, *scales], np.float32))]
    mode = "align_corners" if align else "half_pixel"
    graph.floating(graph.op("Resize", *given, mode="linear", coordinate_transformation_mode=mode))
    attrs = {"size": size, "scales": scales, "align_corners": align}
    assert different_bits(graph.run()[0], FLOAT_OPS["resize_bilinear"](attrs, x)) == 0
