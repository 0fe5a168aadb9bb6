"""``snapshot-access``: what was there before a ``copy-before-write`` node began to preserve it."""

from __future__ import annotations

import errno
from typing import Any

from pyqsd.block import permissions as perms
from pyqsd.block.child import Child
from pyqsd.block.driver import ROLE_DATA, ROLE_PRIMARY, Driver
from pyqsd.block.extents import Extent
from pyqsd.block.options import BlockdevOptions, BlockdevRef
from pyqsd.block.point_in_time import PointInTime
from pyqsd.qapi.errors import Error


class Options(BlockdevOptions, kw_only=True, tag="snapshot-access"):
    """QAPI ``BlockdevOptionsGenericFormat``."""

    file: BlockdevRef


class SnapshotAccess(Driver):
    """See docs/drivers/snapshot_access.md."""

    name = "snapshot-access"
    Options = Options
    named_as_child = True

    def __init__(self, node: Any, options: Any) -> None:
        super().__init__(node, options)
        self._length = 0

    async def open(self) -> None:
        child = await self.node.open_child("file", self.options.file, ROLE_DATA | ROLE_PRIMARY)
        self._length = child.node.length

    def length(self) -> int:
        return self._length

    def child_perms(self, child: Child, role: int, perm: int, shared: int) -> tuple[int, int]:
        # Whatever the child's users do to it, what it was is read by another way.
        return 0, perms.ALL

    async def reopen_prepare(self, options: Any, read_only: bool) -> Any:
        raise Error(
            f"Block format 'snapshot-access' used by node '{self.node.name}' does not support reopening files",
            errno.ENOTSUP,
        )

    @property
    def _past(self) -> PointInTime:
        assert self.file is not None
        past: PointInTime | None = self.file.node.driver.past
        if past is None:
            raise OSError(errno.ENOTSUP, f"Node '{self.file.node.name}' does not preserve anything")
        return past

    def read_now(self, offset: int, length: int, iov: list[memoryview]) -> bool:
        assert self.file is not None
        past = self.file.node.driver.past
        return past is not None and past.read_now(offset, length, iov)

    async def preadv(self, offset: int, length: int, iov: list[memoryview]) -> None:
        await self._past.preadv(offset, length, iov)

    async def block_status(self, offset: int, length: int, want_zero: bool) -> Extent:
        return await self._past.block_status(offset, length, want_zero)

    async def pdiscard(self, offset: int, length: int) -> None:
        await self._past.discard(offset, length)


DRIVER = SnapshotAccess
