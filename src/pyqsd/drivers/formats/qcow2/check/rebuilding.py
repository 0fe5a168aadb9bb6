"""Making new refcount structures, beside the old ones.

Order: new blocks and a new table go behind the end of the file, where nothing is; they are flushed; then one write of
the header (which lies within its first sector) makes them the valid ones. So a crash leaves the old structures or the
new ones. The space of the old ones is free according to the new ones.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import numpy as np

from pyqsd.drivers.formats.qcow2 import header as headers
from pyqsd.drivers.formats.qcow2.check.arrays import BATCH_BYTES, Ints, encode_counts, worked
from pyqsd.drivers.formats.qcow2.refcounts import MAX_HOST_OFFSET

if TYPE_CHECKING:
    from pyqsd.drivers.formats.qcow2.check.references import References
    from pyqsd.drivers.formats.qcow2.image import Image


async def rebuild(image: Image, references: References, order: int) -> None:
    """Write refcount structures of ``1 << order`` bits for `references`, which hold everything but the old structures,
    and switch over to them. What the image has of refcounts in memory is not valid afterwards. Raises OSError."""
    bits, size = image.cluster_bits, image.cluster_size
    block_bits = bits + 3 - order
    start = max((image.file.length + size - 1) >> bits, references.last() + 1)
    used = references.used_blocks(block_bits)
    while True:
        regions, table_clusters = _plan(used, start, size, block_bits)
        # What refers to something beyond the end of the file must not refer to these.
        free = references.undangled(start, len(regions) + table_clusters)
        if free == start:
            break
        start = free
    end = start + len(regions) + table_clusters
    if table_clusters << bits > headers.MAX_REFTABLE_BYTES:
        raise OSError(errno.EFBIG, "The refcount table would be too large")
    if end << bits > MAX_HOST_OFFSET:
        raise OSError(errno.EFBIG, "The image file would be too large")
    references.add_run(start, end - start)
    table = np.zeros((table_clusters << bits) >> 3, np.int64)
    table[regions] = (start + np.arange(len(regions))) << bits
    step = max(1, BATCH_BYTES // size)
    for first in range(0, len(regions), step):
        part = regions[first : first + step]
        data = await worked(len(part) * size, _encode, references, part, block_bits, order)
        await image.file.pwrite((start + first) << bits, data)
    place = (start + len(regions)) << bits
    await image.file.pwrite(place, table.astype(">i8").tobytes())
    # Before the header refers to them.
    await image.file.flush()
    await image.switch_header(
        headers.refcount_fields, reftable_offset=place, reftable_clusters=table_clusters, refcount_order=order
    )


def _plan(used: list[int], start: int, size: int, block_bits: int) -> tuple[Ints, int]:
    """Which blocks there must be, also for the new structures themselves, and how many clusters the table takes."""
    regions = set(used)
    while True:
        table_clusters = -(-(max(regions) + 1) * 8 // size)
        end = start + len(regions) + table_clusters
        more = regions | set(range(start >> block_bits, ((end - 1) >> block_bits) + 1))
        if len(more) == len(regions):
            return np.array(sorted(regions), np.int64), table_clusters
        regions = more


def _encode(references: References, regions: Ints, block_bits: int, order: int) -> bytes:
    """The blocks `regions`."""
    breaks = (np.flatnonzero(np.diff(regions) != 1) + 1).tolist()
    return b"".join(
        encode_counts(references.run(int(regions[first]) << block_bits, (stop - first) << block_bits), order)
        for first, stop in zip([0, *breaks], [*breaks, len(regions)], strict=True)
    )
