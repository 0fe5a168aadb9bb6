"""``raw``: the content of another node as it is, or a part of it."""

from __future__ import annotations

import errno
from typing import Any, Final

from pyqsd.block import permissions as perms
from pyqsd.block.child import Child
from pyqsd.block.driver import (
    FUA,
    MAY_UNMAP,
    NO_FALLBACK,
    ROLE_DATA,
    ROLE_FILTERED,
    ROLE_PRIMARY,
    WRITE_UNCHANGED,
    Driver,
)
from pyqsd.block.extents import OFFSET_VALID, RAW, Extent
from pyqsd.block.node import Node
from pyqsd.block.options import BlockdevOptions, BlockdevRef
from pyqsd.qapi.errors import Error
from pyqsd.qapi.types import Int64

_SECTOR: Final = 512
_INT64_MAX: Final = (1 << 63) - 1


class Options(BlockdevOptions, kw_only=True, tag="raw"):
    """QAPI ``BlockdevOptionsRaw``; `offset` and `size` in bytes."""

    file: BlockdevRef
    offset: Int64 | None = None
    size: Int64 | None = None


class Raw(Driver):
    """See docs/drivers/raw.md."""

    name = "raw"
    Options = Options
    write_flags = FUA | WRITE_UNCHANGED
    zero_flags = FUA | MAY_UNMAP | NO_FALLBACK | WRITE_UNCHANGED
    mutable_options = frozenset({"offset", "size"})
    strong_options = ("offset", "size")

    def __init__(self, node: Any, options: Any) -> None:
        super().__init__(node, options)
        self._offset = 0
        self._fixed: int | None = None
        self._length = 0

    @property
    def _below(self) -> Node:
        assert self.file is not None
        return self.file.node

    async def open(self) -> None:
        options = self.options
        self._check_signs(options)
        whole = not options.offset and options.size is None
        role = (ROLE_FILTERED if whole else ROLE_DATA) | ROLE_PRIMARY
        await self.node.open_child("file", options.file, role)
        self._offset, self._fixed = self._checked(options)

    @staticmethod
    def _check_signs(options: Any) -> None:
        for name in ("offset", "size"):
            value = getattr(options, name)
            if value is not None and value < 0:
                raise Error(f"Value '{value}' is out of range for parameter '{name}'", errno.EINVAL)

    def _checked(self, options: Any) -> tuple[int, int | None]:
        """The offset and the fixed size that `options` ask for. Raises Error if the file is too small for them."""
        offset, size = options.offset or 0, options.size
        available = self._below.length
        if offset > available:
            raise Error(
                f"Offset ({offset}) cannot be greater than size of the containing file ({available})", errno.EINVAL
            )
        if size is None:
            return offset, None
        if available - offset < size:
            raise Error(
                f"The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the  actual size of the "
                f"containing file ({available})",
                errno.EINVAL,
            )
        if size % _SECTOR:
            raise Error("Specified size is not multiple of 512", errno.EINVAL)
        return offset, int(size)

    async def reopen_prepare(self, options: Any, read_only: bool) -> Any:
        self._check_signs(options)
        return self._checked(options)

    def reopen_commit(self, state: Any) -> None:
        self._offset, self._fixed = state
        assert self.file is not None
        self.node.child_resized(self.file)

    async def activate(self) -> None:
        # The file below may have got another size.
        self._length = 0
        self._checked(self.options)

    def length(self) -> int:
        if self._fixed is not None:
            return self._fixed
        available = max(0, self._below.length - self._offset)
        # Whole sectors, like all sizes; what the file lacks of the last one reads as zeroes. When that one is written
        # to, the file grows by a part of a sector, if the offset is no multiple of one, but that is no new size.
        if not self._length <= available < self._length + _SECTOR:
            self._length = -(-available // _SECTOR) * _SECTOR
        return self._length

    async def truncate(self, length: int, exact: bool, preallocation: str, zero_new: bool) -> None:
        if self._fixed is not None:
            raise Error("Cannot resize fixed-size raw disks", errno.ENOTSUP)
        if length > _INT64_MAX - self._offset:
            raise Error("Disk size too large for the chosen offset", errno.EINVAL)
        # Whatever the file has then, it is a new size.
        self._length = 0
        await self._below.truncate(length + self._offset, exact=exact, preallocation=preallocation, zero_new=zero_new)

    # --- where the data is: one constant further on in the file -------------------------------------------------------

    def map(self, offset: int, length: int) -> Extent | None:
        return (length, RAW | OFFSET_VALID, self._below, offset + self._offset)

    def map_write(self, offset: int, length: int) -> tuple[int, Node, int] | None:
        if self._fixed is not None and offset + length > self._fixed:
            return None
        return (length, self._below, offset + self._offset)

    def _place(self, offset: int, length: int) -> int:
        if self._fixed is not None and offset + length > self._fixed:
            # There may be somebody else's data behind it.
            raise OSError(errno.ENOSPC, "Beyond the fixed size")
        return offset + self._offset

    async def preadv(self, offset: int, length: int, iov: list[memoryview]) -> None:
        await self._below.preadv(offset + self._offset, length, iov)

    async def pwritev(self, offset: int, length: int, iov: list[memoryview], flags: int) -> None:
        below, at = self._below, self._place(offset, length)
        if below.debug_event is not None:
            below.debug_event("write_aio")
        await below.pwritev(at, length, iov, flags)

    async def copy_from(self, offset: int, length: int, source: Node, at: int) -> bool:
        return await self._below.copy_from(self._place(offset, length), length, source, at)

    async def pwrite_zeroes(self, offset: int, length: int, flags: int) -> None:
        await self._below.pwrite_zeroes(self._place(offset, length), length, flags)

    async def pdiscard(self, offset: int, length: int) -> None:
        await self._below.pdiscard(self._place(offset, length), length)

    def child_perms(self, child: Child, role: int, perm: int, shared: int) -> tuple[int, int]:
        # A part of a node has no tables that only its owner may write; but where it ends must stay.
        return perm, shared if role & ROLE_FILTERED else shared & ~perms.RESIZE

    def image_info(self) -> dict[str, Any]:
        known = self._below.driver.image_info()
        return {name: known[name] for name in ("cluster_size", "dirty_flag") if name in known}

    def exact_filename(self) -> str:
        if self.options.offset is not None or self.options.size is not None:
            return ""
        return self._below.driver.exact_filename()


DRIVER = Raw
