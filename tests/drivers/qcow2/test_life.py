"""The life of a node: dirty images, reopening, caches, failing files, requests that meet."""

from __future__ import annotations

import asyncio
import errno
import random
from pathlib import Path
from typing import Any

import pytest

from pyqsd.block.driver import MAY_UNMAP
from pyqsd.block.graph import Graph
from pyqsd.drivers.formats.qcow2 import header as headers
from pyqsd.drivers.formats.qcow2.create import empty_image
from pyqsd.drivers.formats.qcow2.options import Options, Qcow2OverlapCheckMode
from pyqsd.drivers.protocols.file import Options as FileOptions
from pyqsd.qapi.command import EventBus
from pyqsd.qapi.errors import Error
from tests.drivers.qcow2.support import LogFile, Model, close, open_logged, opened, run
from tests.support import images

MiB = 1 << 20


# --- dirty images ---------------------------------------------------------------------------------------------------


def crashed(**how: Any) -> bytes:
    """An image with lazy refcounts whose program died: the counts are not on disk."""

    async def main() -> bytes:
        node, below = await open_logged(empty_image(2 * MiB, lazy_refcounts=True, **how))
        rnd = random.Random(1)
        for _ in range(30):
            await node.pwrite(rnd.randrange(2 * MiB - 30_000), b"\5" * 30_000)
        await node.pdiscard(MiB, 65536)
        await node.flush()
        return bytes(below.data)

    return run(main())


@pytest.mark.parametrize(
    "how", [{"cluster_size": 512}, {"cluster_size": 4096, "refcount_bits": 1}, {}, {"extended_l2": True}]
)
def test_dirty_image_is_repaired(tmp_path: Path, how: dict[str, Any]) -> None:
    path = tmp_path / "disk"
    path.write_bytes(crashed(**how))
    assert images.info(path)["dirty-flag"] is True
    # Whoever reads the image only leaves it alone.
    before = path.read_bytes()
    content = images.read_all(path, "qcow2", tmp_path / "raw")

    async def look() -> None:
        async with opened(path, read_only=True) as node:
            assert await node.pread(0, 2 * MiB) == content

    async def use() -> None:
        async with opened(path) as node:
            assert node.driver.image_info()["dirty_flag"] is False
            model = Model(node, 1, initial=content)
            await model.workload(60, 1, 50_000)
            await model.verify()

    run(look())
    assert path.read_bytes() == before
    run(use())
    images.assert_clean(path)


def test_repair_counts_snapshots_and_compressed_clusters(tmp_path: Path) -> None:
    path = images.create(tmp_path / "disk", 2 * MiB, options="cluster_size=4k,lazy_refcounts=on")
    images.io(path, "write -P 1 0 256k", "write -c -P 3 512k 4k", "write -c -P 4 516k 4k", "write -P 4 1M 64k")
    images.peers.run("qemu-img", "snapshot", "-c", "one", path)
    images.io(path, "write -P 5 0 16k")
    images.peers.run("qemu-img", "bitmap", "--add", path, "bits")
    content = images.read_all(path, "qcow2", tmp_path / "raw")
    image = bytearray(path.read_bytes())
    # Wrong counts everywhere, and the dirty bit.
    table = int.from_bytes(image[48:56], "big")
    block = int.from_bytes(image[table : table + 8], "big")
    image[block : block + 4096] = bytes(4096)
    image[79] |= headers.INCOMPAT_DIRTY
    path.write_bytes(image)

    async def main() -> None:
        async with opened(path) as node:
            assert await node.pread(0, 2 * MiB) == content

    run(main())
    images.assert_clean(path)
    assert images.info(path)["format-specific"]["data"]["bitmaps"][0]["name"] == "bits"
    images.peers.run("qemu-img", "bitmap", "--remove", path, "bits")
    images.peers.run("qemu-img", "snapshot", "-a", "one", path)
    assert images.read_all(path, "qcow2", tmp_path / "raw")[:4096] == b"\1" * 4096


def test_dirty_image_is_repaired_when_it_becomes_writable(tmp_path: Path) -> None:
    """A flag that says wrongly that a snapshot's cluster is ours alone was in memory already."""
    path = images.create(tmp_path / "disk", 2 * MiB, options="cluster_size=4k,lazy_refcounts=on")
    images.io(path, "write -P 1 0 256k")
    images.peers.run("qemu-img", "snapshot", "-c", "one", path)
    image = bytearray(path.read_bytes())
    l1 = int.from_bytes(image[40:48], "big")
    table = int.from_bytes(image[l1 : l1 + 8], "big") & 0x00FFFFFFFFFFFE00
    image[l1] |= 0x80
    for index in range(64):
        image[table + index * 8] |= 0x80
    image[79] |= headers.INCOMPAT_DIRTY
    path.write_bytes(image)

    async def main() -> None:
        async with opened(path, read_only=True) as node:
            assert await node.pread(0, 256 * 1024) == b"\1" * (256 * 1024)
            await node.graph.reopen([Options(node_name="q", file=FileOptions(filename=str(path)))])
            await asyncio.gather(*(node.pwrite(i * 16384, b"\2" * 16384) for i in range(8)))
            await node.flush()
            assert await node.pread(0, 131072) == b"\2" * 131072

    run(main())
    images.assert_clean(path)
    images.peers.run("qemu-img", "snapshot", "-a", "one", path)
    assert images.read_all(path, "qcow2", tmp_path / "raw")[: 256 * 1024] == b"\1" * (256 * 1024)


def test_dirty_image_that_cannot_be_repaired(tmp_path: Path) -> None:
    image = bytearray(crashed())
    l1 = int.from_bytes(image[40:48], "big")
    image[l1 : l1 + 8] = (1 << 63 | 1 << 40).to_bytes(8, "big")
    path = tmp_path / "disk"
    path.write_bytes(image)

    async def main() -> None:
        with pytest.raises(Error, match="Could not repair dirty image"):
            await Graph(EventBus()).add(Options(node_name="q", file=FileOptions(filename=str(path))))

    run(main())
    assert path.read_bytes() == image


# --- reopening --------------------------------------------------------------------------------------------------------


def test_reopen_with_other_caches_and_read_only(tmp_path: Path) -> None:
    path = images.create(tmp_path / "disk", 8 * MiB)

    async def main() -> None:
        async with opened(path) as node:

            async def reopen(**options: Any) -> None:
                values = {"node_name": "q", "discard": "unmap", "file": FileOptions(filename=str(path)), **options}
                await node.graph.reopen([Options(**values)])

            model = Model(node, 4)
            await model.workload(60, 2, 100_000)
            await reopen(l2_cache_entry_size=512, l2_cache_size=1024, refcount_cache_size=65536)
            await model.verify()
            await model.workload(60, 2, 100_000)
            await reopen(lazy_refcounts=True, overlap_check=Qcow2OverlapCheckMode.ALL)
            await model.workload(60, 2, 100_000)
            assert node.driver.image_info()["dirty_flag"] is True
            await reopen(read_only=True)
            assert images.info(path, "-U")["dirty-flag"] is False
            await model.verify()
            with pytest.raises(OSError):
                await node.pwrite(0, b"x")
            await reopen()
            await model.workload(60, 2, 100_000)
            await model.verify()
            with pytest.raises(Error, match="l2-cache-size may not exceed cache-size"):
                await reopen(cache_size=1, l2_cache_size=2)
            await model.verify()

    run(main())
    images.assert_clean(path)


# --- caches -----------------------------------------------------------------------------------------------------------


def test_unused_tables_leave_the_cache(tmp_path: Path) -> None:
    path = images.create(tmp_path / "disk", 64 * MiB, options="cluster_size=4k")

    async def main() -> None:
        async with opened(path, cache_clean_interval=1) as node:
            l2 = node.driver.image.l2  # type: ignore[attr-defined]
            for at in range(0, 64 * MiB, 2 * MiB):
                await node.pwrite(at, b"x" * 4096)
            assert len(l2.slices) == 32
            await node.flush()
            deadline = asyncio.get_running_loop().time() + 20
            # There is no event to wait for: nobody is told of it.
            while l2.slices and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            assert not l2.slices
            assert await node.pread(2 * MiB, 4096) == b"x" * 4096

    run(main())


def test_cache_stays_within_its_size(tmp_path: Path) -> None:
    path = images.create(tmp_path / "disk", 64 * MiB, options="cluster_size=512")

    async def main() -> None:
        async with opened(path, l2_cache_size=8192, refcount_cache_size=2048) as node:
            image = node.driver.image  # type: ignore[attr-defined]
            for at in range(0, 64 * MiB, 32768):
                await node.pwrite(at, b"x" * 512)
                assert len(image.l2.slices) <= 16
                assert len(image.refcounts.blocks) <= 4 + 20
            for at in range(0, 64 * MiB, 32768):
                assert await node.pread(at, 512) == b"x" * 512

    run(main())
    images.assert_clean(path)


# --- failures of the file ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["write", "flush", "read"])
@pytest.mark.parametrize("seed", range(4))
def test_failures_do_no_harm(tmp_path: Path, kind: str, seed: int) -> None:
    """Requests fail now and then; what was acknowledged is there, and in the end the image is sound."""
    rnd = random.Random(f"{kind}{seed}")

    async def main() -> tuple[bytes, bytearray, set[int]]:
        node, below = await open_logged(empty_image(2 * MiB, cluster_size=1024), l2_cache_size=4096)
        content = bytearray(2 * MiB)
        unsure: set[int] = set()

        def fault(what: str) -> None:
            if what == kind and rnd.random() < 0.1:
                raise OSError(errno.ENOSPC if kind == "write" else errno.EIO, "injected")

        below.fault = fault
        for _ in range(200):
            length = rnd.choice((512, 3000, 20_000))
            offset = rnd.randrange(2 * MiB - length)
            zero = rnd.random() < 0.3
            data = bytes(length) if zero else rnd.randbytes(length)
            try:
                if zero:
                    await node.pwrite_zeroes(offset, length, MAY_UNMAP)
                else:
                    await node.pwrite(offset, data)
            except OSError:
                unsure.update(range(offset // 512, (offset + length + 511) // 512))
            else:
                content[offset : offset + length] = data
                unsure.difference_update(range((offset + 511) // 512, (offset + length) // 512))
            if rnd.random() < 0.1:
                try:
                    await node.flush()
                except OSError:
                    pass
        below.fault = None
        await node.flush()
        await close(node)
        return bytes(below.data), content, unsure

    image, content, unsure = run(main())
    path = tmp_path / "disk"
    path.write_bytes(image)
    images.assert_clean(path, leaks=True)
    after = images.read_all(path, "qcow2", tmp_path / "raw")
    for sector in range(len(content) // 512):
        if sector not in unsure:
            assert after[sector * 512 : sector * 512 + 512] == content[sector * 512 : sector * 512 + 512], sector


# --- requests that meet -----------------------------------------------------------------------------------------------


def test_parallel_writes_to_one_cluster() -> None:
    """Sixteen small writes into one new cluster at the same time: all of them are there."""

    async def main() -> None:
        node, below = await open_logged(empty_image(MiB))
        below.random = random.Random(3)
        pieces = [bytes([i + 1]) * 4096 for i in range(16)]
        await asyncio.gather(*(node.pwrite(i * 4096, piece) for i, piece in enumerate(pieces)))
        assert await node.pread(0, 65536) == b"".join(pieces)
        await close(node)

    run(main())


def test_writes_to_different_clusters_run_in_parallel() -> None:
    async def main() -> None:
        node, below = await open_logged(empty_image(4 * MiB))
        await node.pwrite(0, b"x")
        await node.truncate(4 * MiB)
        waiting: list[asyncio.Future[None]] = []
        plain = below.pwritev

        async def held(offset: int, length: int, iov: list[memoryview], flags: int) -> None:
            future = asyncio.get_running_loop().create_future()
            waiting.append(future)
            await future
            await plain(offset, length, iov, flags)

        below.pwritev = held  # type: ignore[method-assign]
        tasks = [asyncio.ensure_future(node.pwrite(i * 65536, b"y" * 65536)) for i in range(1, 9)]
        for _ in range(50):
            await asyncio.sleep(0)
        assert len(waiting) == 8
        del below.pwritev  # type: ignore[method-assign]
        for future in waiting:
            future.set_result(None)
        await asyncio.gather(*tasks)
        assert await node.pread(65536, 8 * 65536) == b"y" * (8 * 65536)
        await close(node)

    run(main())


def test_freed_clusters_are_reused(tmp_path: Path) -> None:
    """Writing and discarding for a long time does not make the file grow for ever."""
    path = images.create(tmp_path / "disk", 16 * MiB)

    async def main() -> None:
        async with opened(path) as node:
            for _ in range(40):
                await node.pwrite(0, b"z" * (8 * MiB))
                await node.pdiscard(0, 8 * MiB)
            await node.flush()

    run(main())
    images.assert_clean(path)
    assert path.stat().st_size < 100 * MiB


def test_discards_reach_the_file(tmp_path: Path) -> None:
    path = images.create(tmp_path / "disk", 16 * MiB)

    async def main(**options: Any) -> int:
        async with opened(path, **options) as node:
            await node.pwrite(0, b"z" * (8 * MiB))
            await node.flush()
            await node.pdiscard(0, 8 * MiB)
            await node.flush()
            return path.stat().st_blocks * 512

    assert run(main()) < 2 * MiB
    assert run(main(pass_discard_request=False)) >= 8 * MiB
    images.assert_clean(path)


def test_large_writes_go_in_one_piece() -> None:
    """A write of many new clusters is one write of the file."""

    async def main() -> None:
        node, below = await open_logged(empty_image(16 * MiB))
        assert isinstance(below, LogFile)
        await node.pwrite(0, b"a" * 512)
        position = len(below.log)
        await node.pwrite(MiB, b"b" * MiB)
        writes = [entry for entry in below.log[position:] if entry[0] == "write"]
        assert [len(entry[2]) for entry in writes] == [MiB]
        position = len(below.log)
        await node.pwrite(4 * MiB + 512, b"c" * 4096)
        writes = [entry for entry in below.log[position:] if entry[0] == "write"]
        assert len(writes) == 1
        await close(node)

    run(main())
