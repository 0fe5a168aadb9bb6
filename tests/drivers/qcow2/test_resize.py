"""Growing and shrinking, with qemu-img as the judge of what is left."""

from __future__ import annotations

import asyncio
import errno
import random
from pathlib import Path
from typing import Any

import pytest

from pyqsd.block.driver import MAY_UNMAP
from pyqsd.block.node import Node
from pyqsd.qapi.errors import Error
from tests.drivers.qcow2.support import Model, opened, run
from tests.support import images

MiB = 1 << 20


@pytest.mark.parametrize(
    "options", ["", "cluster_size=512", "cluster_size=512,refcount_bits=64", "compat=0.10", "extended_l2=on"]
)
def test_grow_and_shrink(tmp_path: Path, options: str) -> None:
    path = images.create(tmp_path / "disk", MiB, options=options)

    async def main() -> bytearray:
        content = bytearray(MiB)
        async with opened(path) as node:
            for step, size in enumerate((3 * MiB, 9 * MiB + 512, 2 * MiB + 1536, 40 * MiB, 5 * MiB, 0, MiB)):
                await node.truncate(size)
                assert node.length == size
                content = content[:size].ljust(size, b"\0")
                model = Model(node, step, initial=bytes(content))
                await model.verify()
                if size:
                    await model.workload(40, 1, 100_000)
                content = model.content
        return content

    content = run(main())
    images.assert_clean(path)
    assert images.read_all(path, "qcow2", tmp_path / "raw") == content


class Resized:
    """A disk that is written while it is resized. What was cut off reads as zeroes when it comes back."""

    def __init__(self, node: Node, seed: int) -> None:
        self.node = node
        self.random = random.Random(seed)
        self.content = bytearray(node.length)
        #: Requests in flight: their ranges, and the lowest end that the disk has had meanwhile.
        self.busy: dict[tuple[int, int], int] = {}
        self.end = node.length  # requests are below

    def free_range(self, unit: int, largest: int) -> tuple[int, int] | None:
        """A range that no request in flight touches."""
        for _ in range(20):
            length = self.random.randrange(1, largest + 1) // unit * unit or unit
            if length > self.end:
                continue
            offset = self.random.randrange(self.end - length + 1) // unit * unit
            if all(offset >= stop or start >= offset + length for start, stop in self.busy):
                return offset, length
        return None

    async def request(self) -> None:
        found = self.free_range(self.random.choice((1, 512, 4096)), self.random.choice((3000, 70_000, 300_000)))
        if found is None:
            await asyncio.sleep(0)
            return
        offset, length = found
        self.busy[offset, offset + length] = self.end
        action = self.random.random()
        try:
            if action < 0.6:
                data = self.random.randbytes(length)
                await self.node.pwrite(offset, data)
                self.wrote(offset, data)
            elif action < 0.75:
                await self.node.pwrite_zeroes(offset, length, self.random.choice((0, MAY_UNMAP)))
                self.wrote(offset, bytes(length))
            elif action < 0.85:
                await self.node.pdiscard(offset, length)
                if (n := self.kept(offset, length)) > 0:
                    self.wrote(offset, await self.node.pread(offset, n))
            else:
                data = await self.node.pread(offset, length)
                n = self.kept(offset, length)
                assert n <= 0 or data[:n] == self.content[offset : offset + n], f"{offset:#x}+{length:#x}"
        except OSError as exc:
            # It came too late for what has been cut off.
            assert exc.errno == errno.EIO and self.kept(offset, length) < length, exc
            if (n := self.kept(offset, length)) > 0:
                self.wrote(offset, await self.node.pread(offset, n))
        finally:
            del self.busy[offset, offset + length]

    def kept(self, offset: int, length: int) -> int:
        """How much of a request in flight has not been cut off since it began; may be negative."""
        return min(length, self.busy[offset, offset + length] - offset)

    def wrote(self, offset: int, data: bytes) -> None:
        n = min(len(data), len(self.content) - offset)
        if n > 0:
            self.content[offset : offset + n] = data[:n]

    async def resize(self, length: int) -> None:
        self.end = min(self.end, length)
        self.busy = {where: min(low, length) for where, low in self.busy.items()}
        cut = min(length, len(self.content))
        await self.node.truncate(length)
        assert self.node.length == length
        # Requests that were there before the resize have ended.
        del self.content[cut:]
        self.content += bytes(length - cut)
        self.end = length


@pytest.mark.parametrize(
    "options",
    [
        "data_file=DIR/data",
        "data_file=DIR/data,data_file_raw=on",
        "data_file=DIR/data,cluster_size=512",
        "data_file=DIR/data,extended_l2=on,cluster_size=16k",
        "data_file=DIR/data,data_file_raw=on,extended_l2=on,lazy_refcounts=on",
        "cluster_size=4k",
        "extended_l2=on",
    ],
)
@pytest.mark.parametrize("seed", [1, 2])
def test_resized_while_written(tmp_path: Path, options: str, seed: int) -> None:
    path = images.create(tmp_path / "disk", 2 * MiB, options=options.replace("DIR", str(tmp_path)))

    async def main() -> bytearray:
        async with opened(path) as node:
            disk = Resized(node, seed)

            async def write() -> None:
                for _ in range(12):
                    await disk.request()

            for number in range(14):
                writers = [asyncio.ensure_future(write()) for _ in range(4)]
                for _ in range(disk.random.randrange(6)):
                    await asyncio.sleep(0)
                unit = 512 if number % 2 else MiB // 4
                await disk.resize(disk.random.randrange(MiB, 6 * MiB) // unit * unit)
                await asyncio.gather(*writers)
            await disk.resize(3 * MiB)
            assert await node.pread(0, node.length) == disk.content
        async with opened(path) as node:
            assert await node.pread(0, node.length) == disk.content
        return disk.content

    content = run(main())
    images.assert_clean(path)
    assert images.read_all(path, "qcow2", tmp_path / "raw") == content
    if "data_file_raw" in options:
        assert (tmp_path / "data").read_bytes() == content


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("unit", [65536, 512])
def test_growth_hides_a_longer_backing_file(tmp_path: Path, compat: str, unit: int) -> None:
    base = images.create(tmp_path / "base", 4 * MiB)
    images.io(base, "write -P 7 0 4M")
    path = images.create(tmp_path / "disk", MiB + unit, options=f"compat={compat}", backing=base)

    async def main() -> None:
        async with opened(path) as node:
            await node.pwrite(MiB + unit - 512, b"x" * 512)
            await node.truncate(3 * MiB)
            assert await node.pread(MiB + unit, 3 * MiB - MiB - unit) == bytes(3 * MiB - MiB - unit)
            assert await node.pread(MiB, unit - 512) == b"\7" * (unit - 512)

    run(main())
    images.assert_clean(path)
    content = images.read_all(path, "qcow2", tmp_path / "raw")
    assert content[: MiB + unit - 512] == b"\7" * (MiB + unit - 512)
    assert content[MiB + unit :] == bytes(3 * MiB - MiB - unit)


def test_what_was_cut_off_does_not_come_back(tmp_path: Path) -> None:
    path = images.create(tmp_path / "disk", 2 * MiB)

    async def main() -> None:
        async with opened(path) as node:
            await node.pwrite(0, b"\5" * (2 * MiB))
            await node.truncate(MiB)
            await node.truncate(2 * MiB)
            assert await node.pread(MiB, MiB) == bytes(MiB)

    run(main())
    images.assert_clean(path)
    assert path.stat().st_size < MiB + 8 * 65536


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
@pytest.mark.parametrize("options", ["", "cluster_size=4k", "compat=0.10", "extended_l2=on,cluster_size=16k"])
def test_preallocation(tmp_path: Path, mode: str, options: str) -> None:
    path = images.create(tmp_path / "disk", MiB + 4096, options=options)
    images.io(path, "write -P 9 0 1028k")

    async def main() -> None:
        async with opened(path) as node:
            await node.truncate(6 * MiB, preallocation=mode)
            assert node.length == 6 * MiB
            assert await node.pread(MiB + 4096, 5 * MiB - 4096) == bytes(5 * MiB - 4096)
            await node.pwrite(3 * MiB, b"\3" * MiB)

    run(main())
    images.assert_clean(path)
    content = images.read_all(path, "qcow2", tmp_path / "raw")
    assert content == b"\t" * (MiB + 4096) + bytes(2 * MiB - 4096) + b"\3" * MiB + bytes(2 * MiB)
    assert images.check(path)["allocated-clusters"] == images.check(path)["total-clusters"]
    occupied = path.stat().st_blocks * 512
    assert occupied < 4 * MiB if mode == "metadata" else occupied >= 6 * MiB


@pytest.mark.parametrize(
    ("options", "snapshot", "size", "how", "words"),
    [
        ("", False, 1000, {}, "The new size must be a multiple of 512"),
        ("", False, 512, {"preallocation": "metadata"}, "Preallocation can't be used for shrinking an image"),
        ("compat=0.10", True, 2 * MiB, {}, "Can't resize a v2 image which has snapshots"),
        ("cluster_size=512", False, 1 << 40, {}, "Failed to grow the L1 table: File too large"),
    ],
)
def test_refused(tmp_path: Path, options: str, snapshot: bool, size: int, how: dict[str, Any], words: str) -> None:
    path = images.create(tmp_path / "disk", MiB, options=options)
    if snapshot:
        images.peers.run("qemu-img", "snapshot", "-c", "one", path)

    async def main() -> None:
        async with opened(path) as node:
            with pytest.raises(Error) as caught:
                await node.truncate(size, **how)
            assert caught.value.desc == words
            assert node.length == MiB
            await node.pwrite(0, b"x")

    run(main())
    images.assert_clean(path)


def test_snapshot_keeps_its_size(tmp_path: Path) -> None:
    path = images.create(tmp_path / "disk", 2 * MiB, options="cluster_size=4k")
    images.io(path, "write -P 3 0 2M")
    images.peers.run("qemu-img", "snapshot", "-c", "one", path)

    async def main() -> None:
        async with opened(path) as node:
            await node.truncate(MiB)
            await node.pwrite(0, b"\4" * 65536)
            await node.truncate(30 * MiB)

    run(main())
    images.assert_clean(path)
    images.peers.run("qemu-img", "snapshot", "-a", "one", path)
    assert images.read_all(path, "qcow2", tmp_path / "raw") == b"\3" * (2 * MiB)
