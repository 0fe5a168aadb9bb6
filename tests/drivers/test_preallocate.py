"""The preallocate filter: the content is right whatever is preallocated or cannot be, and the file is cut back."""

from __future__ import annotations

import asyncio
import errno
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from pyqsd.block import activation
from pyqsd.block import permissions as perms
from pyqsd.block.backend import BlockBackend
from pyqsd.block.driver import MAY_UNMAP, NO_FALLBACK
from pyqsd.block.graph import Graph
from pyqsd.block.node import Node
from pyqsd.block.options import BlockdevOptions
from pyqsd.qapi.command import EventBus
from pyqsd.qapi.convert import convert
from tests.drivers.qcow2.support import close, run
from tests.support import peers

KiB, MiB = 1 << 10, 1 << 20
GROWING = perms.CONSISTENT_READ | perms.WRITE | perms.RESIZE


def file_at(path: Path) -> dict[str, Any]:
    return {"driver": "file", "filename": str(path), "node-name": "f"}


async def filtered(graph: Graph, below: dict[str, Any], **more: Any) -> Node:
    options = {"driver": "preallocate", "node-name": "p", "file": below, "prealloc-size": MiB, **more}
    return await graph.add(convert(options, BlockdevOptions))


def grower(graph: Graph, node: Node) -> BlockBackend:
    backend = BlockBackend(graph, "a test", GROWING, perms.ALL & ~(perms.WRITE | perms.RESIZE))
    backend.insert(node)
    return backend


#: Errors of the zero writes that preallocate: never, once in a while, always.
FAULTS: dict[str, list[dict[str, Any]]] = {
    "works": [],
    "full": [{"event": "none", "iotype": "write-zeroes", "errno": errno.ENOSPC}],
    "unsupported": [{"event": "none", "iotype": "write-zeroes", "errno": errno.ENOTSUP}],
    "sometimes": [
        {"event": "none", "iotype": "write-zeroes", "errno": errno.ENOSPC, "once": True, "immediately": True}
        for _ in range(6)
    ],
}


@pytest.mark.parametrize("name", FAULTS)
def test_many_writers(name: str, tmp_path: Path) -> None:
    """Writes and zero writes beyond the end, several at a time, over what was preallocated and without it."""
    path = tmp_path / "disk"
    path.write_bytes(b"\1" * 5120)
    rnd = random.Random(name)

    async def main() -> None:
        graph = Graph(EventBus())
        below = {"driver": "blkdebug", "image": file_at(path), "inject-error": FAULTS[name]}
        if not FAULTS[name]:
            below = file_at(path)
        node = await filtered(graph, below, **{"prealloc-size": 48 * KiB, "prealloc-align": 4096})
        backend = grower(graph, node)
        content = bytearray(b"\1" * 5120)

        async def one(at: int, length: int) -> None:
            kind = rnd.choice(("write", "write", "zero", "quick"))
            value = rnd.randbytes(1) * length if kind == "write" else bytes(length)
            content[len(content) :] = bytes(max(0, at + length - len(content)))
            content[at : at + length] = value
            if kind == "write":
                await node.pwrite(at, value)
            else:
                flags = NO_FALLBACK if kind == "quick" else rnd.choice((0, MAY_UNMAP))
                try:
                    await node.pwrite_zeroes(at, length, flags)
                except OSError as exc:
                    # A rule of the test; nothing has happened, so that it can be done another way.
                    assert name != "works" and exc.errno in (errno.ENOSPC, errno.ENOTSUP)
                    await node.pwrite(at, value)

        for _ in range(60):
            end, pieces, jobs = node.length, rnd.choice((1, 1, 4)), []
            at = max(0, end - rnd.choice((0, 0, 3072, 20480)))
            for _ in range(pieces):
                length = rnd.choice((512, 1024, 4096, 10240, 70144))
                jobs.append(one(at, length))
                at += length + rnd.choice((0, 0, 5120))
            await asyncio.gather(*jobs)
            assert node.length == len(content)
            if rnd.random() < 0.1:
                end = node.length
                new = rnd.choice((end // 1024 * 512, end + 30720))
                await node.truncate(new, preallocation="falloc" if new > end else "off")
                content[new:] = b""
                content.extend(bytes(new - len(content)))
            at = max(0, len(content) - 200000)
            assert await node.pread(at, len(content) - at) == content[at:]
            if name == "works":
                assert path.stat().st_size >= len(content)
        assert (path.stat().st_size > len(content)) == (name in ("works", "sometimes"))
        assert await node.pread(0, node.length) == content
        backend.remove()
        await graph.settled()
        assert path.read_bytes() == content
        assert node.length == len(content)
        await close(node)
        assert path.read_bytes() == content

    run(main())


def make_qcow2(path: Path, *options: str) -> None:
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", *options, str(path), "64M")


async def qcow2_over(path: Path, graph: Graph, **more: Any) -> Node:
    below = {"driver": "preallocate", "node-name": "p", "file": file_at(path), "prealloc-size": 4 * MiB}
    options = {"driver": "qcow2", "node-name": "q", "file": below, "discard": "unmap", **more}
    return await graph.add(convert(options, BlockdevOptions))


def checked(path: Path) -> None:
    told = json.loads(peers.run("qemu-img", "check", "--output=json", str(path)).stdout)
    assert not told.get("corruptions") and not told.get("leaks") and not told["check-errors"]


@pytest.mark.parametrize("direct", [False, True])
def test_below_qcow2(direct: bool, tmp_path: Path) -> None:
    """The image is complete after a crash, when it only is too long, and goes on from there."""
    path, copy = tmp_path / "disk.qcow2", tmp_path / "crashed.qcow2"
    make_qcow2(path)
    rnd = random.Random(direct)
    content = bytearray(64 * MiB)

    async def main() -> None:
        graph = Graph(EventBus())
        node = await qcow2_over(path, graph, cache={"direct": direct})
        for _ in range(60):
            at, length = rnd.randrange(60 * MiB), rnd.choice((512, 5000, 64 * KiB, 300 * KiB))
            value = rnd.randbytes(1) * length
            await node.pwrite(at, value)
            content[at : at + length] = value
        await node.flush()
        assert path.stat().st_size % MiB == 0 and path.stat().st_blocks * 512 >= path.stat().st_size
        shutil.copyfile(path, copy)
        await close(node)
        assert path.stat().st_size % MiB
        checked(path)
        checked(copy)
        node = await qcow2_over(copy, graph, cache={"direct": direct})
        assert await node.pread(0, node.length) == content
        await node.pwrite(61 * MiB + 5, b"after" * 1000)
        content[61 * MiB + 5 : 61 * MiB + 5005] = b"after" * 1000
        await close(node)

    run(main())
    checked(copy)
    raw = tmp_path / "raw"
    peers.run("qemu-img", "convert", "-O", "raw", str(copy), str(raw))
    assert raw.read_bytes() == content


def test_inactive(tmp_path: Path) -> None:
    """An image that is given away has its true length, and the filter goes on when it comes back."""
    path = tmp_path / "disk.qcow2"
    make_qcow2(path)

    async def main() -> None:
        graph = Graph(EventBus())
        node = await qcow2_over(path, graph)
        for at in (0, 10 * MiB):
            await node.pwrite(at, b"x" * 100000)
            assert path.stat().st_size > 4 * MiB
            await activation.inactivate(graph, node)
            assert path.stat().st_size < 4 * MiB
            checked(path)
            peers.run("qemu-io", "-c", f"write -P 7 {at + MiB} 64k", str(path))
            await activation.activate(graph, node)
            assert await node.pread(at + MiB, 10) == b"\7" * 10
            assert await node.pread(at, 10) == b"x" * 10
        await close(node)
        assert not graph.nodes

    run(main())
    checked(path)


def test_another_file(tmp_path: Path) -> None:
    """What was measured at one file is not applied to another."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"\1" * 4096)
    two.write_bytes(b"\2" * 3 * MiB)

    async def main() -> None:
        graph = Graph(EventBus())
        for name, path in (("one", one), ("two", two)):
            await graph.add(convert({**file_at(path), "node-name": name}, BlockdevOptions))
        node = await filtered(graph, "one")  # type: ignore[arg-type]
        backend = grower(graph, node)
        await node.pwrite(4096, b"\3" * 4096)
        assert (node.length, one.stat().st_size) == (8192, 2 * MiB)
        options = {"driver": "preallocate", "node-name": "p", "file": "two", "prealloc-size": MiB}
        await graph.reopen([convert(options, BlockdevOptions)])
        assert node.length == 3 * MiB
        await node.pwrite(3 * MiB, b"\4" * 512)
        backend.remove()
        await graph.settled()
        assert two.read_bytes() == b"\2" * 3 * MiB + b"\4" * 512
        assert one.read_bytes()[:8192] == b"\1" * 4096 + b"\3" * 4096
        await close(node)

    run(main())
