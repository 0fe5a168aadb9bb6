"""The list of modules with commands and events is complete, and each is worth its place."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pyqsd
from pyqsd.monitor.registry import MODULES, load
from pyqsd.qapi.command import COMMANDS, EVENTS


def test_every_declaration_is_loaded() -> None:
    root = Path(pyqsd.__file__).parent
    declaring = set()
    for path in root.rglob("*.py"):
        if re.search(r"(?m)^@(command|event)\(", path.read_text()):
            declaring.add("pyqsd." + ".".join(path.relative_to(root).with_suffix("").parts))
    assert declaring >= {"pyqsd.monitor.commands", "pyqsd.block.commands", "pyqsd.block.events"}
    code = "import sys; from pyqsd.monitor import registry; registry.load(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert declaring <= set(loaded.stdout.split())


def test_every_module_declares_something() -> None:
    load()
    declaring = {command.func.__module__ for command in COMMANDS.values()}
    declaring |= {event.__module__ for event in EVENTS.values()}
    assert set(MODULES) <= declaring
