"""Where everything goes in a new image, and the bytes of its tables.

Source: QEMU docs/interop/qcow2, sections "Header", "Host cluster management", "Cluster mapping". Clusters are given out
one after the other, in the order in which QSD comes to need them, so that images of both have the same map (but for
those whose refcount table does not fit into one cluster: here it has its size from the beginning).

Cluster numbers are host offsets divided by the cluster size; nothing here waits or does I/O.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pyqsd.drivers.formats.qcow2.refcounts import new_counts
from pyqsd.drivers.formats.qcow2.tables import COPIED, ZERO
from pyqsd.qapi.errors import from_oserror

if TYPE_CHECKING:
    import numpy as np

#: QSD allocates at most so many bytes at a time, and nothing across the end of a part of an L2 table that it caches.
_MOST_BYTES = (1 << 31) - 1
_SLICE_BYTES = 65536
#: The most of these steps that are planned: for clusters of 64 KiB 8 PiB.
_MOST_STEPS = 1 << 24


@dataclass
class Layout:
    """A new image: its parameters, and what follows from them.

    `size`: of the disk in bytes. `order`: refcounts have ``1 << order`` bits. `extended`: L2 entries have a bitmap.
    """

    size: int
    cluster_bits: int
    order: int
    extended: bool
    #: Bytes of the LUKS header (0: none) and its first cluster.
    luks_bytes: int = 0
    luks: int = 0
    #: First cluster, and number, of the refcount table.
    table: int = 1
    table_clusters: int = 1
    #: The cluster of each refcount block; 0: that one is not needed.
    blocks: array[int] = field(default_factory=lambda: array("Q"))
    l1: int = 0
    #: The cluster of each L2 table; none without preallocation.
    l2: array[int] = field(default_factory=lambda: array("Q"))
    #: Runs of data clusters in the order of the disk: first cluster and length. None: the disk's clusters are those of
    #: the data file.
    runs: array[int] | None = field(default_factory=lambda: array("Q"))
    #: Clusters before the end that are free: first and last + 1 of each run.
    free: list[tuple[int, int]] = field(default_factory=list)
    #: Preallocated clusters are zero clusters: what the file has there would be something else once it is decrypted.
    zero_clusters: bool = False
    #: The first cluster that is not used.
    end: int = 0

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def per_block(self) -> int:
        """Refcounts in a block."""
        return self.cluster_size * 8 >> self.order

    @property
    def l2_entries(self) -> int:
        """Entries of an L2 table."""
        return self.cluster_size // (16 if self.extended else 8)

    @property
    def data_clusters(self) -> int:
        """Clusters of the disk."""
        return (self.size + self.cluster_size - 1) >> self.cluster_bits

    @property
    def l1_entries(self) -> int:
        return -(-self.data_clusters // self.l2_entries)

    @property
    def l1_clusters(self) -> int:
        return (self.l1_entries * 8 + self.cluster_size - 1) >> self.cluster_bits

    @property
    def luks_clusters(self) -> int:
        return (self.luks_bytes + self.cluster_size - 1) >> self.cluster_bits

    @property
    def file_bytes(self) -> int:
        """The length of the file; what is used of its last cluster may be less than the whole."""
        if self.l1_entries and self.end == self.l1 + self.l1_clusters:
            return (self.l1 << self.cluster_bits) + self.l1_entries * 8
        return self.end << self.cluster_bits

    # --- the bytes ---------------------------------------------------------------------------------------------------

    def table_pieces(self) -> Iterator[tuple[int, bytes]]:
        """Refcount table, L1 table and refcount blocks: offset in the file, content."""
        bits = self.cluster_bits
        entries = array("Q", (block << bits for block in self.blocks))
        yield self.table << bits, _big(entries).ljust(self.table_clusters << bits, b"\0")
        if self.l1_entries:
            l1 = array("Q", (table << bits | COPIED for table in self.l2)) or array("Q", bytes(8 * self.l1_entries))
            yield self.l1 << bits, _big(l1)
        full = b""
        for index, block in enumerate(self.blocks):
            start, stop = index * self.per_block, (index + 1) * self.per_block
            if not block:
                continue
            free = [(max(a, start), min(b, stop)) for a, b in self.free if a < stop and b > start]
            whole = stop <= self.end and not free
            if whole and full:
                yield block << bits, full
                continue
            counts = new_counts(self.order, self.per_block)
            counts.set_ones(0, max(0, min(self.per_block, self.end - start)))
            for a, b in free:
                for cluster in range(a, b):
                    counts.set(cluster - start, 0)
            data = counts.encode(0, self.per_block)
            if whole:
                full = data
            yield block << bits, data

    def l2_pieces(self) -> Iterator[tuple[int, bytes]]:
        """The L2 tables, those that follow each other in one piece as far as that is not too long."""
        import numpy as np

        bits, most = self.cluster_bits, max(1, (1 << 20) >> self.cluster_bits)
        index, clusters = 0, self._data_clusters()
        while index < len(self.l2):
            first = self.l2[index]
            count = 1
            while count < most and index + count < len(self.l2) and self.l2[index + count] == first + count:
                count += 1
            table = np.zeros((count * self.l2_entries, 2 if self.extended else 1), ">u8")
            data = clusters(index * self.l2_entries, min((index + count) * self.l2_entries, self.data_clusters))
            # With subclusters none is allocated yet: they read as zeroes, or as what the backing file has.
            flags = COPIED | ZERO if self.zero_clusters and not self.extended else COPIED
            table[: len(data), 0] = data << np.uint64(bits) | np.uint64(flags)
            yield first << bits, table.tobytes()
            index += count

    def _data_clusters(self) -> _Clusters:
        return _Clusters(self.runs)


class _Clusters:
    """Where the disk's clusters are; to be asked for one range after the other."""

    def __init__(self, runs: array[int] | None) -> None:
        self._runs = runs
        self._next = 0
        self._left = (0, 0)

    def __call__(self, start: int, stop: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        import numpy as np

        if self._runs is None:
            return np.arange(start, stop, dtype=np.uint64)
        parts = []
        missing = stop - start
        while missing:
            first, count = self._left
            if not count:
                first, count = self._runs[self._next], self._runs[self._next + 1]
                self._next += 2
            taken = min(count, missing)
            parts.append(np.arange(first, first + taken, dtype=np.uint64))
            self._left = first + taken, count - taken
            missing -= taken
        return np.concatenate(parts)


def _big(entries: array[int]) -> bytes:
    entries.byteswap()
    return entries.tobytes()


class _Allocator:
    """Gives out clusters one after the other, with the refcount blocks for them."""

    def __init__(self, layout: Layout) -> None:
        self.blocks = array("Q")
        self.at = 0
        self._shift = layout.cluster_bits + 3 - layout.order

    def take(self, count: int) -> int:
        """The first of `count` clusters."""
        first = self.at
        self.at += count
        self.cover(first, count)
        return first

    def cover(self, first: int, count: int) -> None:
        """There are refcount blocks for these."""
        if not count:
            return
        last = first + count - 1 >> self._shift
        if last >= len(self.blocks) or not self.blocks[first >> self._shift]:
            for index in range(first >> self._shift, last + 1):
                self._ensure(index)

    def _ensure(self, index: int) -> None:
        if index >= len(self.blocks):
            self.blocks.extend([0] * (index + 1 - len(self.blocks)))
        if not self.blocks[index]:
            block = self.blocks[index] = self.at
            self.at += 1
            # It needs a count itself.
            self._ensure(block >> self._shift)


def plan(layout: Layout, preallocation: str, with_data_file: bool, file_bytes: int) -> None:
    """Fill in `layout`: where everything goes.

    Arguments:
        preallocation: off, metadata, falloc, full.
        with_data_file: the data goes to another file.
        file_bytes: the present length of the file.

    Raises Error if that is more than can be.
    """
    table_clusters = 1
    while True:
        pool = _Allocator(layout)
        layout.table, layout.table_clusters = 1, table_clusters
        pool.at = 1 + table_clusters
        pool.blocks.append(pool.at)
        pool.at += 1
        pool.cover(0, pool.at)
        layout.l1 = pool.take(layout.l1_clusters) if layout.l1_entries else 0
        layout.l2, layout.runs = array("Q"), array("Q")
        layout.free = []
        if with_data_file:
            layout.runs = None
        if preallocation == "off" or not layout.data_clusters:
            pass
        elif with_data_file:
            layout.l2.extend(pool.take(1) for _ in range(layout.l1_entries))
        elif preallocation == "metadata":
            _take_alternating(layout, pool)
        else:
            _take_area(layout, pool, file_bytes)
        if layout.luks_bytes:
            layout.luks = pool.take(layout.luks_clusters)
        needed = (len(pool.blocks) * 8 + layout.cluster_size - 1) >> layout.cluster_bits
        if needed <= layout.table_clusters:
            break
        table_clusters = needed
    layout.blocks = pool.blocks
    layout.end = pool.at


def _take_alternating(layout: Layout, pool: _Allocator) -> None:
    """An L2 table, its data, the next L2 table … Raises Error."""
    assert layout.runs is not None
    in_slice = min(_SLICE_BYTES, layout.cluster_size) // (16 if layout.extended else 8)
    most = _MOST_BYTES >> layout.cluster_bits
    at, total, per_table = 0, layout.data_clusters, layout.l2_entries
    if total // min(in_slice, most) > _MOST_STEPS:
        # Nobody has a disk for that; to find out would take too long.
        text = "Could not resize image: Allocating clusters failed"
        raise from_oserror(OSError(errno.EFBIG, ""), text)
    l2, runs = layout.l2, layout.runs
    while at < total:
        if at % per_table == 0:
            l2.append(pool.take(1))
        count = min(total - at, in_slice - at % in_slice, most)
        first = pool.take(count)
        if runs and runs[-2] + runs[-1] == first:
            runs[-1] += count
        else:
            runs.extend((first, count))
        at += count


def _take_area(layout: Layout, pool: _Allocator, file_bytes: int) -> None:
    """Everything for the data at once, behind the end of the file: refcount blocks, a new refcount table, the data, and
    the L2 tables, the first of which go where the table was."""
    start = max(pool.at, (file_bytes + layout.cluster_size - 1) >> layout.cluster_bits)
    data, tables = layout.data_clusters, layout.l1_entries
    have = len(pool.blocks)
    total_blocks, table_clusters = have, 1
    while True:
        end = start + (total_blocks - have) + table_clusters + data + tables + layout.luks_clusters
        wanted = -(-end // layout.per_block)
        wanted_clusters = (wanted * 8 + layout.cluster_size - 1) >> layout.cluster_bits
        if wanted <= total_blocks and wanted_clusters <= table_clusters:
            break
        total_blocks, table_clusters = max(total_blocks, wanted), max(table_clusters, wanted_clusters)
    pool.blocks.extend(range(start, start + total_blocks - have))
    old, old_clusters = layout.table, layout.table_clusters
    layout.table, layout.table_clusters = start + total_blocks - have, table_clusters
    first = layout.table + table_clusters
    layout.runs = array("Q", [first, data])
    reused = min(tables, old_clusters)
    layout.l2.extend(range(old, old + reused))
    layout.l2.extend(range(first + data, first + data + tables - reused))
    layout.free = [(a, b) for a, b in ((old + reused, old + old_clusters), (pool.at, start)) if a < b]
    pool.at = first + data + tables - reused
