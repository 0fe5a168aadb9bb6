"""``copy-before-write``: what was there is preserved, whatever runs at the same time, and whatever fails.

What it answers is compared with QSD in tests/system/test_differential_fleecing.py.
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
from pyqsd.block.point_in_time import OnCbwError, PointInTime
from pyqsd.drivers.formats.qcow2.create import empty_image

from . import opening
from .opening import graph, read, run, use, write
from .test_copy_on_read import slow_down

SIZE = 1 << 20
CLUSTER = 65536


@functools.cache
def before() -> bytes:
    """Data, with clusters of zeroes among it."""
    return bytes(i // CLUSTER % 4 and i // 512 % 255 + 1 for i in range(SIZE))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "s.img").write_bytes(before())
    (tmp_path / "t.qcow2").write_bytes(empty_image(SIZE))
    return tmp_path


async def pair(g: Graph, images: Path, **more: Any) -> tuple[Node, PointInTime]:
    """Nodes ``s``, ``t``, and the filter ``node`` over them, with what it preserves."""
    await opening.add(g, node_name="s", driver="file", filename=str(images / "s.img"), discard="unmap")
    below = {"driver": "file", "filename": str(images / "t.qcow2")}
    await opening.add(g, node_name="t", driver="qcow2", file=below, discard="unmap")
    node = await opening.add(g, driver="copy-before-write", file="s", target="t", discard="unmap", **more)
    past = node.driver.past
    assert past is not None
    return node, past


@pytest.mark.parametrize("seed", range(4))
def test_the_past_stays_as_it_was(seed: int, images: Path) -> None:
    """Writers of every kind, and readers of the past, over storage that takes its time."""
    rnd = random.Random(seed)
    content = bytearray(before())

    async def main() -> None:
        async with graph() as g:
            node, past = await pair(g, images)
            user = use(g, node)
            old = use(g, await opening.add(g, node_name="a", driver="snapshot-access", file="node"), perm=opening.READ)
            if seed:
                for one in list(g.nodes.values()):
                    slow_down(one, rnd)
            ended: list[int] = []

            async def writer(lane: int) -> None:
                for turn in range(12):
                    at = (rnd.randrange(SIZE // 512 // 8) * 8 + lane) * 512
                    data = bytes([lane * 16 + turn + 1]) * 512
                    kind = rnd.choice(("write", "write", "zero"))
                    if kind == "write" and not (rnd.random() < 0.5 and user.write_now(at, 512, [memoryview(data)])):
                        await write(user, at, data)
                    elif kind == "zero":
                        data = bytes(512)
                        await user.pwrite_zeroes(at, 512)
                    content[at : at + 512] = data
                    assert await read(user, at, 512) == data
                ended.append(lane)

            async def reader() -> None:
                while len(ended) < 8:
                    await asyncio.sleep(0)
                    length = rnd.choice((512, 5000, CLUSTER, 200_000))
                    at = rnd.randrange(SIZE - length)
                    assert await read(old, at, length) == before()[at : at + length]
                    quick = bytearray(length)
                    if old.read_now(at, length, [memoryview(quick)]):
                        assert quick == before()[at : at + length]

            await asyncio.gather(*(writer(lane) for lane in range(8)), reader(), reader())
            assert await read(user, 0, SIZE) == content
            assert await read(old, 0, SIZE) == before()
            # Each cluster was copied once at most, and only those that were overwritten.
            assert past.copier.to_copy.count + past.done.count == SIZE
            assert all(one.in_flight == 0 for one in g.nodes.values())

    run(main)


def test_what_was_copied_is_overwritten_at_once(images: Path) -> None:
    async def main() -> None:
        async with graph() as g:
            node, past = await pair(g, images)
            user = use(g, node)
            data = [memoryview(b"x" * 512)]
            assert not user.write_now(CLUSTER, 512, data)
            assert past.done.count == 0
            await user.pwritev(CLUSTER, 512, data)
            assert user.write_now(CLUSTER, 512, data)
            assert user.write_now(2 * CLUSTER - 512, 512, data)
            assert not user.write_now(2 * CLUSTER - 511, 512, data)
            # Somebody reads what is not copied yet, elsewhere: every write looks.
            piece = past._reads.begin(0, CLUSTER)
            assert not user.write_now(CLUSTER, 512, data)
            await user.pwritev(CLUSTER, 512, data)
            waiting = asyncio.ensure_future(user.pwritev(0, 512, data))
            for _ in range(20):
                await asyncio.sleep(0)
            assert not waiting.done()
            past._reads.finish(piece)
            await waiting

    run(main)


@pytest.mark.parametrize("policy", list(OnCbwError))
def test_a_copy_that_takes_too_long(policy: OnCbwError, images: Path) -> None:
    async def main() -> None:
        async with graph() as g:
            node, past = await pair(g, images, on_cbw_error=str(policy), cbw_timeout=1)
            old = use(g, await opening.add(g, node_name="a", driver="snapshot-access", file="node"), perm=opening.READ)
            user = use(g, node)
            gate = asyncio.Event()
            target: Any = g.nodes["t"].driver
            real = target.pwritev

            async def held(*arguments: Any) -> None:
                await gate.wait()
                await real(*arguments)

            target.pwritev = held
            past.timeout = 0.001  # type: ignore[assignment]
            if policy is OnCbwError.BREAK_GUEST_WRITE:
                with pytest.raises(OSError) as info:
                    await write(user, CLUSTER, b"new" * 100)
                assert info.value.errno == errno.ETIMEDOUT
                assert await read(user, CLUSTER, 300) == before()[CLUSTER : CLUSTER + 300]
                with pytest.raises(OSError):
                    await write(user, CLUSTER + 512, b"new" * 100)
                gate.set()
                past.timeout = 10
                await write(user, CLUSTER, b"new" * 100)
                assert await read(old, CLUSTER, 300) == before()[CLUSTER : CLUSTER + 300]
                assert past.done.count == CLUSTER
            else:
                await write(user, CLUSTER, b"new" * 100)
                with pytest.raises(OSError) as info:
                    await read(old, 0, 512)
                assert info.value.errno == errno.EACCES
                assert user.write_now(3 * CLUSTER, 300, [memoryview(b"new" * 100)])
                gate.set()
            # A drain waits also for what nobody waits for any more.
            async with g.drained(node):
                assert not past.copier.pieces
            assert await read(user, CLUSTER, 300) == b"new" * 100

    run(main)


def test_a_write_that_is_given_up(images: Path) -> None:
    """It is as if it had not been: the clusters are still to be copied."""

    async def main() -> None:
        async with graph() as g:
            node, past = await pair(g, images)
            user = use(g, node)
            source: Any = g.nodes["s"].driver
            gate = asyncio.Event()
            reading = asyncio.Event()
            real = source.preadv

            async def held(*arguments: Any) -> None:
                reading.set()
                await gate.wait()
                await real(*arguments)

            source.preadv, source.read_now = held, lambda *_: False
            first = asyncio.ensure_future(write(user, CLUSTER, b"1" * 512))
            await reading.wait()
            second = asyncio.ensure_future(write(user, CLUSTER + 512, b"2" * 512))
            await asyncio.sleep(0)
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
            assert not second.done()
            gate.set()
            await second
            old = await opening.add(g, node_name="a", driver="snapshot-access", file="node")
            assert await read(old, 0, SIZE) == before()
            assert past.copier.to_copy.count == SIZE - CLUSTER

    run(main)


def test_a_target_that_is_too_small(images: Path) -> None:
    (images / "t.qcow2").write_bytes(empty_image(SIZE // 2))

    async def main() -> None:
        async with graph() as g:
            node, _ = await pair(g, images)
            user = use(g, node)
            await write(user, SIZE // 2 - 512, b"x" * 512)
            with pytest.raises(OSError) as info:
                await write(user, SIZE // 2 - 512, b"x" * 1024)
            assert info.value.errno == errno.EIO
            assert g.nodes["t"].length == SIZE // 2
            assert await read(user, SIZE // 2, 512) == before()[SIZE // 2 : SIZE // 2 + 512]

    run(main)


def test_making_it_smaller_copies_first(images: Path) -> None:
    async def main() -> None:
        async with graph() as g:
            node, _ = await pair(g, images)
            user = use(g, node, perm=opening.READ_WRITE | opening.perms.RESIZE)
            old = await opening.add(g, node_name="a", driver="snapshot-access", file="node")
            await user.truncate(SIZE // 2 + 100)
            # A whole number of clusters is preserved, also where the end was.
            target = g.nodes["t"]
            assert await read(target, SIZE // 2, SIZE // 2) == before()[SIZE // 2 :]
            await user.truncate(SIZE)
            assert await read(user, SIZE // 2 + 100, SIZE // 2 - 100) == bytes(SIZE // 2 - 100)
            assert await read(old, 0, SIZE // 2) == before()[: SIZE // 2]

    run(main)


def test_large_clusters(images: Path) -> None:
    async def main() -> None:
        async with graph() as g:
            node, past = await pair(g, images, min_cluster_size=1 << 40)
            old = await opening.add(g, node_name="a", driver="snapshot-access", file="node")
            await write(use(g, node), 5, b"x")
            assert past.copier.left == 0
            assert await read(old, 0, SIZE) == before()

    run(main)


def test_a_flush_of_the_source_leaves_the_target_alone(images: Path) -> None:
    async def main() -> None:
        async with graph() as g:
            node, _ = await pair(g, images)
            user = use(g, node)
            await write(user, 0, b"x" * 512)
            await user.flush()
            assert not g.nodes["s"].needs_flush
            assert g.nodes["t"].needs_flush

    run(main)


@pytest.mark.parametrize("seed", range(3))
def test_an_overlay_shows_the_past(seed: int, images: Path) -> None:
    """Fleecing as it was before ``snapshot-access``: the target has the source as its backing file, and is read."""
    rnd = random.Random(seed)

    async def main() -> None:
        async with graph() as g:
            await opening.add(g, node_name="s", driver="file", filename=str(images / "s.img"))
            below = {"driver": "file", "filename": str(images / "t.qcow2")}
            await opening.add(g, node_name="t", driver="qcow2", file=below, backing="s")
            node = await opening.add(g, driver="copy-before-write", file="s", target="t")
            user, old = use(g, node), use(g, g.nodes["t"], perm=opening.READ)
            for one in list(g.nodes.values()):
                slow_down(one, rnd)
            ended: list[int] = []

            async def writer(lane: int) -> None:
                for _ in range(15):
                    await write(user, rnd.randrange(SIZE // 512) * 512, bytes([lane]) * 512)
                ended.append(lane)

            async def reader() -> None:
                while len(ended) < 4:
                    length = rnd.choice((512, CLUSTER, 300_000))
                    at = rnd.randrange(SIZE - length)
                    assert await read(old, at, length) == before()[at : at + length]

            await asyncio.gather(*(writer(lane) for lane in range(4)), reader(), reader(), reader())

    run(main)
