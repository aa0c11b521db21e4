"""GPTQ: codes that keep a layer's outputs rather than its weights.

    min over the codes of  tr((W − Q) H (W − Q)ᵀ)

Column by column: round, then let the columns that are still free make up for it (Frantar et al. 2023,
arXiv:2210.17323, algorithm 1, with its lazy blocks, dampening and activation order). Scales of groups are taken when
the sweep reaches them, by the error weighted with H's diagonal. Then, in turn, scales by least squares for the codes
at hand, and codes by coordinate descent on the same loss (Behdin et al. 2023, arXiv:2309.01885). A row that plain
rounding serves better keeps plain rounding.

Legend: B problems of one shape (groups of a convolution), R rows (outputs), K columns (inputs of a row), G groups of
columns with a scale each (1 for a scale per row), S columns of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from bitport.formats import Format
from bitport.numerics.codes import Grid
from bitport.numerics.grid import decode_rows, encode_rows
from bitport.numerics.quantize import SMALLEST_SCALE
from bitport.numerics.scales import smallest, stored

BLOCK = 128
FEW_BITS = 3  # up to here a zero point is worth a search, too
Span = tuple[int, int]


@dataclass(frozen=True)
class Solution:
    """values: on the grid, float32 [B, R, K]. scale, zero_point: [B, R, G]. loss: float64 [B, R], of the target."""

    values: Tensor
    scale: Tensor
    zero_point: Tensor
    loss: Tensor


def spans(columns: int, fmt: Format) -> list[Span]:
    """The groups of columns that share a scale."""
    size = fmt.group if fmt.granularity == "group" else columns
    return [(start, min(start + size, columns)) for start in range(0, columns, max(1, size))]


def by_rows(part: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Scales or zero points of a tensor as [B, R, G]."""
    return part.expand(prod(shape)).reshape(shape).clone() if part.dim() == 0 else part.reshape(shape)


def loss(e_BRK: Tensor, h_BKK: Tensor) -> Tensor:
    """e H eᵀ of each row: float64 [B, R]."""
    return ((e_BRK @ h_BKK) * e_BRK).sum(2)


def solve(
    target_BRK: Tensor,
    h_BKK: Tensor,
    plain_BRK: Tensor,
    grid: Grid,
    *,
    order: bool = False,
    rounds: int = 2,
    least: Tensor | None = None,
) -> Solution:
    """Codes and scales for a target, no row worse than the plain rounding given.

    Args:
        target_BRK: the weights that would be right without rounding; float64.
        h_BKK: the positive definite Hessian, float64.
        plain_BRK: what plain rounding gives, on `grid`; float32.
        grid: the plain grid: its format, table, and scale and zero_point [B, R, G]. Scales that all rows share
            ("tensor", "global") are kept; so are those of formats other than integers.
        order: take the columns with the largest diagonal of H first; scales are those of `grid` then.
        rounds: of scales by least squares and codes by coordinate descent.
        least: [B, R, G], scales aren't made smaller than this (a bias needs them).
    """
    fmt = grid.format
    free = fmt.is_int and fmt.granularity in ("channel", "group")
    steps = _Rounding(grid, target_BRK.shape[2], least)
    if free and not order:
        first = _sweep(target_BRK, h_BKK, steps, fits=True)
    else:
        first = _sweep(target_BRK, h_BKK, steps, fits=False, order=order)
    best = Solution(plain_BRK, grid.scale, grid.zero_point, loss(target_BRK - plain_BRK.double(), h_BKK))
    best = _better(best, first, target_BRK, h_BKK, free)
    if not fmt.is_int:
        return best
    found, wanted = first, target_BRK @ h_BKK
    for _ in range(rounds):
        seen = None
        if free:
            found, seen = _rescaled(found, target_BRK, h_BKK, wanted, grid, least)
        found = _descended(found, target_BRK, h_BKK, wanted, grid, seen)
        best = _better(best, found, target_BRK, h_BKK, free)
    return best


def _better(best: Solution, other: Solution, target: Tensor, h: Tensor, free: bool) -> Solution:
    """Row by row the smaller loss; rows that share scales are taken together."""
    wins = other.loss < best.loss
    if not free and best.scale is not other.scale:
        wins = (other.loss.sum() < best.loss.sum()).expand_as(wins)
    pick = wins[:, :, None]
    return Solution(
        torch.where(pick, other.values, best.values),
        torch.where(pick, other.scale, best.scale),
        torch.where(pick, other.zero_point, best.zero_point),
        torch.where(wins, other.loss, best.loss),
    )


class _Rounding:
    """Rounds a column at a time, with scales per group."""

    def __init__(self, grid: Grid, columns: int, least: Tensor | None) -> None:
        self.grid, self.least = grid, least
        self.spans = spans(columns, grid.format)
        self.scale, self.zero_point = grid.scale.clone(), grid.zero_point.clone()
        self.home = torch.zeros(columns, dtype=torch.int64)
        for index, (start, end) in enumerate(self.spans):
            self.home[start:end] = index

    def fit(self, group: int, w_BRS: Tensor, weight_BS: Tensor) -> None:
        """Take the scales of a group from the columns as they are now."""
        fmt = self.grid.format
        least = None if self.least is None else self.least[:, :, group]
        scale, zero_point = weighted_range(w_BRS, weight_BS, fmt, least)
        self.scale[:, :, group], self.zero_point[:, :, group] = scale, zero_point

    def column(self, w_BR: Tensor, group: int) -> Tensor:
        """The values on the grid nearest to a column; float64."""
        fmt, scale, zero_point = self.grid.format, self.scale[:, :, group], self.zero_point[:, :, group]
        if fmt.is_int:
            codes = torch.round(w_BR / scale).add_(zero_point).clamp_(fmt.low, fmt.high)
            return codes.sub_(zero_point).mul_(scale)
        flat = (w_BR.reshape(-1, 1).float(), self.grid, scale.reshape(-1), zero_point.reshape(-1))
        codes = encode_rows(*flat, torch.int32)
        return decode_rows(codes, *flat[1:]).reshape(w_BR.shape).double()


def weighted_range(
    w_BRS: Tensor, weight_BS: Tensor, fmt: Format, least: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scale and zero point, [B, R], with the smallest Σ h (w − ŵ)² among shrunken ranges of each row.

    At 3 bits and fewer the neighbours of each zero point are tried as well.

    Args:
        weight_BS: h, the diagonal of the Hessian, for each column. least: scales aren't made smaller, [B, R].
    """
    low, high = w_BRS.amin(2).clamp(max=0.0), w_BRS.amax(2).clamp(min=0.0)
    if fmt.symmetric:
        below, above = fmt.zero_point - fmt.low, fmt.high - fmt.zero_point
        full = torch.maximum(
            -low / max(below, 1e-9) if below else torch.zeros_like(low), high / max(above, 1e-9)
        )
        if below == above + 1:
            full = torch.maximum(-low, high) / above
    else:
        full = (high - low) / (fmt.high - fmt.low)
    empty = full == 0
    bottom = max(SMALLEST_SCALE, smallest(fmt.scale))
    moves = (0, -1, 1) if fmt.bits <= FEW_BITS and not fmt.symmetric else (0,)
    end = 0.5 if fmt.bits > FEW_BITS else 0.3
    best = torch.full_like(full, torch.inf)
    best_scale, best_zero = torch.ones_like(full), torch.full_like(full, float(fmt.zero_point))
    for factor in torch.linspace(1.0, end, 15).tolist():
        scale = torch.where(empty, torch.ones_like(full), full * factor).clamp(min=bottom)
        if least is not None:
            scale = torch.maximum(scale, least)
        scale = stored(scale, fmt.scale, up=False).double()
        middle = torch.full_like(full, float(fmt.zero_point))
        if not fmt.symmetric:
            middle = torch.round(fmt.low - low * factor / scale)
        for move in moves:
            zero = (middle + move).clamp(fmt.low, fmt.high)
            codes = torch.round(w_BRS / scale[:, :, None]).clamp_(
                (fmt.low - zero)[:, :, None], (fmt.high - zero)[:, :, None]
            )
            error = codes.mul_(scale[:, :, None]).sub_(w_BRS).square_().mul_(weight_BS[:, None, :]).sum(2)
            better = error < best
            best = torch.where(better, error, best)
            best_scale, best_zero = (
                torch.where(better, scale, best_scale),
                torch.where(better, zero, best_zero),
            )
    return best_scale.float(), best_zero.to(torch.int32)


def _sweep(target: Tensor, h: Tensor, steps: _Rounding, *, fits: bool, order: bool = False) -> Solution:
    """One pass over the columns: round each, and let those behind it make up for the error."""
    columns = target.shape[2]
    permuted = torch.arange(columns)
    if order:
        permuted = h.diagonal(dim1=1, dim2=2).mean(0).argsort(descending=True, stable=True)
    w = target[:, :, permuted].transpose(1, 2).contiguous()  # [B, K, R]: a column's numbers lie together
    moved = h[:, permuted][:, :, permuted]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moved))
    upper = torch.linalg.cholesky(inverse, upper=True)
    weights = h.diagonal(dim1=1, dim2=2)
    values = torch.empty_like(w)
    for start, end in _blocks(columns, steps.spans if fits else []):
        errors = torch.empty_like(w[:, start:end])
        for k in range(start, end):
            group = int(steps.home[permuted[k]])
            if fits and steps.spans[group][0] == k:
                first, last = steps.spans[group]
                steps.fit(group, w[:, first:last].transpose(1, 2), weights[:, first:last])
            values[:, k] = steps.column(w[:, k], group)
            errors[:, k - start] = (w[:, k] - values[:, k]) / upper[:, k, k, None]
            error = errors[:, k - start, None]
            w[:, k + 1 : end].baddbmm_(upper[:, k, k + 1 : end, None], error, alpha=-1)
        w[:, end:].baddbmm_(upper[:, start:end, end:].transpose(1, 2), errors, alpha=-1)
    back = torch.empty_like(target)
    back[:, :, permuted] = values.transpose(1, 2)
    return Solution(back.float(), steps.scale, steps.zero_point, loss(target - back.float().double(), h))


def _blocks(columns: int, groups: Sequence[Span]) -> list[Span]:
    """Blocks of about 128 columns; a group begins where its columns have taken every correction so far."""
    made: list[Span] = []
    for first, last in groups or [(0, columns)]:
        if made and last - made[-1][0] <= BLOCK:
            made[-1] = (made[-1][0], last)
            continue
        made += [(start, min(start + BLOCK, last)) for start in range(first, last, BLOCK)]
    return made


def _spread(part_BRG: Tensor, home: Tensor) -> Tensor:
    """What each column has of scales or zero points: float64 [B, R, K], of which G = 1 takes no memory."""
    part = part_BRG.double()
    return part.expand(-1, -1, len(home)) if part.shape[2] == 1 else part[:, :, home]


def _codes(solution: Solution, home: Tensor) -> Tensor:
    """q − zero_point, float64 [B, R, K]."""
    return torch.round(solution.values.double() / _spread(solution.scale, home))


def _home(columns: int, fmt: Format) -> Tensor:
    home = torch.zeros(columns, dtype=torch.int64)
    for index, (start, end) in enumerate(spans(columns, fmt)):
        home[start:end] = index
    return home


def _rescaled(
    solution: Solution, target: Tensor, h: Tensor, wanted: Tensor, grid: Grid, least: Tensor | None
) -> tuple[Solution, Tensor | None]:
    """The scales of least loss for the codes at hand: Σ_g' (v_g H v_g') s_g' = w H v_g, v_g the codes of group g.

    wanted: target @ h. Also returns v H [B, R, K] where a row has one scale.
    """
    fmt, columns = grid.format, target.shape[2]
    home, groups = _home(columns, fmt), spans(columns, fmt)
    v = _codes(solution, home)
    count = len(groups)
    a = torch.zeros((*v.shape[:2], count, count), dtype=torch.float64)
    b = torch.zeros((*v.shape[:2], count), dtype=torch.float64)
    for g, (start, end) in enumerate(groups):
        seen = v[:, :, start:end] @ h[:, start:end, :]  # [B, R, K]: v_g H, for every column's code
        a[:, :, g].index_add_(2, home, seen * v)
        b[:, :, g] = (wanted[:, :, start:end] * v[:, :, start:end]).sum(2)
    old = solution.scale.double()
    # codes that are all zero say nothing of their scale; a little of the old one keeps the rest in its place
    ridge = 1e-6 * a.diagonal(dim1=2, dim2=3).mean(2, keepdim=True) + 1e-30
    a = a + torch.diag_embed(ridge.expand_as(old))
    found = torch.linalg.solve(a, (b + ridge * old)[..., None])[..., 0]
    found = torch.where(torch.isfinite(found), found, old)
    found = torch.minimum(torch.maximum(found, 0.5 * old), 2.0 * old)
    if least is not None:
        found = torch.maximum(found, least.double())
    bottom = max(SMALLEST_SCALE, smallest(fmt.scale))
    scale = stored(found.clamp(min=bottom), fmt.scale, up=False)
    values = (v * _spread(scale, home)).float()
    made = Solution(values, scale, solution.zero_point, loss(target - values.double(), h))
    return _better(solution, made, target, h, free=True), seen if count == 1 else None


def _descended(
    solution: Solution, target: Tensor, h: Tensor, wanted: Tensor, grid: Grid, seen: Tensor | None
) -> Solution:
    """Each code in turn at its best with all others as they are; scales stay.

    wanted: target @ h. seen: what `_rescaled` knows of the codes.
    """
    fmt, columns = grid.format, target.shape[2]
    home = _home(columns, fmt)
    codes, spread = _codes(solution, home), _spread(solution.scale, home)
    rounded = (codes * spread) @ h if seen is None else seen * spread
    # [B, K, R]: a column's numbers lie together
    scale, zero = spread.transpose(1, 2), _spread(solution.zero_point, home).transpose(1, 2)
    v, pull = (part.transpose(1, 2).contiguous() for part in (codes, wanted - rounded))
    curvature = h.diagonal(dim1=1, dim2=2)[:, :, None] * scale
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        changes = torch.empty_like(v[:, start:end])
        for k in range(start, end):
            new = torch.round(v[:, k] + pull[:, k] / curvature[:, k])
            new = new.clamp_(fmt.low - zero[:, k], fmt.high - zero[:, k])
            changes[:, k - start] = (new - v[:, k]) * scale[:, k]
            v[:, k] = new
            # only columns that still have their turn need to know
            pull[:, k + 1 : end].baddbmm_(h[:, k + 1 : end, k, None], changes[:, k - start, None], alpha=-1)
        pull[:, end:].baddbmm_(h[:, end:, start:end], changes, alpha=-1)
    values = (v * scale).transpose(1, 2).float().contiguous()
    made = replace(solution, values=values, loss=loss(target - values.double(), h))
    return _better(solution, made, target, h, free=True)
