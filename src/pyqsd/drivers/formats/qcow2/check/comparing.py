"""Comparing what was counted with the refcounts that an image has, and with the flags in its active tables."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pyqsd.drivers.formats.qcow2.check import counting, l2
from pyqsd.drivers.formats.qcow2.check.arrays import (
    BATCH_BYTES,
    BATCH_READS,
    Bools,
    Counts,
    Ints,
    decode_counts,
    grouped,
    read_entries,
    read_runs,
    worked,
)
from pyqsd.drivers.formats.qcow2.check.references import CHUNK_BITS
from pyqsd.drivers.formats.qcow2.tables import OFFSET_MASK

if TYPE_CHECKING:
    import numpy.typing as npt

    from pyqsd.drivers.formats.qcow2.check.counting import Walk
    from pyqsd.drivers.formats.qcow2.image import Image

#: Refcounts are compared for so many clusters at a time (bits), or for those of one block if that has more.
_WINDOW_BITS = 18
#: What is kept of the refcounts, bytes.
_KEPT_BYTES = 64 << 20

# Kinds of refcounts, where only that matters.
_OTHER, _ONE, _UNKNOWN = 0, 1, 2


class DiskCounts:
    """The refcounts of an image as they are on disk, in windows of ``1 << window_bits`` clusters."""

    def __init__(self, image: Image, table: Ints) -> None:
        self.file = image.file
        self.order = image.header.refcount_order
        self.size = image.cluster_size
        self.block_bits = image.header.cluster_bits + 3 - self.order
        self.window_bits = max(_WINDOW_BITS, self.block_bits)
        self.table = table
        self._kinds: dict[int, npt.NDArray[np.uint8]] = {}
        self._most_kept = max(1, _KEPT_BYTES >> self.window_bits)

    @classmethod
    async def read(cls, image: Image) -> DiskCounts:
        """With the refcount table as it is on disk. Raises OSError."""
        header = image.header
        size = header.reftable_clusters << header.cluster_bits
        return cls(image, await read_entries(image.file, header.reftable_offset, size >> 3) & -512)

    def windows(self) -> list[int]:
        """The windows that have a refcount block."""
        found: list[int] = np.unique(np.flatnonzero(self.table) >> (self.window_bits - self.block_bits)).tolist()
        return found

    async def window(self, number: int) -> tuple[Counts, Ints]:
        """The refcounts of a window, and which of its blocks (by their index in the refcount table) cannot be read.
        Raises OSError."""
        first = number << (self.window_bits - self.block_bits)
        entries = self.table[first : first + (1 << (self.window_bits - self.block_bits))]
        unknown = ((entries & (self.size - 1)) != 0) | (entries < 0)
        # Beyond the end of the file everything is zero.
        there = ~unknown & (entries > 0) & (entries < self.file.length)
        if not there.any():
            counts: Counts = np.zeros(1 << self.window_bits, np.uint8)
            return counts, np.flatnonzero(unknown) + first
        # Neighbours in the table are mostly neighbours in the file, and are read together.
        where = np.flatnonzero(there)
        order = np.argsort(entries[where], kind="stable")
        offsets = entries[where][order]
        distinct, back = np.unique(offsets, return_inverse=True)
        data = await read_runs(self.file, distinct, self.size)
        counts = await worked(len(data), self._decode, data, where[order], back, len(distinct))
        return counts, np.flatnonzero(unknown) + first

    def _decode(self, data: bytearray, where: Ints, back: Ints, count: int) -> Counts:
        decoded = decode_counts(data, self.order).reshape(count, -1)
        per_window = 1 << (self.window_bits - self.block_bits)
        if count == per_window and (where[back] == np.arange(count)).all():
            return decoded.reshape(-1)
        counts = np.zeros((per_window, 1 << self.block_bits), decoded.dtype)
        counts[where] = decoded[back]
        return counts.reshape(-1)

    def keep(self, number: int, counts: Counts, unknown: Ints) -> None:
        """Remember which of these are one."""
        kinds = (counts == 1).view(np.uint8)
        if len(unknown):
            first = number << (self.window_bits - self.block_bits)
            kinds.reshape(-1, 1 << self.block_bits)[unknown - first] = _UNKNOWN
        if len(self._kinds) >= self._most_kept:
            del self._kinds[next(iter(self._kinds))]
        self._kinds[number] = kinds

    async def kinds_of(self, number: int) -> npt.NDArray[np.uint8]:
        """`_ONE`, `_OTHER` or `_UNKNOWN` for each cluster of a window. Raises OSError."""
        if number not in self._kinds:
            self.keep(number, *await self.window(number))
        return self._kinds[number]

    async def kinds(self, clusters: Ints) -> npt.NDArray[np.uint8]:
        """The same for some clusters. Raises OSError."""
        found = np.full(len(clusters), _OTHER, np.uint8)
        for number, where in await worked(clusters.nbytes, self._groups, clusters):
            kinds = await self.kinds_of(number)
            found[where] = kinds[clusters[where] & ((1 << self.window_bits) - 1)]
        return found

    def _groups(self, clusters: Ints) -> list[tuple[int, Ints]]:
        """The clusters by window, but for those that have no refcount block."""
        blocks = clusters >> self.block_bits
        there = np.flatnonzero(blocks < len(self.table))
        there = there[self.table[blocks[there]] != 0]
        return [(number, there[where]) for number, where in grouped(clusters[there] >> self.window_bits)]

    async def all_one(self, first: int, count: int) -> bool:
        """Whether all of `count` clusters from `first` on have the refcount one. Raises OSError."""
        at, end = first, first + count
        while at < end:
            number = at >> self.window_bits
            stop = min(end, (number + 1) << self.window_bits)
            base = number << self.window_bits
            if not ((await self.kinds_of(number))[at - base : stop - base] == _ONE).all():
                return False
            at = stop
        return True


def windows(walk: Walk, disk: DiskCounts) -> list[tuple[int, int]]:
    """The windows that have refcounts or references, and how many clusters of each exist."""
    bits, end = disk.window_bits, walk.references.end
    numbers = {number >> (bits - CHUNK_BITS) for number in walk.references.chunks} | set(disk.windows())
    return [(number, min(1 << bits, end - (number << bits))) for number in sorted(numbers) if number << bits < end]


async def compare(walk: Walk, disk: DiskCounts) -> int:
    """Count the differences into the result of `walk`. Returns the last cluster that is in use. Raises OSError."""
    last = 0
    for number, count in windows(walk, disk):
        counts, unknown = await disk.window(number)
        last = max(last, await worked(len(counts), _compare, walk, disk, number, count, counts, unknown))
    return last


def _compare(walk: Walk, disk: DiskCounts, number: int, count: int, counts: Counts, unknown: Ints) -> int:
    """The differences in the first `count` clusters of a window; the last cluster in use, or 0."""
    result, references = walk.result, walk.references
    first = number << disk.window_bits
    disk.keep(number, counts, unknown)
    have, want = counts[:count], references.run(first, count)
    if not len(unknown) and np.array_equal(have, want):
        used = np.flatnonzero(have)
        return first + int(used[-1]) if len(used) else 0
    known = np.ones(1 << disk.window_bits, np.bool_)
    if len(unknown):
        base = number << (disk.window_bits - disk.block_bits)
        known.reshape(-1, 1 << disk.block_bits)[unknown - base] = False
        walk.broken = True
        result.failed("clusters whose refcount cannot be read", count - int(np.count_nonzero(known[:count])))
    known = known[:count]
    less, more = known & (have < want), known & (have > want)
    result.corrupt(counting.TOO_LOW, int(np.count_nonzero(less)))
    result.leaked(int(np.count_nonzero(more)))
    if less.any() and not walk.missing:
        # Where there is no block, there is nothing to put right in place.
        blocks = np.unique(np.flatnonzero(less) >> disk.block_bits) + (first >> disk.block_bits)
        walk.missing = bool((disk.table[blocks[blocks < len(disk.table)]] == 0).any() or blocks[-1] >= len(disk.table))
    used = np.flatnonzero(known & ((have != 0) | (want != 0)))
    return first + int(used[-1]) if len(used) else 0


class WrongFlags(NamedTuple):
    """Some L2 tables: their offsets, how often the active L1 table refers to each, and how often any; their content;
    which of the words are wrong."""

    offsets: Ints
    times: Ints
    total: Ints
    words: Ints
    bitmaps: Ints | None
    wrong: Bools


async def wrong_flags(walk: Walk, disk: DiskCounts) -> tuple[Ints, AsyncIterator[WrongFlags]]:
    """Where the flag COPIED ("the refcount is exactly one") of the active tables is wrong: the indices of such entries
    of the L1 table, and an iterator over the L2 tables that have some. Raises OSError."""
    header, file = walk.image.header, walk.file
    l1 = await read_entries(file, header.l1_offset, header.l1_size)
    offsets = l1 & OFFSET_MASK
    kinds = await disk.kinds(offsets >> walk.layout.bits)
    wrong = (offsets != 0) & (kinds != _UNKNOWN) & ((kinds == _ONE) != (l1 < 0))
    return np.flatnonzero(wrong), _tables_with_wrong_flags(walk, disk)


async def _tables_with_wrong_flags(walk: Walk, disk: DiskCounts) -> AsyncIterator[WrongFlags]:
    layout = walk.layout
    entries = layout.size >> (4 if layout.extended else 3)
    step = max(1, min(BATCH_BYTES // layout.size, BATCH_READS))
    for offsets, times, total, plain in walk.active:
        known = (offsets != 0) & (await disk.kinds(offsets >> layout.bits) != _UNKNOWN)
        candidates = []
        for index in np.flatnonzero(known).tolist():
            if index & 255 == 0:
                await asyncio.sleep(0)
            if plain[index] >= 0 and await disk.all_one(int(plain[index]) >> layout.bits, entries):
                continue
            candidates.append(index)
        for start in range(0, len(candidates), step):
            part = np.array(candidates[start : start + step])
            data = await read_runs(walk.file, offsets[part], layout.size)
            words, bitmaps, stored, clusters = await worked(len(data), _stored, layout, data, len(part))
            if layout.data_file:
                wrong = stored & (words >= 0)
            else:
                kinds = np.full(stored.shape, _UNKNOWN, np.uint8)
                kinds[stored] = await disk.kinds(clusters)
                wrong = (kinds != _UNKNOWN) & ((kinds == _ONE) != (words < 0))
            rows = wrong.any(axis=1)
            if rows.any():
                yield WrongFlags(
                    offsets[part][rows],
                    times[part][rows],
                    total[part][rows],
                    words[rows],
                    None if bitmaps is None else bitmaps[rows],
                    wrong[rows],
                )


def _stored(layout: l2.Layout, data: bytearray, count: int) -> tuple[Ints, Ints | None, Bools, Ints]:
    words, bitmaps = l2.decode(layout, data, count)
    tables = l2.Tables(layout, words, bitmaps)
    return words, bitmaps, tables.stored, tables.host[tables.stored] >> layout.bits


async def count_wrong_flags(walk: Walk, disk: DiskCounts) -> None:
    """Count wrong flags into the result of `walk`. Raises OSError."""
    in_l1, tables = await wrong_flags(walk, disk)
    walk.result.corrupt(counting.FLAGS_L1, len(in_l1))
    async for some in tables:
        walk.result.corrupt(counting.FLAGS_L2, int((some.wrong.sum(axis=1) * some.times).sum()))
