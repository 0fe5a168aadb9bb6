"""Tables of the image file as numpy arrays, read in large pieces.

Entries are held as signed 64-bit integers: an entry whose flag COPIED (bit 63) is set is negative, and a host offset
(56 bits) is itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from pyqsd.block.node import Node

T = TypeVar("T")
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Counts = npt.NDArray[Any]

#: How much is read and looked at in one go (bytes).
BATCH_BYTES = 2 << 20
#: And in how many requests at most.
BATCH_READS = 256
#: Less work than this (bytes of tables) is done at once, rather than in another thread.
_INLINE_BYTES = 64 << 10


async def worked(size: int, function: Callable[..., T], *args: Any) -> T:
    """Call `function`, which works on `size` bytes of tables, in a thread of its own if that takes long, so that the
    event loop goes on meanwhile."""
    if size <= _INLINE_BYTES:
        await asyncio.sleep(0)
        return function(*args)
    return await asyncio.get_running_loop().run_in_executor(None, function, *args)


async def read_runs(file: Node, offsets: Ints, size: int) -> bytearray:
    """The pieces of `size` bytes at the ascending `offsets`, one after the other; neighbours are read together. What
    is beyond the end of the file reads as zeroes. Raises OSError."""
    data = bytearray(len(offsets) * size)
    view = memoryview(data)
    breaks = np.flatnonzero(np.diff(offsets) != size) + 1
    starts = [0, *breaks.tolist()]
    ends = [*breaks.tolist(), len(offsets)]
    for start, end in zip(starts, ends, strict=True):
        if start < end:
            await file.preadv(int(offsets[start]), (end - start) * size, [view[start * size : end * size]])
    return data


def entries_of(data: bytes | bytearray | memoryview) -> Ints:
    """64-bit big-endian words as native integers."""
    return np.frombuffer(data, ">i8").astype(np.int64)


async def read_entries(file: Node, offset: int, count: int) -> Ints:
    """A table of `count` 64-bit entries. Raises OSError."""
    return entries_of(await file.pread(offset, count * 8)) if count else np.zeros(0, np.int64)


def decode_counts(data: bytes | bytearray | memoryview, order: int) -> Counts:
    """Refcounts of ``1 << order`` bits as an unsigned array; below eight bits, the first of a byte is in its least
    significant bits (QEMU docs/interop/qcow2, "Host cluster management")."""
    if order >= 3:
        kind = np.dtype(f"u{1 << (order - 3)}")
        return np.frombuffer(data, kind.newbyteorder(">")).astype(kind, copy=False)
    packed = np.frombuffer(data, np.uint8)
    if order == 0:
        return np.unpackbits(packed, bitorder="little")
    width = 1 << order
    plain = np.empty((len(packed), 8 >> order), np.uint8)
    for index in range(8 >> order):
        plain[:, index] = packed >> (index * width) & ((1 << width) - 1)
    return plain.reshape(-1)


def encode_counts(counts: Counts, order: int) -> bytes:
    """The opposite of `decode_counts`; the counts must fit, and fill whole bytes."""
    if order >= 3:
        return counts.astype(np.dtype(f"u{1 << (order - 3)}").newbyteorder(">")).tobytes()
    plain = counts.astype(np.uint8)
    if order == 0:
        return np.packbits(plain, bitorder="little").tobytes()
    width = 1 << order
    plain = plain.reshape(-1, 8 >> order)
    packed = np.zeros(len(plain), np.uint8)
    for index in range(8 >> order):
        packed |= plain[:, index] << (index * width)
    return packed.tobytes()


def grouped(keys: Ints) -> Iterator[tuple[int, Ints]]:
    """The positions of each value in `keys`: (value, positions), by value."""
    if not len(keys):
        return
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    edges = (np.flatnonzero(np.diff(ordered)) + 1).tolist()
    for start, stop in zip([0, *edges], [*edges, len(keys)], strict=True):
        yield int(ordered[start]), order[start:stop]
