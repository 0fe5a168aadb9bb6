"""Writes to new clusters that take no waiting (`Writer.write_now`): that they are done so, and when they are not."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from pyqsd.block.dirty_bitmap import DirtyBitmap
from pyqsd.block.graph import Graph
from pyqsd.block.node import Node
from pyqsd.drivers.formats.qcow2 import header as headers
from pyqsd.drivers.formats.qcow2.create import empty_image
from pyqsd.qapi.command import EventBus
from tests.drivers.qcow2 import encrypted
from tests.drivers.qcow2.support import LogFile, Model, close, never_pause, open_logged, opened, run
from tests.support import images

KiB = 1 << 10
MiB = 1 << 20


def now(node: Node, offset: int, data: bytes) -> bool:
    return node.write_now(offset, len(data), [memoryview(data)])


async def prepared(node: Node, at: int = 0) -> None:
    """After the first write the header needs no more looks, and the L2 table of `at` is in memory; the file is made
    long enough for a while."""
    await node.pwrite(at, b"first")


@pytest.mark.parametrize("options", ["", "compat=0.10", "extended_l2=on", "cluster_size=4k", "lazy_refcounts=on"])
def test_new_clusters(tmp_path: Path, options: str) -> None:
    """Whole clusters, parts of them, several at once, and what is in place already beside what is not."""
    path = images.create(tmp_path / "disk", 2 * MiB, options=options)
    content = bytearray(2 * MiB)
    rnd = random.Random(options)
    lengths = [(64 * KiB, 64 * KiB), (200_000, 4096), (300_001, 511), (512 * KiB, 256 * KiB), (100_000, 300_000)]

    async def main() -> None:
        async with opened(path) as node:
            await prepared(node)
            content[:5] = b"first"
            for at, length in lengths:
                content[at : at + length] = rnd.randbytes(length)
                assert now(node, at, bytes(content[at : at + length])), at
                assert await node.pread(0, node.length) == content
            # Too much to be written while everybody waits.
            assert not now(node, MiB, bytes(MiB))

    run(main())
    images.assert_clean(path)
    assert images.read_all(path, "qcow2", tmp_path / "raw") == content


@pytest.mark.parametrize("options", ["", "extended_l2=on", "extended_l2=on,cluster_size=256k"])
def test_copied(tmp_path: Path, options: str) -> None:
    """What the backing file has around the write is copied, also at its end and at that of the disk."""
    size, short = MiB + 512, 900_000
    base = tmp_path / "base"
    base.write_bytes(random.Random(1).randbytes(short))
    path = images.create(tmp_path / "disk", size, options=options, backing=base, backing_format="raw")
    content = bytearray(base.read_bytes().ljust(size, b"\0"))

    async def main() -> None:
        async with opened(path) as node:
            await prepared(node)
            content[:5] = b"first"
            for at, length in ((70_000, 100), (300_000, 100_000), (899_000, 2000), (size - 100, 100), (512, 4096)):
                content[at : at + length] = b"x" * length
                assert now(node, at, b"x" * length), at
                assert await node.pread(0, size) == content

    run(main())
    images.assert_clean(path)
    assert images.read_all(path, "qcow2", tmp_path / "raw") == content


def test_zeroes_of_a_subcluster_are_not_copied_over(tmp_path: Path) -> None:
    """Beside a write that needs the backing file's content, there is what was zeroed."""
    base = tmp_path / "base"
    base.write_bytes(b"b" * MiB)
    path = images.create(
        tmp_path / "disk", MiB, options="extended_l2=on,cluster_size=256k", backing=base, backing_format="raw"
    )
    content = bytearray(b"b" * MiB)
    unit = 8 * KiB

    async def main() -> None:
        async with opened(path) as node:
            await prepared(node, 512 * KiB)
            content[512 * KiB : 512 * KiB + 5] = b"first"
            await node.pwrite_zeroes(unit, unit)
            content[unit : 2 * unit] = bytes(unit)
            # From the middle of one that is zero to the middle of one that is not there.
            at, length = unit + 100, 3 * unit
            content[at : at + length] = b"w" * length
            assert now(node, at, b"w" * length)
            assert await node.pread(0, MiB) == content

    run(main())
    images.assert_clean(path)
    assert images.read_all(path, "qcow2", tmp_path / "raw") == content


def test_encrypted(tmp_path: Path) -> None:
    path = encrypted.make(tmp_path / "disk", MiB, "luks")
    content = bytearray(MiB)

    async def main() -> None:
        graph = await encrypted.graph_with_secret()
        async with opened(path, graph, encrypt=encrypted.key("luks")) as node:
            await node.pwrite(0, b"f" * 512)
            content[:512] = b"f" * 512
            for at, length in ((64 * KiB, 64 * KiB), (300 * 512, 1024), (100 * KiB, 200 * KiB)):
                content[at : at + length] = b"e" * length
                assert now(node, at, b"e" * length), at
                assert await node.pread(0, MiB) == content
            assert not now(node, 600 * KiB, b"not a sector")

    run(main())
    assert encrypted.read_all(path, "luks", tmp_path / "raw") == content


async def _logged(inline: float = 1.0, size: int = MiB, **creation: Any) -> tuple[Node, LogFile]:
    node, below = await open_logged(empty_image(size, **creation))
    await prepared(node)
    below.inline = inline
    return node, below


def test_failure_leaves_nothing_behind() -> None:
    """A write that breaks off is done again by waiting, in the same place, and what it left there does not show."""

    async def main() -> None:
        node, below = await _logged()
        image = node.driver.image  # type: ignore[attr-defined]
        below.inline_writes = 0
        below.fault = lambda kind: None
        before, free = bytes(image.l2.slices[0].entries), image.refcounts.hint
        data = b"d" * 100
        # The fault makes every write without waiting break off.
        assert not now(node, 128 * KiB, b"y" * 70_000)
        assert bytes(image.l2.slices[0].entries) == before
        assert image.refcounts.hint == free and not await image.refcounts.get(free)
        below.fault = None
        await node.pwrite(128 * KiB + 500, data)
        assert await node.pread(128 * KiB, 64 * KiB) == bytes(500) + data + bytes(64 * KiB - 600)
        await close(node)

    run(main())


def test_pause_after_failures() -> None:
    """Storage that never writes without waiting is not asked all the time."""

    async def main() -> None:
        node, below = await _logged(0.0, 64 * MiB)
        asked = 0

        def refuse(*_: Any) -> bool:
            nonlocal asked
            asked += 1
            return False

        below.write_now = refuse  # type: ignore[method-assign]
        for number in range(1, 600):
            assert not now(node, number * 64 * KiB, b"data")
        assert 4 <= asked <= 8
        await close(node)

    run(main())


def test_waits_for_who_allocates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two writes to parts of one new cluster, the first of which has to wait."""
    never_pause(monkeypatch)

    async def main() -> None:
        node, below = await _logged(0.0)
        go_on = asyncio.Event()
        pwritev = below.pwritev

        async def held(*args: Any) -> None:
            await go_on.wait()
            await pwritev(*args)

        below.pwritev = held  # type: ignore[method-assign]
        first = asyncio.create_task(node.pwrite(256 * KiB, b"one"))
        await asyncio.sleep(0)
        below.inline = 1.0
        assert not now(node, 256 * KiB + 100, b"two")
        assert not now(node, 256 * KiB - 100, b"t" * 200)
        second = asyncio.create_task(node.pwrite(256 * KiB + 100, b"two"))
        await asyncio.sleep(0)
        assert not second.done()
        assert now(node, 512 * KiB, b"another")
        go_on.set()
        await asyncio.gather(first, second)
        assert await node.pread(256 * KiB, 103) == b"one" + bytes(97) + b"two"
        assert now(node, 256 * KiB + 50, b"in place")
        await close(node)

    run(main())


def test_snapshot_is_left_alone() -> None:
    """Clusters and tables that a snapshot shares are copied the other way; new ones beside them are not in it."""

    async def main() -> None:
        node, _ = await _logged()
        await node.driver.snapshot_create("one")
        # The table is in memory again, and shared.
        assert await node.pread(0, 5) == b"first"
        assert not now(node, 0, b"shared") and not now(node, 64 * KiB, b"table")
        await node.pwrite(0, b"shared")
        assert now(node, 64 * KiB, b"table")
        await node.driver.snapshot_goto(None, "one")
        node.content_replaced()
        assert await node.pread(0, 70_000) == b"first".ljust(70_000, b"\0")
        await close(node)

    run(main())


def test_lazy_image_is_marked_first() -> None:
    """An image whose counts are all on disk (after a reopening) is marked dirty before any of them is changed."""

    async def main() -> None:
        node, _ = await _logged(lazy_refcounts=True)
        driver: Any = node.driver
        assert now(node, 64 * KiB, b"data")
        await driver._complete()
        # There is room in the file, so that this is no reason to wait.
        await driver.image.reserve(MiB)
        assert not now(node, 128 * KiB, b"data")
        await node.pwrite(128 * KiB, b"data")
        assert driver.image.header.incompatible & headers.INCOMPAT_DIRTY
        assert now(node, 192 * KiB, b"data")
        await close(node)

    run(main())


def test_bitmap_is_marked() -> None:
    async def main() -> None:
        node, _ = await _logged()
        bitmap = DirtyBitmap("b", node.length, 64 * KiB)
        node.dirty_bitmaps.add(bitmap)
        assert now(node, 200 * KiB, b"data")
        assert bitmap.count == 64 * KiB
        await close(node)

    run(main())


def test_read_only_after_reopening(tmp_path: Path) -> None:
    """Neither a node that has become read-only nor one that was never written to allocates anything so."""
    path = images.create(tmp_path / "disk", MiB)

    async def main() -> None:
        async with opened(path) as node:
            assert not now(node, 0, b"data")
            await prepared(node)
            assert now(node, 64 * KiB, b"data")
            node.active = False
            assert not now(node, 128 * KiB, b"data")
            node.active = True

    run(main())
    images.assert_clean(path)


WORKLOADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "small": {"cluster_size": 512},
    "refcount-1": {"cluster_size": 4096, "refcount_bits": 1},
    "extended": {"cluster_size": 16384, "extended_l2": True},
    "extended-large": {"cluster_size": 512 * KiB, "extended_l2": True},
    "lazy": {"cluster_size": 4096, "lazy_refcounts": True},
    "v2": {"version": 2},
}


@pytest.mark.parametrize("inline", [0.5, 1.0])
@pytest.mark.parametrize("name", WORKLOADS)
def test_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, inline: float) -> None:
    """Requests that wait and requests that do not, at the same time."""
    never_pause(monkeypatch)
    size = 4 * MiB
    image = empty_image(size, **WORKLOADS[name])

    async def main() -> tuple[bytes, bytes]:
        node, below = await open_logged(image, l2_cache_size=65536)
        below.inline = inline
        model = Model(node, 7)
        await model.workload(300, 6, 150_000)
        await model.verify()
        assert below.inline_writes > 20
        await close(node)
        return bytes(below.data), bytes(model.content)

    disk, content = run(main())
    path = tmp_path / "disk"
    path.write_bytes(disk)
    images.assert_clean(path)
    assert images.read_all(path, "qcow2", tmp_path / "raw") == content


@pytest.mark.parametrize("options", ["", "extended_l2=on,cluster_size=128k"])
def test_mixed_overlay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str) -> None:
    """The same over a backing file that is read without waiting now and then."""
    never_pause(monkeypatch)
    size, short = 4 * MiB, 4 * MiB - 70_144
    base = random.Random(2).randbytes(short)
    (tmp_path / "base").write_bytes(base)
    image = images.create(tmp_path / "disk", size, options=options, backing=tmp_path / "base", backing_format="raw")
    initial = base.ljust(size, b"\0")

    async def main() -> tuple[bytes, bytes]:
        graph = Graph(EventBus())
        node, below = await open_logged(image.read_bytes(), graph)
        assert node.driver.backing is not None
        below.inline = 0.7
        read_now = node.driver.backing.node.read_now
        rnd = random.Random(3)
        node.driver.backing.node.read_now = (  # type: ignore[method-assign]
            lambda *args: rnd.random() < 0.7 and read_now(*args)
        )
        model = Model(node, 9, initial=initial)
        await model.workload(300, 6, 150_000)
        await model.verify()
        assert below.inline_writes > 20
        await close(node)
        return bytes(below.data), bytes(model.content)

    disk, content = run(main())
    image.write_bytes(disk)
    images.assert_clean(image)
    assert images.read_all(image, "qcow2", tmp_path / "raw") == content
