"""Constants as integers: what a Plan makes of weights and biases."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..errors import GraphError
from ..formats import Format
from ..graph import Graph
from ..graph.reading import constant_names
from ..numerics.arithmetic import QTensor
from ..numerics.codes import Grid, decode, encode
from ..numerics.quantize import quantize, quantize_bias
from .model import Plan, TensorPlan


@dataclass(frozen=True)
class Coded:
    """A stored tensor of any format: its codes (int32) and what they mean."""

    codes: Tensor
    grid: Grid

    def dequantize(self) -> Tensor:
        """The numbers that the codes stand for, float32, shape of codes."""
        return self._decoded

    @cached_property
    def _decoded(self) -> Tensor:
        return decode(self.codes, self.grid)


def settle(plan: Plan) -> Plan:
    """Fill in every tie whose parameters follow from others': fixed ranges, biases, products with constants.

    Raises GraphError for a tie that nothing determines.
    """
    done: dict[str, TensorPlan] = {}

    def resolve(name: str) -> TensorPlan:
        if name not in done:
            done[name] = _settled(plan.ties[name], [resolve(other) for other in plan.ties[name].of])
        return done[name]

    for name in plan.ties:
        resolve(name)
    return plan.with_ties(done)


def _settled(tie: TensorPlan, of: list[TensorPlan]) -> TensorPlan:
    if tie.source == "fixed":
        assert tie.bounds is not None
        low, high = tie.bounds
        levels = tie.format.high - tie.format.low + 1
        scale = torch.tensor((high - low) / levels, dtype=torch.float32)
        zero_point = torch.tensor(round(tie.format.low - low * levels / (high - low)), dtype=torch.int32)
        return replace(tie, scale=scale, zero_point=zero_point)
    if tie.source == "bias":
        (x_scale, _), (w_scale, _) = of[0].parameters(), of[1].parameters()
        scale = x_scale * w_scale
        return replace(tie, scale=scale, zero_point=torch.zeros_like(scale, dtype=torch.int32))
    if tie.source == "scaled":
        scale, zero_point = of[0].parameters()
        return replace(
            tie, scale=scale * torch.tensor(tie.factor, dtype=torch.float32), zero_point=zero_point
        )
    if tie.source != "dynamic":
        tie.parameters()
    return tie


def grid_of(tie: TensorPlan) -> Grid:
    """The parameters of a stored tensor as the numerics take them. Raises GraphError while they are unknown."""
    return Grid(tie.format, *tie.parameters(), tie.table)


def constant_codes(graph: Graph, plan: Plan, tensor: str, tie_name: str) -> Coded:
    """The codes of any format that a weight is stored as under a tie."""
    grid = grid_of(plan.ties[tie_name])
    return Coded(encode(graph.tensor(tensor).detach(), grid), grid)


def is_plain(fmt: Format) -> bool:
    """Whether a format is integers with a scale for the tensor or per channel: what integer kernels compute with."""
    return fmt.is_int and fmt.granularity != "group"


def constant_integers(graph: Graph, plan: Plan, tensor: str, tie_name: str) -> QTensor:
    """The integers that a parameter is stored as under a tie. q: int32, shape of the parameter."""
    tie = plan.ties[tie_name]
    scale, zero_point = tie.parameters()
    value = graph.tensor(tensor).detach()
    fmt = tie.format
    if tie.source == "bias":
        x_scale, _ = plan.ties[tie.of[0]].parameters()
        w_scale, _ = plan.ties[tie.of[1]].parameters()
        q = quantize_bias(value, x_scale, w_scale)
        return QTensor(q, scale, zero_point, -(2**31), 2**31 - 1, 0 if scale.ndim else None)
    if not is_plain(fmt):
        raise GraphError(f"{tensor}: integer kernels can't compute with {fmt}")
    q = quantize(value, scale, zero_point, fmt.low, fmt.high, fmt.axis)
    return QTensor(q, scale, zero_point, fmt.low, fmt.high, fmt.axis)


def stored_values(graph: Graph, plan: Plan, tensor: str, tie_name: str) -> Tensor:
    """What a weight becomes once it is stored under a tie: float32, shape of the weight."""
    constant = constant_integers if is_plain(plan.ties[tie_name].format) else constant_codes
    return constant(graph, plan, tensor, tie_name).dequantize()


def on_grid(graph: Graph, plan: Plan) -> None:
    """Put each weight of `graph`, in place, on the grid that the plan stores it on, where all its readers take that.

    A tensor that is tied under several names is one tensor: rounding it for one reader would spoil it for another.
    """
    names, readers = constant_names(graph), dict[int, set[str | None]]()
    tensors: dict[int, str] = {}
    for edge in graph.edges():
        if edge.producer in names:
            key = id(graph.tensor(edge.producer))
            tensors.setdefault(key, edge.producer)
            readers.setdefault(key, set()).add(plan.edges.get(edge))
    for key, tensor in tensors.items():
        ties = [plan.ties[tie] for tie in readers[key] if tie is not None]
        # a bias is rounded once, at its use: int32 has more digits than float32
        if None in readers[key] or any(tie.source == "bias" for tie in ties):
            continue
        if all(_same_grid(ties[0], other) for other in ties[1:]):
            tie = min(tie for tie in readers[key] if tie is not None)
            graph.set_tensor(tensor, stored_values(graph, plan, tensor, tie))


def _same_grid(first: TensorPlan, second: TensorPlan) -> bool:
    """Whether two ties store a tensor as the same codes."""

    def same(a: Tensor | None, b: Tensor | None) -> bool:
        return (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))

    return (
        first.format == second.format
        and same(first.scale, second.scale)
        and same(first.zero_point, second.zero_point)
        and same(first.table, second.table)
    )
