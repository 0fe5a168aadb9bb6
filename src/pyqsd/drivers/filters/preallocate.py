"""``preallocate``: an image file that grows does so in large steps, allocated in advance."""

from __future__ import annotations

import asyncio
import errno
import logging
from typing import Any, Final

from pyqsd.block import graph_perms
from pyqsd.block import permissions as perms
from pyqsd.block.child import Child
from pyqsd.block.driver import NO_FALLBACK, ROLE_FILTERED, ROLE_PRIMARY, Filter
from pyqsd.block.node import Node
from pyqsd.block.options import BlockdevOptions, BlockdevRef
from pyqsd.qapi.errors import Error
from pyqsd.qapi.types import Int64

log = logging.getLogger(__name__)

_GROWING: Final = perms.WRITE | perms.RESIZE
_DEFAULT_ALIGN: Final = 1 << 20
_DEFAULT_SIZE: Final = 128 << 20
_SECTOR: Final = 512
_MOST: Final = (1 << 63) - 1


class Options(BlockdevOptions, kw_only=True, tag="preallocate"):
    """QAPI ``BlockdevOptionsPreallocate``; sizes in bytes."""

    file: BlockdevRef
    prealloc_align: Int64 | None = None
    prealloc_size: Int64 | None = None


class Preallocate(Filter):
    """See docs/drivers/preallocate.md.

    While its parents may write and resize, the filter is in charge of the end of the file: nobody else may change it.
    What is between `_data_end` and `_file_end` was allocated in advance and reads as zeroes, and so does all from
    `_zero_start` on.
    """

    name = "preallocate"
    Options = Options
    mutable_options = frozenset({"prealloc_align", "prealloc_size"})

    def __init__(self, node: Node, options: Any) -> None:
        super().__init__(node, options)
        self._align = self._size = 0
        #: Whether the parents may make the file grow.
        self._growing = False
        #: The end of the data: the length for everybody above. None: that of the file, nothing is preallocated.
        self._data_end: int | None = None
        self._file_end = 0
        self._zero_start = 0
        #: The node that these are about; it may be exchanged for another.
        self._ends_of: Node | None = None
        #: The file may be longer than `_file_end`: a preallocation failed.
        self._ragged = False
        #: Writes in flight beyond `_file_end`, which no preallocation must run over.
        self._beyond = 0
        #: Held by who changes the end of the file.
        self._lock = asyncio.Lock()
        self._dropping: asyncio.Task[None] | None = None

    async def open(self) -> None:
        await self.node.open_child("file", self.options.file, ROLE_FILTERED | ROLE_PRIMARY)
        self._align, self._size = _checked(self.options)

    async def close(self) -> None:
        self._growing = False
        await self._drop()

    async def inactivate(self) -> None:
        await self._drop()

    async def reopen_prepare(self, options: Any, read_only: bool) -> Any:
        state = _checked(options)
        for name in ("prealloc_align", "prealloc_size"):
            if getattr(self.options, name) is not None and getattr(options, name) is None:
                raise Error(f"Option '{name.replace('_', '-')}' cannot be reset to its default value")
        if read_only:
            # Before the file becomes read-only as well.
            async with self._lock:
                await self._truncate_to_data()
        return state

    def reopen_commit(self, state: Any) -> None:
        self._align, self._size = state

    # --- in charge or not ---------------------------------------------------------------------------------------------

    def child_perms(self, child: Child, role: int, perm: int, shared: int) -> tuple[int, int]:
        if perm & _GROWING == _GROWING:
            return perm, shared & ~_GROWING
        if self._preallocated:
            # To give back what is not needed.
            return perm | _GROWING, shared & ~_GROWING
        return perm, shared

    def set_perm(self, perm: int, shared: int) -> None:
        self._growing = perm & _GROWING == _GROWING
        if self._growing:
            if self._data_end is None:
                self._set_ends(self.target.length)
        elif not self._preallocated:
            self._data_end = None
        elif self._dropping is None:
            self._dropping = self.node.graph.after_perms(self._drop_permissions())

    def child_changed(self, child: Child) -> None:
        if self._data_end is not None:
            self._set_ends(self.target.length)

    @property
    def _preallocated(self) -> bool:
        if self._data_end is None or self._ends_of is not self.target:
            return False
        return self._file_end > self._data_end or self._ragged

    async def _drop_permissions(self) -> None:
        """The parents gave up theirs."""
        try:
            await self._drop_now()
            graph_perms.refresh([self.node])
        except (OSError, Error) as exc:
            log.error("node '%s': giving back what was preallocated: %s", self.node.name, exc)
        finally:
            self._dropping = None

    async def _drop(self) -> None:
        if self._dropping is not None:
            await self._dropping
        await self._drop_now()

    async def _drop_now(self) -> None:
        async with self._lock:
            # They may be back by now.
            if not self._growing:
                await self._truncate_to_data()
                self._data_end = None
                self.node.reread_length()

    async def _truncate_to_data(self) -> None:
        """Raises Error, OSError; then nothing is lost, and it may be tried again."""
        if self._preallocated:
            assert self._data_end is not None
            await self.target.truncate(self._data_end, exact=True)
            self._set_ends(self._data_end)

    def _set_ends(self, end: int) -> None:
        self._data_end = self._file_end = self._zero_start = end
        self._ends_of = self.target
        self._ragged = False

    # --- size ---------------------------------------------------------------------------------------------------------

    def length(self) -> int:
        return self.target.length if self._data_end is None else self._data_end

    async def truncate(self, length: int, exact: bool, preallocation: str, zero_new: bool) -> None:
        async with self._lock:
            if self._data_end is None:
                await self.target.truncate(length, exact=exact, preallocation=preallocation, zero_new=zero_new)
                return
            if preallocation == "falloc" and self._data_end < length <= self._file_end:
                # It is there already.
                self._data_end = length
                return
            # What is new is to be allocated as the user wants it, not as we did.
            await self._truncate_to_data()
            await self.target.truncate(length, exact=exact, preallocation=preallocation, zero_new=zero_new)
            self._set_ends(self.target.length)

    @property
    def grows_ahead(self) -> bool:
        return True

    # --- requests -----------------------------------------------------------------------------------------------------

    def map_write(self, offset: int, length: int) -> tuple[int, Node, int] | None:
        if self._data_end is not None and offset + length > self._zero_start:
            return None
        return (length, self.target, offset)

    async def pwritev(self, offset: int, length: int, iov: list[memoryview], flags: int) -> None:
        async def write() -> None:
            await self.target.pwritev(offset, length, iov, flags)

        await self._write(offset, offset + length, write)

    async def pwrite_zeroes(self, offset: int, length: int, flags: int) -> None:
        end = offset + length
        if self._data_end is not None and not flags & ~NO_FALLBACK and offset >= self._zero_start:
            self._data_end = max(self._data_end, end)
            if await self._grow(end):
                return

        async def write() -> None:
            await self.target.pwrite_zeroes(offset, length, flags)

        await self._write(offset, end, write)

    async def _write(self, offset: int, end: int, write: Any) -> None:
        """Run `write`, after preallocation if it needs one."""
        if self._data_end is None or end <= self._zero_start:
            await write()
            return
        # Even a write that fails may leave something there.
        self._zero_start = end
        self._data_end = max(self._data_end, end)
        if await self._grow(end):
            await write()
            return
        self._beyond += 1
        try:
            await write()
        finally:
            self._beyond -= 1
            self._file_end = max(self._file_end, self.target.length)

    async def _grow(self, end: int) -> bool:
        """Make the file, whose data will end at `end`, long enough, and more than that; False if that does not work, as
        it is no reason for a write to fail."""
        if end <= self._file_end:
            return True
        async with self._lock:
            if end <= self._file_end:
                return True
            align = self.target.limits.request_alignment
            start = _round_up(self._file_end, align)
            new_end = _round_up(_round_up(end + self._size, self._align or 1), align)
            if self._beyond or new_end > _MOST:
                return False
            try:
                await self.target.pwrite_zeroes(start, new_end - start, NO_FALLBACK)
            except OSError:
                self._ragged = True
                return False
            self._file_end = new_end
            return True


def _round_up(value: int, align: int) -> int:
    return -(-value // align) * align


def _checked(options: Any) -> tuple[int, int]:
    """Alignment and size. Raises Error."""
    align, size = options.prealloc_align, options.prealloc_size
    for name, value in (("prealloc-size", size), ("prealloc-align", align)):
        if value is not None and value < 0:
            raise Error(f"Value '{value}' is out of range for parameter '{name}'", errno.EINVAL)
    if align is not None and align % _SECTOR:
        raise Error("prealloc-align parameter of preallocate filter is not aligned to 512", errno.EINVAL)
    return _DEFAULT_ALIGN if align is None else align, _DEFAULT_SIZE if size is None else size


DRIVER = Preallocate
