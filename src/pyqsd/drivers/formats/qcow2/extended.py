"""Images with extended L2 entries: every cluster has 32 subclusters, which are allocated one by one.

Source: QEMU docs/interop/qcow2, section "Extended L2 Entries". An entry is two words: the one that ordinary images
have, and a bitmap: bit x says that subcluster x is allocated, bit 32 + x that it reads as zeroes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyqsd.block.extents import ALLOCATED, DATA, DRIVER, OFFSET_VALID, Extent
from pyqsd.block.extents import COMPRESSED as IS_COMPRESSED
from pyqsd.block.extents import ZERO as READS_ZERO
from pyqsd.drivers.formats.qcow2.tables import ALL_ALLOCATED, COMPRESSED, COPIED, OFFSET_MASK
from pyqsd.drivers.formats.qcow2.write import ALLOCATE, IN_PLACE, REUSE, Writer

if TYPE_CHECKING:
    from pyqsd.block.node import Node
    from pyqsd.drivers.formats.qcow2.image import Image
    from pyqsd.drivers.formats.qcow2.tables import Slice

_STORED = DATA | ALLOCATED | OFFSET_VALID


def touched(image: Image, offset: int, end: int) -> int:
    """The subclusters that ``[offset, end)``, which lies in one cluster, touches, as bits."""
    first = (offset & image.cluster_mask) >> image.unit_bits
    last = ((end - 1) & image.cluster_mask) >> image.unit_bits
    return (2 << last) - (1 << first)


def is_valid(image: Image, entry: int, bitmap: int) -> bool:
    """Whether a bitmap makes sense: nothing is both allocated and zero, or allocated without a place."""
    allocated = bitmap & ALL_ALLOCATED
    return not allocated & bitmap >> 32 and (not allocated or bool(entry & image.place_mask))


def map_entry(image: Image, found: Slice, offset: int, length: int) -> Extent | None:
    """`Driver.map` for a slice in memory: a prefix of the range. None if the entry is invalid."""
    index = (offset >> image.cluster_bits) & (image.l2.slice_entries - 1)
    entry, bitmap = found.entries[2 * index], found.entries[2 * index + 1]
    within = offset & image.cluster_mask
    if entry & COMPRESSED:
        n = image.cluster_size - within
        while n < length and index + 1 < image.l2.slice_entries and found.entries[2 * index + 2] & COMPRESSED:
            index += 1
            n += image.cluster_size
        return (min(length, n), DATA | ALLOCATED | IS_COMPRESSED | DRIVER, None, 0)
    host = entry & OFFSET_MASK
    if host & image.cluster_mask or not is_valid(image, entry, bitmap):
        return None
    unit = within >> image.unit_bits
    kind = bitmap >> unit & 0x1_0000_0001
    following = unit + 1
    while following < 32 and bitmap >> following & 0x1_0000_0001 == kind:
        following += 1
    n = (following << image.unit_bits) - within
    if n >= length:
        n = length
    elif following == 32:
        n = min(length, n + _same_behind(image, found, index, kind, host, length - n))
    if kind == 1:
        return (n, _STORED, image.data, host + within)
    if not kind:
        return (n, 0, None, 0)
    if entry & image.place_mask:
        return (n, READS_ZERO | ALLOCATED | OFFSET_VALID, image.data, host + within)
    return (n, READS_ZERO | ALLOCATED, None, 0)


def _same_behind(image: Image, found: Slice, index: int, kind: int, host: int, length: int) -> int:
    """How many bytes behind the cluster `index` of a slice, hardly more than `length`, are of the same kind, and stored
    one behind the other if they have a place."""
    entries = found.entries
    n = 0
    while n < length and index + 1 < image.l2.slice_entries:
        index += 1
        entry, bitmap = entries[2 * index], entries[2 * index + 1]
        here = entry & OFFSET_MASK
        if entry & COMPRESSED or here & image.cluster_mask or not is_valid(image, entry, bitmap):
            break
        if kind:
            if host:
                host += image.cluster_size
            if here != host:
                break
        units = 0
        while units < 32 and bitmap >> units & 0x1_0000_0001 == kind:
            units += 1
        n += units << image.unit_bits
        if units < 32:
            break
    return n


def map_write(image: Image, found: Slice, offset: int, length: int) -> tuple[int, Node, int] | None:
    """`Driver.map_write` for a slice in memory, within one cluster."""
    index = (offset >> image.cluster_bits) & (image.l2.slice_entries - 1)
    entry, bitmap = found.entries[2 * index], found.entries[2 * index + 1]
    host = entry & OFFSET_MASK
    if entry & COMPRESSED or not entry & COPIED or not entry & image.place_mask or host & image.cluster_mask:
        return None
    within = offset & image.cluster_mask
    n = min(length, image.cluster_size - within)
    wanted = touched(image, offset, offset + n)
    if bitmap & wanted != wanted or not is_valid(image, entry, bitmap):
        return None
    if image.data_meta.hit(host >> image.cluster_bits, 1) is not None:
        return None
    return (n, image.data, host + within)


class ExtendedWriter(Writer):
    """Writes to subclusters. New ones in a cluster that is there already are filled like new clusters are; a cluster
    that is shared with a snapshot, or compressed, is copied as a whole."""

    def _plan(self, found: Slice, offset: int, length: int) -> tuple[int, int, int]:
        image = self.image
        at = (offset >> image.cluster_bits) & (image.l2.slice_entries - 1)
        end = offset + length
        most = min(
            image.l2.slice_entries,
            at + ((offset & image.cluster_mask) + length + image.cluster_mask >> image.cluster_bits),
        )
        kind, host = self._classify_part(found, at, offset, end)
        index = at + 1
        if kind == REUSE:
            return kind, host, 1
        following = host
        start = (offset & ~image.cluster_mask) + image.cluster_size
        while index < most:
            again = self._classify_part(found, index, start, end)
            following += image.cluster_size
            if again[0] != kind or (kind == IN_PLACE and again[1] != following):
                break
            index += 1
            start += image.cluster_size
        return kind, host, index - at

    def _classify_part(self, found: Slice, index: int, offset: int, end: int) -> tuple[int, int]:
        """What a write to ``[offset, end)``, or as much of it as is in the cluster, has to do."""
        image = self.image
        entry, bitmap = found.entries[2 * index], found.entries[2 * index + 1]
        if entry & COMPRESSED:
            return ALLOCATE, 0
        host = entry & OFFSET_MASK
        if host & image.cluster_mask:
            raise image.bad_entry(found, index, "Cluster allocation offset {host:#x} unaligned", host)
        if not is_valid(image, entry, bitmap):
            raise image.bad_entry(found, index, "Invalid cluster entry found")
        if image.external:
            image.check_external(found, index, entry)
        if not entry & COPIED or not entry & image.place_mask:
            return ALLOCATE, 0
        wanted = touched(image, offset, min(end, (offset | image.cluster_mask) + 1))
        return (IN_PLACE if bitmap & wanted == wanted else REUSE), host

    def _plan_now(self, found: Slice, offset: int, length: int) -> tuple[int, int] | None:
        image = self.image
        at = 2 * ((offset >> image.cluster_bits) & (image.l2.slice_entries - 1))
        entry, bitmap = found.entries[at], found.entries[at + 1]
        if not entry:
            return None if bitmap & ALL_ALLOCATED else (0, 1)
        host = entry ^ COPIED
        if host & ~OFFSET_MASK or host & image.cluster_mask or not host or bitmap & ALL_ALLOCATED & bitmap >> 32:
            return None
        return host, 1

    @staticmethod
    def _copied_whole(entry: int) -> bool:
        """Whether an entry for which a new cluster is allocated has content of its own."""
        return bool(entry & (COMPRESSED | OFFSET_MASK))

    def _edges(self, found: Slice, at: int, count: int, offset: int, length: int, allocated: bool) -> tuple[int, int]:
        image = self.image
        entries = found.entries
        end = offset + length
        mask = image.unit_size - 1
        start, stop = offset & ~mask, (end + mask) & ~mask
        if allocated:
            if self._copied_whole(entries[2 * at]):
                start = offset & ~image.cluster_mask
            if self._copied_whole(entries[2 * (at + count - 1)]):
                stop = (end + image.cluster_mask) & ~image.cluster_mask
            return start, stop
        # The subclusters at the edges may be allocated, and then what surrounds the write is there.
        bitmap = entries[2 * at + 1]
        if bitmap & touched(image, offset, offset + 1):
            start = offset
        if bitmap & touched(image, end - 1, end):
            stop = end
        return start, stop

    def _link(self, found: Slice, at: int, count: int, host: int, offset: int, length: int) -> None:
        image = self.image
        entries = found.entries
        end = offset + length
        for index in range(at, at + count):
            old, bitmap = entries[2 * index], entries[2 * index + 1]
            stop = min(end, (offset | image.cluster_mask) + 1)
            if old & COMPRESSED or old & OFFSET_MASK not in (0, host):
                bitmap = ALL_ALLOCATED
                self.drop(old, "never")
            else:
                new = touched(image, offset, stop)
                bitmap = (bitmap | new) & ~(new << 32)
            entries[2 * index] = host | COPIED
            entries[2 * index + 1] = bitmap
            host += image.cluster_size
            offset = stop
        image.l2.touched(found, at, at + count)
        image.barrier = True

    def _has_content(self, found: Slice, index: int, offset: int, length: int) -> bool:
        entry, bitmap = found.entries[2 * index], found.entries[2 * index + 1]
        if entry & COMPRESSED:
            return True
        wanted = touched(self.image, offset, offset + length)
        if bitmap & wanted:
            return True
        backing = self.image.backing
        return (
            backing is not None
            and bitmap >> 32 & wanted != wanted
            and offset < min(backing.length, self.image.node.length)
        )

    async def _old_content(self, found: Slice, index: int, offset: int, length: int) -> memoryview:
        image = self.image
        entry, bitmap = found.entries[2 * index], found.entries[2 * index + 1]
        within = offset & image.cluster_mask
        if entry & COMPRESSED:
            plain = await self.unpacked.read(entry)
            return memoryview(plain)[within : within + length]
        data = memoryview(bytearray(length))
        host = entry & OFFSET_MASK
        at = 0
        while at < length:
            unit = (within + at) >> image.unit_bits
            kind = bitmap >> unit & 0x1_0000_0001
            following = unit + 1
            while following < 32 and bitmap >> following & 0x1_0000_0001 == kind:
                following += 1
            n = min(length - at, (following << image.unit_bits) - within - at)
            if kind == 1:
                await self._fetch(host + within + at, offset + at, data[at : at + n])
            elif not kind and image.backing is not None:
                await self._read_backing(offset + at, data[at : at + n])
            at += n
        return data
