"""``copy-on-read``: what is read from a backing file is kept in the overlay."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pyqsd.block import copy_up, freezing
from pyqsd.block import iov as iovs
from pyqsd.block import permissions as perms
from pyqsd.block.child import Child
from pyqsd.block.driver import ROLE_FILTERED, ROLE_PRIMARY, Filter
from pyqsd.block.extents import ALLOCATED, OFFSET_VALID, RAW, Extent
from pyqsd.block.extents import DRIVER as BY_DRIVER
from pyqsd.block.node import Node
from pyqsd.block.options import BlockdevOptions, BlockdevRef
from pyqsd.qapi.errors import Error

_PASSED_ON = perms.CONSISTENT_READ | perms.WRITE | perms.RESIZE


class Options(BlockdevOptions, kw_only=True, tag="copy-on-read"):
    """QAPI ``BlockdevOptionsCor``; `bottom`: the name of the lowest node that data is copied from."""

    file: BlockdevRef
    bottom: str | None = None


class CopyOnRead(Filter):
    """See docs/drivers/copy_on_read.md."""

    name = "copy-on-read"
    Options = Options

    def __init__(self, node: Node, options: Any) -> None:
        super().__init__(node, options)
        self._bottom: Node | None = None

    async def open(self) -> None:
        options = self.options
        await self.node.open_child("file", options.file, ROLE_FILTERED | ROLE_PRIMARY)
        if options.bottom is None:
            return
        bottom = self.node.graph.nodes.get(options.bottom)
        if bottom is None or not bottom.opened:
            raise Error(f"Bottom node '{options.bottom}' not found", errno.EINVAL)
        if bottom.driver.is_filter:
            raise Error(f"Bottom node '{options.bottom}' is a filter", errno.EINVAL)
        self._bottom = bottom
        if not self._bottom_is_below():
            name = self.target.name
            raise Error(f"Bottom node '{options.bottom}' is not in the backing chain of node '{name}'", errno.EINVAL)
        freezing.freeze(self.node, bottom)

    async def close(self) -> None:
        if self._bottom is not None:
            freezing.thaw(self.node, self._bottom)

    @contextmanager
    def thawed(self) -> Iterator[None]:
        """The chain may be changed in this block, and afterwards; if it raises something, it is frozen again."""
        assert self._bottom is not None
        freezing.thaw(self.node, self._bottom)
        try:
            yield
        except BaseException:
            freezing.freeze(self.node, self._bottom)
            raise
        self._bottom = None

    def _bottom_is_below(self) -> bool:
        layer: Node | None = self.target
        while layer is not None:
            if layer is self._bottom:
                return True
            layer = layer.below()
        return False

    def child_perms(self, child: Child, role: int, perm: int, shared: int) -> tuple[int, int]:
        need = perm & _PASSED_ON
        if self.node.active:
            need |= perms.WRITE_UNCHANGED
        return need, (shared & _PASSED_ON) | perms.WRITE_UNCHANGED

    async def reopen_prepare(self, options: Any, read_only: bool) -> Any:
        raise Error(
            f"Block format 'copy-on-read' used by node '{self.node.name}' does not support reopening files",
            errno.ENOTSUP,
        )

    # --- reading ------------------------------------------------------------------------------------------------------

    def map(self, offset: int, length: int) -> Extent | None:
        return (length, RAW | OFFSET_VALID | BY_DRIVER, self.target, offset)

    def read_now(self, offset: int, length: int, iov: list[memoryview]) -> bool:
        target = self.target
        if offset + length > target.length:
            return False
        extent = target.driver.map(offset, length)
        if extent is None or extent[0] < length or not extent[1] & (ALLOCATED | OFFSET_VALID):
            return False
        return target.read_now(offset, length, iov)

    async def preadv(self, offset: int, length: int, iov: list[memoryview]) -> None:
        if not self.node.active:
            await super().preadv(offset, length, iov)
            return
        if self._bottom is None:
            await copy_up.read(self.target, offset, length, iov)
            return
        done = 0
        while done < length:
            n, wanted = await self._from_above_bottom(offset + done, length - done)
            part = iovs.part(iov, done, n)
            if wanted:
                await copy_up.read(self.target, offset + done, n, part)
            else:
                await self.target.preadv(offset + done, n, part)
            done += n

    async def _from_above_bottom(self, offset: int, length: int) -> tuple[int, bool]:
        """For how many bytes the answer holds, and whether they are to be copied: they are in a layer below the first,
        down to the bottom node."""
        assert self._bottom is not None
        target = self.target
        allocated, n = await copy_up.is_allocated(target, offset, length)
        n = n or length
        if allocated:
            return n, False
        layer = target.below()
        if layer is None:
            return n, False
        # That nothing is below the first layer to stop at, QSD takes for the whole chain.
        base = None if target is self._bottom else self._bottom.below()
        (m, _, _, _), depth = await layer.block_status_above(base, offset, n, False)
        return (m, depth > 0) if m else (n, False)


DRIVER = CopyOnRead
