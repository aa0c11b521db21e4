"""Second moments of inputs: windows as torch unfolds them, sums that know their means, dampings that end."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from bitport.errors import DataError
from bitport.numerics import hessian
from bitport.numerics.hessian import InputMoments, damped, patches, shifted, spread_evenly

CONVOLUTIONS = [
    (1, 1, 0, 1, 1), (3, 1, 1, 1, 1), (3, 2, 1, 1, 2), (2, 2, 0, 1, 1), (3, 1, 2, 2, 4), (5, 3, 1, 1, 1),
]  # fmt: skip


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation", "groups"), CONVOLUTIONS)
def test_windows_times_weights_are_the_convolution(
    ndim: int, kernel: int, stride: int, padding: int, dilation: int, groups: int
) -> None:
    x = torch.randn(2, 4, *[7, 6, 8][:ndim], dtype=torch.float64)
    w = torch.randn(8, 4 // groups, *[kernel] * ndim, dtype=torch.float64)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[ndim - 1]
    wanted = convolve(x, w, None, stride, padding, dilation, groups)
    arguments = [[size] * ndim for size in (kernel, stride, padding, dilation)]
    rows = torch.cat(list(patches(x, *arguments, groups, 10**6)))
    found = torch.einsum("pbk,brk->pbr", rows, w.reshape(groups, 8 // groups, -1)).flatten(1)
    assert torch.allclose(found, wanted.movedim(1, -1).reshape(-1, 8))


@given(st.integers(0, 500), st.integers(1, 300))
def test_places_are_spread_evenly(count: int, most: int) -> None:
    found = spread_evenly(count, most).tolist()
    assert len(found) == min(count, most)
    assert found == sorted(set(found)) and all(0 <= place < count for place in found)
    gaps = [b - a for a, b in itertools.pairwise(found)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_fewer_windows_are_some_of_all() -> None:
    x = torch.randn(3, 2, 6, 6)
    arguments = ([3, 3], [1, 1], [1, 1], [1, 1], 1)
    every, few = (torch.cat(list(patches(x, *arguments, most))) for most in (10**6, 20))
    assert torch.equal(few, every[spread_evenly(len(every), 20)])


def test_windows_come_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 4, 6, 6)
    arguments = ([3, 3], [1, 1], [1, 1], [1, 1], 2, 10**6)
    whole = list(patches(x, *arguments))
    monkeypatch.setattr(hessian, "ROWS", 40 * 36)
    parts = list(patches(x, *arguments))
    assert len(whole) == 1 and [len(part) for part in parts] == [40, 40, 28]
    assert torch.equal(torch.cat(parts), whole[0])


def moments(x: Tensor, hat: Tensor, parts: int = 1) -> InputMoments:
    found = InputMoments()
    for a, b in zip(x.chunk(parts), hat.chunk(parts), strict=True):
        found.update(a, b)
    return found


@pytest.mark.parametrize("parts", [1, 3])
def test_moments_are_those_of_all_batches(parts: int) -> None:
    x = torch.randn(30, 2, 5) + 1
    hat = x + 0.1 * torch.randn(30, 2, 5)
    found = moments(x, hat, parts)
    h, c = found.settled(centred=False)
    wide, rounded = x.double(), hat.double()
    assert torch.allclose(h, torch.einsum("pbi,pbj->bij", rounded, rounded) / 30, atol=1e-5)
    assert torch.allclose(c, torch.einsum("pbi,pbj->bij", wide, rounded) / 30, atol=1e-5)
    assert torch.allclose(found.means[0], wide.mean(0)) and torch.allclose(found.means[1], rounded.mean(0))
    h, c = found.settled(centred=True)
    a, b = wide - wide.mean(0), rounded - rounded.mean(0)
    assert torch.allclose(h, torch.einsum("pbi,pbj->bij", b, b) / 30, atol=1e-5)
    assert torch.allclose(c, torch.einsum("pbi,pbj->bij", a, b) / 30, atol=1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_inputs_that_have_no_squares_are_refused(bad: float) -> None:
    x = torch.ones(4, 1, 3)
    x[2, 0, 1] = bad
    with pytest.raises(DataError, match="not finite, or too large"):
        moments(x, x).settled(centred=True)


@pytest.mark.parametrize("losses", [True, False])
def test_float_inputs_that_are_not_finite_are_refused(losses: bool) -> None:
    found = InputMoments(losses)
    found.update(torch.full((4, 1, 3), torch.nan), torch.ones(4, 1, 3))
    with pytest.raises(DataError, match="not finite, or too large"):
        found.settled(centred=False)


@pytest.mark.parametrize("centred", [True, False])
def test_without_losses_the_float_inputs_only_have_means(centred: bool) -> None:
    x = torch.randn(30, 2, 5) + 1
    hat = x + 0.1 * torch.randn(30, 2, 5)
    every, found = moments(x, hat), InputMoments(losses=False)
    found.update(x, hat)
    h, c = found.settled(centred)
    assert torch.equal(h, every.settled(centred)[0]) and torch.equal(c, h)
    assert torch.equal(found.means[0], every.means[0])


@pytest.mark.parametrize("inputs", [255, 256, 301])
def test_a_wide_hessian_is_that_of_the_whole(inputs: int) -> None:
    x = torch.randn(40, 2, inputs)
    h, c = moments(x, x).settled(centred=False)
    assert torch.equal(h, h.mT)
    assert torch.allclose(h, c, rtol=1e-5, atol=1e-5)


@given(st.integers(1, 8), st.integers(1, 12), st.integers(0, 2**31))
def test_a_damped_hessian_is_definite(samples: int, inputs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 1, inputs, generator=generator)
    x[:, :, torch.rand(inputs, generator=generator) < 0.3] = 0  # dead inputs
    h, _ = moments(x, x).settled(centred=False)
    found = damped(h, 0.01)
    if not bool(x.any()):
        assert found is None
        return
    assert found is not None
    assert not bool(torch.linalg.cholesky_ex(found)[1].any())
    alive = h.diagonal(dim1=1, dim2=2) > 0
    assert torch.allclose(found[:, alive[0]][:, :, ~alive[0]], torch.zeros(()).double())


@pytest.mark.parametrize("h", [torch.zeros(1, 3, 3), torch.full((1, 3, 3), torch.nan), -torch.eye(3)[None]])
def test_a_hessian_that_says_nothing_is_none(h: Tensor) -> None:
    assert damped(h.double(), 0.01) is None


def test_a_group_whose_inputs_are_all_dead_does_not_stop_the_others() -> None:
    x = torch.randn(50, 3, 4)
    x[:, 1] = 0
    h, _ = moments(x, x).settled(centred=False)
    found = damped(h, 0.01)
    assert found is not None
    assert torch.equal(found[1], torch.eye(4, dtype=torch.float64) * found[1, 0, 0]) and found[1, 0, 0] > 0
    alone = damped(h[[0, 2]], 0.01)
    assert alone is not None and torch.equal(found[[0, 2]], alone)


def test_shifted_weights_give_the_float_outputs_of_rounded_inputs() -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 1, 6)
    hat = 0.8 * x + 0.3 * x.roll(1, 2)  # what layers before made of it
    h, c = moments(x, hat).settled(centred=False)
    w = torch.randn(1, 3, 6)
    definite = damped(h, 1e-9)
    assert definite is not None

    def error(moved: Tensor) -> float:
        wanted, found = x[:, 0].double() @ w[0].double().T, hat[:, 0].double() @ moved[0].T
        return float((wanted - found).square().mean())

    whole, half, none = (error(shifted(w, h, c, definite, share)) for share in (1.0, 0.5, 0.0))
    assert whole < 1e-6 < half < none
    # nothing to make up for: nothing moves
    same, _ = moments(x, x).settled(centred=False)
    assert torch.allclose(shifted(w, same, same, definite, 1.0), w.double())


def test_a_mean_shift_takes_back_what_the_mean_of_the_outputs_lost() -> None:
    torch.manual_seed(0)
    x = torch.randn(60, 2, 5) + 1
    hat, w = x + 0.2, torch.randn(2, 3, 5)
    q = w.round()
    lost = torch.einsum("pbk,brk->pbr", x, w).mean(0) - torch.einsum("pbk,brk->pbr", hat, q).mean(0)
    assert torch.allclose(moments(x, hat).mean_shift(w, q), lost.double(), atol=1e-4)
    assert torch.equal(moments(x, x).mean_shift(w, w), torch.zeros(2, 3, dtype=torch.float64))
