"""The compress filter, and compressed writes to qcow2: QEMU reads what we write, and the other way round."""

from __future__ import annotations

import asyncio
import errno
import random
from pathlib import Path
from typing import Any

import pytest

from pyqsd.block.driver import WRITE_COMPRESSED
from pyqsd.block.graph import Graph
from pyqsd.block.node import Node
from pyqsd.drivers.filters.compress import Options as CompressOptions
from pyqsd.drivers.formats.qcow2.create import empty_image
from pyqsd.drivers.formats.qcow2.options import Options
from pyqsd.drivers.formats.qcow2.packing import descriptor, pack
from pyqsd.drivers.protocols.file import Options as FileOptions
from pyqsd.qapi.command import EventBus
from pyqsd.qapi.errors import Error
from tests.drivers.qcow2.support import NO_SPACE, close, open_logged, opened, run
from tests.support import images

MiB = 1 << 20
CREATIONS = {
    "512": {"cluster_size": 512},
    "4k": {"cluster_size": 4096},
    "64k": {},
    "2m": {"cluster_size": 2 * MiB},
    "zstd": {"compression_type": 1},
    "zstd-2m": {"compression_type": 1, "cluster_size": 2 * MiB},
    "extended": {"extended_l2": True},
    "v2": {"version": 2},
    "refcount-1": {"refcount_bits": 1, "cluster_size": 4096},
    "refcount-2": {"refcount_bits": 2},
    "refcount-64": {"refcount_bits": 64},
    "lazy": {"lazy_refcounts": True},
}


def text(rnd: random.Random, length: int) -> bytes:
    """Something that compresses, but not to nothing; every few clusters something that does not."""
    if rnd.random() < 0.2:
        return rnd.randbytes(length)
    words = [rnd.randbytes(rnd.randrange(2, 9)) for _ in range(60)]
    return b"".join(rnd.choices(words, k=length // 2 + 1))[:length]


async def filtered(path: Path) -> Node:
    graph = Graph(EventBus())
    below = Options(file=FileOptions(filename=str(path)), discard="unmap")
    return await graph.add(CompressOptions(node_name="c", discard="unmap", file=below))


@pytest.mark.parametrize("name", CREATIONS)
def test_qemu_reads_it(tmp_path: Path, name: str) -> None:
    creation = CREATIONS[name]
    cluster = creation.get("cluster_size", 65536)
    size = max(3 * MiB // 2, 6 * cluster) if cluster > 512 else MiB // 4
    path = tmp_path / "disk"
    path.write_bytes(empty_image(size, **creation))
    rnd = random.Random(name)
    content = bytearray(size)

    async def main() -> None:
        node = await filtered(path)
        assert node.limits.request_alignment == cluster
        places = [*range(0, size, 3 * cluster)]
        rnd.shuffle(places)

        async def write(at: int) -> None:
            n = min(rnd.choice((1, 2, 3)) * cluster, size - at)
            if rnd.random() < 0.2:
                # Part of a cluster: the rest of it is written as well.
                n = max(512, n - 512)
            data = text(rnd, n)
            content[at : at + n] = data
            await node.pwrite(at, data)

        for start in range(0, len(places), 5):
            await asyncio.gather(*(write(at) for at in places[start : start + 5]))
            if rnd.random() < 0.2:
                await node.flush()
        hole = places[0]
        content[hole : hole + cluster] = bytes(cluster)
        await node.pwrite_zeroes(hole, cluster)
        assert await node.pread(0, size) == content
        await close(node)
        # What was freed is used again.
        node = await filtered(path)
        gone = places[: len(places) // 2]
        for at in gone:
            n = min(3 * cluster, size - at)
            await node.pdiscard(at, n)
            content[at : at + n] = bytes(n)
        await node.flush()
        for at in gone:
            if name == "v2" and content[at : at + cluster]:
                break
            data = text(rnd, cluster)[: size - at]
            try:
                await node.pwrite(at, data)
            except OSError as exc:
                # Zero clusters may keep their place.
                assert exc.errno == errno.EIO
                continue
            content[at : at + len(data)] = data
        assert await node.pread(0, size) == content
        await close(node)

    run(main())
    images.assert_clean(path)
    assert images.read_all(path, "qcow2", tmp_path / "raw") == content
    assert any(extent["compressed"] for extent in images.mapping(path))


def test_packed_one_behind_the_other(tmp_path: Path) -> None:
    """Compressed clusters share host clusters, across their borders."""
    path = tmp_path / "disk"
    path.write_bytes(empty_image(64 * MiB))
    rnd = random.Random(1)
    words = [rnd.randbytes(8) for _ in range(500)]
    data = b"".join(rnd.choice(words) for _ in range(4 * MiB // 8))
    expected = sum(len(pack(0, data[at : at + 65536]) or b"") for at in range(0, len(data), 65536))

    async def main() -> None:
        node = await filtered(path)
        await node.pwrite(0, data)
        await close(node)

    run(main())
    images.assert_clean(path)
    assert path.stat().st_size < expected + 8 * 65536


def test_refused_as_by_qsd(tmp_path: Path) -> None:
    path = images.create(tmp_path / "disk", MiB + 512)
    images.io(path, "write 0 64k", "write -c 64k 64k", "write 128k 64k", "write -z 128k 64k", "write -z 192k 64k")

    async def main() -> list[int]:
        found = []
        async with opened(path) as node:
            for offset, length in (
                (0, 65536),
                (65536, 65536),
                (131072, 65536),
                (196608, 65536),
                (1024, 65536),
                (262144, 512),
                (MiB, 512),
                (327680, 131072),
            ):
                try:
                    await node.pwrite(offset, b"x" * length, WRITE_COMPRESSED)
                    found.append(0)
                except OSError as exc:
                    found.append(exc.errno or 0)
        return found

    eio, einval = errno.EIO, errno.EINVAL
    assert run(main()) == [eio, eio, eio, 0, einval, einval, 0, 0]
    images.assert_clean(path)
    external = images.create(tmp_path / "external", MiB, options=f"data_file={tmp_path / 'data'}")

    async def refused() -> int:
        async with opened(external) as node:
            with pytest.raises(OSError) as info:
                await node.pwrite(0, bytes(65536), WRITE_COMPRESSED)
            return info.value.errno or 0

    assert run(refused()) == errno.ENOTSUP

    async def other_formats() -> list[str]:
        graph = Graph(EventBus())
        (tmp_path / "raw").write_bytes(bytes(MiB))
        below: Any = FileOptions(filename=str(tmp_path / "raw"))
        found = []
        for inner in (below, CompressOptions(file=Options(file=FileOptions(filename=str(path))))):
            with pytest.raises(Error) as info:
                await graph.add(CompressOptions(node_name="c", file=inner))
            found.append(info.value.desc)
        assert not graph.nodes
        return found

    text = "Compression is not supported for underlying format: "
    assert run(other_formats()) == [text + "file", text + "compress"]


def test_full_disk_and_cancellation(tmp_path: Path) -> None:
    """What could not be written is not there, and its place is free again."""
    image = empty_image(4 * MiB, cluster_size=4096)

    async def main() -> bytes:
        node, below = await open_logged(image)
        await node.pwrite(0, b"ab" * 8192, WRITE_COMPRESSED)
        await node.flush()
        failing = True

        def fault(kind: str) -> None:
            if kind == "write" and failing:
                raise NO_SPACE

        below.fault = fault
        with pytest.raises(OSError) as info:
            await node.pwrite(MiB, b"cd" * 65536, WRITE_COMPRESSED)
        assert info.value.errno == errno.ENOSPC
        failing = False
        for steps in range(40):
            task = asyncio.get_running_loop().create_task(
                node.pwrite(2 * MiB + steps * 16384, b"ef" * 8192, WRITE_COMPRESSED)
            )
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await node.pwrite(MiB, b"gh" * 65536, WRITE_COMPRESSED)
        await node.flush()
        assert await node.pread(MiB, 131072) == b"gh" * 65536
        await close(node)
        return bytes(below.data)

    path = tmp_path / "disk"
    path.write_bytes(run(main()))
    images.assert_clean(path)
    assert images.read_all(path, "qcow2", tmp_path / "raw")[MiB : MiB + 131072] == b"gh" * 65536


def test_descriptor_limits() -> None:
    assert descriptor(512, 512, 9) == 1 << 62 | 512
    assert descriptor(1000, 100, 16) == 1 << 62 | 1 << 54 | 1000
    with pytest.raises(OSError) as info:
        descriptor(1 << 49, 100, 21)
    assert info.value.errno == errno.EFBIG


def test_event(tmp_path: Path) -> None:
    """A compressed write is announced to ``blkdebug``."""
    path = tmp_path / "disk"
    path.write_bytes(empty_image(MiB))

    async def main() -> None:
        async with opened(path) as node:
            seen: list[str] = []
            assert node.driver.file is not None
            node.driver.file.node.debug_event = seen.append
            await node.pwrite(0, b"x" * 65536, WRITE_COMPRESSED)
            assert seen.count("write_compressed") == seen.count("l2_update_compressed") == 1

    run(main())
