"""Records: canonical JSON on disk, the measurement record, checksums, versions, and texts without paths.

Canonical means that equal records are equal files: sorted keys, two spaces, UTF-8, one newline at the end,
floats in Python's shortest round-trip form. NaN and infinities are refused, since JSON (RFC 8259) has none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from bitport.errors import ArtifactError, UnknownName

SCHEMA = 1
MAX_BYTES = 64 * 2**20
MAX_DEPTH = 64


def dumps(record: Mapping[str, Any]) -> str:
    """The canonical text of a record; `"schema": 1` is added where it is missing.

    Raises ArtifactError naming the key path of what JSON can't hold (NaN, other types, keys that aren't
    strings).
    """
    whole = {"schema": SCHEMA, **record}
    _check_schema(whole, "this record")
    _check_values(whole)
    return json.dumps(whole, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def dump(path: str | Path, record: Mapping[str, Any]) -> None:
    """Write a record as canonical JSON. Raises ArtifactError as `dumps`; OSError when the disk refuses."""
    try:
        content = dumps(record).encode()
    except UnicodeEncodeError as error:
        raise ArtifactError(
            f"record {Path(path).name!r} holds text that is no valid Unicode: clean it"
        ) from error
    Path(path).write_bytes(content)


def load(path: str | Path) -> dict[str, Any]:
    """Read a record, trusting nothing of it.

    Raises ArtifactError for a file that is missing, too big (64 MiB), nested deeper than 64, of another
    schema, no JSON object, or that holds NaN or one key twice.
    """
    name = Path(path).name
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ArtifactError(
            f"record {name!r} can't be read ({error.strerror or error}): check the folder"
        ) from error
    if len(content) > MAX_BYTES:
        raise ArtifactError(f"record {name!r} is larger than {MAX_BYTES:,} bytes: it is not one of bitport's")
    try:
        record = json.loads(
            content.decode(),
            parse_constant=_refuse_constant,
            parse_float=_finite,
            object_pairs_hook=_without_twice,
        )
    except RecursionError as error:
        raise ArtifactError(f"record {name!r} is nested deeper than {MAX_DEPTH}") from error
    except ValueError as error:  # also UnicodeDecodeError and JSONDecodeError
        raise ArtifactError(f"record {name!r} is not valid JSON ({error}): write it again") from error
    if not isinstance(record, dict):
        raise ArtifactError(f"record {name!r} holds {type(record).__name__}; a JSON object was expected")
    if _depth(record) > MAX_DEPTH:
        raise ArtifactError(f"record {name!r} is nested deeper than {MAX_DEPTH}")
    _check_schema(record, f"record {name!r}")
    return record


class Measurement:
    """What was measured: a nested record whose keys are addressed by dotted paths, as `"task.drop"`.

    A key without a value is None, with the reason beside it under `<key>_reason`.
    """

    def __init__(self, record: Mapping[str, Any] | None = None) -> None:
        self.record: dict[str, Any] = {"schema": SCHEMA, **(record or {})}

    def get(self, path: str, default: Any = None) -> Any:
        """The value at a dotted path, `default` where there is none."""
        try:
            return self[path]
        except UnknownName:
            return default

    def __getitem__(self, path: str) -> Any:
        """The value at a dotted path. Raises UnknownName listing the keys at the place where it ends."""
        here: Any = self.record
        for key in path.split("."):
            if not isinstance(here, Mapping) or key not in here:
                raise UnknownName("measurement", path, here if isinstance(here, Mapping) else ())
            here = here[key]
        return here

    def __contains__(self, path: str) -> bool:
        missing = object()
        return self.get(path, missing) is not missing

    def set(self, section: str, key: str, value: Any) -> None:
        """Set one key of a section (`""`: the top level), making the section where it is missing."""
        place = self._section(section)
        place[key] = value
        place.pop(f"{key}_reason", None)

    def absent(self, section: str, key: str, reason: str) -> None:
        """Say that a key has no value, and why."""
        absent(self._section(section), key, reason)

    def reason(self, path: str) -> str | None:
        """Why a key has no value; None when it has one or no reason was given."""
        found = self.get(f"{path}_reason")
        return None if found is None else str(found)

    def save(self, path: str | Path) -> None:
        """Write it as canonical JSON (`dump`)."""
        dump(path, self.record)

    @classmethod
    def load(cls, path: str | Path) -> Measurement:
        """Read one (`load`). Raises ArtifactError."""
        return cls(load(path))

    def _section(self, path: str) -> dict[str, Any]:
        here = self.record
        for key in path.split(".") if path else ():
            here = here.setdefault(key, {})
            if not isinstance(here, dict):
                raise ArtifactError(f"measurement {path!r} can't be a section: {key!r} already holds a value")
        return here


def absent(section: dict[str, Any], key: str, reason: str) -> None:
    """Say that a key of a section has no value, and why: `key` is None, `<key>_reason` the reason."""
    section[key] = None
    section[f"{key}_reason"] = reason


def sha256_bytes(content: bytes) -> str:
    """SHA-256 of bytes, hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal, read in pieces. Raises OSError."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python, bitport and the installed packages that it names as requirements; imports none.

    What bitport needs and what its extras bring is read from its own metadata, so that a new runtime's
    version is recorded without a word here. Tools of its developers don't count.
    """
    found = {"python": platform.python_version()}
    for name in sorted({"bitport", "torch", "numpy", *_requirements()}):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def scrub(text: str) -> str:
    """The text without absolute paths of this machine; the last part of a path to a file is kept.

    Node names such as `/layer1/conv/Conv` look like paths: a POSIX path counts as one only where its first
    folder exists here.
    """
    for prefix in _known_prefixes():
        text = re.sub(re.escape(prefix) + r"(?![\w.-])", _MARK, text)
    text = _MARKED.sub(_shortened, text)
    text = _FILE_URL.sub("file:", text)
    text = _WINDOWS.sub(_shortened, text)
    return _POSIX.sub(lambda match: _shortened(match) if _is_here(match[0]) else match[0], text)


_MARK = "<path>"
_PART = r"[^\s/\\:\"'`<>|,;()\[\]{}]+"
_MARKED = re.compile(rf"{_MARK}(?:[/\\]{_PART})*")
_FILE_URL = re.compile(r"file://(?=/)")
_WINDOWS = re.compile(rf"(?<![\w])(?:[A-Za-z]:[\\/]|\\\\{_PART}\\){_PART}(?:[\\/]{_PART})*")
_POSIX = re.compile(rf"(?<![\w.~/\\:-])/{_PART}(?:/{_PART})+|(?<=file:)/{_PART}(?:/{_PART})+")


def _known_prefixes() -> list[str]:
    """Folders of this machine that may have spaces in their names, the longest first."""
    places = [os.path.expanduser("~"), tempfile.gettempdir()]
    # a system's own Python lies in /usr, which tells of nobody, and is a part of other paths
    places += [place for place in (sys.prefix, sys.base_prefix) if len(Path(place).parts) > 2]
    with contextlib.suppress(FileNotFoundError):  # the current folder may have been removed
        places.append(os.getcwd())
    texts = {form for place in places for form in (place, os.path.realpath(place))}
    return sorted((text for text in texts if len(Path(text).parts) > 1), key=len, reverse=True)


def _is_here(path: str) -> bool:
    return os.path.isdir("/" + path.lstrip("/").split("/", 1)[0])


def _shortened(match: re.Match[str]) -> str:
    """`<path>/model.py` for a path to a file; `<path>` for what may be a person's or project's name."""
    parts = re.split(r"[/\\]", match[0])
    deep_enough = len(parts) > (1 if parts[0] == _MARK else 3)  # /home/jo.doe is a person
    return f"{_MARK}/{parts[-1]}" if deep_enough and re.search(r"[^.]\.\w{1,12}$", parts[-1]) else _MARK


def _requirements() -> Iterable[str]:
    try:
        lines = metadata.requires("bitport") or []
    except metadata.PackageNotFoundError:  # a source tree on the path
        return ()
    used = (line for line in lines if not re.search(r"extra\s*==\s*['\"](test|lint|docs|dev)['\"]", line))
    names = (re.match(r"[A-Za-z0-9][\w.-]*", line) for line in used)
    return {match[0].lower() for match in names if match}


def _check_schema(record: Mapping[str, Any], what: str) -> None:
    schema = record.get("schema")
    if type(schema) is not int or schema != SCHEMA:
        raise ArtifactError(f"{what} has schema {schema!r}; this version reads and writes schema {SCHEMA}")


def _check_values(value: Any, path: str = "", depth: int = 0) -> None:
    if depth > MAX_DEPTH:
        raise ArtifactError(f"the record is nested deeper than {MAX_DEPTH} at {path[:80]!r}")
    if isinstance(value, Mapping):
        for key, part in value.items():
            if not isinstance(key, str):
                raise ArtifactError(
                    f"the record has the key {key!r} at {path or 'its top'}; keys must be text"
                )
            _check_values(part, f"{path}.{key}" if path else key, depth + 1)
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            _check_values(part, f"{path}[{index}]", depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ArtifactError(f"the record holds {value} at {path}: store None and the reason beside it")
    elif value is not None and not isinstance(value, (str, bool, int, float)):
        raise ArtifactError(
            f"the record holds {type(value).__name__} at {path}: "
            "convert it to a plain number, text, list or dict"
        )


def _depth(record: Any) -> int:
    level, here = 0, [record]
    while here:
        level += 1
        parts = (
            part.values() if isinstance(part, dict) else part
            for part in here
            if isinstance(part, (dict, list))
        )
        here = [value for values in parts for value in values]
    return level


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is out of range")
    return value


def _without_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("one key stands twice")
    return record
