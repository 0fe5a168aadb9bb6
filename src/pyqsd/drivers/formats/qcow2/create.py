"""Making an empty image, as bytes.

Source: QEMU docs/interop/qcow2. The layout is the usual one: header, refcount table, refcount block(s), L1 table.
"""

from __future__ import annotations

import errno
from array import array

from pyqsd.drivers.formats.qcow2 import header as headers
from pyqsd.drivers.formats.qcow2.refcounts import new_counts
from pyqsd.qapi.errors import Error


def empty_image(
    size: int,
    *,
    cluster_size: int = 65536,
    version: int = 3,
    refcount_bits: int = 16,
    backing_file: str | None = None,
    backing_format: str | None = None,
    lazy_refcounts: bool = False,
    compression_type: int = headers.COMPRESSION_ZLIB,
    extended_l2: bool = False,
) -> bytes:
    """The content of a new image file for an empty disk of `size` bytes (a multiple of 512). Raises Error.

    `backing_file`: the name to store; `backing_format` the name of its driver.
    """
    bits = cluster_size.bit_length() - 1
    if cluster_size != 1 << bits or not headers.MIN_CLUSTER_BITS <= bits <= headers.MAX_CLUSTER_BITS:
        raise Error("Cluster size must be a power of two between 512 and 2048k", errno.EINVAL)
    if size % 512 or size < 0:
        raise Error("Image size must be a multiple of 512 bytes", errno.EINVAL)
    order = refcount_bits.bit_length() - 1
    if refcount_bits != 1 << order or not 0 <= order <= 6:
        raise Error("Refcount width must be a power of two and may not exceed 64 bits", errno.EINVAL)
    if version < 3 and refcount_bits != 16:
        raise Error(
            "Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or "
            "greater)",
            errno.EINVAL,
        )
    if version < 3 and lazy_refcounts:
        raise Error(
            "Lazy refcounts only supported with compatibility level 1.1 and above (use version=v3 or greater)",
            errno.EINVAL,
        )
    if version < 3 and compression_type != headers.COMPRESSION_ZLIB:
        raise Error(
            "Non-zlib compression type is only supported with compatibility level 1.1 and above (use version=v3 or "
            "greater)",
            errno.EINVAL,
        )
    if extended_l2 and version < 3:
        raise Error(
            "Extended L2 entries are only supported with compatibility level 1.1 and above (use version=v3 or greater)",
            errno.EINVAL,
        )
    if extended_l2 and bits < 14:
        raise Error("Extended L2 entries are only supported with cluster sizes of at least 16384 bytes", errno.EINVAL)
    if backing_format is not None and backing_file is None:
        raise Error("Backing format cannot be used without backing file", errno.EINVAL)
    if backing_file is not None and len(headers.os_encode(backing_file)) > headers.MAX_BACKING_NAME:
        raise Error("Backing file name too long", errno.EINVAL)
    table_bits = 2 * bits - (4 if extended_l2 else 3)
    l1_entries = (size + (1 << table_bits) - 1) >> table_bits
    if l1_entries * 8 > headers.MAX_L1_BYTES:
        raise Error("The image size is too large (try using a larger cluster size)", errno.EFBIG)
    l1_clusters = (l1_entries * 8 + cluster_size - 1) >> bits
    per_block = cluster_size * 8 // refcount_bits
    blocks = 1
    while True:
        table_clusters = (blocks * 8 + cluster_size - 1) >> bits
        used = 1 + table_clusters + blocks + l1_clusters
        if used <= blocks * per_block:
            break
        blocks = -(-used // per_block)
    first_block = 1 + table_clusters
    first_l1 = first_block + blocks
    header = headers.Header(
        version=version,
        backing_offset=0,
        backing_size=0,
        cluster_bits=bits,
        size=size,
        crypt_method=headers.CRYPT_NONE,
        l1_size=l1_entries,
        l1_offset=first_l1 << bits,
        reftable_offset=1 << bits,
        reftable_clusters=table_clusters,
        nb_snapshots=0,
        snapshots_offset=0,
        compatible=headers.COMPAT_LAZY_REFCOUNTS if lazy_refcounts else 0,
        incompatible=(headers.INCOMPAT_COMPRESSION if compression_type else 0)
        | (headers.INCOMPAT_EXTENDED_L2 if extended_l2 else 0),
        refcount_order=order,
        compression_type=compression_type,
        backing_file=backing_file,
    )
    if backing_format is not None:
        header.extensions.append((headers.EXT_BACKING_FORMAT, backing_format.encode()))
    data = bytearray(used << bits)
    area = headers.encode(header)
    data[: len(area)] = area
    table = array("Q", [(first_block + index) << bits for index in range(blocks)])
    table.byteswap()
    data[1 << bits : (1 << bits) + len(table) * 8] = table.tobytes()
    for index in range(blocks):
        counts = new_counts(order, per_block)
        counts.set_ones(0, min(per_block, max(0, used - index * per_block)))
        at = (first_block + index) << bits
        data[at : at + cluster_size] = counts.encode(0, per_block)
    return bytes(data)
