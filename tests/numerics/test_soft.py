"""Rounding that is learned: it begins at the float weight, ends on the grid, and goes up or down by one code."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitport.numerics.quantize import fake_quantize, fake_quantize_learned
from bitport.numerics.soft import (
    SHARP,
    WARM,
    SoftRounding,
    StraightCodes,
    blended,
    relative_error,
    sharpness,
)

LOW, HIGH = -4, 3


def soft(seed: int = 0, zero: int = 0) -> tuple[torch.Tensor, SoftRounding]:
    torch.manual_seed(seed)
    w, scale = torch.randn(5, 7), torch.rand(5, 1) + 0.2
    return w, SoftRounding(w, scale, torch.full((5, 1), zero), LOW, HIGH)


@given(st.integers(0, 2**31), st.integers(LOW, HIGH))
def test_it_begins_at_the_weight_and_ends_on_the_grid(seed: int, zero: int) -> None:
    w, found = soft(seed, zero)
    low, high = (LOW - zero) * found.scale, (HIGH - zero) * found.scale
    inside = w.maximum(low).minimum(high)
    assert float((found.values() - inside).detach().abs().max()) < 2e-3 * float(found.scale.max())
    settled = found.settled()
    codes = torch.round(settled / found.scale)
    assert torch.equal(codes * found.scale, settled)
    assert bool(((codes + zero >= LOW) & (codes + zero <= HIGH)).all())
    # untouched, each value goes where plain rounding puts it, up to ties
    plain = torch.round(w / found.scale).clamp(LOW - zero, HIGH - zero)
    off = (codes - plain).abs()
    assert float(off.max()) <= 1 and float((off * ((w / found.scale).frac().abs() - 0.5).abs()).max()) < 1e-3


def test_a_value_goes_up_or_down_and_no_further() -> None:
    w, found = soft()
    with torch.no_grad():
        found.v.fill_(50.0)
        up = torch.round(found.settled() / found.scale)
        found.v.fill_(-50.0)
        down = torch.round(found.settled() / found.scale)
    floor = torch.floor(w / found.scale)
    assert torch.equal(up, (floor + 1).clamp(LOW, HIGH)) and torch.equal(down, floor.clamp(LOW, HIGH))


def test_openness_is_driven_to_zero_and_everything_has_gradients() -> None:
    _, found = soft()
    optimizer = torch.optim.Adam([found.v], 0.1)
    before = float(found.openness(2.0).detach())
    for _ in range(200):
        optimizer.zero_grad()
        found.openness(2.0).backward()
        optimizer.step()
    assert float(found.openness(2.0).detach()) < 0.01 * before
    assert bool(((found.up() < 0.01) | (found.up() > 0.99)).all())


@pytest.mark.parametrize("zero", [0, -2])
def test_a_learned_scale_rounds_as_a_constant_one_and_finds_the_range(zero: int) -> None:
    torch.manual_seed(0)
    x, zero_point = torch.randn(1000), torch.tensor(zero, dtype=torch.int32)
    scale = torch.tensor(0.3, requires_grad=True)
    wanted = fake_quantize(x, scale.detach(), zero_point, LOW, HIGH)
    assert torch.allclose(fake_quantize_learned(x, scale, zero_point, LOW, HIGH).detach(), wanted, atol=1e-6)

    def error(step: torch.Tensor) -> torch.Tensor:
        return (fake_quantize_learned(x, step, zero_point, LOW, HIGH) - x).square().mean()

    far = torch.tensor(2.0, requires_grad=True)
    optimizer = torch.optim.Adam([far], 0.02)
    for _ in range(300):
        optimizer.zero_grad()
        error(far).backward()
        optimizer.step()
    best = min(float(error(torch.tensor(step)).detach()) for step in torch.linspace(0.1, 2, 100).tolist())
    assert float(error(far).detach()) < 1.1 * best < 0.5 * float(error(torch.tensor(2.0)).detach())
    # values beyond the range have no gradient of their own
    x.requires_grad_()
    fake_quantize_learned(x, torch.tensor(0.1), zero_point, LOW, HIGH).sum().backward()
    assert x.grad is not None
    outside = (x / 0.1 + zero > HIGH) | (x / 0.1 + zero < LOW)
    assert bool((x.grad[outside] == 0).all()) and bool((x.grad[~outside] != 0).all())


def test_rounding_is_driven_to_its_ends_late_and_ever_harder() -> None:
    assert sharpness(0.0) is None and sharpness(WARM) is None
    found = [sharpness(WARM + (1 - WARM) * share) for share in (1e-9, 0.25, 0.5, 1.0)]
    assert found == pytest.approx([SHARP[0], 15.5, 11.0, SHARP[1]])


def test_a_relative_error_does_not_know_units() -> None:
    y = torch.tensor([3.0, -4.0])
    assert float(relative_error(y + 1, y)) == pytest.approx(2 / 25)
    assert float(relative_error(1000 * (y + 1), 1000 * y)) == pytest.approx(2 / 25)
    assert float(relative_error(torch.zeros(2), torch.zeros(2))) == 0


# ------------------------------------------------------------------------- codes that learn


def straight(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, StraightCodes]:
    torch.manual_seed(seed)
    codes, scale = torch.randint(LOW, HIGH + 1, (5, 7), dtype=torch.int32), torch.rand(5) + 0.2
    return (
        codes,
        scale,
        StraightCodes(codes, scale, torch.tensor([-1, 0, 1, 2, 0], dtype=torch.int32), LOW, HIGH),
    )


def test_codes_begin_as_what_they_store() -> None:
    codes, scale, found = straight()
    zero = torch.tensor([-1, 0, 1, 2, 0])[:, None]
    assert torch.equal(found.values(), (codes - zero) * scale[:, None])
    assert torch.equal(found.scale(), scale)


def test_codes_and_scales_learn_and_stay_on_the_grid() -> None:
    _, scale, found = straight()
    torch.manual_seed(1)
    wanted, x = 2 * torch.randn(5, 7), torch.randn(64, 7)
    optimizer = torch.optim.Adam(
        [{"params": [found.latent], "lr": 0.05}, {"params": [found.log], "lr": 0.02}]
    )

    def loss() -> torch.Tensor:
        return relative_error(x @ found.values().mT, x @ wanted.mT)

    before = float(loss().detach())
    for _ in range(200):
        optimizer.zero_grad()
        torch.autograd.backward(loss())
        optimizer.step()
    assert float(loss().detach()) < 0.3 * before and not torch.equal(found.scale(), scale)
    steps = (found.values() / found.scale()[:, None]).detach()
    assert float((steps - steps.round()).abs().max()) < 1e-5
    zero = torch.tensor([-1, 0, 1, 2, 0])[:, None]
    assert bool((steps.round() + zero >= LOW).all() and (steps.round() + zero <= HIGH).all())


def test_blended_samples_lie_between_two() -> None:
    x, other = torch.zeros(3, 2, 2), torch.ones(3, 2, 2)
    found = blended(x, other, torch.tensor([0.0, 0.25, 1.0]))
    assert [float(part.unique()) for part in found] == [0.0, 0.25, 1.0]
