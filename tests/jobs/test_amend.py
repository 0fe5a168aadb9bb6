"""The node that a job works on stays until the job has ended."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from pyqsd.drivers.formats.qcow2.driver import Qcow2
from tests.block.inprocess import Commands, run
from tests.support import images


def test_amended_node_cannot_be_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = images.create(tmp_path / "disk", "1M")

    async def test(commands: Commands) -> None:
        go_on = asyncio.Event()

        async def amend(self: Qcow2, options: Any, force: bool) -> None:
            await go_on.wait()

        monkeypatch.setattr(Qcow2, "amend", amend)
        await commands.add("qcow2", "q", file={"driver": "file", "filename": str(path)})
        await commands("x-blockdev-amend", job_id="j", node_name="q", options={"driver": "qcow2"})
        await asyncio.sleep(0)
        assert await commands.refused("blockdev-del", node_name="q") == "Node q is in use"
        go_on.set()
        await commands.daemon.jobs.find("j").wait()
        await commands("blockdev-del", node_name="q")

    run(test)
