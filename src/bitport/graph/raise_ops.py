"""Raising: aten calls that own parameters, or that depend on train / eval mode, become modules of a closed
set.

Each raised module sits at its weight's original owner path, so that `state_dict()` reads as the user's. A
call whose
weight is computed, packed or owned by a module with children stays functional: still with correct gradients.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from bitport.graph import names
from bitport.graph.aten_table import spread
from bitport.graph.match import Call, op_name
from bitport.graph.module_table import Attention, BatchNormCall, RaisedGRU, RaisedLSTM, RaisedRNN


@dataclass(frozen=True)
class Held:
    """One tensor of the user's model: a parameter or a buffer (persistent: in the state dict)."""

    name: str
    tensor: Tensor | None
    parameter: bool
    persistent: bool = True


def held_by(model: nn.Module) -> list[Held]:
    """All parameters and buffers of `model`, ties under every name, in the order of its modules."""
    found: list[Held] = []
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        found += [Held(prefix + n, p, True) for n, p in module._parameters.items()]
        hidden = module._non_persistent_buffers_set
        found += [Held(prefix + n, b, False, n not in hidden) for n, b in module._buffers.items()]
    return found


class RaisedModule(fx.GraphModule):
    """The raised graph as a module. Unlike a plain GraphModule it keeps tensors that the graph doesn't use,
    and buffers stay non-persistent when copied."""

    def __init__(self, root: nn.Module, graph: fx.Graph, class_name: str = "RaisedModule") -> None:
        super().__init__(root, graph, class_name)
        for kind in ("_parameters", "_buffers", "_modules"):
            getattr(self, kind).clear()
            getattr(self, kind).update(getattr(root, kind))
        self._non_persistent_buffers_set = set(root._non_persistent_buffers_set)

    def __deepcopy__(self, memo: dict[int, Any]) -> RaisedModule:
        with warnings.catch_warnings():  # torch copies tree specs through a deprecated path of its own
            warnings.simplefilter("ignore", FutureWarning)
            copied = super().__deepcopy__(memo)
        copied._non_persistent_buffers_set = set(self._non_persistent_buffers_set)
        assert isinstance(copied, RaisedModule)
        return copied


def skeleton(held: Iterable[Held]) -> nn.Module:
    """A tree of bare modules that holds every tensor under its name."""
    root = nn.Module()
    for item in held:
        *path, leaf = item.name.split(".")
        owner = child_at(root, ".".join(path))
        if item.parameter:
            tensor = item.tensor
            if tensor is not None and not isinstance(tensor, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=tensor.requires_grad)
            owner._parameters[leaf] = tensor
        else:
            owner.register_buffer(leaf, item.tensor, persistent=item.persistent)
    return root


def child_at(root: nn.Module, path: str) -> nn.Module:
    """The module at `path`, made of bare modules where it doesn't exist yet."""
    module = root
    for part in path.split(".") if path else ():
        if part not in module._modules or module._modules[part] is None:
            module._modules[part] = nn.Module()
        module = module._modules[part]  # type: ignore[assignment]
    return module


class Plan:
    """What a call would become: class, constructor arguments, {attribute: aten argument}, activation
    arguments."""

    def __init__(
        self,
        cls: type[nn.Module],
        kwargs: dict[str, Any],
        tensors: dict[str, fx.Node | None],
        args: tuple[Any, ...],
    ) -> None:
        self.cls, self.kwargs, self.tensors, self.args = cls, kwargs, tensors, args

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.cls, repr(sorted(self.kwargs.items(), key=str)))


def _shape(call: Call, name: str) -> tuple[int, ...]:
    value = call.value(name)
    return tuple(int(s) for s in value.shape) if isinstance(value, Tensor) else ()


def _spread(value: Any, ndim: int) -> Any:
    return value if isinstance(value, str) else spread(value, ndim)


def _conv(call: Call, original: nn.Module | None) -> Plan | None:
    shape = _shape(call, "weight")
    if len(shape) not in (3, 4, 5):
        return None
    ndim, groups = len(shape) - 2, call["groups"]
    transposed = bool(call["transposed"]) or op_name(call.node).startswith("conv_transpose")
    kwargs: dict[str, Any] = {"kernel_size": shape[2:], "groups": groups, "bias": call["bias"] is not None}
    kwargs |= {k: _spread(call[k], ndim) for k in ("stride", "padding", "dilation")}
    if transposed:
        kwargs |= {"in_channels": shape[0], "out_channels": shape[1] * groups}
        kwargs["output_padding"] = _spread(call["output_padding"], ndim)
        cls: type[nn.Module] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[ndim - 1]
    else:
        kwargs |= {"in_channels": shape[1] * groups, "out_channels": shape[0]}
        cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[ndim - 1]
    return Plan(cls, kwargs, {"weight": call["weight"], "bias": call["bias"]}, (call["input"],))


def _linear(call: Call, original: nn.Module | None) -> Plan | None:
    shape = _shape(call, "weight")
    if len(shape) != 2:
        return None
    kwargs = {"in_features": shape[1], "out_features": shape[0], "bias": call["bias"] is not None}
    return Plan(nn.Linear, kwargs, {"weight": call["weight"], "bias": call["bias"]}, (call["input"],))


def _norm_tensors(call: Call) -> dict[str, fx.Node | None]:
    return {k: call[k] for k in ("weight", "bias", "running_mean", "running_var")}


def _batch_norm(call: Call, original: nn.Module | None) -> Plan | None:
    tensors, value = _norm_tensors(call), call.value("input")
    tracked = tensors["running_mean"] is not None
    if (
        (tracked and call["training"])
        or value is None
        or (tensors["weight"] is None) != (tensors["bias"] is None)
    ):
        return None
    count = next((_shape(call, k)[0] for k, v in tensors.items() if v is not None), int(value.shape[1]))
    momentum = call["momentum"]
    if isinstance(original, nn.modules.batchnorm._NormBase):
        momentum = original.momentum
    elif momentum == 0.0 and tracked:
        momentum = None  # how torch.export writes a cumulative average
    cls = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[value.dim()]
    kwargs = {
        "num_features": count,
        "eps": call["eps"],
        "momentum": momentum,
        "affine": tensors["weight"] is not None,
    }
    return Plan(cls, kwargs | {"track_running_stats": tracked}, tensors, (call["input"],))


def _instance_norm(call: Call, original: nn.Module | None) -> Plan | None:
    tensors, value = _norm_tensors(call), call.value("input")
    tracked = tensors["running_mean"] is not None
    if (
        value is None
        or value.dim() not in (3, 4, 5)
        or (tensors["weight"] is None) != (tensors["bias"] is None)
    ):
        return None
    if bool(call["use_input_stats"]) == tracked:
        return None
    momentum = getattr(original, "momentum", call["momentum"])
    cls = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[value.dim() - 3]
    count = next((_shape(call, k)[0] for k, v in tensors.items() if v is not None), int(value.shape[1]))
    kwargs = {
        "num_features": count,
        "eps": call["eps"],
        "momentum": momentum,
        "affine": tensors["weight"] is not None,
    }
    return Plan(cls, kwargs | {"track_running_stats": tracked}, tensors, (call["input"],))


def _layer_norm(call: Call, original: nn.Module | None) -> Plan | None:
    shape = call["normalized_shape"]
    if call["weight"] is None or any(not isinstance(s, int) for s in shape):
        return None
    kwargs = {"normalized_shape": tuple(shape), "eps": call["eps"], "bias": call["bias"] is not None}
    return Plan(nn.LayerNorm, kwargs, {"weight": call["weight"], "bias": call["bias"]}, (call["input"],))


def _rms_norm(call: Call, original: nn.Module | None) -> Plan | None:
    shape = call["normalized_shape"]
    if call["weight"] is None or any(not isinstance(s, int) for s in shape):
        return None
    kwargs = {"normalized_shape": tuple(shape), "eps": call["eps"]}
    return Plan(nn.RMSNorm, kwargs, {"weight": call["weight"]}, (call["input"],))


def _group_norm(call: Call, original: nn.Module | None) -> Plan | None:
    if call["weight"] is None or call["bias"] is None:
        return None
    kwargs = {"num_groups": call["num_groups"], "num_channels": _shape(call, "weight")[0], "eps": call["eps"]}
    return Plan(nn.GroupNorm, kwargs, {"weight": call["weight"], "bias": call["bias"]}, (call["input"],))


def _embedding(call: Call, original: nn.Module | None) -> Plan | None:
    rows, width = _shape(call, "weight")
    padding = call["padding_idx"]
    kwargs = {
        "num_embeddings": rows,
        "embedding_dim": width,
        "padding_idx": None if padding == -1 else padding,
    }
    kwargs |= {"scale_grad_by_freq": call["scale_grad_by_freq"], "sparse": call["sparse"]}
    return Plan(nn.Embedding, kwargs, {"weight": call["weight"]}, (call["indices"],))


def _rnn(cls: type[nn.RNNBase], gates: int, **more: Any) -> Callable[[Call, nn.Module | None], Plan | None]:
    def plan(call: Call, original: nn.Module | None) -> Plan | None:
        params = call["params"]
        if params is None or call["input"] is None or call["batch_sizes"] is not None:
            return None  # packed sequences stay functional
        layers = call["num_layers"] * (2 if call["bidirectional"] else 1)
        each = len(params) // layers
        shapes = [tuple(int(s) for s in p.meta["val"].shape) for p in params]
        proj = shapes[each - 1][0] if each in (3, 5) else 0
        kwargs = {
            "input_size": shapes[0][1],
            "hidden_size": shapes[0][0] // gates,
            "num_layers": call["num_layers"],
        }
        kwargs |= {"bias": call["has_biases"], "batch_first": call["batch_first"], "dropout": call["dropout"]}
        kwargs |= dict(bidirectional=call["bidirectional"], **more)
        if proj:
            kwargs["proj_size"] = proj
        probe = cls(**kwargs, device="meta")
        tensors = dict(zip([n for group in probe._all_weights for n in group], params, strict=True))
        states = list(call["hx"]) if isinstance(call["hx"], list | tuple) else [call["hx"]]
        if all(isinstance(s, fx.Node) and op_name(s) == "zeros" for s in states):
            states = []  # what the module assumes by itself
        return Plan(cls, kwargs, tensors, (call["input"], *states))

    return plan


PLANS: Mapping[str, Callable[[Call, nn.Module | None], Plan | None]] = {
    **dict.fromkeys(
        ["conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d"], _conv
    ),
    "conv_transpose3d": _conv,
    "linear": _linear,
    "batch_norm": _batch_norm,
    "instance_norm": _instance_norm,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "embedding": _embedding,
    "lstm": _rnn(RaisedLSTM, 4),
    "gru": _rnn(RaisedGRU, 3),
    "rnn_tanh": _rnn(RaisedRNN, 1, nonlinearity="tanh"),
    "rnn_relu": _rnn(RaisedRNN, 1, nonlinearity="relu"),
}


class Raiser:
    """Turns calls of `graph` into calls of modules placed in `root` (see the module's docstring)."""

    def __init__(self, graph: fx.Graph, root: nn.Module, originals: Mapping[str, nn.Module]) -> None:
        self.graph, self.root, self.originals = graph, root, originals
        self.raised: dict[str, tuple[Any, ...]] = {}
        self.spellings: dict[int, list[str]] = {}
        for path, module in root.named_modules(remove_duplicate=False):
            prefix = f"{path}." if path else ""
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    self.spellings.setdefault(id(tensor), []).append(prefix + name)
        self.notes: list[str] = []

    def run(self) -> None:
        nodes = [n for n in self.graph.nodes if n.op == "call_function"]
        # calls made inside the owner claim it first: a tied matrix is an Embedding at home, functional
        # elsewhere
        for at_home in (True, False):
            for node in nodes:
                if op_name(node) in PLANS and not node._erased:
                    self._raise(node, at_home)
        for node in nodes:
            if not node._erased:
                self._modes(node)

    def _names(self, node: fx.Node | None) -> list[str]:
        if node is None or node.op != "get_attr":
            return []
        *path, leaf = str(node.target).split(".")
        owner = child_at(self.root, ".".join(path))
        tensor = owner._parameters.get(leaf, owner._buffers.get(leaf))
        return self.spellings.get(id(tensor), []) if tensor is not None else []

    def _raise(self, node: fx.Node, at_home: bool) -> None:
        home = names.site(node).path
        call = Call(node)
        plan = PLANS[op_name(node)](call, self.originals.get(home))
        if plan is None:
            return
        owners = self._owners(plan.tensors, home)
        for owner in owners:
            if (owner == home) == at_home and self._fits(owner, plan):
                if owner not in self.raised:
                    self._place(owner, plan)
                self._replace(node, owner, plan.args)
                return

    def _owners(self, tensors: dict[str, fx.Node | None], home: str) -> list[str]:
        """Paths that own every given tensor under the expected attribute names, the calling module first."""
        given = {attr: node for attr, node in tensors.items() if node is not None}
        if not given:
            return [home] if home and not any(child_at(self.root, home).children()) else []
        candidates: set[str] | None = None
        for attr, node in given.items():
            found = {n[: -len(attr) - 1] for n in self._names(node) if n.endswith(f".{attr}")}
            candidates = found if candidates is None else candidates & found
        return sorted(candidates or (), key=lambda path: (path != home, path))

    def _fits(self, owner: str, plan: Plan) -> bool:
        if owner in self.raised:
            return self.raised[owner] == plan.key
        module = child_at(self.root, owner)
        if any(True for _ in module.children()):
            return False
        held = {n for n, t in (*module._parameters.items(), *module._buffers.items()) if t is not None}
        unused = {attr for attr, node in plan.tensors.items() if node is None}
        return not held & unused

    def _place(self, owner: str, plan: Plan) -> None:
        old = child_at(self.root, owner)
        new = plan.cls(**plan.kwargs, device="meta")
        for name in [*new._parameters]:
            setattr(new, name, old._parameters.get(name))
        for name in [*new._buffers]:
            new._buffers[name] = old._buffers.get(name)
        new._non_persistent_buffers_set = {n for n in old._non_persistent_buffers_set if n in new._buffers}
        for name, parameter in old._parameters.items():
            if name not in new._parameters:
                new._parameters[name] = parameter
        for name, buffer in old._buffers.items():
            if name not in new._buffers:
                new.register_buffer(name, buffer, persistent=name not in old._non_persistent_buffers_set)
        self.put(owner, new)
        self.raised[owner] = plan.key

    def put(self, path: str, module: nn.Module) -> None:
        *parents, leaf = path.split(".")
        child_at(self.root, ".".join(parents))._modules[leaf] = module

    def _replace(self, node: fx.Node, path: str, args: tuple[Any, ...]) -> None:
        with self.graph.inserting_before(node):
            fresh = self.graph.create_node("call_module", path, args)
        fresh.meta = dict(node.meta)
        node.replace_all_uses_with(fresh)
        self.graph.erase_node(node)

    def _modes(self, node: fx.Node) -> None:
        """Calls without a module of their own that still behave differently in train mode."""
        name, call = op_name(node), Call(node)
        where = names.site(node)
        if name in _DROPOUTS:
            self._dropout(node, call, where)
        elif name == "batch_norm" and not (call["training"] and call["running_mean"] is not None):
            module = BatchNormCall(call["momentum"], call["eps"])
            slots = ("input", "weight", "bias", "running_mean", "running_var")
            self._replace(
                node, self._new_path(where.path, "batch_norm", module), tuple(call[s] for s in slots)
            )
        elif name == "scaled_dot_product_attention":
            original = self.originals.get(where.path)
            p = float(original.dropout) if isinstance(original, nn.MultiheadAttention) else 0.0
            if call["dropout_p"] == 0.0 and p > 0.0:
                attention = Attention(p, call["is_causal"], call["scale"], call["enable_gqa"])
                operands = (call[s] for s in ("query", "key", "value", "attn_mask"))
                args = tuple(o for o in operands if o is not None)
                self._replace(node, self._new_path(where.path, "attention", attention), args)

    def _dropout(self, node: fx.Node, call: Call, where: names.Site) -> None:
        if call["train"]:
            self.notes.append(
                f"{names.base_name(node)} drops values in eval mode as well: outputs are random"
            )
            return
        rank = call.rank("input") or 0
        cls = _DROPOUTS[op_name(node)]
        if op_name(node) == "feature_dropout":
            cls = {3: nn.Dropout1d, 5: nn.Dropout3d}.get(rank, nn.Dropout2d)
        module = cls(call["p"])
        if names.is_leaf(where.type) and where.path not in self.raised and where.path:
            path = where.path
            if not isinstance(child_at(self.root, path), cls):
                self.put(path, module)
        else:
            path = self._new_path(where.path, "dropout", module)
        self._replace(node, path, (call["input"],))

    def _new_path(self, parent: str, leaf: str, module: nn.Module) -> str:
        """Places `module` under `parent` at a free name."""
        owner = child_at(self.root, parent)
        name, count = leaf, 1
        while hasattr(owner, name) or f"{parent}.{name}".lstrip(".") in self.originals:
            count += 1
            name = f"{leaf}_{count}"
        path = f"{parent}.{name}" if parent else name
        self.put(path, module)
        return path


_DROPOUTS: dict[str, type[nn.Module]] = {
    "dropout": nn.Dropout,
    "feature_dropout": nn.Dropout2d,
    "alpha_dropout": nn.AlphaDropout,
    "feature_alpha_dropout": nn.FeatureAlphaDropout,
}


def raise_graph(
    gm: fx.GraphModule, held: list[Held], originals: Mapping[str, nn.Module]
) -> tuple[RaisedModule, list[str]]:
    """Raises a functional captured graph.

    Args:
        gm: the unlifted program: parameters are get_attr nodes, no in-place operators.
        held: the user's tensors, ties under every name.
        originals: the user's modules by path (their momentum, dropout rate … are kept), may be empty.
    """
    known = {item.name for item in held}
    lifted = {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"} - known
    constants = []
    for name in sorted(lifted):
        value: Any = gm
        for part in name.split("."):
            value = getattr(value, part)
        if isinstance(value, Tensor):
            constants.append(Held(name, value.detach(), False, persistent=False))
    root = skeleton([*held, *constants])
    gm.graph.owning_module = None  # the targets change owner from here on
    raiser = Raiser(gm.graph, root, originals)
    raiser.run()
    raised = RaisedModule(root, gm.graph)
    raised.eval()
    raised.graph.eliminate_dead_code()
    raised.recompile()
    return raised, raiser.notes
