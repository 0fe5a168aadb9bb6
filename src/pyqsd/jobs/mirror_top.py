"""``mirror_top``: the filter that a mirror puts over its source, and the bitmap of what the target does not have yet.

The gate of the source marks this bitmap like any other, when a write has ended, no matter whether that came through the
filter or past it. So the filter has nothing to do as long as copying is done in the background. With
``copy-mode=write-blocking`` it hands each write to the job, which writes to both and takes care of the bitmap: such a
write is announced with `MirrorBitmap.expect`, and is then not marked.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

from pyqsd.block import permissions as perms
from pyqsd.block.child import Child
from pyqsd.block.dirty_bitmap import DirtyBitmap
from pyqsd.block.internal_filter import InternalFilter
from pyqsd.block.node import Node
from pyqsd.block.options import BlockdevOptions


class Own:
    """A write of the job's own to the source, while it goes on. `disturbed`: somebody else wrote to the same place
    meanwhile, so that nobody knows what is there now; it is marked."""

    __slots__ = ("disturbed", "ended", "length", "offset")

    def __init__(self, offset: int, length: int) -> None:
        self.offset = offset
        self.length = length
        self.ended = False
        self.disturbed = False


class MirrorBitmap(DirtyBitmap):
    """What the target does not have yet. It belongs to the source; users see it at the filter."""

    __slots__ = ("_own", "writes")
    hidden: ClassVar[bool] = True

    def __init__(self, size: int, granularity: int) -> None:
        super().__init__("", size, granularity)
        #: How many writes have ended.
        self.writes = 0
        self._own: list[Own] = []

    def expect(self, offset: int, length: int) -> Own:
        """A write of this range begins that is not to be marked; `settle` follows. No two of them overlap."""
        own = Own(offset, length)
        self._own.append(own)
        return own

    def settle(self, own: Own) -> None:
        """The write has ended. If it has failed, the caller marks it."""
        self._own.remove(own)

    def mark(self, offset: int, length: int) -> None:
        self.writes += 1
        if self._own:
            for own in self._own:
                if not own.ended and own.offset == offset and own.length == length:
                    # Or it was another write to exactly this range: then the own one comes as the second, and is the
                    # one that is marked, and disturbed.
                    own.ended = True
                    return
            for own in self._own:
                if own.offset < offset + length and offset < own.offset + own.length:
                    own.disturbed = True
        super().mark(offset, length)


class ShownBitmap(DirtyBitmap):
    """How users see that bitmap: at the filter, as one that records nothing by itself."""

    __slots__ = ("_of",)

    def __init__(self, of: MirrorBitmap) -> None:
        super().__init__("", of.size, of.granularity, enabled=False)
        self._of = of

    @property
    def count(self) -> int:
        return self._of.count


class Writer(Protocol):
    """Who writes to the source and the target at once; as the methods of `Driver`."""

    async def pwritev(self, offset: int, length: int, iov: list[memoryview], flags: int) -> None: ...

    async def pwrite_zeroes(self, offset: int, length: int, flags: int) -> None: ...


class MirrorTop(InternalFilter):
    """See the module."""

    name = "mirror_top"
    never_freeze = True

    class Options(BlockdevOptions, tag="mirror_top"):
        """Nobody gives them."""

    #: The target is below the source, and written to while somebody reads the source.
    is_commit = False
    #: The job has ended, and nothing is needed of the source any more.
    stopped = False
    #: Who does the writes, while they go to the target as well.
    writer: Writer | None = None

    def child_perms(self, child: Child, role: int, perm: int, shared: int) -> tuple[int, int]:
        if self.stopped:
            return 0, perms.ALL
        if self.is_commit:
            # What is between the source and the target is not consistent any more, and the writes to the target come
            # from the same job.
            return perm & ~perms.CONSISTENT_READ, shared | perms.WRITE
        return perm, shared

    def map_write(self, offset: int, length: int) -> tuple[int, Node, int] | None:
        return None if self.writer is not None else (length, self.target, offset)

    async def pwritev(self, offset: int, length: int, iov: list[memoryview], flags: int) -> None:
        if self.writer is None:
            await self.target.pwritev(offset, length, iov, flags)
        else:
            await self.writer.pwritev(offset, length, iov, flags)

    async def pwrite_zeroes(self, offset: int, length: int, flags: int) -> None:
        if self.writer is None:
            await self.target.pwrite_zeroes(offset, length, flags)
        else:
            await self.writer.pwrite_zeroes(offset, length, flags)
