"""The check of an image from beginning to end."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from pyqsd.block.image_check import CheckResult
from pyqsd.drivers.formats.qcow2.check.comparing import DiskCounts, compare, count_wrong_flags
from pyqsd.drivers.formats.qcow2.check.counting import Walk

if TYPE_CHECKING:
    from pyqsd.drivers.formats.qcow2.image import Image

#: Files with more clusters than this are not looked at.
_MOST_CLUSTERS = (1 << 31) - 1


async def check(image: Image) -> CheckResult:
    """Look at an image, everything of which must be on disk. Raises OSError, Error."""
    result = CheckResult()
    size = image.cluster_size
    clusters = (image.file.length + image.cluster_mask) >> image.cluster_bits
    if clusters > _MOST_CLUSTERS:
        raise OSError(errno.EFBIG, "File too large")
    result.total_clusters = ((image.header.size & ~511) + size - 1) >> image.cluster_bits
    if image.header.version >= 3:
        incomplete = sum(one.disk_size is None for one in image.snapshots)
        result.corrupt("incomplete entries of the snapshot table", incomplete)
    walk = Walk(image, result)
    await walk.everything()
    await walk.refcount_structures()
    walk.finish()
    disk = await DiskCounts.read(image)
    last = await compare(walk, disk)
    await count_wrong_flags(walk, disk)
    result.image_end_offset = (last + 1) * size
    return result
