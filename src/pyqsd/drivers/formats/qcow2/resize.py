"""Resizing an image: growing, with or without preallocation, and shrinking.

Source: QEMU docs/interop/qcow2, sections "Header", "Cluster mapping". Errors have QSD's words. Sizes are bytes.
"""

from __future__ import annotations

import errno
from array import array
from typing import TYPE_CHECKING

from pyqsd.block.extents import DATA
from pyqsd.drivers.formats.qcow2 import header as headers
from pyqsd.drivers.formats.qcow2.tables import ALL_ALLOCATED, ALL_ZERO, COPIED, OFFSET_MASK, ZERO
from pyqsd.qapi.errors import Error, from_oserror

if TYPE_CHECKING:
    from pyqsd.drivers.formats.qcow2.image import Image
    from pyqsd.drivers.formats.qcow2.tables import Slice
    from pyqsd.drivers.formats.qcow2.unmap import Unmapper
    from pyqsd.drivers.formats.qcow2.write import Writer

_SECTOR = 512


async def truncate(
    image: Image, writer: Writer, unmapper: Unmapper, length: int, exact: bool, preallocation: str, zero_new: bool
) -> None:
    """Resize the disk to `length`, and a data file with it; `exact`: that is not to be larger either. `preallocation`:
    off, metadata, falloc, full. Raises Error."""
    header = image.header
    if length % _SECTOR:
        raise Error(f"The new size must be a multiple of {_SECTOR}", errno.EINVAL)
    if header.nb_snapshots and header.version < 3:
        raise Error("Can't resize a v2 image which has snapshots", errno.ENOTSUP)
    old = header.size & ~(_SECTOR - 1)
    if length < old:
        if preallocation != "off":
            raise Error("Preallocation can't be used for shrinking an image", errno.EINVAL)
        await _shrink(image, unmapper, old, length, exact)
        return
    if image.raw_data and preallocation == "off":
        # All that is in the data file is on the disk.
        preallocation = "metadata"
    entries = headers.l1_entries_for(header, length)
    if entries > headers.MAX_L1_BYTES // 8:
        raise _prefixed("Failed to grow the L1 table", OSError(errno.EFBIG, ""))
    if entries > header.l1_size:
        try:
            await _grow_l1(image, entries)
        except OSError as exc:
            raise _prefixed("Failed to grow the L1 table", exc) from exc
    if old & image.cluster_mask and length > old:
        await _clear_tail(image, writer, old, min(length, (old + image.cluster_mask) & ~image.cluster_mask))
    if image.external:
        await _grow_data_file(image, old, length, exact, preallocation)
        if zero_new and length > old:
            await _zero_new(image, writer, unmapper, old, length)
    elif preallocation != "off" and length > old:
        await _preallocate(image, writer, old, length, preallocation)
    elif zero_new and length > old:
        await _zero_new(image, writer, unmapper, old, length)
    try:
        if preallocation != "off":
            await image.write_back()
        await _write_size(image, length)
    except OSError as exc:
        raise _prefixed("Failed to update the image size", exc) from exc


def _prefixed(text: str, exc: OSError) -> Error:
    return from_oserror(exc, text)


async def _write_size(image: Image, length: int) -> None:
    async with image.header_lock:
        at, data = headers.size_field(length)
        await image.file.pwrite(at, data)
        image.header.size = length
        await image.file.flush()


async def _grow_l1(image: Image, entries: int) -> None:
    """Give the L1 table a new and larger place. Raises OSError."""
    header, l2, bits = image.header, image.l2, image.cluster_bits
    # Some room for further growth.
    wanted = min(max(entries, header.l1_size * 3 // 2, 1), headers.MAX_L1_BYTES // 8)
    clusters = (wanted * 8 + image.cluster_mask) >> bits
    # The counts of the new clusters are on disk before the header refers to them.
    image.event("l1_grow_alloc_table")
    first, _ = await image.refcounts.allocate(clusters, contiguous=True)
    await image.writeback.run(refcounts=True)
    old, old_clusters = header.l1_offset >> bits, (header.l1_size * 8 + image.cluster_mask) >> bits
    # What is on disk moves: entries in memory may refer to L2 tables that are not there yet, and follow in their turn.
    # No entry goes to the old place after it has been copied.
    async with image.writeback.lock:
        whole = bytes(await image.file.pread(header.l1_offset, header.l1_size * 8)) if header.l1_size else b""
        image.event("l1_grow_write_table")
        await image.file.pwrite(first << bits, whole + bytes((clusters << bits) - len(whole)))
        await image.file.flush()
        async with image.header_lock:
            at, fields = headers.l1_fields(wanted, first << bits)
            image.event("l1_grow_activate_table")
            await image.file.pwrite(at, fields)
            await image.file.flush()
            header.l1_offset, header.l1_size = first << bits, wanted
        # Requests go on meanwhile: as the table is in memory now, without waiting.
        table = array("Q", l2.l1)
        table.extend(array("Q", bytes(8 * (wanted - len(table)))))
        l2.l1 = table
    image.meta.remove("active_l1", old, old_clusters)
    image.meta.add("active_l1", first, clusters)
    if old_clusters:
        image.free_later(old, old_clusters, "other")


async def _zero_new(image: Image, writer: Writer, unmapper: Unmapper, old: int, length: int) -> None:
    """Hide what the backing file has where the disk grows."""
    start = min((old + image.cluster_mask) & ~image.cluster_mask, length)
    try:
        if start < length:
            end = (length + image.cluster_mask) & ~image.cluster_mask
            if image.header.version >= 3:
                await unmapper.zero(start, end - start, 0)
            elif image.backing is not None:
                # Version 2 can only say so with data.
                await write_zeroes(writer, start, length)
    except OSError as exc:
        raise _prefixed("Failed to zero out new clusters", exc) from exc
    try:
        if old < start:
            await write_zeroes(writer, old, start)
    except OSError as exc:
        raise _prefixed("Failed to zero out the new area", exc) from exc


async def _clear_tail(image: Image, writer: Writer, start: int, end: int) -> None:
    """The last cluster may still hold what was there before the disk was made smaller."""
    try:
        _, flags, _, _ = await image.node.driver.load_map(start, 1)
        if flags & DATA:
            await write_zeroes(writer, start, end)
    except OSError as exc:
        raise _prefixed("Failed to zero out the new area", exc) from exc


async def write_zeroes(writer: Writer, start: int, end: int) -> None:
    """Make the range ordinary clusters full of zeroes. Raises OSError."""
    from pyqsd.block import iov as iovs

    while start < end:
        n = min(end - start, 1 << 20)
        await writer.pwritev(start, n, iovs.zero_views(n))
        start += n


async def _preallocate(image: Image, writer: Writer, old: int, length: int, mode: str) -> None:
    """Allocate clusters for ``[old, length)``: in the tables only, or with their space in the file too."""
    bits, l2 = image.cluster_bits, image.l2
    at = (old + image.cluster_mask) >> bits
    stop = (length + image.cluster_mask) >> bits
    text = "Could not preallocate new data" if mode == "metadata" else "Failed to allocate data clusters"
    if image.reserved:
        # What was reserved must get its space too.
        await image.cut_tail()
    while at < stop:
        try:
            found = await l2.load_for_write(at << bits >> l2.slice_shift)
            index = at & (l2.slice_entries - 1)
            count = min(stop - at, l2.slice_entries - index)
            entries = found.entries[:: l2.words]
            if entries[index] & OFFSET_MASK or (image.encrypted and image.header.version < 3):
                # Left over beyond the old end; it must read as zeroes now. Or what is new in the file would not do so
                # once it is decrypted, and version 2 has no other way to say that it shall.
                await write_zeroes(writer, at << bits, (at + 1) << bits)
                at += 1
                continue
            taken = next((n for n in range(count) if entries[index + n] & OFFSET_MASK), count)
            # Beyond the end of the file, where everything reads as zeroes.
            floor = (max(image.file.length, image.touched_end) + image.cluster_mask) >> bits
            found.pins += 1
            try:
                first, got = await image.refcounts.allocate(taken, floor=floor)
            finally:
                found.pins -= 1
        except OSError as exc:
            raise _prefixed(text, exc) from exc
        end = (first + got) << bits
        image.touched_end = max(image.touched_end, end)
        try:
            if end > image.file.length:
                await image.file.truncate(end, preallocation="off" if mode == "metadata" else mode)
        except (OSError, Error) as exc:
            image.refcounts.release(first, got)
            error = from_oserror(exc, "Failed to resize underlying file") if isinstance(exc, OSError) else exc
            if error is exc:
                error = exc.prefixed("Failed to resize underlying file: ")
            raise error from exc
        found = await l2.load_for_write(at << bits >> l2.slice_shift)
        _refer(image, found, index, first, got)
        at += got


def _refer(image: Image, found: Slice, index: int, first: int, count: int) -> None:
    """Make `count` L2 entries from `index` on refer to the new clusters `first` and those behind it. They read as
    zeroes; those of the file are none once they are decrypted, so that the entries have to say it then."""
    l2 = image.l2
    flags, bitmap = COPIED, ALL_ALLOCATED
    if image.encrypted:
        flags, bitmap = (COPIED if image.extended else COPIED | ZERO), ALL_ZERO
    for position in range(count):
        found.entries[(index + position) * l2.words] = (first + position) << image.cluster_bits | flags
        if l2.words == 2:
            found.entries[(index + position) * 2 + 1] = bitmap
    l2.touched(found, index, index + count)
    image.barrier = True


async def _grow_data_file(image: Image, old: int, length: int, exact: bool, mode: str) -> None:
    """Make the data file as long as the disk, and with preallocation make ``[old, length)`` refer to it."""
    bits, l2 = image.cluster_bits, image.l2
    at = (old + image.cluster_mask) >> bits
    stop = (length + image.cluster_mask) >> bits
    if mode == "off" or at >= stop:
        await image.data.truncate(length, exact=exact)
        return
    if stop << bits > image.data.length:
        try:
            await image.data.truncate(stop << bits, preallocation="off" if mode == "metadata" else mode)
        except OSError as exc:
            raise _prefixed("Could not resize data file", exc) from exc
    while at < stop:
        try:
            found = await l2.load_for_write(at << bits >> l2.slice_shift)
        except OSError as exc:
            raise _prefixed("Could not preallocate new data", exc) from exc
        index = at & (l2.slice_entries - 1)
        count = min(stop - at, l2.slice_entries - index)
        _refer(image, found, index, at, count)
        at += count


async def _shrink(image: Image, unmapper: Unmapper, old: int, length: int, exact: bool) -> None:
    header, l2, bits = image.header, image.l2, image.cluster_bits
    start = (length + image.cluster_mask) & ~image.cluster_mask
    end = (old + image.cluster_mask) & ~image.cluster_mask
    try:
        if start < end:
            await unmapper.discard(start, end - start, "other", True)
    except OSError as exc:
        raise _prefixed("Failed to discard cropped clusters", exc) from exc
    try:
        await image.writeback.run(refcounts=True)
        first = headers.l1_entries_for(header, length)
        last = min(headers.l1_entries_for(header, old), len(l2.l1))
        for index in range(first, last):
            offset = l2.table_offset(index)
            if not offset:
                continue
            l2.drop(index)
            l2.l1[index] = 0
            l2.l1_dirty.add(index)
            image.meta.remove("active_l2", offset >> bits)
            image.free_later(offset >> bits, 1, "other")
        image.event("l1_shrink_write_table")
        await image.writeback.run(refcounts=True)
    except OSError as exc:
        raise _prefixed("Failed to reduce the number of L2 tables", exc) from exc
    if image.external:
        # Nothing on disk refers to what is cut off.
        await image.data.truncate(length, exact=exact)
    try:
        await _write_size(image, length)
    except OSError as exc:
        raise _prefixed("Failed to update the image size", exc) from exc
    image.kept_length = 0
    await image.cut_tail()
    image.kept_length = image.file.length
