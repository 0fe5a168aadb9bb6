"""Making an image of version 3 one of version 2, which knows no zero clusters.

Source: QEMU docs/interop/qcow2, sections "Header", "Cluster mapping".

Every zero cluster, also those of internal snapshots, becomes an unallocated one where nothing shows through, and else
an ordinary cluster full of zeroes. What an entry refers to is on disk before the entry is, and what it does not refer
to any more is freed after that; the header changes last. So the image reads the same at every moment.
"""

from __future__ import annotations

import errno
from array import array
from typing import TYPE_CHECKING

from pyqsd.block import iov as iovs
from pyqsd.drivers.formats.qcow2 import header as headers
from pyqsd.drivers.formats.qcow2 import opening, resize
from pyqsd.drivers.formats.qcow2.tables import COMPRESSED, OFFSET_MASK, ZERO
from pyqsd.qapi.errors import Error

if TYPE_CHECKING:
    from pyqsd.drivers.formats.qcow2.image import Image
    from pyqsd.drivers.formats.qcow2.unmap import Unmapper
    from pyqsd.drivers.formats.qcow2.write import Writer


def check(image: Image, refcount_bits: int) -> None:
    """Raises Error if the image, which is going to have refcounts of `refcount_bits`, cannot be one of version 2."""
    header = image.header
    if refcount_bits != 16:
        raise Error("version=v2 requires refcount-bits=16", errno.ENOTSUP)
    if header.incompatible & headers.INCOMPAT_DATA_FILE:
        raise Error("Cannot downgrade an image with a data file", errno.ENOTSUP)
    if any(one.disk_size not in (None, header.size) or one.vm_state_size >> 32 for one in image.snapshots):
        raise Error("Internal snapshots prevent downgrade of image", errno.ENOTSUP)
    stored = header.bitmaps is not None and header.bitmaps.count
    # Those that were added since are stored in the end.
    if stored or any(one.persistent for one in image.node.dirty_bitmaps.values()):
        raise Error("Cannot downgrade an image with persistent bitmaps", errno.ENOTSUP)
    # The refcounts are made right, and another compression type is only named.
    rest = header.incompatible & ~(headers.INCOMPAT_DIRTY | headers.INCOMPAT_COMPRESSION)
    if rest:
        raise Error(f"Cannot downgrade an image with incompatible features {rest:#x} set", errno.ENOTSUP)


async def downgrade(image: Image, writer: Writer, unmapper: Unmapper) -> None:
    """Make it version 2; `check` has been passed and no request is in flight. Raises OSError, Error."""
    if image.header.compression_type and await _has_compressed(image):
        kind = "zstd" if image.header.compression_type == headers.COMPRESSION_ZSTD else "another"
        raise Error(
            f"Cannot downgrade an image with {kind} compression type and existing compressed clusters", errno.ENOTSUP
        )
    await _expand_active(image, writer, unmapper)
    await _settle(image)
    for one in image.snapshots:
        await _expand_inactive(image, writer, await opening.read_table(image.file, one.l1_offset, one.l1_size))
    await _settle(image)
    await image.mark_clean()
    await image.rewrite_header(
        version=2,
        incompatible=0,
        compatible=0,
        autoclear=0,
        compression_type=headers.COMPRESSION_ZLIB,
        header_length=headers.V2_HEADER_BYTES,
        unknown_fields=b"",
        bitmaps=None,
    )


async def _settle(image: Image) -> None:
    """Bring everything to disk. Raises OSError."""
    while image.writeback.needed:
        await image.writeback.run(refcounts=True)


async def _has_compressed(image: Image) -> bool:
    tables = [image.l2.l1]
    tables += [await opening.read_table(image.file, one.l1_offset, one.l1_size) for one in image.snapshots]
    for offset in {entry & OFFSET_MASK for l1 in tables for entry in l1} - {0}:
        if any(entry & COMPRESSED for entry in await opening.read_table(image.file, offset, image.cluster_size >> 3)):
            return True
    return False


def _zero(entry: int) -> bool:
    return entry & (COMPRESSED | ZERO) == ZERO


def _shows_backing(image: Image, offset: int) -> bool:
    backing = image.backing
    return backing is not None and offset < backing.length


async def _expand_active(image: Image, writer: Writer, unmapper: Unmapper) -> None:
    l2, size = image.l2, image.cluster_size
    for index in range(len(l2.l1)):
        if not l2.table_offset(index):
            continue
        for key in range(index << l2.key_bits, (index + 1) << l2.key_bits):
            found = await l2.load(key)
            if found is None or not any(map(_zero, found.entries)):
                continue
            zero = [at for at, entry in enumerate(found.entries) if _zero(entry)]
            for at in zero:
                offset = (key << l2.slice_shift) + at * size
                if _shows_backing(image, offset):
                    await resize.write_zeroes(writer, offset, offset + size)
                else:
                    await unmapper.discard(offset, size, "other", True)


async def _expand_inactive(image: Image, writer: Writer, l1: array[int]) -> None:
    """The L2 tables that only snapshots refer to are changed in place: what they say is the same afterwards."""
    size, bits, file = image.cluster_size, image.cluster_bits, image.file
    for index, entry in enumerate(l1):
        offset = entry & OFFSET_MASK
        if not offset:
            continue
        table = await opening.read_table(file, offset, size >> 3)
        zero = [at for at, one in enumerate(table) if _zero(one)]
        if not zero:
            continue
        # Each snapshot that shares the table refers to its clusters once.
        references = await image.refcounts.get(offset >> bits)
        dropped = []
        for at in zero:
            if table[at] & OFFSET_MASK:
                dropped.append((table[at] & OFFSET_MASK) >> bits)
            table[at] = 0
            if _shows_backing(image, (index * len(table) + at) << bits):
                cluster, _ = await image.refcounts.allocate(1)
                zeroes = iovs.zero_views(size)
                await writer.store(cluster << bits, (index * len(table) + at) << bits, size, zeroes, 0)
                block = await image.refcounts.load(cluster >> image.refcounts.block_bits)
                assert block is not None
                position = cluster & (image.refcounts.block_entries - 1)
                block.counts.set(position, references)
                image.refcounts.changed(block, position, position + 1)
                table[at] = cluster << bits
        await _settle(image)
        await file.flush()
        data = array("Q", table)
        data.byteswap()
        await file.pwrite(offset, data.tobytes())
        await file.flush()
        for cluster in dropped:
            for _ in range(references):
                image.free_later(cluster, 1, "other")
