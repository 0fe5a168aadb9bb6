"""What the entries of many L2 tables say, as arrays (QEMU docs/interop/qcow2, "Cluster mapping", "Extended L2
Entries")."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pyqsd.drivers.formats.qcow2 import header as headers
from pyqsd.drivers.formats.qcow2.check.arrays import Bools, Ints, entries_of
from pyqsd.drivers.formats.qcow2.tables import ALL_ALLOCATED, COMPRESSED, OFFSET_MASK, ZERO

if TYPE_CHECKING:
    from pyqsd.drivers.formats.qcow2.header import Header

#: Bits of an entry that is not compressed that must be zero.
RESERVED = 0x3F000000000001FE


class Layout:
    """What one needs to know of an image to understand its L2 tables."""

    def __init__(self, header: Header) -> None:
        self.bits = header.cluster_bits
        self.size = header.cluster_size
        self.mask = header.cluster_size - 1
        self.extended = bool(header.incompatible & headers.INCOMPAT_EXTENDED_L2)
        #: Guest data is in another file, where offset 0 is a place like any other.
        self.data_file = bool(header.incompatible & headers.INCOMPAT_DATA_FILE)
        self.compressed_shift = 62 - (header.cluster_bits - 8)


class Tables:
    """Some L2 tables. All arrays have one row for each of them.

    `words`: the entries; `bitmaps`: of their subclusters, or None; `compressed`, `stored` (an ordinary cluster, or
    space behind a zero cluster), `host` (offset, 0: none).
    """

    def __init__(self, layout: Layout, words: Ints, bitmaps: Ints | None) -> None:
        self.layout = layout
        self.words = words
        self.bitmaps = bitmaps
        self.compressed: Bools = (words & COMPRESSED) != 0
        self.host: Ints = words & OFFSET_MASK
        self.stored: Bools = self.host != 0
        if layout.data_file:
            at_zero = words < 0
            if bitmaps is None:
                at_zero &= (words & ZERO) == 0
            self.stored |= at_zero
        self.stored &= ~self.compressed

    def unaligned(self) -> Bools:
        """Ordinary clusters that are not where one can be."""
        return _both(self.stored, self.host & self.layout.mask)

    def reserved(self) -> Bools:
        """Entries that have bits set that must not be."""
        return _both(~self.compressed, self.words & RESERVED)

    def preallocated(self) -> Bools:
        """Clusters with space, of which nothing is in use."""
        if self.bitmaps is None:
            return _both(self.stored, self.words & ZERO)
        return _both(self.stored & ((self.bitmaps & ALL_ALLOCATED) == 0), self.host)

    def conflicting(self) -> Bools:
        """Subclusters that are both allocated and zero."""
        assert self.bitmaps is not None
        return _both(self.stored, self.bitmaps >> 32 & self.bitmaps & ALL_ALLOCATED)

    def nowhere(self) -> Bools:
        """Subclusters that are allocated in a cluster that is not."""
        assert self.bitmaps is not None
        return _both(~self.compressed & ~self.stored, self.bitmaps & ALL_ALLOCATED)

    def plausible(self, file_length: int) -> Bools:
        """Tables of which every entry makes sense, in a file of this length."""
        bad = self.reserved() | self.unaligned() | (self.compressed & (self.words < 0))
        bad |= self.stored & (self.host >= file_length)
        bad |= self.compressed & (self.words & ((1 << self.layout.compressed_shift) - 1) >= file_length)
        if self.bitmaps is not None:
            bad |= self.conflicting() | self.nowhere() | (self.compressed & (self.bitmaps != 0))
        good: Bools = ~np.asarray(bad.any(axis=1))
        return good

    def pack_places(self, where: Bools) -> tuple[Ints, Ints]:
        """Host offsets and sizes of the compressed clusters at `where`."""
        shift = self.layout.compressed_shift
        words = self.words[where]
        offsets = words & ((1 << shift) - 1)
        sectors = (words >> shift & ((1 << (self.layout.bits - 8)) - 1)) + 1
        return offsets, sectors * 512 - (offsets & 511)


def _both(where: Bools, bits: Ints) -> Bools:
    found: Bools = where & (bits != 0)
    return found


def decode(layout: Layout, data: bytes | bytearray, count: int) -> tuple[Ints, Ints | None]:
    """The words and bitmaps of `count` tables."""
    words = entries_of(data)
    if not layout.extended:
        return words.reshape(count, -1), None
    pairs = words.reshape(count, -1, 2)
    return np.ascontiguousarray(pairs[:, :, 0]), np.ascontiguousarray(pairs[:, :, 1])


def plain_runs(layout: Layout, words: Ints, bitmaps: Ints | None, file_length: int) -> Ints:
    """For each table the host offset where its clusters begin, if all of them are ordinary, may be written in place,
    and follow each other inside of the file; else -1. Most tables of many images are so, and need no closer look."""
    first = words[:, 0]
    offsets = first & OFFSET_MASK
    n = words.shape[1]
    # Where the flag COPIED is set, what is left of the first word must be the offset.
    good = (first < 0) & (offsets == (first & ((1 << 63) - 1))) & (offsets != 0) & ((offsets & layout.mask) == 0)
    good &= offsets + n * layout.size <= file_length
    if layout.data_file:
        good[:] = False
    for row in np.flatnonzero(good):
        table = words[row]
        # The last entry first: it is quick, and mostly decides.
        if int(table[-1]) - int(table[0]) != (n - 1) * layout.size or not (np.diff(table) == layout.size).all():
            good[row] = False
    if bitmaps is not None:
        good &= ~((bitmaps >> 32 & bitmaps & ALL_ALLOCATED) != 0).any(axis=1)
    return np.where(good, offsets, -1)
