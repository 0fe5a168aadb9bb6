"""How often each cluster of an image file is referred to."""

from __future__ import annotations

import errno

import numpy as np

from pyqsd.drivers.formats.qcow2.check.arrays import Counts, Ints, grouped

#: Counters are kept for so many clusters together, and only where there is a reference.
CHUNK_BITS = 14
_CHUNK = 1 << CHUNK_BITS
#: A hostile image must not make us take more memory than this.
_MOST_BYTES = 512 << 20
#: References this far beyond the end of the file (bytes) are remembered, up to a number.
_NEAR = 1 << 40
_MOST_DANGLING = 1 << 20
#: The highest count that is kept, whatever the width of a refcount.
_MOST_COUNTED = (1 << 32) - 1


class References:
    """Counters for all clusters of a file of `file_length` bytes, which stop at the highest refcount that the image
    can store.

    `end`: the first cluster number beyond the file and all that was counted; `overflows`: references that had no room
    in a counter (`overflowed`: there were some); `beyond`: spans that lie beyond the end of the file and were not
    counted (one cluster beyond it is what a crash may leave behind, and is).
    """

    def __init__(self, order: int, cluster_bits: int, file_length: int) -> None:
        self.order = order
        self.bits = cluster_bits
        self.file_length = file_length
        self.end = (file_length + (1 << cluster_bits) - 1) >> cluster_bits
        self.maximum = min((1 << (1 << order)) - 1, _MOST_COUNTED)
        self.overflows = 0
        self.overflowed = False
        self.beyond = 0
        self.chunks: dict[int, Counts] = {}
        #: Spans that were not counted, but begin not far beyond the end: (first, last) clusters.
        self._dangling: list[tuple[Ints, Ints]] = []
        self._dangling_count = 0
        self._type = np.dtype(np.uint8 if order <= 3 else np.uint16 if order == 4 else np.uint32)
        self._most_chunks = _MOST_BYTES // (_CHUNK * self._type.itemsize)

    def add_bytes(self, offset: int, length: int, times: int = 1) -> None:
        """A structure of `length` bytes at `offset`."""
        if length <= 0:
            return
        if offset + length - self.file_length >= 1 << self.bits:
            self.beyond += times
            self._dangle(np.array([offset]), np.array([offset + length]))
            return
        first = offset >> self.bits
        self.add_run(first, ((offset + length - 1) >> self.bits) - first + 1, times)

    def add_spans(self, offsets: Ints, lengths: Ints | int, times: int = 1) -> None:
        """Many structures, each at one of `offsets`, `times` times each."""
        ends = offsets + lengths
        inside = ends - self.file_length < 1 << self.bits
        if not inside.all():
            self.beyond += times * int(np.count_nonzero(~inside))
            self._dangle(offsets[~inside], ends[~inside])
            offsets, ends = offsets[inside], ends[inside]
        first = offsets >> self.bits
        more = (ends - 1 >> self.bits) - first
        self.add(first, times)
        for step in range(1, int(more.max(initial=0)) + 1):
            self.add(first[more >= step] + step, times)

    def _dangle(self, offsets: Ints, ends: Ints) -> None:
        near = offsets - self.file_length < _NEAR
        if near.any() and self._dangling_count < _MOST_DANGLING:
            self._dangling.append((offsets[near] >> self.bits, ends[near] - 1 >> self.bits))
            self._dangling_count += int(np.count_nonzero(near))

    def undangled(self, start: int, count: int) -> int:
        """The first cluster from `start` on with `count` clusters behind the end of the file that nothing refers to."""
        if not self._dangling:
            return start
        first = np.concatenate([one[0] for one in self._dangling])
        last = np.concatenate([one[1] for one in self._dangling])
        while True:
            hit = (first < start + count) & (last >= start)
            if not hit.any():
                return start
            start = int(last[hit].max()) + 1

    def add_run(self, first: int, count: int, times: int = 1) -> None:
        """`count` clusters from `first` on, which exist."""
        at, end = first, first + count
        self.end = max(self.end, end)
        while at < end:
            stop = min(end, (at | (_CHUNK - 1)) + 1)
            base = at & -_CHUNK
            part = self._chunk(at >> CHUNK_BITS)[at - base : stop - base]
            if times <= self.maximum and not part.any():
                part[:] = times
            else:
                part[:] = self._limited(part.astype(np.int64) + times)
            at = stop

    def add(self, clusters: Ints, times: int = 1) -> None:
        """Clusters that exist, in any order, also several times."""
        if not len(clusters):
            return
        low, high = int(clusters.min()), int(clusters.max())
        self.end = max(self.end, high + 1)
        if high - low < 4 * len(clusters) + 4096:
            self._add_dense(low, np.bincount(clusters - low).astype(np.int64) * times)
            return
        found, counts = np.unique(clusters, return_counts=True)
        for number, positions in grouped(found >> CHUNK_BITS):
            chunk = self._chunk(number)
            where = found[positions] & (_CHUNK - 1)
            chunk[where] = self._limited(chunk[where].astype(np.int64) + counts[positions] * times)

    def _add_dense(self, low: int, counts: Ints) -> None:
        at, end = low, low + len(counts)
        while at < end:
            stop = min(end, (at | (_CHUNK - 1)) + 1)
            new = counts[at - low : stop - low]
            if new.any():
                base = at & -_CHUNK
                part = self._chunk(at >> CHUNK_BITS)[at - base : stop - base]
                part[:] = self._limited(part.astype(np.int64) + new)
            at = stop

    def _limited(self, counts: Ints) -> Ints:
        if int(counts.max(initial=0)) > self.maximum:
            self.overflowed = True
            self.overflows += int(np.maximum(counts - self.maximum, 0).sum())
            return np.minimum(counts, self.maximum)
        return counts

    def _chunk(self, number: int) -> Counts:
        chunk = self.chunks.get(number)
        if chunk is None:
            if len(self.chunks) >= self._most_chunks:
                raise OSError(errno.ENOMEM, "The image is too large to be checked")
            chunk = self.chunks[number] = np.zeros(_CHUNK, self._type)
        return chunk

    def run(self, first: int, count: int) -> Counts:
        """The counts of `count` clusters from `first` on."""
        number, base = first >> CHUNK_BITS, first & (_CHUNK - 1)
        if base + count <= _CHUNK:
            chunk = self.chunks.get(number)
            return np.zeros(count, self._type) if chunk is None else chunk[base : base + count]
        counts = np.zeros(count, self._type)
        at, end = first, first + count
        while at < end:
            stop = min(end, (at | (_CHUNK - 1)) + 1)
            chunk = self.chunks.get(at >> CHUNK_BITS)
            if chunk is not None:
                base = at & -_CHUNK
                counts[at - first : stop - first] = chunk[at - base : stop - base]
            at = stop
        return counts

    def get(self, clusters: Ints) -> Ints:
        """The counts of these clusters."""
        counts = np.zeros(len(clusters), np.int64)
        for number, where in grouped(clusters >> CHUNK_BITS):
            chunk = self.chunks.get(number)
            if chunk is not None:
                counts[where] = chunk[clusters[where] & (_CHUNK - 1)]
        return counts

    def used_blocks(self, block_bits: int) -> list[int]:
        """Which groups of ``1 << block_bits`` clusters have a reference, ascending."""
        if block_bits >= CHUNK_BITS:
            shift = block_bits - CHUNK_BITS
            return sorted({number >> shift for number, chunk in self.chunks.items() if chunk.any()})
        shift = CHUNK_BITS - block_bits
        return [
            (number << shift) + index
            for number in sorted(self.chunks)
            for index in np.flatnonzero(self.chunks[number].reshape(-1, 1 << block_bits).any(axis=1)).tolist()
        ]

    def last(self) -> int:
        """The last cluster with a reference."""
        for number in sorted(self.chunks, reverse=True):
            used = np.flatnonzero(self.chunks[number])
            if len(used):
                return (number << CHUNK_BITS) + int(used[-1])
        return 0

    def above(self, most: int) -> tuple[int, int] | None:
        """The first cluster with more than `most` references, and how many it has."""
        for number in sorted(self.chunks):
            too_many = np.flatnonzero(self.chunks[number] > min(most, _MOST_COUNTED))
            if len(too_many):
                return (number << CHUNK_BITS) + int(too_many[0]), int(self.chunks[number][too_many[0]])
        return None
