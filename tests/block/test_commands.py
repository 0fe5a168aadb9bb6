"""Commands on nodes: adding, removing, resizing, write thresholds. tests/system compares their words with QSD's."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest

from pyqsd.block import permissions as perms
from pyqsd.block.backend import BlockBackend
from pyqsd.block.driver import FUA
from pyqsd.block.events import BlockWriteThreshold

from .inprocess import Commands, run
from .overlays import overlay


def writer(qmp: Commands, name: str) -> BlockBackend:
    backend = BlockBackend(qmp.graph, "a test", perms.CONSISTENT_READ | perms.WRITE, perms.ALL)
    backend.insert(qmp.graph.find(name))
    return backend


def test_add_and_delete(tmp_path: Path) -> None:
    image = tmp_path / "a.img"
    image.write_bytes(bytes(1 << 20))

    async def test(qmp: Commands) -> None:
        await qmp.add("file", "f", filename=str(image))
        await qmp.add("raw", "r", file="f")
        assert await qmp.refused("blockdev-del", node_name="f") == "Block device f is in use"
        assert await qmp.refused("blockdev-del", node_name="x") == "Failed to find node with node-name='x'"
        await qmp("blockdev-del", node_name="r")
        await qmp("blockdev-del", node_name="f")
        assert await qmp("query-named-block-nodes") == []

    run(test)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 1}, "Cannot find device='' nor node-name=''"),
        ({"size": 1, "device": "n"}, "Cannot find device='n' nor node-name=''"),
        ({"size": -1, "node_name": "x"}, "Cannot find device='' nor node-name='x'"),
        ({"size": -1, "node_name": "n"}, "Parameter 'size' expects a >0 size"),
        ({"size": 1024, "node_name": "n", "device": "x"}, "Image format driver does not support resize"),
        ({"size": 1024, "node_name": "ro"}, "Image is read-only"),
        (
            {"size": (1 << 63) - 1, "node_name": "ro"},
            "offset(9223372036854775807) exceeds maximum(9223372035781033984)",
        ),
        ({"node_name": "n"}, "Parameter 'size' is missing"),
    ],
)
def test_resize_errors(arguments: dict[str, object], message: str) -> None:
    async def test(qmp: Commands) -> None:
        await qmp.add("null-co", "n", size=1 << 20)
        await qmp.add("raw", "ro", file="n", read_only=True)
        assert await qmp.refused("block_resize", **arguments) == message
        # Whatever went wrong, nobody holds on to the node.
        assert not qmp.graph.backends

    run(test)


def test_resize(tmp_path: Path) -> None:
    image = tmp_path / "a.img"
    image.write_bytes(b"\x11" * 65536)

    async def test(qmp: Commands) -> None:
        await qmp.add("raw", "r", file={"driver": "file", "filename": str(image)})
        await qmp("block_resize", node_name="r", size=1 << 20)
        assert image.stat().st_size == 1 << 20
        assert (await qmp.node("r"))["image"]["virtual-size"] == 1 << 20
        await qmp("block_resize", node_name="r", size=1000)
        assert image.read_bytes() == b"\x11" * 1000
        assert not qmp.graph.backends

    run(test)


def test_resize_of_a_node_that_must_not_change(tmp_path: Path) -> None:
    image = tmp_path / "a.img"
    image.write_bytes(bytes(65536))

    async def test(qmp: Commands) -> None:
        await qmp.add("raw", "r", file={"driver": "file", "filename": str(image)})
        user = BlockBackend(qmp.graph, "an unnamed block device", perms.CONSISTENT_READ, perms.ALL & ~perms.RESIZE)
        user.insert(qmp.graph.find("r"))
        assert await qmp.refused("block_resize", node_name="r", size=1 << 20) == (
            "Permission conflict on node 'r': permissions 'resize' are both required by an unnamed block device "
            "(uses node 'r' as 'root' child) and unshared by an unnamed block device (uses node 'r' as 'root' child)."
        )
        assert image.stat().st_size == 65536
        user.remove()
        await qmp("block_resize", node_name="r", size=1 << 20)

    run(test)


def test_write_threshold() -> None:
    async def test(qmp: Commands) -> None:
        await qmp.add("null-co", "n", size=1 << 20, discard="unmap")
        await qmp.add("raw", "r", file="n", discard="unmap")
        user = writer(qmp, "r")
        await qmp("block-set-write-threshold", node_name="r", write_threshold=4096)
        await qmp("block-set-write-threshold", node_name="n", write_threshold=8192)
        await user.pwritev(0, 4096, [memoryview(bytes(4096))])
        await user.preadv(0, 65536, [memoryview(bytearray(65536))])
        await user.pdiscard(65536, 4096)
        assert qmp.events == []
        assert (await qmp.node("r"))["write_threshold"] == 4096
        assert user.write_now(4096, 10, [memoryview(bytes(10))])
        assert qmp.events == [BlockWriteThreshold(node_name="r", amount_exceeded=10, write_threshold=4096)]
        # Once is enough.
        assert (await qmp.node("r"))["write_threshold"] == 0
        await user.pwrite_zeroes(8000, 1000, 0)
        assert qmp.events[1:] == [BlockWriteThreshold(node_name="n", amount_exceeded=808, write_threshold=8192)]
        await user.pwritev(0, 1 << 20, [memoryview(bytes(1 << 20))], FUA)
        assert len(qmp.events) == 2
        user.remove()

    run(test)


def test_a_threshold_that_is_taken_back() -> None:
    async def test(qmp: Commands) -> None:
        await qmp.add("null-co", "n", size=1 << 20)
        user = writer(qmp, "n")
        await qmp("block-set-write-threshold", node_name="n", write_threshold=4096)
        await qmp("block-set-write-threshold", node_name="n", write_threshold=0)
        await user.pwritev(0, 8192, [memoryview(bytes(8192))])
        assert qmp.events == []
        # The wire's type is unsigned where it is set, and signed where it is shown.
        await qmp("block-set-write-threshold", node_name="n", write_threshold=(1 << 64) - 1)
        assert (await qmp.node("n"))["write_threshold"] == -1
        assert (
            await qmp.refused("block-set-write-threshold", node_name="x", write_threshold=1) == "Device 'x' not found"
        )
        user.remove()

    run(test)


def test_reopen_is_all_or_nothing() -> None:
    async def test(qmp: Commands) -> None:
        await qmp.add("null-co", "n", size=1 << 20)
        await qmp.add("null-co", "m", size=1 << 20)
        options = [
            {"driver": "null-co", "node-name": "n", "size": 1 << 20, "read-only": True},
            {"driver": "null-co", "node-name": "m", "size": 1 << 21},
        ]
        assert await qmp.refused("blockdev-reopen", options=options) == "Cannot change the option 'size'"
        assert not (await qmp.node("n"))["ro"]
        await qmp("blockdev-reopen", options=options[:1])
        assert (await qmp.node("n"))["ro"]

    run(test)


def test_requests_wait_while_a_node_is_resized(tmp_path: Path) -> None:
    image = tmp_path / "a.img"
    image.write_bytes(bytes(65536))

    async def test(qmp: Commands) -> None:
        await qmp.add("raw", "r", file={"driver": "file", "filename": str(image)})
        user = writer(qmp, "r")
        resized = asyncio.get_running_loop().create_task(qmp("block_resize", node_name="r", size=1 << 20))
        written = [user.pwritev(offset, 4096, [memoryview(b"\x22" * 4096)]) for offset in range(0, 65536, 4096)]
        await asyncio.gather(resized, *written)
        assert image.read_bytes() == b"\x22" * 65536 + bytes((1 << 20) - 65536)
        with pytest.raises(OSError) as info:
            await user.pwritev(1 << 20, 512, [memoryview(bytes(512))])
        assert info.value.errno in (errno.EIO, errno.ENOSPC)
        user.remove()

    run(test)


def test_a_node_cannot_be_its_own_child() -> None:
    async def test(qmp: Commands) -> None:
        await qmp.add("null-co", "n")
        message = "Cannot find device='r' nor node-name='r'"
        assert await qmp.refused("blockdev-add", driver="raw", node_name="r", file="r") == message
        inner = {"driver": "raw", "file": "r"}
        assert await qmp.refused("blockdev-add", driver="raw", node_name="r", file=inner) == message
        assert list(qmp.graph.nodes) == ["n"]

    run(test)


def test_no_backing_file_in_the_old_way(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    overlay(tmp_path / "top.qcow2", "nosuch.img", "raw")

    async def test(qmp: Commands) -> None:
        await qmp.add("qcow2", "top", file={"driver": "file", "filename": f"{tmp_path}/top.qcow2"}, backing="")
        assert (await qmp.node("top"))["file"].startswith('json:{"backing": null, ')

    run(test)
    assert 'Use of "backing": "" is deprecated; use "backing": null instead' in caplog.text
