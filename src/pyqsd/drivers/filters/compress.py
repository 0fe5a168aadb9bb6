"""``compress``: everything that is written is stored compressed."""

from __future__ import annotations

import errno
from typing import Any

from pyqsd.block.driver import FUA, ROLE_FILTERED, ROLE_PRIMARY, WRITE_COMPRESSED, WRITE_UNCHANGED, Filter, Limits
from pyqsd.block.node import Node
from pyqsd.block.options import BlockdevOptions, BlockdevRef
from pyqsd.qapi.errors import Error


class Options(BlockdevOptions, kw_only=True, tag="compress"):
    """QAPI ``BlockdevOptionsGenericFormat``."""

    file: BlockdevRef


class Compress(Filter):
    """See docs/drivers/compress.md."""

    name = "compress"
    Options = Options
    write_flags = FUA | WRITE_UNCHANGED

    async def open(self) -> None:
        child = await self.node.open_child("file", self.options.file, ROLE_FILTERED | ROLE_PRIMARY)
        driver = child.node.driver
        if not driver.write_flags & WRITE_COMPRESSED:
            raise Error(f"Compression is not supported for underlying format: {driver.name}", errno.ENOTSUP)

    def refresh_limits(self, limits: Limits) -> None:
        # Only whole clusters can be compressed.
        limits.request_alignment = self.target.driver.image_info().get("cluster_size") or 1

    def map_write(self, offset: int, length: int) -> tuple[int, Node, int] | None:
        return None

    async def pwritev(self, offset: int, length: int, iov: list[memoryview], flags: int) -> None:
        below = self.target
        while isinstance(below.driver, Filter):
            below = below.driver.target
        if not below.driver.write_flags & WRITE_COMPRESSED:
            raise OSError(errno.ENOTSUP, "compressed")
        await self.target.pwritev(offset, length, iov, flags | WRITE_COMPRESSED)

    async def reopen_prepare(self, options: Any, read_only: bool) -> Any:
        raise Error(
            f"Block format 'compress' used by node '{self.node.name}' does not support reopening files", errno.ENOTSUP
        )


DRIVER = Compress
