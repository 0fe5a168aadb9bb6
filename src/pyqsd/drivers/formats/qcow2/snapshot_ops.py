"""Taking, deleting and going back to internal snapshots.

Source: QEMU docs/interop/qcow2, section "Snapshots". Errors have QSD's words.

No request is in flight, and everything in memory has been written back before. What must be on disk before what:

* taking one: the raised counts, the copy of the L1 table, the cleared "refcount is one" flags and the new snapshot
  table before the header that refers to the latter;
* deleting one: the header with the new snapshot table before any count goes down;
* going back: the raised counts and the new L1 table before the header that refers to it, and that before any count goes
  down.

Between the counts and the flags, both are changed in place in many clusters. An image of version 3 has its dirty bit
meanwhile, so that whoever opens it after a crash makes both right. Without it (version 2) a flag may disagree with its
count, which costs a copy or leaks a cluster, and harms no data: before a snapshot is in the header nothing shares.
"""

from __future__ import annotations

import errno
import time
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from pyqsd.drivers.formats.qcow2 import header as headers
from pyqsd.drivers.formats.qcow2 import opening, snapshots
from pyqsd.drivers.formats.qcow2.tables import COPIED
from pyqsd.qapi.errors import Error, from_oserror

if TYPE_CHECKING:
    from pyqsd.drivers.formats.qcow2.image import Image
    from pyqsd.drivers.formats.qcow2.overlap import MetadataMap
    from pyqsd.drivers.formats.qcow2.snapshots import Snapshot

#: QEMU's limit for names given by its users, bytes.
_MAX_NAME_BYTES = 255


def find(image: Image, ident: str | None, name: str | None) -> Snapshot | None:
    """The snapshot with this id and this name (None: any)."""
    for one in image.snapshots:
        if (ident is None or headers.shown(one.id) == ident) and (name is None or headers.shown(one.name) == name):
            return one
    return None


def _next_id(image: Image) -> str:
    highest = 0
    for one in image.snapshots:
        digits = one.id.lstrip()
        end = 0
        while end < len(digits) and digits[end] in "0123456789":
            end += 1
        highest = max(highest, min(int(digits[:end] or "0"), (1 << 64) - 2))
    return str(highest + 1)


async def create(image: Image, name: str, vm_state_size: int = 0) -> Snapshot:
    """Take a snapshot of the active state. Raises OSError, Error."""
    header, bits = image.header, image.cluster_bits
    if len(image.snapshots) >= headers.MAX_SNAPSHOTS:
        raise OSError(errno.EFBIG, "Too many snapshots")
    seconds, microseconds = divmod(time.time_ns() // 1000, 1_000_000)
    kept = headers.os_decode(headers.os_encode(name)[:_MAX_NAME_BYTES])
    made = snapshots.Snapshot(
        l1_offset=0,
        l1_size=header.l1_size,
        id=_next_id(image),
        name=kept,
        date_sec=seconds & 0xFFFFFFFF,
        date_nsec=microseconds * 1000,
        vm_clock_nsec=time.time_ns() // 1000 * 1000,
        vm_state_size=vm_state_size,
        disk_size=header.size,
        icount=None,
    )
    from pyqsd.drivers.formats.qcow2 import bulk

    async with _counting(image) as progress:
        l1 = array("Q", image.l2.l1)
        clusters = _l1_clusters(image, header.l1_size)
        await bulk.change_references(image, l1, 1)
        first = None
        try:
            if clusters:
                first, _ = await image.refcounts.allocate(clusters, contiguous=True)
                made.l1_offset = first << bits
                await _write_l1(image, made.l1_offset, clusters, array("Q", (entry & ~COPIED for entry in l1)))
            await _write_active_l1(image, await bulk.correct_flags(image, l1, none=True))
            await replace_table(image, [*image.snapshots, made])
        except BaseException:
            if not image.broken:
                progress.sound = False
                if first is not None:
                    image.refcounts.release(first, clusters)
                await bulk.change_references(image, l1, -1)
                await _write_active_l1(image, await bulk.correct_flags(image, l1))
                progress.sound = True
            raise
    return made


async def delete(image: Image, one: Snapshot) -> None:
    """Delete a snapshot. Raises OSError, Error."""
    try:
        l1 = await _read_l1(image, one)
    except OSError as exc:
        raise from_oserror(exc, "Failed to free the cluster and L1 table") from exc
    async with _counting(image) as progress:
        try:
            await replace_table(image, [other for other in image.snapshots if other is not one])
        except OSError as exc:
            raise from_oserror(exc, "Failed to remove snapshot from snapshot list") from exc
        progress.sound = False
        try:
            await _dereference(image, one, l1)
        except OSError as exc:
            # It is gone; what it had leaks.
            raise from_oserror(exc, "Failed to free the cluster and L1 table") from exc
        progress.sound = True


async def _dereference(image: Image, one: Snapshot, l1: array[int]) -> None:
    from pyqsd.drivers.formats.qcow2 import bulk

    await bulk.change_references(image, l1, -1)
    if one.l1_size:
        image.free_later(one.l1_offset >> image.cluster_bits, _l1_clusters(image, one.l1_size), "snapshot")
    await _write_active_l1(image, await bulk.correct_flags(image, image.l2.l1))


async def goto(image: Image, one: Snapshot) -> None:
    """Make the active state that of a snapshot, the size of the disk as well. Raises OSError, Error."""
    from pyqsd.drivers.formats.qcow2 import bulk

    header, bits = image.header, image.cluster_bits
    size = header.size if one.disk_size is None else one.disk_size
    if size != header.size and header.version < 3:
        raise Error("Can't resize a v2 image which has snapshots", errno.ENOTSUP)
    _check_size(image, one, size)
    l1 = await _read_l1(image, one)
    async with _counting(image) as progress:
        old = array("Q", image.l2.l1)
        old_first, old_clusters = header.l1_offset >> bits, _l1_clusters(image, header.l1_size)
        new = array("Q", (entry & ~COPIED for entry in l1))
        new.extend(array("Q", bytes(8 * max(0, headers.l1_entries_for(header, size) - len(new), 1 - len(new)))))
        clusters = _l1_clusters(image, len(new))
        await bulk.change_references(image, l1, 1)
        first = None
        try:
            first, _ = await image.refcounts.allocate(clusters, contiguous=True)
            await _write_l1(image, first << bits, clusters, new)
            await image.writeback.run(refcounts=True)
            await image.file.flush()
            await image.switch_header(headers.size_and_l1_fields, size=size, l1_size=len(new), l1_offset=first << bits)
        except BaseException:
            if not image.broken:
                progress.sound = False
                if first is not None:
                    image.refcounts.release(first, clusters)
                await bulk.change_references(image, l1, -1)
                progress.sound = True
            raise
        progress.sound = False
        image.l2.l1 = new
        await bulk.change_references(image, old, -1)
        if old_clusters:
            image.free_later(old_first, old_clusters, "snapshot")
        await _write_active_l1(image, await bulk.correct_flags(image, new))
        progress.sound = True


def select(image: Image, wanted: str) -> Snapshot:
    """The snapshot that a user names by its id or its name. Raises Error."""
    found = find(image, wanted, None) or find(image, None, wanted)
    if found is None:
        raise Error(f"Can't find snapshot '{wanted}'", errno.ENOENT)
    return found


async def load(image: Image, one: Snapshot) -> None:
    """Show a snapshot instead of the active state, of an image that is not written to. Raises OSError, Error."""
    size = image.header.size if one.disk_size is None else one.disk_size
    _check_size(image, one, size)
    image.l2.l1 = await _read_l1(image, one)
    image.header = replace(image.header, size=size, l1_size=one.l1_size, l1_offset=one.l1_offset)
    image.l2.forget_all()


def _check_size(image: Image, one: Snapshot, size: int) -> None:
    # Beyond the end of its L1 table a snapshot has nothing; but a size like that is not one of a disk.
    if size % 512 or size > (1 << 63) - 1 or headers.l1_entries_for(image.header, size) > headers.MAX_L1_BYTES // 8:
        raise Error(f"Snapshot '{headers.shown(one.name)}' has an invalid disk size", errno.EINVAL)


def _l1_clusters(image: Image, entries: int) -> int:
    return (entries * 8 + image.cluster_mask) >> image.cluster_bits


async def _read_l1(image: Image, one: Snapshot) -> array[int]:
    if one.l1_size and not one.l1_offset:
        raise Error("Snapshot L1 table offset invalid", errno.EINVAL)
    headers.check_table(image.header, one.l1_offset, one.l1_size, 8, headers.MAX_L1_BYTES, "Snapshot L1 table")
    return await opening.read_table(image.file, one.l1_offset, one.l1_size)


async def _write_l1(image: Image, offset: int, clusters: int, table: array[int]) -> None:
    data = array("Q", table)
    data.byteswap()
    await image.file.pwrite(offset, data.tobytes().ljust(clusters << image.cluster_bits, b"\0"))


async def _write_active_l1(image: Image, table: array[int]) -> None:
    """Write the active L1 table, in place, where flags have changed."""
    image.l2.l1 = table
    data = array("Q", table)
    data.byteswap()
    if table:
        await image.file.pwrite(image.header.l1_offset, data.tobytes())


async def replace_table(image: Image, table: list[Snapshot], above: int | None = None) -> None:
    """Write a snapshot table to a new place, and make it the valid one. `above`: the first cluster that may be used for
    it, where the clusters of the old one, which may be anything, are left as they are. Raises OSError, Error."""
    header, bits = image.header, image.cluster_bits
    old_first = header.snapshots_offset >> bits
    old_clusters = 0
    if image.snapshots and above is None:
        old_clusters = (snapshots.table_bytes(image.snapshots) + image.cluster_mask) >> bits
    first = clusters = 0
    # Copies, because their sizes on disk may change.
    table = [replace(one) for one in table]
    if table:
        data = snapshots.encode_table(table, header.size)
        clusters = (len(data) + image.cluster_mask) >> bits
        first, _ = await image.refcounts.allocate(clusters, contiguous=True, floor=above or 0)
    try:
        if table:
            await image.file.pwrite(first << bits, data.ljust(clusters << bits, b"\0"))
        await image.writeback.run(refcounts=True)
        await image.file.flush()
        await image.switch_header(headers.snapshot_fields, nb_snapshots=len(table), snapshots_offset=first << bits)
    except BaseException:
        if clusters and not image.broken:
            image.refcounts.release(first, clusters)
        raise
    image.snapshots = table
    if old_clusters:
        image.free_later(old_first, old_clusters, "snapshot")


class _Progress:
    """How far an operation has got. `sound`: what is in memory and on disk
    agrees, or will once all is written."""

    def __init__(self) -> None:
        self.sound = True


@asynccontextmanager
async def _counting(image: Image) -> AsyncIterator[_Progress]:
    """Counts and flags are changed meanwhile; afterwards all is on disk, and nothing old in memory. Raises OSError."""
    image.check_usable()
    await _written(image)
    mark = image.header.version >= 3 and not image.header.incompatible & headers.INCOMPAT_DIRTY
    if mark:
        await image.mark_dirty()
    image.l2.forget_all()
    progress = _Progress()
    try:
        yield progress
    finally:
        image.l2.forget_all()
        try:
            await _written(image)
        finally:
            image.meta = await _metadata_map(image)
        if mark and progress.sound:
            await image.mark_clean()


async def _metadata_map(image: Image) -> MetadataMap:
    overlap = image.settings.overlap
    try:
        return await opening.metadata_map(image, overlap)
    except OSError:
        # Without these, there is nothing to read for it.
        return await opening.metadata_map(image, overlap - {"inactive_l2"})


async def _written(image: Image) -> None:
    await image.writeback.run(refcounts=True)
    while image.writeback.needed:
        await image.writeback.run(refcounts=True)
