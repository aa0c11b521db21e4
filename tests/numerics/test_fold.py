from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from bitport.errors import WeightsError
from bitport.numerics.fold import fold_batch_norm


def trained(norm: nn.BatchNorm1d | nn.BatchNorm2d, affine: bool) -> nn.Module:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.1, 3.0)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm.double().eval()


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("transposed", "groups"), [(False, 1), (False, 2), (True, 1), (True, 2), (True, 4)])
def test_folded_layer_equals_both(affine: bool, bias: bool, transposed: bool, groups: int) -> None:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    conv = kind(8, 12, 3, groups=groups, bias=bias).double()
    norm = nn.BatchNorm2d(12, eps=1e-3, affine=affine)
    trained(norm, affine)
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        expected = norm(conv(x))
        weight, new_bias = fold_batch_norm(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps,
            transposed=transposed, groups=groups,
        )  # fmt: skip
        folded = kind(8, 12, 3, groups=groups).double()
        folded.load_state_dict({"weight": weight, "bias": new_bias})
        assert torch.allclose(folded(x), expected, rtol=1e-12, atol=1e-12)
    assert not weight.requires_grad


def test_linear_and_1d() -> None:
    for layer, shape in ((nn.Linear(5, 4), (7, 5)), (nn.Conv1d(5, 4, 2), (7, 5, 6))):
        layer = layer.double()
        norm = nn.BatchNorm1d(4)
        trained(norm, True)
        x = torch.randn(shape, dtype=torch.float64)
        with torch.no_grad():
            expected = norm(layer(x))
            weight, bias = fold_batch_norm(
                layer.weight,
                layer.bias,
                norm.running_mean,
                norm.running_var,
                norm.weight,
                norm.bias,
                norm.eps,
            )
            layer.load_state_dict({"weight": weight, "bias": bias})
            assert torch.allclose(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_computed_in_float64() -> None:
    """The float32 result is the float64 one, rounded once."""
    args = [
        torch.randn(6, 3, 1, 1),
        torch.randn(6),
        torch.randn(6) * 100,
        torch.rand(6) + 1e-4,
        *torch.randn(2, 6),
    ]
    found = fold_batch_norm(*args, 1e-5)
    exact = fold_batch_norm(*(a.double() for a in args), 1e-5)
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs.float())


@pytest.mark.parametrize("var", [-1e-5, -1.0, math.nan])
def test_variance_that_is_not_positive_is_refused(var: float) -> None:
    values = torch.tensor([1.0, var, 1.0])
    with pytest.raises(WeightsError, match="channel 1"):
        fold_batch_norm(torch.ones(3, 2), None, torch.zeros(3), values, None, None, 1e-5)


def test_zero_variance_is_fine_with_eps() -> None:
    weight, bias = fold_batch_norm(torch.ones(3, 2), None, torch.zeros(3), torch.zeros(3), None, None, 1e-4)
    assert torch.allclose(weight, torch.full((3, 2), 100.0))
    assert (bias == 0).all()


def test_other_channel_counts_are_refused() -> None:
    one = torch.ones(3)
    with pytest.raises(WeightsError, match=r"mean of shape \(2,\) for 3 output channels"):
        fold_batch_norm(torch.ones(3, 2), None, torch.ones(2), one, None, None, 1e-5)
    with pytest.raises(WeightsError, match="for 2 output channels"):
        fold_batch_norm(torch.ones(3, 2, 1), None, one, one, None, None, 1e-5, transposed=True)


def test_overflow_is_refused() -> None:
    args = (torch.full((1, 1), 1e30), None, torch.zeros(1), torch.full((1,), 1e-20), None, None, 0.0)
    with pytest.raises(WeightsError, match="overflows float32"):
        fold_batch_norm(*args)
