"""The table of internal snapshots: bytes in, checked structs out.

Source: QEMU docs/interop/qcow2, section "Snapshots". Offsets and sizes are bytes.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass

from pyqsd.qapi.errors import Error

_ENTRY = struct.Struct(">QIHHIIQII")
#: QEMU's limits.
MAX_TABLE_BYTES = 1024 * 65536
MAX_EXTRA_BYTES = 1024


@dataclass
class Snapshot:
    """One internal snapshot."""

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


def decode(data: bytes | bytearray, index: int) -> Snapshot:
    """Decode one entry. `index` is only for messages. Raises Error."""
    l1_offset, l1_size, id_size, name_size, sec, nsec, clock, state32, extra = _ENTRY.unpack_from(data)
    if extra > MAX_EXTRA_BYTES:
        raise Error(
            f"Too much extra metadata in snapshot table entry {index}",
            errno.EINVAL,
            "You can force-remove this extra metadata with qemu-img check -r all",
        )
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
    ident = bytes(data[at : at + id_size]).split(b"\0", 1)[0].decode("utf-8", "replace")
    at += id_size
    name = bytes(data[at : at + name_size]).split(b"\0", 1)[0].decode("utf-8", "replace")
    return Snapshot(l1_offset, l1_size, ident, name, sec, nsec, clock, vm_state, disk_size, icount)
