"""Compressed clusters: where they are, and unpacking them with bounded memory.

Source: QEMU docs/interop/qcow2, sections "Cluster mapping" (compressed clusters descriptor), "compression_type".
"""

from __future__ import annotations

import asyncio
import errno
import os
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

from zlib_ng import zlib_ng

from pyqsd.aio.engine import acquire, release
from pyqsd.drivers.formats.qcow2 import header as headers

if TYPE_CHECKING:
    from pyqsd.aio.engine import Engine, Request
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
            plain = zlib_ng.decompressobj(-15).decompress(data, size)
        except zlib_ng.error:  # type: ignore[misc]
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


def _unpack_all(kind: int, pieces: list[memoryview], size: int) -> list[bytes]:
    return [unpack(kind, data, size) for data in pieces]


class _Share:
    """Clusters that a worker unpacks. `done`: it is free again; the worker says so itself, before the loop knows."""

    __slots__ = ("done", "kind", "pieces", "size")

    def __init__(self, kind: int, pieces: list[memoryview], size: int) -> None:
        self.kind = kind
        self.pieces = pieces
        self.size = size
        self.done = False

    def unpack(self) -> list[bytes]:
        try:
            return _unpack_all(self.kind, self.pieces, self.size)
        finally:
            self.done = True


class Unpacked:
    """The compressed clusters of an image that were read last, unpacked."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._kept: dict[int, bytes] = {}
        self._most = max(1, _KEEP_BYTES >> image.cluster_bits)
        self._reading: dict[int, asyncio.Future[None]] = {}
        self._engine: Engine | None = None
        self._shares: list[_Share] = []
        #: The cores beside that of the loop.
        self._helpers = max(1, len(os.sched_getaffinity(0)) - 1)
        #: Something has been unpacked in this turn of the loop.
        self._busy = False
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
                self._keep(entry, plain[entry])
        return [plain[entry] for entry in entries]

    def read_now(self, entries: list[int]) -> list[bytes] | None:
        """The contents of the clusters that these L2 entries describe, if that takes no waiting and no helper; else
        None, and `read_all` says what is wrong with them."""
        image = self._image
        kind, size, bits = image.header.compression_type, image.cluster_size, image.cluster_bits
        if len(entries) * size >= _SHARE_LEAST[kind] or image.file.debug_event is not None:
            return None
        kept, found = self._kept, []
        for entry in entries:
            plain = kept.get(entry)
            if plain is None:
                if entry in self._reading:
                    return None
                offset, length = location(entry, bits)
                packed = memoryview(bytearray(length))
                if not image.file.read_now(offset, length, [packed]):
                    return None
                try:
                    plain = unpack(kind, packed, size)
                except OSError:
                    return None
                self._keep(entry, plain)
            found.append(plain)
        return found

    def _keep(self, entry: int, plain: bytes) -> None:
        kept = self._kept
        if len(kept) >= self._most:
            del kept[next(iter(kept))]
        kept[entry] = plain

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
            self._image.event("read_compressed")
            data = memoryview(await self._image.file.pread(start, end - start))
            pieces += [data[offset - start : offset - start + length] for offset, length in places[at:stop]]
            at = stop
        return pieces

    def close(self) -> None:
        """Let go of the worker threads."""
        if self._engine is not None:
            release(self._engine)
            self._engine = None

    def _next_turn(self) -> None:
        self._busy = False

    def _free_helpers(self, most: int) -> int:
        """How many workers may unpack something now, at most `most`."""
        self._shares = [share for share in self._shares if not share.done]
        return max(0, min(most, self._helpers - len(self._shares)))

    async def _unpack(self, pieces: list[memoryview]) -> list[bytes]:
        """Unpack `pieces`: helpers that are free take a share each, and the loop's own thread does the rest, if that is
        not too much for it."""
        kind, size = self._image.header.compression_type, self._image.cluster_size
        count = len(pieces)
        own_most = _OWN_MOST[kind]
        helpers = 0
        if count > 1:
            if count * size >= _SHARE_LEAST[kind]:
                helpers = self._free_helpers(count - 1)
        elif self._busy and size >= _SHARE_LEAST[kind]:
            # A cluster alone is not shared. A second one in the same turn goes to a helper; the loop does the third.
            helpers = self._free_helpers(1)
        if not helpers and count * size <= own_most:
            if not self._busy:
                self._busy = True
                asyncio.get_running_loop().call_soon(self._next_turn)
            return _unpack_all(kind, pieces, size)
        mine = count // (helpers + 1)
        if mine * size > own_most:
            # Too much for the loop, also if nobody is free.
            mine = 0
        own, rest = pieces[:mine], pieces[mine:]
        step = -(-len(rest) // max(1, helpers))
        shares = [_Share(kind, rest[at : at + step], size) for at in range(0, len(rest), step)]
        jobs = [self._hand_out(share) for share in shares]
        plain = _unpack_all(kind, own, size)
        for share, job in zip(shares, jobs, strict=True):
            try:
                plain += await job
            finally:
                # One that was cancelled before it began has not said so.
                share.done = True
        return plain

    def _hand_out(self, share: _Share) -> Request:
        if self._engine is None:
            self._engine = acquire("threads")
        self._shares.append(share)
        return self._engine.call(share.unpack)
