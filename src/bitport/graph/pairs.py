"""Where a scale per channel can move from the layers that make a tensor into the layers that read it.

Between them there may only be operators with f(s·x) = s·f(x) for each channel apart: ReLU and its leaky kin, pools,
means over pixels, moves that keep channels together; and additions, whose operands are scaled alike: a residual stream
has one scale, behind all layers that add to it. Whatever else reads a channel (a concatenation, the network's output, a
sigmoid) would see it scaled, and ends the search. So does a clip at one number for all channels
(ReLU6): scaled, each channel would need a bound of its own, which no integer kernel has.

Letters: C channels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..errors import GraphError
from ..numerics.equalize import input_ranges, output_ranges, scale_inputs, scale_outputs
from .graph import Graph
from .match import Op
from .reading import uses_of
from .shapes import Shape

LAYERS = ("conv", "conv_transpose", "linear")
NORMS = ("layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm")
HOMOGENEOUS = frozenset(
    ["relu", "leaky_relu", "other:prelu", "identity", "dropout", "mul_scalar", "div_scalar", "neg"]
)
POOLS = frozenset(["max_pool", "avg_pool", "adaptive_avg_pool", "global_avg_pool"])
CLIPS = frozenset(["relu6", "hardtanh", "clamp"])
SUMS = frozenset(["add", "sub"])
JOINS = frozenset([*SUMS, "mul", "cat", "stack", "where", "matmul"])


@dataclass(frozen=True)
class End:
    """A layer that takes a scale up. weight, bias: dotted names. vector: the weight is one factor per channel."""

    name: str
    weight: str
    bias: str | None = None
    groups: int = 1
    transposed: bool = False
    vector: bool = False
    repeat: int = 1  # neighbouring inputs of a reader that are one channel, flattened


@dataclass(frozen=True)
class Chain:
    """A tensor whose channels can be scaled.

    Attributes:
        producers: what makes it, in network order: one, or all that are added up in it.
        readers: the layers that read it, each through homogeneous operators and sums only.
        axis: of the channels in the first producer's output.
        norm: the producer is the affine part of a normalisation, not a layer.
    """

    producers: tuple[End, ...]
    readers: tuple[End, ...]
    axis: int
    norm: bool

    @property
    def name(self) -> str:
        return self.producers[0].name

    @property
    def ends(self) -> tuple[End, ...]:
        return (*self.producers, *self.readers)


# how many operands are one tensor, by its identity: under whatever name it is tied
Uses = Counter[int]


class Refused(Exception):
    """Why the channels of a tensor can't be changed together with the layers around it."""


def find(graph: Graph) -> tuple[list[Chain], dict[str, str]]:
    """All chains in network order, and of each other layer or norm why its output can't be scaled."""
    uses = uses_of(graph)
    chains: list[Chain] = []
    refused: dict[str, str] = {}
    placed: set[str] = set()
    for node in graph.nodes():
        op = graph.op(node)
        if (op.kind not in (*LAYERS, *NORMS) and not is_gain(graph, node, op)) or graph.name(node) in placed:
            continue
        try:
            chains.append(_chain(graph, uses, node, op))
            placed |= {end.name for end in chains[-1].producers}
        except Refused as why:
            refused[graph.name(node)] = str(why)
    # a sum may be passed from one of its layers and not from another
    return chains, {name: why for name, why in refused.items() if name not in placed}


def ranges(graph: Graph, chain: Chain) -> tuple[Tensor, Tensor]:
    """Largest magnitudes of the weights that make, and of those that read each channel, float64 [C]."""
    made = torch.stack([_made_range(graph, end) for end in chain.producers]).amax(0)
    read = made.new_zeros(made.shape)
    for end in chain.readers:
        found = input_ranges(graph.tensor(end.weight), end.groups, end.transposed)
        read = read.maximum(found.reshape(-1, end.repeat).amax(1))
    return made, read


def _made_range(graph: Graph, end: End) -> Tensor:
    weight = graph.tensor(end.weight).detach()
    return (
        weight.reshape(-1).abs().double() if end.vector else output_ranges(weight, end.groups, end.transposed)
    )


def move(graph: Graph, chain: Chain, scales: Tensor) -> None:
    """Divide the channels by `scales` [C] in place and multiply what reads them: the outputs stay what they are."""
    factor = 1 / scales.double()
    for made in chain.producers:
        weight = graph.tensor(made.weight).detach()
        if made.vector:
            scaled = (weight.double() * factor.reshape(weight.shape)).to(weight.dtype)
        else:
            scaled = scale_outputs(weight, factor, made.groups, made.transposed)
        graph.set_tensor(made.weight, scaled)
        if made.bias is not None:
            bias = graph.tensor(made.bias).detach()
            graph.set_tensor(made.bias, (bias.double() * factor).to(bias.dtype))
    for end in chain.readers:
        wide = scales.double().repeat_interleave(end.repeat)
        old = graph.tensor(end.weight).detach()
        graph.set_tensor(end.weight, scale_inputs(old, wide, end.groups, end.transposed))


def move_all(graph: Graph, scales: Mapping[str, Tensor]) -> None:
    """Move several, by the name of their producer, in network order.

    Raises GraphError for a name that isn't the producer of a chain here, or has another number of channels.
    """
    chains = {chain.name: chain for chain in find(graph)[0]}
    for name, factor in scales.items():
        if name not in chains or ranges(graph, chains[name])[0].shape != factor.shape:
            raise GraphError(
                f"no scale of {tuple(factor.shape)} channels can move behind {name!r} in this network: it is another "
                "one than the scales were chosen for"
            )
    for name, chain in chains.items():
        if name in scales:
            move(graph, chain, scales[name])


# ------------------------------------------------------------------------------------------------ the producer


def _chain(graph: Graph, uses: Uses, node: fx.Node, op: Op) -> Chain:
    producer = _end(graph, uses, node, op)
    shape = graph.shape(node)
    if shape is None:
        raise Refused("its output has no shape")
    axis = _channel_axis(op, len(shape))
    if _is_own_input(op):
        raise Refused("it reads its own weight as data")
    stream = _Stream(graph, uses, node, axis, producer)
    if not stream.readers:
        raise Refused("nothing reads it")
    ends = [*stream.producers, *stream.readers]
    if len({end.weight for end in ends}) < len(ends):
        raise Refused("layers around it share a weight")
    return Chain(tuple(stream.producers), tuple(stream.readers), axis, producer.vector)


def _end(graph: Graph, uses: Uses, node: fx.Node, op: Op, repeat: int = 1) -> End:
    """The layer as one that takes a scale up. Raises Refused where its parameters aren't its own."""
    name = graph.name(node)
    if op.kind == "mul":
        gain = next(o.tensor for o in op.operands if o is not None and o.tensor is not None)
        own(graph, uses, gain, name)
        return End(name, gain, vector=True)
    weight = op.operands[1] if len(op.operands) > 1 else None
    bias = op.operands[2] if len(op.operands) > 2 else None
    if weight is None or weight.tensor is None:
        raise Refused("it has no weights of its own to take a scale")
    if bias is not None and bias.tensor is None:
        raise Refused("its bias is computed")
    own(graph, uses, weight.tensor, name)
    if bias is not None and bias.tensor is not None:
        own(graph, uses, bias.tensor, name)
    vector = op.kind in NORMS
    if vector and graph.tensor(weight.tensor).dim() != 1:
        raise Refused("it normalises several axes at once")
    return End(
        name,
        weight.tensor,
        None if bias is None else bias.tensor,
        int(op.attrs.get("groups", 1)),
        op.kind == "conv_transpose",
        vector,
        repeat,
    )


def own(graph: Graph, uses: Uses, tensor: str, name: str) -> None:
    """Raises Refused where a layer's parameter is read elsewhere, too."""
    if uses[id(graph.tensor(tensor))] != 1:
        raise Refused(f"{tensor} of {name} is shared")


def is_gain(graph: Graph, node: fx.Node, op: Op) -> bool:
    """x · g with one stored factor per channel of the last axis, as normalisations that are spelled out end."""
    shape = graph.shape(node)
    constants = [o.tensor for o in op.operands if o is not None and o.tensor is not None]
    if op.kind != "mul" or not shape or len(op.operands) != 2 or len(constants) != 1:
        return False
    gain = graph.tensor(constants[0])
    return gain.is_floating_point() and gain.dim() > 0 and gain.numel() == gain.shape[-1] == shape[-1]


def _is_own_input(op: Op) -> bool:
    first = op.operands[0]
    return first is not None and any(o == first for o in op.operands[1:])


def _channel_axis(op: Op, rank: int) -> int:
    if op.kind in ("linear", "layer_norm", "rms_norm", "mul"):
        return rank - 1
    if op.kind in ("conv", "conv_transpose"):
        return rank - int(op.attrs["ndim"]) - 1
    return 1


# ------------------------------------------------------------------------------------------------ what reads it


class _Stream:
    """All tensors that a scale reaches from one producer: downwards through what keeps it, and, where tensors are
    added, upwards to whatever else makes the sum. Raises Refused naming the first operator that it can't pass."""

    def __init__(self, graph: Graph, uses: Uses, node: fx.Node, axis: int, producer: End) -> None:
        self.graph, self.uses, self.joins = graph, uses, not producer.vector
        self.readers: list[End] = []
        made = {node: producer}
        self._made, self._known = made, {node: (axis, 1)}
        waiting = [node]
        while waiting:
            current = waiting.pop(0)
            for found, place in self._around(current, *self._known[current]):
                if found not in self._known:
                    self._known[found] = place
                    waiting.append(found)
                elif self._known[found] != place:
                    raise Refused(f"{graph.name(found)} reads it along two axes")
        order = {known: index for index, known in enumerate(graph.gm.graph.nodes)}
        self.producers = [made[node] for node in sorted(made, key=lambda node: order[node])]

    def _around(self, node: fx.Node, axis: int, repeat: int) -> list[tuple[fx.Node, tuple[int, int]]]:
        """The neighbours of a tensor that take the same scales; readers are noted."""
        found = []
        shape = self.graph.shape(node)
        for user in node.users:
            if user.op == "output":
                raise Refused("it leaves the network")
            op = self.graph.op(user)
            if op.kind in ("shape", "const"):
                continue  # they look at its size
            if op.kind in SUMS and self._adds(op, shape, axis, repeat):
                found.append((user, (axis, 1)))
                found += [(operand.node, (axis, 1)) for operand in op.operands if operand and operand.node]
            elif op.kind in LAYERS:
                self.readers.append(self._reader(node, user, op, axis, repeat))
            else:
                found.append((user, self._behind(node, user, op, axis, repeat)))
        if node not in self._made:
            found += self._above(node, axis)
        return found

    def _adds(self, op: Op, shape: Shape | None, axis: int, repeat: int) -> bool:
        """Whether it adds tensors of one shape, each made while running."""
        if not self.joins or repeat > 1 or shape is None or len(op.operands) != 2:
            return False
        shapes = [
            self.graph.shape(o.node) if o is not None and o.node is not None else None for o in op.operands
        ]
        return all(found is not None and _same(found, shape, axis) for found in shapes)

    def _above(self, node: fx.Node, axis: int) -> list[tuple[fx.Node, tuple[int, int]]]:
        """What makes a tensor that a sum has drawn in: its operands, or itself where it is a layer."""
        op = self.graph.op(node) if node.op.startswith("call") else None
        sources = (
            [o.node for o in op.operands if o is not None and o.node is not None] if op is not None else []
        )
        if any(source in self._known for source in sources):
            return []  # it was come to from there
        shape = self.graph.shape(node)
        if (
            op is not None
            and op.kind in LAYERS
            and shape is not None
            and axis == _channel_axis(op, len(shape))
        ):
            self._made[node] = _end(self.graph, self.uses, node, op)
            return []
        if op is not None and sources and (op.kind in HOMOGENEOUS or (op.kind == "clamp" and _is_relu(op))):
            return [(sources[0], (axis, 1))]
        if op is not None and op.kind in SUMS and self._adds(op, shape, axis, 1):
            return [(source, (axis, 1)) for source in sources]
        raise Refused(f"{self.graph.name(node)}, which it is added to, can't be scaled alike")

    def _reader(self, node: fx.Node, user: fx.Node, op: Op, axis: int, repeat: int) -> End:
        name, shape = self._first_of(node, user, op)
        end = _end(self.graph, self.uses, user, op, repeat)
        wanted = int(shape[axis]) if isinstance(shape[axis], int) else -1
        if axis != _channel_axis(op, len(shape)) or (repeat > 1 and op.kind != "linear"):
            raise Refused(f"{name} ({op.kind}) mixes another axis")
        if input_ranges(self.graph.tensor(end.weight), end.groups, end.transposed).numel() != wanted:
            raise Refused(f"{name} ({op.kind}) reads other channels")
        return end

    def _behind(self, node: fx.Node, user: fx.Node, op: Op, axis: int, repeat: int) -> tuple[int, int]:
        name, shape = self._first_of(node, user, op)
        after = through(self.graph, user, op, shape, axis, repeat)
        if after is None:
            raise Refused(f"{name} ({op.kind}) {_why(op.kind)}")
        return after

    def _first_of(self, node: fx.Node, user: fx.Node, op: Op) -> tuple[str, Shape]:
        """(name, shape read) of an operator that reads the tensor as its data, and nowhere else."""
        name, shape = self.graph.name(user), self.graph.shape(node)
        first = op.operands[0] if op.operands else None
        if shape is None or first is None or first.node is not node or _is_own_input(op):
            raise Refused(f"{name} ({op.kind}) {_why('add')}")
        return name, shape


def _same(found: Shape, shape: Shape, axis: int) -> bool:
    return len(found) == len(shape) and found[axis] == shape[axis] and isinstance(shape[axis], int)


def _why(kind: str) -> str:
    if kind in CLIPS:
        return "clips all channels at one number: scaled, each would need a bound of its own"
    if kind in JOINS:
        return "joins it with other tensors"
    return "doesn't keep a scale per channel"


def through(
    graph: Graph, node: fx.Node, op: Op, shape: Shape, axis: int, repeat: int
) -> tuple[int, int] | None:
    """(axis, repeat) of the channels behind an operator; None where it doesn't keep a scale per channel."""
    if op.kind in HOMOGENEOUS or (op.kind == "clamp" and _is_relu(op)):
        return None if op.attrs.get("rounding_mode") else (axis, repeat)
    if repeat > 1:
        return None
    if op.kind in POOLS:
        return (axis, 1) if axis == len(shape) - int(op.attrs["ndim"]) - 1 else None
    if op.kind == "resize_bilinear":
        return (axis, 1) if axis == 1 else None
    if op.kind == "pad":
        padded = len(shape) - len(op.attrs["pad"]) // 2
        zero = op.attrs["mode"] != "constant" or op.attrs["value"] in (0, None)
        return (axis, 1) if padded > axis and zero else None
    if op.kind in ("mean", "sum"):
        dims = op.attrs["dim"] or ()
        if not dims or axis in dims:
            return None
        return (axis if op.attrs["keepdim"] else axis - sum(dim < axis for dim in dims), 1)
    if op.kind in ("slice", "select"):
        gone = op.kind == "select" and op.attrs["dim"] < axis
        return (axis - gone, 1) if op.attrs["dim"] != axis else None
    if op.kind == "squeeze":
        dims = op.attrs["dims"]
        return None if dims is None or axis in dims else (axis - sum(dim < axis for dim in dims), 1)
    if op.kind == "transpose":
        dims = op.attrs["dims"]
        return None if dims is None else (tuple(dims).index(axis), 1)
    return _viewed(shape, graph.shape(node), axis) if op.kind == "view" else None


def _is_relu(op: Op) -> bool:
    return op.attrs.get("min") == 0 and op.attrs.get("max") is None


def _viewed(before: Shape, after: Shape | None, axis: int) -> tuple[int, int] | None:
    """Where a reshape puts the channels: an axis of its own, or in front of pixels that are all flattened into them."""
    if after is None or not all(isinstance(size, int) for size in before[axis:]):
        return None
    channels, pixels = int(before[axis]), _volume(before[axis + 1 :])[0]
    for place, size in enumerate(after):
        if _volume(after[:place]) == _volume(before[:axis]):
            if size == channels:
                return place, 1
            if place == len(after) - 1 and size == channels * pixels:
                return place, pixels
    return None


def _volume(shape: Shape) -> tuple[int, tuple[str, ...]]:
    """The product of a shape: its numbers multiplied, its symbols sorted."""
    product = 1
    for size in shape:
        product *= size if isinstance(size, int) else 1
    return product, tuple(sorted(size for size in shape if isinstance(size, str)))
