"""Copying up: what a layer does not have itself is copied into it from the layers below, because it is read (copy on
read), or so that the layers below are needed no more (stream).

The copy is made in whole allocation units of the layer, while no write may come between the read and the write of it:
what a user writes is never replaced by what was there before. It changes nothing that is read, so that dirty bitmaps
take no notice.

Offsets and lengths are bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyqsd.block import filenames, splitting, status
from pyqsd.block import iov as iovs
from pyqsd.block.driver import WRITE_UNCHANGED
from pyqsd.block.extents import ALLOCATED, ZERO

if TYPE_CHECKING:
    from pyqsd.block.node import Node

#: Bytes that are copied at once (QSD's limit for bounce buffers).
_MOST = 16 << 20


class Buffers:
    """Page-aligned buffers of `size` bytes, to be used again: new memory costs more than what is copied through it.

    `piece`: zeroes are looked for in ranges of so many bytes.
    """

    def __init__(self, piece: int, size: int) -> None:
        self.piece = piece
        self.size = size
        self._free: list[memoryview] = []

    def take(self) -> memoryview:
        """A buffer with any content; the caller gives it back."""
        return self._free.pop() if self._free else iovs.aligned_buffer(self.size)

    def give_back(self, buffer: memoryview) -> None:
        """Nobody uses `buffer` any more."""
        self._free.append(buffer)


async def is_allocated(node: Node, offset: int, length: int) -> tuple[bool, int]:
    """Whether the beginning of the range is in this layer, and for how many bytes the answer holds."""
    n, flags, _, _ = await status.block_status(node, offset, length, False)
    return bool(flags & ALLOCATED), n


async def read(node: Node, offset: int, length: int, iov: list[memoryview]) -> None:
    """Read, and leave what was read in the layer `node`. Raises OSError, also where only the copy fails."""
    allocated, n = await is_allocated(node, offset, length)
    if allocated and n >= length:
        await node.preadv(offset, length, iov)
        return
    unit = max(node.driver.allocation_unit(), 1)
    start, end = whole_units(node, offset, length)
    piece = max(unit, _MOST // unit * unit)
    for at in range(start, end, piece):
        await fill(node, at, min(end, at + piece), None)
    await node.preadv(offset, length, iov)


def whole_units(node: Node, offset: int, length: int) -> tuple[int, int]:
    """The start and the end of the range, widened to allocation units of `node`."""
    unit = max(node.driver.allocation_unit(), 1)
    start = offset // unit * unit
    return start, min(-(-(offset + length) // unit) * unit, max(node.length, offset + length))


async def fill(node: Node, start: int, end: int, buffers: Buffers | None) -> None:
    """Copy what the layer `node` does not have of ``[start, end)``, which are whole allocation units, into it. With
    `buffers`, what is known to be zeroes is not read. Raises OSError."""
    await node.exclusively(start, end, lambda: _copy(node, start, end, buffers))


async def _copy(node: Node, start: int, end: int, buffers: Buffers | None) -> None:
    at = start
    while at < end:
        allocated, n = await is_allocated(node, at, end - at)
        if not n:
            return
        if not allocated:
            zeroes = await _count_zeroes(node, at, n, buffers.piece) if buffers is not None else 0
            if zeroes:
                n = zeroes
                await _write_zeroes(node, at, n)
            elif buffers is None:
                await _copy_piece(node, at, n, None)
            else:
                n = min(n, buffers.size)
                buffer = buffers.take()
                try:
                    await _copy_piece(node, at, n, buffer)
                finally:
                    buffers.give_back(buffer)
        at += n


async def _count_zeroes(node: Node, offset: int, length: int, piece: int) -> int:
    """How much of the range is known to be zeroes in the layers below `node`: all of it, or whole pieces."""
    below = filenames.without_filters(node).below()
    if below is None or offset >= below.length:
        return length
    (n, flags, _, _), _ = await status.block_status_above(below, None, offset, length, True)
    if not flags & ZERO:
        return 0
    return length if n >= length else n // piece * piece


async def _write_zeroes(node: Node, offset: int, length: int) -> None:
    start, end = splitting.aligned(offset, length, max(node.limits.request_alignment, 1))
    if node.debug_event is not None:
        node.debug_event("cor_write")
    await node._zero_aligned(start, end - start, WRITE_UNCHANGED)


async def _copy_piece(node: Node, offset: int, length: int, buffer: memoryview | None) -> None:
    start, end = splitting.aligned(offset, length, max(node.limits.request_alignment, 1))
    data = buffer[: end - start] if buffer is not None else iovs.aligned_buffer(end - start)
    await node._read(start, end - start, [data])
    # A failed write is an error of the read: whoever wants the data copied must know that it is not.
    if iovs.is_zero([data]):
        await _write_zeroes(node, start, end - start)
        return
    if node.debug_event is not None:
        node.debug_event("cor_write")
    await node._write(start, end - start, [data], WRITE_UNCHANGED)
