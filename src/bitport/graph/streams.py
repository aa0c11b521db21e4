"""Residual streams whose channels can be rotated: everything that writes into one and everything that reads it.

A stream is a tensor that layers add to and that only norms and linear layers read. Turned by an orthogonal matrix it
is the same to them, once those that write apply the matrix along their outputs and those that read along their inputs.
RMSNorm looks at lengths only, so it commutes with every rotation; LayerNorm with one that keeps the mean over the
channels. Either only without a gain per channel, which goes into the linear layers behind the norm; so does its bias,
where they all have one of their own.

Whatever else sees single channels ends the search: a gate, a concatenation of channels, the network's input or output,
a norm that is itself added to the stream.

Letters: C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, fx

from ..errors import GraphError
from ..numerics.rotation import rotation, turned
from .graph import Graph
from .match import Op, Operand
from .norms import SIZES, Norm, find_norms
from .pairs import SUMS, Refused, Uses, own, through
from .reading import uses_of
from .shapes import Shape

AFFINE = frozenset(  # what keeps a constant, too, and so passes on the bias of a norm
    ["identity", "dropout", "mean", "slice", "select", "squeeze", "unsqueeze", "transpose", "view", "expand"]
)
LINEAR = AFFINE | {"mul_scalar", "div_scalar", "neg", "sum"}
SMALLEST = 1e-3  # of a norm's gains, by its largest: a bias over less isn't worth keeping


class Part(NamedTuple):
    """A parameter and the axis of it that lies along the stream's channels."""

    tensor: str
    axis: int


class Reader(NamedTuple):
    """A linear layer behind a norm. weight, bias: dotted names."""

    weight: str
    bias: str | None


@dataclass(frozen=True)
class Stream:
    """What has to be changed together.

    Attributes:
        name: of its first norm.
        width: C.
        parts: all parameters that write into it or read it, each once.
        norms: with the layers that read them, whose weights are among the parts.
    """

    name: str
    width: int
    parts: tuple[Part, ...]
    norms: Mapping[Norm, tuple[Reader, ...]] = field(hash=False)

    @property
    def centred(self) -> bool:
        """Whether a rotation has to keep the mean over the channels."""
        return any(norm.centred for norm in self.norms)


def find(graph: Graph) -> tuple[list[Stream], dict[str, str]]:
    """All streams in network order, and of each other norm why the tensor that it reads can't be rotated."""
    uses, norms = uses_of(graph), find_norms(graph)
    inner = {node: norm for norm in norms for node in norm.inner}
    streams: list[Stream] = []
    refused: dict[str, str] = {}
    placed: set[str] = set()
    for norm in norms:
        if norm.name in placed:
            continue
        try:
            streams.append(_Walk(graph, uses, inner, norm).stream())
            placed |= {found.name for found in streams[-1].norms}
        except Refused as why:
            refused[norm.name] = str(why)
    return streams, refused


def turn(graph: Graph, stream: Stream, signs: Tensor) -> None:
    """Rotate a stream in place by the matrix of some signs [C]: the outputs stay what they are, to rounding."""
    matrix = rotation(signs, stream.centred)
    for norm, readers in stream.norms.items():
        _merge(graph, norm, readers, matrix)
    for part in stream.parts:
        graph.set_tensor(part.tensor, turned(graph.tensor(part.tensor), matrix, part.axis))


def turn_all(graph: Graph, rotated: Mapping[str, Tensor]) -> None:
    """Rotate several, by their names. Raises GraphError for a name or a width that no stream has here."""
    if not rotated:
        return
    streams = {stream.name: stream for stream in find(graph)[0]}
    for name, signs in rotated.items():
        if name not in streams or streams[name].width != len(signs):
            raise GraphError(
                f"no stream of {len(signs)} channels can be rotated in front of {name!r} in this network: it is "
                "another one than the rotation was chosen for"
            )
        turn(graph, streams[name], signs)


def _merge(graph: Graph, norm: Norm, readers: tuple[Reader, ...], matrix: Tensor) -> None:
    """A norm's gain goes into what reads it; so does its bias, or stays and is turned."""
    gain = torch.ones(len(matrix), dtype=torch.float64)
    if norm.gain is not None:
        old = graph.tensor(norm.gain)
        gain = old.detach().double().reshape(-1)
        graph.set_tensor(norm.gain, torch.ones_like(old))
    bias = None if norm.bias is None else graph.tensor(norm.bias).detach()
    moves = bias is not None and _moves_bias(readers)
    for reader in readers:
        weight = graph.tensor(reader.weight).detach()
        if moves and bias is not None and reader.bias is not None:
            old = graph.tensor(reader.bias).detach()
            graph.set_tensor(reader.bias, (old.double() + weight.double() @ bias.double()).to(old.dtype))
        graph.set_tensor(reader.weight, (weight.double() * gain).to(weight.dtype))
    if norm.bias is not None and bias is not None:
        stays = torch.where(bias == 0, 0.0, bias.double() / gain).to(bias.dtype)
        graph.set_tensor(norm.bias, torch.zeros_like(bias) if moves else turned(stays, matrix, 0))


def _moves_bias(readers: tuple[Reader, ...]) -> bool:
    return all(reader.bias is not None for reader in readers)


# ------------------------------------------------------------------------------------------------ the walk


class _Walk:
    """All tensors that are turned along with the one that a norm reads. Raises Refused naming the first operator that
    can't be."""

    def __init__(self, graph: Graph, uses: Uses, inner: Mapping[fx.Node, Norm], first: Norm) -> None:
        self.graph, self.uses, self.inner = graph, uses, inner
        self.parts: dict[Part, None] = {}
        self.norms: dict[Norm, tuple[Reader, ...]] = {}
        shape = graph.shape(first.source)
        width = shape[-1] if shape else None
        if shape is None or not isinstance(width, int):
            raise Refused("the number of channels in front of it isn't fixed")
        self.width = width
        self._known: dict[fx.Node, int] = {}
        waiting = [(first.source, len(shape) - 1)]
        while waiting:
            node, axis = waiting.pop(0)
            if node not in self._known:
                self._known[node] = axis
                waiting += self._below(node, axis) + self._above(node, axis)
            elif self._known[node] != axis:
                raise Refused(f"{graph.name(node)} has its channels along two axes")

    def stream(self) -> Stream:
        order = [norm for norm in find_norms(self.graph) if norm in self.norms]
        return Stream(
            order[0].name, self.width, tuple(self.parts), {norm: self.norms[norm] for norm in order}
        )

    def _below(self, node: fx.Node, axis: int) -> list[tuple[fx.Node, int]]:
        """The tensors that a tensor goes into; norms and layers that read it are noted."""
        found = []
        last = axis == len(self._shape(node)) - 1
        for user in node.users:
            if user.op == "output":
                raise Refused(f"{self.graph.name(node)} leaves the network")
            op, norm = self.graph.op(user), self.inner.get(user)
            if op.kind in SIZES:
                continue
            if norm is not None and norm.source is node and last:
                if norm not in self.norms:
                    self.norms[norm] = self._readers(norm)
            elif op.kind == "linear" and last and _reads(op, node):
                self._note(self._reader(user, op).weight, 1)
            else:
                found.append((user, self._behind(node, axis, user, op)))
        return found

    def _behind(self, node: fx.Node, axis: int, user: fx.Node, op: Op) -> int:
        after: int | None = None
        if op.kind in SUMS:
            after = axis + len(self._shape(user)) - len(self._shape(node))
        elif op.kind == "cat":
            after = axis if op.attrs["dim"] != axis else None
        elif op.kind in LINEAR and _reads(op, node):
            after = _along(self.graph, user, op, self._shape(node), axis)
        if after is None:
            raise Refused(
                f"{self.graph.name(user)} ({op.kind}) reads it, and is neither a norm nor a linear layer"
            )
        return after

    def _above(self, node: fx.Node, axis: int) -> list[tuple[fx.Node, int]]:
        """The tensors that a tensor is made of; layers and parameters that make it are noted."""
        name = self.graph.name(node)
        if node.op == "placeholder":
            raise Refused(f"the network's input {name!r} is part of it")
        if node.op == "get_attr":
            self._own(name, name)
            self._note(name, axis)
            return []
        op, rank = self.graph.op(node), len(self._shape(node))
        sources = [o.node for o in op.operands if o is not None and o.node is not None]
        if op.kind in SUMS:
            return [(source, self._added(node, source, axis)) for source in sources]
        if op.kind == "cat":
            return [(source, axis) for source in sources]
        if _writes(op, rank, axis):
            weight, bias = op.operands[1], op.operands[2] if len(op.operands) > 2 else None
            for part, place in ((weight, int(op.kind == "embedding")), (bias, 0)):
                if part is not None:
                    self._note(self._own(self._stored(part, name), name), place)
            return []
        if op.kind in LINEAR and sources:
            shape = self._shape(sources[0])
            for before in range(len(shape)):
                if shape[before] == self.width and _along(self.graph, node, op, shape, before) == axis:
                    return [(sources[0], before)]
        if node in self.inner or any(norm.out is node for norm in self.inner.values()):
            raise Refused(f"what {name} (a norm) gives is added to it")
        raise Refused(f"{name} ({op.kind}) is part of it, and no linear layer or parameter")

    def _added(self, node: fx.Node, source: fx.Node, axis: int) -> int:
        shape = self._shape(source)
        before = axis - (len(self._shape(node)) - len(shape))
        if before < 0 or shape[before] != self.width:
            raise Refused(f"{self.graph.name(source)} is added to all its channels alike")
        return before

    # ------------------------------------------------------------------ layers

    def _readers(self, norm: Norm) -> tuple[Reader, ...]:
        """The linear layers behind a norm. Raises Refused where anything else is."""
        found: list[Reader] = []
        waiting = [(norm.out, len(self._shape(norm.out)) - 1)]
        while waiting:
            node, axis = waiting.pop(0)
            for user in node.users:
                if user.op == "output":
                    raise Refused(f"{norm.name}, which reads it, leaves the network")
                op = self.graph.op(user)
                last = axis == len(self._shape(node)) - 1
                if op.kind in SIZES:
                    continue
                if op.kind == "linear" and last and _reads(op, node):
                    found.append(self._reader(user, op))
                    self._note(found[-1].weight, 1)
                    continue
                known = op.kind in AFFINE and _reads(op, node)
                after = _along(self.graph, user, op, self._shape(node), axis) if known else None
                if after is None:
                    why = f"{self.graph.name(user)} ({op.kind}) reads {norm.name}, and is no linear layer"
                    raise Refused(why)
                waiting.append((user, after))
        self._check(norm, tuple(found))
        return tuple(found)

    def _check(self, norm: Norm, readers: tuple[Reader, ...]) -> None:
        gain = None if norm.gain is None else self.graph.tensor(self._own(norm.gain, norm.name)).detach()
        bias = None if norm.bias is None else self.graph.tensor(self._own(norm.bias, norm.name)).detach()
        if bias is None or not bool(bias.any()) or _moves_bias(readers) or gain is None:
            return
        if float(gain.abs().min()) <= SMALLEST * float(gain.abs().max()):
            raise Refused(
                f"{norm.name}, which reads it, has a bias and gains near 0, and the layers behind it no biases"
            )

    def _reader(self, node: fx.Node, op: Op) -> Reader:
        name = self.graph.name(node)
        bias = op.operands[2] if len(op.operands) > 2 else None
        weight = self._own(self._stored(op.operands[1], name), name)
        return Reader(weight, None if bias is None else self._own(self._stored(bias, name), name))

    def _stored(self, operand: Operand | None, name: str) -> str:
        if operand is None or operand.tensor is None:
            raise Refused(f"parameters of {name} are computed")
        return operand.tensor

    def _own(self, tensor: str, name: str) -> str:
        own(self.graph, self.uses, tensor, name)
        return tensor

    def _note(self, tensor: str, axis: int) -> None:
        value = self.graph.tensor(tensor)
        if not value.is_floating_point() or value.shape[axis] != self.width:
            raise Refused(f"{tensor} has other channels")
        self.parts[Part(tensor, axis)] = None

    def _shape(self, node: fx.Node) -> Shape:
        shape = self.graph.shape(node)
        if shape is None:
            raise Refused(f"{self.graph.name(node)} has no shape")
        return shape


def _reads(op: Op, node: fx.Node) -> bool:
    """Whether an operator reads a tensor as its data, and nowhere else."""
    return [o is not None and o.node is node for o in op.operands].count(True) == 1 and (
        op.operands[0] is not None and op.operands[0].node is node
    )


def _writes(op: Op, rank: int, axis: int) -> bool:
    """Whether an axis of an operator's result lies along the outputs of its weight."""
    if op.kind == "conv":
        return axis == rank - int(op.attrs["ndim"]) - 1 and int(op.attrs.get("groups", 1)) == 1
    return op.kind in ("linear", "embedding") and axis == rank - 1


def _along(graph: Graph, node: fx.Node, op: Op, shape: Shape, axis: int) -> int | None:
    """Where an operator of `LINEAR` puts the channels of a tensor of some shape; None where it doesn't keep them."""
    after = graph.shape(node)
    if after is None:
        return None
    if op.kind == "unsqueeze":
        return axis + (int(op.attrs["dim"]) <= axis)
    if op.kind == "expand":
        place = axis + len(after) - len(shape)
        return place if after[place] == shape[axis] else None
    if op.kind == "view":
        rest = shape[axis:]
        if all(isinstance(size, int) for size in rest) and after[-len(rest) :] == rest:
            return len(after) - len(rest)
    found = through(graph, node, op, shape, axis, 1)
    return found[0] if found is not None and found[1] == 1 else None
