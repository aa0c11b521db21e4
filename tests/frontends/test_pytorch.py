"""Loading: what is kept of the user's model, what is said, what is refused; and the safety of files."""

from __future__ import annotations

import copy
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.nets import Decoder, ResNet, TorchEncoder, build
from torch import Tensor, nn
from torch.nn import functional as F

from bitport.errors import LoadError, UnsafeFile, WeightsError
from bitport.frontends.pytorch import load_module
from bitport.graph._pt2_scan import is_plain_expression
from bitport.graph.archive import load_pt2, save_pt2


def test_the_users_model_and_random_state_are_untouched() -> None:
    model, example = build("resnet", 2)
    model.train()
    model.fc.weight.requires_grad_(False)
    calls: list[int] = []
    model.fc.register_forward_hook(lambda *_: calls.append(1))
    before, keys = copy.deepcopy(model.state_dict()), list(model.__dict__)
    state = torch.get_rng_state()
    graph = load_module(model, example)
    graph.export()
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert list(model.__dict__) == keys
    assert len(model.fc._forward_hooks) == 1
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not graph.tensor("fc.weight").requires_grad
    assert graph.tensor("fc.bias").requires_grad
    with torch.no_grad():
        graph.tensor("fc.bias").add_(1)
    assert torch.equal(model.fc.bias, before["fc.bias"])


def test_dropout_keeps_its_rate_and_frozen_encoders_do_not_take_the_fast_path() -> None:
    model = TorchEncoder(dropout=0.3).eval().requires_grad_(False)
    graph = load_module(model, torch.randn(1, 5, 6))
    kinds = [graph.op(n).kind for n in graph.nodes()]
    assert kinds.count("sdpa") == 2
    assert kinds.count("dropout") == 6
    assert not any("fast" in kind for kind in kinds)
    assert {graph.op(n).attrs.get("p", 0.3) for n in graph.nodes() if graph.op(n).kind == "dropout"} == {0.3}
    attention = [graph.op(n) for n in graph.nodes() if graph.op(n).kind == "sdpa"]
    assert all(a.attrs["dropout_p"] == 0.3 for a in attention)
    ours = graph.module().train()
    x = torch.randn(4, 5, 6)
    assert not torch.equal(ours(x), ours(x))
    assert torch.allclose(ours.eval()(x), model(x), atol=1e-5)


def test_a_batch_whose_length_python_asks_for_is_fixed() -> None:
    """`len(x)` is a plain number: the traced batch stays a symbol that has one value only."""

    class Lengths(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(len(x), -1) * 2

    graph = load_module(Lengths(), torch.randn(1, 2, 3))
    assert graph.inputs[0].shape == (1, 2, 3)
    assert "axis 0 of 'x' is fixed at 1" in graph.notes[0]


def test_a_batch_that_is_fixed_is_said() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(1, 12) * 2

    graph = load_module(Fixed(), torch.randn(1, 12))
    assert graph.inputs[0].shape == (1, 12)
    assert "axis 0 of 'x' is fixed at 1" in graph.notes[0]


def test_torch_dynamic_shapes_pass_through() -> None:
    model = Decoder(-1e4).eval()
    spec = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=7)},)
    graph = load_module(model, torch.zeros(2, 5, dtype=torch.int64), dynamic_shapes=spec)
    assert graph.inputs[0].shape == ("batch", "length")
    assert graph.outputs[0].shape == ("batch", "length", 20)
    ids = torch.arange(14).reshape(2, 7)
    assert torch.allclose(graph.run(ids)[0], model(ids), atol=1e-5)
    assert load_module(model, ids, dynamic_shapes=None).inputs[0].shape == (2, 7)


def test_control_flow_on_data_names_the_line() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:  # the line
                return x
            return -x

    with pytest.raises(LoadError, match=r"test_pytorch\.py:\d+: if x\.sum\(\) > 0"):
        load_module(Branch(), torch.randn(2, 3))


@pytest.mark.parametrize(
    ("example", "words"),
    [
        (None, "missing"),
        ((torch.randn(2, 3), 4), "int"),
        (torch.randn(2, 3, dtype=torch.complex64), "complex"),
        ({"x": "text"}, "str"),
    ],
)
def test_inputs_that_can_not_be_taken(example: Any, words: str) -> None:
    with pytest.raises(LoadError, match=words):
        load_module(nn.Linear(3, 3), example)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_weights_are_named_and_counted(value: float) -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    with torch.no_grad():
        model[0].weight[0, :2] = value
    with pytest.raises(WeightsError, match=r"0\.weight holds \d NaN and \d infinite of 9"):
        load_module(model, torch.randn(2, 3))


def test_no_module_no_load() -> None:
    with pytest.raises(LoadError, match=r"nn\.Module"):
        load_module(lambda x: x, torch.randn(2))  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_hook_style_weight_norm_loads() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.weight_norm(nn.Conv1d(2, 4, 3)), nn.ReLU()).eval()
    x = torch.randn(3, 2, 9)
    model(x)
    graph = load_module(model, x)
    assert set(graph.gm.state_dict()) == set(model.state_dict())
    assert torch.allclose(graph.run(x)[0], model(x), atol=1e-6)


def test_a_matrix_used_outside_its_owner_stays_one_tensor() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.Embedding(7, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return F.linear(self.emb(ids), self.emb.weight)

    model = Tied().eval()
    ids = torch.zeros(2, 3, dtype=torch.int64)
    graph = load_module(model, ids)
    assert list(graph.gm.state_dict()) == ["emb.weight"]
    assert {e.consumer for e in graph.edges() if e.producer == "emb.weight"} == {"emb", "linear"}


# --- files ---


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A `.pt2` as anyone makes it: static batch, plain torch."""
    path = tmp_path / "plain.pt2"
    torch.save({}, io.BytesIO())
    torch.export.save(torch.export.export(ResNet().eval(), (torch.randn(2, 3, 8, 8),)), path)
    return path


def rewrite(path: Path, edit: Callable[[str, bytes], bytes | None], **extra: bytes) -> Path:
    """A copy of an archive with members edited (None drops one) or added."""
    out = path.with_name("edited.pt2")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            data = edit(info.filename, old.read(info))
            if data is not None:
                new.writestr(zipfile.ZipInfo(info.filename), data)
        root = old.namelist()[0].partition("/")[0]
        for name, data in extra.items():
            new.writestr(f"{root}/{name}", data)
    return out


class Canary:
    """A pickle that leaves a file behind when it is executed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (eval, (f"open({str(self.path)!r}, 'w').close()",))


def test_a_plain_file_loads_with_a_note(plain: Path) -> None:
    graph = load_pt2(plain)
    assert graph.inputs[0].shape == (2, 3, 8, 8)
    assert "fixed at 2" in graph.notes[0]
    assert "layer1.0.conv1" in {graph.name(n) for n in graph.nodes()}
    assert graph.gm.get_submodule("stem.1").momentum is None
    assert graph.run(torch.randn(2, 3, 8, 8))[0].shape == (2, 10)


def test_saved_graphs_keep_ties_and_notes(tmp_path: Path) -> None:
    graph = load_module(*build("decoder_1e4", 1))
    graph.notes.append("remember")
    save_pt2(graph, tmp_path / "g.pt2")
    again = load_pt2(tmp_path / "g.pt2")
    assert again.tensor("head.weight") is again.tensor("tok.weight")
    assert again.notes == ["remember"]


@pytest.mark.parametrize("legacy", [False, True])
def test_a_canary_in_the_sample_inputs_is_not_executed(plain: Path, tmp_path: Path, legacy: bool) -> None:
    canary = tmp_path / "executed"
    buffer = io.BytesIO()
    torch.save((Canary(canary),), buffer, _use_new_zipfile_serialization=not legacy)
    bad = rewrite(plain, lambda n, d: buffer.getvalue() if "sample_inputs" in n else d)
    with pytest.raises(UnsafeFile, match="sample_inputs"):
        load_pt2(bad)
    assert not canary.exists()


@pytest.mark.parametrize("kind", ["opaque_obj_0", "custom_obj_0"])
def test_a_canary_among_the_constants_is_not_executed(plain: Path, tmp_path: Path, kind: str) -> None:
    canary = tmp_path / "executed"
    data = pickle.dumps(Canary(canary))
    with pytest.raises(UnsafeFile, match="constants"):
        load_pt2(rewrite(plain, lambda _, d: d, **{f"data/constants/{kind}": data}))
    assert not canary.exists()


def test_a_canary_as_pickled_weight_is_not_executed(plain: Path, tmp_path: Path) -> None:
    canary = tmp_path / "executed"

    def edit(name: str, data: bytes) -> bytes:
        if name.endswith("weights_config.json"):
            table = json.loads(data)
            table["config"]["fc.bias"]["use_pickle"] = True
            edit.leaf = table["config"]["fc.bias"]["path_name"]  # type: ignore[attr-defined]
            return json.dumps(table).encode()
        return data

    first = rewrite(plain, edit)
    leaf = edit.leaf  # type: ignore[attr-defined]
    second = first.rename(first.with_name("first.pt2"))
    bad = rewrite(second, lambda n, d: pickle.dumps(Canary(canary)) if n.endswith(f"/{leaf}") else d)
    with pytest.raises(UnsafeFile, match=leaf):
        load_pt2(bad)
    assert not canary.exists()


def _node(document: dict[str, Any], **change: Any) -> None:
    document["graph_module"]["graph"]["nodes"][0].update(change)


@pytest.mark.parametrize(
    "target",
    [
        "torch.hub.load",
        "torch.ops.load_library",
        "torch.ops.aten.from_file.default",
        "_operator.methodcaller",
        "torch.ops.aten.relu.default.__class__",
        "#evil:op",
        "math.__loader__",
    ],
)
def test_targets_that_are_no_tensor_operators_are_refused(plain: Path, target: str) -> None:
    def edit(name: str, data: bytes) -> bytes:
        if "/models/" not in name:
            return data
        document = json.loads(data)
        _node(document, target=target)
        return json.dumps(document).encode()

    with pytest.raises(UnsafeFile, match="no tensor operator"):
        load_pt2(rewrite(plain, edit))


def test_size_expressions_and_tree_specs_can_not_execute(plain: Path, tmp_path: Path) -> None:
    canary = tmp_path / "executed"
    evil = f"[s for s in ().__class__.__base__.__subclasses__()] or open('{canary}', 'w')"
    expression = {"as_expr": {"expr_str": evil, "hint": None}}
    spec = '[1, {"type": "collections.defaultdict", "context": "{}", "children_spec": []}]'
    changes: list[Callable[[dict[str, Any]], None]] = [
        lambda d: d["graph_module"]["graph"]["sym_int_values"].update(x=expression),
        lambda d: d["graph_module"]["module_call_graph"][0]["signature"].update(in_spec=spec),
    ]
    for change in changes:

        def edit(name: str, data: bytes, change: Any = change) -> bytes:
            if "/models/" not in name:
                return data
            document = json.loads(data)
            change(document)
            return json.dumps(document).encode()

        with pytest.raises(UnsafeFile):
            load_pt2(rewrite(plain, edit))
    assert not canary.exists()


@pytest.mark.parametrize(
    ("text", "plain_arithmetic"),
    [
        ("Symbol('s77', positive=True, integer=True)", True),
        ("Add(Integer(-1), Mul(Integer(2), Symbol('s0', integer=True)))", True),
        ("FloorDiv(Symbol('s1'), Integer(4))", True),
        ("__import__('os').system('x')", False),
        ("Symbol('x').__class__", False),
        ("open('a')", False),
        ("(lambda: 1)()", False),
        ("Symbol('x').name", False),
    ],
)
def test_expressions(text: str, plain_arithmetic: bool) -> None:
    assert is_plain_expression(text) is plain_arithmetic


def test_archives_that_are_none(plain: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pt2"
    other.write_bytes(b"not a zip")
    with pytest.raises(LoadError, match=r"not a \.pt2"):
        load_pt2(other)
    other.write_bytes(plain.read_bytes()[: plain.stat().st_size // 2])
    with pytest.raises(LoadError):
        load_pt2(other)
    with pytest.raises(LoadError, match="no such file"):
        load_pt2(tmp_path / "missing.pt2")
    with pytest.raises(LoadError, match="outside"):
        load_pt2(rewrite(plain, lambda _, d: d, **{"../../evil": b"x"}))
    with pytest.raises(LoadError, match="no readable"):
        load_pt2(rewrite(plain, lambda n, d: None if "/models/" in n else d))
    with pytest.raises(UnsafeFile, match="compiled code"):
        load_pt2(rewrite(plain, lambda _, d: d, **{"data/aotinductor/model/a.so": b"x"}))


def test_members_without_a_name_are_refused(plain: Path, tmp_path: Path) -> None:
    path = tmp_path / "nameless.pt2"
    written = rewrite(plain, lambda _, d: d, odd=b"x")
    with zipfile.ZipFile(written) as archive:
        (name,) = (name.encode() for name in archive.namelist() if name.endswith("odd"))
    path.write_bytes(written.read_bytes().replace(name, b"\0" + name[1:]))
    with pytest.raises(LoadError, match="has no name"):
        load_pt2(path)


def test_bombs_are_refused_before_they_unpack(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt2"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/models/model.json", b"0" * 2**22)
    raw = bytearray(path.read_bytes())
    at = raw.rindex(b"PK\x01\x02")
    raw[at + 24 : at + 28] = (2**32 - 2).to_bytes(4, "little")  # declares 4 GB
    path.write_bytes(bytes(raw))
    with pytest.raises(LoadError, match="unpacks to"):
        load_pt2(path)
