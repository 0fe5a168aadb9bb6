"""Copy on read: what a layer does not have itself is copied into it from the layers below while it is read.

The copy is made in whole allocation units of the layer, while no write may come between the read and the write of it:
what a user writes is never replaced by what was there before. It changes nothing that is read, so that dirty bitmaps
take no notice.

Offsets and lengths are bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyqsd.block import iov as iovs
from pyqsd.block import splitting, status
from pyqsd.block.driver import WRITE_UNCHANGED
from pyqsd.block.extents import ALLOCATED

if TYPE_CHECKING:
    from pyqsd.block.node import Node

#: Bytes that are copied at once (QSD's limit for bounce buffers).
_MOST = 16 << 20


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
    start = offset // unit * unit
    end = min(-(-(offset + length) // unit) * unit, max(node.length, offset + length))
    piece = max(unit, _MOST // unit * unit)
    for at in range(start, end, piece):
        stop = min(end, at + piece)
        await node.exclusively(at, stop, lambda at=at, stop=stop: _copy(node, at, stop))  # type: ignore[misc]
    await node.preadv(offset, length, iov)


async def _copy(node: Node, start: int, end: int) -> None:
    at = start
    while at < end:
        allocated, n = await is_allocated(node, at, end - at)
        if not n:
            return
        if not allocated:
            await _copy_piece(node, at, n)
        at += n


async def _copy_piece(node: Node, offset: int, length: int) -> None:
    align = max(node.limits.request_alignment, 1)
    start, end = splitting.aligned(offset, length, align)
    data = iovs.aligned_buffer(end - start)
    await node._read(start, end - start, [data])
    if node.debug_event is not None:
        node.debug_event("cor_write")
    # A failed write is an error of the read: whoever wants the data copied must know that it is not.
    if iovs.is_zero([data]):
        await node._zero_aligned(start, end - start, WRITE_UNCHANGED)
    else:
        await node._write(start, end - start, [data], WRITE_UNCHANGED)
