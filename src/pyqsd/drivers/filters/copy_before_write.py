"""``copy-before-write``: what is about to be overwritten is copied to another node first."""

from __future__ import annotations

import errno
from typing import Any

from pyqsd.block import permissions as perms
from pyqsd.block.bitmap_commands import BlockDirtyBitmap, find_bitmap
from pyqsd.block.child import Child
from pyqsd.block.driver import FUA, ROLE_DATA, ROLE_FILTERED, ROLE_PRIMARY, WRITE_UNCHANGED, Filter
from pyqsd.block.graph_perms import default_child_perms
from pyqsd.block.node import Node
from pyqsd.block.options import BlockdevOptions, BlockdevRef
from pyqsd.block.point_in_time import OnCbwError, PointInTime
from pyqsd.qapi.errors import Error
from pyqsd.qapi.types import Size, Uint32


class Options(BlockdevOptions, kw_only=True, tag="copy-before-write"):
    """QAPI ``BlockdevOptionsCbw``; `cbw_timeout` in seconds, `min_cluster_size` in bytes."""

    file: BlockdevRef
    target: BlockdevRef
    bitmap: BlockDirtyBitmap | None = None
    on_cbw_error: OnCbwError | None = None
    cbw_timeout: Uint32 | None = None
    min_cluster_size: Size | None = None


class CopyBeforeWrite(Filter):
    """See docs/drivers/copy_before_write.md."""

    name = "copy-before-write"
    Options = Options
    write_flags = FUA | WRITE_UNCHANGED
    named_as_child = True

    def __init__(self, node: Node, options: Any) -> None:
        super().__init__(node, options)
        #: The job gives back the space of what it has copied.
        self.discard_source = False

    async def open(self) -> None:
        options = self.options
        source = await self.node.open_child("file", options.file, ROLE_FILTERED | ROLE_PRIMARY)
        # A flush of what users write does not concern what was there before.
        self.unflushed = target = await self.node.open_child("target", options.target, ROLE_DATA)
        bitmap = None
        if options.bitmap is not None:
            _, bitmap = find_bitmap(self.node.graph, options.bitmap.node, options.bitmap.name)
        try:
            self.past = PointInTime(
                self.node,
                source,
                target,
                least=options.min_cluster_size or 0,
                bitmap=bitmap,
                on_error=options.on_cbw_error or OnCbwError.BREAK_GUEST_WRITE,
                timeout=options.cbw_timeout or 0,
            )
        except Error as exc:
            raise exc.prefixed("Cannot create block-copy-state: ") from exc

    async def close(self) -> None:
        if self.past is not None:
            await self.past.close()

    @property
    def _past(self) -> PointInTime:
        assert self.past is not None
        return self.past

    def child_perms(self, child: Child, role: int, perm: int, shared: int) -> tuple[int, int]:
        if not role & ROLE_FILTERED:
            # Others may write to it: users of the source may have it as their backing file.
            return perms.WRITE, perms.ALL & ~perms.RESIZE
        need, share = default_child_perms(self, child, role, perm, shared)
        if self.node.parents:
            need |= perms.CONSISTENT_READ
            if self.discard_source:
                need |= perms.WRITE
            share &= ~(perms.WRITE | perms.RESIZE)
        return need, share

    def child_changed(self, child: Child) -> None:
        self._past.children_changed()

    async def reopen_prepare(self, options: Any, read_only: bool) -> Any:
        raise Error(
            f"Block format 'copy-before-write' used by node '{self.node.name}' does not support reopening files",
            errno.ENOTSUP,
        )

    async def truncate(self, length: int, exact: bool, preallocation: str, zero_new: bool) -> None:
        if length < self.target.length:
            await self._past.before_write(length, self.target.length - length)
        await super().truncate(length, exact, preallocation, zero_new)

    # --- writing ------------------------------------------------------------------------------------------------------

    def map_write(self, offset: int, length: int) -> tuple[int, Node, int] | None:
        if not self._past.may_write_now(offset, length):
            return None
        return (length, self.target, offset)

    async def pwritev(self, offset: int, length: int, iov: list[memoryview], flags: int) -> None:
        if not flags & WRITE_UNCHANGED:
            await self._past.before_write(offset, length)
        await super().pwritev(offset, length, iov, flags)

    async def pwrite_zeroes(self, offset: int, length: int, flags: int) -> None:
        if not flags & WRITE_UNCHANGED:
            await self._past.before_write(offset, length)
        await super().pwrite_zeroes(offset, length, flags)

    async def pdiscard(self, offset: int, length: int) -> None:
        await self._past.before_write(offset, length)
        await super().pdiscard(offset, length)


DRIVER = CopyBeforeWrite
