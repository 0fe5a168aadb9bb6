"""`x-blockdev-check`."""

from __future__ import annotations

from pathlib import Path

from tests.support import images

from .inprocess import Commands, run


def test_check(tmp_path: Path) -> None:
    path = images.create(tmp_path / "a.qcow2", "1M")
    images.io(path, "write 0 128k")

    async def test(qmp: Commands) -> None:
        await qmp.add("qcow2", "q", file={"driver": "file", "filename": str(path)})
        found = await qmp("x-blockdev-check", node_name="q")
        assert found == {
            "filename": str(path),
            "format": "qcow2",
            "check-errors": 0,
            "image-end-offset": 458752,
            "total-clusters": 16,
            "allocated-clusters": 2,
        }
        assert not qmp.graph.backends

    run(test)


def test_other_formats(tmp_path: Path) -> None:
    async def test(qmp: Commands) -> None:
        await qmp.add("null-co", "n", size=1 << 20)
        assert await qmp.refused("x-blockdev-check", node_name="n") == "This image format does not support checks"
        message = "Cannot find device='x' nor node-name='x'"
        assert await qmp.refused("x-blockdev-check", node_name="x") == message

    run(test)
