"""Shapes: symbolic propagation through a raised graph, and literal sizes made symbolic.

`propagate` gives every node a fake value with one symbol per dynamic axis. `symbolise` rewrites the
literal sizes of
views and expands in terms of their operand's sizes, so that channels and heads can be removed in front of
them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils import _pytree as pytree

from bitport.errors import GraphError, first_line
from bitport.graph.match import is_shape, op_name

aten = torch.ops.aten
Shape = tuple[int | str, ...]


def fetch(root: Any, dotted: str) -> Any:
    """The attribute of a module at a dotted name."""
    for part in dotted.split("."):
        root = getattr(root, part)
    return root


def execute(
    gm: fx.GraphModule,
    flat_inputs: Sequence[Any],
    on_value: Callable[[fx.Node, Any], Any] | None = None,
    around: Callable[[fx.Node], Any] | None = None,
    stand_in: Callable[[Any], Any] | None = None,
) -> Any:
    """Runs `gm` node by node, freeing a value as soon as its last user ran; returns the output node's
    argument.

    `on_value(node, value)` sees each placeholder and operator value; what it returns (unless None)
    replaces it.
    `around(node)` gives a context manager that is entered for the node's call; `stand_in(callable)` is called instead
    of a module or function.
    """
    last: dict[fx.Node, list[fx.Node]] = {}
    seen: set[fx.Node] = set()
    for node in reversed(gm.graph.nodes):
        for used in node.all_input_nodes:
            if used not in seen:
                seen.add(used)
                last.setdefault(node, []).append(used)
    env: dict[fx.Node, Any] = {}
    waiting = list(reversed(flat_inputs))
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            value = waiting.pop()
        elif node.op == "get_attr":
            env[node] = fetch(gm, str(node.target))
            continue
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
            if node.op == "output":
                return args[0]
            call: Any = gm.get_submodule(str(node.target)) if node.op == "call_module" else node.target
            if stand_in is not None:
                call = stand_in(call)
            if around is None:
                value = call(*args, **kwargs)
            else:
                with around(node):
                    value = call(*args, **kwargs)
        if on_value is not None:
            replaced = on_value(node, value)
            value = value if replaced is None else replaced
        env[node] = value
        for done in last.get(node, ()):
            del env[done]
        if node not in seen and node.op != "placeholder":
            del env[node]
    raise GraphError("the graph has no output node")


def propagate(
    gm: fx.GraphModule,
    shapes: Sequence[Shape],
    dtypes: Sequence[torch.dtype],
    lengths: Mapping[str, int] | None = None,
) -> dict[str, str]:
    """Sets `node.meta["val"]` of every node, with one symbol per named axis of the inputs.

    `lengths` are legal lengths of named axes. Returns the symbols' names as
    {symbol: axis name}. Devices are those of the parameters (cpu for the
    inputs).

    Raises:
        GraphError: an operator refuses the shapes; names the node.
    """
    from torch._dynamo.source import ConstantSource

    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
    sizes: dict[str, Any] = {}
    symbols: dict[str, str] = {}
    device = next((p.device for p in (*gm.parameters(), *gm.buffers())), torch.device("cpu"))
    for shape in shapes:
        for axis in shape:
            if isinstance(axis, str) and axis not in sizes:
                # the length in the example is known to be legal; the batch gets one that equals no other axis
                hint = 8 * 7919 if axis == "batch" else (lengths or {}).get(axis, 64 * (5 + 2 * len(sizes)))
                symbol = env.create_symbol(hint, ConstantSource(f"axis_{axis}"), DimDynamic.DYNAMIC)
                sizes[axis] = env.create_symintnode(symbol, hint=hint)
                symbols[str(symbol)] = axis
    modes = {module: module.training for module in gm.modules()}
    at: list[fx.Node] = []

    def keep(node: fx.Node, value: Any) -> None:
        node.meta["val"] = value

    def around(node: fx.Node) -> Any:
        at[:] = [node]
        return mode

    gm.eval()
    try:
        # the python dispatcher knows recurrent operators on symbolic sizes; the C++ one does not
        with torch.no_grad(), enable_python_dispatcher():
            with mode:
                fakes = [
                    torch.empty(
                        [sizes[a] if isinstance(a, str) else a for a in shape], dtype=dtype, device=device
                    )
                    for shape, dtype in zip(shapes, dtypes, strict=True)
                ]
            execute(gm, fakes, keep, around, _without_unrolling)
            for node in gm.graph.find_nodes(op="get_attr"):
                node.meta["val"] = mode.from_tensor(fetch(gm, str(node.target)), static_shapes=True)
    except Exception as error:
        if isinstance(error, GraphError) or not at:
            raise
        name = at[0].meta.get("bitport_name", at[0].name)
        raise GraphError(
            f"{name}: shapes do not fit ({first_line(error)}); check the tensors that were edited"
        ) from error
    finally:
        for module, training in modes.items():
            module.training = training
    return symbols


def complete(gm: fx.GraphModule) -> bool:
    """Sets `node.meta["val"]` where an edit has left it out, from the values around it; all others stay as they are.

    False where that can't be: values around are missing too, or are of another propagation, or don't fit.
    """
    known = (node.meta.get("val") for node in gm.graph.find_nodes(op="placeholder"))
    mode = next((value.fake_mode for value in known if isinstance(value, FakeTensor)), None)
    if mode is None:
        return False
    for node in gm.graph.nodes:
        if "val" in node.meta or node.op == "output":
            continue
        if any("val" not in used.meta for used in node.all_input_nodes):
            return False
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda used: used.meta["val"])
        leaves = pytree.tree_leaves((args, kwargs))
        if any(isinstance(value, FakeTensor) and value.fake_mode is not mode for value in leaves):
            return False
        try:
            with torch.no_grad(), enable_python_dispatcher(), mode:
                node.meta["val"] = _value(gm, node, mode, args, kwargs)
        except (RuntimeError, TypeError, ValueError):  # the whole propagation tells which node, and why
            return False
    return True


def _value(gm: fx.GraphModule, node: fx.Node, mode: FakeTensorMode, args: Any, kwargs: Any) -> Any:
    if node.op == "get_attr":
        return mode.from_tensor(fetch(gm, str(node.target)), static_shapes=True)
    if node.target is torch.ops.aten.matmul.default:
        return _matmul(*args)
    call: Any = gm.get_submodule(str(node.target)) if node.op == "call_module" else node.target
    return _without_unrolling(call)(*args, **kwargs)


def _matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A product of matrices by formula where their stacks are alike: torch's decomposition takes some 15 ms."""
    alike = a.dim() == b.dim() > 2 and a.shape[:-2] == b.shape[:-2] and a.dtype == b.dtype
    if alike and a.shape[-1] == b.shape[-2]:
        return a.new_empty([*a.shape[:-1], b.shape[-1]])
    return torch.matmul(a, b)


def _without_unrolling(call: Any) -> Any:
    """A recurrent module's shapes by formula: torch's decomposition would run every time step."""
    if not isinstance(call, nn.RNNBase):
        return call

    def shapes_only(x: torch.Tensor, *states: torch.Tensor) -> Any:
        directions = 2 if call.bidirectional else 1
        width = call.proj_size or call.hidden_size
        if (
            x.dim() != 3
            or x.shape[-1] != call.input_size
            or x.shape[-1] != call.get_parameter("weight_ih_l0").shape[1]
        ):
            return call(x, *states)  # let torch say what does not fit
        batch = x.shape[0 if call.batch_first else 1]
        out = x.new_empty([x.shape[0], x.shape[1], directions * width])
        hidden = x.new_empty([call.num_layers * directions, batch, width])
        if isinstance(call, nn.LSTM):
            return out, hidden, x.new_empty([call.num_layers * directions, batch, call.hidden_size])
        return out, hidden

    return shapes_only


def read_shape(value: Any, symbols: Mapping[str, str]) -> Shape | None:
    """The shape of a fake tensor with axis names instead of symbols; None when `value` is no tensor."""
    if not isinstance(value, torch.Tensor):
        return None
    return tuple(read_size(s, symbols) for s in value.shape)


def read_size(size: Any, symbols: Mapping[str, str]) -> int | str:
    """A plain or symbolic integer as a number or as text over axis names (`4*batch`)."""
    if isinstance(size, int):
        return size
    expr = size.node.expr
    if expr.is_Integer:
        return int(expr)
    names = {s: type(s)(symbols.get(str(s), str(s))) for s in expr.free_symbols}
    return str(expr.xreplace(names))


# --- literal sizes
# ------------------------------------------------------------------------------------------------


def symbolise(graph: fx.Graph) -> None:
    """Rewrites literal sizes of view / reshape / expand / unflatten from the operand's sizes.

    Aligned segments of equal product: one axis to one axis becomes its size, a merge becomes the product,
    a split derives its outermost literal axis as size // rest (the one after it in a packed 3 x heads x
    width). The batch is never baked.
    """
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        name = op_name(node)
        if name == "unflatten":
            node = _unflatten_to_view(graph, node)
            name = op_name(node)
        if name in ("view", "reshape", "_unsafe_view") and isinstance(node.args[1], list | tuple):
            _view(graph, node)
        elif name == "expand" and isinstance(node.args[1], list | tuple):
            _expand(node)
    _drop_dead_sizes(graph)
    _sink_sizes(graph)


def _sink_sizes(graph: fx.Graph) -> None:
    """Moves each size computation in front of its first user: capture hoists them to the top of the graph."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in reversed(list(graph.nodes)):
        if is_shape(node) and node.users:
            first = min(node.users, key=order.__getitem__)
            first.prepend(node)
            order[node] = order[first]


def _drop_dead_sizes(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if (
            node.op == "call_function"
            and not node.users
            and not isinstance(node.meta.get("val"), torch.Tensor)
        ) and isinstance(node.meta.get("val"), int | torch.SymInt):
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _unflatten_to_view(graph: fx.Graph, node: fx.Node) -> fx.Node:
    source, dim, sizes = node.args[:3]
    assert isinstance(source, fx.Node)
    assert isinstance(dim, int)
    assert isinstance(sizes, list | tuple)
    value, out = source.meta.get("val"), node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not isinstance(out, torch.Tensor):
        return node
    dim %= value.dim()
    with graph.inserting_before(node):
        axes = [_size_node(graph, node, source, i) for i in range(value.dim())]
        if len(sizes) == 2 and sizes[0] == 3:
            sizes = [3, -1]  # nn.MultiheadAttention's packed (q, k, v)
        size = [*axes[:dim], *sizes, *axes[dim + 1 :]]
        # unflatten works on any strides, as reshape does; view does not
        fresh = graph.call_function(aten.reshape.default, (source, size))
    fresh.meta = dict(node.meta)
    node.replace_all_uses_with(fresh)
    graph.erase_node(node)
    return fresh


def _emit(graph: fx.Graph, like: fx.Node, target: Any, args: tuple[Any, ...], value: Any) -> fx.Node:
    fresh = graph.call_function(target, args)
    keep = ("nn_module_stack", "bitport_path")
    fresh.meta = {k: like.meta[k] for k in keep if k in like.meta} | {"val": value}
    return fresh


def _size_node(graph: fx.Graph, like: fx.Node, source: fx.Node, axis: int) -> Any:
    size = source.meta["val"].shape[axis]
    if isinstance(size, int) and size == 1:
        return 1
    return _emit(graph, like, aten.sym_size.int, (source, axis), size)


def segments(before: Sequence[Any], after: Sequence[Any]) -> list[tuple[list[int], list[int]]]:
    """Aligns two shapes of equal product: ranges of axes, in order, whose products are equal.

    >>> segments([8, 4, 4], [8, 16])
    [([0], [0]), ([1, 2], [1])]
    """
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        left = [i] if i < len(before) else []
        right = [j] if j < len(after) else []
        i, j = i + len(left), j + len(right)
        while _product(before, left) != _product(after, right):
            if j < len(after) and (_smaller(after, right, before, left) or i >= len(before)):
                right.append(j)
                j += 1
            elif i < len(before):
                left.append(i)
                i += 1
            else:
                break
        found.append((left, right))
    return found


def _product(shape: Sequence[Any], axes: Sequence[int]) -> Any:
    return math.prod((_expr(shape[a]) for a in axes), start=1)


def _expr(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _smaller(a: Sequence[Any], ai: list[int], b: Sequence[Any], bi: list[int]) -> bool:
    """Whether the product of `a` has to grow to reach that of `b` (hints decide where symbols are
    involved)."""
    return math.prod(_hint(a[x]) for x in ai) < math.prod(_hint(b[x]) for x in bi)


def _hint(size: Any) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def _baked(size: Any) -> bool:
    """Whether an output size holds a literal that a structural edit may have to change."""
    if isinstance(size, int):
        return True
    coefficient, _ = size.node.expr.as_coeff_Mul()
    return bool(coefficient != 1)


def _view(graph: fx.Graph, node: fx.Node) -> None:
    arguments: Any = node.args
    source, size = arguments[0], list(arguments[1])
    value, out = source.meta.get("val"), node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not isinstance(out, torch.Tensor) or source.op == "get_attr":
        return
    before, after = list(value.shape), list(out.shape)
    if any(isinstance(s, int) and s == 0 for s in before):
        return
    with graph.inserting_before(node):
        for left, right in segments(before, after):
            _segment(graph, node, source, before, after, left, right, size)
    node.args = (source, size)


def _segment(
    graph: fx.Graph,
    node: fx.Node,
    source: fx.Node,
    before: list[Any],
    after: list[Any],
    left: list[int],
    right: list[int],
    size: list[Any],
) -> None:
    real = [a for a in left if not (isinstance(before[a], int) and before[a] == 1)]
    wide = [a for a in right if not (isinstance(after[a], int) and after[a] == 1)]
    if not real or not wide or _product(before, left) != _product(after, right):
        return
    if any(isinstance(size[a], int) and size[a] == -1 for a in wide):
        if len(real) == 1 and len(wide) == 1:
            size[wide[0]] = _size_node(graph, node, source, real[0])
        return
    derivable = [a for a in wide if _baked(after[a])]
    if not derivable:
        if len(real) == 1 and len(wide) == 1:
            size[wide[0]] = _size_node(graph, node, source, real[0])
        return
    target = derivable[0]
    if len(wide) > 2 and target == wide[0] and after[target] in (2, 3) and len(derivable) > 1:
        target = derivable[1]  # packed (q, k, v) or (k, v): their number stays, the heads follow
    total = _size_node(graph, node, source, real[0])
    value = before[real[0]]
    for axis in real[1:]:
        value = value * before[axis]
        total = _emit(graph, node, operator.mul, (total, _size_node(graph, node, source, axis)), value)
    rest: Any = 1
    for axis in wide:
        if axis != target:
            part = size[axis]
            both = isinstance(rest, int) and isinstance(part, int)
            if both or (isinstance(rest, int) and rest == 1):
                rest = rest * part if both else part
            else:
                rest = _emit(graph, node, operator.mul, (rest, part), None)
    if not (isinstance(rest, int) and rest == 1):
        total = _emit(graph, node, operator.floordiv, (total, rest), after[target])
    size[target] = total


def _expand(node: fx.Node) -> None:
    arguments: Any = node.args
    source, size = arguments[0], list(arguments[1])
    value = source.meta.get("val")
    out = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not isinstance(out, torch.Tensor):
        return
    offset = len(size) - value.dim()
    for axis, length in enumerate(value.shape):
        kept = out.shape[axis + offset]
        if _expr(length) == _expr(kept) and not (isinstance(length, int) and length == 1):
            size[axis + offset] = -1
    node.args = (source, size, *node.args[2:])
