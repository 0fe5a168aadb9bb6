"""Compressed clusters: where they are, and unpacking them with bounded memory.

Source: QEMU docs/interop/qcow2, sections "Cluster mapping" (compressed clusters descriptor), "compression_type".
"""

from __future__ import annotations

import asyncio
import errno
import zlib
from typing import TYPE_CHECKING

from pyqsd.drivers.formats.qcow2 import header as headers

if TYPE_CHECKING:
    from pyqsd.drivers.formats.qcow2.image import Image

#: Clusters from this size on (bytes) are unpacked in a worker thread.
_WORKER_FROM = 256 << 10
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


def unpack(kind: int, data: bytes | bytearray, size: int) -> bytes:
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


def _unpack_zstd(data: bytes | bytearray, size: int) -> bytes:
    try:
        from compression import zstd  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        from backports import zstd
    plain = b""
    rest = bytes(data)
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


class Unpacked:
    """The compressed clusters of an image that were read last, unpacked."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._kept: dict[int, bytes] = {}
        self._most = max(1, _KEEP_BYTES >> image.cluster_bits)

    def peek(self, entry: int) -> bytes | None:
        """The content, if it is in memory."""
        return self._kept.get(entry)

    def forget(self) -> None:
        """Compressed data may have gone or changed."""
        self._kept.clear()

    async def read(self, entry: int) -> bytes:
        """The content of the cluster that the L2 entry `entry` describes. Raises OSError."""
        plain = self._kept.get(entry)
        if plain is not None:
            return plain
        image = self._image
        offset, length = location(entry, image.cluster_bits)
        image.event("read_compressed")
        data = await image.file.pread(offset, length)
        kind, size = image.header.compression_type, image.cluster_size
        if size >= _WORKER_FROM:
            plain = await asyncio.get_running_loop().run_in_executor(None, unpack, kind, data, size)
        else:
            plain = unpack(kind, data, size)
        if len(self._kept) >= self._most:
            del self._kept[next(iter(self._kept))]
        self._kept[entry] = plain
        return plain
