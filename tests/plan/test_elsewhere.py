"""Narrow activations are for what layers multiply: additions, gates and attention keep 8 bits unless told otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.flow import Net, assert_exact, conv, images, prepare, ship
from torch.nn import functional as F

from bitport.errors import RecipeError, TargetError
from bitport.plan import TensorOptions
from bitport.recipe import Override, Recipe, StepSpec

NARROW = {"format": "int4"}


def gated() -> Net:
    """x → a → sigmoid · x → b; and the sum of both → c. Read by layers: x, the product, the sum."""
    torch.manual_seed(0)

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        gate = torch.sigmoid(m.a(x))
        y = m.b(gate * x)
        found: torch.Tensor = m.c(F.max_pool2d(y + x, 2))
        return found

    return Net(forward, a=conv(4, 4), b=conv(4, 4), c=conv(4, 2))


def formats(activations: dict[str, Any], overrides: Any = ()) -> dict[str, str]:
    plan = prepare(gated(), [images(8, 4)], "null", activations=activations, overrides=overrides).plan
    names = {name: plan.tie_of(name) for name in ("x", "a", "sigmoid", "mul", "b", "add")}
    return {name: str(plan.ties[tie].format) for name, tie in names.items() if tie is not None}


def test_only_what_a_layer_multiplies_is_narrow() -> None:
    wide = {"a": "int8", "sigmoid": "int8", "b": "int8"}
    assert formats(NARROW) == {"x": "int4", "mul": "int4", "add": "int4", **wide}


def test_a_recipe_may_say_what_the_others_are() -> None:
    found = formats({**NARROW, "elsewhere": "int4"})
    assert set(found.values()) == {"int4"}
    assert formats({**NARROW, "elsewhere": "int16"})["b"] == "int16"
    assert set(formats({"format": "int8"}).values()) == {"int8"}


def test_an_override_of_a_format_holds_whoever_reads_it() -> None:
    overrides = [Override("b", activations={"format": "int16"})]
    assert formats(NARROW, overrides)["b"] == "int16"
    ranged = [Override("b", activations={"range": "percentile"})]
    assert formats(NARROW, ranged)["b"] == "int8"  # which says nothing of the format


def test_every_integer_comes_out_on_the_runtime() -> None:
    x = images(16, 4)
    found = prepare(gated(), [x], weights={"format": "int4"}, activations=NARROW)
    assert_exact(ship(found, x))
    every = prepare(gated(), [x], weights={"format": "int4"}, activations={**NARROW, "elsewhere": "int4"})
    assert found.real_error(x) < every.real_error(x)


def test_a_format_that_the_target_lacks_is_refused_there_too() -> None:
    with pytest.raises(TargetError, match="int24 activations"):
        prepare(gated(), [images(8, 4)], "onnxruntime", activations={"format": "int8", "elsewhere": "int24"})


def test_words_of_a_recipe() -> None:
    step = {"weights": {"format": "int4"}, "activations": {"format": "int4", "elsewhere": "int6"}}
    recipe = Recipe((StepSpec("quantize", step),))
    recipe.check()
    assert Recipe.parse(recipe.to_toml()) == recipe
    with pytest.raises(RecipeError, match=r"steps\[0\].weights.elsewhere is unknown"):
        Recipe((StepSpec("quantize", {"weights": {"elsewhere": "int8"}}),)).check()
    with pytest.raises(RecipeError, match=r"steps\[0\].activations.format: .*int99x"):
        Recipe((StepSpec("quantize", {"activations": {"elsewhere": "int99x"}}),)).check()


def test_options_of_floats_stay() -> None:
    for kept in (
        TensorOptions("float32"),
        TensorOptions("int8"),
        TensorOptions("int16"),
        TensorOptions("e4m3"),
    ):
        assert kept.away_from_layers() is kept
