"""Counting every reference to every cluster of an image file.

Source: QEMU docs/interop/qcow2: everything that occupies clusters is the header, the L1 and L2 tables (also those of
snapshots), what L2 entries refer to, the snapshot table, the encryption header, the bitmaps, and the refcount table
with its blocks. What cannot be is counted as a corruption, and the walk goes on.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import numpy as np

from pyqsd.drivers.formats.qcow2 import bitmap_format, snapshots
from pyqsd.drivers.formats.qcow2 import header as headers
from pyqsd.drivers.formats.qcow2.check import l2
from pyqsd.drivers.formats.qcow2.check.arrays import (
    BATCH_BYTES,
    BATCH_READS,
    Bools,
    Ints,
    read_entries,
    read_runs,
    worked,
)
from pyqsd.drivers.formats.qcow2.check.references import References
from pyqsd.drivers.formats.qcow2.tables import OFFSET_MASK, ZERO
from pyqsd.qapi.errors import Error

if TYPE_CHECKING:
    from pyqsd.block.image_check import CheckResult
    from pyqsd.drivers.formats.qcow2.bitmap_format import StoredBitmap
    from pyqsd.drivers.formats.qcow2.image import Image

#: Bits of an L1 entry that must be zero.
L1_RESERVED = 0x7F000000000001FF
_REFTABLE_RESERVED = 0x1FF
#: The upper eight bits and some lower ones, as a signed number.
_BITMAP_RESERVED = -(1 << 56) | 0x1FE
#: L2 tables that are remembered before they are looked at, so that those that snapshots share are read once.
_MOST_PENDING = 4 << 20
#: Tables of sound images do not overlap, so that all together are not larger than the file. How much is read of L1
#: tables and those of bitmaps: so many times that size, and so many bytes in any case.
_READ_MOST = 4
_READ_ALWAYS = 1 << 30
# What is found, where something depends on it.
_BEYOND = "references to clusters beyond the end of the file"
_OVERFLOW = "references that are too many for the refcount width"
_UNALIGNED_TABLE = "L2 tables that are not aligned to clusters"
_UNALIGNED = "clusters that are not aligned"
_SNAPSHOT = "L1 tables of snapshots where none can be"
_BITMAP = "invalid entries in tables of bitmaps"
_MISFIT = "bitmaps that do not fit the disk"
BROKEN_BITMAPS = "broken bitmap directories"
TOO_LOW = "clusters with a refcount that is too low"
FLAGS_L1 = "wrong flags COPIED in the L1 table"
FLAGS_L2 = "wrong flags COPIED in L2 tables"
#: With these, not everything could be counted.
NOT_COUNTED = (_BEYOND, _OVERFLOW, _UNALIGNED_TABLE, _UNALIGNED, _SNAPSHOT, _BITMAP, _MISFIT, BROKEN_BITMAPS)


class Walk:
    """One walk through all metadata. `references` is the outcome; what is wrong goes to `result`.

    `active`: the L2 tables of the active L1 table, as (offsets, how often that refers to each, how often any L1 table
    does, plain), where `plain` is where the clusters of a table begin if it is an unbroken run (see `l2.plain_runs`),
    else -1. `rebuild`: the refcount structures are so broken that they must be made anew. `fixable`: the tables, as
    (offset, how often L1 tables refer to it), with entries that can be put right; with `fix`, the offsets of some, that
    is done on the way. `bitmaps`: those that are sound, where others are not, or the directory is not; else None.
    """

    def __init__(
        self, image: Image, result: CheckResult, order: int | None = None, fix: frozenset[int] = frozenset()
    ) -> None:
        header = image.header
        self.image = image
        self.file = image.file
        self.result = result
        self.layout = l2.Layout(header)
        self.references = References(
            header.refcount_order if order is None else order, header.cluster_bits, image.file.length
        )
        self.active: list[tuple[Ints, Ints, Ints, Ints]] = []
        self.fixable: list[tuple[int, int]] = []
        self.bitmaps: list[StoredBitmap] | None = None
        self.broken = False
        self.missing = False
        self._fix = fix
        self._fixed: list[tuple[int, bytes]] = []
        self._readable = _READ_ALWAYS + _READ_MOST * image.file.length
        self._pending: list[tuple[Ints, Ints, bool]] = []
        self._pending_size = 0

    async def everything(self) -> None:
        """Count all but the refcount structures. Raises OSError."""
        header, references = self.image.header, self.references
        references.add_run(0, 1)
        await self._l1(header.l1_offset, header.l1_size, True)
        for one in self.image.snapshots:
            if one.l1_offset & self.layout.mask or one.l1_size > headers.MAX_L1_BYTES // 8:
                self.result.corrupt(_SNAPSHOT)
                continue
            await self._l1(one.l1_offset, one.l1_size, False)
        await self._tables()
        if self.image.snapshots:
            references.add_bytes(header.snapshots_offset, snapshots.table_bytes(self.image.snapshots))
        area = headers.encryption_area(header)
        if area is not None:
            references.add_bytes(*area)
        await self._bitmaps()

    def only_tables(self, offsets: Ints, times: Ints) -> Bools:
        """Which L2 tables are nothing but that: `times` references from L1 tables are all that their clusters have. The
        others may be somebody's data, and are not written to."""
        there = ((offsets & self.layout.mask) == 0) & (offsets < self.references.file_length)
        counts = self.references.get(offsets >> self.layout.bits)
        found: Bools = there & (counts == times)
        if self.references.overflowed:
            # Nobody knows how many there are beyond the maximum.
            found &= counts < self.references.maximum
        return found

    def finish(self) -> None:
        """Turn what did not fit into findings."""
        self.result.corrupt(_BEYOND, self.references.beyond)
        self.result.corrupt(_OVERFLOW, self.references.overflows)
        self.references.beyond = self.references.overflows = 0

    async def _read(self, offset: int, count: int) -> Ints:
        """The entries of a table, as far as the file has it: zeroes follow. Raises OSError, also where there is so much
        to read that it would never end."""
        count = min(count, max(0, self.file.length - offset + 7) >> 3)
        self._readable -= count * 8
        if self._readable < 0:
            raise OSError(errno.EFBIG, "The image has too many tables to be checked")
        return await read_entries(self.file, offset, count)

    # --- L1 and L2 ---------------------------------------------------------------------------------------------------

    async def _l1(self, offset: int, size: int, active: bool) -> None:
        if not size:
            return
        self.references.add_bytes(offset, size * 8)
        entries = await self._read(offset, size)
        offsets, times = await worked(len(entries) * 8, self._l1_entries, entries)
        self._pending.append((offsets, times, active))
        self._pending_size += len(offsets)
        if self._pending_size > _MOST_PENDING:
            await self._tables()

    def _l1_entries(self, entries: Ints) -> tuple[Ints, Ints]:
        """The L2 tables that the entries refer to, and how often."""
        entries = entries[entries != 0]
        self.result.corrupt("L1 entries with reserved bits set", int(np.count_nonzero(entries & L1_RESERVED)))
        offsets, times = np.unique(entries & OFFSET_MASK, return_counts=True)
        return offsets, times.astype(np.int64)

    async def _tables(self) -> None:
        """Look at the L2 tables that are pending."""
        pending, self._pending = self._pending, []
        self._pending_size = 0
        if not pending:
            return
        offsets, times, active = await worked(sum(one[0].nbytes for one in pending), _merged, pending)
        plain = np.full(len(offsets), -1, np.int64)
        size = self.layout.size
        step = max(1, min(BATCH_BYTES // size, BATCH_READS))
        for start in range(0, len(offsets), step):
            part = slice(start, start + step)
            data = await read_runs(self.file, offsets[part], size)
            plain[part] = await worked(len(data), self._look_at, data, offsets[part], times[part], active[part])
            fixed, self._fixed = self._fixed, []
            for offset, table in fixed:
                await self.file.pwrite(offset, table)
        used = active > 0
        self.active.append((offsets[used], active[used], times[used], plain[used]))

    def _look_at(self, data: bytearray, offsets: Ints, times: Ints, active: Ints) -> Ints:
        """Count what some L2 tables refer to, and these themselves. Returns where the plain ones begin."""
        result, references, layout = self.result, self.references, self.layout
        unaligned = (offsets & layout.mask) != 0
        result.corrupt(_UNALIGNED_TABLE, int(times[unaligned].sum()))
        words, bitmaps = l2.decode(layout, data, len(offsets))
        self._fix_entries(offsets, times, words, bitmaps)
        plain = l2.plain_runs(layout, words, bitmaps, references.file_length)
        entries = words.shape[1]
        for number in np.unique(times).tolist():
            here = times == number
            references.add_spans(offsets[here], layout.size, number)
            for first in plain[here & (plain >= 0)].tolist():
                references.add_run(first >> layout.bits, entries, number)
            odd = here & (plain < 0)
            if odd.any():
                tables = l2.Tables(layout, words[odd], None if bitmaps is None else bitmaps[odd])
                self._entries(tables, number, active[odd])
        result.allocated_clusters += entries * int(active[plain >= 0].sum())
        return plain

    def _fix_entries(self, offsets: Ints, times: Ints, words: Ints, bitmaps: Ints | None) -> None:
        """Find zero clusters whose space is where none can be, and take that away, here and later on disk, where it is
        wanted: the content stays as it is."""
        if not (words & OFFSET_MASK & self.layout.mask).any():
            return
        tables = l2.Tables(self.layout, words, bitmaps)
        misplaced = tables.unaligned() & tables.preallocated()
        for row in np.flatnonzero(misplaced.any(axis=1)).tolist():
            offset, number = int(offsets[row]), int(times[row])
            self.fixable.append((offset, number))
            if offset not in self._fix:
                continue
            self.result.corrupt("zero clusters that are not aligned", int(np.count_nonzero(misplaced[row])) * number)
            # Nothing is stored there.
            words[row, misplaced[row]] = ZERO if bitmaps is None else 0
            content = words[row] if bitmaps is None else np.stack((words[row], bitmaps[row]), axis=1)
            self._fixed.append((offset, content.astype(">i8").tobytes()))

    def _entries(self, tables: l2.Tables, times: int, active: Ints) -> None:
        """Count the entries of tables that are not plain, each of which is referred to `times` times."""
        result, references, layout = self.result, self.references, self.layout
        compressed, stored = tables.compressed, tables.stored

        def corrupt(what: str, entries: Bools) -> None:
            result.corrupt(what, int(np.count_nonzero(entries)) * times)

        corrupt("L2 entries with reserved bits set", tables.reserved())
        if compressed.any():
            corrupt("compressed clusters with the flag COPIED", compressed & (tables.words < 0))
            if layout.data_file:
                corrupt("compressed clusters in an image with a data file", compressed)
                compressed = np.zeros_like(compressed)
            elif tables.bitmaps is not None:
                wrong = compressed & (tables.bitmaps != 0)
                corrupt("compressed clusters with subclusters", wrong)
                compressed = compressed & ~wrong
            offsets, sizes = tables.pack_places(compressed)
            references.add_spans(offsets, sizes, times)
            packed = int((compressed.sum(axis=1) * active).sum())
            result.allocated_clusters += packed
            result.compressed_clusters += packed
            # They share clusters by nature, so each of them counts as a fragment.
            result.fragmented_clusters += packed
        if tables.bitmaps is not None:
            corrupt("clusters that are not allocated with allocated subclusters", tables.nowhere())
            corrupt("subclusters that are both allocated and zero", tables.conflicting())
        corrupt(_UNALIGNED, tables.unaligned())
        result.allocated_clusters += int((stored.sum(axis=1) * active).sum())
        result.fragmented_clusters += self._fragments(tables, active)
        if not layout.data_file:
            references.add_spans(tables.host[stored], layout.size, times)

    @staticmethod
    def _fragments(tables: l2.Tables, active: Ints) -> int:
        """Clusters that do not follow the one that is before them in their table."""
        rows, _ = np.nonzero(tables.stored)
        host = tables.host[tables.stored]
        broken = (np.diff(host) != tables.layout.size) & (np.diff(rows) == 0)
        return int(active[rows[1:][broken]].sum())

    # --- bitmaps -----------------------------------------------------------------------------------------------------

    async def _bitmaps(self) -> None:
        """QEMU docs/interop/qcow2, section "Bitmaps"."""
        header = self.image.header
        directory = header.bitmaps
        if directory is None:
            if header.bitmaps_error is not None:
                self.result.corrupt(BROKEN_BITMAPS)
                self.bitmaps = []
            return
        references = self.references
        references.add_bytes(directory.directory_offset, directory.directory_size)
        data = await self.file.pread(directory.directory_offset, directory.directory_size)
        disk_size = header.size & ~511
        found = bitmap_format.salvage_directory(data, self.layout.size, disk_size)
        try:
            whole = found == bitmap_format.decode_directory(data, directory.count, self.layout.size, disk_size)
        except Error:
            whole = False
        if not whole:
            self.result.corrupt(BROKEN_BITMAPS)
        sound = [one for one in found if await self._bitmap(one)]
        if not whole or len(sound) < len(found):
            self.bitmaps = sound

    async def _bitmap(self, one: StoredBitmap) -> bool:
        """Count what a bitmap has. Returns whether nothing is wrong with it."""
        references, result = self.references, self.result
        before = references.beyond, result.corruptions
        references.add_bytes(one.table_offset, one.table_entries * 8)
        for start in range(0, one.table_entries, BATCH_BYTES >> 3):
            entries = await self._read(one.table_offset + start * 8, min(one.table_entries - start, BATCH_BYTES >> 3))
            await worked(entries.nbytes, self._bitmap_entries, entries)
        wanted = bitmap_format.data_clusters(self.image.header.size & ~511, one.granularity_bits, self.layout.size)
        # The disk may have been resized since one that is in use was stored.
        result.corrupt(_MISFIT, not one.in_use and one.table_entries != wanted)
        return before == (references.beyond, result.corruptions)

    def _bitmap_entries(self, entries: Ints) -> None:
        host = entries & OFFSET_MASK
        wrong = (entries & _BITMAP_RESERVED) != 0
        wrong |= (host != 0) & (((host & self.layout.mask) != 0) | ((entries & 1) != 0))
        self.result.corrupt(_BITMAP, int(np.count_nonzero(wrong)))
        self.references.add_spans(host[(host != 0) & ~wrong], self.layout.size)

    # --- refcount structures -----------------------------------------------------------------------------------------

    async def refcount_structures(self) -> None:
        """Count the refcount table and its blocks, as they are on disk. Raises OSError."""
        header = self.image.header
        size = header.reftable_clusters << header.cluster_bits
        self.references.add_bytes(header.reftable_offset, size)
        table = await read_entries(self.file, header.reftable_offset, size >> 3)
        await worked(len(table) * 8, self._blocks, table)

    def _blocks(self, table: Ints) -> None:
        header, references, result = self.image.header, self.references, self.result
        table = table[table != 0]
        reserved = (table & _REFTABLE_RESERVED) != 0
        offsets = table[~reserved]
        unaligned = (offsets & self.layout.mask) != 0
        # The highest bit is part of the offset here.
        outside = ~unaligned & ((offsets < 0) | (offsets >> header.cluster_bits >= references.end))
        result.corrupt("refcount table entries with reserved bits set", int(np.count_nonzero(reserved)))
        result.corrupt("refcount blocks that are not aligned", int(np.count_nonzero(unaligned)))
        result.corrupt("refcount blocks outside of the file", int(np.count_nonzero(outside)))
        clusters = offsets[~unaligned & ~outside] >> header.cluster_bits
        found, times = np.unique(clusters, return_counts=True)
        before = references.get(found)
        references.add(clusters)
        # All but the first of those that share a cluster, and the first, too, where something else has it.
        shared = np.where(before == 0, times - 1, times)
        if references.maximum > 1:
            # Else they have been counted as references that did not fit.
            result.corrupt("refcount blocks that are not the only user of their cluster", int(shared.sum()))
        self.broken = bool(reserved.any() or unaligned.any() or outside.any() or shared.any())


def _merged(found: list[tuple[Ints, Ints, bool]]) -> tuple[Ints, Ints, Ints]:
    """Several lists of L2 tables as one: (offsets, how often they are referred to, how often by the active table)."""
    offsets, where = np.unique(np.concatenate([one[0] for one in found]), return_inverse=True)
    times = np.zeros(len(offsets), np.int64)
    active = np.zeros(len(offsets), np.int64)
    at = 0
    for one, counts, is_active in found:
        here = where[at : at + len(one)]
        at += len(one)
        times[here] += counts
        if is_active:
            active[here] += counts
    return offsets, times, active
