"""A block driver over a bytearray, for tests of the core: alignment, delays and failures on demand."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterator
from contextlib import contextmanager

from pyqsd.block.driver import FUA, MAY_UNMAP, ROLE_COW, ROLE_IMAGE, Driver, Limits
from pyqsd.block.extents import ALLOCATED, DATA, OFFSET_VALID, ZERO, Extent
from pyqsd.block.graph import Graph
from pyqsd.block.node import Node
from pyqsd.block.options import BlockdevOptions, BlockdevRef, BlockdevRefOrNull
from pyqsd.qapi.command import EventBus
from pyqsd.qapi.types import NULL


class MemoryOptions(BlockdevOptions, tag="test-memory"):
    """No options of its own."""


class Memory(Driver):
    """Content in `data`; `align` bytes of request alignment; every waiting request passes through `gate`."""

    name = "test-memory"
    Options = MemoryOptions
    is_protocol = True
    write_flags = FUA
    zero_flags = MAY_UNMAP
    align = 1
    zeroes_supported = True

    def __init__(self, node: Node, options: MemoryOptions) -> None:
        super().__init__(node, options)
        self.data = bytearray(1 << 16)
        self.log: list[tuple[str, int, int]] = []
        self.gate: asyncio.Event | None = None
        self.flushes = 0

    async def open(self) -> None:
        pass

    async def close(self) -> None:
        pass

    def length(self) -> int:
        return len(self.data)

    def refresh_limits(self, limits: Limits) -> None:
        limits.request_alignment = self.align

    def map(self, offset: int, length: int) -> Extent | None:
        return (length, DATA | ALLOCATED, None, 0)

    def read_now(self, offset: int, length: int, iov: list[memoryview]) -> bool:
        return False

    def write_now(self, offset: int, length: int, iov: list[memoryview]) -> bool:
        return False

    async def _pass(self, what: str, offset: int, length: int) -> None:
        if offset % self.align or length % self.align:
            raise OSError(errno.EINVAL, "unaligned")
        self.log.append((what, offset, length))
        if self.gate is not None:
            await self.gate.wait()
        else:
            await asyncio.sleep(0)

    async def preadv(self, offset: int, length: int, iov: list[memoryview]) -> None:
        await self._pass("read", offset, length)
        for view in iov:
            piece = self.data[offset : offset + len(view)]
            view[: len(piece)] = piece
            offset += len(view)

    async def pwritev(self, offset: int, length: int, iov: list[memoryview], flags: int) -> None:
        await self._pass("write", offset, length)
        if offset + length > len(self.data):
            self.data.extend(bytes(offset + length - len(self.data)))
        for view in iov:
            self.data[offset : offset + len(view)] = view
            offset += len(view)

    async def pwrite_zeroes(self, offset: int, length: int, flags: int) -> None:
        if not self.zeroes_supported:
            raise OSError(errno.ENOTSUP, "no")
        await self._pass("zero", offset, length)
        self.data[offset : offset + length] = bytes(length)

    async def pdiscard(self, offset: int, length: int) -> None:
        await self._pass("discard", offset, length)

    async def flush(self) -> None:
        self.flushes += 1

    async def truncate(self, length: int, exact: bool, preallocation: str, zero_new: bool) -> None:
        if length < len(self.data):
            del self.data[length:]
        else:
            self.data.extend(bytes(length - len(self.data)))


class Aligned(Memory):
    """The same with sectors of 512 bytes."""

    align = 512


class LayerOptions(BlockdevOptions, tag="test-layer", kw_only=True):
    """A format with a main child and, if wanted, a backing file."""

    file: BlockdevRef
    backing: BlockdevRefOrNull | None = None


class Layer(Driver):
    """A format: data is in ``file`` where `allocated` (4 KiB clusters) has it, and in the backing file elsewhere."""

    name = "test-layer"
    Options = LayerOptions
    supports_backing = True

    def __init__(self, node: Node, options: LayerOptions) -> None:
        super().__init__(node, options)
        self.allocated: set[int] = set()
        self.zero: set[int] = set()
        self.size = 1 << 16
        self.closed = False

    async def open(self) -> None:
        await self.node.open_child("file", self.options.file, ROLE_IMAGE)
        if self.options.backing not in (None, NULL):
            await self.node.open_child("backing", self.options.backing, ROLE_COW)

    async def close(self) -> None:
        self.closed = True

    def length(self) -> int:
        return self.size

    def map(self, offset: int, length: int) -> Extent | None:
        cluster = offset // 4096
        n = min(length, (cluster + 1) * 4096 - offset)
        if cluster in self.zero:
            return (n, ZERO | ALLOCATED, None, 0)
        if cluster in self.allocated:
            assert self.file is not None
            return (n, DATA | ALLOCATED | OFFSET_VALID, self.file.node, offset)
        return (n, 0, None, 0)

    async def pwritev(self, offset: int, length: int, iov: list[memoryview], flags: int) -> None:
        assert self.file is not None
        assert offset % 4096 == length % 4096 == 0
        await self.file.node.pwritev(offset, length, iov)
        self.allocated.update(range(offset // 4096, (offset + length) // 4096))

    async def reopen_prepare(self, options: LayerOptions, read_only: bool) -> str:
        return "prepared"


@contextmanager
def memory_drivers(memory: type[Memory] = Memory) -> Iterator[None]:
    """The drivers of this module can be opened by name."""
    from pyqsd.block import registry

    original = registry.driver_class
    ours = {"test-memory": memory, "test-layer": Layer}
    registry.driver_class = lambda name: ours[name] if name in ours else original(name)  # type: ignore[assignment]
    try:
        yield
    finally:
        registry.driver_class = original


async def open_memory(driver: type[Memory] = Memory, **members: object) -> tuple[Graph, Node, Memory]:
    """A graph with one node ``mem`` of this driver, opened by the usual road."""
    graph = Graph(EventBus())
    with memory_drivers(driver):
        node = await graph.add(MemoryOptions(node_name="mem", **members))  # type: ignore[arg-type]
    assert isinstance(node.driver, Memory)
    return graph, node, node.driver
