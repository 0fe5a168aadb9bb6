"""The project keeps its own rules: names, room order, sizes, what the documents claim."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import pyqsd
from pyqsd.block import registry

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "pyqsd"

#: The rooms from top to bottom: imports only go down (docs/architecture.md).
ROOMS = ["cli", "monitor", "exports", "jobs", "drivers", "block", "qom", "chardev", "crypto", "qapi", "aio", "trace"]


def test_rooms_are_in_order_everywhere() -> None:
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)
    (contract,) = project["tool"]["importlinter"]["contracts"]
    assert contract["layers"] == [f"pyqsd.{room}" for room in ROOMS]
    architecture = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| `(\w+)/` \|", architecture, re.M)
    assert rows == ROOMS
    assert sorted(ROOMS) == sorted(path.name for path in SOURCE.iterdir() if (path / "__init__.py").exists())


def test_imports_only_go_down() -> None:
    """What import-linter checks in `make lint`, without needing it."""
    wrong = []
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE).parts
        if len(parts) == 1:
            continue
        level = ROOMS.index(parts[0])
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                match = re.match(r"pyqsd\.(\w+)", name)
                if match and match[1] in ROOMS and ROOMS.index(match[1]) < level:
                    wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []


def test_only_crypto_imports_cryptography() -> None:
    for path in SOURCE.rglob("*.py"):
        if "crypto" not in path.relative_to(SOURCE).parts:
            assert not re.search(r"^\s*(import|from) cryptography\b", path.read_text(), re.M), path


def test_only_cli_reads_the_command_line() -> None:
    for path in SOURCE.rglob("*.py"):
        if path.relative_to(SOURCE).parts[0] != "cli":
            assert "sys.argv" not in path.read_text(), path


def test_files_stay_readable() -> None:
    for path in [*SOURCE.rglob("*.py"), *(ROOT / "tests").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]:
        assert path.read_text().count("\n") <= 1000, f"{path} is too long: split it by concern"


def test_nothing_is_left_unfinished() -> None:
    for path in SOURCE.rglob("*.py"):
        assert not re.search(r"\bTODO\b|\bFIXME\b|\bXXX\b", path.read_text()), path


def test_version() -> None:
    from importlib.metadata import version

    assert re.fullmatch(r"\d+\.\d+\.\d+", pyqsd.__version__)
    assert version("pyqsd") == pyqsd.__version__


# --- one name everywhere --------------------------------------------------------------------------


@pytest.mark.parametrize("driver", registry.driver_names())
def test_driver_has_page_and_test(driver: str) -> None:
    module = registry.driver_class(driver).__module__.split(".")
    assert module[:2] == ["pyqsd", "drivers"] and module[2] in ("formats", "protocols", "filters")
    assert registry.driver_class(driver).name == driver
    assert module[3] == driver.replace("-", "_")
    name = driver.replace("-", "_")
    assert (ROOT / "docs" / "drivers" / f"{name}.md").exists()
    tests = ROOT / "tests" / "drivers"
    assert (tests / f"test_{name}.py").exists() or list((tests / name).glob("test_*.py"))


def test_no_page_without_driver() -> None:
    pages = {path.stem for path in (ROOT / "docs" / "drivers").glob("*.md")}
    assert pages <= {name.replace("-", "_") for name in registry.driver_names()}


# --- documents ------------------------------------------------------------------------------------


def registered() -> dict[str, set[str]]:
    """What exists here, under the headings of docs/compatibility.md."""
    from pyqsd.chardev.registry import chardev_names
    from pyqsd.exports.export import export_types
    from pyqsd.monitor import registry as commands
    from pyqsd.qapi.command import COMMANDS, EVENTS
    from pyqsd.qom.registry import object_tags

    commands.load()
    return {
        "commands": set(COMMANDS),
        "events": set(EVENTS),
        "drivers": set(registry.driver_names()),
        "exports": set(export_types()),
        "objects": set(object_tags()),
        "chardevs": set(chardev_names()),
    }


def test_compatibility_page_is_true() -> None:
    """Every name of QSD's is listed either as there or as not yet there, and is."""
    reference = json.loads((ROOT / "tests" / "data" / "qsd-names.json").read_text())
    sections = re.split(r"^## ", (ROOT / "docs" / "compatibility.md").read_text(), flags=re.M)[1:]
    for (kind, ours), section in zip(registered().items(), sections, strict=False):
        listed = {"There": set[str](), "Not yet": set[str](), "Ours only": set[str]()}
        for paragraph in section.split("\n\n")[1:]:
            word, _, names = paragraph.partition(": ")
            listed[word] = set(re.findall(r"`([^`]+)`", names))
        assert listed["There"] == ours & set(reference[kind]), kind
        assert listed["Not yet"] == set(reference[kind]) - ours, kind
        assert listed["Ours only"] == ours - set(reference[kind]), kind


def test_links_between_documents_lead_somewhere() -> None:
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    for document in documents:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document}: {target}"


def test_manual_page_has_every_option() -> None:
    from pyqsd.cli.daemon import OPTIONS
    from pyqsd.cli.help import TEXT

    page = (ROOT / "man" / "pyqsd.1").read_text().replace("\\-", "-")
    for option in OPTIONS:
        assert f"--{option.name}" in page
        assert re.search(rf"^ .*--{option.name}\b", TEXT, re.M)


def test_start_is_light() -> None:
    """`--version` waits for nothing heavy, and the package for nothing at all."""
    script = "import sys, pyqsd.cli.daemon; print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    modules = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment
    ).stdout.split()
    for heavy in ("asyncio", "msgspec", "logging", "cryptography", "numpy", "liburing", "json", "inspect"):
        assert heavy not in modules


def test_reference_has_every_command(tmp_path: Path) -> None:
    """What `make docs` writes."""
    page = tmp_path / "reference.md"
    subprocess.run([sys.executable, "scripts/reference.py", str(page)], cwd=ROOT, check=True, capture_output=True)
    text = page.read_text()
    headings = re.findall(r"^### (.*)$", text, re.M)
    ours = registered()
    assert ours["commands"] | ours["events"] <= set(headings)
    # Every link leads to a heading, and no type is spelled as Python does.
    assert {link.lower() for link in re.findall(r"\]\(#([^)]+)\)", text)} <= {name.lower() for name in headings}
    assert not re.search(r"\| (<|typing|pyqsd\.)", text)
