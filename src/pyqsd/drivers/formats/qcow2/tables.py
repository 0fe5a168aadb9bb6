"""The guest's address translation: the L1 table and the cache of L2 tables.

Source: QEMU docs/interop/qcow2, section "Cluster mapping".

L2 tables are cached in slices (option ``l2-cache-entry-size``), found by guest address and held as native integers, so
that an answer costs a dictionary look-up and an index. Everything is changed in memory; `writeback` brings it to disk.
"""

from __future__ import annotations

import asyncio
from array import array
from typing import TYPE_CHECKING

from pyqsd.drivers.formats.qcow2 import header as headers
from pyqsd.drivers.formats.qcow2.cached import Cached

if TYPE_CHECKING:
    from pyqsd.drivers.formats.qcow2.image import Image

COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO = 1 << 0
#: The host offset in an L1 or L2 entry.
OFFSET_MASK = 0x00FFFFFFFFFFFE00
#: Subcluster bitmaps (extended L2 entries): all of them allocated, all of them zero.
ALL_ALLOCATED = (1 << 32) - 1
ALL_ZERO = ALL_ALLOCATED << 32


def count_same(entries: array[int], at: int, end: int) -> int:
    """How many entries from `at` on, before `end`, are the same as that one."""
    size = entries.itemsize
    view = memoryview(entries).cast("B")
    one = bytes(view[at * size : (at + 1) * size])
    found = at + 1
    for step in (1024, 128, 16, 4, 1):
        if found + step > end:
            continue
        pattern = one * step
        # Bytes are compared at once, views one by one.
        while found + step <= end and bytes(view[found * size : (found + step) * size]) == pattern:
            found += step
    return found - at


class Slice(Cached):
    """A piece of an L2 table. `entries`: native integers; `pins`: requests that rely on this very object."""

    __slots__ = ("entries", "key", "pins")

    def __init__(self, key: int, entries: array[int]) -> None:
        super().__init__()
        self.key = key
        self.entries = entries
        self.pins = 0


class L2Tables:
    """The active L1 table and the L2 slices that are in memory.

    A slice is found under its key: the guest offset shifted right by `slice_shift`. `words` is the number of 64-bit
    words in an entry (2 with subclusters).
    """

    def __init__(self, image: Image, slice_bytes: int, cache_bytes: int) -> None:
        header = image.header
        self.image = image
        self.words = 2 if header.incompatible & headers.INCOMPAT_EXTENDED_L2 else 1
        self.slices: dict[int, Slice] = {}
        self.set_slice_bytes(slice_bytes)
        self.max_slices = max(2, cache_bytes // slice_bytes)
        self.l1 = array("Q")
        self.dirty: set[Slice] = set()
        #: L1 entries that are not on disk yet.
        self.l1_dirty: set[int] = set()
        #: L1 indices whose L2 table is not on disk yet: what is not cached of it is all zero.
        self.unwritten: set[int] = set()
        #: Counts how often the tables on disk were changed other than through this cache.
        self._epoch = 0
        self._loading: dict[int, asyncio.Future[None]] = {}
        self._making: dict[int, asyncio.Future[None]] = {}

    def set_slice_bytes(self, slice_bytes: int) -> None:
        """Cache L2 tables in pieces of this size. Everything that was cached must be on disk, and is forgotten."""
        entry_bits = 4 if self.words == 2 else 3
        bits = self.image.header.cluster_bits
        self.slice_bytes = slice_bytes
        self.slice_bits = slice_bytes.bit_length() - 1 - entry_bits
        self.slice_entries = 1 << self.slice_bits
        self.table_bits = bits - entry_bits
        #: Slices in a table, as bits of a key.
        self.key_bits = self.table_bits - self.slice_bits
        self.slice_shift = bits + self.slice_bits
        self.slices.clear()

    async def read_l1(self) -> None:
        """Read the active L1 table. Raises OSError."""
        header = self.image.header
        data = await self.image.file.pread(header.l1_offset, header.l1_size * 8)
        self.l1 = array("Q", bytes(data))
        self.l1.byteswap()

    def table_offset(self, l1_index: int) -> int:
        """The host offset of an L2 table, 0 if there is none. Raises OSError."""
        if l1_index >= len(self.l1):
            return 0
        offset = self.l1[l1_index] & OFFSET_MASK
        if offset & self.image.cluster_mask:
            raise self.image.corrupt(f"L2 table offset {offset:#x} unaligned (L1 index: {headers.hexed(l1_index)})")
        return offset

    def next_table(self, index: int, end: int) -> int:
        """The first L1 index in ``[index, end)`` that has an L2 table, or `end`."""
        l1 = self.l1
        end = min(end, len(l1))
        while index < end:
            step = min(end - index, 1024)
            if any(l1[index : index + step]):
                while not l1[index] & OFFSET_MASK:
                    index += 1
                    if index == end:
                        return end
                return index
            index += step
        return max(index, end)

    def slice_offset(self, key: int) -> int:
        """The host offset of the slice `key`, whose table must exist."""
        offset = self.l1[key >> self.key_bits] & OFFSET_MASK
        return offset + (key & ((1 << self.key_bits) - 1)) * self.slice_bytes

    async def load(self, key: int) -> Slice | None:
        """The slice `key`, from disk if need be; None if it has no L2 table. Raises OSError."""
        while True:
            found = self.slices.get(key)
            if found is not None:
                found.used = True
                return found
            if not self.table_offset(key >> self.key_bits):
                return None
            waiting = self._loading.get(key)
            if waiting is None:
                break
            await asyncio.shield(waiting)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._loading[key] = done
        try:
            await self.make_room()
            epoch = -1
            while epoch != self._epoch:
                epoch = self._epoch
                if key >> self.key_bits in self.unwritten:
                    entries = array("Q", bytes(self.slice_bytes))
                else:
                    self.image.event("l2_load")
                    data = await self.image.file.pread(self.slice_offset(key), self.slice_bytes)
                    entries = array("Q", bytes(data))
                    entries.byteswap()
            # A table made meanwhile may have brought the slice along.
            found = self.slices.get(key)
            if found is None:
                found = self.slices[key] = Slice(key, entries)
            return found
        finally:
            del self._loading[key]
            done.set_result(None)

    async def make_room(self) -> None:
        """Evict slices until there is room for one more. Raises OSError."""
        if len(self.slices) < self.max_slices:
            return
        if len(self.dirty) * 2 > len(self.slices):
            await self.image.write_back()
        forget = self.image.forget_slice
        for _ in range(2):
            for key in list(self.slices):
                found = self.slices.get(key)
                if found is None:
                    continue
                if found.used:
                    # A second chance; it goes to the end of the queue.
                    found.used = False
                    del self.slices[key]
                    self.slices[key] = found
                elif self._evictable(found):
                    del self.slices[key]
                    forget(found)
                    if len(self.slices) < self.max_slices:
                        return

    @staticmethod
    def _evictable(found: Slice) -> bool:
        return not found.hi and not found.pins and not found.busy

    def forget_all(self) -> None:
        """Forget all slices, which must be clean, because the tables on disk were changed."""
        self._epoch += 1
        for found in self.slices.values():
            self.image.forget_slice(found)
        self.slices.clear()

    def drop_unused(self) -> None:
        """Forget clean slices that were not used since the last call (``cache-clean-interval``)."""
        for key, found in list(self.slices.items()):
            if found.used:
                found.used = False
            elif self._evictable(found):
                del self.slices[key]
                self.image.forget_slice(found)

    def drop(self, l1_index: int) -> None:
        """Forget all slices of a table that is gone."""
        first = l1_index << self.key_bits
        for key in range(first, first + (1 << self.key_bits)):
            found = self.slices.pop(key, None)
            if found is not None:
                self.dirty.discard(found)
                self.image.forget_slice(found)

    def touched(self, found: Slice, lo: int, hi: int) -> None:
        """The entries ``[lo, hi)`` of a slice were changed."""
        found.touched(lo, hi)
        self.dirty.add(found)

    async def load_for_write(self, key: int) -> Slice:
        """The slice `key` of a table that may be changed in place: a new table where there was none, a copy where a
        snapshot shares it. Raises OSError."""
        l1_index = key >> self.key_bits
        while True:
            if self.l1[l1_index] & COPIED and self.table_offset(l1_index):
                found = await self.load(key)
                if found is not None and self.l1[l1_index] & COPIED:
                    return found
                continue
            making = self._making.get(l1_index)
            if making is not None:
                await asyncio.shield(making)
                continue
            done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._making[l1_index] = done
            try:
                await self._make_table(l1_index)
            finally:
                del self._making[l1_index]
                done.set_result(None)

    def _attach(self, l1_index: int, cluster: int) -> None:
        image = self.image
        image.meta.add("active_l2", cluster)
        image.barrier = True
        self.unwritten.add(l1_index)
        self.l1[l1_index] = cluster << image.header.cluster_bits | COPIED
        self.l1_dirty.add(l1_index)
        if self.key_bits == 0:
            self.slices[l1_index] = Slice(l1_index, array("Q", bytes(self.slice_bytes)))

    async def _make_table(self, l1_index: int) -> None:
        image = self.image
        old = self.table_offset(l1_index)
        await self.make_room()
        cluster, _ = await image.refcounts.allocate(1, what="L2 table")
        if not old:
            try:
                # So that a full disk is noticed now, by the request that needs the table, and not by a flush later.
                image.event("l2_alloc_write")
                await image.file.pwrite(cluster << image.header.cluster_bits, bytes(image.cluster_size))
            except BaseException:
                image.refcounts.release(cluster, 1)
                raise
            self._attach(l1_index, cluster)
            return
        # The new table is the old one with every slice in memory, so that all of it is written.
        image.event("l2_alloc_cow_read")
        first = l1_index << self.key_bits
        loaded: list[Slice] = []
        try:
            for key in range(first, first + (1 << self.key_bits)):
                found = await self.load(key)
                assert found is not None
                found.pins += 1
                loaded.append(found)
            image.meta.remove("active_l2", old >> image.header.cluster_bits)
            image.meta.add("active_l2", cluster)
            image.barrier = True
            for found in loaded:
                self.touched(found, 0, self.slice_entries)
            self.l1[l1_index] = cluster << image.header.cluster_bits | COPIED
            self.l1_dirty.add(l1_index)
            image.free_later(old >> image.header.cluster_bits, 1, "other")
        except OSError:
            image.refcounts.release(cluster, 1)
            raise
        finally:
            for found in loaded:
                found.pins -= 1
