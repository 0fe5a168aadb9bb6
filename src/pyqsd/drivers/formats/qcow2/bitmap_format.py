"""Persistent dirty bitmaps on disk: the bitmap directory and bitmap tables, bytes in, checked structs out, and back.

Source: QEMU docs/interop/qcow2, section "Bitmaps". No I/O happens here, and every length and offset is checked before
anything relies on it. Errors have QSD's words. Offsets and sizes are bytes.
"""

from __future__ import annotations

import errno
import operator
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

from pyqsd.drivers.formats.qcow2 import header as headers
from pyqsd.qapi.errors import Error

_ENTRY = struct.Struct(">QIIBBHI")

FLAG_IN_USE = 1 << 0
FLAG_AUTO = 1 << 1
_FLAGS_KNOWN = FLAG_IN_USE | FLAG_AUTO
_TYPE_DIRTY = 1
_BROKEN = "Broken bitmap directory"

MIN_GRANULARITY_BITS = 9
MAX_GRANULARITY_BITS = 31
MAX_NAME_BYTES = 1023
MAX_BITMAPS = 65535
MAX_DIRECTORY_BYTES = MAX_BITMAPS * 1024
#: QEMU's limits: entries of a bitmap table, and bytes of bitmap data.
MAX_TABLE_ENTRIES = 0x8000000
MAX_DATA_BYTES = 0x20000000

#: The host offset of a cluster of bitmap data in a table entry.
TABLE_OFFSET_MASK = 0x00FFFFFFFFFFFE00
_TABLE_RESERVED = 0xFF000000000001FE
#: An entry without a cluster: all bits are ones; else (0) all are zeroes.
ALL_ONES = 1


@dataclass
class StoredBitmap:
    """An entry of the bitmap directory. `name` may hold bytes that are not UTF-8, as surrogates (`headers.os_decode`);
    `table_entries`: how many entries the bitmap table at `table_offset` has."""

    name: str
    granularity_bits: int
    table_offset: int
    table_entries: int
    flags: int

    @property
    def in_use(self) -> bool:
        """It was not stored since it was last used: its content is not right."""
        return bool(self.flags & FLAG_IN_USE)

    @property
    def auto(self) -> bool:
        """Writes are to be recorded in it."""
        return bool(self.flags & FLAG_AUTO)


def entry_bytes(name: str) -> int:
    """The size of the directory entry of a bitmap of this name."""
    return -(-(_ENTRY.size + len(headers.os_encode(name))) // 8) * 8


def data_clusters(disk_size: int, granularity_bits: int, cluster_size: int) -> int:
    """How many clusters of bits, and so table entries, a bitmap of a disk of `disk_size` bytes has."""
    bits = (disk_size + (1 << granularity_bits) - 1) >> granularity_bits
    return -(-((bits + 7) >> 3) // cluster_size)


def decode_directory(data: bytes | bytearray, count: int, cluster_size: int, disk_size: int) -> list[StoredBitmap]:
    """The `count` bitmaps of a directory. Raises Error."""
    found: list[StoredBitmap] = []
    for one in _entries(data, cluster_size, disk_size):
        if isinstance(one, Error) and one.desc == _BROKEN:
            raise one
        if len(found) == count:
            raise Error("More bitmaps found than specified in header extension", errno.EINVAL)
        if isinstance(one, Error):
            raise one
        found.append(one)
    if len(found) != count:
        raise Error("Less bitmaps found than specified in header extension", errno.EINVAL)
    return found


def salvage_directory(data: bytes | bytearray, cluster_size: int, disk_size: int) -> list[StoredBitmap]:
    """What a broken directory has of bitmaps that nothing is wrong with, as far as it says."""
    found: dict[str, StoredBitmap] = {}
    for one in _entries(data, cluster_size, disk_size):
        if not isinstance(one, Error):
            # Two of the same name do not open.
            found.setdefault(headers.shown(one.name), one)
    return list(found.values())


def _entries(data: bytes | bytearray, cluster_size: int, disk_size: int) -> Iterator[StoredBitmap | Error]:
    """Each entry of a directory, or what is wrong with it: `_BROKEN`, if nobody knows where the next one is."""
    at = 0
    while at < len(data):
        if len(data) - at < _ENTRY.size:
            yield Error(_BROKEN, errno.EINVAL)
            return
        offset, entries, flags, kind, granularity_bits, name_size, extra = _ENTRY.unpack_from(data, at)
        size = _ENTRY.size + extra + name_size
        padded = -(-size // 8) * 8
        if padded > len(data) - at:
            yield Error(_BROKEN, errno.EINVAL)
            return
        name = headers.os_decode(bytes(data[at + _ENTRY.size + extra : at + size]))
        one = StoredBitmap(name, granularity_bits, offset, entries, flags)
        if extra:
            yield Error("Bitmap extra data is not supported", errno.EINVAL)
        elif kind != _TYPE_DIRTY or name_size > MAX_NAME_BYTES or not _plausible(one, cluster_size, disk_size):
            yield Error(f"Bitmap '{headers.shown(name)}' doesn't satisfy the constraints", errno.EINVAL)
        else:
            yield one
        at += padded


def _plausible(one: StoredBitmap, cluster_size: int, disk_size: int) -> bool:
    if (
        not 1 <= one.table_entries <= MAX_TABLE_ENTRIES
        or not one.table_offset
        or one.table_offset & (cluster_size - 1)
        or one.table_offset + one.table_entries * 8 > (1 << 63) - 1
        or not MIN_GRANULARITY_BITS <= one.granularity_bits <= MAX_GRANULARITY_BITS
        or one.flags & ~_FLAGS_KNOWN
    ):
        return False
    held = one.table_entries * cluster_size
    # The size of one in use need not fit: the disk may have been resized since.
    return held <= MAX_DATA_BYTES and (one.in_use or disk_size <= held * 8 << one.granularity_bits)


def encode_directory(bitmaps: list[StoredBitmap]) -> bytes:
    """The directory of these bitmaps. Raises Error if it would be larger than it may be."""
    parts = []
    size = 0
    for one in bitmaps:
        name = headers.os_encode(one.name)
        entry = _ENTRY.pack(
            one.table_offset, one.table_entries, one.flags, _TYPE_DIRTY, one.granularity_bits, len(name), 0
        )
        entry += name
        entry += bytes(-len(entry) % 8)
        size += len(entry)
        parts.append(entry)
    if size > MAX_DIRECTORY_BYTES or len(bitmaps) > MAX_BITMAPS:
        raise Error("Bitmap directory is too large", errno.EINVAL)
    return b"".join(parts)


def decode_table(data: bytes | bytearray, cluster_size: int) -> array[int]:
    """The entries of a bitmap table: host offsets of clusters of bits, 0 for all zeroes, `ALL_ONES`. Raises OSError."""
    table = array("Q", bytes(data))
    table.byteswap()
    seen = reduce(operator.or_, table, 0)
    bad = bool(seen & (_TABLE_RESERVED | (TABLE_OFFSET_MASK & (cluster_size - 1))))
    if seen & ALL_ONES and not bad:
        bad = any(entry & ALL_ONES and entry != ALL_ONES for entry in table)
    if bad:
        raise OSError(errno.EINVAL, "Invalid entry in a bitmap table")
    return table


def encode_table(table: array[int]) -> bytes:
    """The bytes of a bitmap table."""
    data = array("Q", table)
    data.byteswap()
    return data.tobytes()
