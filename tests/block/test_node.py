"""The gate: ranges, alignment, overlapping requests, zero writes, flushes, drains."""

from __future__ import annotations

import asyncio
import errno

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyqsd.block import permissions as perms
from pyqsd.block.backend import BlockBackend
from pyqsd.block.driver import FUA, MAY_UNMAP, NO_FALLBACK
from pyqsd.qapi.errors import Error

from .memory_driver import Aligned, Memory, open_memory

SIZE = 1 << 16

step = st.one_of(
    st.tuples(st.just("write"), st.integers(0, SIZE - 1), st.integers(1, 5000)),
    st.tuples(st.just("read"), st.integers(0, SIZE - 1), st.integers(1, 5000)),
    st.tuples(st.just("zero"), st.integers(0, SIZE - 1), st.integers(1, 5000)),
    st.tuples(st.just("flush"), st.just(0), st.just(0)),
)


@pytest.mark.parametrize("driver", [Memory, Aligned])
@settings(max_examples=60, deadline=None)
@given(steps=st.lists(step, max_size=30), zeroes=st.booleans())
def test_matches_a_bytearray(driver: type[Memory], steps: list[tuple[str, int, int]], zeroes: bool) -> None:
    async def run() -> None:
        _, node, memory = await open_memory(driver)
        memory.zeroes_supported = zeroes
        model = bytearray(SIZE)
        for number, (what, offset, length) in enumerate(steps):
            length = min(length, SIZE - offset)
            if what == "write":
                data = bytes([number + 1]) * length
                half = length // 2
                await node.pwritev(offset, length, [memoryview(data[:half]), memoryview(data[half:])])
                model[offset : offset + length] = data
            elif what == "zero":
                await node.pwrite_zeroes(offset, length)
                model[offset : offset + length] = bytes(length)
            elif what == "read":
                assert await node.pread(offset, length) == model[offset : offset + length]
            else:
                await node.flush()
        assert memory.data == model
        assert node.in_flight == 0

    asyncio.run(run())


def test_concurrent_unaligned_writes_do_not_lose_bytes() -> None:
    async def run() -> None:
        _, node, memory = await open_memory(Aligned)
        # Each block of 512 bytes is written by 128 requests of 4 bytes at once.
        data = bytes(i % 251 + 1 for i in range(4096))
        await asyncio.gather(*[node.pwrite(at, data[at : at + 4]) for at in range(0, 4096, 4)])
        assert memory.data[:4096] == data

    asyncio.run(run())


def test_unaligned_write_waits_for_overlapping_aligned_write() -> None:
    async def run() -> None:
        _, node, memory = await open_memory(Aligned)
        memory.gate = asyncio.Event()
        aligned = asyncio.ensure_future(node.pwrite(0, b"a" * 512))
        await asyncio.sleep(0)
        unaligned = asyncio.ensure_future(node.pwrite(100, b"b" * 10))
        for _ in range(5):
            await asyncio.sleep(0)
        assert memory.log == [("write", 0, 512)]
        memory.gate.set()
        await asyncio.gather(aligned, unaligned)
        assert memory.data[:512] == b"a" * 100 + b"b" * 10 + b"a" * 402

    asyncio.run(run())


def test_reads_beyond_the_end_are_zeroes() -> None:
    async def run() -> None:
        _, node, _ = await open_memory()
        await node.pwrite(SIZE - 4, b"last")
        assert await node.pread(SIZE - 4, 8) == b"last\0\0\0\0"
        assert await node.pread(SIZE + 100, 3) == b"\0\0\0"

    asyncio.run(run())


def test_no_fallback_refuses_to_write_zero_bytes() -> None:
    async def run() -> None:
        _, node, memory = await open_memory()
        memory.zeroes_supported = False
        with pytest.raises(OSError) as info:
            await node.pwrite_zeroes(0, 4096, NO_FALLBACK)
        assert info.value.errno == errno.ENOTSUP
        assert memory.log == []
        await node.pwrite_zeroes(0, 4096, MAY_UNMAP)
        assert memory.log == [("write", 0, 4096)]

    asyncio.run(run())


def test_detect_zeroes() -> None:
    async def run() -> None:
        from pyqsd.block.options import BlockdevDetectZeroesOptions

        _, node, memory = await open_memory(detect_zeroes=BlockdevDetectZeroesOptions.ON)
        await node.pwrite(0, bytes(4096))
        await node.pwrite(4096, bytes(4095) + b"x")
        assert [entry[0] for entry in memory.log] == ["zero", "write"]

    asyncio.run(run())


def test_flush_only_when_something_was_written() -> None:
    async def run() -> None:
        _, node, memory = await open_memory()
        await node.flush()
        assert memory.flushes == 0
        await node.pwrite(0, b"x", FUA)
        await node.flush()
        await node.flush()
        assert memory.flushes == 1

    asyncio.run(run())


def test_discard_only_with_unmap_and_whole_blocks() -> None:
    async def run() -> None:
        from pyqsd.block.options import BlockdevDiscardOptions

        _, node, memory = await open_memory(Aligned)
        await node.pdiscard(0, 4096)
        assert memory.log == []
        _, node, memory = await open_memory(Aligned, discard=BlockdevDiscardOptions.UNMAP)
        await node.pdiscard(100, 1500)
        assert memory.log == [("discard", 512, 1024)]

    asyncio.run(run())


def test_drain_waits_and_holds_back() -> None:
    async def run() -> None:
        graph, node, memory = await open_memory()
        backend = BlockBackend(graph, "an unnamed block device", perms.CONSISTENT_READ | perms.WRITE, perms.ALL)
        backend.insert(node)
        seen: list[str] = []
        backend.on_drain_begin = lambda: seen.append("begin")
        backend.on_drain_end = lambda: seen.append("end")
        memory.gate = asyncio.Event()
        first = asyncio.ensure_future(backend.pwritev(0, 1, [memoryview(b"1")]))
        await asyncio.sleep(0)

        drained = asyncio.Event()
        leave = asyncio.Event()

        async def drain() -> None:
            async with graph.drained(node):
                drained.set()
                await leave.wait()

        task = asyncio.ensure_future(drain())
        await asyncio.sleep(0)
        assert seen == ["begin"]
        assert not drained.is_set()
        second = asyncio.ensure_future(backend.pwritev(1, 1, [memoryview(b"2")]))
        memory.gate.set()
        await first
        await drained.wait()
        assert len(memory.log) == 1
        leave.set()
        await asyncio.gather(task, second)
        assert len(memory.log) == 2
        assert seen == ["begin", "end"]
        backend.remove()

    asyncio.run(run())


def test_backend_checks_the_range_and_permission() -> None:
    async def run() -> None:
        graph, node, _ = await open_memory()
        backend = BlockBackend(graph, "an unnamed block device", perms.CONSISTENT_READ, perms.ALL)
        backend.insert(node)
        buffer = [memoryview(bytearray(8))]
        with pytest.raises(OSError) as info:
            await backend.preadv(SIZE - 4, 8, buffer)
        assert info.value.errno == errno.EIO
        with pytest.raises(OSError) as info:
            await backend.pwritev(0, 8, buffer)
        assert info.value.errno == errno.EPERM
        assert not backend.write_now(0, 8, buffer)

    asyncio.run(run())


def test_permission_conflict_names_both() -> None:
    async def run() -> None:
        graph, node, _ = await open_memory()
        one = BlockBackend(graph, "block device 'one'", perms.CONSISTENT_READ, perms.CONSISTENT_READ)
        one.insert(node)
        two = BlockBackend(graph, "an unnamed block device", perms.CONSISTENT_READ | perms.WRITE, perms.ALL)
        with pytest.raises(Error) as info:
            two.insert(node)
        assert info.value.desc == (
            "Permission conflict on node 'mem': permissions 'write' are both required by an unnamed block device (uses "
            "node 'mem' as 'root' child) and unshared by block device 'one' (uses node 'mem' as 'root' child)."
        )
        assert len(node.parents) == 1
        one.remove()
        two.insert(node)

    asyncio.run(run())


def test_resize_tells_the_users_and_the_bitmaps() -> None:
    async def run() -> None:
        graph, node, memory = await open_memory()
        backend = BlockBackend(graph, "an unnamed block device", perms.CONSISTENT_READ, perms.ALL)
        backend.insert(node)
        sizes: list[int] = []
        backend.on_resize = lambda: sizes.append(node.length)
        await node.truncate(SIZE * 2)
        await node.truncate(SIZE)
        assert sizes == [SIZE * 2, SIZE]
        assert len(memory.data) == SIZE

    asyncio.run(run())
