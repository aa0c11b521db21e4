"""What a graph promises: values, gradients, buffers, names, blocks, edges, round trips."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.nets import NETS, build
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bitport.errors import GraphError
from bitport.frontends.pytorch import load_module
from bitport.graph import Graph
from bitport.graph.archive import load_pt2, save_pt2

_CACHE: dict[str, tuple[nn.Module, Graph]] = {}


def loaded(name: str) -> tuple[nn.Module, Graph]:
    """The net and its graph, captured once from a batch-1 example."""
    if name not in _CACHE:
        torch.manual_seed(0)
        model, example = build(name, batch=1)
        _CACHE[name] = model, load_module(model, example)
    return _CACHE[name]


def inputs(name: str, batch: int) -> Any:
    torch.manual_seed(batch)
    return NETS[name](batch)[1]


def call(model: nn.Module, example: Any) -> Any:
    return model(**example) if isinstance(example, dict) else model(example)


def tensors(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def close(ours: Tensor, theirs: Tensor, scale: float) -> bool:
    return float((ours - theirs).detach().abs().max()) <= scale * max(1.0, float(theirs.detach().abs().max()))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("batch", [1, 7])
def test_values_and_structure(name: str, batch: int) -> None:
    model, graph = loaded(name)
    example = inputs(name, batch)
    with torch.no_grad():
        want, got = call(model, example), call(graph.module(), example)
        flat = graph.run(*graph.flat_args(example))
    assert pytree.tree_structure(want) == pytree.tree_structure(got)
    assert all(close(a, b, 1e-5) for a, b in zip(tensors(got), tensors(want), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(flat, tensors(got), strict=True))
    assert len(graph.outputs) == len(flat)
    assert not graph.notes
    for spec, value in zip(graph.outputs, flat, strict=True):
        assert spec.dtype == value.dtype
        assert tuple(batch if s == "batch" else s for s in spec.shape) == tuple(value.shape)


@pytest.mark.parametrize("name", NETS)
def test_train_step_equals_eager(name: str) -> None:
    model, graph = loaded(name)
    example = inputs(name, 3)
    eager, ours = copy.deepcopy(model).train(), graph.module().train()
    for net in (eager, ours):
        torch.stack([t.square().mean() for t in tensors(call(net, example))]).sum().backward()
    want, got = dict(eager.named_parameters()), dict(ours.named_parameters())
    assert set(want) == set(got)
    for key, parameter in want.items():
        if parameter.grad is not None:
            grad = got[key].grad
            assert grad is not None, key
            assert close(grad, parameter.grad, 1e-4), key
    state = ours.state_dict()
    for key, value in eager.state_dict().items():
        assert close(state[key].float(), value.float(), 1e-4), key


@pytest.mark.parametrize("name", NETS)
def test_state_dict_and_ties(name: str) -> None:
    model, graph = loaded(name)
    want = model.state_dict(keep_vars=True)
    got = graph.gm.state_dict(keep_vars=True)
    assert set(want) == set(got)
    ties = lambda state: {(a, b) for a in state for b in state if state[a] is state[b]}  # noqa: E731
    assert ties(want) == ties(got)
    assert {k: v.requires_grad for k, v in want.items()} == {k: v.requires_grad for k, v in got.items()}
    assert dict(model.named_buffers()).keys() <= dict(graph.gm.named_buffers()).keys()
    copied = copy.deepcopy(graph.module())
    assert set(copied.state_dict()) == set(want)
    assert not any(a.data_ptr() == b.data_ptr() for a, b in zip(want.values(), got.values(), strict=False))


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_round_trips_keep_names_and_operators(name: str, tmp_path: Any) -> None:
    model, graph = loaded(name)
    described = sorted((graph.name(n), graph.op(n).kind, graph.shape(n) or ()) for n in graph.nodes())
    save_pt2(graph, tmp_path / "a.pt2")
    example = inputs(name, 5)
    for again in (load_pt2(tmp_path / "a.pt2"), load_module(graph.module(), example), graph.clone()):
        assert (
            sorted((again.name(n), again.op(n).kind, again.shape(n) or ()) for n in again.nodes())
            == described
        )
        assert again.inputs == graph.inputs
        assert again.outputs == graph.outputs
        assert again.edges() == graph.edges()
        assert set(again.gm.state_dict()) == set(model.state_dict())
        flat = again.flat_args(example)
        with torch.no_grad():
            assert all(close(a, b, 1e-6) for a, b in zip(again.run(*flat), graph.run(*flat), strict=True))
    assert graph.clone().digest() == graph.digest()
    text = (tmp_path / "a.pt2").read_bytes()
    assert b"site-packages" not in text
    assert str(tmp_path).encode() not in text
    assert __file__.encode() not in text


@pytest.mark.parametrize("name", NETS)
def test_blocks_chain_to_the_whole(name: str) -> None:
    _, graph = loaded(name)
    flat = graph.flat_args(inputs(name, 2))
    values: dict[str, Any] = dict(zip([i.name for i in graph.inputs], flat, strict=True))
    with torch.no_grad():
        for block in graph.blocks():
            made = block.graph_module(*[values[i] for i in block.inputs])
            values.update(zip(block.outputs, made, strict=True))
        whole = graph.run(*flat)
    assert all(
        torch.equal(values[graph.name(n)], v) for n, v in zip(graph.output_nodes(), whole, strict=True)
    )
    names = [b.name for b in graph.blocks()]
    assert len(names) == len(set(names))


def test_names_kinds_and_edges_of_a_residual_net() -> None:
    _, graph = loaded("resnet")
    names = [graph.name(n) for n in graph.nodes()]
    for name in ("layer1.0.conv1", "layer1.0.relu", "layer1.0.relu#2", "layer1.0.add", "layer1.1.add", "fc"):
        assert name in names
    assert [b.name for b in graph.blocks()] == ["stem", "layer1.0", "layer1.1", "pool", "fc"]
    edges = set(graph.edges())
    assert ("layer1.0.conv1.weight", "layer1.0.conv1", 1) in edges
    assert ("layer1.0.bn2", "layer1.0.add", 0) in edges
    assert ("fc", "output", 0) in edges
    conv = graph.op(graph.node("layer1.0.conv1"))
    assert conv.kind == "conv"
    assert conv.operands[2] is None
    assert conv.attrs["padding"] == (1, 1)
    assert graph.shape(graph.node("layer1.0.add")) == ("batch", 8, 8, 8)
    assert graph.gm.get_submodule("layer1.0.bn1").momentum == 0.03
    assert graph.gm.get_submodule("stem.1").momentum is None
    with pytest.raises(GraphError, match=r"layer1\.0\.conv1"):
        graph.node("layer1.0.conv")


def test_kinds_are_canonical() -> None:
    kinds = {name: {graph.op(n).kind for n in graph.nodes()} for name in NETS for _, graph in [loaded(name)]}
    assert {"conv", "batch_norm", "hardswish", "hardsigmoid", "global_avg_pool", "relu6", "mul"} <= kinds[
        "mobilenet"
    ]
    assert {"linear", "layer_norm", "sdpa", "gelu", "cat", "expand", "split"} <= kinds["hand_encoder"]
    assert {"embedding", "const", "transpose", "view"} <= kinds["decoder_1e4"]
    assert {"conv_transpose", "max_pool", "cat"} <= kinds["unet"]
    assert {"lstm", "gru"} <= kinds["lstm"] | kinds["gru"]
    known = {k for ks in kinds.values() for k in ks if k.startswith("other:")}
    assert known <= {
        *("other:upsample_bilinear2d", "other:_weight_norm", "other:select_scatter", "other:slice_scatter"),
        *("other:rnn_tanh", "other:_weight_norm_interface"),
    }


def test_constants_are_told_from_activations() -> None:
    _, graph = loaded("decoder_inf")
    constant = {graph.op(n).kind for n in graph.nodes() if graph.is_constant(n)}
    assert {"const", "embedding"} <= constant  # arange, the mask, its position embedding
    assert not graph.is_constant(graph.node("head"))


def test_channels_can_be_removed_in_front_of_a_view() -> None:
    graph = loaded("resnet")[1].clone()
    for node in list(graph.nodes()):  # drop the blocks: the stem feeds pool -> view -> fc
        if graph.name(node) == "layer1.1.relu#2":
            node.replace_all_uses_with(graph.node("stem.2"))
    graph.gm.graph.eliminate_dead_code()
    graph.gm.recompile()
    keep = torch.tensor([0, 2, 3, 5, 6])
    for name in (
        "stem.0.weight",
        "stem.1.weight",
        "stem.1.bias",
        "stem.1.running_mean",
        "stem.1.running_var",
    ):
        graph.set_tensor(name, graph.tensor(name)[keep])
    fc = graph.tensor("fc.weight").reshape(10, 8, 16)[:, keep].reshape(10, -1)
    graph.set_tensor("fc.weight", fc)
    graph.propagate()
    graph.check()
    assert graph.shape(graph.node("stem.0")) == ("batch", 5, 8, 8)
    assert graph.run(torch.randn(3, 3, 8, 8))[0].shape == (3, 10)
    graph.export()


def test_heads_can_be_removed() -> None:
    graph = loaded("hand_encoder")[1].clone()
    for layer in (0, 1):
        for name in ("qkv.weight", "qkv.bias"):
            old = graph.tensor(f"layers.{layer}.attn.{name}")
            graph.set_tensor(
                f"layers.{layer}.attn.{name}", old.reshape(3, 4, 4, -1)[:, :2].reshape(24, *old.shape[1:])
            )
        name = f"layers.{layer}.attn.proj.weight"
        graph.set_tensor(name, graph.tensor(name)[:, :8])
    graph.propagate()
    assert graph.run(torch.randn(2, 3, 8, 8))[0].shape == (2, 10)


def test_on_value_sees_and_replaces() -> None:
    _, graph = loaded("twice")
    seen: list[str] = []

    def watch(node: Any, value: Any) -> Any:
        seen.append(graph.name(node))
        return torch.zeros_like(value) if graph.name(node) == "act#2" else None

    out = graph.run(torch.randn(2, 4, 8, 8), on_value=watch)[0]
    assert seen == ["x", "conv", "bn", "act", "conv#2", "bn#2", "act#2"]
    assert float(out.detach().abs().max()) == 0.0


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"left": torch.randn(2, 4)}, "missing"),
        ((torch.randn(2, 4),), "needed: left, right"),
        ((torch.randn(2, 4), torch.randn(3, 3)), "'right'"),
        ((torch.randn(2, 4), torch.randn(2, 3, 1)), "'right'"),
        ((torch.randn(2, 4), torch.ones(2, 3, dtype=torch.int64)), "int64"),
    ],
)
def test_flat_args_names_what_is_wrong(given: Any, words: str) -> None:
    with pytest.raises(GraphError, match=words):
        loaded("outputs")[1].flat_args(given)


def test_laws_name_node_and_law() -> None:
    graph = loaded("resnet")[1].clone()
    graph.node("layer1.0.add").meta["bitport_name"] = "fc"
    with pytest.raises(GraphError, match="unique names"):
        graph.check()
    with pytest.raises(GraphError, match="could be folded into"):
        loaded("resnet")[1].check("folded")
    with pytest.raises(GraphError, match="unknown stage"):
        graph.check("nonsense")


def test_digest_sees_every_bit() -> None:
    graph = loaded("resnet")[1].clone()
    before = graph.digest()
    with torch.no_grad():
        graph.tensor("fc.bias")[0] += 1e-6
    assert graph.digest() != before
