"""Writing compressed clusters: packed by worker threads, and stored one behind the other, byte by byte.

Source: QEMU docs/interop/qcow2, section "Cluster mapping" (compressed clusters descriptor).

Several compressed clusters share a host cluster, whose count is how many of them touch it. The order on disk is that of
all new clusters: counts and data are durable before an L2 entry refers to them (`writeback`).
"""

from __future__ import annotations

import asyncio
import errno
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING

from zlib_ng import zlib_ng

from pyqsd.block import iov as iovs
from pyqsd.drivers.formats.qcow2 import header as headers
from pyqsd.drivers.formats.qcow2.compression import zstd_module
from pyqsd.drivers.formats.qcow2.refcounts import MissingBlock
from pyqsd.drivers.formats.qcow2.tables import COMPRESSED, COPIED, OFFSET_MASK
from pyqsd.drivers.formats.qcow2.write import InFlight

if TYPE_CHECKING:
    from pyqsd.drivers.formats.qcow2.image import Image
    from pyqsd.drivers.formats.qcow2.tables import Slice
    from pyqsd.drivers.formats.qcow2.write import Writer

#: So much of a request (bytes) is packed at a time.
_PIECE = 4 << 20
#: QEMU unpacks with a window of 4 KiB.
_WINDOW_BITS = -12
_ZSTD_LEVEL = 3


@cache
def _workers() -> ThreadPoolExecutor:
    """The threads that pack, as many as there are cores."""
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)), "qcow2-pack")


def pack(kind: int, data: bytes) -> bytes | None:
    """A cluster compressed, or None if that is not smaller."""
    if kind == headers.COMPRESSION_ZLIB:
        packer = zlib_ng.compressobj(zlib_ng.Z_DEFAULT_COMPRESSION, zlib_ng.DEFLATED, _WINDOW_BITS, 9)
        packed = packer.compress(data) + packer.flush()
    else:
        packed = _pack_zstd(data)
    return packed if len(packed) < len(data) else None


def _pack_zstd(data: bytes) -> bytes:
    return bytes(zstd_module().compress(data, level=_ZSTD_LEVEL))


def descriptor(host: int, size: int, cluster_bits: int) -> int:
    """The L2 entry of `size` compressed bytes at `host`. Raises OSError if that is too far into the file."""
    shift = 62 - (cluster_bits - 8)
    if host + size > min(1 << shift, 1 << 56):
        raise OSError(errno.EFBIG, "The image file would be too large")
    sectors = ((host + size - 1) >> 9) - (host >> 9)
    return COMPRESSED | sectors << shift | host


class Packer:
    """Writes compressed clusters to one image."""

    def __init__(self, image: Image, writer: Writer) -> None:
        self.image = image
        self.writer = writer
        #: Where the free rest of the cluster begins that is being filled, `Refcounts.shared`.
        self._rest = 0
        self._placing = asyncio.Lock()

    async def write(self, offset: int, length: int, iov: list[memoryview]) -> None:
        """Write whole clusters compressed; only at the end of the disk the last one may be a part of one. What does not
        become smaller is written as it is. Raises OSError: EINVAL for anything else, EIO where clusters are allocated
        already."""
        image = self.image
        if image.external or image.encrypted:
            raise OSError(errno.ENOTSUP, "compressed")
        end = offset + length
        if offset & image.cluster_mask or (end & image.cluster_mask and end != image.node.length):
            raise OSError(errno.EINVAL, "not whole clusters")
        for at in range(0, length, _PIECE):
            n = min(_PIECE, length - at)
            await self._write_piece(offset + at, n, iovs.part(iov, at, n))

    async def _write_piece(self, offset: int, length: int, iov: list[memoryview]) -> None:
        image = self.image
        loop = asyncio.get_running_loop()
        kind, size = image.header.compression_type, image.cluster_size
        jobs = []
        for at in range(0, length, size):
            n = min(size, length - at)
            # A copy: the buffers are the caller's again if it is cancelled.
            plain = b"".join(iovs.part(iov, at, n)).ljust(size, b"\0")
            jobs.append(loop.run_in_executor(_workers(), pack, kind, plain))
        packed = await asyncio.gather(*jobs)
        first = offset >> image.cluster_bits
        at = 0
        while at < len(packed):
            stop = at + 1
            while stop < len(packed) and (packed[stop] is None) == (packed[at] is None):
                stop += 1
            if packed[at] is None:
                # It stays as it is.
                start = at * size
                n = min(stop * size, length) - start
                await self.writer.pwritev(offset + start, n, iovs.part(iov, start, n))
            else:
                await self._store(first + at, [piece for piece in packed[at:stop] if piece is not None])
            at = stop

    async def _store(self, first: int, packed: list[bytes]) -> None:
        """Store compressed clusters for the guest clusters from `first` on."""
        last = first + len(packed) - 1
        while (other := self.writer.conflict(first, last, True)) is not None:
            await self.writer.wait_for(other)
        request = InFlight(first, last, True)
        self.writer.in_flight.append(request)
        #: Places that nothing refers to yet, and their sizes.
        placed: list[tuple[int, int]] = []
        try:
            for number in range(len(packed)):
                found = await self._slice(first + number)
                if found.entries[self._index(first + number)] & (COMPRESSED | OFFSET_MASK):
                    # Nothing is overwritten, as in QSD.
                    raise OSError(errno.EIO, "Cluster is already allocated")
            for data in packed:
                placed.append((await self._place(len(data)), len(data)))
            await self._write_out(placed, packed)
            for cluster in range(first, last + 1):
                found = await self._slice(cluster)
                self._link(found, cluster, *placed[0])
                del placed[0]
        except BaseException:
            for host, size in placed:
                self._give_up(host, size)
            raise
        finally:
            self.writer.finished(request)

    def _index(self, cluster: int) -> int:
        l2 = self.image.l2
        return (cluster & (l2.slice_entries - 1)) * l2.words

    async def _slice(self, cluster: int) -> Slice:
        """The slice with the entry of a guest cluster, which may be changed until the next wait."""
        image, l2 = self.image, self.image.l2
        key = cluster >> l2.slice_bits
        while True:
            image.check_usable()
            if image.settings.lazy_refcounts and not image.header.incompatible & headers.INCOMPAT_DIRTY:
                await image.mark_dirty()
                continue
            found = l2.slices.get(key)
            if found is not None and l2.l1[key >> l2.key_bits] & COPIED:
                return found
            await l2.load_for_write(key)

    async def _place(self, size: int) -> int:
        """Find a place for `size` bytes, and count it. Raises OSError."""
        image, refcounts = self.image, self.image.refcounts
        bits = image.cluster_bits
        await self.writer.make_room()
        async with self._placing:
            while True:
                open_cluster = refcounts.shared
                try:
                    fits = open_cluster >= 0 and self._rest + size <= (open_cluster + 1) << bits
                    if fits and refcounts.increase_now(open_cluster):
                        return self._take(open_cluster, self._rest, size)
                    # Beyond the end of it, if the next one is free and it may have one more reference.
                    cluster, _ = refcounts.allocate_now(1)
                except MissingBlock as missing:
                    await refcounts.load_missing(missing)
                    continue
                if refcounts.unreserved:
                    refcounts.release(cluster, 1)
                    await refcounts.reserve()
                    continue
                image.touched_end = max(image.touched_end, (cluster + 1) << bits)
                host = cluster << bits
                if cluster == open_cluster + 1 and open_cluster >= 0 and self._rest < host:
                    try:
                        if refcounts.increase_now(open_cluster):
                            host = self._rest
                    except MissingBlock:
                        # It goes to the beginning of the new one.
                        pass
                return self._take(cluster, host, size)

    def _take(self, cluster: int, host: int, size: int) -> int:
        self._rest = host + size
        full = self._rest == (cluster + 1) << self.image.cluster_bits
        self.image.refcounts.shared = -1 if full else cluster
        return host

    async def _write_out(self, placed: list[tuple[int, int]], packed: list[bytes]) -> None:
        """Write the compressed data, neighbours together."""
        image = self.image
        at = 0
        while at < len(packed):
            host, end, stop = placed[at][0], placed[at][0], at
            while stop < len(packed) and placed[stop][0] == end:
                end += placed[stop][1]
                stop += 1
            first = host >> image.cluster_bits
            image.check_overlap(first, ((end - 1) >> image.cluster_bits) - first + 1)
            whole = (end + image.cluster_mask) & ~image.cluster_mask
            if whole > image.file.length:
                await image.reserve(whole)
            image.event("write_compressed")
            iov = [memoryview(piece) for piece in packed[at:stop]]
            if not image.file.write_now(host, end - host, iov):
                await image.file.pwritev(host, end - host, iov)
            at = stop

    def _link(self, found: Slice, cluster: int, host: int, size: int) -> None:
        image = self.image
        image.event("l2_update_compressed")
        index = self._index(cluster)
        found.entries[index] = descriptor(host, size, image.cluster_bits)
        if image.l2.words == 2:
            found.entries[index + 1] = 0
        at = index // image.l2.words
        image.l2.touched(found, at, at + 1)
        image.barrier = True

    def _give_up(self, host: int, size: int) -> None:
        first = host >> self.image.cluster_bits
        last = (host + size - 1) >> self.image.cluster_bits
        self.image.free_later(first, last - first + 1, "never")
