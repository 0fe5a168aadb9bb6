"""The modules that declare commands and events."""

from __future__ import annotations

import importlib

#: Importing these declares everything (`pyqsd.qapi.command.COMMANDS` and ``EVENTS``).
MODULES = (
    "pyqsd.block.commands",
    "pyqsd.block.graph_commands",
    "pyqsd.block.snapshot",
    "pyqsd.block.snapshot_sync",
    "pyqsd.block.bitmap_commands",
    "pyqsd.block.check_commands",
    "pyqsd.block.internal_snapshots",
    "pyqsd.block.queries",
    "pyqsd.block.events",
    "pyqsd.jobs.commands",
    "pyqsd.jobs.block_job_commands",
    "pyqsd.jobs.stream",
    "pyqsd.jobs.create",
    "pyqsd.jobs.amend",
    "pyqsd.jobs.backup_commands",
    "pyqsd.jobs.transaction",
    "pyqsd.jobs.mirror_commands",
    "pyqsd.jobs.commit",
    "pyqsd.exports.commands",
    "pyqsd.exports.nbd.commands",
    "pyqsd.qom.commands",
    "pyqsd.chardev.commands",
    "pyqsd.monitor.commands",
)


def load() -> None:
    """Import all of `MODULES`."""
    for module in MODULES:
        importlib.import_module(module)
