"""The project keeps its own rules: names, room order, sizes, what the documents claim."""

from __future__ import annotations

import ast
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


def stems(directory: Path, pattern: str, prefix: str = "") -> set[str]:
    return {path.stem.removeprefix(prefix) for path in directory.glob(pattern)}


def module_name(driver: str) -> str:
    return registry.driver_class(driver).__module__.split(".")[4].replace("_", "-")


@pytest.mark.parametrize("driver", registry.driver_names())
def test_driver_has_page_and_test(driver: str) -> None:
    module = registry.driver_class(driver).__module__.split(".")
    assert module[:2] == ["pyqsd", "drivers"] and module[2] in ("formats", "protocols", "filters")
    assert registry.driver_class(driver).name == driver
    assert module[3] == driver.replace("-", "_")
    assert (ROOT / "docs" / "drivers" / f"{driver.replace('-', '_')}.md").exists()
    tests = ROOT / "tests" / "drivers"
    name = driver.replace("-", "_")
    assert (tests / f"test_{name}.py").exists() or list((tests / name).glob("test_*.py"))


def test_no_page_or_test_without_driver() -> None:
    names = {driver.replace("-", "_") for driver in registry.driver_names()}
    pages = stems(ROOT / "docs" / "drivers", "*.md")
    assert pages - {"README", "index"} <= names


# --- documents ------------------------------------------------------------------------------------


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
