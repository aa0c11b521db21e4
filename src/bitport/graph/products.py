"""Other spellings of a matrix product become `linear` and `matmul`, which runtimes execute in integers.

    spell_products    addmm, baddbmm and einsum → matmul, permutations and additions
    linear_instead    x @ W with a constant matrix W → linear, whose weights have one scale per output

Each takes a graph and changes it; eval-mode outputs stay the same up to rounding.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx

from .editing import insert, replace
from .graph import Graph
from .match import Call, op_name

aten = torch.ops.aten


def spell_products(graph: Graph) -> None:
    _in_pairs(graph)
    for node in graph.nodes():
        name = op_name(node) if node.op == "call_function" else ""
        if name in ("addmm", "baddbmm"):
            _add_to_product(graph, node, Call(node))
        elif name == "einsum":
            _contract(graph, node, Call(node))


def linear_instead(graph: Graph) -> None:
    """The weight of a `linear` is [out, in]: a transposed matrix is used as it is, another one stored transposed."""
    for node in graph.nodes():
        if node.op != "call_function" or op_name(node) not in ("matmul", "mm"):
            continue
        x, matrix = node.args[:2]
        assert isinstance(x, fx.Node) and isinstance(matrix, fx.Node)
        if x.op == "get_attr" or _rank(x) < 2 or _rank(matrix) != 2:
            continue
        turned = _transposed_constant(matrix)
        if turned is None and matrix.op == "get_attr":
            turned = _stored_transposed(graph, matrix)
        if turned is not None:
            new = insert(graph, node, aten.linear.default, (x, turned), graph.name(node))
            new.meta["val"] = node.meta.get("val")
            replace(graph, node, new)


def _rank(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else 0


def _transposed_constant(node: fx.Node) -> fx.Node | None:
    """W where the node is Wᵀ of a stored matrix: nothing has to be stored again (tied embeddings)."""
    if node.op != "call_function" or op_name(node) not in ("t", "transpose", "permute", "numpy_T", "mT"):
        return None
    source = node.args[0]
    return source if isinstance(source, fx.Node) and source.op == "get_attr" and _rank(source) == 2 else None


def _stored_transposed(graph: Graph, matrix: fx.Node) -> fx.Node:
    """Wᵀ under W's own name where nothing else reads W, else beside it."""
    dotted = str(matrix.target)
    value = graph.tensor(dotted)
    turned = value.detach().t().contiguous()
    if readers(graph, value) == 1:
        graph.set_tensor(dotted, turned)
        matrix.meta["val"] = matrix.meta["val"].t()
        return matrix
    name = f"{dotted.replace('.', '_')}_transposed"
    if not hasattr(graph.gm, name):
        graph.gm.register_parameter(
            name, torch.nn.Parameter(turned, requires_grad=turned.is_floating_point())
        )
    with graph.gm.graph.inserting_after(matrix):
        stored = graph.gm.graph.get_attr(name)
    stored.meta["val"] = matrix.meta["val"].t()
    return stored


def readers(graph: Graph, value: Tensor) -> int:
    """How many operands of the graph's operators are this parameter or buffer."""
    count = 0
    for node in graph.nodes():
        for operand in graph.op(node).operands:
            count += (
                operand is not None and operand.tensor is not None and graph.tensor(operand.tensor) is value
            )
    return count


def _add_to_product(graph: Graph, node: fx.Node, call: Call) -> None:
    first, second = (
        (call["mat1"], call["mat2"]) if call["mat1"] is not None else (call["batch1"], call["batch2"])
    )
    name = graph.name(node)
    alpha, beta, added = call["alpha"], call["beta"], call["self"]
    plain = alpha == 1 and beta == 1
    if plain and added.op == "get_attr" and _rank(added) == 1 and _rank(second) == 2:
        turned = _transposed_constant(second)
        if turned is None and second.op == "get_attr":
            turned = _stored_transposed(graph, second)
        if turned is not None:
            replace(graph, node, insert(graph, node, aten.linear.default, (first, turned, added), name))
            return
    product = insert(graph, node, aten.matmul.default, (first, second), f"{name}.product")
    if alpha != 1:
        product = insert(graph, node, aten.mul.Tensor, (product, alpha), f"{name}.alpha")
    if beta == 0:
        replace(graph, node, product)
        return
    if beta != 1:
        added = insert(graph, node, aten.mul.Tensor, (added, beta), f"{name}.beta")
    replace(graph, node, insert(graph, node, aten.add.Tensor, (product, added), name))


# ------------------------------------------------------------------------------------------------ einsum


def _in_pairs(graph: Graph) -> None:
    """einsum of several operands as einsums of two, from left to right as torch does it."""
    changed = False
    for node in graph.nodes():
        call = Call(node)
        if node.op != "call_function" or op_name(node) != "einsum" or len(call["tensors"]) <= 2:
            continue
        tensors, name = call["tensors"], graph.name(node)
        texts = _letters(str(call["equation"]), [len(graph.shape(t) or ()) for t in tensors])
        if texts is None:
            continue
        left, letters = tensors[0], texts[0]
        for index, right in enumerate(tensors[1:], start=1):
            needed = "".join(texts[index + 1 :])
            out = "".join(x for x in dict.fromkeys(letters + texts[index]) if x in needed)
            out = texts[-1] if index == len(tensors) - 1 else out
            equation = f"{letters},{texts[index]}->{out}"
            left = insert(graph, node, aten.einsum.default, (equation, [left, right]), f"{name}.part")
            letters = out
        replace(graph, node, left)
        changed = True
    if changed:
        graph.propagate()


def _contract(graph: Graph, node: fx.Node, call: Call) -> None:
    """einsum of two operands without sums over an axis of one of them: batch · (rows × shared) · (shared × columns)."""
    tensors = call["tensors"]
    shapes = [graph.shape(t) for t in tensors]
    letters = _letters(str(call["equation"]), [len(s or ()) for s in shapes])
    if letters is None or len(tensors) != 2 or any(s is None for s in shapes):
        return
    a, b, out = letters
    (first, a), (second, b) = (
        _without_spread(graph, node, (tensors[i], letters[i]), (tensors[1 - i], letters[1 - i]))
        for i in (0, 1)
    )
    tensors, shapes = [first, second], [graph.shape(first), graph.shape(second)]
    sizes: dict[str, int | str] = {}
    origin: dict[str, tuple[fx.Node, int]] = {}
    for tensor, names, shape in zip(tensors, (a, b), shapes, strict=True):
        for axis, (letter, size) in enumerate(zip(names, shape or (), strict=True)):
            if sizes.setdefault(letter, size) != size:
                return  # one of them is broadcast
            origin.setdefault(letter, (tensor, axis))
    batch = [x for x in a if x in b and x in out]
    shared = [x for x in a if x in b and x not in out]
    rows, columns = [x for x in a if x not in b], [x for x in b if x not in a]
    if not shared or any(x not in out for x in rows + columns):
        return
    name = graph.name(node)

    def length(letter: str) -> Any:
        size = sizes[letter]
        return (
            size
            if isinstance(size, int)
            else insert(graph, node, aten.sym_size.int, origin[letter], f"{name}.size")
        )

    def lengths(group: Sequence[str]) -> Any:
        parts = [length(x) for x in group]
        if all(isinstance(p, int) for p in parts):
            return reduce(operator.mul, parts, 1)
        return reduce(lambda p, q: insert(graph, node, operator.mul, (p, q), f"{name}.size"), parts)

    head = [length(x) for x in batch]

    def arranged(value: fx.Node, names: str, above: list[str], below: list[str], what: str) -> fx.Node:
        dims = [names.index(x) for x in (*batch, *above, *below)]
        if dims != sorted(dims):
            value = insert(graph, node, aten.permute.default, (value, dims), f"{name}.{what}")
        if len(above) != 1 or len(below) != 1:
            shape = [*head, lengths(above), lengths(below)]
            value = insert(graph, node, aten.reshape.default, (value, shape), f"{name}.{what}")
        return value

    left = arranged(tensors[0], a, rows, shared, "left")
    right = arranged(tensors[1], b, shared, columns, "right")
    product = insert(graph, node, aten.matmul.default, (left, right), f"{name}.product")
    made = batch + rows + columns
    if len(rows) != 1 or len(columns) != 1:
        whole = [length(x) for x in made]
        product = insert(graph, node, aten.reshape.default, (product, whole), f"{name}.whole")
    dims = [made.index(x) for x in out]
    if dims != sorted(dims):
        product = insert(graph, node, aten.permute.default, (product, dims), f"{name}.order")
    product.meta["val"] = node.meta.get("val")  # an einsum that reads it has to know its shape
    replace(graph, node, product)


def _without_spread(
    graph: Graph, node: fx.Node, own: tuple[fx.Node, str], other: tuple[fx.Node, str]
) -> tuple[fx.Node, str]:
    """An operand of einsum without the axes of size 1 that are spread over the other's."""
    (value, names), (across, others) = own, other
    sizes, lengths = graph.shape(value) or (), graph.shape(across) or ()
    axes = [i for i, x in enumerate(names) if x in others and sizes[i] == 1 and lengths[others.index(x)] != 1]
    if not axes:
        return own
    squeezed = insert(graph, node, aten.squeeze.dims, (value, axes), f"{graph.name(node)}.squeeze")
    squeezed.meta["val"] = value.meta["val"].squeeze(axes)
    return squeezed, "".join(x for i, x in enumerate(names) if i not in axes)


def _letters(equation: str, ranks: Sequence[int]) -> tuple[str, ...] | None:
    """Subscripts of all operands and of the result, an ellipsis written out; None for what isn't such a product."""
    sides = equation.replace(" ", "").split("->")
    inside = sides[0].split(",")
    if len(inside) != len(ranks):
        return None
    free = [c for c in "ZYXWVUTSRQ" if c not in equation]
    hidden = [
        rank - len(text.replace("...", "")) if "..." in text else 0
        for text, rank in zip(inside, ranks, strict=True)
    ]
    if min(hidden) < 0 or max(hidden) > len(free):
        return None
    full = [
        text.replace("...", "".join(free[max(hidden) - n : max(hidden)]))
        for text, n in zip(inside, hidden, strict=True)
    ]
    if len(sides) == 2:
        out = sides[1].replace("...", "".join(free[: max(hidden)]))
    else:
        once = sorted(c for c in set("".join(full)) if "".join(full).count(c) == 1 and c not in free)
        out = "".join(free[: max(hidden)]) + "".join(once)
    texts = (*full, out)
    fits = all(len(t) == r for t, r in zip(full, ranks, strict=True))
    return texts if fits and all(len(set(t)) == len(t) for t in texts) else None
