"""The content of a node as it was at a point in time, while its users write to it.

What is about to be overwritten is copied to another node first; what was copied is read from there, and everything
else from the node itself. Bitmaps of clusters say what is still to be copied, what was overwritten since (and so is in
the target), and what may be read at all.

Offsets and lengths are bytes.
"""

from __future__ import annotations

import asyncio
import errno
from enum import StrEnum

from pyqsd.block import iov as iovs
from pyqsd.block import status
from pyqsd.block.block_copy import CopyError
from pyqsd.block.child import Child
from pyqsd.block.cluster_copy import ClusterCopy
from pyqsd.block.dirty_bitmap import DirtyBitmap
from pyqsd.block.extents import ALLOCATED, EOF, Extent
from pyqsd.block.graph import is_below
from pyqsd.block.node import Node
from pyqsd.block.pieces import Pieces


class OnCbwError(StrEnum):
    """What a copy that fails breaks: the write that it is for, or what was to be preserved."""

    BREAK_GUEST_WRITE = "break-guest-write"
    BREAK_SNAPSHOT = "break-snapshot"


class PointInTime:
    """Preserves the content of the child `source` of `node` as it is now with the help of its child `target`.

    Arguments:
        least, bitmap: as for `ClusterCopy`; with a bitmap, only what is dirty in it is preserved.
        on_error: what a failed copy breaks.
        timeout: seconds that a write waits for its copy; 0: as long as it takes.

    Raises Error.
    """

    def __init__(
        self,
        node: Node,
        source: Child,
        target: Child,
        *,
        least: int = 0,
        bitmap: DirtyBitmap | None = None,
        on_error: OnCbwError = OnCbwError.BREAK_GUEST_WRITE,
        timeout: int = 0,
    ) -> None:
        self.source = source
        self.target = target
        self.copier = copier = ClusterCopy(node, source, target, least, bitmap)
        length = source.node.length
        #: What is in the target because it was, or is about to be, overwritten.
        self.done = node.dirty_bitmaps.add_anonymous(length, copier.cluster, enabled=False)
        #: What may be read.
        self.access = node.dirty_bitmaps.add_anonymous(length, copier.cluster, enabled=False)
        self.access.merge(copier.to_copy)
        self.on_error = on_error
        self.timeout = timeout
        #: A copy failed, and the write was made all the same.
        self.broken = False
        self._node = node
        #: Reads of what is not in the target yet: it must not be overwritten meanwhile.
        self._reads = Pieces()
        #: Reads of the source, if users of the target read there what is not in the target yet.
        self._source_reads: Pieces | None = None
        self.children_changed()
        #: Copies that nobody waits for any more.
        self._left_behind: set[asyncio.Task[None]] = set()

    def children_changed(self) -> None:
        """The source or the target is another node now."""
        self.copier.children_changed()
        source = self.source.node
        if is_below(source, self.target.node):
            source.watched_reads = self._source_reads = source.watched_reads or Pieces()
        else:
            self._source_reads = None

    async def close(self) -> None:
        """Wait for all that goes on."""
        while self._left_behind:
            await asyncio.wait(self._left_behind)
        await self.copier.pieces.wait_for_all()

    # --- writing to the node -----------------------------------------------------------------------------------------

    def may_write_now(self, offset: int, length: int) -> bool:
        """Whether the range may be overwritten with nothing to copy and nothing to wait for."""
        end = offset + length
        if self._reads or (self._source_reads and self._source_reads.touching(offset, end)):
            return False
        if self.done.next_zero(offset, end) is None or self.broken:
            return True
        if not self.copier.is_settled(*self.copier.aligned(offset, end)):
            return False
        self.done.mark(offset, length)
        return True

    async def before_write(self, offset: int, length: int) -> None:
        """The range is about to be overwritten. Raises OSError if it must not be."""
        if not length:
            return
        start, end = self.copier.aligned(offset, offset + length)
        if not self.broken:
            try:
                await self._copy(start, end)
            except OSError:
                if self.on_error is not OnCbwError.BREAK_SNAPSHOT:
                    raise
                self.broken = True
            else:
                self.done.mark(start, end - start)
        await self._reads.wait_for_all(start, end)
        if self._source_reads is not None:
            await self._source_reads.wait_for_all(start, end)

    async def _copy(self, start: int, end: int) -> None:
        if not self.timeout:
            await self._copy_all(start, end)
            return
        # What takes too long is not interrupted, as it may have been done in part: it is copied, or not, later.
        task = asyncio.get_running_loop().create_task(self._copy_all(start, end))
        self._node.in_flight += 1
        self._left_behind.add(task)
        task.add_done_callback(self._copied)
        await asyncio.wait([task], timeout=self.timeout)
        if not task.done():
            raise OSError(errno.ETIMEDOUT, "Copying before a write takes too long")
        task.result()

    def _copied(self, task: asyncio.Task[None]) -> None:
        self._left_behind.discard(task)
        self._node._request_done()
        if not task.cancelled():
            task.exception()

    async def _copy_all(self, start: int, end: int) -> None:
        try:
            await self.copier.copy(start, end)
        except CopyError as exc:
            raise exc.error from exc

    # --- reading what was --------------------------------------------------------------------------------------------

    def _place(self, offset: int, length: int) -> tuple[int, bool]:
        """How many bytes are in the same place as the first, and whether that is the target. Raises OSError with EACCES
        if not all of the range may be read."""
        end = offset + length
        if self.broken or end > self.access.size or self.access.next_zero(offset, end) is not None:
            raise OSError(errno.EACCES, "Not preserved")
        inside = self.done.is_dirty(offset)
        other = self.done.next_zero(offset, end) if inside else self.done.next_dirty(offset, end)
        stop = end if other is None else other
        if inside and self.copier.left_out.next_dirty(offset, stop) is not None:
            raise OSError(errno.EACCES, "Overwritten, and not preserved")
        return stop - offset, inside

    def read_now(self, offset: int, length: int, iov: list[memoryview]) -> bool:
        """Read the whole range if that takes no waiting; False otherwise, with the buffers in any state."""
        try:
            n, in_target = self._place(offset, length)
        except OSError:
            return False
        node = self.target.node if in_target else self.source.node
        return n == length and node.read_now(offset, length, iov)

    async def preadv(self, offset: int, length: int, iov: list[memoryview]) -> None:
        """Read. Raises OSError, with EACCES for what is not preserved."""
        done = 0
        while done < length:
            at = offset + done
            n, in_target = self._place(at, length - done)
            part = iovs.part(iov, done, n)
            if in_target:
                await self.target.node.preadv(at, n, part)
            else:
                piece = self._reads.begin(at, at + n)
                try:
                    await self.source.node.preadv(at, n, part)
                finally:
                    self._reads.finish(piece)
            done += n

    async def block_status(self, offset: int, length: int, want_zero: bool) -> Extent:
        """Block status of a prefix of the range. Raises OSError as `preadv`."""
        n, in_target = self._place(offset, length)
        if in_target:
            n, flags, where, at = await status.block_status(self.target.node, offset, n, want_zero)
            # What is below the target does not matter, nor where the target ends.
            return n, (flags | ALLOCATED) & ~EOF, where, at
        piece = self._reads.begin(offset, offset + n)
        try:
            n, flags, where, at = await status.block_status(self.source.node, offset, n, want_zero)
        finally:
            self._reads.finish(piece)
        return n, flags & ~EOF, where, at

    async def discard(self, offset: int, length: int) -> None:
        """Nobody will read these whole clusters any more: they need not be preserved. Raises OSError."""
        size = self.copier.cluster
        start, end = -(-offset // size) * size, (offset + length) // size * size
        if start >= end:
            return
        await self.copier.pieces.wait_for_all(start, end)
        self.access.clear(start, end - start)
        self.copier.skip(start, end - start)
        await self.target.node.pdiscard(start, end - start)
