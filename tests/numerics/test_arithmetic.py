"""Exactness of the shared integer arithmetic, against integer arithmetic proper."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from bitport.errors import GraphError
from bitport.numerics.arithmetic import (
    QSpec,
    QTensor,
    along,
    carrier,
    convolve,
    convolve_transposed,
    fma,
    multiply,
    project,
    quantize,
    reach,
    requantize_float,
    rne,
    spread,
)

CPU = torch.device("cpu")


def integers(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(low, high + 1, shape).astype(np.int32))


def qtensor(q: Tensor, zero_point: int = 0, scale: float = 1.0, bits: int = 8) -> QTensor:
    half = 2 ** (bits - 1)
    return QTensor(q, torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32), -half, half - 1)


def test_dequantize_per_channel() -> None:
    q = torch.tensor([[1, 2], [3, 4]], dtype=torch.int32)
    scale, zero = torch.tensor([0.5, 0.25]), torch.tensor([1, -1], dtype=torch.int32)
    assert torch.equal(
        QTensor(q, scale, zero, -8, 7, 0).dequantize(), torch.tensor([[0.0, 0.5], [1.0, 1.25]])
    )
    assert torch.equal(
        QTensor(q, scale, zero, -8, 7, 1).dequantize(), torch.tensor([[0.0, 0.75], [1.0, 1.25]])
    )


def test_scales_without_an_axis_are_refused() -> None:
    with pytest.raises(GraphError, match="without a channel axis"):
        along(torch.ones(3), 2, None)
    assert along(torch.ones(1), 2, None).ndim == 0
    assert along(torch.ones(3), 4, -1).shape == (1, 1, 1, 3)


def test_spread() -> None:
    assert spread(2, 3) == (2, 2, 2)
    assert spread([2], 2) == (2, 2)
    assert spread((1, 2), 2) == (1, 2)


def test_rne_breaks_ties_to_even_and_clips() -> None:
    values = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.49, 1e30, -1e30])
    assert rne(values, -100, 100).tolist() == [-2, -2, 0, 0, 2, 2, 3, 100, -100]


@given(
    st.integers(-255, 255), *[st.floats(-1e3, 1e3, width=32).filter(lambda v: v == 0 or abs(v) > 1e-3)] * 2
)
def test_fma_rounds_once(a: int, b: float, c: float) -> None:
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    got = fma(torch.tensor(float(a)), torch.tensor(b), torch.tensor(c)).item()
    nearest = np.float32(got)
    for neighbour in (np.nextafter(nearest, np.float32(-np.inf)), np.nextafter(nearest, np.float32(np.inf))):
        assert abs(Fraction(float(nearest)) - exact) <= abs(Fraction(float(neighbour)) - exact)


def test_fma_differs_from_two_roundings() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, c = torch.randn(3, 10000, generator=generator)
    assert int((fma(a, b, c) != a * b + c).sum()) > 100


def test_requantize_adds_the_zero_point_after_rounding() -> None:
    acc = torch.tensor([1, 3, 5, 1000], dtype=torch.int32)
    zero = torch.tensor(3, dtype=torch.int32)
    assert requantize_float(acc, torch.tensor(0.5), zero, -128, 127).tolist() == [3, 5, 5, 127]
    per_channel = requantize_float(acc.reshape(2, 2), torch.tensor([1.0, 10.0]), zero, -128, 127, 1)
    assert per_channel.tolist() == [[4, 33], [8, 127]]


def test_quantize_divides() -> None:
    spec = QSpec(torch.tensor(0.1), torch.tensor(-3, dtype=torch.int32), -128, 127)
    x = torch.arange(-200, 200, dtype=torch.float32) * 0.05
    want = np.clip(np.rint(x.numpy() / np.float32(0.1)) - 3, -128, 127)
    assert np.array_equal(quantize(x, spec).numpy(), want)


def test_carrier_is_the_cheapest_exact_type() -> None:
    assert carrier(2**24 - 1, CPU) is torch.float32
    assert carrier(2**24, CPU) is torch.float64
    assert carrier(1, torch.device("cuda")) is torch.float64
    with pytest.raises(GraphError, match="narrower"):
        carrier(2**53, CPU)


def test_reach_is_the_worst_distance_from_zero() -> None:
    assert reach(qtensor(torch.zeros(1, dtype=torch.int32), -128)) == 255
    assert reach(qtensor(torch.zeros(1, dtype=torch.int32), 27)) == 155


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(
    ("x_shape", "w_shape", "groups"),
    [((2, 6, 20), (4, 3, 5), 2), ((2, 4, 9, 9), (4, 1, 3, 3), 4), ((1, 40, 5, 5, 4), (3, 40, 3, 3, 3), 1)],
)
def test_convolution_is_exact(
    bits: int, x_shape: tuple[int, ...], w_shape: tuple[int, ...], groups: int
) -> None:
    half = 2 ** (bits - 1)
    x = qtensor(integers(-half, half - 1, *x_shape), 5, bits=bits)
    w = qtensor(integers(-127, 127, *w_shape, seed=1))
    bias = qtensor(integers(-1000, 1000, w_shape[0], seed=2), bits=32)
    options = dict(stride=2, padding=1, dilation=1, groups=groups)  # noqa: C408
    got = convolve(x, w, bias, **options)
    run = (F.conv1d, F.conv2d, F.conv3d)[len(x_shape) - 3]
    want = run((x.q.long() - 5), w.q.long(), bias.q.long(), 2, 1, 1, groups)
    assert got.dtype == torch.int32
    assert torch.equal(got.long(), want)


def test_convolution_takes_torch_padding_by_name() -> None:
    x, w = qtensor(integers(-8, 7, 1, 2, 5, 5)), qtensor(integers(-8, 7, 2, 2, 3, 3))
    assert torch.equal(convolve(x, w, padding="same"), convolve(x, w, padding=1))


def test_per_channel_weights_with_zero_points() -> None:
    w = QTensor(
        integers(-128, 127, 3, 10), torch.ones(3), torch.tensor([1, -7, 100], dtype=torch.int32), -128, 127, 0
    )
    x = qtensor(integers(-128, 127, 4, 10, seed=1), -128)
    want = (x.q + 128).long() @ (w.q - w.zero_point[:, None]).long().T
    assert torch.equal(project(x, w).long(), want)


def test_transposed_convolution_is_exact() -> None:
    x, w = qtensor(integers(-128, 127, 2, 6, 4, 4), -10), qtensor(integers(-127, 127, 6, 2, 3, 3, seed=1))
    bias = qtensor(integers(-1000, 1000, 4, seed=2), bits=32)
    got = convolve_transposed(x, w, bias, stride=2, padding=1, output_padding=1, dilation=1, groups=2)
    reference = F.conv_transpose2d((x.q + 10).double(), w.q.double(), bias.q.double(), 2, 1, 1, 2, 1)
    assert torch.equal(got, reference.to(torch.int32))


def test_worst_case_sums_stay_exact() -> None:
    """All products at their largest and of odd value: float32 would lose the last bit from 2^24 on."""
    for terms in (513, 514, 600, 5000):
        x = qtensor(torch.full((1, terms), 127, dtype=torch.int32), -128)
        w = qtensor(torch.full((2, terms), -127, dtype=torch.int32))
        w.q[1, 0] = -126
        assert project(x, w).tolist() == [[-255 * 127 * terms, -255 * 127 * terms + 255]]


def test_matrix_product_is_exact_and_broadcasts() -> None:
    a, b = qtensor(integers(-128, 127, 2, 1, 4, 700), 3), qtensor(integers(-128, 127, 5, 700, 6, seed=1), -4)
    assert torch.equal(multiply(a, b).long(), (a.q - 3).long() @ (b.q + 4).long())


def test_the_bias_wraps_as_a_register_does() -> None:
    x, w = qtensor(torch.ones(1, 1, dtype=torch.int32)), qtensor(torch.ones(1, 1, dtype=torch.int32))
    bias = qtensor(torch.tensor([2**31 - 1], dtype=torch.int32), bits=32)
    assert project(x, w, bias).item() == -(2**31)
