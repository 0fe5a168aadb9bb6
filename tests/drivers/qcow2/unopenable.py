"""Damage with which an image does not open, other than for a check.

Offsets come from the qcow2 specification (docs/interop/qcow2 in QEMU's documentation).
"""

from __future__ import annotations

import struct
from collections.abc import Callable

Patch = Callable[[bytearray], None]

BITMAPS = 0x23852875


def u64(data: bytes | bytearray, offset: int) -> int:
    """A field of 64 bits."""
    return int(struct.unpack_from(">Q", data, offset)[0])


def u32(data: bytes | bytearray, offset: int) -> int:
    """A field of 32 bits."""
    return int(struct.unpack_from(">I", data, offset)[0])


def snapshot_at(data: bytes | bytearray, index: int) -> int:
    """Where an entry of the snapshot table is."""
    at = u64(data, 64)
    for _ in range(index):
        sizes = struct.unpack_from(">HH", data, at + 12)
        at += -(-(40 + u32(data, at + 36) + sum(sizes)) // 8) * 8
    return at


def extension_at(data: bytes | bytearray, magic: int) -> int:
    """Where the data of a header extension is."""
    at = u32(data, 100)
    while u32(data, at) != magic:
        assert u32(data, at)
        at += 8 + -(-u32(data, at + 4) // 8) * 8
    return at + 8


def directory_at(data: bytes | bytearray) -> int:
    """Where the directory of bitmaps is."""
    return u64(data, extension_at(data, BITMAPS) + 16)


def _put(where: Callable[[bytearray], int], fmt: str, *values: int) -> Patch:
    def patch(data: bytearray) -> None:
        struct.pack_into(">" + fmt, data, where(data), *values)

    return patch


def _header(at: int, fmt: str, *values: int) -> Patch:
    return _put(lambda data: at, fmt, *values)


def _snapshot(index: int, at: int, fmt: str, *values: int) -> Patch:
    return _put(lambda data: snapshot_at(data, index) + at, fmt, *values)


def _extension(at: int, fmt: str, *values: int) -> Patch:
    return _put(lambda data: extension_at(data, BITMAPS) + at, fmt, *values)


def _bitmap(at: int, fmt: str, *values: int) -> Patch:
    return _put(lambda data: directory_at(data) + at, fmt, *values)


def _all(*patches: Patch) -> Patch:
    def patch(data: bytearray) -> None:
        for one in patches:
            one(data)

    return patch


def _longer_directory(count: int) -> Patch:
    def patch(data: bytearray) -> None:
        at = extension_at(data, BITMAPS) + 8
        struct.pack_into(">Q", data, at, u64(data, at) + count)

    return patch


def _same_names(data: bytearray) -> None:
    at = directory_at(data)
    name = struct.unpack_from(">H", data, at + 18)[0]
    following = at + -(-(24 + name) // 8) * 8
    data[following + 24 : following + 24 + name] = data[at + 24 : at + 24 + name]


def _no_refcounts(data: bytearray) -> None:
    table = u64(data, 48)
    data[table : table + 8 * 16] = bytes(8 * 16)


def _table(entries: list[tuple[int, bytes]]) -> Patch:
    """A snapshot table behind the end of the file: (size of the extra data, what there is of it)."""

    def patch(data: bytearray) -> None:
        size = 1 << u32(data, 20)
        data += bytes(-len(data) % size)
        start = len(data)
        for index, (length, extra) in enumerate(entries):
            name = b"s%d" % index
            entry = struct.pack(">QIHHIIQII", 0, 0, 1, len(name), 1, 2, 3, 0, length)
            entry += extra if length > 1 << 20 else extra[:length].ljust(length, b"\0") + b"%d" % index + name
            data += entry + bytes(-len(entry) % 8)
        data += bytes(-len(data) % size)
        struct.pack_into(">IQ", data, 60, len(entries), start)

    return patch


_EXTRA = struct.pack(">QQq", 7, 4 << 20, -1) + bytes(range(256)) * 8

#: name: (kind of image, see `mangled`; damage). Here ``qemu-img check`` opens the image.
LIKE_QEMU_IMG: dict[str, tuple[str, Patch]] = {
    "extra-first": ("snapshots", _snapshot(0, 36, "I", 2000)),
    "extra-second": ("snapshots", _snapshot(1, 36, "I", 1032)),
    "extra-huge": ("snapshots", _snapshot(1, 36, "I", 0xFFFFFFFF)),
    "extra-kept": ("plain", _table([(2000, _EXTRA), (24, _EXTRA[:24]), (1025, _EXTRA)])),
    "extra-span": ("plain", _table([(24, _EXTRA[:24]), (0x7FFFFFFF, _EXTRA)])),
    "extra-v2": ("v2", _snapshot(0, 36, "I", 4096)),
    "no-reftable": ("plain", _header(56, "I", 0)),
    "no-reftable-snapshots": ("snapshots", _header(56, "I", 0)),
    "no-reftable-small": ("small-packed", _header(56, "I", 0)),
    "no-refblocks": ("subclusters", _no_refcounts),
    "corrupt": ("snapshots", _header(72, "Q", 2)),
    "dirty": ("plain", _header(72, "Q", 1)),
    "dirty-corrupt-no-refblocks": ("bitmaps", _all(_header(72, "Q", 3), _no_refcounts)),
    "other-autoclear": ("bitmaps", _header(88, "Q", 0)),
}

#: Here it does not, or makes things worse.
BETTER_THAN_QEMU_IMG: dict[str, tuple[str, Patch]] = {
    "extra-long-span": ("plain", _table([(24, _EXTRA[:24]), (0x7000_0000, _EXTRA)])),
    "count-0": ("bitmaps", _extension(0, "I", 0)),
    "count-1": ("bitmaps", _extension(0, "I", 1)),
    "count-3": ("bitmaps", _extension(0, "I", 3)),
    "count-70000": ("bitmaps", _extension(0, "I", 70000)),
    "reserved": ("bitmaps", _extension(4, "I", 1)),
    "size-0": ("bitmaps", _extension(8, "Q", 0)),
    "size-8": ("bitmaps", _extension(8, "Q", 8)),
    "size-longer": ("bitmaps", _longer_directory(8)),
    "size-an-entry": ("bitmaps", _longer_directory(64)),
    "size-huge": ("bitmaps", _extension(8, "Q", 1 << 40)),
    "directory-unaligned": ("bitmaps", _extension(16, "Q", 512)),
    "directory-nowhere": ("bitmaps", _extension(16, "Q", 1 << 40)),
    "directory-at-0": ("bitmaps", _extension(16, "Q", 0)),
    "extension-short": ("bitmaps", _put(lambda data: extension_at(data, BITMAPS) - 4, "I", 16)),
    "flags": ("bitmaps", _bitmap(12, "I", 0x80)),
    "type": ("bitmaps", _bitmap(16, "B", 2)),
    "granularity": ("bitmaps", _bitmap(17, "B", 3)),
    "name": ("bitmaps", _bitmap(18, "H", 2000)),
    "extra": ("bitmaps", _bitmap(20, "I", 4)),
    "table-none": ("bitmaps", _bitmap(0, "Q", 0)),
    "table-size-0": ("bitmaps", _bitmap(8, "I", 0)),
    "table-size": ("bitmaps", _bitmap(8, "I", 100)),
    "table-size-huge": ("bitmaps", _bitmap(8, "I", 0xFFFFFFFF)),
    "table-entry": ("bitmaps", _put(lambda data: u64(data, directory_at(data)), "Q", 0xFF << 56)),
    "same-names": ("bitmaps", _same_names),
    "small-count": ("small", _extension(0, "I", 5)),
}

#: The bitmaps that are left of those, where not both are.
BITMAPS_LEFT = {
    **{name: [] for name in ("count-0", "count-70000", "reserved", "size-0", "size-8", "size-huge", "extension-short")},
    **{name: [] for name in ("directory-unaligned", "directory-nowhere", "directory-at-0", "name")},
    **{name: ["b1"] for name in ("flags", "type", "granularity", "extra", "table-none", "table-size-0", "table-size")},
    **{name: ["b1"] for name in ("table-size-huge", "table-entry")},
    "same-names": ["b0"],
    "small-count": ["b0"],
}

#: Nobody opens these.
HOPELESS: dict[str, tuple[str, Patch]] = {
    "reftable-large": ("plain", _header(56, "I", 1000)),
    "reftable-unaligned": ("plain", _header(48, "Q", 512)),
    "l1-small": ("plain", _header(36, "I", 0)),
    "l1-unaligned": ("plain", _header(40, "Q", 512)),
    "l1-large": ("plain", _header(36, "I", (32 << 20) // 8 + 1)),
    "feature": ("plain", _header(72, "Q", 1 << 63)),
    "size": ("plain", _header(24, "Q", 1 << 63)),
    "header": ("plain", _header(100, "I", 96)),
    "snapshots-unaligned": ("snapshots", _header(64, "Q", 512)),
}
