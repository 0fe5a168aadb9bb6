"""Work on all L2 tables and refcounts at once, with numpy: what snapshots need.

Source: QEMU docs/interop/qcow2, sections "Host cluster management", "Cluster mapping".

No request may be in flight. L2 tables are read from disk, so everything must have been written back before. Memory is
bounded however large the tables claim to be: they are worked on in batches.
"""

from __future__ import annotations

import asyncio
import errno
from array import array
from collections.abc import AsyncIterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from pyqsd.drivers.formats.qcow2.check.arrays import decode_counts, encode_counts
from pyqsd.drivers.formats.qcow2.tables import COMPRESSED, COPIED, OFFSET_MASK

if TYPE_CHECKING:
    from pyqsd.drivers.formats.qcow2.image import Image
    from pyqsd.drivers.formats.qcow2.refcounts import Block

#: References (8 bytes each) that are collected before they are worked on.
_BATCH = 1 << 20

_Array = np.ndarray[Any, np.dtype[Any]]


def _references(image: Image, table: _Array) -> _Array:
    """The clusters that the entries of an L2 table refer to. Raises OSError for what cannot be."""
    bits = np.uint64(image.cluster_bits)
    table = table[:: image.l2.words]
    packed = (table & np.uint64(COMPRESSED)) != 0
    hosts = table[~packed] & np.uint64(OFFSET_MASK)
    hosts = hosts[hosts != 0]
    if (hosts & np.uint64(image.cluster_mask)).any():
        raise OSError(errno.EIO, "A data cluster is not aligned")
    found: _Array = hosts >> bits
    if not packed.any():
        return found
    entries = table[packed]
    size_shift = np.uint64(62 - (image.cluster_bits - 8))
    starts = entries & ((np.uint64(1) << size_shift) - np.uint64(1))
    sectors = ((entries & np.uint64(COMPRESSED - 1)) >> size_shift) + np.uint64(1)
    first = starts >> bits
    last = ((starts & ~np.uint64(511)) + sectors * np.uint64(512) - np.uint64(1)) >> bits
    parts = [found]
    while len(first):
        parts.append(first)
        more = first < last
        first, last = first[more] + np.uint64(1), last[more]
    return np.concatenate(parts)


async def _tables(image: Image, l1: array[int], first: int = 0) -> AsyncIterator[tuple[int, int, _Array]]:
    """All L2 tables of an L1 table from index `first` on: (index, host offset, entries, writable). Raises OSError."""
    size = image.cluster_size
    for index in range(first, len(l1)):
        offset = l1[index] & OFFSET_MASK
        if not offset:
            continue
        if offset & image.cluster_mask:
            raise OSError(errno.EIO, f"L2 table offset {offset:#x} unaligned")
        data = await image.file.pread(offset, size)
        yield index, offset, np.frombuffer(data, dtype=">u8").astype(np.uint64)


async def change_references(image: Image, l1: array[int], delta: int) -> None:
    """Change the count of everything that an L1 table refers to, L2 tables and their clusters, by `delta` (1 or -1), in
    memory. If that fails for 1, the counts are as before. Raises OSError."""
    done = [0]
    try:
        await _change(image, l1, delta, len(l1), done)
    except BaseException:
        if delta > 0 and done[0]:
            await _change(image, l1, -delta, done[0], [0])
        raise


async def _change(image: Image, l1: array[int], delta: int, stop: int, done: list[int]) -> None:
    """The same for the L1 indices below `stop`. `done[0]`: those below it have been dealt with."""
    parts: list[_Array] = []
    held = 0
    async for index, offset, table in _tables(image, l1[:stop]):
        parts.append(np.array([offset >> image.cluster_bits], dtype=np.uint64))
        parts.append(_references(image, table))
        held += len(parts[-1]) + 1
        if held >= _BATCH:
            await change(image, np.concatenate(parts), delta)
            done[0] = index + 1
            parts, held = [], 0
        # Other requests must have their turn.
        await asyncio.sleep(0)
    if parts:
        await change(image, np.concatenate(parts), delta)
    done[0] = stop


def _per_block(image: Image, clusters: _Array) -> list[tuple[int, int, int]]:
    """The pieces of an ascending array that belong to one refcount block each: (block index, start, end)."""
    blocks = clusters >> np.uint64(image.refcounts.block_bits)
    edges = [0, *(np.flatnonzero(blocks[1:] != blocks[:-1]) + 1).tolist(), len(clusters)]
    return [(int(blocks[start]), start, end) for start, end in pairwise(edges) if start < end]


def _unpack(image: Image, block: Block) -> _Array:
    """The counts of a block: a view of them if they have whole bytes, else a copy."""
    order = image.refcounts.order
    if order >= 3:
        return np.frombuffer(block.counts.values, dtype=f"u{1 << (order - 3)}")
    return decode_counts(bytes(block.counts.values), order)


def _pack(image: Image, block: Block, values: _Array) -> None:
    """Bring what `_unpack` copied back."""
    if image.refcounts.order < 3:
        packed = bytearray(encode_counts(values, image.refcounts.order))
        assert isinstance(block.counts.values, bytearray)
        block.counts.values[:] = packed


async def change(image: Image, clusters: _Array, delta: int) -> None:
    """Change the counts of `clusters` (as often as each is there) by `delta`, in memory; space that nobody uses any
    more is given back. Raises OSError, and for a positive `delta` nothing has changed then."""
    refcounts = image.refcounts
    unique, times = np.unique(clusters, return_counts=True)
    pieces = _per_block(image, unique)
    mask = np.uint64(refcounts.block_entries - 1)
    if delta > 0:
        for index, start, end in pieces:
            block = await refcounts.load(index)
            at = unique[start:end] & mask
            if block is None:
                raise OSError(errno.EIO, "A cluster that is referred to has no reference count")
            values = _unpack(image, block)[at].astype(np.uint64)
            if not values.all():
                raise OSError(errno.EIO, "A cluster that is referred to has no reference count")
            if (values > np.uint64(refcounts.maximum) - times[start:end].astype(np.uint64)).any():
                raise OSError(errno.EINVAL, "A reference count would be too large for its width")
    for index, start, end in pieces:
        block = await refcounts.load(index)
        if block is None:
            continue
        at = unique[start:end] & mask
        values = _unpack(image, block)
        before = values[at].astype(np.uint64)
        n = times[start:end].astype(np.uint64)
        after = before + n if delta > 0 else before - np.minimum(before, n)
        values[at] = after.astype(values.dtype)
        _pack(image, block, values)
        del values
        refcounts.changed(block, int(at[0]), int(at[-1]) + 1)
        if delta < 0:
            gone = unique[start:end][(after == 0) & (before != 0)]
            if len(gone):
                refcounts.freed(int(gone[0]), int(gone[-1]) + 1)
                await _give_back(image, gone)


async def _give_back(image: Image, clusters: _Array) -> None:
    if not image.settings.discard_snapshot:
        return
    cuts = np.flatnonzero(np.diff(clusters) != 1) + 1
    for first, end in zip(np.r_[0, cuts].tolist(), np.r_[cuts, len(clusters)].tolist(), strict=True):
        start = int(clusters[first])
        await image.writeback.discard(image.file, start << image.cluster_bits, (end - first) << image.cluster_bits)


async def counts_of(image: Image, clusters: _Array) -> _Array:
    """The counts of `clusters`, in their order. Raises OSError."""
    refcounts = image.refcounts
    unique, back = np.unique(clusters, return_inverse=True)
    result = np.zeros(len(unique), dtype=np.uint64)
    mask = np.uint64(refcounts.block_entries - 1)
    for index, start, end in _per_block(image, unique):
        block = await refcounts.load(index)
        if block is not None:
            result[start:end] = _unpack(image, block)[unique[start:end] & mask]
    return result[back]


async def correct_flags(image: Image, l1: array[int], none: bool = False) -> array[int]:
    """Set the flag "the refcount is exactly one" in all entries of an L1 table and its L2 tables as the counts in
    memory have it; `none`: no count is one. L2 tables are changed on disk, the L1 table is returned. Raises OSError."""
    bits = np.uint64(image.cluster_bits)
    result = array("Q", (entry & ~COPIED for entry in l1))
    batch: list[tuple[int, int, _Array]] = []
    held = 0

    async def work() -> None:
        hosts = []
        for _, offset, table in batch:
            entries = table[:: image.l2.words]
            alone = np.where(entries & np.uint64(COMPRESSED), np.uint64(0), entries & np.uint64(OFFSET_MASK))
            hosts.append(np.r_[np.uint64(offset), alone])
        if none:
            counts = np.zeros(sum(map(len, hosts)), dtype=np.uint64)
        else:
            counts = await counts_of(image, np.concatenate(hosts) >> bits)
        at = 0
        for (index, offset, table), host in zip(batch, hosts, strict=True):
            own = counts[at : at + len(host)]
            at += len(host)
            if own[0] == 1:
                result[index] |= COPIED
            entries = table[:: image.l2.words]
            flags = np.where((own[1:] == 1) & (host[1:] != 0), np.uint64(COPIED), np.uint64(0))
            right = (entries & ~np.uint64(COPIED)) | flags
            # The flag of compressed clusters means nothing, and is 0.
            if (right != entries).any():
                entries[:] = right
                await image.file.pwrite(offset, table.astype(">u8").tobytes())

    async for one in _tables(image, l1):
        batch.append(one)
        held += len(one[2])
        if held >= _BATCH:
            await work()
            batch, held = [], 0
        await asyncio.sleep(0)
    if batch:
        await work()
    return result
