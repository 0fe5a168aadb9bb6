"""Pooled memory for payloads.

A buffer's data starts at a page boundary, so that files opened with O_DIRECT take it as it is; the room before the data
is for the header of a reply, so that header and data leave in one piece.
"""

from __future__ import annotations

import mmap
from typing import Final

#: Bytes before the data.
HEAD: Final = mmap.PAGESIZE
_SMALLEST_SHIFT: Final = 14
#: Bytes that the pool keeps for later in all.
_KEEP: Final = 16 << 20


class Buffer:
    """`capacity` bytes of data at `data`, and `HEAD` bytes before them; both in `view`."""

    __slots__ = ("capacity", "data", "view")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.view = memoryview(mmap.mmap(-1, HEAD + capacity, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self.data = self.view[HEAD:]


class Pool:
    """Buffers by size (powers of two), the last one used given out first because it is still in the CPU's cache."""

    __slots__ = ("_free", "_kept")

    def __init__(self) -> None:
        self._free: dict[int, list[Buffer]] = {}
        self._kept = 0

    def get(self, length: int) -> Buffer:
        """A buffer for at least `length` bytes, with any content."""
        shift = max((length - 1).bit_length(), _SMALLEST_SHIFT)
        free = self._free.get(shift)
        if free:
            buffer = free.pop()
            self._kept -= buffer.capacity
            return buffer
        return Buffer(1 << shift)

    def put(self, buffer: Buffer) -> None:
        """Give `buffer` back; nobody may use it afterwards."""
        capacity = buffer.capacity
        if self._kept + capacity <= _KEEP:
            self._free.setdefault(capacity.bit_length() - 1, []).append(buffer)
            self._kept += capacity


#: Stands for no buffer.
NOTHING: Final = Buffer(0)
#: All connections of the process's main loop share it.
POOL: Final = Pool()
