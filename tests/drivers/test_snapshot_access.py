"""``snapshot-access``: the past as it is read by real clients, over NBD, while others write.

That it stays what it was is tested with ``copy-before-write``; what it answers is compared with QSD in
tests/system/test_differential_fleecing.py.
"""

from __future__ import annotations

import errno
import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.support import peers
from tests.support.daemon import DaemonProcess
from tests.support.nbd import NbdClient

from . import opening
from .opening import graph, read, run, use, write
from .test_copy_before_write import CLUSTER, SIZE, before, images, pair

__all__ = ["images"]


def test_what_nobody_needs_any_more(images: Path) -> None:
    """Discarding a part of the past: it is not copied, it cannot be read, and its space is given back."""

    async def main() -> None:
        async with graph() as g:
            node, past = await pair(g, images)
            user = use(g, node)
            old = use(g, await opening.add(g, node_name="a", driver="snapshot-access", file="node", discard="unmap"))
            await write(user, CLUSTER, b"x" * 2 * CLUSTER)
            await old.pdiscard(1, 2 * CLUSTER)
            assert past.access.count == SIZE - CLUSTER
            with pytest.raises(OSError) as info:
                await read(old, CLUSTER, 1)
            assert info.value.errno == errno.EACCES
            with pytest.raises(OSError):
                await old.block_status_above(None, 0, SIZE)
            assert await read(old, 0, CLUSTER) == before()[:CLUSTER]
            assert await read(old, 2 * CLUSTER, SIZE - 2 * CLUSTER) == before()[2 * CLUSTER :]
            assert await read(g.nodes["t"], CLUSTER, CLUSTER) == bytes(CLUSTER)
            await old.pdiscard(5 * CLUSTER, 4 * CLUSTER)
            assert user.write_now(5 * CLUSTER, 4 * CLUSTER, [memoryview(bytearray(b"y" * 4 * CLUSTER))]) or True
            await write(user, 5 * CLUSTER, b"y" * 4 * CLUSTER)
            assert await read(g.nodes["t"], 5 * CLUSTER, 4 * CLUSTER) == bytes(4 * CLUSTER)

    run(main)


@pytest.mark.parametrize("client", ["nbdcopy", "qemu-img"])
def test_pulled_by_a_real_client(client: str, tmp_path: Path) -> None:
    """An incremental backup that is pulled: what has changed, as it was when the filter was put in, while a guest goes
    on writing."""
    rnd = random.Random(client)
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", "s.qcow2", "8M", cwd=tmp_path)
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", "t.qcow2", "8M", cwd=tmp_path)
    disk = bytearray(8 << 20)
    sock = tmp_path / "nbd.sock"

    def write_some(nbd: NbdClient) -> None:
        for _ in range(40):
            at, length = rnd.randrange(8 << 20), rnd.choice((512, 4096, 100_000))
            piece = rnd.randbytes(min(length, len(disk) - at))
            nbd.pwrite(at, piece)
            disk[at : at + len(piece)] = piece

    with DaemonProcess("pyqsd", workdir=tmp_path) as daemon:
        qmp = daemon.qmp
        for name in ("s", "t"):
            below = {"driver": "file", "filename": f"{name}.qcow2"}
            qmp.execute("blockdev-add", driver="qcow2", node_name=name, file=below)
        qmp.execute("nbd-server-start", addr={"type": "unix", "data": {"path": "nbd.sock"}})
        # First the disk gets its content, and then some changes that a bitmap records.
        qmp.execute("block-export-add", type="nbd", id="e", node_name="s", writable=True)
        with NbdClient(sock, "s") as nbd:
            write_some(nbd)
            base = bytes(disk)
            qmp.execute("block-dirty-bitmap-add", node="s", name="changes")
            write_some(nbd)
            nbd.disconnect()
        qmp.execute("block-export-del", id="e", mode="hard")
        qmp.wait_event("BLOCK_EXPORT_DELETED")
        # The point in time.
        qmp.execute("block-dirty-bitmap-add", node="s", name="new")
        qmp.execute("block-dirty-bitmap-disable", node="s", name="changes")
        bitmap = {"node": "s", "name": "changes"}
        qmp.execute("blockdev-add", driver="copy-before-write", node_name="c", file="s", target="t", bitmap=bitmap)
        qmp.execute("blockdev-add", driver="snapshot-access", node_name="a", file="c")
        past = bytes(disk)
        qmp.execute("block-export-add", type="nbd", id="guest", node_name="c", writable=True)
        qmp.execute("block-export-add", type="nbd", id="backup", node_name="a", bitmaps=[bitmap])
        uri = f"nbd+unix:///a?socket={sock}"
        with NbdClient(sock, "c") as nbd:
            write_some(nbd)
            dirty = _dirty(uri)
            write_some(nbd)
            result = bytearray(base)
            with NbdClient(sock, "a") as backup:
                for start, length in dirty:
                    result[start : start + length] = backup.pread(start, length)
                    write_some(nbd)
                backup.disconnect()
            assert result == past
            nbd.disconnect()
        # Without a bitmap all of it can be pulled.
        qmp.execute("block-export-del", id="guest", mode="hard")
        qmp.wait_event("BLOCK_EXPORT_DELETED")
        qmp.execute("block-export-del", id="backup", mode="hard")
        qmp.wait_event("BLOCK_EXPORT_DELETED")
        for name in ("a", "c"):
            qmp.execute("blockdev-del", node_name=name)
        qmp.execute("blockdev-add", driver="copy-before-write", node_name="c", file="s", target="t")
        qmp.execute("blockdev-add", driver="snapshot-access", node_name="a", file="c")
        past = bytes(disk)
        for node in ("a", "c"):
            qmp.execute("block-export-add", type="nbd", id=node, node_name=node, writable=node == "c")
        with NbdClient(sock, "c") as nbd:
            write_some(nbd)
            _pull(client, uri, tmp_path / "out.img")
            write_some(nbd)
            assert (tmp_path / "out.img").read_bytes() == past
            assert nbd.pread(0, len(disk)) == disk
            nbd.disconnect()
    peers.run("qemu-img", "check", "-q", tmp_path / "t.qcow2")
    peers.run("qemu-img", "check", "-q", tmp_path / "s.qcow2")


def _dirty(uri: str) -> list[tuple[int, int]]:
    out = peers.run("nbdinfo", "--json", "--map=qemu:dirty-bitmap:changes", uri).stdout
    extents: list[dict[str, Any]] = json.loads(out)
    return [(extent["offset"], extent["length"]) for extent in extents if extent["type"] == 1]


def _pull(client: str, uri: str, out: Path) -> None:
    if client == "nbdcopy":
        peers.run("nbdcopy", uri, out)
    else:
        peers.run("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, out)


def test_the_filter_of_a_job_that_copies_only_a_part(tmp_path: Path) -> None:
    """What was overwritten and is not part of the backup cannot be read any more, and nothing else is shown instead."""
    from tests.block.inprocess import Commands
    from tests.block.inprocess import run as with_daemon

    (tmp_path / "s.img").write_bytes(before())
    (tmp_path / "t.img").write_bytes(bytes(SIZE))

    async def test(c: Commands) -> None:
        for name in ("s", "t"):
            await c.add("file", name, filename=str(tmp_path / f"{name}.img"))
        await c("block-dirty-bitmap-add", node="s", name="b")
        user = use(c.graph, c.graph.nodes["s"])
        await write(user, 3 * CLUSTER, before()[3 * CLUSTER : 4 * CLUSTER])
        options = {"sync": "bitmap", "bitmap": "b", "bitmap_mode": "never", "auto_finalize": False}
        await c("blockdev-backup", job_id="j", device="s", target="t", filter_node_name="f", **options)
        await c.add("snapshot-access", "a", file="f")
        await write(user, 3 * CLUSTER, b"x" * 3 * CLUSTER)
        old = c.graph.nodes["a"]
        assert await read(old, 0, 4 * CLUSTER) == before()[: 4 * CLUSTER]
        assert await read(old, 6 * CLUSTER, CLUSTER) == before()[6 * CLUSTER : 7 * CLUSTER]
        with pytest.raises(OSError) as info:
            await read(old, 5 * CLUSTER, 512)
        assert info.value.errno == errno.EACCES
        user.remove()

    with_daemon(test)
