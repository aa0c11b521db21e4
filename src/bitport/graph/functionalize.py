"""Clean-up passes on a captured fx graph: no region operators, no assertions, no in-place operators.

In-place operators are rewritten by our own alias analysis instead of `run_decompositions({})`, which would
turn
dropout into a clone and batch normalisation into an operator that can't train. A view that was written
through is
replayed backwards (`slice_scatter`, `select_scatter`, inverse permutation …) onto its base. An alias that
can't be
proven safe is refused.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import fx

from bitport.errors import GraphError
from bitport.graph.match import op_name

aten = torch.ops.aten

_ASSERTIONS = frozenset(
    [
        "_assert_tensor_metadata",
        "_assert_scalar",
        "_assert_async",
        "sym_constrain_range",
        "sym_constrain_range_for_size",
    ]
)
# views whose effect can be replayed backwards
_VIEWS = frozenset(
    ["slice", "select", "transpose", "t", "permute", "unsqueeze", "squeeze", "view", "alias", "diagonal"]
)
# may return a view, depending on strides or mode: an alias to be afraid of, never one to rely on
_MAYBE_VIEWS = frozenset(
    [
        "reshape",
        "flatten",
        "unflatten",
        "contiguous",
        "to",
        "expand",
        "expand_as",
        "view_as",
        "reshape_as",
        "narrow",
        "movedim",
        "swapaxes",
        "unfold",
        "as_strided",
        "detach",
        "dropout",
        "feature_dropout",
        "alpha_dropout",
        "type_as",
        "squeeze",
        "lift_fresh",
        "chunk",
        "split",
        "split_with_sizes",
        "unbind",
        "tensor_split",
        "real",
        "imag",
        "mT",
        "numpy_T",
    ]
)


def inline_regions(gm: fx.GraphModule) -> None:
    """Inlines `with torch.no_grad()` regions; their results are detached, so gradients stay the user's."""
    graph = gm.graph
    for node in list(graph.nodes):
        name = op_name(node) if node.op == "call_function" else ""
        if name not in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
            continue
        if name == "wrap_with_autocast":
            raise GraphError(
                f"{node.name}: torch.autocast inside forward can't be kept; remove it and load again"
            )
        enabled, region_node, *inputs = node.args
        assert isinstance(region_node, fx.Node)
        region = gm.get_submodule(str(region_node.target))
        assert isinstance(region, fx.GraphModule)
        inline_regions(region)
        _inline(graph, node, region, inputs, detach=not enabled)
    graph.eliminate_dead_code()


def _inline(graph: fx.Graph, node: fx.Node, region: fx.GraphModule, inputs: list[Any], detach: bool) -> None:
    env: dict[fx.Node, Any] = dict(zip(region.graph.find_nodes(op="placeholder"), inputs, strict=True))
    with graph.inserting_before(node):
        for inner in region.graph.nodes:
            if inner.op in ("placeholder", "output"):
                continue
            if inner.op == "get_attr":
                raise GraphError(f"{node.name}: a no_grad region that owns tensors can't be inlined")
            env[inner] = graph.node_copy(inner, lambda n: env[n])
        outputs: Any = region.graph.output_node().args[0]
        results = [env[r] if isinstance(r, fx.Node) else r for r in outputs]
        if detach:
            for i, result in enumerate(results):
                if isinstance(result, fx.Node) and isinstance(result.meta.get("val"), torch.Tensor):
                    results[i] = graph.call_function(aten.detach.default, (result,))
                    results[i].meta = dict(result.meta)
    for user in list(node.users):
        if user.target is operator.getitem:
            user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
            graph.erase_node(user)
    graph.erase_node(node)


def drop_assertions(graph: fx.Graph) -> None:
    """Removes shape and metadata assertions: they hold by construction and bar structural edits."""
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and op_name(node) in _ASSERTIONS and not node.users:
            graph.erase_node(node)
    graph.eliminate_dead_code()


class _View(NamedTuple):
    base: fx.Node
    node: fx.Node


def is_inplace(node: fx.Node) -> bool:
    """Whether a call_function node writes to one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and bool(schema.is_mutable)


def functionalize(graph: fx.Graph) -> list[str]:
    """Rewrites the in-place operators of `graph` into functional ones; returns notes for the user.

    Raises:
        GraphError: a write to a parameter or buffer, or through an alias that can't be proven safe.
    """
    return _Functionalizer(graph).run()


class _Functionalizer:
    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.current: dict[fx.Node, fx.Node] = {}  # node -> the node that holds its value now
        self.base: dict[fx.Node, _View] = {}  # view -> what it looks at
        self.maybe: dict[fx.Node, fx.Node] = {}  # node -> what it may look at
        self.stale: set[fx.Node] = set()
        self.origins: dict[fx.Node, fx.Node] = {}  # a later version of a value -> the node that first held it
        self.notes: list[str] = []

    def run(self) -> list[str]:
        replaced: list[fx.Node] = []
        for node in list(self.graph.nodes):
            if node.op in ("call_function", "call_module", "output"):
                with self.graph.inserting_before(node):
                    node.args = fx.node.map_arg(node.args, self._now)
                    node.kwargs = fx.node.map_arg(node.kwargs, self._now)
            if node.op != "call_function":
                continue
            if is_inplace(node):
                self._rewrite(node)
                replaced.append(node)
            else:
                self._remember(node)
        for node in reversed(replaced):
            self.graph.erase_node(node)
        self.graph.eliminate_dead_code()
        return self.notes

    def _now(self, node: fx.Node) -> fx.Node:
        """The up-to-date value of `node`; a view of something written to since is taken again."""
        node = self._origin(node)
        if node in self.stale:
            view = self.base[node]
            base = self._now(view.base)
            fresh = self._emit(node, node.target, (base, *node.args[1:]), dict(node.kwargs))
            self._set(node, fresh)
        return self.current.get(node, node)

    def _origin(self, node: fx.Node) -> fx.Node:
        while node in self.origins:
            node = self.origins[node]
        return node

    def _remember(self, node: fx.Node) -> None:
        name = op_name(node)
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            return
        source = self._origin(source)
        if name in _VIEWS and not (name == "squeeze" and len(node.args) < 2):
            self.base[node] = _View(source, node)
        elif name in _MAYBE_VIEWS or (node.target is operator.getitem and source in self.maybe):
            self.maybe[node] = source

    def _root(self, node: fx.Node) -> fx.Node:
        while node in self.base:
            node = self.base[node].base
        return node

    def _family(self, node: fx.Node) -> set[fx.Node]:
        """Every value that may share memory with `node`, over certain and uncertain views."""
        links: dict[fx.Node, set[fx.Node]] = {}
        pairs = [(v, b.base) for v, b in self.base.items()] + list(self.maybe.items())
        for a, b in pairs:
            links.setdefault(a, set()).add(b)
            links.setdefault(b, set()).add(a)
        seen, todo = {node}, [node]
        while todo:
            for other in links.get(todo.pop(), ()):
                if other not in seen:
                    seen.add(other)
                    todo.append(other)
        return seen

    def _certain(self, root: fx.Node) -> set[fx.Node]:
        return {n for n in (*self.base, root) if self._root(n) is root}

    def _used_later(self, origin: fx.Node, after: fx.Node) -> bool:
        versions = [origin, *(n for n in self.origins if self._origin(n) is origin)]
        return any(self.order.get(user, -1) > self.order[after] for v in versions for user in v.users)

    def _rewrite(self, node: fx.Node) -> None:
        written = node.args[0]
        info = node.target._schema.arguments[0].alias_info  # type: ignore[union-attr]
        if not isinstance(written, fx.Node) or info is None or not info.is_write:
            raise GraphError(
                f"{node.name}: {node.target} writes to several tensors at once; use the functional form"
            )
        written = self._origin(written)
        root = self._root(written)
        certain = self._certain(root)
        for other in self._family(written) - certain:
            if other.op in ("placeholder", "get_attr") or self._used_later(other, node):
                raise GraphError(
                    f"{node.name}: {op_name(node)}_ writes to memory that {other.name} may share and that is "
                    f"used afterwards; write the out-of-place form in the model"
                )
        if root.op == "get_attr":
            raise GraphError(
                f"{node.name}: {op_name(node)}_ writes to {root.target!r} in forward; a graph keeps no "
                f"state, so compute the value instead of storing it"
            )
        if root.op == "placeholder":
            self.notes.append(f"input {root.name!r} is written to in forward; the graph works on a copy")
        fresh = self._functional(node)
        done = set(self._chain(written))
        self._set(written, fresh)
        self.origins[node] = written
        value = fresh
        while written in self.base:  # carry the write back to what the view looks at
            view = self.base[written]
            value = self._write_back(node, view, value)
            written = view.base
            self._set(written, value)
        self.stale |= certain - done

    def _chain(self, node: fx.Node) -> list[fx.Node]:
        chain = [node]
        while node in self.base:
            node = self.base[node].base
            chain.append(node)
        return chain

    def _set(self, origin: fx.Node, value: fx.Node) -> None:
        self.current[origin] = value
        if value is not origin and value not in self.origins:
            self.origins[value] = origin
        self.stale.discard(origin)

    def _functional(self, node: fx.Node) -> fx.Node:
        """The out-of-place twin of an in-place node, placed before it."""
        name = op_name(node)
        target: fx.Node = node.args[0]  # type: ignore[assignment]
        before: Any = target.meta.get("val")
        with self.graph.inserting_before(node):
            if name == "copy":
                return self._copy(node, target, node.args[1])
            if name in ("fill", "zero"):
                value = node.args[1] if name == "fill" else 0
                if isinstance(value, fx.Node):
                    return self._copy(node, target, value)
                return self._emit(node, aten.full_like.default, (target, value))
            packet = getattr(aten, name, None)
            overload = getattr(packet, getattr(node.target, "_overloadname", "default"), None)
            if overload is None or overload._schema.is_mutable:
                raise GraphError(f"{node.name}: {node.target} has no out-of-place form")
            fresh = self._emit(node, overload, node.args, dict(node.kwargs))
            others = [a.meta.get("val") for a in node.all_input_nodes[1:]]
            whole = isinstance(before, torch.Tensor) and not before.is_floating_point()
            if whole and any(isinstance(o, torch.Tensor) and o.dtype != before.dtype for o in others):
                fresh = self._emit(node, aten.to.dtype, (fresh, before.dtype))
            return fresh

    def _copy(self, node: fx.Node, target: fx.Node, source: Any) -> fx.Node:
        before: Any = target.meta.get("val")
        value: Any = source.meta.get("val") if isinstance(source, fx.Node) else None
        if value is None:
            return self._emit(node, aten.full_like.default, (target, source))
        if before.dtype != value.dtype:
            source = self._emit(node, aten.to.dtype, (source, before.dtype))
        if tuple(before.shape) != tuple(value.shape):
            return self._emit(node, aten.expand_as.default, (source, target))
        return self._emit(node, aten.alias.default, (source,))

    def _emit(self, like: fx.Node, target: Any, args: Any, kwargs: dict[str, Any] | None = None) -> fx.Node:
        fresh = self.graph.call_function(target, args, kwargs or {})
        fresh.meta = dict(like.meta)
        self.order[fresh] = self.order[like]
        return fresh

    def _write_back(self, node: fx.Node, view: _View, value: fx.Node) -> fx.Node:
        """What `view.base` holds after `value` was written through the view."""
        base = self.current.get(view.base, view.base)
        name = op_name(view.node)
        rest: list[Any] = list(view.node.args[1:])
        shape = view.base.meta["val"]
        with self.graph.inserting_before(node):
            if name in ("slice", "select", "diagonal"):
                overload = getattr(aten, f"{name}_scatter").default
                fresh = self._emit(node, overload, (base, value, *rest), dict(view.node.kwargs))
            elif name in ("transpose", "t"):
                a, b = rest if name == "transpose" else (0, 1)
                fresh = self._emit(node, aten.transpose.int, (value, a, b))
            elif name == "permute":
                dims = [d % shape.dim() for d in rest[0]]
                fresh = self._emit(
                    node, aten.permute.default, (value, [dims.index(i) for i in range(len(dims))])
                )
            elif name == "unsqueeze":
                fresh = self._emit(node, aten.squeeze.dim, (value, rest[0]))
            elif name == "alias":
                fresh = value
            else:
                fresh = self._emit(node, aten.view_as.default, (value, base))
        if fresh is not value:
            fresh.meta["val"] = shape
        return fresh
