"""How a request is cut into pieces that a driver takes.

A driver's limits (`pyqsd.block.driver.Limits`) are a size that a request must not exceed and an alignment. The
alignment of zero writes and discards is a preference: what is not aligned is passed on as well, as a head before and a
tail after an aligned middle, so that the driver can refuse these and take that. Facts as QSD shows them through the
limits of its ``blkdebug`` driver.

Offsets and lengths are bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyqsd.block.driver import Limits

#: A zero write that falls back to zero bytes goes in pieces of at most this size.
_MOST_ZERO_BYTES = 16 << 20


def aligned(offset: int, length: int, align: int) -> tuple[int, int]:
    """Start and end of the range, widened to multiples of `align` (a power of two)."""
    return offset & -align, (offset + length + align - 1) & -align


def most_zero_bytes(limits: Limits) -> int:
    """The largest number of zero bytes that are written at once as data."""
    return min(limits.max_transfer or _MOST_ZERO_BYTES, _MOST_ZERO_BYTES)


def zero_piece(offset: int, left: int, limits: Limits) -> int:
    """The size of the next piece of a zero write of which `left` bytes, from `offset` on, are still to be done."""
    align = max(limits.pwrite_zeroes_alignment, limits.request_alignment, 1)
    piece = left
    head, tail = offset % align, (offset + left) % align
    if head:
        piece = min(left, most_zero_bytes(limits), align - head)
    elif tail and left > align:
        piece = left - tail
    most = limits.max_pwrite_zeroes
    return min(piece, max(most - most % align, align)) if most else piece


def discard_piece(offset: int, left: int, limits: Limits) -> int:
    """The size of the next piece of a discard of which `left` bytes, from `offset` on, are still to be done."""
    block = max(limits.request_alignment, 1)
    align = max(limits.pdiscard_alignment, block)
    piece = left
    head, tail = offset % align, (offset + left) % align
    if head:
        # First what is not a whole block, so that the rest is.
        piece = min(left, block - offset % block if offset % block else align - head)
        if piece > block:
            piece -= piece % block
    elif tail:
        if left > align:
            piece = left - tail
        elif tail % block and tail > block:
            piece = left - tail % block
    most = limits.max_pdiscard
    return min(piece, max(most - most % align, align)) if most else piece


def is_part(offset: int, length: int, limits: Limits) -> bool:
    """Whether a piece of a discard is a head or a tail."""
    align = max(limits.pdiscard_alignment, 1)
    return bool(offset % align or length % align)
