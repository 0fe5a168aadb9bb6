"""Writing: in place where a cluster belongs to the active image alone, else into new clusters.

Source: QEMU docs/interop/qcow2, sections "Host cluster management", "Cluster mapping".

A new cluster gets its whole content (the guest's data and what surrounds it) before the L2 entry refers to it, in
memory and later on disk (`writeback`). Requests that allocate the same guest cluster follow each other; all others go
on in parallel.
"""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING

from pyqsd.block import iov as iovs
from pyqsd.block.driver import BACKGROUND, NO_FALLBACK
from pyqsd.drivers.formats.qcow2 import compression
from pyqsd.drivers.formats.qcow2 import header as headers
from pyqsd.drivers.formats.qcow2.refcounts import MissingBlock
from pyqsd.drivers.formats.qcow2.tables import COMPRESSED, COPIED, OFFSET_MASK, ZERO

if TYPE_CHECKING:
    from pyqsd.drivers.formats.qcow2.compression import Unpacked
    from pyqsd.drivers.formats.qcow2.image import Image
    from pyqsd.drivers.formats.qcow2.tables import Slice

#: Around a small write into a large recycled cluster, this many zero bytes or more are written as zeroes of the file.
_ZERO_CALL_FROM = 256 << 10
#: Freed space (bytes) waiting for the next flush that makes an allocation bring that about by itself.
_FREED_MOST = 64 << 20

#: New refcount blocks that may be in memory beyond the size of the cache before some must go.
_BLOCKS_MORE = 16
#: Writes to new clusters from this length (bytes) on are the worker's: the kernel has to find memory for every page of
#: them, which takes several times as long as receiving the data. For shorter ones the way there costs more.
_BACKGROUND_FROM = 512 << 10
#: After a write without waiting that did not work out, so many are not tried, and twice as many after each further one
#: in a row: the storage is slow, or passes the cache by (O_DIRECT), or what has to be copied is not in memory.
_PAUSE_FIRST = 16
_PAUSE_LONGEST = 1024

IN_PLACE = 1
REUSE = 2
ALLOCATE = 3


class InFlight:
    """A write that has not finished, to the guest clusters `first` to `last`. `allocating`: their L2 entries change."""

    __slots__ = ("allocating", "done", "first", "last")

    def __init__(self, first: int, last: int, allocating: bool) -> None:
        self.first = first
        self.last = last
        self.allocating = allocating
        self.done: asyncio.Future[None] | None = None


class Writer:
    """The write path of one image."""

    def __init__(self, image: Image, unpacked: Unpacked) -> None:
        self.image = image
        self.unpacked = unpacked
        self.in_flight: list[InFlight] = []
        self._zero_calls = True
        #: Writes that are not tried without waiting, and how many it will be after the next failure.
        self._pause = 0
        self._next_pause = _PAUSE_FIRST
        #: What is copied without waiting goes through it.
        self._scratch = memoryview(b"")

    # --- requests in flight ------------------------------------------------------------------------------------------

    def conflict(self, first: int, last: int, anything: bool) -> InFlight | None:
        """A request in flight on the guest clusters `first` to `last`: of those that allocate, or of all."""
        for other in self.in_flight:
            if other.first <= last and first <= other.last and (anything or other.allocating):
                return other
        return None

    async def wait_for(self, other: InFlight) -> None:
        """Wait until a request has finished."""
        if other.done is None:
            other.done = asyncio.get_running_loop().create_future()
        await asyncio.shield(other.done)

    def finished(self, request: InFlight) -> None:
        """The request is over."""
        self.in_flight.remove(request)
        if request.done is not None:
            request.done.set_result(None)

    # --- the request -------------------------------------------------------------------------------------------------

    async def pwritev(self, offset: int, length: int, iov: list[memoryview]) -> None:
        """Write. Raises OSError."""
        done = 0
        while done < length:
            left = length - done
            done += await self._write_some(offset + done, left, iov if left == length else iovs.part(iov, done, left))

    async def _write_some(self, offset: int, length: int, iov: list[memoryview]) -> int:
        """Write a prefix of the range, and return its length."""
        image = self.image
        l2 = image.l2
        bits = image.cluster_bits
        first = offset >> bits
        key = offset >> l2.slice_shift
        if len(image.refcounts.blocks) > image.refcounts.max_blocks + _BLOCKS_MORE:
            await self.make_room()
        while True:
            image.check_usable()
            # Nothing is decided before a wait: afterwards it all starts again.
            if self.in_flight:
                other = self.conflict(first, first, False)
                if other is not None:
                    await self.wait_for(other)
                    continue
            if image.settings.lazy_refcounts and not image.header.incompatible & headers.INCOMPAT_DIRTY:
                await image.mark_dirty()
                continue
            found = l2.slices.get(key)
            if found is None or not l2.l1[key >> l2.key_bits] & COPIED:
                await l2.load_for_write(key)
                continue
            kind, host, count = self._plan(found, offset, length)
            if count > 1 and self.in_flight:
                count = self._clip(first, count)
            if kind == ALLOCATE:
                if image.freed_clusters << bits > _FREED_MOST:
                    await image.write_back()
                    continue
                missing = (offset & ~image.cluster_mask, count) if image.external else self._allocate(count)
                if isinstance(missing, MissingBlock):
                    await image.refcounts.load_missing(missing)
                    continue
                host, count = missing
                if image.refcounts.unreserved:
                    image.refcounts.release(host >> bits, count)
                    await image.refcounts.reserve()
                    continue
            n = min(length, (count << bits) - (offset & image.cluster_mask))
            part = iov if n == length else iovs.part(iov, 0, n)
            if kind == IN_PLACE:
                await self._write_in_place(first, count, host + (offset & image.cluster_mask), n, part)
            else:
                await self._write_new(found, first, count, host, offset, n, part, kind == ALLOCATE)
            return n

    async def make_room(self) -> None:
        """Before an allocation: not more may be in memory, or wait to be free, than is bearable. Raises OSError."""
        image = self.image
        if len(image.refcounts.blocks) > image.refcounts.max_blocks + _BLOCKS_MORE:
            await image.refcounts.make_room()
        if image.freed_clusters << image.cluster_bits > _FREED_MOST:
            await image.write_back()

    def _clip(self, first: int, count: int) -> int:
        """Leave out what comes after a cluster that another request is allocating."""
        for other in self.in_flight:
            if other.allocating and first < other.first < first + count:
                count = other.first - first
        return count

    def _allocate(self, count: int) -> tuple[int, int] | MissingBlock:
        """Up to `count` new clusters: (host offset, how many), or the refcount block that must be loaded first."""
        image = self.image
        if image.file.debug_event is not None:
            image.event("cluster_alloc")
        try:
            cluster, got = image.refcounts.allocate_now(count)
        except MissingBlock as missing:
            return missing
        return cluster << image.cluster_bits, got

    def _plan(self, found: Slice, offset: int, length: int) -> tuple[int, int, int]:
        """How to write to the clusters from `offset` on: (what to do, host offset of the first one, how many)."""
        image = self.image
        bits = image.cluster_bits
        entries = found.entries
        at = (offset >> bits) & (image.l2.slice_entries - 1)
        most = min(image.l2.slice_entries, at + ((offset & image.cluster_mask) + length + image.cluster_mask >> bits))
        kind, host = self._classify(entries[at], found, at)
        end = at + 1
        if kind == ALLOCATE:
            while end < most and self._classify(entries[end], found, end)[0] == ALLOCATE:
                end += 1
            return kind, 0, end - at
        following = host
        while end < most:
            following += image.cluster_size
            if self._classify(entries[end], found, end) != (kind, following):
                break
            end += 1
        return kind, host, end - at

    def _classify(self, entry: int, found: Slice, index: int) -> tuple[int, int]:
        """What a write has to do with the cluster of an L2 entry, and the host offset where that matters."""
        image = self.image
        if image.external:
            image.check_external(found, index, entry)
        if entry & COMPRESSED:
            return ALLOCATE, 0
        host = entry & OFFSET_MASK
        if host & image.cluster_mask:
            raise image.bad_entry(found, index, "Cluster allocation offset {host:#x} unaligned", host)
        if entry & ZERO and image.header.version < 3:
            raise image.bad_entry(found, index, "Zero cluster entry found in pre-v3 image", host)
        if entry & COPIED and (host or (image.external and not entry & ZERO)):
            return (REUSE, host) if entry & ZERO else (IN_PLACE, host)
        return ALLOCATE, 0

    # --- into new clusters, without waiting --------------------------------------------------------------------------

    def write_now(self, offset: int, length: int, iov: list[memoryview]) -> int:
        """Do to a prefix of the range what `pwritev` does, where nothing is stored yet, and return its length; 0 if
        that takes waiting, and nothing but space that is not in use has changed then. Raises OSError.

        From the look at the tables to the new entry nobody else has a turn, so that the request is in nobody's way."""
        image = self.image
        if self._pause:
            self._pause -= 1
            return 0
        l2 = image.l2
        refcounts = image.refcounts
        bits = image.cluster_bits
        key = offset >> l2.slice_shift
        found = l2.slices.get(key)
        if (
            found is None
            or not l2.l1[key >> l2.key_bits] & COPIED
            or image.external
            or not length
            or not image.node.active
            or image.file.debug_event is not None
            or (image.settings.lazy_refcounts and not image.header.incompatible & headers.INCOMPAT_DIRTY)
            or image.freed_clusters << bits > _FREED_MOST
            or len(refcounts.blocks) > refcounts.max_blocks + _BLOCKS_MORE
        ):
            return 0
        plan = self._plan_now(found, offset, length)
        if plan is None:
            return 0
        host, count = plan
        first = offset >> bits
        if self.in_flight and self.conflict(first, first + count - 1, False) is not None:
            return 0
        n = (count << bits) - (offset & image.cluster_mask)
        if n >= length:
            n = length
        else:
            iov = iovs.part(iov, 0, n)
        at = first & (l2.slice_entries - 1)
        head = tail = 0
        before = after = None
        if (offset | n) & (image.unit_size - 1):
            start, stop = self._edges(found, at, count, offset, n, not host)
            head, tail = offset - start, stop - offset - n
            if stop - start >= _BACKGROUND_FROM:
                return 0
            surroundings = self._surroundings_now(found, at, count, offset, n, head, tail)
            if surroundings is None:
                self._not_now()
                return 0
            before, after = surroundings
        elif n >= _BACKGROUND_FROM:
            return 0
        fresh = False
        if host:
            image.check_data_overlap(host >> bits, 1)
            place = host
        else:
            if (refcounts.hint + count) << bits > image.data.length:
                # The file has to grow before.
                return 0
            try:
                cluster, got = refcounts.allocate_now(count)
            except MissingBlock:
                return 0
            place = cluster << bits
            end = place + (count << bits)
            if got != count or refcounts.unreserved or end > image.data.length:
                refcounts.release(cluster, got)
                return 0
            fresh = place >= image.touched_end and not image.encrypted
            if end > image.touched_end:
                image.touched_end = end
        size = n
        to = place + (offset & image.cluster_mask)
        if head and (before is not None or not fresh):
            iov = (iovs.zero_views(head) if before is None else [before]) + iov
            to -= head
            size += head
        else:
            head = 0
        if tail and (after is not None or not fresh):
            iov = iov + (iovs.zero_views(tail) if after is None else [after])
            size += tail
        if not self._store_now(to, offset - head, size, iov):
            if not host:
                refcounts.release(cluster, count)
            self._not_now()
            return 0
        self._next_pause = _PAUSE_FIRST
        found.used = True
        self._link(found, at, count, place, offset, n)
        return n

    def _not_now(self) -> None:
        self._pause = self._next_pause
        self._next_pause = min(2 * self._next_pause, _PAUSE_LONGEST)

    def _plan_now(self, found: Slice, offset: int, length: int) -> tuple[int, int] | None:
        """The clusters from `offset` on in which nothing is stored: (host offset of the one that is to be used, 0 for
        new ones; how many). None if there are none, or if this needs a closer look."""
        image = self.image
        entries = found.entries
        at = (offset >> image.cluster_bits) & (image.l2.slice_entries - 1)
        entry = entries[at]
        if entry and (entry != ZERO or image.header.version < 3):
            return None
        most = min(image.l2.slice_entries, at + ((offset & image.cluster_mask) + length - 1 >> image.cluster_bits) + 1)
        end = at + 1
        while end < most and entries[end] == entry:
            end += 1
        return 0, end - at

    def _surroundings_now(
        self, found: Slice, at: int, count: int, offset: int, length: int, head: int, tail: int
    ) -> tuple[memoryview | None, memoryview | None] | None:
        """What the backing file has in the `head` bytes before the range and the `tail` bytes behind it, each None
        where that is zero. None if it has to be waited for."""
        last = at + count - 1
        end = offset + length
        has_head = head and self._has_content(found, at, offset - head, head)
        has_tail = tail and self._has_content(found, last, end, tail)
        if not has_head and not has_tail:
            return None, None
        whole = head + length + tail
        if len(self._scratch) < whole:
            self._scratch = iovs.aligned_buffer(max(whole, self.image.cluster_size))
        scratch = self._scratch
        if has_head and has_tail and whole <= self.image.unit_size:
            # One read for all of it.
            if not self._read_backing_now(offset - head, scratch[:whole]):
                return None
            return scratch[:head], scratch[head + length : whole]
        before = after = None
        if has_head:
            before = scratch[:head]
            if not self._read_backing_now(offset - head, before):
                return None
        if has_tail:
            after = scratch[head : head + tail]
            if not self._read_backing_now(end, after):
                return None
        return before, after

    def _read_backing_now(self, offset: int, data: memoryview) -> bool:
        """Fill `data` with what the backing file has at `offset`, as `_read_backing` does, if that takes no waiting."""
        backing = self.image.backing
        assert backing is not None
        length = len(data)
        n = max(0, min(length, self.image.node.length - offset, backing.length - offset))
        if n < length:
            iovs.fill_zero([data[n:]])
            data = data[:n]
        return not n or backing.read_now(offset, n, [data])

    def _store_now(self, host: int, guest: int, length: int, iov: list[memoryview]) -> bool:
        """`store`, if that takes no waiting."""
        return self.image.data.write_now(host, length, iov)

    # --- in place ----------------------------------------------------------------------------------------------------

    async def _write_in_place(self, first: int, count: int, host: int, length: int, iov: list[memoryview]) -> None:
        image = self.image
        image.check_data_overlap(host >> image.cluster_bits, count)
        data = image.data
        if data.write_now(host, length, iov):
            return
        image.event("write_aio")
        request = InFlight(first, first + count - 1, False)
        self.in_flight.append(request)
        try:
            await data.pwritev(host, length, iov)
        finally:
            self.finished(request)

    # --- into new clusters -------------------------------------------------------------------------------------------

    async def _write_new(
        self,
        found: Slice,
        first: int,
        count: int,
        host: int,
        offset: int,
        length: int,
        iov: list[memoryview],
        allocated: bool,
    ) -> None:
        """Fill the `count` clusters at `host` and make the L2 entries refer to them. `allocated`: they are new, else
        they are the preallocated ones of zero clusters."""
        image = self.image
        request = InFlight(first, first + count - 1, True)
        self.in_flight.append(request)
        found.pins += 1
        try:
            if not allocated:
                image.check_data_overlap(host >> image.cluster_bits, count)
            try:
                await self._fill(found, first, count, host, offset, length, iov, allocated)
            except OSError as exc:
                if exc.errno != errno.ENOSPC or not image.frees:
                    raise
                # Space that was freed but is not free on disk yet may help.
                await image.write_back()
                await self._fill(found, first, count, host, offset, length, iov, allocated)
            self._link(found, first & (image.l2.slice_entries - 1), count, host, offset, length)
        except (OSError, asyncio.CancelledError):
            if allocated and not image.external:
                image.refcounts.release(host >> image.cluster_bits, count)
            raise
        finally:
            found.pins -= 1
            self.finished(request)

    def _link(self, found: Slice, at: int, count: int, host: int, offset: int, length: int) -> None:
        """Make `count` entries from index `at` on refer to the clusters at `host`, into which the range has been
        written."""
        image = self.image
        entries = found.entries
        size = image.cluster_size
        for index in range(at, at + count):
            old = entries[index]
            entries[index] = host | COPIED
            if old & COMPRESSED or old & OFFSET_MASK not in (0, host):
                self.drop(old, "never")
            host += size
        image.l2.touched(found, at, at + count)
        image.barrier = True

    def drop(self, entry: int, kind: str) -> None:
        """The L2 entry does not refer to its cluster any more."""
        image = self.image
        if image.external:
            # Clusters of a data file have no counts.
            return
        if entry & COMPRESSED:
            first, count = compression.clusters(entry, image.cluster_bits)
            self.unpacked.forget()
            image.free_later(first, count, kind)
        elif entry & OFFSET_MASK:
            image.free_later((entry & OFFSET_MASK) >> image.cluster_bits, 1, kind)

    def _edges(self, found: Slice, at: int, count: int, offset: int, length: int, allocated: bool) -> tuple[int, int]:
        """The guest range that must be written so that the clusters can be linked: whole clusters."""
        mask = self.image.cluster_mask
        return offset & ~mask, (offset + length + mask) & ~mask

    async def _fill(
        self,
        found: Slice,
        first: int,
        count: int,
        host: int,
        offset: int,
        length: int,
        iov: list[memoryview],
        allocated: bool,
    ) -> None:
        """Write the guest's data and, before and after it in the first and last cluster, what was there."""
        image = self.image
        if image.external:
            fresh = host >= image.data.length
        else:
            # What lies beyond everything ever written is a hole in the file.
            fresh = host >= image.touched_end
            end = host + (count << image.cluster_bits)
            if end > image.touched_end:
                image.touched_end = end
        if image.encrypted:
            # Zeroes on the disk are something else in the file.
            fresh = False
        at = first & (image.l2.slice_entries - 1)
        start, stop = self._edges(found, at, count, offset, length, allocated)
        head = offset - start
        tail = stop - offset - length
        host += start - (first << image.cluster_bits)
        if head or tail:
            before = after = None
            last = at + count - 1
            if head and tail and count == 1 and self._has_content(found, at, start, stop - start):
                # One read for all of it.
                whole = await self._old_content(found, at, start, stop - start)
                before, after = whole[:head], whole[head + length :]
            else:
                if head and self._has_content(found, at, start, head):
                    before = await self._old_content(found, at, start, head)
                if tail and self._has_content(found, last, offset + length, tail):
                    after = await self._old_content(found, last, offset + length, tail)
            image.event("cow_write")
            if not fresh:
                zeroes = (head if before is None else 0) + (tail if after is None else 0)
                # A data file is kept sparse, as it may be used by itself.
                if zeroes >= (1 if image.external else _ZERO_CALL_FROM) and self._zero_calls:
                    fresh = await self._zero_by_call(host, stop - start)
            if head and not (fresh and before is None):
                iov = (iovs.zero_views(head) if before is None else [before]) + iov
                length += head
                head = 0
            if tail and not (fresh and after is None):
                iov = iov + (iovs.zero_views(tail) if after is None else [after])
                length += tail
        if host + head + length > image.data.length and not image.external:
            await image.reserve(host + head + length)
        if image.file.debug_event is not None:
            image.event("write_aio")
        await self.store(host + head, start + head, length, iov, BACKGROUND if length >= _BACKGROUND_FROM else 0)

    async def store(self, host: int, guest: int, length: int, iov: list[memoryview], flags: int) -> None:
        """Write the content of new clusters to the offset `host` of the data file; `guest` is that on the disk."""
        data = self.image.data
        if flags or not data.write_now(host, length, iov):
            await data.pwritev(host, length, iov, flags)

    async def _fetch(self, host: int, guest: int, view: memoryview) -> None:
        """Read what is stored at the offset `host` of the data file; `guest` is that on the disk."""
        data, iov = self.image.data, [view]
        if not data.read_now(host, len(view), iov):
            await data.preadv(host, len(view), iov)

    async def _zero_by_call(self, host: int, length: int) -> bool:
        self.image.event("cluster_alloc_space")
        try:
            await self.image.data.pwrite_zeroes(host, length, NO_FALLBACK)
        except OSError as exc:
            if exc.errno not in (errno.ENOTSUP, errno.EOPNOTSUPP):
                raise
            self._zero_calls = False
            return False
        return True

    def _has_content(self, found: Slice, index: int, offset: int, length: int) -> bool:
        """Whether a piece of a guest cluster, before the write, may be other than zero."""
        entry = found.entries[index]
        if entry & COMPRESSED:
            return True
        if entry & ZERO:
            return False
        if entry & self.image.place_mask:
            return True
        backing = self.image.backing
        return backing is not None and offset < min(backing.length, self.image.node.length)

    async def _old_content(self, found: Slice, index: int, offset: int, length: int) -> memoryview:
        """A piece of one guest cluster as it is before the write. Raises OSError."""
        image = self.image
        entry = found.entries[index]
        within = offset & image.cluster_mask
        if entry & COMPRESSED:
            plain = await self.unpacked.read(entry)
            return memoryview(plain)[within : within + length]
        data = memoryview(bytearray(length))
        if entry & image.place_mask:
            image.event("cow_read")
            await self._fetch((entry & OFFSET_MASK) + within, offset, data)
        else:
            await self._read_backing(offset, data)
        return data

    async def _read_backing(self, offset: int, data: memoryview) -> None:
        """Fill `data`, all zero so far, with what the backing file has at `offset`. Raises OSError."""
        backing = self.image.backing
        assert backing is not None
        # What is beyond the end of this disk must stay zero, should it grow one day.
        n = min(len(data), max(0, self.image.node.length - offset))
        self.image.event("cow_read")
        iov = [data[:n]]
        if n and not backing.read_now(offset, n, iov):
            await backing.preadv(offset, n, iov)
