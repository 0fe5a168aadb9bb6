"""The copying engine: what jobs and copy-before-write copy ranges with.

`Transfer` brings one range from a source to a target; `Workers` runs such pieces of work side by side, bounded in
number and in bytes. What is to be copied, in which order, and what to do about errors is up to the user of both.

Offsets and lengths are bytes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Final, Protocol

from pyqsd.aio import eager
from pyqsd.block import iov as iovs
from pyqsd.block.backend import BlockBackend
from pyqsd.block.driver import BACKGROUND, MAY_UNMAP
from pyqsd.block.extents import ALLOCATED, DRIVER, OFFSET_VALID, ZERO
from pyqsd.block.node import Node

#: So long, in seconds, pieces that need no waiting may keep the loop from everything else.
_TURN: Final = 0.0002
#: Smaller pieces are copied in the loop's thread if that needs no waiting: handing them over costs more.
_BACKGROUND_FROM: Final = 64 << 10
#: So many times copying in the kernel may fail, one after the other, before it is given up.
_OFFLOAD_TRIES: Final = 4


class End(Protocol):
    """A source or a target: a node, or a user's way to one (`pyqsd.block.backend.BlockBackend`)."""

    async def preadv(self, offset: int, length: int, iov: list[memoryview], flags: int = 0) -> None: ...
    async def copy_from(self, offset: int, length: int, source: Node, at: int) -> bool: ...
    async def pwritev(self, offset: int, length: int, iov: list[memoryview], flags: int = 0) -> None: ...
    async def pwrite_zeroes(self, offset: int, length: int, flags: int = 0) -> None: ...
    async def pdiscard(self, offset: int, length: int) -> None: ...


class CopyError(Exception):
    """A request of a copy failed.

    Arguments:
        reading: it was the source's, else the target's.
        error: what it raised.
    """

    def __init__(self, reading: bool, error: OSError) -> None:
        super().__init__(str(error))
        self.reading = reading
        self.error = error


class Transfer:
    """Brings ranges from `source` to `target`, where they have the same offsets.

    Arguments:
        write_flags: for every write of data (`WRITE_COMPRESSED`, `WRITE_UNCHANGED`).
        zero_flags: for every write of zeroes.
        offload: let the kernel copy from file to file where it can (copy_file_range).

    The methods raise CopyError.
    """

    def __init__(
        self, source: End, target: End, *, write_flags: int = 0, zero_flags: int = MAY_UNMAP, offload: bool = True
    ) -> None:
        self._source = source
        self._target = target
        self._write_flags = write_flags
        self._zero_flags = zero_flags
        #: How often copying in the kernel may still fail before it is no longer tried.
        self._offload = _OFFLOAD_TRIES if offload and not write_flags else 0
        #: Buffers to use again, by size.
        self._buffers: dict[int, list[memoryview]] = {}

    async def copy(self, offset: int, length: int) -> None:
        """Read and write."""
        if self._offload and await self._copied_by_kernel(offset, length):
            return
        free = self._buffers.setdefault(length, [])
        buffer = free.pop() if free else iovs.aligned_buffer(length)
        flags = BACKGROUND if length > _BACKGROUND_FROM else 0
        try:
            try:
                await self._source.preadv(offset, length, [buffer], flags)
            except OSError as exc:
                raise CopyError(True, exc) from exc
            try:
                await self._target.pwritev(offset, length, [buffer], flags | self._write_flags)
            except OSError as exc:
                raise CopyError(False, exc) from exc
        finally:
            if len(self._buffers) > 4:
                # Odd sizes, at the ends of areas, are not worth keeping.
                self._buffers.clear()
            self._buffers.setdefault(length, []).append(buffer)

    async def _copied_by_kernel(self, offset: int, length: int) -> bool:
        source = self._source.node if isinstance(self._source, BlockBackend) else self._source
        place = in_one_place(source, offset, length) if isinstance(source, Node) else None
        if place is None:
            return False
        try:
            copied = await self._target.copy_from(offset, length, *place)
        except OSError as exc:
            raise CopyError(False, exc) from exc
        self._offload = _OFFLOAD_TRIES if copied else max(self._offload - 1, 0)
        return copied

    async def zero(self, offset: int, length: int) -> None:
        """Make the range of the target read as zeroes."""
        try:
            await self._target.pwrite_zeroes(offset, length, self._zero_flags)
        except OSError as exc:
            raise CopyError(False, exc) from exc

    async def discard(self, offset: int, length: int) -> None:
        """The content of the range of the target does not matter."""
        try:
            await self._target.pdiscard(offset, length)
        except OSError as exc:
            raise CopyError(False, exc) from exc


def in_one_place(node: Node, offset: int, length: int) -> tuple[Node, int] | None:
    """The protocol node that has all of the range, in one piece and as it is read, and where; None if there is none, or
    that is not known without waiting."""
    while offset + length <= node.length:
        driver = node.driver
        if driver.is_protocol:
            return node, offset
        if driver.is_filter:
            # It may have something to say about every read.
            return None
        extent = driver.map(offset, length)
        if extent is None:
            return None
        n, flags, below, at = extent
        if n < length or flags & (DRIVER | ZERO):
            return None
        if flags & OFFSET_VALID:
            assert below is not None
            node, offset = below, at
        elif flags & ALLOCATED or driver.backing is None:
            return None
        else:
            node = driver.backing.node
    return None


class Workers:
    """Runs pieces of work side by side::

        async with Workers(16, 16 << 20) as workers:
            for offset, length in areas:
                await workers.run(length, transfer.copy(offset, length))

    A piece that fails keeps new ones from being begun: its exception is raised by the next `run`, or at the end of the
    block. The block ends only when all pieces have; if it is left with an exception, that one is raised. A cancelled
    block cancels its pieces.

    Arguments:
        most: pieces under way at most.
        most_bytes: the sum of their lengths at most; a piece that is longer runs alone.
    """

    def __init__(self, most: int, most_bytes: int) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._running = 0
        #: Bytes of the pieces under way.
        self.bytes = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._error: BaseException | None = None
        self._waiters: list[asyncio.Future[None]] = []
        self._turn = 0.0

    @property
    def running(self) -> int:
        """Pieces under way."""
        return self._running

    async def run(self, length: int, piece: Coroutine[Any, Any, None]) -> None:
        """Begin a piece of `length` bytes, once there is room for it. Raises what an earlier one raised."""
        try:
            while self._running and (self._running >= self._most or self.bytes + length > self._most_bytes):
                await self.wait_one()
            if time.monotonic() - self._turn > _TURN:
                await asyncio.sleep(0)
                self._turn = time.monotonic()
            self.check()
        except BaseException:
            piece.close()
            raise
        self._running += 1
        self.bytes += length

        def done(_: Any, exc: BaseException | None) -> None:
            self._running -= 1
            self.bytes -= length
            if exc is not None and self._error is None and not isinstance(exc, asyncio.CancelledError):
                self._error = exc
            waiters, self._waiters = self._waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

        task = eager.start(piece, done)
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def check(self) -> None:
        """Raises what a piece raised."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    async def wait_one(self) -> None:
        """Until one of the pieces under way has ended, if there is any."""
        if self._running:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter

    async def idle(self) -> None:
        """Until no piece is under way. Raises nothing: an error stays until somebody asks for it."""
        while self._running:
            await self.wait_one()

    async def settle(self) -> None:
        """Until no piece is under way. Raises what one of them raised."""
        await self.idle()
        self.check()

    async def __aenter__(self) -> Workers:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            try:
                await self.settle()
            except asyncio.CancelledError:
                await self._abandon()
                raise
        elif isinstance(exc, asyncio.CancelledError):
            await self._abandon()
        else:
            await self.idle()

    async def _abandon(self) -> None:
        for task in self._tasks:
            task.cancel()
        while self._tasks:
            await asyncio.wait(self._tasks)
