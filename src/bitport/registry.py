"""Finds what can be named: targets, steps, front ends, of the house or of a third party.

A *kind* is a sub-package of bitport (`targets`, `steps`, `frontends`). A built-in is a file or folder in it
and is called by its file name; a name that starts with `_` is private. A third party offers more through
entry points of the group `bitport.<kind>` (https://packaging.python.org/specifications/entry-points/).
Finding imports nothing; `get` imports the one that was asked for. A built-in's name can't be taken over by a
third party.
"""

from __future__ import annotations

import ast
import pkgutil
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bitport.errors import BitportError, UnknownName


def names(kind: str) -> tuple[str, ...]:
    """All names of a kind (`"targets"`, `"steps"`, …), sorted. Imports none of them."""
    return tuple(sorted({*_builtins(kind), *(point.name for point in _entry_points(kind))}))


def get(kind: str, name: str) -> Any:
    """The module of a built-in, or the object that an entry point loads. Imports only that one.

    Raises UnknownName (listing the known names) for a name that nobody registered, and BitportError naming
    the distribution when an entry point can't be loaded or when two distributions offer the same name.
    """
    if name in _builtins(kind):
        return import_module(f"bitport.{kind}.{name}")
    points = [point for point in _entry_points(kind) if point.name == name]
    if not points:
        raise UnknownName(kind.removesuffix("s"), name, names(kind))
    offers = {_distribution(point) for point in points}
    if len(offers) > 1:
        raise BitportError(
            f"{kind.removesuffix('s')} {name!r} is offered by several installed distributions "
            f"({', '.join(sorted(offers))}): uninstall all but one"
        )
    try:
        return points[0].load()
    except Exception as error:
        raise BitportError(
            f"{kind.removesuffix('s')} {name!r} of the distribution {_distribution(points[0])!r} "
            f"can't be loaded ({type(error).__name__}: {error}): repair or uninstall it"
        ) from error


def summary(kind: str, name: str) -> str:
    """One line about a name: the first docstring line of a built-in, read without importing it.

    A third party's entry is told by its distribution, because finding its text would import it.
    Raises UnknownName.
    """
    if name in _builtins(kind):
        return _first_docstring_line(kind, name)
    for point in _entry_points(kind):
        if point.name == name:
            return f"offered by {_distribution(point)}"
    raise UnknownName(kind.removesuffix("s"), name, names(kind))


def _package_folders(kind: str) -> list[str]:
    """The folders of `bitport.<kind>`, found without importing it; none when there is no such package."""
    spec = find_spec(f"bitport.{kind}") if kind.isidentifier() else None
    return list(spec.submodule_search_locations or ()) if spec is not None else []


def _builtins(kind: str) -> tuple[str, ...]:
    modules = pkgutil.iter_modules(_package_folders(kind))
    return tuple(sorted(module.name for module in modules if not module.name.startswith("_")))


def _entry_points(kind: str) -> list[EntryPoint]:
    return [point for point in entry_points(group=f"bitport.{kind}") if not point.name.startswith("_")]


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value


def _first_docstring_line(kind: str, name: str) -> str:
    for folder in _package_folders(kind):
        for file in (Path(folder, f"{name}.py"), Path(folder, name, "__init__.py")):
            if file.is_file():
                text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
                return text.split("\n", 1)[0]
    return ""
