"""The float network behind a plan: the original rotated, and its scales moved, as the plan says; nothing rounded.

What stands beside rounded layers (`graph.beside`) is there too, as zeros, which add nothing: operator by operator it is
the network that the plan belongs to.
"""

from __future__ import annotations

import torch

from ..errors import GraphError
from ..graph import Graph
from ..graph.beside import put_beside, weights_of
from ..graph.pairs import move_all
from ..graph.streams import turn_all
from .model import Plan


def counterpart(reference: Graph, plan: Plan) -> Graph:
    """A float network whose tensors are those that the plan's ranges were chosen for.

    It computes what the reference does; its weights and inner activations differ by what steps merged into them: the
    rotations of residual streams, then scales.

    Args:
        reference: the float network, folded, with its original weights. It isn't changed, and returned as it is where
            nothing was rotated, no scale was moved and nothing stands beside a layer.

    Raises GraphError where the plan is of another network.
    """
    if not plan.rotated and not plan.rescaled and not plan.low_rank:
        return reference
    twin = reference.clone()
    turn_all(twin, plan.rotated)
    move_all(twin, plan.rescaled)
    put_beside(twin, {layer: _zeros(twin, layer, rank) for layer, rank in plan.low_rank.items()})
    return twin


def _zeros(graph: Graph, layer: str, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    outputs, inputs = weights_of(graph, layer)
    if rank > min(outputs, inputs):
        raise GraphError(f"{layer}: a product of rank {rank} is beside weights of {outputs} × {inputs}")
    return torch.zeros(rank, inputs), torch.zeros(outputs, rank)
