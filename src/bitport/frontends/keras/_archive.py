"""A `.keras` file, looked through before Keras sees it: what it would load, and how much.

It is a zip of `config.json` (the layers, by class and module), `metadata.json` and `model.weights.h5`. Keras finds
classes by the names in there, so each is held against what Keras itself brings.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from bitport.errors import FOREIGN, UNREADABLE_ARCHIVE, LoadError, UnsafeFile, first_line

CONFIG, WEIGHTS, METADATA = "config.json", "model.weights.h5", "metadata.json"
LARGEST_CONFIG = 64 * 2**20
LARGEST_WEIGHTS = 64 * 2**30
RATIO = 1100  # deflate can't do better than about 1032; Keras stores without compression
SMALL = 2**20
OWN_MODULES = re.compile(r"keras(\.\w+)*")
# what Keras writes for values that aren't objects
VALUES = {
    "__keras_tensor__",
    "__tensor__",
    "__numpy__",
    "__slice__",
    "__ellipsis__",
    "__tuple__",
    "__dtype__",
}
RUN_CODE = {"Lambda", "__lambda__", "TorchModuleWrapper", "JaxLayer", "FlaxLayer", "TFSMLayer"}
READ_FILES = {"StringLookup", "IntegerLookup", "TextVectorization", "FeatureSpace", "IndexLookup"}


def checked(path: Path) -> None:
    """Raises UnsafeFile where Keras would run or read more than its own layers, LoadError where the file is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = _members(archive, path.name)
            for name in (CONFIG, WEIGHTS):
                if name not in sizes:
                    raise LoadError(
                        f"{path.name} holds no {name}, so it isn't what Keras 3 saves: write it by model.save"
                    )
            config = _config(archive.read(CONFIG), path.name)
            with archive.open(WEIGHTS) as stream:
                _read_through(stream, path.name)
    except zipfile.BadZipFile as error:
        raise LoadError(f"{path.name} is no .keras file, or is cut off ({first_line(error)})") from error
    except UNREADABLE_ARCHIVE as error:
        raise LoadError(f"{path.name} can't be read ({first_line(error)})") from error
    _classes(config, path.name)


def _members(archive: zipfile.ZipFile, label: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for info in archive.infolist():
        name = info.filename
        if name.startswith("assets/"):
            raise UnsafeFile(f"{label} holds {name!r}: layers that read files are not loaded; remove them")
        if name not in (CONFIG, WEIGHTS, METADATA) or name in sizes:
            raise LoadError(f"{label}: member {name[:100]!r} doesn't belong there: write it by model.save")
        if info.flag_bits & 1:
            raise LoadError(f"{label}: member {name!r} is encrypted")
        most = LARGEST_WEIGHTS if name == WEIGHTS else LARGEST_CONFIG
        if info.file_size > most or info.file_size > max(SMALL, RATIO * info.compress_size):
            raise LoadError(
                f"{label}: member {name!r} unpacks to {info.file_size} bytes, more than it can hold"
            )
        sizes[name] = info.file_size
    return sizes


def _config(data: bytes, label: str) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise LoadError(
            f"{label}: {CONFIG} is no JSON ({first_line(error)}): write the file again"
        ) from error
    if not isinstance(found, dict) or not isinstance(found.get("class_name"), str):
        raise LoadError(f"{label}: {CONFIG} describes no network: write the file again")
    # not read where nothing is compiled: losses and optimizers may be the user's own
    return {key: value for key, value in found.items() if key != "compile_config"}


def _read_through(stream: Any, label: str) -> None:
    """To the end, so that the archive's checksum is compared."""
    first = stream.read(8)
    if first != b"\x89HDF\r\n\x1a\n":
        raise LoadError(f"{label}: {WEIGHTS} is no HDF5 file: write it again")
    while stream.read(SMALL):
        pass


def _classes(config: dict[str, Any], label: str) -> None:
    for item, layer in _objects(config, ""):
        name, module = item["class_name"], item.get("module")
        where = f"layer {layer!r}" if layer else "the network"
        remedy = "nothing of the file was run. Build it of Keras' own layers, or write the network in PyTorch"
        if name in RUN_CODE:
            raise UnsafeFile(f"{label}: {where} is a {name}, which holds code: {remedy}")
        if name in READ_FILES:
            raise UnsafeFile(
                f"{label}: {where} is a {name}, which reads text or files: leave it out of the network, and give its "
                "results as the input"
            )
        if name in VALUES:
            continue
        registered = item.get("registered_name")
        plain = isinstance(name, str) and re.fullmatch(r"\w+", name) is not None
        own = isinstance(module, str) and OWN_MODULES.fullmatch(module) is not None
        if name == "function" and module == "builtins" and registered in (None, "function"):
            if isinstance(item.get("config"), str) and re.fullmatch(r"\w+", item["config"]):
                continue  # one of Keras' own, by its name
        if not plain or not own or registered not in (None, name):
            shown = f"{str(registered or name)[:100]!r} of module {str(module)[:100]!r}"
            raise UnsafeFile(f"{label}: {where} is {shown}, which Keras doesn't bring: {remedy}")


def _objects(tree: Any, layer: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Everything that Keras would make an object of, with the innermost layer's name."""
    todo: list[tuple[Any, str]] = [(tree, layer)]
    while todo:
        at, inside = todo.pop()
        if isinstance(at, dict):
            if "class_name" in at:
                own = at.get("config")
                named = at.get("name") or (own.get("name") if isinstance(own, dict) else None)
                inside = named if isinstance(named, str) and at is not tree else inside
                yield at, inside
            todo += [(value, inside) for value in at.values()]
        elif isinstance(at, list):
            todo += [(value, inside) for value in at]


def check_weights(file: BinaryIO, label: str) -> None:
    """Raises UnsafeFile for links to other files, LoadError for data sets that say more than the file holds."""
    import h5py

    try:
        with h5py.File(file, "r") as found:
            _walk(found, label)
    except FOREIGN as error:
        raise LoadError(f"{label}: {WEIGHTS} is damaged ({first_line(error)}): write it again") from error


def _walk(root: Any, label: str) -> None:
    import h5py

    todo, seen = [root], 0
    while todo:
        group = todo.pop()
        for name in group:
            seen += 1
            link = group.get(name, getlink=True)
            if not isinstance(link, h5py.HardLink) or seen > 10**6:
                raise UnsafeFile(
                    f"{label}: {WEIGHTS} holds a link at {name!r}: only its own numbers are read"
                )
            item = group[name]
            if isinstance(item, h5py.Group):
                todo.append(item)
                continue
            if not isinstance(item, h5py.Dataset):
                continue
            if item.external or item.is_virtual:
                raise UnsafeFile(f"{label}: {WEIGHTS} wants {item.name!r} from another file: it isn't read")
            stored = item.id.get_storage_size()
            if item.dtype.hasobject or (stored < item.nbytes and item.compression is None):
                raise LoadError(
                    f"{label}: {WEIGHTS} holds fewer numbers than {item.name!r} says: write it again"
                )
            if item.nbytes > max(SMALL, RATIO * stored):
                raise LoadError(f"{label}: {item.name!r} unpacks to more than it can hold: write it again")


def weights_of(path: Path) -> BinaryIO:
    """The member that holds the weights, in memory."""
    with zipfile.ZipFile(path) as archive:
        return io.BytesIO(archive.read(WEIGHTS))
