"""``copy-on-read``: nothing that a user writes is lost to a copy, whatever runs at the same time.

What is copied, and what it answers, is compared with QSD in tests/system/test_differential_filters.py.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import random
from pathlib import Path
from typing import Any

import pytest

from pyqsd.block.graph import Graph
from pyqsd.block.node import Node
from pyqsd.drivers.formats.qcow2.create import empty_image
from pyqsd.qapi.errors import Error
from tests.support import peers

from . import opening
from .opening import graph, read, run, use, write

SIZE = 1 << 20


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    base, top = tmp_path / "base.img", tmp_path / "top.qcow2"
    base.write_bytes(bytes(i // 4096 % 5 and i // 512 % 255 + 1 for i in range(SIZE)))
    peers.run("qemu-img", "create", "-f", "qcow2", "-o", "cluster_size=16k", "-F", "raw", "-b", str(base), str(top))
    return top


async def add(g: Graph, top: Path, **more: Any) -> Node:
    await opening.add(g, node_name="top", driver="qcow2", file={"driver": "file", "filename": str(top)})
    return await opening.add(g, driver="copy-on-read", file="top", **more)


@pytest.mark.parametrize("seed", range(6))
def test_a_copy_never_replaces_what_was_written(seed: int, chain: Path) -> None:
    """Readers and writers at once, each writer with sectors of its own, over storage that takes its time."""
    content = bytearray((chain.parent / "base.img").read_bytes())
    rnd = random.Random(seed)

    async def main() -> None:
        async with graph() as g:
            user = use(g, await add(g, chain))
            for node in g.nodes.values():
                slow_down(node, rnd)
            ended: list[int] = []

            async def writer(lane: int) -> None:
                for turn in range(12):
                    # Neighbouring sectors belong to different writers, so that clusters are shared.
                    at = (rnd.randrange(SIZE // 512 // 8) * 8 + lane) * 512
                    data = bytes([lane * 16 + turn + 1]) * 512
                    await write(user, at, data)
                    content[at : at + 512] = data
                    assert await read(user, at, 512) == data
                ended.append(lane)

            async def reader() -> None:
                while len(ended) < 8:
                    length = rnd.choice((512, 5000, 16384, 70000))
                    await read(user, rnd.randrange(SIZE - length), length)

            await asyncio.gather(*(writer(lane) for lane in range(8)), reader(), reader(), reader())
            assert await read(user, 0, SIZE) == content
            assert all(node.in_flight == 0 for node in g.nodes.values())
            await user.flush()

    run(main)
    # All of it is in the overlay now.
    peers.run("qemu-img", "check", str(chain))
    peers.run("qemu-img", "rebase", "-u", "-b", "", str(chain))
    out = chain.with_suffix(".raw")
    peers.run("qemu-img", "convert", "-O", "raw", str(chain), str(out))
    assert out.read_bytes() == content


def slow_down(node: Node, rnd: random.Random) -> None:
    driver: Any = node.driver
    if not driver.is_protocol:
        return

    async def slowly(real: Any, *arguments: Any) -> Any:
        for _ in range(rnd.randrange(4)):
            await asyncio.sleep(0)
        return await real(*arguments)

    for name in ("preadv", "pwritev", "pwrite_zeroes"):
        setattr(driver, name, functools.partial(slowly, getattr(driver, name)))
    driver.read_now = driver.write_now = lambda *_: False


def test_dirty_bitmaps_take_no_notice(chain: Path) -> None:
    from pyqsd.block.dirty_bitmap import DirtyBitmap

    async def main() -> None:
        async with graph() as g:
            node = await add(g, chain)
            user = use(g, node)
            top = g.nodes["top"]
            bitmaps = []
            for place in (node, top):
                bitmap = DirtyBitmap("b", SIZE, 65536)
                place.dirty_bitmaps.add(bitmap)
                bitmaps.append(bitmap)
            await read(user, 0, SIZE)
            assert [bitmap.count for bitmap in bitmaps] == [0, 0]
            await write(user, 70000, b"x")
            assert [bitmap.count for bitmap in bitmaps] == [65536, 65536]

    run(main)


def test_what_is_there_is_read_at_once(chain: Path) -> None:
    async def main() -> None:
        async with graph() as g:
            user = use(g, await add(g, chain))
            buffer = [memoryview(bytearray(4096))]
            assert not user.read_now(4096, 4096, buffer)
            data = await read(user, 4096, 4096)
            assert user.read_now(4096, 4096, buffer) and bytes(buffer[0]) == data

    run(main)


def test_an_error_leaves_the_data_where_it_is(chain: Path) -> None:
    content = (chain.parent / "base.img").read_bytes()

    async def main() -> None:
        async with graph() as g:
            injector = {"driver": "blkdebug", "image": {"driver": "file", "filename": str(chain)}}
            rule = {"event": "write_aio", "iotype": "write", "errno": 28, "once": True}
            await opening.add(g, node_name="top", driver="qcow2", file={**injector, "inject_error": [rule]})
            user = use(g, await opening.add(g, driver="copy-on-read", file="top"))
            with pytest.raises(OSError, check=lambda exc: exc.errno == errno.ENOSPC):
                await read(user, 5000, 100)
            assert await read(user, 5000, 100) == content[5000:5100]

    run(main)


def test_cancelled_while_copying(chain: Path) -> None:
    content = (chain.parent / "base.img").read_bytes()

    async def main() -> None:
        async with graph() as g:
            user = use(g, await add(g, chain))
            for node in g.nodes.values():
                slow_down(node, random.Random(1))
            for turns in range(12):
                task = asyncio.ensure_future(read(user, turns * 50000, 40000))
                for _ in range(turns):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            await asyncio.wait_for(write(user, 0, content), 10)
            assert await read(user, 0, SIZE) == content

    run(main)


def test_bottom_must_be_below(chain: Path, tmp_path: Path) -> None:
    (tmp_path / "other.qcow2").write_bytes(empty_image(SIZE))

    async def main() -> None:
        async with graph() as g:
            other = {"driver": "file", "filename": str(tmp_path / "other.qcow2")}
            await opening.add(g, node_name="other", driver="qcow2", file=other)
            with pytest.raises(Error, match="Bottom node 'other' is not in the backing chain of node 'top'"):
                await add(g, chain, bottom="other")
            assert "node" not in g.nodes

    run(main)
