"""What the block device makes of requests, seen from the driver below it."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable
from typing import Any

from pyqsd.block import permissions as perms
from pyqsd.block.backend import BlockBackend
from pyqsd.exports.virtio.blk import BlkDevice, BlkQueue
from pyqsd.exports.virtio.memory import GuestMemory, Region
from pyqsd.exports.virtio.virtqueue import Virtqueue
from pyqsd.monitor.daemon import Daemon
from tests.block.inprocess import Commands
from tests.block.memory_driver import Memory, MemoryOptions, memory_drivers

SIZE = 8


class Guest:
    """A driver with one queue in 64 KiB of memory: rings at the front, data behind 16 KiB."""

    def __init__(self, backend: BlockBackend, **options: Any) -> None:
        self.device = BlkDevice(
            backend,
            **{"writable": True, "writethrough": False, "block_size": 512, "queues": 1, "serial": b"s", **options},
        )
        self.block = bytearray(65536)
        view = memoryview(self.block)
        self.notified = 0
        self.notification = asyncio.Event()
        self.problems: list[str] = []
        memory = GuestMemory([Region(0, view)])
        parts = view[:1024], view[1024 : 1024 + 6 + 2 * SIZE], view[2048 : 2048 + 6 + 8 * SIZE]
        queue = Virtqueue(memory, SIZE, *parts, 0, event_idx=False, notify=self.notify)
        self.queue = BlkQueue(self.device, queue, self.problems.append)
        self.index = 0

    def notify(self) -> None:
        self.notified += 1
        self.notification.set()

    def submit(self, kind: int, sector: int, length: int, writable: bool) -> None:
        """A request whose descriptors are 0 to 2; its data is at 32 KiB, its status at 16 KiB + 16."""
        struct.pack_into("<IIQ", self.block, 16384, kind, 0, sector)
        self.block[16400] = 0xFF
        chain = [(16384, 16, 1)] + ([(32768, length, 3 if writable else 1)] if length else []) + [(16400, 1, 2)]
        for i, (at, n, flags) in enumerate(chain):
            struct.pack_into("<QIHH", self.block, 16 * i, at, n, flags, i + 1 if flags & 1 else 0)
        struct.pack_into("<H", self.block, 1028 + 2 * (self.index % SIZE), 0)
        self.index += 1
        struct.pack_into("<H", self.block, 1026, self.index)
        self.queue.process()

    async def run(self, kind: int, sector: int = 0, length: int = 0, writable: bool = False) -> int:
        """One request, to its end; its status."""
        self.submit(kind, sector, length, writable)
        while struct.unpack_from("<H", self.block, 2050)[0] != self.index & 0xFFFF:
            self.notification.clear()
            await self.notification.wait()
        return self.block[16400]


def with_memory(test: Callable[[Commands, Memory, BlockBackend], Awaitable[None]]) -> None:
    """Run `test` with a node over a bytearray."""

    async def main() -> None:
        with memory_drivers():
            async with Daemon() as daemon:
                node = await daemon.graph.add(MemoryOptions(node_name="m"))
                backend = BlockBackend(daemon.graph, "the test", perms.CONSISTENT_READ | perms.WRITE, perms.ALL)
                backend.insert(node)
                assert isinstance(node.driver, Memory)
                await test(Commands(daemon), node.driver, backend)
                backend.remove()

    asyncio.run(main())


def test_writes_are_durable_where_the_driver_does_not_flush() -> None:
    async def test(c: Commands, below: Memory, backend: BlockBackend) -> None:
        fua: list[int] = []
        real = below.pwritev

        async def pwritev(offset: int, length: int, iov: list[memoryview], flags: int) -> None:
            fua.append(flags)
            await real(offset, length, iov, flags)

        below.pwritev = pwritev  # type: ignore[method-assign]
        guest = Guest(backend)
        assert await guest.run(1, 0, 512) == 0
        assert not any(fua)
        guest.device.set_config(32, b"\0")
        fua.clear()
        assert await guest.run(1, 0, 512) == 0
        assert fua == [1]
        through = Guest(backend, writethrough=True)
        fua.clear()
        assert await through.run(1, 0, 512) == 0
        assert fua == [1]

    with_memory(test)


def test_a_failing_request_says_so() -> None:
    async def test(c: Commands, below: Memory, backend: BlockBackend) -> None:
        async def fail(*request: Any) -> None:
            raise OSError(5, "broken")

        below.pwritev = below.preadv = below.flush = fail  # type: ignore[method-assign,assignment]
        below.write_now = below.read_now = lambda *request: False  # type: ignore[method-assign]
        guest = Guest(backend)
        assert await guest.run(1, 0, 512) == 1
        assert await guest.run(0, 0, 512, writable=True) == 1
        assert not guest.problems

    with_memory(test)


def test_stopping_waits_and_an_abandoned_ring_is_left_alone() -> None:
    async def test(c: Commands, below: Memory, backend: BlockBackend) -> None:
        below.write_now = lambda *request: False  # type: ignore[method-assign]
        below.gate = asyncio.Event()
        guest = Guest(backend)
        guest.submit(1, 0, 512, writable=False)
        stopping = asyncio.create_task(guest.queue.stop())
        for _ in range(5):
            await asyncio.sleep(0)
        assert not stopping.done() and guest.block[16400] == 0xFF
        below.gate.set()
        await stopping
        assert guest.block[16400] == 0 and struct.unpack_from("<H", guest.block, 2050)[0] == 1 and guest.notified == 1
        below.gate = asyncio.Event()
        other = Guest(backend)
        other.submit(1, 0, 512, writable=False)
        other.queue.abandon()
        below.gate.set()
        before = bytes(other.block)
        await other.queue.stop()
        assert bytes(other.block) == before and not other.notified

    with_memory(test)
