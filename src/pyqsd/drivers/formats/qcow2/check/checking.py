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


def start(image: Image) -> CheckResult:
    """What is known before anything is read. Raises OSError if the image cannot be checked."""
    if (image.file.length + image.cluster_mask) >> image.cluster_bits > _MOST_CLUSTERS:
        raise OSError(errno.EFBIG, "File too large")
    result = CheckResult()
    result.total_clusters = ((image.header.size & ~511) + image.cluster_mask) >> image.cluster_bits
    result.corrupt("entries of the snapshot table with too much extra data", image.surplus.extra)
    result.corrupt("overhanging snapshots", image.surplus.overhanging)
    result.corrupt("incomplete entries of the snapshot table", incomplete_snapshots(image))
    return result


def incomplete_snapshots(image: Image) -> int:
    """How many entries of the snapshot table lack the size of the disk, which is optional in version 2 only."""
    return sum(one.disk_size is None for one in image.snapshots) if image.header.version >= 3 else 0


async def check(image: Image) -> CheckResult:
    """Look at an image, everything of which must be on disk. Raises OSError, Error."""
    return (await looked_at(image)).result


async def looked_at(image: Image) -> Walk:
    """The same, with all that was counted. Raises OSError, Error."""
    result = start(image)
    walk = Walk(image, result)
    await walk.everything()
    await walk.refcount_structures()
    walk.finish()
    disk = await DiskCounts.read(image)
    last = await compare(walk, disk)
    await count_wrong_flags(walk, disk)
    result.image_end_offset = (last + 1) << image.cluster_bits
    return walk
