"""The float network behind a plan: the original with its scales moved as the plan says, nothing rounded."""

from __future__ import annotations

from ..graph import Graph
from ..graph.pairs import move_all
from .model import Plan


def counterpart(reference: Graph, plan: Plan) -> Graph:
    """A float network whose tensors are those that the plan's ranges were chosen for.

    It computes what the reference does; its weights and inner activations differ by the scales that a step moved.

    Args:
        reference: the float network, folded, with its original weights. It isn't changed, and returned as it is where
            no scale was moved.

    Raises GraphError where the plan is of another network.
    """
    if not plan.rescaled:
        return reference
    twin = reference.clone()
    move_all(twin, plan.rescaled)
    return twin
