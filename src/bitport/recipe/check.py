"""Options of a recipe: plain TOML values, held against the dataclasses that say what is allowed.

Every complaint starts with the path of the key, as `steps[1].weights.granularity`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from bitport import registry
from bitport.errors import BitportError, RecipeError, UnknownName

TENSOR_KEYS = ("weights", "activations")


def check_step(use: str, table: Mapping[str, Any], path: str) -> None:
    """Hold a step's options against the `Options` dataclass of its module.

    Raises UnknownName for an unknown step, RecipeError for unknown options and wrong types.
    """
    try:
        module = registry.get("steps", use)
    except UnknownName as error:
        raise UnknownName(f"step at {path}.use", use, error.known) from error
    options = getattr(module, "Options", None)
    if not is_dataclass(options):
        raise RecipeError(f"{path}: step {use!r} has no Options dataclass: mend that step")
    _check_fields(table, options, path)
    for key in TENSOR_KEYS:
        if isinstance(table.get(key), Mapping):
            check_tensor_options(key, table[key], f"{path}.{key}")
    try:
        options(**table)  # type: ignore[operator]
    except (BitportError, TypeError, ValueError) as error:
        raise RecipeError(f"{path}: {error}") from error


def check_tensor_options(key: str, table: Mapping[str, Any], path: str) -> None:
    """Hold a `weights` or `activations` table, which means the same in a step and in an override.

    Raises RecipeError naming the key and what is allowed.
    """
    from bitport.formats import GRANULARITIES
    from bitport.numerics import ranges
    from bitport.plan import TensorOptions

    _check_fields(
        table, TensorOptions, path, without=("dynamic", "elsewhere") if key == "weights" else ("group",)
    )
    known = GRANULARITIES if key == "weights" else ("global", "tensor")
    granularity = table.get("granularity", "tensor")
    if granularity not in known:
        raise RecipeError(f"{path}.granularity is {granularity!r}; known: {', '.join(known)}")
    try:
        options = TensorOptions(**table)
        if key == "weights":
            options.for_weights(0)
        else:
            options.for_activations()
            options.away_from_layers().for_activations()
    except BitportError as error:
        raise RecipeError(f"{path}.format: {error}") from error
    try:
        ranges.check(table.get("range", "minmax"))
    except BitportError as error:
        raise RecipeError(f"{path}.range: {error}") from error


def _check_fields(table: Mapping[str, Any], kind: Any, path: str, without: Sequence[str] = ()) -> None:
    """Hold a table against a dataclass: its keys, and the types of their values."""
    hints = get_type_hints(kind)
    allowed = [known.name for known in fields(kind) if known.init and known.name not in without]
    refuse_unknown(table, allowed, path)
    for key, value in table.items():
        _check_type(value, hints[key], f"{path}.{key}")


def _check_type(value: Any, hint: Any, path: str) -> None:
    if is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise RecipeError(f"{path} is {value!r}; expected a table")
        _check_fields(value, hint, path)
    elif not _fits(value, hint):
        raise RecipeError(f"{path} is {value!r}; expected {_spelled(hint)}")


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in arguments)
    if origin is Literal:
        return any(value == part and type(value) is type(part) for part in arguments)
    if hint is float:
        return type(value) in (int, float)
    if isinstance(hint, type) and issubclass(hint, (str, bool, int, NoneType)):
        return type(value) is hint
    container = origin or hint
    if isinstance(container, type) and issubclass(container, Mapping):
        return isinstance(value, Mapping) and all(
            _fits(part, arguments[1]) for part in value.values() if arguments
        )
    if container is tuple and arguments and arguments[-1] is not ...:
        return isinstance(value, tuple) and len(value) == len(arguments) and all(map(_fits, value, arguments))
    if isinstance(container, type) and issubclass(container, Sequence):
        return isinstance(value, tuple) and all(_fits(part, arguments[0]) for part in value if arguments)
    return isinstance(container, type) and isinstance(value, container)


def _spelled(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(_spelled(part) for part in arguments if part is not NoneType)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    container = origin or hint
    words = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}
    if container in words:
        return words[container]
    if isinstance(container, type) and issubclass(container, Mapping):
        return "a table"
    return (
        f"a list ({hint})" if isinstance(container, type) and issubclass(container, Sequence) else str(hint)
    )


def refuse_unknown(table: Mapping[str, Any], allowed: Sequence[str], path: str) -> None:
    """Raises RecipeError naming a key that is not allowed, and those that are."""
    for key in table:
        if key not in allowed:
            where = f"{path}.{key}" if path else key
            raise RecipeError(
                f"{where} is unknown; known: {', '.join(sorted(allowed)) or 'none, it has no options'}"
            )


def plain_table(value: Any, path: str) -> dict[str, Any]:
    """A private copy; lists become tuples, so that a recipe equals itself after writing and reading."""
    if not isinstance(value, Mapping):
        raise RecipeError(f"{path} is {type(value).__name__}; expected a table")
    for key in value:
        if not isinstance(key, str):
            raise RecipeError(f"{path} has the key {key!r}; keys must be text")
    return {key: _plain(part, f"{path}.{key}") for key, part in value.items()}


def _plain(value: Any, path: str) -> Any:
    if isinstance(value, Mapping):
        return plain_table(value, path)
    if isinstance(value, (list, tuple)):
        return tuple(_plain(part, f"{path}[{index}]") for index, part in enumerate(value))
    if value is None:
        raise RecipeError(f"{path} is None, which TOML doesn't have: leave the key out")
    if type(value) not in (str, bool, int, float) or (isinstance(value, float) and not math.isfinite(value)):
        raise RecipeError(
            f"{path} is {value!r}; expected text, a finite number, true or false, a list or a table"
        )
    return value


def sorted_table(value: Any) -> Any:
    """What TOML writes: tables with sorted keys, tuples as lists."""
    if isinstance(value, Mapping):
        return {key: sorted_table(value[key]) for key in sorted(value)}
    return [sorted_table(part) for part in value] if isinstance(value, tuple) else value
