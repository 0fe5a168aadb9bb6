"""What ``null-co`` and ``null-aio`` share: they keep nothing, and have nothing."""

from __future__ import annotations

import asyncio
import errno
from typing import Any, Final

from pyqsd.block import iov as iovs
from pyqsd.block.driver import FUA, MAY_UNMAP, NO_FALLBACK, Driver
from pyqsd.block.extents import DATA, OFFSET_VALID, ZERO, Extent
from pyqsd.qapi.errors import Error

_DEFAULT_SIZE: Final = 1 << 30
_SECTOR: Final = 512
_MAX_LENGTH: Final = (1 << 63) - (1 << 30)


class Null(Driver):
    """Base of both. Buffers are always cleared when reading, so that nobody gets to see what they held before."""

    is_protocol = True
    strong_options = ("size", "read_zeroes")
    write_flags = FUA
    zero_flags = FUA | MAY_UNMAP | NO_FALLBACK

    def __init__(self, node: Any, options: Any) -> None:
        super().__init__(node, options)
        self._size = _DEFAULT_SIZE if options.size is None else options.size
        self._latency = (options.latency_ns or 0) / 1e9

    async def open(self) -> None:
        if self._size < 0:
            raise Error("size must not be negative", errno.EINVAL)
        if self._size > _MAX_LENGTH:
            raise Error("Could not refresh total sector count: File too large", errno.EFBIG)
        if (self.options.latency_ns or 0) >= 1 << 63:
            raise Error("latency-ns is invalid", errno.EINVAL)

    def length(self) -> int:
        return int(-(-self._size // _SECTOR) * _SECTOR)

    def allocated_size(self) -> int | None:
        return 0

    def exact_filename(self) -> str:
        """Only what has no options that change what is read can be written as a plain name."""
        options = self.options
        if options.size is None and options.read_zeroes is None:
            return f"{self.name}://"
        return ""

    def map(self, offset: int, length: int) -> Extent | None:
        kind = ZERO if self.options.read_zeroes else DATA
        return (length, kind | OFFSET_VALID, self.node, offset)

    async def block_status(self, offset: int, length: int, want_zero: bool) -> Extent:
        # Neither data nor zeroes, unless it is promised that zeroes are read.
        return (length, OFFSET_VALID | (ZERO if self.options.read_zeroes else 0), self.node, offset)

    async def _delay(self) -> None:
        if self._latency:
            await asyncio.sleep(self._latency)

    def read_now(self, offset: int, length: int, iov: list[memoryview]) -> bool:
        if self._latency:
            return False
        iovs.fill_zero(iov)
        return True

    def write_now(self, offset: int, length: int, iov: list[memoryview]) -> bool:
        return not self._latency

    async def preadv(self, offset: int, length: int, iov: list[memoryview]) -> None:
        await self._delay()
        iovs.fill_zero(iov)

    async def pwritev(self, offset: int, length: int, iov: list[memoryview], flags: int) -> None:
        await self._delay()

    async def pwrite_zeroes(self, offset: int, length: int, flags: int) -> None:
        if flags & NO_FALLBACK:
            raise OSError(errno.ENOTSUP, "zeroes are written like anything else")
        await self._delay()

    async def pdiscard(self, offset: int, length: int) -> None:
        await self._delay()

    async def flush(self) -> None:
        await self._delay()
