"""Recipes: which steps run, with which knobs, and the exceptions to them. A TOML file, or these classes.

Reading a recipe already checks everything that can be checked without a network: every name, option and type,
with the path of the key at fault (`steps[1].granularity`).
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

import tomli_w

from bitport import registry
from bitport.errors import RecipeError, UnknownName
from bitport.recipe.check import (
    TENSOR_KEYS,
    check_step,
    check_tensor_options,
    plain_table,
    refuse_unknown,
    sorted_table,
)

SCHEMA = 1
MAX_BYTES = 2**20
MAX_DOTS = 1000

# What surrounds a `quantize` step at each effort, in order. A step that is there already is not added again.
BEFORE_QUANTIZE = ("fold",)
AFTER_QUANTIZE = {
    "plain": ("calibrate",),
    "fast": ("calibrate", "equalize", "choose_ranges", "correct_bias"),
    "balanced": ("calibrate", "equalize", "choose_ranges", "gptq", "correct_bias"),
    "best": ("calibrate", "equalize", "choose_ranges", "reconstruct", "gptq", "self_distil", "correct_bias"),
}
# Steps of no effort that have a place of their own: where a recipe has one, what follows is added behind it.
OPTIONAL_BEHIND = {"equalize": ("rotate",)}
DEFAULT_EFFORT = "fast"


@dataclass(frozen=True)
class StepSpec:
    """One step: its name and its options, which are plain TOML values."""

    use: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.use, str) or not self.use:
            raise RecipeError(f"a step's use is {self.use!r}; expected the name of a step")
        object.__setattr__(self, "options", plain_table(self.options, f"step {self.use!r}"))


@dataclass(frozen=True)
class Override:
    """An exception for the operators that fit all of `match`, `op`, `type`, `position`; the last one that fits wins.

    match: fnmatch pattern on names (`"head.*"`). op: kind of operator (`"conv"`). type: class of the module
    (`"Conv2d"`). position: "first" or "last" layer (convolution or Linear) of the network. weights, activations:
    what replaces those options of `quantize`; `{"format": "float32"}` keeps them in float.
    """

    match: str = "*"
    op: str | None = None
    type: str | None = None
    position: Literal["first", "last"] | None = None
    weights: Mapping[str, Any] | None = None
    activations: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("match", "op", "type"):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name == "match"):
                raise RecipeError(f"an override's {name} is {value!r}; expected text")
        if self.position not in (None, "first", "last"):
            raise RecipeError(f"an override's position is {self.position!r}; known: first, last")
        if self.weights is None and self.activations is None:
            raise RecipeError(f"the override of {self.match!r} changes nothing: give weights or activations")
        for name in ("weights", "activations"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, plain_table(getattr(self, name), f"override {self.match!r}"))


@dataclass(frozen=True)
class Recipe:
    """Steps in order, exceptions, and what the caller's target and data files are told.

    target: options of the runtime (`threads`, `opset`, …); the target itself checks them.
    effort: "plain", "fast", "balanced" or "best"; `expand` turns it into steps. None: "fast".
    preprocessing: how image files become inputs (`data.Preprocessing`).

    Tables are private copies of plain values (lists become tuples). Raises RecipeError for values that TOML
    can't hold. Names and options of steps are checked by `check`, which every way of reading a recipe calls.
    """

    steps: tuple[StepSpec, ...] = ()
    overrides: tuple[Override, ...] = ()
    target: Mapping[str, Any] = field(default_factory=dict)
    effort: str | None = None
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    summary: str = ""

    def __post_init__(self) -> None:
        for key, kind in (("steps", StepSpec), ("overrides", Override)):
            parts = getattr(self, key)
            if not isinstance(parts, (list, tuple)):
                raise RecipeError(f"{key} is {type(parts).__name__}; expected a list of {kind.__name__}")
            for index, part in enumerate(parts):
                if not isinstance(part, kind):
                    raise RecipeError(f"{key}[{index}] is {type(part).__name__}; expected {kind.__name__}")
            object.__setattr__(self, key, tuple(parts))
        for key in ("target", "preprocessing"):
            object.__setattr__(self, key, plain_table(getattr(self, key), key))
        for key in ("name", "summary"):
            if not isinstance(getattr(self, key), str):
                raise RecipeError(f"{key} is {getattr(self, key)!r}; expected text")
        if self.effort is not None:
            _check_effort(self.effort)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a recipe's TOML. Raises RecipeError, or UnknownName for names nobody registered."""
        if any(line.count(".") > MAX_DOTS for line in text.splitlines()):
            # the parser takes quadratic time for them
            raise RecipeError(f"a line of the recipe has more than {MAX_DOTS} dots: no key is that deep")
        try:
            table = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise RecipeError(f"the recipe is not valid TOML: {error}") from error
        except RecursionError as error:
            raise RecipeError("the recipe is nested too deeply: no option needs that") from error
        refuse_unknown(table, ("schema", *(known.name for known in fields(cls))), "")
        schema = table.pop("schema", SCHEMA)
        if type(schema) is not int or schema != SCHEMA:
            raise RecipeError(f"schema is {schema!r}; this version reads schema {SCHEMA}")
        for key in ("target", "preprocessing"):
            if not isinstance(table.get(key, {}), dict):
                raise RecipeError(f"{key} is {table[key]!r}; expected a table")
        steps = [_step(part, f"steps[{index}]") for index, part in enumerate(_tables(table, "steps"))]
        overrides = [
            _override(part, f"overrides[{index}]") for index, part in enumerate(_tables(table, "overrides"))
        ]
        recipe = cls(**{**table, "steps": tuple(steps), "overrides": tuple(overrides)})
        recipe.check()
        return recipe

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a recipe file; it is named after the file unless it says otherwise. Raises as `parse`."""
        place = Path(path)
        try:
            with place.open("rb") as file:
                content = file.read(MAX_BYTES + 1)
            if len(content) > MAX_BYTES:
                raise RecipeError(
                    f"recipe {place.name!r} is larger than {MAX_BYTES:,} bytes: it is no recipe"
                )
            recipe = cls.parse(content.decode())
        except OSError as error:
            raise RecipeError(
                f"recipe {place.name!r} can't be read ({error.strerror}): check the path"
            ) from error
        except UnicodeDecodeError as error:
            raise RecipeError(f"recipe {place.name!r} is not UTF-8: save it as such") from error
        return recipe if recipe.name else replace(recipe, name=place.stem)

    @classmethod
    def presets(cls) -> dict[str, str]:
        """The recipes that come with bitport: name → one line, sorted by name. Loads no step."""
        tables = {name: tomllib.loads(text) for name, text in _preset_texts().items()}
        return {name: table.get("summary", "") for name, table in tables.items()}

    @classmethod
    def preset(cls, name: str) -> Self:
        """A recipe that comes with bitport. Raises UnknownName listing them."""
        texts = _preset_texts()
        if name not in texts:
            raise UnknownName("recipe", name, texts)
        return replace(cls.parse(texts[name]), name=name)

    @classmethod
    def of(cls, anything: str | Path | Recipe) -> Recipe:
        """From a recipe, a preset's name, or the path of a `.toml` file. Raises as `load` and `preset`."""
        if isinstance(anything, Recipe):
            anything.check()
            return anything
        if isinstance(anything, str) and anything in _preset_texts():
            return cls.preset(anything)
        if Path(anything).suffix == ".toml":
            return cls.load(anything)
        raise UnknownName("recipe", str(anything), _preset_texts())

    def check(self) -> None:
        """Hold every name, option and type against the steps.

        Raises RecipeError or UnknownName with the path of the key.
        """
        for index, step in enumerate(self.steps):
            check_step(step.use, step.options, f"steps[{index}]")
        for index, override in enumerate(self.overrides):
            for key in TENSOR_KEYS:
                if getattr(override, key) is not None:
                    check_tensor_options(key, getattr(override, key), f"overrides[{index}].{key}")
        if self.preprocessing:
            from bitport.data import Preprocessing

            Preprocessing.parse(self.preprocessing)

    def expand(self, effort: str | None = None) -> Recipe:
        """The recipe with all its steps spelled out; expanding again changes nothing.

        `effort` wins over the recipe's own, which wins over "fast". A `quantize` step gets `fold` somewhere before it
        and after it what `AFTER_QUANTIZE` lists, unless they are there.
        Raises UnknownName for an effort or a step that isn't known.
        """
        chosen = effort or self.effort or DEFAULT_EFFORT
        _check_effort(chosen)
        steps = list(self.steps)
        for place in [index for index, step in enumerate(steps) if step.use == "quantize"][::-1]:
            after = place + 1
            for use in AFTER_QUANTIZE[chosen]:
                found = [index for index in range(after, len(steps)) if steps[index].use == use]
                if not found:
                    steps.insert(after, StepSpec(use))
                after = (found[0] if found else after) + 1
                for optional in OPTIONAL_BEHIND.get(use, ()):
                    after = next((i + 1 for i in range(after, len(steps)) if steps[i].use == optional), after)
            missing = [use for use in BEFORE_QUANTIZE if use not in [step.use for step in steps[:place]]]
            steps[place:place] = [StepSpec(use) for use in missing]
        expanded = replace(self, steps=tuple(steps), effort=chosen)
        expanded.check()
        return expanded

    def to_toml(self) -> str:
        """The recipe as TOML. Equal recipes give equal texts, and `parse` gives back an equal recipe."""
        table: dict[str, Any] = {"schema": SCHEMA}
        table |= {key: getattr(self, key) for key in ("name", "summary", "effort") if getattr(self, key)}
        table["steps"] = [{"use": step.use, **sorted_table(step.options)} for step in self.steps]
        if self.overrides:
            table["overrides"] = [
                {
                    known.name: sorted_table(value)
                    for known in fields(part)
                    if (value := getattr(part, known.name)) is not None
                }
                for part in self.overrides
            ]
        table |= {
            key: sorted_table(getattr(self, key)) for key in ("target", "preprocessing") if getattr(self, key)
        }
        return tomli_w.dumps(table)


def _check_effort(effort: Any) -> None:
    if not isinstance(effort, str) or effort not in AFTER_QUANTIZE:
        raise UnknownName("effort", str(effort), AFTER_QUANTIZE)


def _preset_texts() -> dict[str, str]:
    folder = resources.files("bitport") / "recipes"
    files = [file for file in folder.iterdir() if file.name.endswith(".toml")]
    texts = {file.name.removesuffix(".toml"): file.read_text(encoding="utf-8") for file in files}
    return dict(sorted(texts.items()))


def _step(table: Mapping[str, Any], path: str) -> StepSpec:
    if "use" not in table:
        raise RecipeError(f"{path} has no `use`: name the step, one of {', '.join(registry.names('steps'))}")
    try:
        return StepSpec(table["use"], {key: value for key, value in table.items() if key != "use"})
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error


def _override(table: Mapping[str, Any], path: str) -> Override:
    refuse_unknown(table, [known.name for known in fields(Override)], path)
    try:
        return Override(**table)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error


def _tables(table: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    value = table.get(key, [])
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        raise RecipeError(f"{key} must be written as [[{key}]] tables")
    return value
