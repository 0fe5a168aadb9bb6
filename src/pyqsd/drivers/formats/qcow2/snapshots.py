"""The table of internal snapshots: bytes in, checked structs out, and back.

Source: QEMU docs/interop/qcow2, section "Snapshots". Offsets and sizes are bytes.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass

from pyqsd.drivers.formats.qcow2 import header as headers
from pyqsd.qapi.errors import Error

_ENTRY = struct.Struct(">QIHHIIQII")
_EXTRA = struct.Struct(">QQq")
#: QEMU's limits.
MAX_TABLE_BYTES = 1024 * 65536
MAX_EXTRA_BYTES = 1024
#: And that of what a table takes on disk with extra data that is to be cut.
MAX_SPAN_BYTES = (1 << 31) - 1


@dataclass
class Surplus:
    """What a snapshot table has beyond what it may have, so that only a repair opens it. `error`: what an ordinary open
    says, `extra`: entries whose extra data is to be cut, `overhanging`: entries that are to go, the last ones."""

    error: Error | None = None
    extra: int = 0
    overhanging: int = 0


@dataclass
class Snapshot:
    """One internal snapshot. `id` and `name` may hold bytes that are not UTF-8, as surrogates (`headers.os_decode`);
    `disk_size` and `icount` are None where the entry is too old to have them, or has no value; `unknown_extra`: the
    extra data beyond the fields known here, kept as it is; `entry_size`: bytes of the entry on disk, padded."""

    l1_offset: int
    l1_size: int
    id: str
    name: str
    date_sec: int
    date_nsec: int
    vm_clock_nsec: int
    vm_state_size: int
    disk_size: int | None
    icount: int | None
    unknown_extra: bytes = b""
    entry_size: int = 0


def header_bytes() -> int:
    """Bytes of an entry before its variable part."""
    return _ENTRY.size


def entry_bytes(head: bytes | bytearray) -> int:
    """The length of the whole entry, padded, from its first `header_bytes` bytes."""
    _, _, id_size, name_size, _, _, _, _, extra = _ENTRY.unpack_from(head)
    return int(-(-(_ENTRY.size + extra + id_size + name_size) // 8) * 8)


def extra_bytes(head: bytes | bytearray) -> int:
    """The size of the extra data of an entry."""
    return int(_ENTRY.unpack_from(head)[8])


def cut(head: bytes | bytearray) -> bytes:
    """The beginning of an entry, but with only as much extra data as there may be."""
    return bytes(head[:36]) + MAX_EXTRA_BYTES.to_bytes(4, "big")


def too_much_extra(index: int) -> Error:
    """What is said of the entry `index` with more extra data than there may be."""
    return Error(
        f"Too much extra metadata in snapshot table entry {index}",
        errno.EINVAL,
        "You can force-remove this extra metadata with qemu-img check -r all",
    )


def too_many(what: str, overhanging: int) -> Error:
    """What is said of a table whose last entries are too much; `what` is."""
    return Error(
        what, errno.EFBIG, f"You can force-remove all {overhanging} overhanging snapshots with qemu-img check -r all"
    )


def decode(data: bytes | bytearray, index: int) -> Snapshot:
    """Decode one entry. `index` is only for messages. Raises Error."""
    l1_offset, l1_size, id_size, name_size, sec, nsec, clock, state32, extra = _ENTRY.unpack_from(data)
    if extra > MAX_EXTRA_BYTES:
        raise too_much_extra(index)
    at = _ENTRY.size
    more = bytes(data[at : at + extra])
    vm_state = int.from_bytes(more[0:8], "big") if extra >= 8 else state32
    disk_size = int.from_bytes(more[8:16], "big") if extra >= 16 else None
    icount = None
    if extra >= 24:
        icount = int.from_bytes(more[16:24], "big", signed=True)
        if icount == -1:
            icount = None
    at += extra
    ident = headers.os_decode(bytes(data[at : at + id_size]))
    at += id_size
    name = headers.os_decode(bytes(data[at : at + name_size]))
    return Snapshot(
        l1_offset,
        l1_size,
        ident,
        name,
        sec,
        nsec,
        clock,
        vm_state,
        disk_size,
        icount,
        more[_EXTRA.size :],
        entry_bytes(data),
    )


def encode(one: Snapshot, disk_size: int) -> bytes:
    """The entry of a snapshot, padded. `disk_size`: that of the image, for an entry that has none of its own. Raises
    Error if a field is too large for the table."""
    extra = _EXTRA.pack(
        one.vm_state_size,
        disk_size if one.disk_size is None else one.disk_size,
        -1 if one.icount is None else one.icount,
    )
    extra += one.unknown_extra
    ident, name = headers.os_encode(one.id), headers.os_encode(one.name)
    if max(len(ident), len(name)) > 0xFFFF:
        raise Error("Snapshot name too long", errno.EINVAL)
    # The old field cannot tell of more than it has room for; who knows the extra data does not look at it.
    state32 = one.vm_state_size if one.vm_state_size <= 0xFFFFFFFF else 0
    data = _ENTRY.pack(
        one.l1_offset,
        one.l1_size,
        len(ident),
        len(name),
        one.date_sec,
        one.date_nsec,
        one.vm_clock_nsec,
        state32,
        len(extra),
    )
    data += extra + ident + name
    return data + bytes(-len(data) % 8)


def table_bytes(table: list[Snapshot]) -> int:
    """The size of the snapshot table on disk."""
    return sum(one.entry_size for one in table)


def encode_table(table: list[Snapshot], disk_size: int) -> bytes:
    """The whole snapshot table; `entry_size` of the entries is set. Raises Error if it would be larger than it may
    be."""
    parts = [encode(one, disk_size) for one in table]
    for one, data in zip(table, parts, strict=True):
        one.entry_size = len(data)
    if len(parts) > headers.MAX_SNAPSHOTS or sum(map(len, parts)) > MAX_TABLE_BYTES:
        raise Error("Snapshot table is too big", errno.EFBIG)
    return b"".join(parts)
