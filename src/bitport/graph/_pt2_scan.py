"""Reads a `.pt2` archive without trusting it.

`torch.export.load` unpickles (sample inputs, odd weights, opaque constants), evaluates size expressions
through
`sympy.sympify`, imports modules named in tree specs, resolves call targets by attribute, and loads shared
libraries
that sit beside the program. So every member is looked at first, and what torch reads afterwards is an
archive rebuilt
from exactly the members that were looked at: a second reader can't see something else in the same bytes.
"""

from __future__ import annotations

import io
import json
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bitport.errors import UNREADABLE_ARCHIVE, LoadError, UnsafeFile

MAX_BYTES = 64 * 2**30  # declared size of all members together
MAX_RATIO = 1100  # deflate can't do better than about 1032; torch stores without compression
_SMALL = 2**20  # ratios of members below this are of no concern

_STORAGES = [
    "Float",
    "Double",
    "Half",
    "BFloat16",
    "Long",
    "Int",
    "Short",
    "Char",
    "Byte",
    "Bool",
    "ComplexFloat",
    "ComplexDouble",
]
ALLOWED_GLOBALS = frozenset(
    {
        "collections.OrderedDict",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_parameter",
        "torch._tensor._rebuild_from_type_v2",
        "torch.Tensor",
        "torch.nn.parameter.Parameter",
        "torch.Size",
        "torch.device",
        "torch.serialization._get_layout",
        "torch.storage.UntypedStorage",
        "torch.storage.TypedStorage",
        *(f"torch.{kind}Storage" for kind in _STORAGES),
        *(f"torch.float{bits}" for bits in (16, 32, 64)),
        *(f"torch.int{bits}" for bits in (8, 16, 32, 64)),
        *("torch.uint8", "torch.bool", "torch.bfloat16"),
        "torch._export.serde.serialize._reconstruct_fake_tensor",
    }
)
_TEXT = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE", "STRING", "BINSTRING", "SHORT_BINSTRING"}
_MEMO_PUT = {"BINPUT", "LONG_BINPUT", "PUT"}
_MEMO_GET = {"BINGET", "LONG_BINGET", "GET"}
_FORBIDDEN = {"INST", "OBJ", "EXT1", "EXT2", "EXT4", "NEWOBJ", "NEWOBJ_EX"}

_ALLOWED_WORDS = frozenset(
    [
        "Symbol",
        "Integer",
        "Float",
        "Rational",
        "Mul",
        "Add",
        "Pow",
        "Mod",
        "Min",
        "Max",
        "Abs",
        "floor",
        "ceiling",
        "FloorDiv",
        "CeilDiv",
        "PythonMod",
        "ModularIndexing",
        "CleanDiv",
        "IntTrueDiv",
        "FloatTrueDiv",
        "FloatPow",
        "PowByNatural",
        "FloorToInt",
        "CeilToInt",
        "RoundToInt",
        "TruncToInt",
        "ToFloat",
        "Where",
        "Eq",
        "Ne",
        "Lt",
        "Le",
        "Gt",
        "Ge",
        "Equality",
        "Unequality",
        "LessThan",
        "StrictLessThan",
        "GreaterThan",
        "StrictGreaterThan",
        "And",
        "Or",
        "Not",
        "Identity",
        "Piecewise",
        "BooleanTrue",
        "BooleanFalse",
        "true",
        "false",
        "True",
        "False",
        "oo",
        "int_oo",
        "positive",
        "negative",
        "nonnegative",
        "integer",
        "real",
        "nonpositive",
        "nonzero",
        "zero",
        "finite",
        "infinite",
        "extended_real",
        "rational",
        "evaluate",
        "precision",
        "dps",
        "Half",
        "One",
        "Zero",
        "NegativeOne",
        "OpaqueUnaryFn_sqrt",
        "TruncToFloat",
        "RShift",
        "LShift",
        "BitwiseFn_bitwise_and",
        "BitwiseFn_bitwise_or",
    ]
)
_SYMBOL = re.compile(r"'([A-Za-z_]\w*|-?\d[\d.e+-]*)'")
_WORD = re.compile(r"[A-Za-z_]\w*")
_PLAIN_SYMBOL = re.compile(r"(s|u|z|f|zf|uf|us)\d+$")
_EXPRESSION = re.compile(r"[\w\s(),=+\-*/%<>.!&|~']*$")
_TARGET = re.compile(
    r"(torch\.ops\.(aten|prims|prim|bitport|quantized_decomposed|higher_order|_caffe2|inductor)\.\w+(\.\w+)?"
    r"|_operator\.\w+|math\.\w+|torch\.(sym_\w+|_sym_\w+)|torch\.(float|int)\w*)$"
)
_FORBIDDEN_OPS = frozenset(
    {"from_file", "_print", "save", "load", "load_library", "call_torchbind", "import_module"}
)
_FORBIDDEN_OPERATORS = frozenset({"attrgetter", "methodcaller", "itemgetter", "call", "setitem", "delitem"})
_REGIONS = frozenset(
    ["wrap_with_set_grad_enabled", "wrap_with_autocast", "cond", "while_loop", "scan", "map_impl"]
)
_TREE_KEYS = {"in_spec", "out_spec", "treespec", "tree_spec"}


def scanned(path: str | Path) -> io.BytesIO:
    """A `.pt2` file rebuilt from members that need no more than plain tensors.

    Raises:
        UnsafeFile: names the member and what it would need. Nothing of the file was executed.
        LoadError: not a readable archive (missing, truncated, oversized, odd names).
    """
    path = Path(path)
    if not path.is_file():
        raise LoadError(f"{path.name}: no such file; check the path, or the artifact that it belongs to")
    try:
        with zipfile.ZipFile(path) as archive:
            _check_names(archive.infolist(), path.name)
            pickled = _pickled_members(archive, path.name)
            return _rebuild(archive, path.name, lambda n, d: _check_member(n, d, path.name, pickled))
    except zipfile.BadZipFile as error:
        raise LoadError(f"{path.name} is not a .pt2 archive, or is truncated ({error})") from error
    except UNREADABLE_ARCHIVE as error:  # ValueError: names that are no UTF-8
        raise LoadError(f"{path.name} can't be read ({error})") from error


def _rebuild(archive: zipfile.ZipFile, label: str, check: Callable[[str, bytes], bytes]) -> io.BytesIO:
    infos = archive.infolist()
    _check_names(infos, label)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as copy:
        for info in infos:
            if info.is_dir():
                continue
            data = archive.read(info)
            copy.writestr(zipfile.ZipInfo(info.filename), check(info.filename, data))
    out.seek(0)
    return out


def _check_names(infos: list[zipfile.ZipInfo], label: str) -> None:
    seen: set[str] = set()
    total = 0
    for info in infos:
        name, parts = info.filename, info.filename.replace("\\", "/").split("/")
        if not name:  # zipfile cuts names at their first zero byte
            raise LoadError(f"{label}: a member has no name: write the file again")
        if (
            name.startswith(("/", "\\"))
            or ".." in parts
            or "" in parts[:-1]
            or ":" in parts[0]
            or "\0" in name
        ):
            raise LoadError(f"{label}: member {name!r} points outside the archive")
        if name.casefold() in seen:
            raise LoadError(f"{label}: member {name!r} is there twice")
        if info.flag_bits & 1:
            raise LoadError(f"{label}: member {name!r} is encrypted")
        seen.add(name.casefold())
        total += info.file_size
        if info.file_size > _SMALL and info.file_size > MAX_RATIO * max(info.compress_size, 1):
            raise LoadError(
                f"{label}: member {name!r} unpacks to {info.file_size} bytes, more than it can hold"
            )
    if total > MAX_BYTES:
        raise LoadError(f"{label} unpacks to {total} bytes; the limit is {MAX_BYTES}")


def _check_member(name: str, data: bytes, label: str, pickled: frozenset[str]) -> bytes:
    """Checks one member; returns what torch gets to see of it."""
    inner = name.partition("/")[2]
    leaf = inner.rpartition("/")[2]
    if inner.startswith("models/"):
        check_program(data, name)
    elif inner.startswith("data/aotinductor") or leaf.endswith((".so", ".dll", ".dylib", ".cubin")):
        raise UnsafeFile(f"{label}: member {name!r} holds compiled code: only exported programs are read")
    elif inner.startswith("data/sample_inputs/"):
        if data:
            _check_saved(data, name, label)
        return b""  # not needed: specs of inputs come from the program
    elif inner.startswith(("data/weights/", "data/constants/")) and not leaf.endswith(".json"):
        if leaf.startswith("custom_obj"):
            raise UnsafeFile(f"{label}: member {name!r} is a custom object: only plain tensors are read")
        if leaf.startswith("opaque_obj"):
            check_pickle(data, name, label)
        elif leaf in pickled or leaf.endswith(".pt"):
            return _check_saved(data, name, label)
    elif "/" not in name and name.startswith("serialized_"):
        raise LoadError(f"{label} is in a format older than torch 2.9: save it again with torch.export.save")
    return data


def _pickled_members(archive: zipfile.ZipFile, label: str) -> frozenset[str]:
    """File names of tensors that the archive's own tables declare to be pickled."""
    found: set[str] = set()
    for name in archive.namelist():
        if not (name.partition("/")[2].startswith("data/") and name.endswith(".json")):
            continue
        for entry in _dicts(_json(archive.read(name), name)):
            if entry.get("use_pickle"):
                path = entry.get("path_name")
                if not isinstance(path, str) or re.fullmatch(r"\w[\w.]*", path) is None:
                    raise UnsafeFile(f"{label}: member {name!r} names a pickle outside its folder: {path!r}")
                found.add(path)
    return frozenset(found)


def _check_saved(data: bytes, member: str, label: str) -> bytes:
    """Checks a `torch.save` payload; returns it rebuilt from what was checked."""
    if data[:2] != b"PK":
        check_pickle(data, member, label)
        raise UnsafeFile(f"{label}: member {member!r} is in torch's legacy pickle format, which is not read")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as nested:
            return _rebuild(nested, label, lambda n, d: _check_nested(n, d, member, label)).getvalue()
    except zipfile.BadZipFile:
        raise LoadError(f"{label}: member {member!r} is truncated") from None


def _check_nested(name: str, data: bytes, member: str, label: str) -> bytes:
    if name.endswith(".pkl"):
        check_pickle(data, f"{member}:{name}", label)
    elif name.rpartition("/")[2] in ("constants.pkl", "code") or "/code/" in name:
        raise UnsafeFile(f"{label}: member {member!r} holds TorchScript code")
    return data


def check_pickle(data: bytes, member: str, label: str) -> None:
    """Reads a pickle opcode by opcode, without executing it.

    Raises:
        UnsafeFile: names the member and the first global that plain tensors don't need.
        LoadError: the pickle is broken.
    """
    for found in _globals(data, member, label):
        if found not in ALLOWED_GLOBALS:
            raise UnsafeFile(
                f"{label}: member {member!r} needs {found!r}, which plain tensors do not; nothing was run"
            )


def _globals(data: bytes, member: str, label: str) -> Iterator[str]:
    texts: list[str | None] = []
    memo: dict[int, str | None] = {}
    try:
        for opcode, arg, _ in pickletools.genops(data):
            name = opcode.name
            if name == "GLOBAL":
                yield str(arg).replace(" ", ".", 1)
                texts.append(None)
            elif name == "STACK_GLOBAL":
                if len(texts) < 2 or texts[-1] is None or texts[-2] is None:
                    yield "a global named at run time"
                else:
                    yield f"{texts[-2]}.{texts[-1]}"
            elif name in _FORBIDDEN:
                yield f"opcode {name} ({arg})"
            elif name in _TEXT:
                texts.append(str(arg))
            elif name == "MEMOIZE":
                memo[len(memo)] = texts[-1] if texts else None
            elif name in _MEMO_PUT:
                memo[int(arg or 0)] = texts[-1] if texts else None
            elif name in _MEMO_GET:
                texts.append(memo.get(int(arg or 0)))
            elif name not in ("FRAME", "PROTO"):
                texts.append(None)
    except UnsafeFile:
        raise
    except Exception as error:
        raise LoadError(f"{label}: member {member!r} is a broken pickle ({error})") from error


def check_program(data: bytes, member: str) -> None:
    """Checks a serialized program: call targets, size expressions, tree specs.

    Raises:
        UnsafeFile: names the member and the text that would be executed or imported.
        LoadError: not JSON.
    """
    for entry in _dicts(_json(data, member)):
        if "inputs" in entry and isinstance(entry.get("target"), str):  # a node, not the name of a tensor
            _check_target(entry["target"], member)
        if "expr_str" in entry and not is_plain_expression(entry["expr_str"]):
            text = str(entry["expr_str"])[:80]
            raise UnsafeFile(
                f"member {member!r} has a size expression that is more than arithmetic: {text!r}"
            )
        for key in _TREE_KEYS & set(entry):
            if isinstance(entry[key], str) and entry[key]:
                _check_tree(entry[key], member)


def _json(data: str | bytes, member: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise LoadError(f"member {member!r} is no JSON ({error})") from error


def _dicts(tree: Any) -> Iterator[dict[str, Any]]:
    """Every dict in a JSON document, at any depth."""
    todo = [tree]
    while todo:
        at = todo.pop()
        if isinstance(at, dict):
            yield at
            todo += at.values()
        elif isinstance(at, list):
            todo += at


def _check_target(target: str, member: str) -> None:
    """Targets are resolved by attribute from `torch`, `operator` and `math`: only tensor operators may
    pass."""
    parts = target.split(".")
    bad = _TARGET.match(target) is None or any(part.startswith("__") for part in parts)
    if target.startswith("torch.ops.higher_order."):
        bad = bad or parts[3] not in _REGIONS
    elif target.startswith("torch.ops."):
        bad = bad or len(parts) < 4 or parts[3] in _FORBIDDEN_OPS
    elif target.startswith("_operator."):
        bad = bad or parts[1] in _FORBIDDEN_OPERATORS
    if bad:
        raise UnsafeFile(f"member {member!r} calls {target!r}, which is no tensor operator")


def is_plain_expression(text: Any) -> bool:
    """Whether a size expression is arithmetic over symbols and known functions: it reaches `eval` through
    sympy."""
    if not isinstance(text, str) or len(text) > 20_000 or _EXPRESSION.match(text) is None or "__" in text:
        return False
    bare = _SYMBOL.sub("", text)  # names of symbols are quoted
    if "'" in bare or re.search(r"[A-Za-z_)\]]\s*\.", bare):
        return False
    words = _WORD.findall(re.sub(r"\b\d+(\.\d+)?([eE][+-]?\d+)?\b", "0", bare))
    return all(word in _ALLOWED_WORDS or _PLAIN_SYMBOL.match(word) for word in words)


def _check_tree(text: str, member: str) -> None:
    """Tree specs name classes and may import their modules: enums and default factories are refused."""
    for entry in _dicts(_json(text, member)):
        context = entry.get("context")
        imports = "__enum__" in entry or "default_factory_module" in entry
        imports = imports or (
            isinstance(context, str) and ("__enum__" in context or "default_factory" in context)
        )
        if imports or entry.get("type") == "collections.defaultdict":
            raise UnsafeFile(f"member {member!r} has a tree spec that imports a module: {entry.get('type')}")
