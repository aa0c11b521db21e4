"""External data of an ONNX file: tensors that lie in files of their own, read only where the model's folder has them.

They must lie in that folder, under a plain relative path without links, and hold what their tensor says. All of that is
checked before a byte is read.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from ...errors import LoadError, NotEnoughMemory, UnsafeFile

KEYS = {"location", "offset", "length", "checksum", "basepath"}
BYTES = {
    1: 4,
    2: 1,
    3: 1,
    4: 2,
    5: 2,
    6: 4,
    7: 8,
    9: 1,
    10: 2,
    11: 8,
    12: 4,
    13: 8,
    16: 2,
}  # of a number, by data type


class Stretch(NamedTuple):
    """Where a tensor's bytes lie."""

    parts: tuple[str, ...]
    offset: int
    length: int


def is_external(tensor: Any) -> bool:
    return bool(tensor.data_location == tensor.EXTERNAL)


def check(tensors: Iterable[Any], folder: Path | None) -> int:
    """Bytes of all external data, every part of which can be read. Raises UnsafeFile, LoadError, NotEnoughMemory."""
    import psutil

    files: dict[tuple[str, ...], dict[tuple[int, int], str]] = {}
    total = 0
    for tensor in tensors:
        if is_external(tensor):
            if folder is None:
                raise LoadError(
                    f"tensor {tensor.name!r} lies in a file of its own: load the model by its path"
                )
            found = _stretch(tensor)
            os.close(_opened(tensor.name, folder, found))
            total += found.length
            if found.length:
                files.setdefault(found.parts, {})[found.offset, found.offset + found.length] = tensor.name
    for stretches in files.values():
        end, before = 0, ""
        for (start, stop), name in sorted(stretches.items()):  # equal ones are one tensor that is used twice
            if start < end:
                raise LoadError(
                    f"the external data of tensors {before!r} and {name!r} overlap: the file is damaged"
                )
            end, before = stop, name
    left = psutil.virtual_memory().available if total else 0
    if total > left:
        raise NotEnoughMemory(
            f"the file's external data takes {total / 1e9:.1f} GB, and {left / 1e9:.1f} GB are free: load it where "
            "there is more memory"
        )
    return total


def data_of(tensor: Any, folder: Path) -> bytes:
    """A tensor's external data. Raises UnsafeFile, LoadError."""
    found = _stretch(tensor)
    with os.fdopen(_opened(tensor.name, folder, found), "rb") as file:
        file.seek(found.offset)
        data = file.read(found.length)
    if len(data) != found.length:
        raise LoadError(f"tensor {tensor.name!r}: {'/'.join(found.parts)!r} ended while it was read")
    return data


def _stretch(tensor: Any) -> Stretch:
    """What a tensor says of its data, which has to fit its shape and type."""
    told: dict[str, str] = {}
    for entry in tensor.external_data:
        if entry.key not in KEYS or entry.key in told:
            raise UnsafeFile(
                f"tensor {tensor.name!r} has external data with {entry.key[:50]!r}, which isn't ONNX"
            )
        told[entry.key] = entry.value
    parts = _plain_path(tensor.name, told.get("location", ""))
    size = BYTES.get(tensor.data_type)
    if size is None or any(length < 0 for length in tensor.dims):
        raise LoadError(
            f"tensor {tensor.name!r} of data type {tensor.data_type} can't be read from external data"
        )
    wanted = math.prod(tensor.dims) * size
    offset, length = (_number(tensor.name, key, told.get(key)) for key in ("offset", "length"))
    if length not in (None, wanted):
        raise LoadError(f"tensor {tensor.name!r} takes {wanted} bytes; its external data has {length}")
    return Stretch(parts, offset or 0, wanted)


def _plain_path(name: str, location: str) -> tuple[str, ...]:
    windows, parts = PureWindowsPath(location), PurePosixPath(location).parts
    odd = (
        not parts or location.startswith(("/", "\\")) or windows.drive or "\\" in location or "\0" in location
    )
    if odd or any(part in ("..", ".") for part in parts):
        raise UnsafeFile(
            f"tensor {name!r} wants data from {location[:200]!r}: only files in the model's folder are read"
        )
    return parts


def _number(name: str, key: str, value: str | None) -> int | None:
    if value is None:
        return None
    if not value.isascii() or not value.isdigit() or len(value) > 18:
        raise LoadError(
            f"tensor {name!r} has external data with {key} {value[:50]!r}: it must be a whole number"
        )
    return int(value)


def _opened(name: str, folder: Path, stretch: Stretch) -> int:
    """The file of a stretch, opened step by step so that no link is followed, not even one made meanwhile."""
    parts, offset, length = stretch
    follow_no_link = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    where = "/".join(parts)
    handles: list[int] = []
    try:
        if os.open in os.supports_dir_fd:
            handles.append(os.open(folder, os.O_RDONLY))
            for part in parts[:-1]:
                handles.append(
                    os.open(part, os.O_RDONLY | os.O_DIRECTORY | follow_no_link, dir_fd=handles[-1])
                )
            handles.append(os.open(parts[-1], os.O_RDONLY | follow_no_link, dir_fd=handles[-1]))
        else:
            place = folder
            for part in parts:
                place = place / part
                if place.is_symlink():
                    raise UnsafeFile(f"tensor {name!r} wants data from {where!r}, which is a link")
            handles.append(os.open(place, os.O_RDONLY | follow_no_link))
        found = os.fstat(handles[-1])
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            raise UnsafeFile(f"tensor {name!r} wants data from {where!r}, which is no plain file of its own")
        if offset + length > found.st_size:
            raise LoadError(
                f"tensor {name!r} wants {length} bytes at {offset} of {where!r}, which has {found.st_size}"
            )
        return handles.pop()
    except OSError as error:
        raise UnsafeFile(
            f"tensor {name!r} wants data from {where!r}, which can't be opened without following links: "
            f"{error.strerror}"
        ) from error
    finally:
        for handle in handles:
            os.close(handle)
