"""Opening an image: everything that is read and checked before the first request.

Source: QEMU docs/interop/qcow2. Errors have QSD's words.
"""

from __future__ import annotations

import errno
from array import array
from typing import TYPE_CHECKING

from pyqsd.block.driver import ROLE_DATA
from pyqsd.drivers.formats.qcow2 import bitmap_format, snapshots
from pyqsd.drivers.formats.qcow2 import header as headers
from pyqsd.drivers.formats.qcow2.image import Image
from pyqsd.drivers.formats.qcow2.options import Options, settings
from pyqsd.drivers.formats.qcow2.overlap import MetadataMap
from pyqsd.drivers.formats.qcow2.refcounts import REFTABLE_MASK, Refcounts
from pyqsd.drivers.formats.qcow2.tables import OFFSET_MASK, L2Tables
from pyqsd.drivers.formats.qcow2.writeback import WriteBack
from pyqsd.qapi.errors import Error, from_oserror

if TYPE_CHECKING:
    from pyqsd.block.node import Node
    from pyqsd.drivers.formats.qcow2.bitmap_format import StoredBitmap
    from pyqsd.drivers.formats.qcow2.encryption import Encryption


#: No LUKS1 header is larger: eight slots for keys of up to 64 bytes, in 4000 stripes each.
_MOST_LUKS = 4 << 20


async def read_header(node: Node, file: Node, options: Options) -> headers.Header:
    """Read and check the header with its extensions. Raises Error."""
    try:
        first = await file.pread(0, headers.V2_HEADER_BYTES)
        bits = int.from_bytes(first[20:24], "big")
        if first[:4] == headers.MAGIC and headers.MIN_CLUSTER_BITS <= bits <= headers.MAX_CLUSTER_BITS:
            first = await file.pread(0, 1 << bits)
    except OSError as exc:
        raise from_oserror(exc, "Could not read qcow2 header") from exc
    header = headers.decode(first, node.check_only)
    if header.incompatible & headers.INCOMPAT_CORRUPT and not node.read_only:
        raise Error("qcow2: Image is corrupt; cannot be opened read/write", errno.EACCES)
    check_encryption(header, options)
    headers.decode_extensions(header, first, node.check_only)
    headers.decode_backing_file(header, first)
    return header


def check_encryption(header: headers.Header, options: Options, old: Options | None = None) -> None:
    """Whether `options` say what the header says of encryption, and give all that `old` did, should they replace those.
    The key is not looked at: when a node is opened again, it goes on with the one that it has. Raises Error."""
    if old is not None and old.encrypt is not None:
        if options.encrypt is None:
            raise Error("Option 'encrypt.format' cannot be reset to its default value")
        if options.encrypt.key_secret is None and old.encrypt.key_secret is not None:
            raise Error("Option 'encrypt.key-secret' cannot be reset to its default value")
    if header.crypt_method == headers.CRYPT_NONE:
        if options.encrypt is not None:
            chosen = options.encrypt.__struct_config__.tag
            raise Error(f"No encryption in image header, but options specified format '{chosen}'", errno.EINVAL)
    elif options.encrypt is not None:
        method = "aes" if header.crypt_method == headers.CRYPT_AES else "luks"
        chosen = options.encrypt.__struct_config__.tag
        if chosen != method:
            raise Error(f"Header reported '{method}' encryption format but options specify '{chosen}'", errno.EINVAL)


async def open_data_file(node: Node, header: headers.Header, options: Options) -> Node | None:
    """Open the external data file, if the image has one: that of the options, else the one that the image names. Raises
    Error."""
    # It is there already when the metadata is read again.
    child = next((child for child in node.children if child.name == "data-file"), None)
    if child is None and options.data_file is not None:
        child = await node.open_child("data-file", options.data_file, ROLE_DATA)
    if not header.incompatible & headers.INCOMPAT_DATA_FILE:
        if child is not None:
            raise Error("'data-file' can only be set for images with an external data file", errno.EINVAL)
        if header.autoclear & headers.AUTOCLEAR_RAW_DATA:
            raise Error("data-file-raw requires a data file", errno.EINVAL)
        return None
    if child is None:
        if header.data_file is None:
            raise Error("'data-file' is required for this image", errno.EINVAL)
        child = await node.open_data_file(header.data_file)
    return child.node


async def open_image(node: Node, file: Node, header: headers.Header, options: Options, data_file: Node | None) -> Image:
    """Read the tables that stay in memory. Raises Error."""
    if header.size > (1 << 63) - 1:
        raise Error("Could not refresh total sector count: File too large", errno.EFBIG)
    size = header.size & ~511
    image = Image(node, file, header, settings(options, header, node.discard_unmap, size), data_file)
    image.touched_end = file.length
    image.l2 = L2Tables(image, image.settings.l2_slice_bytes, image.settings.l2_cache_bytes)
    image.refcounts = Refcounts(image, image.settings.refcount_cache_bytes)
    image.writeback = WriteBack(image)
    try:
        await image.l2.read_l1()
    except OSError as exc:
        raise from_oserror(exc, "Could not read L1 table") from exc
    try:
        await image.refcounts.read_table()
    except OSError as exc:
        raise from_oserror(exc, "Could not initialize refcount handling") from exc
    try:
        image.snapshots = await read_snapshots(file, header, image.surplus if node.check_only else None)
    except OSError as exc:
        raise from_oserror(exc, "Failed to read snapshot table") from exc
    image.meta = await metadata_map(image, image.settings.overlap)
    return image


async def open_encryption(image: Image, options: Options) -> Encryption:
    """The cipher of an encrypted image. Raises Error."""
    from pyqsd.drivers.formats.qcow2 import encryption

    secret = options.encrypt.key_secret if options.encrypt is not None else None
    return await encryption.open_encryption(image, secret)


async def read_snapshots(
    file: Node, header: headers.Header, surplus: snapshots.Surplus | None = None
) -> list[snapshots.Snapshot]:
    """Read the snapshot table. What is too much in it is an error, or with `surplus` left out and noted there. Raises
    OSError, Error."""
    found: list[snapshots.Snapshot] = []
    start = at = header.snapshots_offset
    count, total = header.nb_snapshots, 0

    def note(error: Error, extra: int = 0, overhanging: int = 0) -> None:
        if surplus is None:
            raise error
        surplus.error = surplus.error or error
        surplus.extra += extra
        surplus.overhanging += overhanging

    if count > headers.MAX_SNAPSHOTS:
        overhanging = count - headers.MAX_SNAPSHOTS
        note(snapshots.too_many("Snapshot table too large", overhanging), overhanging=overhanging)
        count = headers.MAX_SNAPSHOTS
    for index in range(count):
        head = bytes(await file.pread(at, snapshots.header_bytes()))
        extra = snapshots.extra_bytes(head)
        size = kept = snapshots.entry_bytes(head)
        if extra > snapshots.MAX_EXTRA_BYTES:
            note(snapshots.too_much_extra(index), extra=1)
            head = snapshots.cut(head)
            kept = snapshots.entry_bytes(head)
        total += kept
        if total > snapshots.MAX_TABLE_BYTES or at + size - start > snapshots.MAX_SPAN_BYTES:
            overhanging = count - index
            note(snapshots.too_many("Snapshot table is too big", overhanging), overhanging=overhanging)
            break
        if extra > snapshots.MAX_EXTRA_BYTES:
            head += await file.pread(at + len(head), snapshots.MAX_EXTRA_BYTES)
            one = snapshots.decode(
                head + await file.pread(at + len(head) - snapshots.MAX_EXTRA_BYTES + extra, kept - len(head)), index
            )
        else:
            one = snapshots.decode(await file.pread(at, size), index)
        one.entry_size = size
        found.append(one)
        at += size
    return found


async def metadata_map(image: Image, overlap: frozenset[str]) -> MetadataMap:
    """Where all metadata is, for the overlap checks of writes. Raises OSError."""
    header, bits = image.header, image.cluster_bits
    mask = image.cluster_mask
    meta = MetadataMap(overlap)
    meta.add("main_header", 0)
    area = headers.encryption_area(header)
    if area is not None:
        # Without it nothing can be read any more. QSD does not look after it.
        length = min(area[1], _MOST_LUKS, max(0, image.file.length - area[0]))
        meta.add("main_header", area[0] >> bits, (length + mask) >> bits)
    if header.l1_size:
        meta.add("active_l1", header.l1_offset >> bits, (header.l1_size * 8 + mask) >> bits)
    meta.add("refcount_table", header.reftable_offset >> bits, header.reftable_clusters)
    meta.add_many("active_l2", _clusters(image.l2.l1, OFFSET_MASK, bits))
    meta.add_many("refcount_block", _clusters(image.refcounts.table, REFTABLE_MASK, bits))
    if image.snapshots:
        size = snapshots.table_bytes(image.snapshots)
        if image.node.check_only:
            # It may pretend to be huge.
            size = min(size, max(0, image.file.length - header.snapshots_offset))
        meta.add("snapshot_table", header.snapshots_offset >> bits, (size + mask) >> bits)
    inactive = [one for one in image.snapshots if not one.l1_offset & mask and one.l1_size <= headers.MAX_L1_BYTES // 8]
    meta.set_inactive_l1((one.l1_offset >> bits, (one.l1_size * 8 + mask) >> bits) for one in inactive)
    if "inactive_l2" in overlap:
        for one in inactive:
            table = await read_table(image.file, one.l1_offset, one.l1_size)
            meta.add_many("inactive_l2", _clusters(table, OFFSET_MASK, bits))
    if header.bitmaps is not None and header.autoclear & headers.AUTOCLEAR_BITMAPS:
        directory = header.bitmaps
        meta.add("bitmap_directory", directory.directory_offset >> bits, (directory.directory_size + mask) >> bits)
    return meta


async def read_table(file: Node, offset: int, entries: int) -> array[int]:
    """A table of 64-bit entries. Raises OSError."""
    table = array("Q", bytes(await file.pread(offset, entries * 8)))
    table.byteswap()
    return table


def _clusters(table: array[int], mask: int, bits: int) -> array[int]:
    # An array, because a hostile table has millions of entries.
    return array("Q", ((entry & mask) >> bits for entry in table if entry & mask))


async def read_bitmaps(image: Image) -> list[StoredBitmap]:
    """The bitmaps that the image has, for information. Raises Error if their directory is broken."""
    directory = image.header.bitmaps
    if directory is None:
        return []
    try:
        data = await image.file.pread(directory.directory_offset, directory.directory_size)
        return bitmap_format.decode_directory(data, directory.count, image.cluster_size, image.header.size)
    except OSError as exc:
        raise from_oserror(exc, "Failed to read bitmap directory") from exc
