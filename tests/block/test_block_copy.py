"""The copying engine: ranges from a source to a target, and pieces of work side by side."""

from __future__ import annotations

import asyncio
import random
import subprocess
from pathlib import Path

import pytest

from pyqsd.block.block_copy import CopyError, Transfer, Workers, in_one_place
from pyqsd.block.driver import FUA
from pyqsd.drivers.protocols import _calls
from tests.block.inprocess import Commands, run

MIB = 1 << 20
PIECE = 65536


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths that the kernel has copied."""
    lengths: list[int] = []
    real = _calls.copy_range

    def copy_range(source: int, at: int, target: int, offset: int, length: int) -> bool:
        lengths.append(length)
        return real(source, at, target, offset, length)

    monkeypatch.setattr(_calls, "copy_range", copy_range)
    return lengths


async def open_disks(c: Commands, source: Path, fmt: str, target: Path) -> None:
    await c.add(fmt, "s", file={"driver": "file", "filename": str(source)})
    await c.add("raw", "t", offset=PIECE, file={"driver": "file", "filename": str(target)})


async def bring(c: Commands, transfer: Transfer) -> None:
    async with Workers(4, 4 * PIECE) as workers:
        for at in range(0, c.graph.find("s").length, PIECE):
            await workers.run(PIECE, transfer.copy(at, PIECE))


def chain(tmp_path: Path) -> bytes:
    """``top.qcow2`` over ``base.qcow2``: clusters of both, zero clusters, and unallocated ones. Its content."""
    content = bytearray(random.Random(2).randbytes(MIB))
    (tmp_path / "raw").write_bytes(content)
    commands = ["write -P 7 128k 128k", "write -z 320k 64k", "write -P 8 515k 1k"]
    for start, end, value in ((128, 256, 7), (320, 384, 0), (515, 516, 8)):
        content[start << 10 : end << 10] = bytes([value]) * ((end - start) << 10)
    for line in (
        ["qemu-img", "convert", "-O", "qcow2", "raw", "base.qcow2"],
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2"],
        ["qemu-io", *(arg for command in commands for arg in ("-c", command)), "top.qcow2"],
    ):
        subprocess.run(line, check=True, cwd=tmp_path, stdout=subprocess.DEVNULL)
    return bytes(content)


@pytest.mark.parametrize("kernel", [True, False])
def test_files_are_copied_by_the_kernel(
    tmp_path: Path, kernel: bool, copied: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = chain(tmp_path)
    (tmp_path / "t").write_bytes(bytes(PIECE + MIB))
    if not kernel:
        monkeypatch.setattr(_calls, "copy_range", lambda *call: copied.append(call[-1]))

    async def test(c: Commands) -> None:
        await open_disks(c, tmp_path / "top.qcow2", "qcow2", tmp_path / "t")
        target = c.graph.find("t")
        bitmap = target.dirty_bitmaps.add_anonymous(target.length, PIECE)
        source = c.graph.find("s")
        await source.pread(0, MIB)
        await bring(c, Transfer(source, target))
        assert bitmap.count == MIB and not target.in_flight and not source.in_flight
        await target.flush()

    run(test)
    assert (tmp_path / "t").read_bytes() == bytes(PIECE) + content
    # All but the zero cluster; where it does not work it is soon given up (four are under way at a time).
    assert copied == [PIECE] * (15 if kernel else len(copied))
    assert kernel or 4 <= len(copied) <= 8


def test_where_a_range_is(tmp_path: Path) -> None:
    chain(tmp_path)

    async def test(c: Commands) -> None:
        await open_disks(c, tmp_path / "top.qcow2", "qcow2", tmp_path / "raw")
        source = c.graph.find("s")
        await source.pread(0, MIB)
        base = source.driver.backing
        assert base is not None and source.driver.file is not None and base.node.driver.file is not None
        top_file, base_file = source.driver.file.node, base.node.driver.file.node
        for at, length, node in (
            (0, PIECE, base_file),
            (128 << 10, 2 * PIECE, top_file),
            (192 << 10, 2 * PIECE, None),
            (320 << 10, 512, None),
            (MIB - PIECE, 2 * PIECE, None),
        ):
            place = in_one_place(source, at, length)
            assert (place[0] if place else None) is node, at
            if place is not None and node is not None:
                assert await node.pread(place[1], length) == await source.pread(at, length)
        await c.add("copy-on-read", "filter", file="s")
        assert in_one_place(c.graph.find("filter"), 0, PIECE) is None

    run(test)


def test_what_the_kernel_does_not_copy(tmp_path: Path, copied: list[int]) -> None:
    content = chain(tmp_path)
    (tmp_path / "t").write_bytes(bytes(PIECE + MIB))

    async def test(c: Commands) -> None:
        await open_disks(c, tmp_path / "top.qcow2", "qcow2", tmp_path / "t")
        source, target = c.graph.find("s"), c.graph.find("t")
        await bring(c, Transfer(source, target, offload=False))
        await bring(c, Transfer(source, target, write_flags=FUA))
        # The end of the source, in the middle of a piece.
        assert in_one_place(source, MIB - 512, 1024) is None
        assert not copied
        with pytest.raises(CopyError) as info:
            await Transfer(source, source.driver.file.node if source.driver.file else source).copy(1 << 62, PIECE)
        assert info.value.error.errno

    run(test)
    assert (tmp_path / "t").read_bytes() == bytes(PIECE) + content


def test_workers_bound_what_is_under_way() -> None:
    async def main() -> None:
        most = most_bytes = 0
        gate = asyncio.Event()

        async def piece() -> None:
            nonlocal most, most_bytes
            most, most_bytes = max(most, workers.running), max(most_bytes, workers.bytes)
            await gate.wait()

        async with Workers(3, 100) as workers:
            for length in (10, 20, 30):
                await workers.run(length, piece())
            waiting = asyncio.create_task(workers.run(5, piece()))
            await asyncio.sleep(0)
            assert workers.running == 3 and not waiting.done()
            gate.set()
            await waiting
            # A piece that is longer than all that may be under way runs alone.
            await workers.run(1000, piece())
            assert workers.running <= 1
        assert most == 3 and most_bytes <= 1000 and not workers.running

    asyncio.run(main())


def test_a_failing_piece_ends_the_block_after_the_others() -> None:
    async def main() -> None:
        ended = []

        async def piece(fails: bool) -> None:
            await asyncio.sleep(0)
            if fails:
                raise OSError(5, "mistake")
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            ended.append(True)

        with pytest.raises(OSError, match="mistake"):
            async with Workers(10, 100) as workers:
                for fails in (False, True, False):
                    await workers.run(1, piece(fails))
        assert len(ended) == 2
        with pytest.raises(ValueError):
            async with Workers(10, 100) as workers:
                await workers.run(1, piece(False))
                raise ValueError
        assert len(ended) == 3

    asyncio.run(main())


def test_a_cancelled_block_cancels_its_pieces() -> None:
    async def main() -> None:
        cancelled = 0

        async def piece() -> None:
            nonlocal cancelled
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled += 1
                raise

        async def block() -> None:
            async with Workers(4, 100) as workers:
                for _ in range(8):
                    await workers.run(1, piece())

        task = asyncio.create_task(block())
        for _ in range(10):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert cancelled == 4

    asyncio.run(main())
