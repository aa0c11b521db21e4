"""Names are found without importing; one import on `get`; honest errors for third parties."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bitport import registry
from bitport.errors import BitportError, UnknownName

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs a distribution that offers entry points, as pip would lay it out."""

    def install(distribution: str, group: str, entries: dict[str, str], **modules: str) -> None:
        site = tmp_path / distribution
        info = site / f"{distribution}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        lines = [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
        for module, text in modules.items():
            (site / f"{module}.py").write_text(text)
            monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.syspath_prepend(str(site))

    return install


@pytest.fixture
def kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package of built-ins with a file, a folder and two private names."""
    package = tmp_path / "house" / "gadgets"
    (package / "folder").mkdir(parents=True)
    (package / "__init__.py").write_text(
        'raise AssertionError("finding names must not import the package")\n'
    )
    (package / "plain.py").write_text('"""Plain thing.\n\nMore.\n"""\nraise AssertionError("imported")\n')
    (package / "folder" / "__init__.py").write_text('"""Folder thing."""\nraise AssertionError("imported")\n')
    (package / "silent.py").write_text("VALUE = 1\n")
    (package / "_private.py").write_text("")
    (package / "notes.txt").write_text("")
    import bitport

    monkeypatch.setattr(bitport, "__path__", [*bitport.__path__, str(package.parent)])
    monkeypatch.delitem(sys.modules, "bitport.gadgets", raising=False)
    return "gadgets"


def test_built_ins_are_found_by_file_and_folder_name_without_import(kind: str) -> None:
    assert registry.names(kind) == ("folder", "plain", "silent")


def test_summaries_come_from_docstrings_without_import(kind: str) -> None:
    assert registry.summary(kind, "plain") == "Plain thing."
    assert registry.summary(kind, "folder") == "Folder thing."
    assert registry.summary(kind, "silent") == ""


def test_get_imports_only_the_one_asked_for(kind: str, tmp_path: Path) -> None:
    (tmp_path / "house" / "gadgets" / "__init__.py").write_text("")
    assert registry.get(kind, "silent").VALUE == 1
    assert "bitport.gadgets.plain" not in sys.modules


@pytest.mark.parametrize("bad", ["_private", "notes", "../silent", "silent.x", "", "plane"])
@pytest.mark.parametrize("ask", [registry.get, registry.summary])
def test_an_unknown_name_lists_the_known(kind: str, bad: str, ask: Callable[[str, str], object]) -> None:
    with pytest.raises(UnknownName, match=r"unknown gadget .*Known: folder, plain, silent\."):
        ask(kind, bad)


@pytest.mark.parametrize("kind", ["nothing_of_the_sort", "not/a/package", "a.b"])
def test_a_kind_without_a_package_has_no_names(kind: str) -> None:
    assert registry.names(kind) == ()
    with pytest.raises(UnknownName, match="none"):
        registry.get(kind, "x")


def test_a_third_party_joins_through_an_entry_point(kind: str, install: Install) -> None:
    install("their-pkg", "bitport.gadgets", {"theirs": "their_gadget", "part": "their_gadget:VALUE"},
            their_gadget="VALUE = 42\n")  # fmt: skip
    assert registry.names(kind) == ("folder", "part", "plain", "silent", "theirs")
    assert registry.get(kind, "theirs").VALUE == 42
    assert registry.get(kind, "part") == 42
    assert registry.summary(kind, "theirs") == "offered by their-pkg"


@pytest.mark.parametrize("value", ["no_such_module_at_all", "broken_gadget", "fine_gadget:missing"])
def test_a_third_party_that_fails_to_import_is_named(kind: str, install: Install, value: str) -> None:
    install("their-pkg", "bitport.gadgets", {"theirs": value},
            broken_gadget="import no_such_sdk\n", fine_gadget="")  # fmt: skip
    assert "theirs" in registry.names(kind)
    with pytest.raises(
        BitportError, match=r"gadget 'theirs' of the distribution 'their-pkg' can't be loaded"
    ) as info:
        registry.get(kind, "theirs")
    assert info.value.__cause__ is not None


def test_a_third_party_cannot_take_over_a_built_in(kind: str, install: Install, tmp_path: Path) -> None:
    (tmp_path / "house" / "gadgets" / "__init__.py").write_text("")
    install("their-pkg", "bitport.gadgets", {"silent": "their_gadget"}, their_gadget="VALUE = 42\n")
    assert registry.names(kind).count("silent") == 1
    assert registry.get(kind, "silent").VALUE == 1


def test_two_third_parties_with_one_name_are_refused(kind: str, install: Install) -> None:
    install("one-pkg", "bitport.gadgets", {"theirs": "one_gadget"}, one_gadget="")
    install("two-pkg", "bitport.gadgets", {"theirs": "two_gadget"}, two_gadget="")
    with pytest.raises(BitportError, match="one-pkg, two-pkg"):
        registry.get(kind, "theirs")


def test_listing_the_real_targets_and_steps_imports_no_sdk() -> None:
    code = (
        "import sys; from bitport import registry\n"
        "for kind in ('targets', 'steps', 'frontends'):\n"
        "    [registry.summary(kind, name) for name in registry.names(kind)]\n"
        "ours = ('onnx', 'bitport.targets.', 'bitport.steps.')\n"
        "loaded = [name for name in sys.modules if name.startswith(ours)]\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
