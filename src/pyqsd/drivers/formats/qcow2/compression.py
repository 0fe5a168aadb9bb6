"""Compressed clusters: where they are, and unpacking them with bounded memory.

Source: QEMU docs/interop/qcow2, sections "Cluster mapping" (compressed clusters descriptor), "compression_type".
"""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

from pyqsd.drivers.formats.qcow2 import header as headers

if TYPE_CHECKING:
    from pyqsd.drivers.formats.qcow2.image import Image

#: What is unpacked at once by the loop's own thread, at most, in bytes of content: about half a millisecond's work. The
#: way to a worker thread and back costs as much as 32 KiB of that do with zlib, or several hundred with zstd.
_OWN_MOST = {headers.COMPRESSION_ZLIB: 256 << 10, headers.COMPRESSION_ZSTD: 1 << 20}
#: Less than this (bytes of content) is no work for others.
_SHARE_LEAST = {headers.COMPRESSION_ZLIB: 32 << 10, headers.COMPRESSION_ZSTD: 512 << 10}
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
    """The first `size` bytes of what `data` decompresses to. Raises OSError if there are fewer, or if a zstd frame has
    more (zlib has no end that could be found behind more data)."""
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


@cache
def zstd_module() -> ModuleType:
    """The library for zstd. Looking for one that is not there takes longer than to unpack a cluster."""
    try:
        from compression import zstd  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        from backports import zstd
    return zstd  # type: ignore[no-any-return, unused-ignore]


def _unpack_zstd(data: bytes | bytearray | memoryview, size: int) -> bytes:
    zstd = zstd_module()
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
            if not decoder.eof and (decoder.decompress(b"", max_length=1) or not decoder.eof):
                # It has more than a cluster, or less data than it needs.
                return b""
            rest = decoder.unused_data
    except zstd.ZstdError:
        raise OSError(errno.EIO, "Compressed cluster is damaged") from None
    return plain


@cache
def workers() -> ThreadPoolExecutor:
    """The threads that pack and unpack, as many as there are cores."""
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)), "qcow2-pack")


@cache
def _helpers() -> threading.Semaphore:
    """The cores beside that of the loop: as many of the workers may help it to unpack."""
    return threading.Semaphore(max(1, len(os.sched_getaffinity(0)) - 1))


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
        """Unpack `pieces`: helpers that are free take a share each, and the loop's own thread does the rest, if that is
        not too much for it."""
        kind, size = self._image.header.compression_type, self._image.cluster_size
        shares = 1
        if len(pieces) * size >= _SHARE_LEAST[kind]:
            while shares <= len(pieces) and _helpers().acquire(blocking=False):
                shares += 1
        if shares == 1 and len(pieces) * size <= _OWN_MOST[kind]:
            return _unpack_all(kind, pieces, size)
        # A single cluster is not shared: whoever is free does it.
        mine = len(pieces) // shares
        own, rest = pieces[:mine], pieces[mine:]
        step = max(1, -(-len(rest) // max(1, shares - 1)))
        jobs = [self._hand_out(kind, rest[at : at + step], True) for at in range(0, len(rest), step)]
        for _ in range(shares - 1 - len(jobs)):
            _helpers().release()
        if mine * size > _OWN_MOST[kind]:
            jobs.insert(0, self._hand_out(kind, own, False))
            own = []
        others = asyncio.gather(*jobs)
        try:
            plain = _unpack_all(kind, own, size)
        except BaseException:
            others.cancel()
            raise
        for part in await others:
            plain += part
        return plain

    def _hand_out(self, kind: int, pieces: list[memoryview], helper: bool) -> asyncio.Future[list[bytes]]:
        """Let a worker unpack `pieces`. A `helper` is free again when it is done, before the loop knows."""
        work = workers().submit(_unpack_all, kind, pieces, self._image.cluster_size)
        if helper:
            work.add_done_callback(lambda _: _helpers().release())
        return asyncio.wrap_future(work)
