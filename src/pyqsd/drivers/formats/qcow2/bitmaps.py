"""Dirty bitmaps that live in the image: loading, storing, removing.

Source: QEMU docs/interop/qcow2, section "Bitmaps". Errors have QSD's words.

While an image is open for writing its bitmaps are marked on disk as in use, before anything can change them: what is
there then is out of date, and whoever finds them so after a crash must not use them. They are stored when the node is
closed, inactivated or becomes read-only. What must be on disk before what: the counts of the new clusters, the bits,
the bitmap tables and the new directory before the header that refers to the latter; that before any old cluster is
freed.
"""

from __future__ import annotations

import errno
from array import array
from dataclasses import replace
from typing import TYPE_CHECKING

from pyqsd.block.dirty_bitmap import DirtyBitmap
from pyqsd.drivers.formats.qcow2 import bitmap_format as fmt
from pyqsd.drivers.formats.qcow2 import header as headers
from pyqsd.drivers.formats.qcow2.header import BitmapsExtension
from pyqsd.qapi.errors import Error, from_oserror

if TYPE_CHECKING:
    from pyqsd.block.node import Node
    from pyqsd.drivers.formats.qcow2.bitmap_format import StoredBitmap
    from pyqsd.drivers.formats.qcow2.image import Image

#: Bytes of bitmap data that are read or written at once.
_PIECE = 4 << 20


# --- loading ----------------------------------------------------------------------------------------------------------


async def load(image: Image, node: Node) -> None:
    """Make bitmaps of `node` of those in the image, which are marked as in use if the node is writable. Raises Error,
    and then the node has none of them."""
    loaded: dict[str, DirtyBitmap] = {}
    budget = _Budget(image)
    writable = not node.read_only and node.active
    for one in image.bitmaps:
        name = headers.shown(one.name)
        if name in loaded or name in node.dirty_bitmaps:
            raise Error(f"Bitmap already exists: {name}", errno.EINVAL)
        bitmap = DirtyBitmap(name, node.driver.length(), 1 << one.granularity_bits, persistent=True, enabled=one.auto)
        bitmap.readonly = not writable
        if one.in_use:
            bitmap.inconsistent = True
            bitmap.enabled = False
        else:
            await _read(image, one, bitmap, budget)
        loaded[name] = bitmap
    if writable:
        await mark_in_use(image)
    for bitmap in loaded.values():
        node.dirty_bitmaps.add(bitmap)


class _Budget:
    """A sound image refers to each of its clusters once. Bitmaps that claim to have more than there are would take any
    amount of memory and time."""

    def __init__(self, image: Image) -> None:
        self.left = (image.file.length >> image.cluster_bits) + 2

    def take(self, clusters: int) -> None:
        self.left -= clusters
        if self.left < 0:
            raise OSError(errno.EINVAL, "Bitmaps refer to more clusters than there are")


async def _read(image: Image, one: StoredBitmap, bitmap: DirtyBitmap, budget: _Budget) -> None:
    name = bitmap.name
    size, bits = image.cluster_size, image.cluster_bits
    try:
        budget.take((one.table_entries * 8 + image.cluster_mask) >> bits)
        table = fmt.decode_table(await image.file.pread(one.table_offset, one.table_entries * 8), size)
    except OSError as exc:
        raise from_oserror(exc, f"Could not read bitmap_table table from image for bitmap '{name}'") from exc
    try:
        if one.table_entries != fmt.data_clusters(bitmap.size, one.granularity_bits, size):
            raise OSError(errno.EINVAL, "The table has another size than the disk")
        # What the bits in one cluster stand for.
        covered = size * 8 << one.granularity_bits
        at = 0
        while at < len(table):
            entry = table[at]
            end = at + 1
            if entry & ~fmt.ALL_ONES:
                while end < len(table) and table[end] == table[end - 1] + size and (end - at) < _PIECE // size:
                    end += 1
                budget.take(end - at)
                bitmap.deserialize(at * covered, await image.file.pread(entry, (end - at) << bits))
            elif entry:
                bitmap.mark(at * covered, min(covered, bitmap.size - at * covered))
            at = end
    except OSError as exc:
        raise from_oserror(exc, f"Could not read bitmap '{name}' from image") from exc


# --- the directory ----------------------------------------------------------------------------------------------------


async def mark_in_use(image: Image) -> None:
    """Say on disk that what is there of the bitmaps is out of date. Raises Error."""
    directory = image.header.bitmaps
    marked = [replace(one, flags=one.flags | fmt.FLAG_IN_USE) for one in image.bitmaps]
    if directory is None or marked == image.bitmaps:
        return
    try:
        data = fmt.encode_directory(marked)
        if len(data) != directory.directory_size:
            # A name that ends within itself.
            raise OSError(errno.EINVAL, "The directory cannot be written as it is")
        # This is the first write to the image.
        await image.clear_autoclear()
        # In place: whichever part of the flags reaches the disk, no bitmap has been changed before all of them.
        await image.file.pwrite(directory.directory_offset, data)
        await image.file.flush()
    except OSError as exc:
        raise from_oserror(exc, "Can't update bitmap directory") from exc
    image.bitmaps = marked


async def switch(image: Image, directory: list[StoredBitmap], above: int | None = None) -> None:
    """Write a directory to a new place and make it the valid one. `above`: the first cluster that may be used for it,
    where the clusters of the old one, which may be anything, are left as they are. Raises OSError, Error."""
    header, bits = image.header, image.cluster_bits
    old = header.bitmaps
    first = clusters = 0
    data = fmt.encode_directory(directory)
    if directory:
        clusters = (len(data) + image.cluster_mask) >> bits
        first, _ = await image.refcounts.allocate(clusters, contiguous=True, floor=above or 0)
    try:
        if directory:
            await image.file.pwrite(first << bits, data.ljust(clusters << bits, b"\0"))
        await image.writeback.run(refcounts=True)
        await image.file.flush()
        if directory:
            extension = BitmapsExtension(len(directory), len(data), first << bits)
            await image.rewrite_header(bitmaps=extension, autoclear=header.autoclear | headers.AUTOCLEAR_BITMAPS)
        else:
            await image.rewrite_header(bitmaps=None, autoclear=header.autoclear & ~headers.AUTOCLEAR_BITMAPS)
    except BaseException:
        if clusters and not image.broken:
            image.refcounts.release(first, clusters)
        raise
    if clusters:
        image.meta.add("bitmap_directory", first, clusters)
    if old is not None and above is None:
        old_first = old.directory_offset >> bits
        old_clusters = (old.directory_size + image.cluster_mask) >> bits
        image.meta.remove("bitmap_directory", old_first, old_clusters)
        if old_clusters:
            image.free_later(old_first, old_clusters, "other")
    image.bitmaps = directory


async def _tables_of(image: Image, gone: list[StoredBitmap]) -> list[tuple[int, int]]:
    """The clusters that these bitmaps have, as (first, count). Those of a table that makes no sense leak."""
    bits = image.cluster_bits
    runs = []
    for one in gone:
        try:
            data = await image.file.pread(one.table_offset, one.table_entries * 8)
            table = fmt.decode_table(data, image.cluster_size)
        except OSError:
            continue
        runs.append((one.table_offset >> bits, (one.table_entries * 8 + image.cluster_mask) >> bits))
        runs += [(entry >> bits, 1) for entry in table if entry & ~fmt.ALL_ONES]
    return runs


# --- removing and adding ----------------------------------------------------------------------------------------------


async def remove(image: Image, name: str, gone: list[tuple[int, StoredBitmap]]) -> None:
    """Remove a bitmap from the image, if it is there; where it was and what it was is added to `gone`. Raises Error."""
    found = [(index, one) for index, one in enumerate(image.bitmaps) if headers.shown(one.name) == name]
    if not found:
        return
    try:
        runs = await _tables_of(image, [one for _, one in found])
        left = list(image.bitmaps)
        for index, _ in reversed(found):
            del left[index]
        await switch(image, left)
        gone += found
        for first, count in runs:
            image.free_later(first, count, "other")
        await image.writeback.run(refcounts=True)
    except OSError as exc:
        raise from_oserror(exc, "Failed to update bitmap extension") from exc


async def restore(image: Image, gone: list[tuple[int, StoredBitmap]]) -> None:
    """Put bitmaps back into the image that were removed from it. As they were, their content is out of date: what is
    right is in memory, and is stored in the end. Raises Error."""
    bits = image.cluster_bits
    directory = list(image.bitmaps)
    written: list[int] = []
    try:
        for index, one in gone:
            # A table of the least size, without bits.
            cluster, _ = await image.refcounts.allocate(1)
            written.append(cluster)
            await image.file.pwrite(cluster << bits, bytes(image.cluster_size))
            empty = replace(one, table_offset=cluster << bits, table_entries=1, flags=one.flags | fmt.FLAG_IN_USE)
            directory.insert(index, empty)
        await switch(image, directory)
    except OSError as exc:
        raise from_oserror(exc, "Failed to update bitmap extension") from exc
    finally:
        if image.bitmaps is not directory and not image.broken:
            for cluster in written:
                image.refcounts.release(cluster, 1)


def check_new(image: Image, node: Node, name: str, granularity: int) -> None:
    """Whether one more bitmap can be stored; granularity in bytes. Raises Error if not."""

    def refused(text: str) -> Error:
        return Error(f"Can't make bitmap '{name}' persistent in '{node.name}': {text}", errno.EINVAL)

    if image.header.version < 3:
        raise refused("Cannot store dirty bitmaps in qcow2 v2 files")
    if len(name.encode()) > fmt.MAX_NAME_BYTES:
        raise refused(f"Name length exceeds maximum ({fmt.MAX_NAME_BYTES} characters)")
    bits = granularity.bit_length() - 1
    if bits > fmt.MAX_GRANULARITY_BITS:
        raise refused(f"Granularity exceeds maximum ({1 << fmt.MAX_GRANULARITY_BITS} bytes)")
    entries = fmt.data_clusters(node.length, bits, image.cluster_size)
    if entries > fmt.MAX_TABLE_ENTRIES or entries << image.cluster_bits > fmt.MAX_DATA_BYTES:
        raise refused("Too much space will be occupied by the bitmap. Use larger granularity")
    names = {one.name for one in image.bitmaps}
    names |= {one.name for one in node.dirty_bitmaps.values() if one.persistent}
    if name in names:
        # The node says so in its own words.
        return
    if len(names) >= fmt.MAX_BITMAPS:
        raise refused("Maximum number of persistent bitmaps is already reached")
    if sum(fmt.entry_bytes(other) for other in names) + fmt.entry_bytes(name) > fmt.MAX_DIRECTORY_BYTES:
        raise refused("Not enough space in the bitmap directory")


def check_resize(image: Image, node: Node) -> None:
    """Whether the bitmaps allow that the disk gets another size. Raises Error."""
    for one in image.bitmaps:
        bitmap = node.dirty_bitmaps.get(headers.shown(one.name))
        if bitmap is not None:
            bitmap.check()


# --- storing ----------------------------------------------------------------------------------------------------------


def storable(node: Node) -> list[DirtyBitmap]:
    """The bitmaps of a node that are to be stored in its image."""
    return [
        bitmap
        for bitmap in node.dirty_bitmaps.values()
        if bitmap.persistent and not bitmap.inconsistent and not bitmap.readonly
    ]


async def store(image: Image, node: Node) -> list[DirtyBitmap]:
    """Bring the bitmaps of `node` into the image, and return them. Raises Error, and then those in the image are marked
    as in use as before."""
    wanted = storable(node)
    if not wanted:
        return []
    left = {bitmap.name: bitmap for bitmap in wanted}
    written: list[tuple[int, int]] = []
    directory: list[StoredBitmap] = []
    replaced: list[StoredBitmap] = []
    try:
        for one in image.bitmaps:
            bitmap = left.pop(headers.shown(one.name), None)
            if bitmap is None:
                directory.append(one)
            else:
                directory.append(await _write(image, one.name, bitmap.with_successor(), written))
                replaced.append(one)
        # The newest first, as QEMU has them.
        for bitmap in reversed(left.values()):
            directory.append(await _write(image, bitmap.name, bitmap.with_successor(), written))
        try:
            gone = await _tables_of(image, replaced)
            await switch(image, directory)
        except OSError as exc:
            raise from_oserror(exc, "Failed to update bitmap extension") from exc
    except BaseException:
        if not image.broken:
            for first, count in written:
                image.refcounts.release(first, count)
        raise
    for first, count in gone:
        image.free_later(first, count, "other")
    return wanted


async def _write(image: Image, name: str, bitmap: DirtyBitmap, written: list[tuple[int, int]]) -> StoredBitmap:
    """Write the bits and the table of a bitmap to new clusters, which are added to `written`. Raises Error."""
    size, bits = image.cluster_size, image.cluster_bits
    shift = bitmap.granularity.bit_length() - 1
    covered = size * 8 << shift
    entries = fmt.data_clusters(bitmap.size, shift, size)
    table = array("Q", bytes(entries * 8))
    ones = b"\xff" * size
    try:
        position = bitmap.next_dirty(0)
        while position is not None:
            # Several clusters at once, as far as they have bits; such that are all ones need no space.
            first = at = position // covered
            pieces: list[bytes] = []
            while at < entries and len(pieces) < max(1, _PIECE // size):
                start = at * covered
                if pieces and bitmap.next_dirty(start, start + covered) is None:
                    break
                data = bitmap.serialize(start, min(covered, bitmap.size - start)).ljust(size, b"\0")
                if data == ones:
                    if pieces:
                        break
                    table[at] = fmt.ALL_ONES
                    first = at = at + 1
                    break
                pieces.append(data)
                at += 1
            done = 0
            while done < len(pieces):
                cluster, got = await image.refcounts.allocate(len(pieces) - done)
                written.append((cluster, got))
                await image.file.pwrite(cluster << bits, b"".join(pieces[done : done + got]))
                for index in range(got):
                    table[first + done + index] = (cluster + index) << bits
                done += got
            position = bitmap.next_dirty(at * covered) if at * covered < bitmap.size else None
        clusters = (entries * 8 + image.cluster_mask) >> bits
        cluster, _ = await image.refcounts.allocate(max(clusters, 1), contiguous=True)
        written.append((cluster, max(clusters, 1)))
        await image.file.pwrite(cluster << bits, fmt.encode_table(table).ljust(max(clusters, 1) << bits, b"\0"))
    except OSError as exc:
        raise from_oserror(exc, f"Failed to write bitmap '{bitmap.name}' to file") from exc
    flags = fmt.FLAG_AUTO if bitmap.enabled else 0
    return fmt.StoredBitmap(name, shift, cluster << bits, entries, flags)
