"""Recipes read, refuse, expand and write back; presets are whole."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitport.errors import RecipeError, UnknownName
from bitport.recipe import Override, Recipe, StepSpec

TEXT = """
summary = "mine"
effort = "fast"
[[steps]]
use = "quantize"
weights = {format = "int8", granularity = "channel", range = {use = "percentile", q = 99.9}, symmetric = true}
activations = {format = "int8", range = "mse", symmetric = false}
[[steps]]
use = "calibrate"
batches = 8
[[overrides]]
match = "head.*"
weights = {format = "float32"}
[[overrides]]
op = "conv"
type = "Conv2d"
activations = {format = "uint8", range = "minmax"}
[target]
threads = 1
io = "float"
sizes = [1, 2]
[preprocessing]
size = [4, 5]
mean = 0.5
"""


QUANTIZE = "[[steps]]\nuse = 'quantize'\n"
CALIBRATE = "[[steps]]\nuse = 'calibrate'\n"


def uses(recipe: Recipe) -> list[str]:
    return [step.use for step in recipe.steps]


def chain(*names: str, effort: str | None = None) -> Recipe:
    return Recipe(tuple(StepSpec(name) for name in names), effort=effort)


class TestParse:
    def test_everything(self) -> None:
        recipe = Recipe.parse(TEXT)
        assert uses(recipe) == ["quantize", "calibrate"]
        assert recipe.steps[0].options["weights"]["range"] == {"use": "percentile", "q": 99.9}
        assert recipe.steps[1] == StepSpec("calibrate", {"batches": 8})
        assert recipe.overrides[0] == Override("head.*", weights={"format": "float32"})
        assert (recipe.overrides[1].match, recipe.overrides[1].op, recipe.overrides[1].type) == (
            "*",
            "conv",
            "Conv2d",
        )
        assert recipe.target == {"threads": 1, "io": "float", "sizes": (1, 2)}
        assert recipe.preprocessing == {"size": (4, 5), "mean": 0.5}
        assert (recipe.effort, recipe.name, recipe.summary) == ("fast", "", "mine")

    def test_an_empty_one(self) -> None:
        assert Recipe.parse("") == Recipe()

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("stepz = 1", "stepz is unknown; known: effort, name, overrides, preprocessing, schema, steps"),
            ("schema = 2", "schema is 2; this version reads schema 1"),
            ("schema = true", "schema is True"),
            ("[steps]\nuse = 'quantize'", r"steps must be written as \[\[steps\]\]"),
            ("steps = [1]", r"\[\[steps\]\]"),
            ("overrides = 'x'", r"\[\[overrides\]\]"),
            ("[[steps]]\nbatches = 1", r"steps\[0\] has no `use`: name the step, one of .*quantize"),
            ("[[steps]]\nuse = 3", r"steps\[0\]: a step's use is 3"),
            ("[[steps]]\nuse = 'fold'\n[[steps]]\nuse = 'quantize'\ngranularity = 'tensor'",
             r"steps\[1\]\.granularity is unknown; known: activations, weights"),
            ("[[steps]]\nuse = 'fold'\nx = 1", r"steps\[0\]\.x is unknown; known: none, it has no options"),
            (CALIBRATE + "batches = '8'", r"steps\[0\]\.batches is '8'; expected a whole number"),
            (CALIBRATE + "batches = true", r"steps\[0\]\.batches is True"),
            (CALIBRATE + "batches = 8.0", r"steps\[0\]\.batches is 8\.0"),
            (QUANTIZE + "weights = 'int8'", r"steps\[0\]\.weights is 'int8'; expected a table"),
            (QUANTIZE + "weights = {formt = 'int8'}",
             r"steps\[0\]\.weights\.formt is unknown; known: format, granularity, group, range, symmetric"),
            (QUANTIZE + "activations = {granularity = 'channel'}",
             r"steps\[0\]\.activations\.granularity is 'channel'; known: global, tensor"),
            (QUANTIZE + "weights = {format = 8}", r"weights\.format is 8; expected text"),
            (QUANTIZE + "weights = {format = 'int0'}", r"steps\[0\]\.weights\.format: .*int0"),
            (QUANTIZE + "weights = {granularity = 'row'}", "'row'; known: global, tensor, channel, group"),
            (QUANTIZE + "weights = {symmetric = 1}", "symmetric is 1; expected true or false"),
            (QUANTIZE + "activations = {range = 'mze'}", r"activations\.range: .*'mze'.*mse"),
            (QUANTIZE + "activations = {range = {use = 'percentile', p = 1}}",
             r"activations\.range: .*p"),
            ("[[overrides]]\nmatch = 'a'", "'a' changes nothing"),
            ("[[overrides]]\nmatch = 1\nweights = {}", r"overrides\[0\]: an override's match is 1"),
            ("[[overrides]]\nop = 1\nweights = {}", "op is 1"),
            ("[[overrides]]\nname = 'a'\nweights = {}", r"overrides\[0\]\.name is unknown; known: activ"),
            ("[[overrides]]\nweights = 'float32'", r"overrides\[0\]: .*expected a table"),
            ("[[overrides]]\nweights = {format = 'floaty'}", r"overrides\[0\]\.weights\.format"),
            ("target = 'onnxruntime'", "target is 'onnxruntime'; expected a table"),
            ("preprocessing = []", "preprocessing is"),
            ("[preprocessing]\nsizes = 3", r"preprocessing\.sizes is unknown"),
            ("name = 3", "name is 3"),
            ("[target]\nx = nan", r"target\.x is nan"),
            ("[target]\nx = 2020-01-01", r"target\.x is datetime"),
            ("[[steps]\n", "not valid TOML.*line 1"),
            ("a = " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ],
    )  # fmt: skip
    def test_what_is_wrong_is_named_with_its_path(self, text: str, message: str) -> None:
        with pytest.raises(RecipeError, match=message):
            Recipe.parse(text)

    def test_unknown_steps_and_efforts(self) -> None:
        with pytest.raises(
            UnknownName, match=r"step at steps\[0\]\.use 'quantise'\. Did you mean 'quantize'\?"
        ):
            Recipe.parse("[[steps]]\nuse = 'quantise'")
        with pytest.raises(UnknownName, match=r"effort 'bests'.*Known: balanced, best, fast"):
            Recipe.parse("effort = 'bests'")
        for effort in ("3", "['fast']"):
            with pytest.raises(UnknownName):
                Recipe.parse(f"effort = {effort}")


class TestPython:
    def test_tables_are_private_copies(self) -> None:
        weights: dict[str, Any] = {"format": "int8"}
        step = StepSpec("quantize", {"weights": weights, "list": [1, [2]]})
        weights["format"] = "int4"
        assert step.options == {"weights": {"format": "int8"}, "list": (1, (2,))}
        recipe = Recipe((step,), target={"threads": 1})
        assert copy.deepcopy(recipe) == recipe

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: Recipe(steps=("quantize",)), r"steps\[0\] is str; expected StepSpec"),  # type: ignore[arg-type]
            (lambda: Recipe(steps="quantize"), "steps is str"),  # type: ignore[arg-type]
            (lambda: Recipe(overrides=({},)), r"overrides\[0\] is dict"),  # type: ignore[arg-type]
            (lambda: StepSpec("calibrate", {"batches": None}), "batches is None.*leave the key out"),
            (lambda: StepSpec("calibrate", {1: 2}), "key 1"),  # type: ignore[dict-item]
            (lambda: StepSpec("x", {"p": Path("a")}), r"step 'x'\.p is"),
            (lambda: StepSpec(""), "use is ''"),
            (lambda: Recipe(target={"a": [float("inf")]}), r"target\.a\[0\] is inf"),
        ],
    )
    def test_what_toml_cannot_hold(self, make: Any, message: str) -> None:
        with pytest.raises(RecipeError, match=message):
            make()

    def test_the_last_check_comes_with_use(self) -> None:
        recipe = chain("no_such_step")
        for read in (recipe.check, recipe.expand, lambda: Recipe.of(recipe)):
            with pytest.raises(UnknownName, match="no_such_step"):
                read()


class TestWriting:
    def test_reads_back_equal_and_sorted(self) -> None:
        recipe = Recipe.parse(TEXT)
        text = recipe.to_toml()
        assert text.startswith("schema = 1\n")
        assert Recipe.parse(text) == recipe
        step = StepSpec("quantize", dict(reversed(recipe.steps[0].options.items())))
        again = Recipe((step, *recipe.steps[1:]), recipe.overrides, recipe.target, recipe.effort,
                       recipe.preprocessing, recipe.name, recipe.summary)  # fmt: skip
        assert again.to_toml() == text

    def test_an_empty_one(self) -> None:
        assert Recipe().to_toml() == "schema = 1\nsteps = []\n"

    @given(
        st.recursive(
            st.booleans()
            | st.integers(-(2**63), 2**63 - 1)
            | st.floats(allow_nan=False, allow_infinity=False)
            | st.text(st.characters(exclude_categories=["Cs"])),
            lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=4), part, max_size=3),
            max_leaves=8,
        ),
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
    )  # fmt: skip
    def test_any_plain_value_survives(self, value: Any, match: str) -> None:
        recipe = Recipe(
            overrides=(Override(match, weights={"format": "float32"}),),
            target={"value": value},
            summary=match,
        )
        again = Recipe.parse(recipe.to_toml())
        assert again == recipe
        assert (
            repr(again.target) == repr(Recipe(target={"value": value}).target)
            or again.target == recipe.target
        )


FAST = ["fold", "quantize", "calibrate", "equalize", "choose_ranges", "correct_bias"]
FULL = ["fold", "quantize", "calibrate", "equalize", "choose_ranges", "gptq", "correct_bias"]


class TestExpand:
    @pytest.mark.parametrize(
        ("steps", "effort", "expected"),
        [
            (["quantize"], None, FAST),
            (["quantize"], "fast", FAST),
            (["fold", "quantize", "calibrate"], "fast", FAST),
            (["quantize", "fold", "calibrate"], "fast", ["fold", "quantize", "fold", *FAST[2:]]),
            (["calibrate", "quantize"], "fast", ["calibrate", *FAST]),
            (["quantize"], "plain", ["fold", "quantize", "calibrate"]),
            (["fold"], "fast", ["fold"]),
            ([], "fast", []),
        ],
    )
    def test_what_surrounds_quantize(self, steps: list[str], effort: str | None, expected: list[str]) -> None:
        expanded = chain(*steps).expand(effort)
        assert uses(expanded) == expected
        assert expanded.effort == (effort or "fast")
        assert expanded.expand() == expanded

    @pytest.fixture
    def more_steps(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Steps of a third party, in case they are not among bitport's."""
        from bitport import registry

        have = registry.get
        (tmp_path / "their_step.py").write_text(
            "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass Options: pass\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        import their_step  # type: ignore[import-not-found]

        added = ("correct_bias", "equalize", "gptq", "reconstruct")
        monkeypatch.setattr(
            registry, "get", lambda kind, name: their_step if name in added else have(kind, name)
        )

    @pytest.mark.parametrize(
        ("steps", "expected"),
        [
            (["quantize"], FULL),
            (["quantize", "calibrate", "gptq"], FULL),
            (["quantize", "gptq", "calibrate"],
             ["fold", "quantize", "gptq", *FULL[2:]]),
            (["quantize", "correct_bias"], FULL),
            (["quantize", "calibrate", "gptq", "correct_bias"], FULL),
        ],
    )  # fmt: skip
    def test_balanced_effort_adds_steps(
        self, more_steps: None, steps: list[str], expected: list[str]
    ) -> None:
        expanded = chain(*steps, effort="balanced").expand()
        assert uses(expanded) == expected
        assert expanded.expand("balanced") == expanded

    @pytest.mark.parametrize(
        "steps",
        [["quantize", "rotate"], ["quantize", "calibrate", "rotate"], ["quantize", "equalize", "rotate"]],
    )
    def test_steps_of_no_effort_keep_their_place(self, steps: list[str]) -> None:
        expanded = chain(*steps, effort="balanced").expand()
        assert uses(expanded) == [*FULL[:4], "rotate", *FULL[4:]]
        assert expanded.expand() == expanded

    def test_best_effort_learns_before_it_solves(self, more_steps: None) -> None:
        expanded = chain("quantize", effort="best").expand()
        assert uses(expanded) == [*FULL[:5], "reconstruct", "gptq", "self_distil", "correct_bias"]
        assert expanded.expand("best") == expanded

    def test_the_caller_wins(self, more_steps: None) -> None:
        assert uses(chain("quantize", effort="best").expand("fast")) == FAST
        with pytest.raises(UnknownName, match="effort 'most'"):
            chain("quantize").expand("most")

    def test_options_stay(self) -> None:
        recipe = Recipe.parse(TEXT)
        expanded = recipe.expand()
        assert expanded.steps[1:3] == recipe.steps
        assert expanded.overrides == recipe.overrides


class TestPresets:
    def test_each_reads_expands_and_writes(self) -> None:
        presets = Recipe.presets()
        assert list(presets) == sorted(presets)
        assert {"float", "int8", "int8-minmax"} <= set(presets)
        for name, summary in presets.items():
            recipe = Recipe.preset(name)
            assert (recipe.name, recipe.summary) == (name, summary)
            assert len(summary) > 20
            assert Recipe.parse(recipe.expand().to_toml()) == recipe.expand()

    def test_int8(self) -> None:
        (step,) = Recipe.preset("int8").steps
        assert step.use == "quantize"
        assert step.options["weights"] == {"format": "int8", "granularity": "channel"}
        assert step.options["activations"] == {"format": "int8", "range": "mse"}
        assert Recipe.preset("int8-minmax").steps[0].options["activations"]["range"] == "minmax"
        assert Recipe.preset("float").expand().steps == ()

    def test_listing_them_loads_no_step(self) -> None:
        code = (
            "import sys; from bitport.recipe import Recipe; assert Recipe.presets()\n"
            "loaded = [name for name in sys.modules if name.startswith(('bitport.steps', 'onnx'))]\n"
            "assert not loaded, loaded\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


class TestOf:
    def test_a_recipe_a_name_and_a_path(self, tmp_path: Path) -> None:
        recipe = Recipe.parse(TEXT)
        (tmp_path / "mine.toml").write_text(TEXT)
        assert Recipe.of(recipe) is recipe
        assert Recipe.of("int8") == Recipe.preset("int8")
        for path in (tmp_path / "mine.toml", str(tmp_path / "mine.toml")):
            assert Recipe.of(path).name == "mine"
            assert Recipe.of(path).steps == recipe.steps

    def test_unknown_names_list_the_presets(self) -> None:
        with pytest.raises(
            UnknownName, match=r"recipe 'int-8'\. Did you mean 'int8'\? Known: .*, float, .*int8,"
        ):
            Recipe.of("int-8")

    def test_files_that_cannot_be_read(self, tmp_path: Path) -> None:
        (tmp_path / "latin.toml").write_bytes('name = "é"'.encode("latin-1"))
        (tmp_path / "big.toml").write_text("#" * 2**21)
        (tmp_path / "wrong.toml").write_text("steps = 1")
        for name, message in (("absent", "No such file"), ("latin", "not UTF-8"), ("big", "larger than"),
                              ("wrong", r"\[\[steps\]\]")):  # fmt: skip
            with pytest.raises(RecipeError, match=message):
                Recipe.of(tmp_path / f"{name}.toml")
