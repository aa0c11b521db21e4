"""Rewrites that keep a network's eval-mode outputs and bring it nearer to what runtimes execute.

    drop_identities   dropout and no-op copies vanish
    merge_duplicates  the same operator on the same operands is computed once
    fold_constants    what depends on no input becomes a buffer
    fold_batch_norms  BatchNorm behind a convolution or Linear goes into its weights
    fold_affines      so do products and sums with a number for each channel
    split_attention   scaled_dot_product_attention becomes matmul → scale → mask → softmax → matmul
    normalise         a mean over all pixels is a global average pool; a softmax over one element is 1
    (and `products`   other spellings of a matrix product become linear and matmul,
    `cells`           single steps of recurrent layers linear layers and gates,
    `experts`         grouped products one linear layer of all experts,
    `subpixel`        transposed convolutions convolutions, where the runtime has no others in integers)

Each takes a graph and changes it; every operator has a shape when it returns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..numerics.fold import fold_batch_norm
from .cells import spell_cells
from .editing import insert, replace
from .experts import spell_experts
from .graph import Graph
from .match import Op, Operand
from .products import linear_instead, spell_products
from .shapes import fetch
from .subpixel import convolve_phases

aten = torch.ops.aten
CONTRACTIONS = ("conv", "conv_transpose", "linear")
# A constant beyond this is a mask, not a value: a range over it would leave no resolution for the rest.
MASK_MAGNITUDE = 1e3


def simplify(graph: Graph, *, phases: bool = False) -> None:
    """All rewrites, in the order in which they help each other. The graph's stage becomes `folded`.

    Args:
        phases: transposed convolutions become convolutions whose channels are spread over pixels.
    """
    drop_identities(graph)
    merge_duplicates(graph)
    split_attention(graph)
    spell_cells(graph)
    spell_products(graph)
    spell_experts(graph)
    _clean(graph)
    fold_constants(graph)
    linear_instead(graph)
    _clean(graph)
    fold_batch_norms(graph)
    fold_affines(graph)
    if phases:
        convolve_phases(graph)
    normalise(graph)
    merge_duplicates(graph)  # two products that turn one tensor alike turn it once
    graph.gm.recompile()
    graph.stage = "folded"


def drop_identities(graph: Graph, *, dropout: bool = True) -> None:
    """dropout: that as well, which does something in training."""
    kinds = ("identity", "dropout") if dropout else ("identity",)
    for node in graph.nodes():
        if graph.op(node).kind in kinds:
            source = graph.op(node).operands[0]
            assert source is not None and source.node is not None
            node.replace_all_uses_with(source.node)
            graph.gm.graph.erase_node(node)
        elif node.target is aten.view.default:
            node.target = aten.reshape.default  # without the copies a view may not be one any more
    _clean(graph)
    graph.gm.recompile()


def merge_duplicates(graph: Graph) -> None:
    """One operator for several that compute the same in eval mode; exporters do so, and names would get lost."""
    first: dict[tuple[str, str, str, str], fx.Node] = {}
    for node in list(graph.gm.graph.nodes):
        if node.op not in ("call_function", "call_module", "get_attr"):
            continue
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            continue
        key = (node.op, str(node.target), repr(node.args), repr(node.kwargs))
        kept = first.setdefault(key, node)
        if kept is not node:
            node.replace_all_uses_with(kept)
            graph.gm.graph.erase_node(node)
    _clean(graph)


def fold_constants(graph: Graph) -> None:
    """Evaluate what depends on no input, not even on its size, and is read as a number by something that does."""
    free = {node for node in graph.nodes() if _depends_on_nothing(node)}
    for node in [n for n in graph.nodes() if n in free]:
        value = node.meta.get("val")
        if (
            not isinstance(value, Tensor)
            or not value.is_floating_point()
            or all(user in free for user in node.users)
        ):
            continue
        name = f"constant_{sum(1 for n, _ in graph.gm.named_buffers() if n.startswith('constant_'))}"
        graph.gm.register_buffer(name, _evaluate(graph, node).detach().clone().contiguous())
        with graph.gm.graph.inserting_before(node):
            stored = graph.gm.graph.get_attr(name)
        stored.meta["val"] = value
        node.replace_all_uses_with(stored)
    _clean(graph)


def fold_batch_norms(graph: Graph) -> None:
    for node in graph.nodes():
        source = foldable(graph, node)
        if source is not None:
            norm = graph.op(node)
            gamma, beta, mean, var = (
                None if o is None or o.tensor is None else graph.tensor(o.tensor).detach()
                for o in norm.operands[1:5]
            )
            assert mean is not None and var is not None
            _fold_into(graph, source, mean, var, gamma, beta, norm.attrs["eps"])
            _takes_over(graph, source, node)
    _clean(graph)


def _takes_over(graph: Graph, layer: fx.Node, node: fx.Node) -> None:
    """A layer gives what the operator behind it gave, which goes."""
    graph.given.pop(graph.name(layer), None)  # of what the operator read
    if graph.name(node) in graph.given:
        graph.given[graph.name(layer)] = graph.given.pop(graph.name(node))
    node.replace_all_uses_with(layer)
    graph.gm.graph.erase_node(node)


def fold_affines(graph: Graph) -> None:
    """A product or a sum with a number for each output channel of a layer: what converters leave of a norm."""
    for node in graph.nodes():
        found = _affine(graph, node)
        if found is None:
            continue
        layer, values = found
        zero, one = torch.zeros_like(values), torch.ones_like(values)
        gamma, beta = (values, None) if graph.op(node).kind == "mul" else (None, values)
        _fold_into(graph, layer, zero, one, gamma, beta, 0.0)
        _takes_over(graph, layer, node)
    _clean(graph)


def _affine(graph: Graph, node: fx.Node) -> tuple[fx.Node, Tensor] | None:
    """The layer that a product or sum reads alone, and its number for each of the layer's channels [C]."""
    op = graph.op(node)
    if op.kind not in ("mul", "add") or len(op.operands) < 2 or op.attrs.get("alpha", 1) != 1:
        return None
    for read, other in (op.operands[:2], op.operands[1::-1]):
        layer = None if read is None else read.node
        if layer is None or other is None or other.tensor is None or not _feeds_alone(graph, layer):
            continue
        values, shape = graph.tensor(other.tensor).detach(), graph.shape(layer) or ()
        axis = len(shape) - 1 if graph.op(layer).kind == "linear" else 1
        wide = [1] * (len(shape) - values.dim()) + list(values.shape)
        fits = graph.shape(node) == shape and 1 < values.numel() == wide[axis] == shape[axis]
        if fits and values.is_floating_point() and bool((values.abs() <= MASK_MAGNITUDE).all()):
            return layer, values.reshape(-1)
    return None


def _feeds_alone(graph: Graph, layer: fx.Node) -> bool:
    """Whether it is a layer with weights of its own and one reader."""
    if layer.op not in ("call_module", "call_function") or len(layer.users) != 1:
        return False
    op = graph.op(layer)
    return op.kind in CONTRACTIONS and _owns_its_weight(graph, layer, op)


def foldable(graph: Graph, node: fx.Node) -> fx.Node | None:
    """The convolution or Linear that a batch normalisation can be folded into; None: it can't, or is none."""
    op = graph.op(node)
    if op.kind != "batch_norm" or op.operands[0] is None or op.operands[0].node is None:
        return None
    source = op.operands[0].node
    return source if _has_statistics(op) and _feeds_alone(graph, source) else None


def split_attention(graph: Graph) -> None:
    for node in graph.nodes():
        op = graph.op(node)
        if op.kind == "sdpa":
            _Attention(graph, node, op).split()
    _clean(graph)
    graph.gm.recompile()


def normalise(graph: Graph) -> None:
    for node in graph.nodes():
        op = graph.op(node)
        if op.kind == "mean" and _is_over_pixels(graph, op):
            _pool_instead(graph, node, op)
        elif (
            op.kind == "softmax" and (shape := graph.shape(node)) is not None and shape[op.attrs["dim"]] == 1
        ):
            # one runtime's integer softmax returns 0 here; the answer is 1 whatever the input
            new = insert(graph, node, aten.ones_like.default, (_node(op, 0),), graph.name(node))
            replace(graph, node, new)
    _clean(graph)


def _clean(graph: Graph) -> None:
    """What nothing reads goes. The module's code stays what it was: several rewrites are compiled once, behind them."""
    graph.gm.graph.eliminate_dead_code()
    _delete_unused(graph)
    graph.complete()  # what was taken away changes no other shape


def _delete_unused(graph: Graph) -> None:
    """Modules that nothing calls and whose tensors nothing reads."""
    read = {str(n.target) for n in graph.gm.graph.nodes if n.op in ("call_module", "get_attr")}
    for name, module in list(graph.gm.named_modules()):
        wanted = any(target == name or target.startswith(f"{name}.") for target in read)
        if name and not wanted and not list(module.children()):
            graph.gm.delete_submodule(name)


def _node(op: Op, slot: int) -> fx.Node:
    operand = op.operands[slot]
    assert operand is not None and operand.node is not None
    return operand.node


# ------------------------------------------------------------------------------------------------ constants


def _depends_on_nothing(node: fx.Node) -> bool:
    todo = [node]
    while todo:
        at = todo.pop()
        if at.op == "placeholder" or "rand" in str(at.target):
            return False
        todo += at.all_input_nodes
    return True


def _evaluate(graph: Graph, node: fx.Node) -> Any:
    if node.op == "get_attr":
        return fetch(graph.gm, str(node.target))
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: _evaluate(graph, n))
    call = graph.gm.get_submodule(str(node.target)) if node.op == "call_module" else node.target
    assert callable(call)
    with torch.no_grad():
        return call(*args, **kwargs)


# ------------------------------------------------------------------------------------------------ batch norm


def _owns_its_weight(graph: Graph, node: fx.Node, op: Op) -> bool:
    """Whether this is the only use of its weight: what two call sites share can't be scaled for one of them."""
    weight = op.operands[1]
    if weight is None or weight.tensor is None:
        return False
    value = graph.tensor(weight.tensor)
    uses = 0
    for other in graph.nodes():
        for operand in graph.op(other).operands:
            if operand is not None and operand.tensor is not None and graph.tensor(operand.tensor) is value:
                uses += 1
    return uses == 1


def _has_statistics(op: Op) -> bool:
    return op.operands[3] is not None and op.operands[4] is not None


def _fold_into(
    graph: Graph,
    node: fx.Node,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
) -> None:
    op = graph.op(node)
    weight, bias = op.operands[1], op.operands[2]
    assert weight is not None and weight.tensor is not None
    new_weight, new_bias = fold_batch_norm(
        graph.tensor(weight.tensor).detach(),
        None if bias is None or bias.tensor is None else graph.tensor(bias.tensor).detach(),
        mean,
        var,
        gamma,
        beta,
        eps,
        transposed=op.kind == "conv_transpose",
        groups=op.attrs.get("groups", 1),
    )
    graph.set_tensor(weight.tensor, new_weight)
    _set_bias(graph, node, bias, new_bias, weight.tensor)


def _set_bias(graph: Graph, node: fx.Node, bias: Operand | None, value: Tensor, weight: str) -> None:
    if bias is not None and bias.tensor is not None and node.op == "call_module":
        graph.set_tensor(bias.tensor, value)
    elif node.op == "call_module":
        graph.gm.get_submodule(str(node.target)).bias = nn.Parameter(value)
        graph.changed(node)
    else:
        # a functional call: the old bias may have other readers, so a new parameter takes its place
        name = f"{weight.replace('.', '_')}_folded_bias"
        graph.gm.register_parameter(name, nn.Parameter(value))
        with graph.gm.graph.inserting_before(node):
            stored = graph.gm.graph.get_attr(name)
        args = list(node.args)
        args += [None] * (3 - len(args))
        args[2] = stored
        node.args = tuple(args)
        node.kwargs = {key: v for key, v in node.kwargs.items() if key != "bias"}


# ------------------------------------------------------------------------------------------------ attention


class _Attention:
    """softmax(q · kᵀ · scale + mask) · v, as `torch.nn.functional.scaled_dot_product_attention` documents it."""

    def __init__(self, graph: Graph, node: fx.Node, op: Op) -> None:
        self.graph, self.node, self.attrs = graph, node, op.attrs
        self.name = graph.name(node)
        self.q, self.k, self.v = (_node(op, slot) for slot in range(3))
        self.rank = self.q.meta["val"].dim()
        mask = op.operands[3] if len(op.operands) > 3 else None
        self.mask = None if mask is None else mask.node

    def split(self) -> None:
        if self.attrs.get("enable_gqa"):
            self.k, self.v = self._repeat(self.k), self._repeat(self.v)
        width = self.q.meta["val"].shape[-1]
        scale, rank = self.attrs.get("scale"), self.rank
        keys = self._new("keys", aten.transpose.int, self.k, rank - 2, rank - 1)
        # the constant scales the queries, not the scores: a factor on integers is free, one on scores is not
        factor = 1.0 / math.sqrt(int(width)) if scale is None else scale
        query = self._new("scale", aten.mul.Tensor, self.q, factor)
        scores = self._new("scores", aten.matmul.default, query, keys)
        scores = self._masked(scores)
        weights = self._new("softmax", aten.softmax.int, scores, rank - 1)
        replace(self.graph, self.node, self._new("values", aten.matmul.default, weights, self.v))

    def _masked(self, scores: fx.Node) -> fx.Node:
        mask = self.mask
        if self.attrs.get("is_causal"):
            rows = self._new("rows", aten.sym_size.int, self.q, self.rank - 2)
            columns = self._new("columns", aten.sym_size.int, self.k, self.rank - 2)
            full = self._new("full", aten.ones.default, [rows, columns])
            mask = self._new("causal", aten.to.dtype, self._new("tril", aten.tril.default, full), torch.bool)
        if mask is None:
            return scores
        value = mask.meta.get("val")
        if value is not None and value.is_floating_point():
            return self._new("masked", aten.add.Tensor, scores, mask)
        hidden = self._new("hidden", aten.full.default, [], -math.inf)
        return self._new("masked", aten.where.self, mask, scores, hidden)

    def _repeat(self, value: fx.Node) -> fx.Node:
        heads, groups = self.q.meta["val"].shape[-3], value.meta["val"].shape[-3]
        return self._new("repeat", aten.repeat_interleave.self_int, value, int(heads) // int(groups), -3)

    def _new(self, what: str, target: Callable[..., Any], *args: Any) -> fx.Node:
        return insert(self.graph, self.node, target, args, f"{self.name}.{what}")


# ------------------------------------------------------------------------------------------------ pooling


def _is_over_pixels(graph: Graph, op: Op) -> bool:
    shape = graph.shape(_node(op, 0))
    dims = op.attrs.get("dim")
    return (
        shape is not None
        and len(shape) in (4, 5)
        and dims is not None
        and tuple(dims) == tuple(range(2, len(shape)))
    )


def _pool_instead(graph: Graph, node: fx.Node, op: Op) -> None:
    source, name = _node(op, 0), graph.name(node)
    rank = len(graph.shape(source) or ())
    target = aten.adaptive_avg_pool2d.default if rank == 4 else aten.adaptive_avg_pool3d.default
    pooled = insert(graph, node, target, (source, [1] * (rank - 2)), f"{name}.pool")
    if op.attrs.get("keepdim"):
        replace(graph, node, pooled)
    else:
        replace(graph, node, insert(graph, node, aten.flatten.using_ints, (pooled, 1), f"{name}.flatten"))
