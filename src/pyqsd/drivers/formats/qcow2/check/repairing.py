"""Repairing an image.

What is on disk is put right in an order in which a crash leaves the image no worse than it was:

1. L2 entries that say something twice, of which one part is harmless;
2. refcounts, in place if the blocks are sound, else as new structures (see `rebuilding`); flush;
3. the flags COPIED ("the refcount is exactly one") of the active tables, by the refcounts that are on disk now; flush;
4. the snapshot table is written anew, behind everything else, if some of its entries are incomplete or too much, and
   so is the directory of bitmaps, without those that are broken; the header switches over to them;
5. the refcounts of what was there before go down;
6. the marks "dirty" and "corrupt" go, if nothing is wrong any more.
"""

from __future__ import annotations

import errno
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from pyqsd.block.image_check import CheckResult
from pyqsd.drivers.formats.qcow2 import bitmap_format, bitmaps, opening, snapshot_ops, snapshots
from pyqsd.drivers.formats.qcow2 import header as headers
from pyqsd.drivers.formats.qcow2.check import counting, l2
from pyqsd.drivers.formats.qcow2.check.arrays import encode_counts, read_entries, worked
from pyqsd.drivers.formats.qcow2.check.checking import incomplete_snapshots, looked_at, start
from pyqsd.drivers.formats.qcow2.check.comparing import DiskCounts, compare, windows, wrong_flags
from pyqsd.drivers.formats.qcow2.check.counting import Walk
from pyqsd.drivers.formats.qcow2.check.rebuilding import rebuild
from pyqsd.drivers.formats.qcow2.refcounts import Refcounts
from pyqsd.drivers.formats.qcow2.tables import COPIED, OFFSET_MASK
from pyqsd.qapi.errors import Error

if TYPE_CHECKING:
    from pyqsd.drivers.formats.qcow2.check.arrays import Counts, Ints
    from pyqsd.drivers.formats.qcow2.image import Image

#: The flag as a signed number.
_COPIED = COPIED - (1 << 64)
#: L1 entries are written in pieces of this size (bytes).
_PAGE = 4096
#: How often it is tried.
_ROUNDS = 3


async def check_and_repair(image: Image, everything: bool) -> CheckResult:
    """Repair what can be repaired (`everything`), or leaked clusters only, of an image that nobody else uses and of
    which everything is on disk; and say what is left. Raises OSError, Error."""
    before, walk = await _settled(image, everything)
    if everything and await _replace_tables(image, walk):
        # What was there before has leaked.
        _, walk = await _settled(image, everything)
    result = walk.result
    result.corruptions_fixed = max(0, before.corruptions - result.corruptions)
    result.leaks_fixed = max(0, before.leaks - result.leaks)
    if not result.corruptions and not result.check_errors:
        await _mark_sound(image)
    return result


async def _settled(image: Image, everything: bool) -> tuple[CheckResult, Walk]:
    """Make refcounts and flags right. Returns what was found before, and what is left. Raises OSError, Error."""
    before = None
    for _ in range(_ROUNDS):
        try:
            found = await repair(image, everything, strict=False)
        finally:
            await reload(image)
        before = before or found
        walk = await looked_at(image)
        # New structures make the file longer, and what was beyond its end may be inside now.
        if not walk.result.leaks and not (everything and walk.result.findings[counting.TOO_LOW]):
            break
    assert before is not None
    return before, walk


async def _replace_tables(image: Image, walk: Walk) -> bool:
    """Write new tables of snapshots and bitmaps where something is wrong with the old ones. Returns whether there was.

    They go where nothing is and nothing leads to, also not the old tables, which may pretend to be long: after a crash
    before the header switches over, they are found as they were. Raises OSError, Error.
    """
    result, size = walk.result, image.header.size
    if result.check_errors or result.findings[counting.TOO_LOW]:
        # Only with right refcounts there is a place for new tables.
        return False
    table = [one if one.disk_size is not None else replace(one, disk_size=size) for one in image.snapshots]
    new_table = bool(image.surplus.error or incomplete_snapshots(image))
    # An extension that is not valid any more goes, too.
    stale = image.header.bitmaps is None and image.header.extension(headers.EXT_BITMAPS) is not None
    new_directory = image.node.check_only and (stale or walk.bitmaps is not None)
    if not new_table and not new_directory:
        return False
    wanted = (snapshots.MAX_TABLE_BYTES + bitmap_format.MAX_DIRECTORY_BYTES) >> image.cluster_bits
    end = (image.file.length + image.cluster_mask) >> image.cluster_bits
    above = walk.references.undangled(max(end, walk.references.last() + 1), wanted)
    if new_table:
        await snapshot_ops.replace_table(image, table, above)
        image.surplus = snapshots.Surplus()
    if new_directory:
        await bitmaps.switch(image, walk.bitmaps or [], above)
        image.header.bitmaps_error = None
    while image.writeback.needed:
        await image.writeback.run(refcounts=True)
    return True


async def repair_dirty(image: Image) -> None:
    """Make the refcounts and flags of a dirty image right, and clear the mark. Raises OSError, and has written nothing,
    if the image has worse errors than that."""
    try:
        await repair(image, True, strict=True)
    finally:
        # Readers may have old flags in memory.
        await reload(image)
    await image.mark_clean()


async def change_refcount_width(image: Image, order: int) -> None:
    """Store refcounts with ``1 << order`` bits from now on. The image must be sound (leaked clusters are free
    afterwards), everything on disk, and nobody else using it; a crash leaves the old refcounts or the new ones. Raises
    Error with the words of qemu-img amend, OSError."""
    if image.header.version < 3 and order != headers.V2_REFCOUNT_ORDER:
        raise Error(
            "Refcount widths other than 16 bits require compatibility level 1.1 or above (use compat=1.1 or greater)",
            errno.EINVAL,
        )
    result = start(image)
    walk = Walk(image, result, max(order, image.header.refcount_order))
    await walk.everything()
    walk.finish()
    if result.corruptions:
        raise Error("The image has errors, and must be repaired first", errno.EIO)
    found = walk.references.above((1 << (1 << order)) - 1)
    if found is not None:
        cluster, count = found
        raise Error(
            f"Cannot decrease refcount entry width to {1 << order} bits: Cluster at offset "
            f"{cluster << image.cluster_bits:#x} has a refcount of {count}",
            errno.EINVAL,
        )
    try:
        await rebuild(image, walk.references, order)
    finally:
        await reload(image)


async def reload(image: Image) -> None:
    """What is in memory of the tables is read again. Raises OSError, and then the image cannot be used any more."""
    try:
        await image.l2.read_l1()
        image.l2.forget_all()
        image.refcounts = Refcounts(image, image.settings.refcount_cache_bytes)
        await image.refcounts.read_table()
        image.touched_end = max(image.touched_end, image.file.length)
        image.meta = await opening.metadata_map(image, image.settings.overlap)
    except BaseException:
        image.broken = True
        image.forget_all()
        raise


async def _mark_sound(image: Image) -> None:
    header = image.header
    marks = headers.INCOMPAT_DIRTY | headers.INCOMPAT_CORRUPT
    if header.incompatible & marks:
        await image.file.flush()
        await image.set_features(header.incompatible & ~marks, header.compatible, header.autoclear)


async def repair(image: Image, everything: bool, strict: bool) -> CheckResult:
    """Repair, on disk only, and say what was wrong before. With `strict` an image in which not everything could be
    counted is not touched. Raises OSError."""
    walk = await _counted(image, frozenset())
    if walk.fixable and everything and not strict:
        offsets, times = (np.array(one, np.int64) for one in zip(*walk.fixable, strict=True))
        # What is also something else was only taken for an L2 table.
        sound = offsets[walk.only_tables(offsets, times)].tolist()
        if sound:
            walk = await _counted(image, frozenset(sound))
    result = walk.result
    if result.findings[counting.BROKEN_BITMAPS] and not (everything and image.node.check_only):
        # What the bitmaps have only looks leaked.
        raise Error('The directory of bitmaps is broken: only "all" of the image can be repaired', errno.EIO)
    if strict:
        for what in counting.NOT_COUNTED:
            if result.findings[what]:
                raise OSError(errno.EIO, f"There are {what}")
    disk = await DiskCounts.read(image)
    await compare(walk, disk)
    if not everything and walk.broken:
        raise Error('Refcount blocks are broken: only "all" can be repaired', errno.EIO)
    if everything and (walk.broken or walk.missing):
        fresh = Walk(image, CheckResult())
        await fresh.everything()
        await rebuild(image, fresh.references, image.header.refcount_order)
    elif result.leaks or (everything and result.findings[counting.TOO_LOW]):
        await _write_counts(walk, disk, everything)
        # Before flags that rely on them.
        await image.file.flush()
    if everything or not (result.corruptions or result.check_errors):
        # Right counts make the flags safe to correct.
        disk = await DiskCounts.read(image)
        await _write_flags(walk, disk)
        await image.file.flush()
    return result


async def _counted(image: Image, fix: frozenset[int]) -> Walk:
    walk = Walk(image, start(image), fix=fix)
    await walk.everything()
    await walk.refcount_structures()
    walk.finish()
    return walk


async def _write_counts(walk: Walk, disk: DiskCounts, everything: bool) -> None:
    """Bring the refcounts in line with the references, where they are too high, or also (`everything`) too low."""
    for number, count in windows(walk, disk):
        counts, _ = await disk.window(number)
        for offset, data in await worked(counts.nbytes, _changed_blocks, walk, disk, number, count, counts, everything):
            await walk.file.pwrite(offset, data)


def _changed_blocks(
    walk: Walk, disk: DiskCounts, number: int, count: int, counts: Counts, everything: bool
) -> list[tuple[int, bytes]]:
    """The blocks of a window that change: (host offset, new content)."""
    want = walk.references.run(number << disk.window_bits, count)
    wrong = counts[:count] != want if everything else counts[:count] > want
    if not wrong.any():
        return []
    new = counts.copy()
    new[:count][wrong] = want[wrong]
    first = number << (disk.window_bits - disk.block_bits)
    blocks = np.unique(np.flatnonzero(wrong) >> disk.block_bits).tolist()
    return [
        (
            int(disk.table[first + block]),
            encode_counts(new[block << disk.block_bits : (block + 1) << disk.block_bits], disk.order),
        )
        for block in blocks
        # What has no sound block cannot be put right in place.
        if 0 < disk.table[first + block] < walk.references.file_length
        and not disk.table[first + block] & walk.layout.mask
    ]


async def _write_flags(walk: Walk, disk: DiskCounts) -> None:
    """Correct the flags COPIED, and count them as found."""
    header, file, result = walk.image.header, walk.file, walk.result
    in_l1, tables = await wrong_flags(walk, disk)
    async for some in tables:
        result.corrupt(counting.FLAGS_L2, int((some.wrong.sum(axis=1) * some.times).sum()))
        words = np.where(some.wrong, some.words ^ _COPIED, some.words)
        if some.bitmaps is not None:
            words = np.stack((words, some.bitmaps), axis=2)
        # A cluster that has another use, too, may be somebody's data that was only taken for a table.
        sound = walk.only_tables(some.offsets, some.total)
        sound |= l2.Tables(walk.layout, some.words, some.bitmaps).plausible(walk.references.file_length)
        for offset, table in zip(some.offsets[sound].tolist(), words[sound], strict=True):
            await file.pwrite(offset, table.astype(">i8").tobytes())
    if len(in_l1):
        result.corrupt(counting.FLAGS_L1, len(in_l1))
        l1: Ints = await read_entries(file, header.l1_offset, header.l1_size)
        first = header.l1_offset >> header.cluster_bits
        clusters = (header.l1_size * 8 + walk.layout.mask) >> header.cluster_bits
        shared = walk.references.overflowed or (walk.references.run(first, clusters) > 1).any()
        if shared and (l1 & (counting.L1_RESERVED | walk.layout.mask & OFFSET_MASK)).any():
            return
        l1[in_l1] ^= _COPIED
        per_page = _PAGE >> 3
        for page in np.unique(in_l1 // per_page).tolist():
            part = l1[page * per_page : (page + 1) * per_page]
            await file.pwrite(header.l1_offset + page * _PAGE, part.astype(">i8").tobytes())
