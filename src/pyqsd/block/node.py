"""A block node: the one gate to a driver.

Everybody who wants to read or write an image goes through its node: it knows the range, the alignment, the requests in
flight and those that must not overlap, the dirty bitmaps and the write threshold. The graph side of a node (opening,
children, permissions, reopening) is in `pyqsd.block.graph`; block status is in `pyqsd.block.status`.

Offsets and lengths are bytes. I/O raises OSError.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from pyqsd.block import graph_perms, splitting, status, write_threshold
from pyqsd.block import iov as iovs
from pyqsd.block import permissions as perms
from pyqsd.block.child import Child
from pyqsd.block.driver import (
    FUA,
    MAY_UNMAP,
    NO_FALLBACK,
    ROLE_COW,
    ROLE_DATA,
    ROLE_FILTERED,
    Driver,
    Limits,
)
from pyqsd.block.extents import ALLOCATED, DRIVER, OFFSET_VALID, RAW, ZERO, Extent
from pyqsd.block.node_bitmaps import Marks, NodeBitmaps
from pyqsd.block.options import BlockdevOptions, BlockdevRef
from pyqsd.qapi.errors import Error

if TYPE_CHECKING:
    from pyqsd.block.graph import Graph
    from pyqsd.block.op_blockers import Blocker
    from pyqsd.block.pieces import Pieces

_NOT_SUPPORTED = (errno.ENOTSUP, errno.EOPNOTSUPP)


class Tracked:
    """A write that has not finished: ``[start, end)`` in bytes, and whether others must wait for it."""

    __slots__ = ("done", "end", "serialising", "start", "waits_for")

    def __init__(self, start: int, end: int, serialising: bool) -> None:
        self.start = start
        self.end = end
        self.serialising = serialising
        self.done: asyncio.Future[None] | None = None
        self.waits_for: Tracked | None = None

    def waits_for_any(self, other: Tracked) -> bool:
        """Whether this request waits, directly or not, for `other`."""
        step: Tracked | None = self
        while step is not None:
            if step is other:
                return True
            step = step.waits_for
        return False


class Node:
    """A node of the block graph. Made by `Graph`; see `docs/architecture.md` for the contract with its users."""

    def __init__(self, graph: Graph, name: str, driver_class: type[Driver], options: BlockdevOptions) -> None:
        self.graph = graph
        self.name = name
        self.options = options
        self.driver: Driver = driver_class(self, options)
        self.children: list[Child] = []
        self.parents: list[Child] = []
        #: `Driver.open` has finished, and `Driver.close` has not begun.
        self.opened = False
        #: It was added by the user by name, and only the user removes it.
        self.monitor_owned = False
        #: A job has put it here: it goes along with nobody's options.
        self.job_owned = False
        #: A filter that a job has put here without a name from the user, who is told of its child instead.
        self.implicit = False
        #: It is open only to be checked: nobody else finds it, and what a check can deal with may be broken.
        self.check_only = False
        # Effective options; `Graph` sets them before the driver is opened.
        self.read_only = False
        self.auto_read_only = False
        self.active = True
        #: What an inline child is without its own option ``active``.
        self.inherits_active = True
        self.cache_direct = False
        self.no_flush = False
        self.discard_unmap = False
        self.force_share = False
        self.detect_zeroes = "off"
        self.length = 0
        self.limits = Limits()
        #: Called with the name of a `BlkdebugEvent` by whoever is about to do what it stands for; set by ``blkdebug``.
        self.debug_event: Callable[[str], None] | None = None
        #: Requests go to the driver as they are: it is a protocol that takes any length.
        self._leaf = False
        #: What is called with every write.
        self._marks: Marks = ()
        self.dirty_bitmaps = NodeBitmaps(self._set_marks)
        #: The reads that take their time, if somebody must wait for those of a range; see `pyqsd.block.point_in_time`.
        self.watched_reads: Pieces | None = None
        #: Who keeps the node from what; see `pyqsd.block.op_blockers`.
        self.op_blockers: list[Blocker] = []
        #: Offset above which a write raises BLOCK_WRITE_THRESHOLD, 0: none.
        self.write_threshold = 0
        self.wr_highest_offset = 0
        #: The name of the backing file that was opened because the image names it; None: it names none, or not opened.
        self.auto_backing_filename: str | None = None
        self.in_flight = 0
        self._tracked: set[Tracked] = set()
        self._serialising = 0
        self._write_generation = 0
        self._flushed_generation = 0
        self._flushing: asyncio.Future[None] | None = None
        self._idle_waiters: list[asyncio.Future[None]] = []

    def __repr__(self) -> str:
        return f"<Node {self.name} ({self.driver.name})>"

    def description(self) -> str:
        """How messages call this node as a parent."""
        return f"node '{self.name}'"

    # --- what drivers use while they open ----------------------------------------------------------------------------

    async def open_child(self, name: str, ref: BlockdevRef, role: int, context: str = "") -> Child:
        """Open (or find) the node that `ref` describes and attach it as the child `name`; see `Graph.open_child`."""
        return await self.graph.open_child(self, name, ref, role, context)

    async def open_backing(self, filename: str, fmt: str | None) -> Child | None:
        """Open the backing file that an image names and attach it as ``backing``."""
        from pyqsd.block.open_image import open_backing

        return await open_backing(self, filename, fmt)

    async def open_data_file(self, filename: str) -> Child:
        """Open the data file that an image names and attach it as ``data-file``."""
        from pyqsd.block.open_image import open_data_file

        return await open_data_file(self, filename)

    def set_read_only(self, reason: str) -> None:
        """Fall back to read-only if ``auto-read-only`` allows it; else raise Error(`reason`) with EACCES."""
        if self.read_only:
            return
        if not self.auto_read_only:
            raise Error(reason, errno.EACCES)
        self.read_only = True

    def refresh_limits(self) -> None:
        """Ask the driver again for its limits, and pass that on to the parents that depend on them."""
        limits = Limits()
        for child in self.children:
            if child.role & (ROLE_DATA | ROLE_FILTERED | ROLE_COW):
                limits.merge(child.node.limits)
        self.driver.refresh_limits(limits)
        self.limits = limits
        self._leaf = self.driver.is_protocol and not limits.max_transfer and self.detect_zeroes == "off"
        for edge in self.parents:
            if isinstance(edge.parent, Node) and edge.parent.opened:
                edge.parent.refresh_limits()

    # --- without waiting ---------------------------------------------------------------------------------------------

    def read_now(self, offset: int, length: int, iov: list[memoryview]) -> bool:
        """Read the whole range if that takes no waiting; False otherwise, with the buffers in any state."""
        if offset + length > self.length or offset < 0:
            return False
        return self.driver.read_now(offset, length, iov)

    def reads_as_zeroes_now(self, offset: int, length: int) -> bool:
        """Whether the whole range is known, without any waiting or I/O, to read as zeroes."""
        node: Node = self
        while offset + length <= node.length:
            driver = node.driver
            if driver.is_filter:
                # It may have something to say about every read.
                return False
            extent = driver.map(offset, length)
            if extent is None:
                return False
            n, flags, below, at = extent
            if n < length or flags & DRIVER:
                return False
            if flags & ZERO:
                return True
            if flags & RAW and below is not None:
                node, offset = below, at
            elif flags & (ALLOCATED | OFFSET_VALID) or not driver.supports_backing:
                return False
            elif driver.backing is None or offset >= driver.backing.node.length:
                return True
            else:
                node = driver.backing.node
        return False

    def read_mapped_now(self, offset: int, length: int, iov: list[memoryview]) -> bool:
        """`Driver.read_now` of drivers that have a map."""
        extent = self.driver.map(offset, length)
        if extent is None:
            return False
        n, flags, node, at = extent
        if n == length and flags & OFFSET_VALID and not flags & (ZERO | DRIVER):
            assert node is not None
            return node.read_now(at, length, iov)
        done = 0
        while True:
            part = iov if n == length else iovs.part(iov, done, n)
            if flags & DRIVER:
                if not self.driver.read_own_now(offset + done, n, part):
                    return False
            elif flags & ZERO:
                iovs.fill_zero(part)
            elif flags & OFFSET_VALID:
                assert node is not None
                if not node.read_now(at, n, part):
                    return False
            elif flags & ALLOCATED or not self._read_backing_now(offset + done, n, part):
                return False
            done += n
            if done == length:
                return True
            extent = self.driver.map(offset + done, length - done)
            if extent is None:
                return False
            n, flags, node, at = extent

    def _read_backing_now(self, offset: int, length: int, iov: list[memoryview]) -> bool:
        backing = self.driver.backing
        if backing is None or offset >= backing.node.length:
            iovs.fill_zero(iov)
            return True
        return backing.node.read_now(offset, length, iov)

    def write_now(self, offset: int, length: int, iov: list[memoryview]) -> bool:
        """Write the whole range if that takes no waiting; False otherwise, and the caller writes it all again with
        `pwritev`. The caller holds the permission to write."""
        end = offset + length
        if end > self.length or offset < 0 or self._serialising or self.detect_zeroes != "off":
            return False
        if not self.driver.write_now(offset, length, iov):
            return False
        self._write_generation += 1
        if end > self.wr_highest_offset:
            self.wr_highest_offset = end
        for mark in self._marks:
            mark(offset, length)
        if self.write_threshold and end > self.write_threshold:
            write_threshold.exceeded(self, offset, length)
        return True

    def write_mapped_now(self, offset: int, length: int, iov: list[memoryview]) -> bool:
        """`Driver.write_now` of drivers that have a `map_write`."""
        target = self.driver.map_write(offset, length)
        if target is None:
            return False
        n, node, at = target
        if n == length:
            return node.write_now(at, length, iov)
        done = 0
        while True:
            if not node.write_now(at, n, iovs.part(iov, done, n)):
                return False
            done += n
            if done == length:
                return True
            target = self.driver.map_write(offset + done, length - done)
            if target is None:
                return False
            n, node, at = target

    # --- reading -----------------------------------------------------------------------------------------------------

    async def preadv(self, offset: int, length: int, iov: list[memoryview], flags: int = 0) -> None:
        """Fill `iov` with the content of the range; what is beyond the end reads as zeroes. With `BACKGROUND` it is
        left to a worker as far as it can be."""
        if not flags and self.read_now(offset, length, iov):
            return
        if offset < 0 or length < 0:
            raise OSError(errno.EIO, "Request out of range")
        if offset + length > self.length:
            inside = max(0, self.length - offset)
            iovs.fill_zero(iovs.part(iov, inside, length - inside))
            if not inside:
                return
            iov, length = iovs.part(iov, 0, inside), inside
        self.in_flight += 1
        watched = self.watched_reads
        piece = None if watched is None else watched.begin(offset, offset + length)
        try:
            align = self.limits.request_alignment
            if align > 1 and (offset | length) & (align - 1):
                await self._read_padded(offset, length, iov, align)
            elif self._leaf:
                await self._read_protocol(offset, length, iov)
            else:
                await self._read(offset, length, iov, flags)
        finally:
            if watched is not None and piece is not None:
                watched.finish(piece)
            self._request_done()

    async def _read_padded(self, offset: int, length: int, iov: list[memoryview], align: int) -> None:
        start, end = splitting.aligned(offset, length, align)
        bounce = iovs.aligned_buffer(end - start)
        await self._read(start, end - start, [bounce])
        iovs.copy(iov, [bounce[offset - start : offset - start + length]])

    async def _read(self, offset: int, length: int, iov: list[memoryview], flags: int = 0) -> None:
        most = self.limits.max_transfer
        if most and length > most:
            for at in range(0, length, most):
                n = min(most, length - at)
                await self._read_mapped(offset + at, n, iovs.part(iov, at, n), flags)
        else:
            await self._read_mapped(offset, length, iov, flags)

    async def _read_mapped(self, offset: int, length: int, iov: list[memoryview], request_flags: int = 0) -> None:
        driver = self.driver
        if driver.is_protocol:
            await self._read_protocol(offset, length, iov)
            return
        done = 0
        while done < length:
            left = length - done
            extent = driver.map(offset + done, left)
            if extent is None:
                extent = await driver.load_map(offset + done, left)
            n, flags, node, at = extent
            part = iov if n == length else iovs.part(iov, done, n)
            if flags & DRIVER:
                await driver.preadv(offset + done, n, part)
            elif flags & ZERO:
                iovs.fill_zero(part)
            elif flags & OFFSET_VALID:
                assert node is not None
                if driver.file is not None and driver.file.node.debug_event is not None and not driver.is_filter:
                    driver.file.node.debug_event("read_aio")
                await node.preadv(at, n, part, request_flags)
            elif driver.backing is None or offset + done >= driver.backing.node.length:
                iovs.fill_zero(part)
            else:
                if driver.file is not None and driver.file.node.debug_event is not None:
                    driver.file.node.debug_event("read_backing_aio")
                await driver.backing.node.preadv(offset + done, n, part, request_flags)
            done += n

    async def _read_protocol(self, offset: int, length: int, iov: list[memoryview]) -> None:
        try:
            await self.driver.preadv(offset, length, iov)
        except OSError as exc:
            if not self._for_misalignment(exc, iov):
                raise
            bounce = iovs.aligned_buffer(length)
            await self.driver.preadv(offset, length, [bounce])
            iovs.copy(iov, [bounce])

    def _for_misalignment(self, exc: OSError, iov: list[memoryview]) -> bool:
        """Whether a request has failed, without having done anything, because of the addresses of its buffers. Looking
        at these before each request would cost more than to be told once in a while."""
        need = self.limits.memory_alignment
        return exc.errno == errno.EINVAL and need > 1 and not iovs.is_aligned(iov, need)

    async def pread(self, offset: int, length: int) -> bytearray:
        """The content of the range, as a new buffer."""
        data = bytearray(length)
        await self.preadv(offset, length, [memoryview(data)])
        return data

    # --- writing -----------------------------------------------------------------------------------------------------

    async def pwritev(self, offset: int, length: int, iov: list[memoryview], flags: int = 0) -> None:
        """Write `iov`. Beyond the end it extends the node (drivers write their metadata so)."""
        if not flags and self.write_now(offset, length, iov):
            return
        self._check_writable(offset, length)
        align = self.limits.request_alignment
        if align > 1 and (offset | length) & (align - 1):
            if not length:
                return
            await self._tracked_write(
                *splitting.aligned(offset, length, align),
                True,
                lambda: self._write_padded(offset, length, iov, flags, align),
                offset,
                length,
            )
            return
        # The usual case of `_tracked_write`, without a closure.
        request = Tracked(offset, offset + length, False)
        self.in_flight += 1
        self._tracked.add(request)
        try:
            if self._serialising:
                await self._wait_for_overlapping(request)
            if self._leaf:
                await self._driver_write(offset, length, iov, flags)
                self._extended_to(offset + length)
            else:
                await self._write(offset, length, iov, flags)
        finally:
            self._write_done(request, offset, length, False)

    async def copy_from(self, offset: int, length: int, source: Node, at: int) -> bool:
        """Write what the protocol node `source` has at the offset `at`, if the kernel can copy it by itself; else
        False, and the caller reads and writes it all. Raises OSError."""
        self._check_writable(offset, length)
        end = offset + length
        if (
            end > self.length
            or self._serialising
            or self.detect_zeroes != "off"
            or self.debug_event is not None
            or (offset | length) & (self.limits.request_alignment - 1)
        ):
            return False
        request = Tracked(offset, end, False)
        self.in_flight += 1
        source.in_flight += 1
        self._tracked.add(request)
        try:
            return await self.driver.copy_from(offset, length, source, at)
        finally:
            source._request_done()
            self._write_done(request, offset, length, False)

    async def pwrite(self, offset: int, data: bytes | bytearray | memoryview, flags: int = 0) -> None:
        """Write `data` (any buffer of bytes)."""
        view = memoryview(data).cast("B")
        await self.pwritev(offset, len(view), [view], flags)

    def _check_writable(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0:
            raise OSError(errno.EIO, "Request out of range")
        if self.read_only or not self.active:
            raise OSError(errno.EPERM, "Node is read-only")

    async def _tracked_write(
        self,
        start: int,
        end: int,
        serialising: bool,
        action: Callable[[], Awaitable[None]],
        offset: int,
        length: int,
        discard: bool = False,
    ) -> None:
        """Run a write that touches ``[start, end)``, after the writes that it must not overlap; `offset` and `length`
        are what the user asked for. A `discard` changes the content, but needs no space."""
        request = Tracked(start, end, serialising)
        self.in_flight += 1
        self._tracked.add(request)
        if serialising:
            self._serialising += 1
        try:
            if self._serialising:
                await self._wait_for_overlapping(request)
            await action()
        finally:
            if serialising:
                self._serialising -= 1
            self._write_done(request, offset, length, discard)

    async def exclusively(self, start: int, end: int, action: Callable[[], Awaitable[None]]) -> None:
        """Run `action`, which writes to ``[start, end)`` what can be read there anyway, while no write touches it."""
        request = Tracked(start, end, True)
        self.in_flight += 1
        self._tracked.add(request)
        self._serialising += 1
        try:
            await self._wait_for_overlapping(request)
            await action()
        finally:
            self._serialising -= 1
            self._write_generation += 1
            self._tracked.discard(request)
            if request.done is not None:
                request.done.set_result(None)
            self._request_done()

    def _write_done(self, request: Tracked, offset: int, length: int, discard: bool) -> None:
        # Even a failed write may have changed something.
        self._write_generation += 1
        end = offset + length
        if end > self.wr_highest_offset and not discard:
            self.wr_highest_offset = end
        for mark in self._marks:
            mark(offset, length)
        if self.write_threshold and end > self.write_threshold and not discard:
            write_threshold.exceeded(self, offset, length)
        self._tracked.discard(request)
        if request.done is not None:
            request.done.set_result(None)
        self._request_done()

    async def _wait_for_overlapping(self, request: Tracked) -> None:
        while True:
            for other in self._tracked:
                if (
                    other is not request
                    and (other.serialising or request.serialising)
                    and other.start < request.end
                    and request.start < other.end
                    # Whoever waits for us already must not be waited for.
                    and not other.waits_for_any(request)
                ):
                    break
            else:
                return
            if other.done is None:
                other.done = asyncio.get_running_loop().create_future()
            request.waits_for = other
            try:
                await asyncio.shield(other.done)
            finally:
                request.waits_for = None

    def _set_marks(self, marks: Marks) -> None:
        self._marks = marks

    async def _write_padded(self, offset: int, length: int, iov: list[memoryview], flags: int, align: int) -> None:
        """Read, modify, write: the range is widened to `align`."""
        start, end = splitting.aligned(offset, length, align)
        bounce = iovs.aligned_buffer(end - start)
        await self._read_edges(offset, length, align, bounce)
        iovs.copy([bounce[offset - start : offset - start + length]], iov)
        await self._write(start, end - start, [bounce], flags)

    async def _read_edges(self, offset: int, length: int, align: int, buffer: memoryview) -> None:
        """What is in the first and the last block of the widened range and does not belong to ``[offset, offset +
        length)``, into the beginning and the end of `buffer`. Two blocks that are all there is are read at once."""
        start, end = splitting.aligned(offset, length, align)
        head, tail = start < offset, end > offset + length
        at_once = end - start == align or (head and tail and end - start == 2 * align)
        event = self.debug_event
        if event is not None:
            if head:
                event("pwritev_rmw_head")
            if tail and at_once:
                event("pwritev_rmw_tail")
        if head or at_once:
            await self._read_blocks(start, end - start if at_once else align, align, buffer)
        if event is not None:
            if head:
                event("pwritev_rmw_after_head")
            if tail:
                event("pwritev_rmw_after_tail" if at_once else "pwritev_rmw_tail")
        if tail and not at_once:
            await self._read_blocks(end - align, align, align, buffer[len(buffer) - align :])
            if event is not None:
                event("pwritev_rmw_after_tail")

    async def _read_blocks(self, at: int, length: int, align: int, into: memoryview) -> None:
        """Blocks at the end of the node or beyond it are zeroes, as `into` is already."""
        length = min(length, -(-self.length // align) * align - at)
        if length > 0:
            await self._read(at, length, [into[:length]])

    async def _write(self, offset: int, length: int, iov: list[memoryview], flags: int) -> None:
        """An aligned write, which may turn out to be one of zeroes, in pieces that the driver takes."""
        if self.detect_zeroes != "off" and length and iovs.is_zero(iov):
            await self._zero_aligned(offset, length, flags | MAY_UNMAP if self.detect_zeroes == "unmap" else flags)
            return
        if self.debug_event is not None:
            self.debug_event("pwritev")
        most = self.limits.max_transfer
        if most and length > most:
            # A flush in place of FUA covers all pieces when it comes with the last.
            early = flags if self.driver.write_flags & FUA else flags & ~FUA
            for at in range(0, length, most):
                n = min(most, length - at)
                piece_flags = early if at + n < length else flags
                await self._driver_write(offset + at, n, iovs.part(iov, at, n), piece_flags)
        else:
            await self._driver_write(offset, length, iov, flags)
        if self.debug_event is not None:
            self.debug_event("pwritev_done")
        self._extended_to(offset + length)

    async def _driver_write(self, offset: int, length: int, iov: list[memoryview], flags: int) -> None:
        driver = self.driver
        try:
            await driver.pwritev(offset, length, iov, flags & driver.write_flags)
        except OSError as exc:
            if not self._for_misalignment(exc, iov):
                raise
            bounce = iovs.aligned_buffer(length)
            iovs.copy([bounce], iov)
            await driver.pwritev(offset, length, [bounce], flags & driver.write_flags)
        if flags & FUA and not driver.write_flags & FUA:
            self._write_generation += 1
            await self.flush()

    def _extended_to(self, end: int) -> None:
        if end > self.length:
            self._set_length(end)

    def _set_length(self, length: int) -> None:
        if length == self.length:
            return
        self.length = length
        for bitmap in self.dirty_bitmaps.values():
            bitmap.truncate(length)
        for edge in self.parents:
            edge.parent.child_resized(edge)

    def reread_length(self) -> None:
        """The driver has looked at the image again."""
        self._set_length(self.driver.length())

    def child_resized(self, edge: Child) -> None:
        """A child has another length now: the content of filters and of raw changes with it."""
        if not self.opened:
            return
        extent = self.driver.map(0, 1) if edge is self.driver.file else None
        if self.driver.is_filter or (extent is not None and extent[1] & RAW):
            self._set_length(self.driver.length())

    async def pwrite_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        """Make the range read as zeroes; with `MAY_UNMAP` the space may be given back, with `NO_FALLBACK` it raises
        ENOTSUP rather than write zero bytes."""
        self._check_writable(offset, length)
        if not self.discard_unmap:
            flags &= ~MAY_UNMAP
        align = max(self.limits.request_alignment, 1)
        if not length:
            return
        if (offset | length) & (align - 1) == 0:
            await self._tracked_write(
                offset, offset + length, False, lambda: self._zero_aligned(offset, length, flags), offset, length
            )
            return
        if flags & NO_FALLBACK:
            raise OSError(errno.ENOTSUP, "A part of a block cannot be zeroed efficiently")
        await self._tracked_write(
            *splitting.aligned(offset, length, align),
            True,
            lambda: self._zero_padded(offset, length, flags, align),
            offset,
            length,
        )

    async def _zero_padded(self, offset: int, length: int, flags: int, align: int) -> None:
        """Zeroes from the middle of a block, or to it: the blocks at the ends are read, modified and written."""
        start, end = splitting.aligned(offset, length, align)
        edges = iovs.aligned_buffer(min(end - start, 2 * align))
        await self._read_edges(offset, length, align, edges)
        iovs.fill_zero([edges[offset - start : len(edges) - (end - offset - length)]])
        data_flags = flags & ~MAY_UNMAP
        if end - start == align or (start < offset and offset + length < end and end - start == 2 * align):
            await self._write(start, end - start, [edges], data_flags)
            return
        if start < offset:
            await self._write(start, align, [edges[:align]], data_flags)
            start += align
        tail = end - align if end > offset + length and end > start else end
        if start < tail:
            await self._zero_aligned(start, tail - start, flags)
        if tail < end:
            await self._write(tail, align, [edges[len(edges) - align :]], data_flags)

    async def _zero_aligned(self, offset: int, length: int, flags: int) -> None:
        """An aligned zero write, in pieces that the driver takes."""
        if self.debug_event is not None:
            self.debug_event("pwritev_zero")
        driver = self.driver
        at, end = offset, offset + length
        flush = False
        while at < end:
            n = splitting.zero_piece(at, end - at, self.limits)
            try:
                await driver.pwrite_zeroes(at, n, flags & driver.zero_flags)
                flush |= bool(flags & FUA) and not driver.zero_flags & FUA
            except OSError as exc:
                if exc.errno not in _NOT_SUPPORTED or flags & NO_FALLBACK:
                    raise
                n = min(n, splitting.most_zero_bytes(self.limits))
                flush |= bool(flags & FUA) and not driver.write_flags & FUA
                write_flags = flags & ~(MAY_UNMAP | (0 if driver.write_flags & FUA else FUA))
                await self._driver_write(at, n, iovs.zero_views(n), write_flags)
            self._extended_to(at + n)
            at += n
        if flush:
            self._write_generation += 1
            await self.flush()
        if self.debug_event is not None:
            self.debug_event("pwritev_done")

    async def pdiscard(self, offset: int, length: int) -> None:
        """The content is no longer needed. Nothing happens where ``discard=ignore`` or the driver cannot."""
        self._check_writable(offset, length)
        end = min(offset + length, self.length)
        if not self.discard_unmap or offset >= end:
            return
        await self._tracked_write(offset, end, False, lambda: self._discard(offset, end), offset, end - offset, True)

    async def _discard(self, start: int, end: int) -> None:
        align = max(self.limits.request_alignment, 1)
        at = start
        while at < end:
            n = splitting.discard_piece(at, end - at, self.limits)
            # Parts of blocks stay, but for the last one, which ends where the node does.
            if not at % align and (not n % align or at + n == self.length):
                try:
                    await self.driver.pdiscard(at, n)
                except OSError as exc:
                    # Some storage minds a head or a tail that is less than it can discard.
                    minded = exc.errno == errno.EINVAL and splitting.is_part(at, n, self.limits)
                    if exc.errno not in _NOT_SUPPORTED and not minded:
                        raise
            at += n

    # --- flushing, resizing ------------------------------------------------------------------------------------------

    async def flush(self) -> None:
        """Everything whose write has completed is durable afterwards (unless ``cache.no-flush``)."""
        if self.read_only or not self.active:
            return
        self.in_flight += 1
        try:
            generation = self._write_generation
            while self._flushing is not None:
                await asyncio.shield(self._flushing)
            self._flushing = asyncio.get_running_loop().create_future()
            try:
                driver = self.driver
                event = driver.file.node.debug_event if driver.file is not None else None
                if event is not None:
                    event("flush_to_os")
                if driver.is_protocol:
                    if self.needs_flush and generation != self._flushed_generation:
                        await driver.flush()
                else:
                    await driver.flush()
                if event is not None and self.needs_flush:
                    event("flush_to_disk")
                for child in tuple(self.children):
                    if child.perm & (perms.WRITE | perms.WRITE_UNCHANGED) and child is not driver.unflushed:
                        await child.node.flush()
                if generation > self._flushed_generation:
                    self._flushed_generation = generation
            finally:
                waiters, self._flushing = self._flushing, None
                waiters.set_result(None)
        finally:
            self._request_done()

    @property
    def needs_flush(self) -> bool:
        """Whether anything was written since the last flush, and flushes are wanted at all."""
        return not self.no_flush and self._write_generation != self._flushed_generation

    async def truncate(
        self, length: int, *, exact: bool = False, preallocation: str = "off", zero_new: bool = False
    ) -> None:
        """Resize to `length` bytes. Raises Error with QSD's words, or OSError."""
        if length < 0:
            raise Error("Image size cannot be negative", errno.EINVAL)
        if self.read_only:
            raise Error("Image is read-only", errno.EACCES)
        old = self.length
        backing = self.driver.backing
        if length > old and backing is not None and backing.node.length > old:
            # What the backing file has there must not show through.
            zero_new = True
        new_area = Tracked(min(old, length), max(old, length), True)
        self.in_flight += 1
        self._tracked.add(new_area)
        self._serialising += 1
        try:
            await self._wait_for_overlapping(new_area)
            await self.driver.truncate(length, exact, preallocation, zero_new)
            self._write_generation += 1
            self._set_length(self.driver.length())
            self.refresh_limits()
        finally:
            self._tracked.discard(new_area)
            self._serialising -= 1
            if new_area.done is not None:
                new_area.done.set_result(None)
            self._request_done()

    def content_replaced(self) -> None:
        """The driver went back to a snapshot: all of the content may be another one, and the length."""
        self._write_generation += 1
        self._set_length(self.driver.length())
        self.refresh_limits()

    # --- block status ------------------------------------------------------------------------------------------------

    async def block_status(self, offset: int, length: int, want_zero: bool = True) -> Extent:
        """Where the bytes of a prefix of the range are, in this layer only."""
        self.in_flight += 1
        try:
            return await status.block_status(self, offset, length, want_zero)
        finally:
            self._request_done()

    async def block_status_above(
        self, base: Node | None, offset: int, length: int, want_zero: bool = True
    ) -> tuple[Extent, int]:
        """The same through the backing chain, down to but without `base`; and the depth of the layer that decided
        (1: this node; 0: none)."""
        self.in_flight += 1
        try:
            return await status.block_status_above(self, base, offset, length, want_zero)
        finally:
            self._request_done()

    # --- requests in flight ------------------------------------------------------------------------------------------

    def _request_done(self) -> None:
        self.in_flight -= 1
        if not self.in_flight and self._idle_waiters:
            waiters, self._idle_waiters = self._idle_waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

    async def wait_idle(self) -> None:
        """Wait until no request is in flight here."""
        while self.in_flight:
            waiter = asyncio.get_running_loop().create_future()
            self._idle_waiters.append(waiter)
            await waiter

    # --- permissions -------------------------------------------------------------------------------------------------

    def refresh_perms(self) -> None:
        """Work out again the permissions on and below this node. Raises Error and changes nothing on a conflict."""
        graph_perms.refresh([self])

    def edge_below(self) -> Child | None:
        """The edge to the next layer: to what a filter filters, or to the backing file."""
        return self.driver.file if self.driver.is_filter else self.driver.backing

    def below(self) -> Node | None:
        """The next layer."""
        edge = self.edge_below()
        return edge.node if edge is not None else None

    def explicit(self) -> Node:
        """This node, or the first below it that is not an implicit filter."""
        node = self
        while node.implicit:
            edge = node.edge_below()
            assert edge is not None
            node = edge.node
        return node
