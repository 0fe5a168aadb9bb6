"""Zero writes and discards: they change L2 entries and drop clusters.

Source: QEMU docs/interop/qcow2, section "Cluster mapping" (standard cluster descriptor, bit 0). Which request leaves
what behind follows QEMU's driver, so that the same requests make the same image.
"""

from __future__ import annotations

import asyncio
import errno
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING

from pyqsd.block.driver import MAY_UNMAP, NO_FALLBACK
from pyqsd.block.extents import DATA
from pyqsd.block.extents import ZERO as READS_ZERO
from pyqsd.drivers.formats.qcow2 import extended
from pyqsd.drivers.formats.qcow2 import header as headers
from pyqsd.drivers.formats.qcow2.tables import ALL_ZERO, COMPRESSED, COPIED, OFFSET_MASK, ZERO
from pyqsd.drivers.formats.qcow2.write import InFlight

if TYPE_CHECKING:
    from pyqsd.drivers.formats.qcow2.image import Image
    from pyqsd.drivers.formats.qcow2.tables import Slice
    from pyqsd.drivers.formats.qcow2.write import Writer

#: After so many slices other requests have their turn.
_STEPS = 8
#: What becomes of the cluster of an entry: nothing; the reference is dropped; it stays, but its space is given back.
KEEP = 0
DROP = 1
GIVE_BACK = 2
#: What to do with an entry: the new words, and what becomes of its cluster.
_Change = tuple[int, int, int]
#: From the old words; None leaves it as it is. The second word is that of extended entries, else 0.
_Changer = Callable[[int, int], _Change | None]


class Unmapper:
    """Zero writes and discards of one image."""

    def __init__(self, image: Image, writer: Writer) -> None:
        self.image = image
        self.writer = writer

    async def zero(self, offset: int, length: int, flags: int) -> None:
        """Make whole clusters read as zeroes; the range may end at the end of the disk instead. Raises OSError; ENOTSUP
        when version 2 cannot say so."""
        image = self.image
        end = offset + length
        mask = image.unit_size - 1
        whole = not offset & mask and (not end & mask or end == image.node.length)
        if whole and not image.raw_data:
            await self._zero(offset, length, flags, None)
            return
        # Nobody may write to the clusters at the edges between the look at them and the change.
        own = await self._hold(offset, end)
        try:
            if not whole:
                await self._check_edges_zero(offset, end)
            if image.raw_data:
                await self._zero_data(offset, end, flags & (MAY_UNMAP | NO_FALLBACK))
            await self._zero(offset, length, flags, own)
        finally:
            self.writer.finished(own)

    async def _hold(self, offset: int, end: int) -> InFlight:
        """Keep all others away from the clusters of the range until this is `finished`."""
        first = offset >> self.image.cluster_bits
        last = (end - 1) >> self.image.cluster_bits
        while (other := self._conflict(first, last, None)) is not None:
            await self.writer.wait_for(other)
        own = InFlight(first, last, True)
        self.writer.in_flight.append(own)
        return own

    async def _zero_data(self, offset: int, end: int, flags: int) -> None:
        """Zero a raw data file, before any L2 entry says so: what is cut off in between is the same disk in both. The
        entries must not be on disk before the zeroes are. Raises OSError."""
        image = self.image
        await image.data.pwrite_zeroes(offset, end - offset, flags)
        image.barrier = True

    async def _zero(self, offset: int, length: int, flags: int, own: InFlight | None) -> None:
        image = self.image
        end = offset + length
        if image.header.version < 3:
            if image.backing is not None:
                raise OSError(errno.ENOTSUP, "zero clusters need version 3")
            await self._discard(offset, length, "request", False, own)
            return
        unmap = bool(flags & MAY_UNMAP)
        keep = image.settings.discard_no_unref

        def change(entry: int, bitmap: int) -> _Change:
            compressed = bool(entry & COMPRESSED)
            may_go = unmap and not compressed and image.has_place(entry)
            action = DROP if compressed or (may_go and not keep) else GIVE_BACK if may_go else KEEP
            if image.extended:
                return (0 if action == DROP else entry), ALL_ZERO, action
            return (ZERO if action == DROP else entry | ZERO), 0, action

        if image.extended:
            # Parts of clusters at both ends: only their subclusters.
            unit = image.unit_size
            whole_start = (offset + image.cluster_mask) & ~image.cluster_mask
            whole_end = end if end == image.node.length else end & ~image.cluster_mask
            if offset < whole_start:
                stop = min(whole_start, end)
                await self._zero_units(offset & ~(unit - 1), (stop + unit - 1) & ~(unit - 1), own)
                offset = whole_start
            if max(whole_end, offset) < end:
                await self._zero_units(max(whole_end, offset), (end + unit - 1) & ~(unit - 1), own)
            end = whole_end
        if offset < end:
            await self._change(offset, end, change, None, "request", own)

    async def _zero_units(self, offset: int, end: int, own: InFlight | None) -> None:
        """Make subclusters of one cluster read as zeroes. Raises OSError, ENOTSUP if it is compressed."""
        image, l2 = self.image, self.image.l2
        first = offset >> image.cluster_bits
        bits = extended.touched(image, offset, end)

        def change(entry: int, bitmap: int) -> _Change:
            if entry & COMPRESSED:
                raise OSError(errno.ENOTSUP, "compressed")
            return entry, (bitmap | bits << 32) & ~bits, KEEP

        while True:
            image.check_usable()
            other = self._conflict(first, first, own)
            if other is not None:
                await self.writer.wait_for(other)
                continue
            if image.settings.lazy_refcounts and not image.header.incompatible & headers.INCOMPAT_DIRTY:
                await image.mark_dirty()
                continue
            key = offset >> l2.slice_shift
            found = l2.slices.get(key)
            if found is not None and l2.l1[key >> l2.key_bits] & COPIED:
                break
            await l2.load_for_write(key)
        self._change_slice(found, first, first, change, "request")

    def _conflict(self, first: int, last: int, own: InFlight | None) -> InFlight | None:
        """A request in flight on the guest clusters `first` to `last`, other than our own."""
        for other in self.writer.in_flight:
            if other is not own and other.first <= last and first <= other.last:
                return other
        return None

    async def _check_edges_zero(self, offset: int, end: int) -> None:
        """A part of a cluster can become a zero cluster if nothing is stored in it and the rest of it reads as zeroes
        already."""
        image = self.image
        mask = image.unit_size - 1
        start = offset & ~mask
        stop = min((end + mask) & ~mask, image.node.length)
        for at, until in ((start, offset), (end, stop)):
            while at < until:
                (n, flags, _, _), _ = await image.node.block_status_above(None, at, until - at)
                if not n or not flags & READS_ZERO or (await image.node.driver.load_map(at, 1))[1] & DATA:
                    raise OSError(errno.ENOTSUP, "not whole clusters")
                at += n

    async def discard(self, offset: int, length: int, kind: str, full: bool) -> None:
        """Drop the clusters of the range. `full`: nothing is to be left behind (the disk is shrinking), else what was
        discarded reads as zeroes where the version can say so. Raises OSError."""
        image = self.image
        if not image.raw_data or full:
            await self._discard(offset, length, kind, full, None)
            return
        own = await self._hold(offset, offset + length)
        try:
            end = min(offset + length, image.data.length)
            if offset < end:
                await self._zero_data(offset, end, MAY_UNMAP if image.writeback.passes(kind) else 0)
            await self._discard(offset, length, kind, full, own)
        finally:
            self.writer.finished(own)

    async def _discard(self, offset: int, length: int, kind: str, full: bool, own: InFlight | None) -> None:
        image = self.image
        keep = image.settings.discard_no_unref and not full
        zero_entry = ZERO if image.header.version >= 3 and not image.extended else 0
        zero_bitmap = ALL_ZERO if image.extended else 0
        has_backing = image.backing is not None

        def change(entry: int, bitmap: int) -> _Change | None:
            compressed = bool(entry & COMPRESSED)
            place = not compressed and image.has_place(entry)
            if full:
                return (0, 0, DROP if compressed or place else KEEP) if entry or bitmap else None
            is_zero = bitmap == ALL_ZERO if image.extended else bool(entry & ZERO)
            if not compressed and not place:
                # Plain zero, or unallocated: only what a backing file would show has to be hidden.
                return (zero_entry, zero_bitmap, KEEP) if not is_zero and has_backing else None
            if compressed or not keep:
                return zero_entry, zero_bitmap, DROP
            return (entry | zero_entry, zero_bitmap, GIVE_BACK) if not is_zero else None

        await self._change(offset, offset + length, change, full, kind, own)

    async def _change(
        self,
        offset: int,
        end: int,
        change: _Changer,
        full: bool | None,
        kind: str,
        own: InFlight | None,
    ) -> None:
        """Apply `change` to every L2 entry of the range. Slices without a table are passed over if nothing in them can
        change (`full` is not None: a discard, which leaves what is unallocated without a backing file)."""
        image = self.image
        l2 = image.l2
        at = offset
        skip_missing = full is not None and (full or self.image.backing is None)
        table_shift = l2.slice_shift + l2.key_bits
        steps = 0
        while at < end:
            if skip_missing:
                at = max(at, l2.next_table(at >> table_shift, ((end - 1) >> table_shift) + 1) << table_shift)
                if at >= end:
                    break
            steps += 1
            if steps % _STEPS == 0:
                # Others must have their turn.
                await asyncio.sleep(0)
            stop = min(end, ((at >> l2.slice_shift) + 1) << l2.slice_shift)
            first = at >> image.cluster_bits
            last = (stop - 1) >> image.cluster_bits
            while True:
                image.check_usable()
                other = self._conflict(first, last, own)
                if other is not None:
                    await self.writer.wait_for(other)
                    continue
                if image.settings.lazy_refcounts and not image.header.incompatible & headers.INCOMPAT_DIRTY:
                    await image.mark_dirty()
                    continue
                key = at >> l2.slice_shift
                if skip_missing and not l2.table_offset(key >> l2.key_bits):
                    # It went away meanwhile.
                    break
                found = l2.slices.get(key)
                if found is None or not l2.l1[key >> l2.key_bits] & COPIED:
                    await l2.load_for_write(key)
                    continue
                places = self._change_slice(found, first, last, change, kind)
                if places and image.writeback.passes(kind):
                    await self._give_back(first, last, places)
                break
            at = stop

    async def _give_back(self, first: int, last: int, places: list[int]) -> None:
        """Give back the space of clusters that have no count that goes down (in a data file), or that their L2 entries
        keep (``discard-no-unref``), while nobody writes there."""
        image = self.image
        request = InFlight(first, last, True)
        self.writer.in_flight.append(request)
        try:
            if image.encrypted:
                # What is given back is no zeroes for the guest, as long as an entry on disk says that it is data.
                await image.write_back()
                await image.file.flush()
            start = end = places[0]
            for host in [*places, -1]:
                if host == end:
                    end += image.cluster_size
                    continue
                await image.writeback.discard(image.data, start, end - start)
                start, end = host, host + image.cluster_size
        finally:
            self.writer.finished(request)

    def _change_slice(self, found: Slice, first: int, last: int, change: _Changer, kind: str) -> list[int]:
        """Change entries of one slice. Returns the host offsets of clusters whose space may go at once."""
        image = self.image
        mask = image.l2.slice_entries - 1
        entries = found.entries
        words = image.l2.words
        lo = hi = -1
        places: list[int] = []
        start, stop = first & mask, (last & mask) + 1
        if not any(entries[start * words : stop * words]):
            # All are unallocated, and become the same.
            changed = change(0, 0)
            if changed is not None and (changed[0] or changed[1]):
                entries[start * words : stop * words] = array("Q", changed[:words]) * (stop - start)
                image.l2.touched(found, start, stop)
            return places
        for index in range(start, stop):
            old = entries[index * words]
            bitmap = entries[index * words + 1] if words == 2 else 0
            if image.external:
                image.check_external(found, index, old)
            if not old & COMPRESSED and old & OFFSET_MASK & image.cluster_mask:
                raise image.bad_entry(found, index, "Cluster allocation offset {host:#x} unaligned", old & OFFSET_MASK)
            changed = change(old, bitmap)
            if changed is None:
                continue
            new, new_bitmap, action = changed
            if new == old and new_bitmap == bitmap:
                continue
            entries[index * words] = new
            if words == 2:
                entries[index * words + 1] = new_bitmap
            if action == DROP:
                self.writer.drop(old, kind)
                if image.external and not old & COMPRESSED and image.has_place(old):
                    places.append(old & OFFSET_MASK)
            elif action == GIVE_BACK and old & COPIED:
                places.append(old & OFFSET_MASK)
            if lo < 0:
                lo = index
            hi = index + 1
        if lo >= 0:
            image.l2.touched(found, lo, hi)
        return places
