"""Opening images in this process, over real files and over files that keep a log of every write."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from pyqsd.block.driver import MAY_UNMAP, NO_FALLBACK, Driver
from pyqsd.block.extents import ALLOCATED, DATA, Extent
from pyqsd.block.graph import Graph
from pyqsd.block.node import Node
from pyqsd.block.options import BlockdevOptions
from pyqsd.drivers.formats.qcow2 import write
from pyqsd.drivers.formats.qcow2.options import Options
from pyqsd.drivers.protocols.file import Options as FileOptions
from pyqsd.qapi.command import Event, EventBus

T = TypeVar("T")


def run(coro: Coroutine[Any, Any, T]) -> T:
    """Run a test's coroutine, with an end to every hang."""
    # Not as the result of the task: asyncio.run makes a repr of that, of all its bytes, to forget it again.
    found: list[T] = []

    async def limited() -> None:
        found.append(await asyncio.wait_for(coro, 100))

    asyncio.run(limited())
    return found[0]


@asynccontextmanager
async def opened(path: Path, graph: Graph | None = None, **options: Any) -> AsyncIterator[Node]:
    """A qcow2 node over the file at `path`, closed at the end."""
    graph = graph or Graph(EventBus())
    options.setdefault("discard", "unmap")
    options.setdefault("node_name", "q")
    node = await graph.add(Options(file=FileOptions(filename=str(path)), **options))
    try:
        yield node
    finally:
        await close(node)


async def close(node: Node) -> None:
    """Close a node as the user does."""
    node.monitor_owned = False
    await node.graph.unref(node)


def events_of(graph: Graph) -> list[Event]:
    """A list that grows with every event from now on."""
    found: list[Event] = []
    graph.events.subscribe(found.append)
    return found


class LogOptions(BlockdevOptions, tag="test-log"):
    """No options of its own."""


class LogFile(Driver):
    """A file in memory that remembers every write and flush in `log`: ("write", offset, bytes), ("zero", offset,
    length), ("resize", length), ("flush", position when it began). Every request waits a little, so that requests
    mix."""

    name = "test-log"
    Options = LogOptions
    is_protocol = True
    zero_flags = MAY_UNMAP | NO_FALLBACK

    def __init__(self, node: Node, options: Any) -> None:
        super().__init__(node, options)
        self.data = bytearray()
        self.log: list[tuple[Any, ...]] = []
        #: Called with the kind of each request; may raise OSError.
        self.fault: Any = None
        #: How many of all reads and writes are done without waiting.
        self.inline = 0.0
        #: How many were.
        self.inline_writes = 0
        self.random = random.Random(1)

    async def open(self) -> None:
        pass

    async def close(self) -> None:
        pass

    def length(self) -> int:
        return len(self.data)

    def allocated_size(self) -> int | None:
        return len(self.data)

    def map(self, offset: int, length: int) -> Extent | None:
        return (length, DATA | ALLOCATED, None, 0)

    def read_now(self, offset: int, length: int, iov: list[memoryview]) -> bool:
        if self.random.random() >= self.inline:
            return False
        self._read(offset, iov)
        return True

    def write_now(self, offset: int, length: int, iov: list[memoryview]) -> bool:
        if self.random.random() >= self.inline:
            return False
        data = b"".join(iov)
        if self.fault is not None or self.random.random() < 0.05:
            # It breaks off behind some sector.
            data = data[: max(0, ((offset + self.random.randrange(length)) & ~511) - offset)]
        self._write(offset, data)
        self.inline_writes += len(data) == length
        return len(data) == length

    async def _pass(self, kind: str) -> None:
        for _ in range(self.random.randrange(3)):
            await asyncio.sleep(0)
        if self.fault is not None:
            self.fault(kind)

    def _extend(self, end: int) -> None:
        if end > 1 << 30:
            raise OSError(errno.EFBIG, "File too large")
        if end > len(self.data):
            self.data.extend(bytes(end - len(self.data)))

    async def preadv(self, offset: int, length: int, iov: list[memoryview]) -> None:
        await self._pass("read")
        self._read(offset, iov)

    def _read(self, offset: int, iov: list[memoryview]) -> None:
        for view in iov:
            view[:] = self.data[offset : offset + len(view)].ljust(len(view), b"\0")
            offset += len(view)

    async def pwritev(self, offset: int, length: int, iov: list[memoryview], flags: int) -> None:
        await self._pass("write")
        data = b"".join(iov)
        assert len(data) == length
        self._write(offset, data)

    def _write(self, offset: int, data: bytes) -> None:
        self._extend(offset + len(data))
        self.data[offset : offset + len(data)] = data
        self.log.append(("write", offset, data))

    async def pwrite_zeroes(self, offset: int, length: int, flags: int) -> None:
        await self._pass("zero")
        self._extend(offset + length)
        self.data[offset : offset + length] = bytes(length)
        self.log.append(("zero", offset, length))

    async def pdiscard(self, offset: int, length: int) -> None:
        await self._pass("zero")
        assert offset + length <= len(self.data)
        self.data[offset : offset + length] = bytes(length)
        self.log.append(("zero", offset, length))

    async def flush(self) -> None:
        # Only what was written before it began is durable.
        began = len(self.log)
        await self._pass("flush")
        self.log.append(("flush", began))

    async def truncate(self, length: int, exact: bool, preallocation: str, zero_new: bool) -> None:
        await self._pass("resize")
        self._extend(length)
        del self.data[length:]
        self.log.append(("resize", length))


class DataLog(list[tuple[Any, ...]]):
    """The log of a data file as a part of another one, in which its entries are ("data", entry)."""

    def __init__(self, whole: list[tuple[Any, ...]]) -> None:
        self.whole = whole

    def __len__(self) -> int:
        return len(self.whole)

    def append(self, entry: tuple[Any, ...]) -> None:
        self.whole.append(("data", entry))


def logged(graph: Graph, image: bytes) -> LogFile:
    """A node of the graph that is a logged copy of `image`."""
    name = f"log{len(graph.nodes)}"
    below = Node(graph, name, LogFile, LogOptions(node_name=name))
    driver = below.driver
    assert isinstance(driver, LogFile)
    driver.data = bytearray(image)
    below.discard_unmap = True
    below.length = len(image)
    below.opened = True
    graph.nodes[name] = below
    return driver


async def open_logged(
    image: bytes, graph: Graph | None = None, data: bytes | None = None, **options: Any
) -> tuple[Node, LogFile]:
    """A qcow2 node over a logged copy of `image`, and one of the data file `data`, which logs to the same list."""
    graph = graph or Graph(EventBus())
    driver = logged(graph, image)
    if data is not None:
        data_driver = logged(graph, data)
        data_driver.log = DataLog(driver.log)
        options["data_file"] = data_driver.node.name
    options.setdefault("discard", "unmap")
    options.setdefault("node_name", f"q{len(graph.nodes)}")
    node = await graph.add(Options(file=driver.node.name, **options))
    return node, driver


def never_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes to new clusters are always tried without waiting, whatever became of the last ones."""
    monkeypatch.setattr(write, "_PAUSE_FIRST", 0)
    monkeypatch.setattr(write, "_PAUSE_LONGEST", 0)


class Model:
    """What a disk must contain, and random requests that change both.

    Requests that run at the same time get parts of the disk of their own (`lanes`), so that the outcome is defined.
    """

    def __init__(self, node: Node, seed: int, *, v2: bool = False, initial: bytes | None = None) -> None:
        self.node = node
        self.content = bytearray(node.length) if initial is None else bytearray(initial)
        self.random = random.Random(seed)
        self.v2 = v2

    async def request(self, start: int, end: int, largest: int) -> None:
        """One random request inside of ``[start, end)``."""
        rnd, node = self.random, self.node
        length = min(rnd.choice((1, 512, 700, 4096, 16384, 65536, largest, rnd.randrange(1, largest + 1))), end - start)
        offset = rnd.randrange(start, end - length + 1)
        if rnd.random() < 0.5:
            offset = max(start, offset & ~4095)
            length = min(length, end - offset)
        action = rnd.random()
        if action < 0.5:
            data = rnd.randbytes(length)
            self.content[offset : offset + length] = data
            await node.pwrite(offset, data)
        elif action < 0.65:
            self.content[offset : offset + length] = bytes(length)
            await node.pwrite_zeroes(offset, length, rnd.choice((0, MAY_UNMAP)))
        elif action < 0.8:
            # What is discarded may read as anything in version 2; elsewhere as zeroes, in whole clusters.
            await node.pdiscard(offset, length)
            size = node.limits.pdiscard_alignment
            first = -(-offset // size) * size
            last = (offset + length) // size * size if offset + length != node.length else node.length
            if first < last and not (self.v2 and node.driver.backing is not None):
                self.content[first:last] = bytes(last - first)
        else:
            data = await node.pread(offset, length)
            assert data == self.content[offset : offset + length]

    async def workload(self, requests: int, lanes: int, largest: int, flush: float = 0.03) -> None:
        """`requests` random requests, `lanes` at a time."""
        size = self.node.length // lanes

        async def lane(number: int) -> None:
            start = number * size
            end = self.node.length if number == lanes - 1 else start + size
            for _ in range(requests // lanes):
                await self.request(start, end, min(largest, end - start))
                if self.random.random() < flush:
                    await self.node.flush()

        await asyncio.gather(*(lane(number) for number in range(lanes)))

    async def verify(self) -> None:
        """The disk is the model."""
        step = 1 << 20
        for at in range(0, self.node.length, step):
            n = min(step, self.node.length - at)
            data = await self.node.pread(at, n)
            if data != self.content[at : at + n]:
                first = next(i for i in range(n) if data[i] != self.content[at + i])
                raise AssertionError(f"differs at {at + first:#x}")


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")
