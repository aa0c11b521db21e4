"""The graph: nodes, names, shapes and laws; no data and no runtime."""

from __future__ import annotations

from bitport.graph.blocks import Block
from bitport.graph.graph import Edge, GivenScale, Graph, InputSpec, OutputSpec
from bitport.graph.match import Op, Operand, classify

__all__ = ["Block", "Edge", "GivenScale", "Graph", "InputSpec", "Op", "Operand", "OutputSpec", "classify"]
