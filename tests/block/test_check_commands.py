"""`x-blockdev-check`."""

from __future__ import annotations

from pathlib import Path

from pyqsd.block import permissions as perms
from pyqsd.block.backend import BlockBackend
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


def test_repair(tmp_path: Path) -> None:
    """Not while somebody may write; afterwards they can go on."""
    path = images.create(tmp_path / "a.qcow2", "1M")
    images.io(path, "write 0 128k")
    with path.open("r+b") as file:
        # The refcounts of the two clusters: too high, too low; and of one that is not in use.
        file.seek(0x20000 + 2 * 5)
        file.write(b"\0\2\0\0")
        file.seek(0x20000 + 2 * 7)
        file.write(b"\0\1")
        file.truncate(8 << 16)

    async def test(qmp: Commands) -> None:
        await qmp.add("qcow2", "q", file={"driver": "file", "filename": str(path)})
        writer = BlockBackend(qmp.graph, "an export", perms.CONSISTENT_READ | perms.WRITE, perms.ALL)
        writer.insert(qmp.graph.find("q"))
        found = await qmp("x-blockdev-check", node_name="q")
        # With two flags that do not fit the counts.
        assert (found["leaks"], found["corruptions"]) == (2, 3)
        for what in ("leaks", "all"):
            message = await qmp.refused("x-blockdev-check", node_name="q", repair=what)
            assert message == (
                "Permission conflict on node 'q': permissions 'write' are both required by an export (uses node 'q' as "
                "'root' child) and unshared by a check (uses node 'q' as 'root' child)."
            )
        writer.set_perms(perms.CONSISTENT_READ, perms.ALL)
        found = await qmp("x-blockdev-check", node_name="q", repair="leaks")
        assert (found.get("leaks"), found["leaks-fixed"], found["corruptions"]) == (None, 2, 2)
        found = await qmp("x-blockdev-check", node_name="q", repair="all")
        assert (found.get("corruptions"), found["corruptions-fixed"]) == (None, 1)
        found = await qmp("x-blockdev-check", node_name="q", repair="none")
        assert not found.keys() & {"corruptions", "leaks", "corruptions-fixed", "leaks-fixed"}
        writer.set_perms(perms.CONSISTENT_READ | perms.WRITE, perms.ALL)
        await writer.pwritev(0, 4, [memoryview(b"next")])
        writer.remove()
        assert not qmp.graph.backends

    run(test)
    images.assert_clean(path)


def test_image_in_line(tmp_path: Path) -> None:
    """One that does not open is repaired, and nothing of it stays."""
    path = images.create(tmp_path / "a.qcow2", "1M")
    images.io(path, "write 0 128k")
    with path.open("r+b") as file:
        # No refcount table.
        file.seek(56)
        file.write(bytes(4))
    image = {"driver": "qcow2", "node-name": "i", "file": {"driver": "file", "filename": str(path)}}

    async def test(qmp: Commands) -> None:
        message = "Image does not contain a reference count table"
        assert await qmp.refused("blockdev-add", **image) == message
        found = await qmp("x-blockdev-check", image=image)
        assert (found["filename"], found["format"], found["corruptions"]) == (str(path), "qcow2", 8)
        found = await qmp("x-blockdev-check", image=image, repair="all")
        assert (found.get("corruptions"), found["corruptions-fixed"]) == (None, 5)
        assert not qmp.graph.backends
        assert not qmp.graph.nodes
        await qmp("blockdev-add", **image)
        # It is in use now.
        message = await qmp.refused("x-blockdev-check", image={**image, "node-name": "j"})
        assert message == 'Failed to get shared "write" lock'
        message = "Duplicate nodes with node-name='i'"
        assert await qmp.refused("x-blockdev-check", image=image) == message
        message = "Exactly one of 'node-name' and 'image' must be specified"
        assert await qmp.refused("x-blockdev-check", node_name="i", image=image) == message
        assert await qmp.refused("x-blockdev-check") == message
        await qmp("blockdev-del", node_name="i")
        message = await qmp.refused("x-blockdev-check", image={**image, "read-only": True}, repair="all")
        assert message == "Block node is read-only"
        message = await qmp.refused("x-blockdev-check", image={"driver": "null-co", "size": 512})
        assert message == "This image format does not support checks"
        await qmp.refused("x-blockdev-check", image={"driver": "qcow2", "file": "nowhere"})
        assert not qmp.graph.nodes

    run(test)
    images.assert_clean(path)


def test_other_formats(tmp_path: Path) -> None:
    async def test(qmp: Commands) -> None:
        await qmp.add("null-co", "n", size=1 << 20)
        assert await qmp.refused("x-blockdev-check", node_name="n") == "This image format does not support checks"
        message = "Cannot find device='x' nor node-name='x'"
        assert await qmp.refused("x-blockdev-check", node_name="x") == message

    run(test)
