"""Compressed clusters: where they are, and unpacking them with bounded memory.

Source: QEMU docs/interop/qcow2, sections "Cluster mapping" (compressed clusters descriptor), "compression_type".
"""

from __future__ import annotations

import asyncio
import errno
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING

from pyqsd.drivers.formats.qcow2 import header as headers

if TYPE_CHECKING:
    from pyqsd.drivers.formats.qcow2.image import Image

#: From this size on (bytes, unpacked) worker threads do it.
_WORKER_FROM = 32 << 10
#: Bytes of unpacked clusters that are kept.
_KEEP_BYTES = 4 << 20


def location(entry: int, cluster_bits: int) -> tuple[int, int]:
    """The host offset of the compressed data of an L2 entry and its size in bytes, whole sectors at the end."""
    shift = 62 - (cluster_bits - 8)
    offset = entry & ((1 << shift) - 1) & ((1 << 56) - 1)
    sectors = (entry >> shift & ((1 << (cluster_bits - 8)) - 1)) + 1
    return offset, sectors * 512 - (offset & 511)


def clusters(entry: int, cluster_bits: int) -> tuple[int, int]:
    """The host clusters that the compressed data touches: (first, how many)."""
    offset, size = location(entry, cluster_bits)
    first = offset >> cluster_bits
    return first, ((offset + size - 1) >> cluster_bits) - first + 1


def unpack(kind: int, data: bytes | bytearray | memoryview, size: int) -> bytes:
    """The first `size` bytes of what `data` decompresses to. Raises OSError if there are fewer."""
    if kind == headers.COMPRESSION_ZLIB:
        try:
            plain = zlib.decompressobj(-15).decompress(data, size)
        except zlib.error:
            raise OSError(errno.EIO, "Compressed cluster is damaged") from None
    else:
        plain = _unpack_zstd(data, size)
    if len(plain) != size:
        raise OSError(errno.EIO, "Compressed cluster is damaged")
    return plain


def _unpack_zstd(data: bytes | bytearray | memoryview, size: int) -> bytes:
    try:
        from compression import zstd  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        from backports import zstd
    plain = b""
    rest: bytes | bytearray | memoryview = data
    try:
        # A cluster may be several frames.
        while len(plain) < size and rest:
            decoder = zstd.ZstdDecompressor()
            piece = decoder.decompress(rest, max_length=size - len(plain))
            if not piece and not decoder.eof:
                break
            plain += piece
            if not decoder.eof:
                break
            rest = decoder.unused_data
    except zstd.ZstdError:
        raise OSError(errno.EIO, "Compressed cluster is damaged") from None
    return plain


@cache
def workers() -> ThreadPoolExecutor:
    """The threads that pack and unpack, as many as there are cores."""
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)), "qcow2-pack")


def _unpack_all(kind: int, pieces: list[memoryview], size: int) -> list[bytes]:
    return [unpack(kind, data, size) for data in pieces]


class Unpacked:
    """The compressed clusters of an image that were read last, unpacked."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._kept: dict[int, bytes] = {}
        self._most = max(1, _KEEP_BYTES >> image.cluster_bits)
        self._reading: dict[int, asyncio.Future[None]] = {}
        #: Counts how often compressed data may have gone or changed.
        self.generation = 0

    def forget(self) -> None:
        """Compressed data may have gone or changed."""
        self.generation += 1
        self._kept.clear()

    async def read(self, entry: int) -> bytes:
        """The content of the cluster that the L2 entry `entry` describes. Raises OSError."""
        return (await self.read_all([entry]))[0]

    async def read_all(self, entries: list[int]) -> list[bytes]:
        """The contents of the clusters that these L2 entries describe. Raises OSError."""
        kept = self._kept
        while any(entry in self._reading for entry in entries):
            # Read and unpacked once only, however many ask for it.
            for entry in entries:
                if (other := self._reading.get(entry)) is not None:
                    await asyncio.shield(other)
        missing = [entry for entry in dict.fromkeys(entries) if entry not in kept]
        if not missing:
            return [kept[entry] for entry in entries]
        generation = self.generation
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._reading.update(dict.fromkeys(missing, done))
        try:
            plain = {entry: kept[entry] for entry in entries if entry in kept}
            plain.update(zip(missing, await self._unpack(await self._fetch(missing)), strict=True))
        finally:
            for entry in missing:
                del self._reading[entry]
            done.set_result(None)
        if generation == self.generation:
            for entry in missing[-self._most :]:
                if len(kept) >= self._most:
                    del kept[next(iter(kept))]
                kept[entry] = plain[entry]
        return [plain[entry] for entry in entries]

    async def _fetch(self, entries: list[int]) -> list[memoryview]:
        """The compressed data of these entries; what is stored side by side is read at once."""
        bits = self._image.cluster_bits
        pieces: list[memoryview] = []
        places = [location(entry, bits) for entry in entries]
        at = 0
        while at < len(places):
            start = places[at][0]
            end = start + places[at][1]
            stop = at + 1
            # Sectors are shared by neighbours.
            while stop < len(places) and start < places[stop][0] <= end:
                end = max(end, places[stop][0] + places[stop][1])
                stop += 1
            data = memoryview(await self._image.file.pread(start, end - start))
            pieces += [data[offset - start : offset - start + length] for offset, length in places[at:stop]]
            at = stop
        return pieces

    async def _unpack(self, pieces: list[memoryview]) -> list[bytes]:
        kind, size = self._image.header.compression_type, self._image.cluster_size
        if len(pieces) * size < _WORKER_FROM:
            return _unpack_all(kind, pieces, size)
        loop = asyncio.get_running_loop()
        pool = workers()
        # Each worker takes a share of neighbours.
        share = -(-len(pieces) // len(os.sched_getaffinity(0)))
        jobs = [
            loop.run_in_executor(pool, _unpack_all, kind, pieces[at : at + share], size)
            for at in range(0, len(pieces), share)
        ]
        return [plain for job in await asyncio.gather(*jobs) for plain in job]
