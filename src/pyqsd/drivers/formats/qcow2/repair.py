"""Making the refcounts of a dirty image right again.

Source: QEMU docs/interop/qcow2: an image with the dirty bit may have wrong refcounts, and must not be written to before
they are repaired from the L1 and L2 tables. Everything that refers to clusters is read and counted, the flags for
"refcount is exactly one" are corrected, and a new refcount table with new blocks is written behind the end of the file.
One write of the header then makes it the valid one, so that a crash leaves the image dirty, but no worse.
"""

from __future__ import annotations

import asyncio
import errno
from array import array
from typing import TYPE_CHECKING

from pyqsd.drivers.formats.qcow2 import compression, opening
from pyqsd.drivers.formats.qcow2 import header as headers
from pyqsd.drivers.formats.qcow2.refcounts import new_counts
from pyqsd.drivers.formats.qcow2.tables import COMPRESSED, COPIED, OFFSET_MASK

if TYPE_CHECKING:
    from pyqsd.drivers.formats.qcow2.image import Image

_CHUNK_BITS = 12
#: Counters take four bytes; a hostile image must not make us take more memory than this.
_MOST_CHUNKS = (512 << 20) >> (_CHUNK_BITS + 2)


class _References:
    """How often each cluster of the file is referred to. Only the parts with references take memory."""

    def __init__(self, image: Image) -> None:
        self.bits = image.cluster_bits
        self.maximum = image.refcounts.maximum
        #: Clusters in the file.
        self.clusters = (image.file.length + image.cluster_mask) >> self.bits
        self.chunks: dict[int, array[int]] = {}

    def add(self, offset: int, length: int) -> None:
        """A structure or a data cluster at `offset`. Raises OSError if that cannot be."""
        if not length:
            return
        first = offset >> self.bits
        last = (offset + length - 1) >> self.bits
        if last > self.clusters:
            # One cluster beyond the end may be what a crash left behind.
            raise OSError(errno.EIO, f"Offset {offset:#x} is beyond the end of the image file")
        for cluster in range(first, last + 1):
            chunk = self.chunks.get(cluster >> _CHUNK_BITS)
            if chunk is None:
                if len(self.chunks) >= _MOST_CHUNKS:
                    raise OSError(errno.ENOMEM, "The image is too large to be repaired")
                chunk = self.chunks[cluster >> _CHUNK_BITS] = array("I", bytes(4 << _CHUNK_BITS))
            index = cluster & ((1 << _CHUNK_BITS) - 1)
            if chunk[index] >= self.maximum:
                raise OSError(errno.EINVAL, "A refcount is too large for the refcount width")
            chunk[index] += 1

    def get(self, cluster: int) -> int:
        chunk = self.chunks.get(cluster >> _CHUNK_BITS)
        return 0 if chunk is None else chunk[cluster & ((1 << _CHUNK_BITS) - 1)]

    def used(self) -> list[int]:
        """All clusters with references."""
        return [
            (number << _CHUNK_BITS) + index
            for number in sorted(self.chunks)
            for index, count in enumerate(self.chunks[number])
            if count
        ]


async def rebuild_refcounts(image: Image) -> None:
    """Repair the refcounts and clear the dirty bit. Raises OSError when the image has worse errors than that."""
    references = await _count(image)
    await _correct_flags(image, references)
    # What readers have in memory has the old flags.
    image.l2.forget_all()
    await _write_new(image, references)
    await image.mark_clean()


async def _count(image: Image) -> _References:
    """Count all references but those of the refcount structures themselves."""
    header = image.header
    references = _References(image)
    references.add(0, image.cluster_size)
    references.add(header.l1_offset, header.l1_size * 8)
    await _count_l1(image, references, image.l2.l1)
    for one in image.snapshots:
        if one.l1_offset & image.cluster_mask or one.l1_size > headers.MAX_L1_BYTES // 8:
            raise OSError(errno.EINVAL, "A snapshot's L1 table is invalid")
        references.add(one.l1_offset, one.l1_size * 8)
        await _count_l1(image, references, await opening.read_table(image.file, one.l1_offset, one.l1_size))
    if image.snapshots:
        references.add(header.snapshots_offset, await opening.snapshot_table_bytes(image))
    if header.bitmaps is not None:
        await _count_bitmaps(image, references)
    return references


async def _count_l1(image: Image, references: _References, l1: array[int]) -> None:
    size, bits = image.cluster_size, image.cluster_bits
    for entry in l1:
        offset = entry & OFFSET_MASK
        if not offset:
            continue
        if offset & image.cluster_mask:
            raise OSError(errno.EIO, f"L2 table offset {offset:#x} unaligned")
        references.add(offset, size)
        # With subclusters every second word is a bitmap.
        for value in (await opening.read_table(image.file, offset, size >> 3))[:: image.l2.words]:
            if value & COMPRESSED:
                first, count = compression.clusters(value, bits)
                references.add(first << bits, count << bits)
            elif value & OFFSET_MASK:
                if value & OFFSET_MASK & image.cluster_mask:
                    raise OSError(errno.EIO, "A data cluster is not aligned")
                references.add(value & OFFSET_MASK, size)
        # Other requests must have their turn.
        await asyncio.sleep(0)


async def _count_bitmaps(image: Image, references: _References) -> None:
    """The bitmaps' directory, tables and data (QEMU docs/interop/qcow2, section "Bitmaps")."""
    directory = image.header.bitmaps
    assert directory is not None
    references.add(directory.directory_offset, directory.directory_size)
    data = bytes(await image.file.pread(directory.directory_offset, directory.directory_size))
    at = 0
    while at + 24 <= len(data):
        offset = int.from_bytes(data[at : at + 8], "big")
        entries = int.from_bytes(data[at + 8 : at + 12], "big")
        name_size = int.from_bytes(data[at + 18 : at + 20], "big")
        extra = int.from_bytes(data[at + 20 : at + 24], "big")
        if offset & image.cluster_mask or entries > 0x8000000:
            raise OSError(errno.EIO, "A bitmap's table is invalid")
        references.add(offset, entries * 8)
        for entry in await opening.read_table(image.file, offset, entries):
            if entry & OFFSET_MASK:
                references.add(entry & OFFSET_MASK, image.cluster_size)
        at += -(-(24 + extra + name_size) // 8) * 8


async def _correct_flags(image: Image, references: _References) -> None:
    """Set or clear "refcount is exactly one" in the active tables: a set flag on a shared cluster would let a write
    change a snapshot; a missing one only costs a copy."""
    l2, bits = image.l2, image.cluster_bits
    for index, entry in enumerate(l2.l1):
        offset = entry & OFFSET_MASK
        if not offset:
            continue
        right = offset | (COPIED if references.get(offset >> bits) == 1 else 0)
        if right != entry:
            l2.l1[index] = right
            await image.file.pwrite(image.header.l1_offset + index * 8, right.to_bytes(8, "big"))
        table = await opening.read_table(image.file, offset, image.cluster_size >> 3)
        changed = False
        for position in range(0, len(table), l2.words):
            value = table[position]
            if value & COMPRESSED:
                new = value & ~COPIED
            elif value & OFFSET_MASK:
                alone = references.get((value & OFFSET_MASK) >> bits) == 1
                new = value | COPIED if alone else value & ~COPIED
            else:
                continue
            if new != value:
                table[position] = new
                changed = True
        if changed:
            table.byteswap()
            await image.file.pwrite(offset, table.tobytes())
        await asyncio.sleep(0)


async def _write_new(image: Image, references: _References) -> None:
    """Write new refcount blocks and a new table behind the end of the file, and switch over to them."""
    refcounts, bits, size = image.refcounts, image.cluster_bits, image.cluster_size
    block_bits = refcounts.block_bits
    used = references.used()
    start = max(references.clusters, used[-1] + 1)
    regions = {cluster >> block_bits for cluster in used}
    while True:
        table_clusters = -(-(max(regions) + 1) * 8 // size)
        end = start + len(regions) + table_clusters
        more = regions | set(range(start >> block_bits, ((end - 1) >> block_bits) + 1))
        if more == regions:
            break
        regions = more
    if table_clusters << bits > headers.MAX_REFTABLE_BYTES:
        raise OSError(errno.EFBIG, "The refcount table would be too large")
    table = array("Q", bytes(table_clusters << bits))
    place = {index: start + number for number, index in enumerate(sorted(regions))}
    by_region: dict[int, list[int]] = {}
    for cluster in used:
        by_region.setdefault(cluster >> block_bits, []).append(cluster)
    for index, where in place.items():
        counts = new_counts(refcounts.order, refcounts.block_entries)
        base = index << block_bits
        for cluster in by_region.get(index, ()):
            counts.set(cluster - base, references.get(cluster))
        lo, hi = max(start, base), min(end, base + refcounts.block_entries)
        if lo < hi:
            counts.set_ones(lo - base, hi - base)
        table[index] = where << bits
        await image.file.pwrite(where << bits, counts.encode(0, refcounts.block_entries))
        await asyncio.sleep(0)
    first_table = start + len(regions)
    on_disk = array("Q", table)
    on_disk.byteswap()
    await image.file.pwrite(first_table << bits, on_disk.tobytes())
    await image.file.flush()
    async with image.header_lock:
        at, data = headers.reftable_fields(first_table << bits, table_clusters)
        await image.file.pwrite(at, data)
        await image.file.flush()
        image.header.reftable_offset, image.header.reftable_clusters = first_table << bits, table_clusters
    refcounts.replace(table)
    image.touched_end = max(image.touched_end, end << bits, image.file.length)
    image.meta = await opening.metadata_map(image, image.settings.overlap)
