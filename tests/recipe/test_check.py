"""Options are held against the types of a step's dataclass, whatever they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from bitport import registry
from bitport.errors import RecipeError
from bitport.recipe import Recipe, StepSpec
from bitport.recipe.check import check_tensor_options


@dataclass(frozen=True)
class Inner:
    depth: int = 1


@dataclass(frozen=True)
class Options:
    text: str = ""
    count: int = 0
    share: float = 0.0
    flag: bool = False
    maybe: int | None = None
    either: str | Mapping[str, Any] = ""
    mode: Literal["a", "b"] = "a"
    sizes: tuple[int, ...] = ()
    pair: tuple[int, str] = (0, "")
    names: Sequence[str] = ()
    numbers: list[float] = field(default_factory=list)
    table: Mapping[str, int] = field(default_factory=dict)
    plain: dict = field(default_factory=dict)  # type: ignore[type-arg]
    inner: Inner = Inner()
    anything: Any = None

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError("count must not be negative")


@pytest.fixture(autouse=True)
def _their_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "get", lambda kind, name: SimpleNamespace(**STEPS[name]))


STEPS: dict[str, dict[str, Any]] = {"theirs": {"Options": Options}, "bare": {}, "odd": {"Options": dict}}


@pytest.mark.parametrize(
    "options",
    [
        {"text": "a", "count": 1, "share": 0.5, "flag": True},
        {"share": 1},
        {"maybe": 3},
        {"either": "a"},
        {"either": {"use": "b", "q": 1}},
        {"mode": "b"},
        {"sizes": [1, 2]},
        {"pair": [1, "a"]},
        {"names": ["a"], "numbers": [1, 0.5], "table": {"a": 1}, "plain": {"a": "b"}},
        {"inner": {"depth": 2}},
        {"anything": [1, "a", {"b": True}]},
    ],
)
def test_right_values_pass(options: dict[str, Any]) -> None:
    Recipe((StepSpec("theirs", options),)).check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": 1}, r"steps\[0\]\.text is 1; expected text"),
        ({"count": 1.0}, r"count is 1\.0; expected a whole number"),
        ({"count": True}, "count is True"),
        ({"share": "0.5"}, "expected a number"),
        ({"share": True}, "expected a number"),
        ({"flag": 1}, "expected true or false"),
        ({"maybe": "3"}, "expected a whole number"),
        ({"either": 3}, "expected text or a table"),
        ({"mode": "c"}, "expected 'a' or 'b'"),
        ({"sizes": [1, "2"]}, "expected a list"),
        ({"sizes": 1}, "expected a list"),
        ({"pair": [1]}, "expected a list"),
        ({"pair": ["a", 1]}, "expected a list"),
        ({"names": "ab"}, "expected a list"),
        ({"numbers": ["a"]}, "expected a list"),
        ({"table": {"a": "b"}}, "expected a table"),
        ({"plain": [1]}, "expected a table"),
        ({"inner": 1}, "inner is 1; expected a table"),
        ({"inner": {"deep": 1}}, r"steps\[0\]\.inner\.deep is unknown; known: depth"),
        ({"inner": {"depth": "1"}}, r"steps\[0\]\.inner\.depth is '1'"),
        ({"count": -1}, r"steps\[0\]: count must not be negative"),
    ],
)
def test_wrong_values_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe((StepSpec("theirs", options),)).check()


@pytest.mark.parametrize("name", ["bare", "odd"])
def test_a_step_without_options_class_is_named(name: str) -> None:
    with pytest.raises(RecipeError, match=f"step '{name}' has no Options dataclass"):
        Recipe((StepSpec(name),)).check()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"use": "fixed", "low": 0.0}, "lacks high"),
        ({"use": "percentile", "q": 20}, "above 50"),
        ({"use": "moving_average", "momentum": 2}, "below 1"),
        ({"use": "mean_std", "k": 0}, "above 0"),
        ("kl", "entropy"),
    ],
)
def test_a_range_that_cannot_be_is_refused_with_the_recipe(spec: object, message: str) -> None:
    for key in ("weights", "activations"):
        with pytest.raises(RecipeError, match=rf"steps\[0\]\.{key}\.range.*{message}"):
            check_tensor_options(key, {"range": spec}, f"steps[0].{key}")
