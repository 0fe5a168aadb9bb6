"""Block status: what is data, what reads as zeroes, and in which layer of the backing chain it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyqsd.block.extents import ALLOCATED, DATA, EOF, OFFSET_VALID, RAW, RECURSE, ZERO, Extent

if TYPE_CHECKING:
    from pyqsd.block.node import Node


async def block_status(node: Node, offset: int, length: int, want_zero: bool) -> Extent:
    """The status of a prefix of the range in this layer; `ALLOCATED` is set where this layer decides the content.

    An empty prefix (length 0) with `EOF` means that `offset` is at or beyond the end.
    """
    total = node.length
    if offset >= total:
        return (0, EOF, None, 0)
    length = min(length, total - offset)
    driver = node.driver
    n, flags, where, at = await driver.block_status(offset, length, want_zero)
    if flags & RAW:
        assert where is not None
        n, flags, where, at = await block_status(where, at, n, want_zero)
        if n == 0:
            # The child ends before its parent does.
            return (length, ZERO | ALLOCATED, None, 0)
        if flags & EOF and offset + n < total:
            flags &= ~EOF
        elif offset + n >= total:
            flags |= EOF
        return (n, flags, where, at)
    if flags & (DATA | ZERO):
        flags |= ALLOCATED
    elif not flags & ALLOCATED and driver.supports_backing:
        backing = driver.backing
        if backing is None or (want_zero and offset >= backing.node.length):
            flags |= ZERO
    if want_zero and flags & RECURSE and flags & DATA and flags & OFFSET_VALID and where not in (None, node):
        assert where is not None
        n2, flags2, _, _ = await block_status(where, at, n, want_zero)
        if n2 == 0:
            flags |= ZERO
        else:
            n = min(n, n2)
            flags |= flags2 & ZERO
    if offset + n >= total:
        flags |= EOF
    return (n, flags & ~RECURSE, where, at)


async def block_status_above(
    node: Node, base: Node | None, offset: int, length: int, want_zero: bool
) -> tuple[Extent, int]:
    """The status seen from `node` through its backing chain, without `base` and what is below it, and the number of the
    layer that decided (1: `node` itself; 0: none above `base`)."""
    if length == 0:
        return (0, 0, None, 0), 0
    extent = await block_status(node, offset, length, want_zero)
    n, flags, where, at = extent
    depth = 1
    if flags & ALLOCATED or n == 0:
        return extent, depth
    eof = offset + n if flags & EOF else 0
    layer = node.below()
    while layer is not None and layer is not base:
        depth += 1
        m, flags, where, at = await block_status(layer, offset, n, want_zero)
        if m == 0:
            # This layer is shorter: what is synthesised beyond its end behaves as if it were allocated in it.
            return (n, ZERO | ALLOCATED | (EOF if eof == offset + n else 0), layer, offset), depth
        n = m
        flags &= ~EOF
        if flags & ALLOCATED:
            break
        layer = layer.below()
    else:
        depth = 0
    if eof and offset + n == eof:
        flags |= EOF
    return (n, flags, where, at), depth
