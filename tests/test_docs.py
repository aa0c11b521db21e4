"""What the documentation says is so: its code runs, its commands end as told, its options are those of --help."""

from __future__ import annotations

import math
import re
import runpy
import shlex
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from tests import small

from bitport import metrics, registry
from bitport.cli import cli
from bitport.data import Preprocessing
from bitport.numerics import mappings, ranges
from bitport.plan import TensorOptions
from bitport.recipe import Recipe
from bitport.recipe.model import Override
from bitport.steps import calibrate

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md"])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block. `name`: the file that its first line names."""

    language: str
    text: str

    @property
    def name(self) -> str | None:
        found = re.match(r"# (\S+\.(?:py|toml))$", self.text.split("\n", 1)[0])
        return found[1] if found else None


def blocks(page: str) -> list[Block]:
    return [Block(*found) for found in FENCE.findall((DOCS / page).read_text(encoding="utf-8"))]


def run(line: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> str:
    """One line of a `sh` block in the current folder, in this process: torch is imported but once."""
    command, *arguments = shlex.split(line)
    if command == "python":
        capfd.readouterr()
        runpy.run_path(arguments[0], run_name="__main__")
        return capfd.readouterr().out
    assert command == "bitport", f"{line!r}: the tutorial uses python and bitport only"
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, f"{line}: {result.stderr}"
    return result.stdout


def said(expected: str, output: str) -> bool:
    """Whether a line is there, numbers and spaces aside."""
    words = [re.sub(r"[\d.,−]+", "\0", re.escape(word).replace("\\.", ".")) for word in expected.split()]
    number = r"[\\d.,−]+(?:\\s*[kMG])?"
    pattern = r"\s+".join(re.sub("\0", number, word) for word in words)
    return re.search(pattern, output) is not None


def test_tutorial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    small.quick(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "digits", raising=False)
    output, ran = "", 0
    for block in blocks("tutorial.md"):
        if block.language == "python":
            assert block.name, "a file of the tutorial is named in its first line"
            (tmp_path / block.name).write_text(block.text)
        elif block.language == "sh":
            output = "\n".join(run(line, monkeypatch, capfd) for line in block.text.splitlines())
            ran += 1
        elif block.language == "text":
            for line in block.text.splitlines():
                assert said(line, output), f"the tutorial shows {line!r}; it was:\n{output}"
    assert ran == 5
    assert (tmp_path / "out/digits/report.html").exists()


def test_said_is_no_yes_man() -> None:
    assert said("top-1 98.44 % lost", "x\ntop-1    7.1 %  lost")
    assert not said("top-1 98.44 % lost", "top-1 7.1 % kept")
    assert not said("equal", "differs")


# ------------------------------------------------------------------------------------------------ commands


@pytest.mark.parametrize(("name", "command"), sorted(cli.commands.items()))
def test_a_page_tells_all_options_of_its_command_and_no_other(name: str, command: click.Command) -> None:
    text = (DOCS / "commands" / f"{name}.md").read_text(encoding="utf-8")
    help_text = CliRunner().invoke(cli, [name, "--help"]).stdout
    told = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))
    real = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", help_text))
    assert real <= told, f"{name}.md says nothing of {real - told}"
    every = {option for other in cli.commands.values() for p in other.params for option in p.opts}
    table = set(re.findall(r"^\| `(--[a-z-]+)`", text, re.MULTILINE))
    assert table == real, f"the table of {name}.md tells {table ^ real}"
    assert told <= every | {"--help", "--version"}, f"{name}.md tells of {told - every}"
    assert "xit code" in text and re.search(r"\b75\b", text)
    assert (CODES | {3} if name in ("compress", "verify", "demo", "requantize") else CODES) <= {
        int(code) for code in re.findall(r"\b(0|1|2|3|75)\b", text)
    }


CODES = {0, 1, 2, 75}


def test_list_page_tells_every_kind() -> None:
    (argument,) = (p for p in cli.commands["list"].params if isinstance(p, click.Argument))
    assert isinstance(argument.type, click.Choice)
    text = (DOCS / "commands" / "list.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)`", text, re.MULTILINE)) == set(argument.type.choices)


@pytest.mark.parametrize("name", sorted([*cli.commands, ""]))
def test_help_fits_80_columns(name: str) -> None:
    found = CliRunner().invoke(cli, [*([name] if name else []), "--help"], terminal_width=80).stdout
    assert found and all(len(line) <= 80 for line in found.splitlines())


# ------------------------------------------------------------------------------------------------ pages


def test_recipes_page_tells_every_key() -> None:
    text = (DOCS / "recipes.md").read_text(encoding="utf-8")
    kinds: tuple[Any, ...] = (Recipe, Override, TensorOptions, Preprocessing, calibrate.Options)
    keys = {field.name for kind in kinds for field in fields(kind)}
    keys |= set(registry.names("steps")) | set(Recipe.presets())
    for target in registry.names("targets"):
        keys |= set(registry.get("targets", target).TARGET.defaults)
    missing = {key for key in keys if f"`{key}" not in text and f"{key} =" not in text}
    assert not missing, f"recipes.md says nothing of {sorted(missing)}"


@pytest.mark.parametrize(
    "page", ["ranges.md", "recipes.md", "why-did-my-accuracy-drop.md", "why-is-my-int8-not-faster.md"]
)
def test_recipes_that_are_shown_are_valid(page: str) -> None:
    found = [block for block in blocks(page) if block.language == "toml"]
    assert found
    for block in found:
        Recipe.parse(block.text).expand()


def test_metrics_page_tells_every_metric() -> None:
    text = (DOCS / "metrics-and-data.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == set(metrics.known())


def test_ranges_page_tells_every_estimator_and_mapping() -> None:
    text = (DOCS / "ranges.md").read_text(encoding="utf-8")
    first = text[text.index("| `range =`") : text.index("## What each does")]
    assert set(re.findall(r"^\| `(\w+)` \|", first, re.MULTILINE)) == set(ranges.known())
    second = text[text.index("| mapping |") :]
    made = {
        name
        for name, value in vars(mappings).items()
        if getattr(value, "__module__", "") == mappings.__name__
    }
    public = {name for name in made if name[0] not in "_M"}
    assert set(re.findall(r"^\| `(\w+)` \|", second, re.MULTILINE)) == public


def test_ranges_page_figures_are_measured() -> None:
    """Recomputed with the page's own functions; a tenth of a dB may go to rounding and to another torch."""
    scope: dict[str, Any] = {}
    exec(next(block.text for block in blocks("ranges.md") if block.language == "python"), scope)
    text, row = (
        (DOCS / "ranges.md").read_text(encoding="utf-8"),
        r"^\| `(\w+)`(?:, q = ([\d.]+))? \|([-\d. |]+)\|$",
    )
    tables = re.findall(r"^\| (int\d) \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert [name for name, _ in tables] == ["int8", "int4"]
    for fmt, table in tables:
        found = re.findall(row, table, re.MULTILINE)
        assert {name for name, _, _ in found} == set(ranges.known()) - {"fixed", "given"}
        for name, q, figures in found:
            spec = {"use": name, "q": float(q)} if q else name
            for values, said in zip(("usual", "spoilt", "relu", "sparse"), figures.split("|"), strict=True):
                judged = scope["usual" if values == "spoilt" else values]
                noise = scope["noise"](judged, scope["chosen"](scope[values], spec, fmt), fmt)
                decibels = 10 * math.log10(float(judged.double().square().mean()) / noise)
                assert float(said) == pytest.approx(decibels, abs=0.15), (fmt, name, values)


def test_ranges_page_code_runs() -> None:
    found = [block.text for block in blocks("ranges.md") if block.language == "python"]
    assert len(found) >= 10
    scope: dict[str, Any] = {}
    for text in found:
        exec(compile(text, "ranges.md", "exec"), scope)


def test_metrics_page_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = 0
    for block in blocks("metrics-and-data.md"):
        if block.language == "python":
            exec(compile(block.text, "metrics-and-data.md", "exec"), {})
            ran += 1
    assert ran >= 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8")):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_index_leads_to_every_page() -> None:
    text = (DOCS / "README.md").read_text(encoding="utf-8")
    for page in DOCS.rglob("*.md"):
        name = page.relative_to(DOCS).as_posix()
        if name != "README.md" and not name.startswith("adr/"):
            assert name in text, f"docs/README.md doesn't mention {name}"
