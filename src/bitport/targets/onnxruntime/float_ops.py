"""ONNX Runtime's float32 kernels, reproduced to the bit.

Between quantized operators some run in float32, and one unit in the last place decides how the next quantize
rounds. Formulas and coefficients: MLAS (github.com/microsoft/onnxruntime, core/mlas/lib), whose rational
approximations come from Eigen and whose erf and exp come from N. Juffa. Measured on version 1.31.1, x86-64
with AVX-512, one thread: the same bits on all inputs tried, for every operator; the tests repeat it. Other
instruction sets sum softmax and mean in other lane widths.

Each function takes `(attrs, *float32 tensors)` and returns a float32 tensor, bit-exact on CPU tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bitport.numerics.arithmetic import fma

Attrs = Mapping[str, Any]

SOFTMAX_LANES = 16  # float32 values in a register of MLAS's AVX-512 exp-sum kernel
NORM_LANES = 8  # … of its AVX2 layer norm kernel, used from this length on
ROW_LANES = 4  # … of Eigen's SSE sums
TILE = (
    2**15
)  # elements; a polynomial's float64 values stay in the cache then, which makes it some 5 times faster


def _in_tiles(kernel: Callable[[Attrs, Tensor], Tensor]) -> Callable[[Attrs, Tensor], Tensor]:
    """An elementwise kernel, on one tile of a large tensor after the other."""

    @wraps(kernel)
    def tiled(attrs: Attrs, x: Tensor) -> Tensor:
        if x.numel() <= TILE:
            return kernel(attrs, x)
        tiles = torch.split(x.reshape(-1), TILE)
        return torch.cat([kernel(attrs, tile) for tile in tiles]).reshape(x.shape)

    return tiled


@_in_tiles
def sigmoid(attrs: Attrs, x: Tensor) -> Tensor:
    """Odd rational approximation on [−18, 18]. x: any shape."""
    x = x.clamp(-18.0, 18.0)
    square = x * x
    p = _horner(
        square,
        4.37031012579801e-11,
        1.15627324459942e-07,
        6.08574864600143e-05,
        8.51377133304701e-03,
        2.48287947061529e-01,
    )
    q = _horner(
        square,
        6.10247389755681e-13,
        5.76102136993427e-09,
        6.29106785017040e-06,
        1.70198817374094e-03,
        1.16817656904453e-01,
        9.93151921023180e-01,
    )
    return (p * x / q + 0.5).clamp(0.0, 1.0)


@_in_tiles
def tanh(attrs: Attrs, x: Tensor) -> Tensor:
    """Odd rational approximation on [−9, 9]. x: any shape."""
    x = x.clamp(-9.0, 9.0)
    square = x * x
    p = _horner(
        square,
        -2.76076847742355e-16,
        2.00018790482477e-13,
        -8.60467152213735e-11,
        5.12229709037114e-08,
        1.48572235717979e-05,
        6.37261928875436e-04,
        4.89352455891786e-03,
    )
    q = _horner(
        square, 1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03
    )
    return p * x / q


@_in_tiles
def exp(attrs: Attrs, x: Tensor) -> Tensor:
    """2^m times a polynomial of degree 6 in x − m·ln 2. x: any shape."""
    exponent, rest = _reduce(x.clamp(min=-103.9720840454))
    poly = _horner(
        rest,
        float.fromhex("0x1.694000p-10"),
        float.fromhex("0x1.125edcp-7"),
        float.fromhex("0x1.555b5ap-5"),
        float.fromhex("0x1.555450p-3"),
        float.fromhex("0x1.fffff6p-2"),
        1.0,
        1.0,
    )
    return _scale(poly, exponent)


@_in_tiles
def erf(attrs: Attrs, x: Tensor) -> Tensor:
    """A polynomial below 0.921875, `1 − exp(polynomial)` above. x: any shape."""
    size = x.abs().clamp(max=3.925)
    small = _horner(
        size * size,
        -5.99104969e-4,
        4.99339588e-3,
        -2.67667342e-2,
        1.12818025e-1,
        -3.76124859e-1,
        1.28379151e-1,
    )
    big = _horner(
        size,
        1.72948930e-5,
        -3.83208680e-4,
        3.88393435e-3,
        -2.42545605e-2,
        1.06777847e-1,
        6.34846687e-1,
        1.28717512e-1,
    )
    exponent, rest = _reduce(-fma(big, size, size))
    decay = _horner(rest, 1.38319808e-3, 8.37550033e-3, 4.16689515e-2, 1.66664466e-1, 4.99999851e-1, 1.0, 1.0)
    outer = 1 - _scale(decay, exponent)
    return torch.where(size > 0.921875, outer, fma(small, size, size)).copysign(x)


@_in_tiles
def gelu(attrs: Attrs, x: Tensor) -> Tensor:
    """`0.5·x·(erf(x/√2) + 1)`; with attrs["approximate"] == "tanh": `0.5·x·(tanh(x·(c·x·x + b)) + 1)`."""
    if attrs.get("approximate", "none") == "tanh":
        inner = x * (_f32(0.035677408136300125) * x * x + _f32(0.7978845608028654))
        return 0.5 * x * (tanh({}, inner) + 1)
    return 0.5 * x * (erf({}, x * _f32(math.sqrt(0.5))) + 1)


@_in_tiles
def silu(attrs: Attrs, x: Tensor) -> Tensor:
    """`x·sigmoid(x)` (Sigmoid and Mul, fused to QuickGelu)."""
    return x * sigmoid({}, x)


def hardsigmoid(attrs: Attrs, x: Tensor) -> Tensor:
    """`clip(x·float32(1/6) + 0.5, 0, 1)`, multiply and add rounded apart."""
    return (x * _f32(1 / 6) + 0.5).clamp(0.0, 1.0)


def hardswish(attrs: Attrs, x: Tensor) -> Tensor:
    """`x·hardsigmoid(x)`: ONNX Runtime splits HardSwish in two."""
    return x * hardsigmoid({}, x)


def softmax(attrs: Attrs, x: Tensor) -> Tensor:
    """`e·(1/Σe)`, e = exp(x − max), summed in 16 lanes. attrs: dim."""
    dim = attrs["dim"]
    rows = x.movedim(dim, -1)
    exps = exp({}, rows - rows.amax(-1, keepdim=True))
    lanes = _lanes(exps, SOFTMAX_LANES)
    half = lanes[..., :8] + lanes[..., 8:]
    total = half[..., 0::2] + half[..., 1::2]
    total = total[..., 0::2] + total[..., 1::2]
    return (exps * (1 / (total[..., :1] + total[..., 1:]))).movedim(-1, dim)


def layer_norm(attrs: Attrs, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """LayerNormalization over the last dimensions. attrs: normalized_shape, eps.

    weight, bias: [*normalized_shape]. From 8 elements on: mean in float64, then the squares of the deviations
    in 8 float32 lanes. Below 8: Welford's recurrence.
    """
    shape = tuple(attrs["normalized_shape"])
    rows = x.reshape(*x.shape[: x.ndim - len(shape)], -1)
    count = rows.shape[-1]
    gain = torch.ones(count) if weight is None else weight.reshape(-1)
    shift = torch.zeros(count) if bias is None else bias.reshape(-1)
    if count < NORM_LANES:
        mean, squares = _welford(rows)
        return ((rows - mean) / _root(squares / count + _f32(attrs["eps"])) * gain + shift).reshape(x.shape)
    mean = (rows.double().sum(-1, keepdim=True) / count).float()
    deviation = rows - mean
    inverse = 1 / _root(_square_sum(deviation) / count + _f32(attrs["eps"]))
    return fma(deviation * inverse, gain, shift).reshape(x.shape)


def rms_norm(attrs: Attrs, x: Tensor, weight: Tensor | None = None) -> Tensor:
    """`x·(1/√(mean(x·x) + eps))·weight`, operator by operator as PyTorch exports it.

    attrs: normalized_shape, eps. weight: [*normalized_shape].
    """
    dims = list(range(-len(attrs["normalized_shape"]), 0))
    eps = torch.finfo(torch.float32).eps if attrs.get("eps") is None else attrs["eps"]
    scaled = x * (1 / _root(mean({"dim": dims, "keepdim": True}, x * x) + _f32(eps)))
    return scaled if weight is None else scaled * weight


def batch_norm(attrs: Attrs, x: Tensor, *parameters: Tensor | None) -> Tensor:
    """`x·a + (β − μ·a)` with `a = γ·(1/√(σ² + ε))`, each step rounded. attrs: eps. x: [B, C, …].

    parameters: γ, β, μ, σ², each [C]; without running statistics those of the batch are taken, as torch does.
    """
    gamma, beta, mean, var = [*parameters, None, None, None, None][:4]
    if mean is None or var is None:
        return F.batch_norm(x, None, None, gamma, beta, True, 0.0, attrs["eps"])
    factor = 1 / _root(var + _f32(attrs["eps"]))
    factor = factor if gamma is None else gamma * factor
    shift = (0 if beta is None else beta) - mean * factor
    shape = [1, -1] + [1] * (x.ndim - 2)
    return x * factor.reshape(shape) + shift.reshape(shape)


def resize_bilinear(attrs: Attrs, *operands: Tensor | None) -> Tensor:
    """Resize, mode linear, of [B, C, H, W]: four products summed in order. attrs: size, scales, align_corners."""
    x = next(operand for operand in operands if operand is not None)
    axes = []
    for axis in range(2):
        length, scales = x.shape[2 + axis], attrs["scales"]
        size = attrs["size"][axis] if scales is None else math.floor(length * scales[axis])
        scale = size / length if scales is None else scales[axis]
        axes.append(_neighbours(length, size, scale, attrs["align_corners"]))
    (top, bottom, below, above), (left, right, after, before) = axes
    below, above = below[:, None], above[:, None]
    total = (before * above) * x[:, :, top][..., left]
    total = total + (after * above) * x[:, :, top][..., right]
    total = total + (before * below) * x[:, :, bottom][..., left]
    return total + (after * below) * x[:, :, bottom][..., right]


def _neighbours(length: int, size: int, scale: float, align: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Along one axis: the two neighbours of each new place and its distances from them. All [size]."""
    place = torch.arange(size, dtype=torch.float32)
    if size != length and align:
        place = place * _f32(length - 1) / _f32(max(size - 1, 1))
    elif size != length:
        place = (place + 0.5) / _f32(scale) - 0.5
    place = place.clamp(0, length - 1)
    first = place.long()
    second = (first + 1).clamp(max=length - 1)
    half = torch.full_like(place, 0.5)
    same = first == second
    return (
        first,
        second,
        torch.where(same, half, (place - first).abs()),
        torch.where(same, half, (place - second).abs()),
    )


def mean(attrs: Attrs, x: Tensor) -> Tensor:
    """ReduceMean: a float32 sum divided by the count. attrs: dim (int, sequence or None for all), keepdim.

    Bit-exact where the reduced dimensions are adjacent; otherwise the correctly rounded mean.
    """
    dims = _dims(attrs.get("dim"), x.ndim)
    kept = [d for d in range(x.ndim) if d not in dims]
    shape = [1 if d in dims else n for d, n in enumerate(x.shape)]
    count = math.prod(x.shape[d] for d in dims)
    inner = [d for d in range(x.ndim) if x.shape[d] > 1]
    reduced = [i for i, d in enumerate(inner) if d in dims]
    if not reduced:
        total = x.clone()
    elif reduced[-1] - reduced[0] + 1 != len(reduced):
        return x.double().mean(dims, keepdim=bool(attrs.get("keepdim"))).float()
    else:
        sizes = [x.shape[d] for d in inner]
        before, after = math.prod(sizes[: reduced[0]]), math.prod(sizes[reduced[-1] + 1 :])
        block = x.reshape(before, count, after)
        if after == 1:
            total = _row_sums(block[..., 0])
        elif before == 1:
            total = ordered_sum(block[0].T)
        else:
            total = _column_sums(block)
    result = total.reshape(shape) / count
    return result if attrs.get("keepdim") else result.reshape([x.shape[d] for d in kept])


def sort(attrs: Attrs, x: Tensor) -> tuple[Tensor, Tensor]:
    """TopK over the whole axis: of equal values the first one comes first (torch leaves their order open).

    attrs: dim, descending. Returns values and int64 indices, both of x's shape.
    """
    values, indices = torch.sort(x, stable=True, dim=attrs["dim"], descending=attrs["descending"])
    return values, indices


def argsort(attrs: Attrs, x: Tensor) -> Tensor:
    return sort(attrs, x)[1]


def topk(attrs: Attrs, x: Tensor) -> tuple[Tensor, Tensor]:
    """TopK, equal values in order of their place. attrs: dim, k, largest."""
    values, indices = sort({"dim": attrs["dim"], "descending": attrs["largest"]}, x)
    return values.narrow(attrs["dim"], 0, attrs["k"]), indices.narrow(attrs["dim"], 0, attrs["k"])


FLOAT_OPS: dict[str, Callable[..., Any]] = {
    "sigmoid": sigmoid,
    "tanh": tanh,
    "exp": exp,
    "erf": erf,
    "gelu": gelu,
    "silu": silu,
    "hardsigmoid": hardsigmoid,
    "hardswish": hardswish,
    "softmax": softmax,
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "mean": mean,
    "batch_norm": batch_norm,
    "resize_bilinear": resize_bilinear,
    "sort": sort,
    "argsort": argsort,
    "topk": topk,
}
"""Float operators whose torch kernels give other bits than ONNX Runtime's, by kind."""


def ordered_sum(x: Tensor) -> Tensor:
    """float32 sum along the last dimension, one element after the other. x: [..., n]. Returns [...]."""
    if not x.shape[-1]:
        return x.sum(-1)
    return torch.from_numpy(np.add.accumulate(x.detach().cpu().numpy(), axis=-1)[..., -1].copy()).to(x.device)


def _f32(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


def _horner(x: Tensor, first: float, *rest: float) -> Tensor:
    """A polynomial in x, highest coefficient first, one fused multiply-add a coefficient."""
    value, wide = _f32(first).expand_as(x), x.double()
    for coefficient in rest:
        value = fma(value, wide, _f32(coefficient))
    return value


def _reduce(x: Tensor) -> tuple[Tensor, Tensor]:
    """x as (m, x − m·ln 2), m the integer nearest to x/ln 2; adding 1.5·2^23 does the rounding."""
    magic = _f32(1.5 * 2**23)
    whole = fma(x, _f32(1.44269504088896341), magic) - magic
    rest = fma(whole, _f32(-6.93145752e-1), x)
    return whole, fma(whole, _f32(-1.42860677e-6), rest)


def _scale(x: Tensor, exponent: Tensor) -> Tensor:
    """x·2^exponent with one rounding, also into the denormals (AVX-512 vscalefps)."""
    power = ((exponent.clamp(-1000, 1000).to(torch.int64) + 1023) << 52).view(torch.float64)
    return (x.double() * power).float()


def _root(x: Tensor) -> Tensor:
    """Correctly rounded float32 square root; torch's own may be one unit off (vector maths library)."""
    return x.double().sqrt().float()


def _lanes(x: Tensor, width: int) -> Tensor:
    """Σ of every width-th element, in order. x: [..., n]. Returns [..., width]."""
    padded = F.pad(x, (0, -x.shape[-1] % width))
    return ordered_sum(padded.reshape(*x.shape[:-1], padded.shape[-1] // width, width).transpose(-1, -2))


def _welford(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations by Welford's recurrence. rows: [..., n]. Returns two [..., 1]."""
    mean, squares = torch.zeros_like(rows[..., :1]), torch.zeros_like(rows[..., :1])
    for i in range(rows.shape[-1]):
        value = rows[..., i : i + 1]
        delta = value - mean
        mean = mean + delta / (i + 1)
        squares = squares + delta * (value - mean)
    return mean, squares


def _square_sum(rows: Tensor) -> Tensor:
    """Σx² in 8 fused lanes, then the remainder: four at a time with rounded squares, the last ones fused.

    (The remainder is a scalar loop that the compiler vectorized.) rows: [..., n]. Returns [..., 1].
    """
    count = rows.shape[-1]
    whole = count - count % NORM_LANES
    lanes = torch.zeros_like(rows[..., :NORM_LANES])
    for start in range(0, whole, NORM_LANES):
        part = rows[..., start : start + NORM_LANES]
        lanes = fma(part, part, lanes)
    half = lanes[..., :4] + lanes[..., 4:]
    pair = half[..., :2] + half[..., 2:]
    total = pair[..., :1] + pair[..., 1:]
    unfused = whole + (count - whole) // 4 * 4
    for i in range(whole, count):
        value = rows[..., i : i + 1]
        total = total + value * value if i < unfused else fma(value, value, total)
    return total


def _row_sums(rows: Tensor) -> Tensor:
    """Sums of contiguous rows as Eigen's: two accumulators of 4 lanes from the first 16-byte boundary on.

    rows: [R, n] float32, the whole buffer aligned. Returns [R].
    """
    number, length = rows.shape
    starts = (-torch.arange(number) * length) % ROW_LANES
    sums = torch.empty(number, dtype=torch.float32)
    for start in range(ROW_LANES):
        chosen = starts == start
        if bool(chosen.any()):
            sums[chosen] = _aligned_sums(rows[chosen], min(start, length))
    return sums


def _aligned_sums(rows: Tensor, start: int) -> Tensor:
    packets = (rows.shape[1] - start) // ROW_LANES
    if not packets:
        return ordered_sum(rows)
    end = start + packets * ROW_LANES
    grid = rows[:, start:end].reshape(rows.shape[0], packets, ROW_LANES).transpose(1, 2)
    even = packets - packets % 2
    lanes = ordered_sum(grid[..., 0 : max(even, 1) : 2])
    if packets > 1:
        lanes = lanes + ordered_sum(grid[..., 1:even:2])
        if packets > even:
            lanes = lanes + grid[..., -1]
    total = (lanes[:, 0] + lanes[:, 2]) + (lanes[:, 1] + lanes[:, 3])
    return ordered_sum(torch.cat([total[:, None], rows[:, :start], rows[:, end:]], 1))


def _column_sums(block: Tensor) -> Tensor:
    """Sums over dimension 1 as MLAS's product with a row of ones: groups of 4, then of 2 and 1.

    block: [K, R, N] float32, K and N above 1. Returns [K, N].
    """
    length = block.shape[1]
    sizes = [4] * (length // 4) + [2] * (length % 4 // 2) + [1] * (length % 2)
    total, start = torch.zeros_like(block[:, 0]), 0
    for size in sizes:
        total = total + ordered_sum(block[:, start : start + size].transpose(1, 2))
        start += size
    return total


def _dims(dim: int | Sequence[int] | None, ndim: int) -> list[int]:
    if dim is None or (not isinstance(dim, int) and not dim):
        return list(range(ndim))
    return sorted(d % ndim for d in ([dim] if isinstance(dim, int) else dim))
