"""Uniform affine quantization: real numbers ⇄ integers with a scale and a zero point.

    q  = clamp(rne(x / scale) + zero_point, low, high)        rne: round half to even
    x̂  = (q − zero_point) · scale

Source: Jacob et al. 2018, arXiv:1712.05877; ONNX QuantizeLinear/DequantizeLinear, opset 21, whose float32
arithmetic (a division, not a product with the reciprocal) is followed to the bit.

Legend: C channels, one scale each; scale and zero point are 0-d, or [C] along the dimension `axis`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitport.errors import DataError, FormatError, WeightsError
from bitport.formats import Format
from bitport.numerics.arithmetic import along

# Every scale lies between these, so that neither it nor its reciprocal is 0, subnormal or infinite.
SMALLEST_SCALE = 2.0**-126
LARGEST_SCALE = 2.0**126
_FLOAT32_MAX = torch.finfo(torch.float32).max
_INT32_MAX = 2**31 - 1
# Codes up to here plus a zero point are exact in float32; wider ranges are computed in float64.
_EXACT_IN_FLOAT32 = 2**22


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    low: int,
    high: int,
    axis: int | None = None,
    dtype: torch.dtype = torch.int32,
) -> Tensor:
    """`clamp(rne(x / scale) + zero_point, low, high)`, integers, shape of x.

    Args:
        x: any shape, any float type; computed in float32. NaN gives the zero point, ±Inf the range's ends.
        scale, zero_point: float32 and int32, both 0-d or [C].
        low, high: the range of integers, both ends included.
        axis: the dimension of x that [C] runs along.
        dtype: an integer type that holds low … high.
    """
    codes = _codes(x, scale, zero_point, low, high, axis)
    return codes.clamp_(low, high).to(dtype)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None = None) -> Tensor:
    """`(q − zero_point) · scale`, float32, shape of q.

    The difference is an int32, rounded to float32 where it exceeds 2^24, as runtimes do.

    Args:
        q: any integer type and shape. scale, zero_point, axis: as in `quantize`.
    """
    centred = q.to(torch.int32) - along(zero_point, q.ndim, axis)
    return centred.float() * along(scale.float(), q.ndim, axis)


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, axis: int | None = None
) -> Tensor:
    """`dequantize(quantize(x))` that trains: float32, shape of x.

    The gradient with respect to x is the straight-through one (Bengio et al. 2013, arXiv:1308.3432): 1 where
    rne(x / scale) + zero_point lies in the range, 0 where it was clamped. Scale and zero point are constants.
    """
    with torch.no_grad():
        codes = _codes(x, scale, zero_point, low, high, axis)
        inside = (codes >= low) & (codes <= high) & torch.isfinite(x)
        centred = codes.clamp_(low, high) - along(zero_point, x.ndim, axis).to(codes.dtype)
        value = centred.float() * along(scale.float(), x.ndim, axis)
    # Adds exactly 0 to the value; only the gradient passes through.
    passed = torch.where(inside, x.float(), torch.zeros_like(value))
    return value + (passed - passed.detach())


def fake_quantize_learned(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """`dequantize(quantize(x))` whose scale trains, too: float32, shape of x.

    The gradient of rounding is 1; so the scale's is rne(x/s) − x/s inside the range and the end's code beyond it
    (Esser et al. 2020, arXiv:1902.08153, learned step size quantization).

    Args:
        scale: 0-d float32, above 0. zero_point: 0-d int32, a constant.
    """
    steps = (x / scale).clamp(low - int(zero_point), high - int(zero_point))
    return (steps + (steps.round() - steps).detach()) * scale


def qparams(minimum: Tensor, maximum: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """The scale and zero point that store the real range [minimum, maximum] in `fmt`.

    The range is widened to include 0.0, which is always stored exactly. Asymmetric:
    `scale = (maximum − minimum) / (high − low)`, `zero_point = rne(low − minimum / scale)`. Symmetric: the
    fixed zero point z of the format and `scale = max(|minimum| / (z − low), maximum / (high − z))`; in a
    two's-complement range the lowest code is left out of the first divisor, so that both signs fit. A range
    of only 0 has the scale 1. Computed in float64; scales stay within 2^±126 and small enough that no code
    dequantizes to infinity.

    Args:
        minimum, maximum: 0-d or [C], any float type, same shape.
        fmt: an integer format; its granularity isn't looked at.

    Returns: scale (float32) and zero_point (int32), shape of `minimum`.

    Raises:
        FormatError: `fmt` is a float format.
        DataError: an end isn't finite, or minimum > maximum.
    """
    lower, upper = minimum.detach().double(), maximum.detach().double()
    if not bool((torch.isfinite(lower) & torch.isfinite(upper) & (lower <= upper)).all()):
        raise DataError(
            f"range [{_short(lower)}, {_short(upper)}] can't be quantized: both ends must be finite and in "
            "order; look for NaN or infinite activations"
        )
    return qparams_of_finite(lower, upper, fmt)


def qparams_of_finite(lower: Tensor, upper: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """`qparams` of float64 ends that are known to be finite and in order: looking takes half of its time."""
    if not fmt.is_int:
        raise FormatError(f"{fmt} has no scale and no zero point: give an integer format, such as int8")
    lower, upper = lower.clamp(max=0.0), upper.clamp(min=0.0)
    low, high = fmt.low, fmt.high
    if fmt.symmetric:
        below, above = fmt.zero_point - low, high - fmt.zero_point
        if below == above + 1:
            below = above
        step = torch.maximum(-lower / below, upper / above)
    else:
        step = (upper - lower) / (high - low)
    largest = min(LARGEST_SCALE, _FLOAT32_MAX / (high - low) * (1 - 2.0**-23))
    scale = step.clamp(SMALLEST_SCALE, largest).float()
    if step.numel() and float(step.amin()) == 0:
        scale = torch.where(step == 0, torch.ones_like(scale), scale)
    return scale, zero_points(lower, step.clamp(min=SMALLEST_SCALE), fmt)


def requantized_qparams(
    scale: float, zero_point: int, low: int, high: int, fmt: Format
) -> tuple[Tensor, Tensor]:
    """The scale and zero point that store in `fmt` what was stored as (q − zero_point) · scale, low ≤ q ≤ high.

    The very same scale where `fmt` has as many codes and its zero point is as far from its lowest one, so that int8
    holds what uint8 held; else those of the same real range, by `qparams`.

    Returns: scale (float32) and zero_point (int32), 0-d.

    Raises:
        FormatError: `fmt` is a float format.
    """
    minimum, maximum = (torch.tensor((end - zero_point) * scale, dtype=torch.float64) for end in (low, high))
    fitted, zero = qparams(minimum.clamp(max=0), maximum.clamp(min=0), fmt)
    same = int(zero) - fmt.low == zero_point - low and fmt.high - fmt.low == high - low
    return (torch.tensor(scale) if same else fitted), zero


def zero_points(minimum: Tensor, step: Tensor, fmt: Format) -> Tensor:
    """`clamp(rne(low − minimum / step), low, high)` in float64, or the zero point that `symmetric` fixes.

    Args:
        minimum: the range's lower end, at most 0. step: the scale before it is rounded to float32, or after it was
            rounded to a narrower type. Both of one shape.
        fmt: an integer format.

    Returns: int32, shape of `minimum`.
    """
    if fmt.symmetric:
        return torch.full_like(minimum, fmt.zero_point, dtype=torch.int32)
    codes = torch.round(fmt.low - minimum.double() / step.double())
    return codes.clamp(fmt.low, fmt.high).to(torch.int32)


def bias_qparams(scale_x: Tensor, scale_w: Tensor) -> tuple[Tensor, Tensor]:
    """The grid of an int32 bias: scale `scale_x · scale_w` (float32) and zero point 0, shape of scale_w.

    Args:
        scale_x: 0-d float32. scale_w: 0-d or [C] float32.
    """
    scale = scale_x.detach().float() * scale_w.detach().float()
    return scale, torch.zeros_like(scale, dtype=torch.int32)


def quantize_bias(bias: Tensor, scale_x: Tensor, scale_w: Tensor) -> Tensor:
    """`rne(bias / (scale_x · scale_w))` computed in float64, int32 [C].

    Args:
        bias: [C] float. scale_x: 0-d float32. scale_w: 0-d or [C] float32.

    Raises:
        WeightsError: the quotient isn't finite or leaves int32 (use `raise_weight_scale_for_bias` before).
    """
    steps = bias.detach().double() / bias_qparams(scale_x, scale_w)[0].double()
    steps = torch.where(bias.detach() == 0, torch.zeros_like(steps), steps)
    wrong = ~(steps.abs() < _INT32_MAX)
    if bool(wrong.any()):
        raise WeightsError(
            f"bias of {int(wrong.sum())} channels, first {int(wrong.reshape(-1).nonzero()[0])}, is NaN or "
            "exceeds int32 on the grid scale_x · scale_w: raise the weight scale "
            "(numerics.quantize.raise_weight_scale_for_bias) or keep the layer in float"
        )
    return torch.round(steps).to(torch.int32)


def raise_weight_scale_for_bias(
    bias: Tensor | None, scale_x: Tensor, scale_w: Tensor, sums: int = 0
) -> Tensor:
    """The smallest weight scale ≥ scale_w with which the bias fits int32: `|bias / (s_x s_w)| < 2^31 − 1 − sums`.

    A channel of tiny weights and an ordinary bias overflows int32 otherwise. The product s_x·s_w is also kept
    a normal float32 number, because it is the scale of the bias.

    Args:
        bias: [C] float, or None. scale_x: 0-d float32. scale_w: 0-d or [C] float32.
        sums: what the sums of products, which the bias is added to in int32, may reach; at most 2^30 is kept.

    Returns: float32, shape of scale_w; unchanged where the bias fits.

    Raises:
        WeightsError: no float32 scale is large enough.
    """
    scale_x, scale = scale_x.detach().float(), scale_w.detach().float()
    magnitude = torch.zeros_like(scale) if bias is None else bias.detach().abs().to(scale.device)
    if scale.ndim == 0 and magnitude.ndim:
        magnitude = magnitude.amax() if magnitude.numel() else torch.zeros_like(scale)
    magnitude = magnitude.double()
    x = scale_x.double()
    largest = _INT32_MAX - min(sums, 2**30)

    def fits(candidate: Tensor) -> Tensor:
        product = scale_x * candidate
        return (magnitude < largest * product.double()) & (product >= SMALLEST_SCALE)

    needed = (torch.maximum(magnitude / largest, torch.full_like(magnitude, SMALLEST_SCALE)) / x).float()
    # float32 rounding of the quotient and of the product may each be one step off: start below, walk up.
    for _ in range(2):
        needed = torch.nextafter(needed, torch.zeros_like(needed))
    for _ in range(6):
        needed = torch.where(
            fits(needed), needed, torch.nextafter(needed, torch.full_like(needed, torch.inf))
        )
    raised = torch.where(fits(scale), scale, torch.maximum(scale, needed))
    if not bool((fits(raised) & (raised <= LARGEST_SCALE)).all()):
        raise WeightsError(
            "a bias is NaN or so large that no float32 weight scale brings it into int32: keep the layer in "
            "float"
        )
    return raised


def _codes(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, axis: int | None) -> Tensor:
    """`rne(x / scale) + zero_point` before the clamp, float32 or (wide ranges) float64; NaN → zero_point."""
    steps = (x.detach().float() / along(scale.detach().float(), x.ndim, axis)).round_()
    steps.nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    if max(-low, high) > _EXACT_IN_FLOAT32:
        steps = steps.double()
    return steps.add_(along(zero_point, x.ndim, axis).to(steps.dtype))


def _short(values: Tensor) -> str:
    flat = values.reshape(-1).tolist()
    return (
        f"{flat[0]:g}" if len(flat) == 1 else f"{len(flat)} channels, first {flat[0]:g}" if flat else "none"
    )
