"""Bringing metadata to disk in an order that survives a crash at any moment.

One round is:

1. refcounts (they only go up here), with the blocks and the table that hold them;
2. a flush, which also makes the guest's data and copied-on-write data durable, in an external data file first;
3. L2 tables, as they were when the round began, so that they refer only to what steps 1 and 2 brought to disk;
4. a flush, if there are new L2 tables, and then the L1 entries that refer to them;
5. a flush, if references were dropped: now nothing on disk refers to those clusters, so their counts go down (in
   memory; an early end leaks them), they may be used again, and their space is given back.

So the image file is consistent after every single write, but for leaked clusters. The flush that the guest asked for
follows this as the node's flush of its children.
"""

from __future__ import annotations

import asyncio
import errno
import os
import sys
from array import array
from typing import TYPE_CHECKING

from pyqsd.drivers.formats.qcow2 import header as headers
from pyqsd.drivers.formats.qcow2.tables import OFFSET_MASK

if TYPE_CHECKING:
    from pyqsd.block.node import Node
    from pyqsd.drivers.formats.qcow2.image import Image
    from pyqsd.drivers.formats.qcow2.tables import Slice

#: Tables are written in pieces of this alignment (bytes), which needs no read-modify-write on O_DIRECT files.
_ALIGN = 4096


class WriteBack:
    """Writes the caches of one image back."""

    def __init__(self, image: Image) -> None:
        self.image = image
        #: Held by a round, and by whoever needs the L1 table on disk to stay as it is.
        self.lock = asyncio.Lock()

    @property
    def needed(self) -> bool:
        """Whether anything is not on disk."""
        image = self.image
        return bool(image.l2.dirty or image.l2.l1_dirty or image.frees or image.refcounts.dirty)

    async def run(self, refcounts: bool | None = None) -> None:
        """Bring everything to disk that is in memory now. `refcounts`: also with lazy refcounts. Raises OSError; what
        could not be written is still in memory then."""
        if self.needed:
            await self.image.uncancelled(self._round(refcounts))

    async def _round(self, refcounts: bool | None) -> None:
        image = self.image
        lazy = image.settings.lazy_refcounts and image.header.incompatible & headers.INCOMPAT_DIRTY
        if refcounts is None:
            refcounts = not lazy
        async with self.lock:
            if not self.needed:
                return
            image.check_usable()
            await self._write(refcounts)
            if refcounts and image.refcounts.dirty:
                # Step 5 lowered counts.
                await image.refcounts.write()

    async def _write(self, refcounts: bool) -> None:
        image = self.image
        l2 = image.l2
        pieces = self._take_slices()
        tables = self._take_tables()
        l1_entries, l2.l1_dirty = l2.l1_dirty, set()
        l1 = {index: l2.l1[index] for index in l1_entries}
        frees, image.frees = image.frees, []
        freed, image.freed_clusters = image.freed_clusters, 0
        try:
            if refcounts:
                await image.refcounts.write()
            if (pieces or tables or l1) and image.barrier:
                await self._flush()
            while tables:
                index, offset, data, held = tables[-1]
                image.event("l2_update")
                await image.file.pwrite(offset, data)
                l2.unwritten.discard(index)
                for found in held:
                    found.busy = False
                tables.pop()
            while pieces:
                found, lo, hi, offset, data = pieces[-1]
                image.event("l2_update")
                await image.file.pwrite(offset, data)
                found.busy = False
                pieces.pop()
            if l1:
                await self._flush()
                await self._write_l1(l1)
                l1 = {}
            if frees:
                await self._flush()
        except BaseException:
            for found, lo, hi, _, _ in pieces:
                found.busy = False
                l2.touched(found, lo, hi)
            l2.l1_dirty.update(l1)
            image.frees = frees + image.frees
            image.freed_clusters += freed
            for _, _, _, held in tables:
                for found in held:
                    found.busy = False
                    l2.touched(found, 0, l2.slice_entries)
            raise
        if frees:
            await self._apply_frees(frees)

    def _take_slices(self) -> list[tuple[Slice, int, int, int, bytes]]:
        """The changed parts of the dirty slices, as they are now; these are clean afterwards. Tables that are not on
        disk at all are `_take_tables`' business."""
        image = self.image
        l2 = image.l2
        pieces = []
        per = min(_ALIGN // (8 * l2.words), l2.slice_entries)
        for found in sorted(l2.dirty, key=lambda s: -s.key):
            if found.key >> l2.key_bits in l2.unwritten:
                continue
            lo, hi = found.lo, found.hi
            found.lo = found.hi = 0
            found.busy = True
            l2.dirty.discard(found)
            start, stop = lo // per * per, -(-hi // per) * per
            data = found.entries[start * l2.words : stop * l2.words]
            data.byteswap()
            offset = l2.slice_offset(found.key) + start * l2.words * 8
            pieces.append((found, lo, hi, offset, data.tobytes()))
        return pieces

    def _take_tables(self) -> list[tuple[int, int, bytes, list[Slice]]]:
        """The new tables in full: (L1 index, host offset, content, the slices that are part of it)."""
        image = self.image
        l2 = image.l2
        tables = []
        for index in sorted(l2.unwritten, reverse=True):
            data = bytearray()
            held = []
            for key in range(index << l2.key_bits, (index + 1) << l2.key_bits):
                found = l2.slices.get(key)
                if found is None:
                    data += bytes(l2.slice_bytes)
                    continue
                found.lo = found.hi = 0
                found.busy = True
                held.append(found)
                l2.dirty.discard(found)
                entries = array("Q", found.entries)
                entries.byteswap()
                data += entries.tobytes()
            tables.append((index, l2.l1[index] & OFFSET_MASK, bytes(data), held))
        return tables

    async def _flush(self) -> None:
        image = self.image
        image.barrier = False
        try:
            if image.data is not image.file:
                await image.data.flush()
            await image.file.flush()
        except BaseException:
            image.barrier = True
            raise

    async def _write_l1(self, l1: dict[int, int]) -> None:
        """Write L1 entries, neighbours together."""
        image = self.image
        indices = sorted(l1)
        at = 0
        while at < len(indices):
            end = at + 1
            while end < len(indices) and indices[end] == indices[end - 1] + 1:
                end += 1
            data = array("Q", [l1[index] for index in indices[at:end]])
            data.byteswap()
            image.event("l1_update")
            await image.file.pwrite(image.header.l1_offset + indices[at] * 8, data.tobytes())
            at = end

    def passes(self, kind: str) -> bool:
        """Whether the space of clusters goes back that became free for a reason of this kind."""
        settings = self.image.settings
        return (
            (kind == "request" and settings.discard_request)
            or (kind == "snapshot" and settings.discard_snapshot)
            or (kind == "other" and settings.discard_other)
        )

    async def _apply_frees(self, frees: list[tuple[int, int, str]]) -> None:
        """Lower the counts of these clusters, in memory. Raises OSError where the cache of counts has no room because
        it could not be written; then the rest is left for the next round."""
        image = self.image
        left = frees[::-1]
        try:
            while left:
                image.event("cluster_free")
                while left[-1][1]:
                    first, count, kind = left[-1]
                    n = image.refcounts.in_one_block(first, count)
                    await self._free(first, n, kind)
                    left[-1] = (first + n, count - n, kind)
                left.pop()
        except BaseException:
            image.frees = left[::-1] + image.frees
            image.freed_clusters += sum(count for _, count, _ in left)
            raise

    async def _free(self, first: int, count: int, kind: str) -> None:
        """The same for some clusters whose counts are in one block: all of them, or none."""
        image = self.image
        await image.refcounts.room_for(first)
        try:
            # The space goes back before the count goes down: a cluster that is free may be written to at once.
            if self.passes(kind):
                for start, n in await image.refcounts.last_references(first, count):
                    await self.discard(image.file, start << image.cluster_bits, n << image.cluster_bits)
            await image.refcounts.decrease(first, count)
        except OSError as exc:
            image.check_usable()
            # The block cannot be read. They leak, no worse; the others may still work out. QSD's words.
            print(f"qcow2_free_clusters failed: {os.strerror(exc.errno or errno.EIO)}", file=sys.stderr)

    async def discard(self, node: Node, offset: int, length: int) -> None:
        """Give space of the image file, or of the data file, back; that may fail without harm."""
        try:
            end = min(offset + length, node.length)
            if end > offset:
                await node.pdiscard(offset, end - offset)
        except OSError as exc:
            if exc.errno == errno.ENOMEDIUM:
                raise
