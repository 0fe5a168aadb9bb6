"""The messages of the vhost-user protocol (QEMU's docs/interop/vhost-user), as bytes and numbers.

Without sockets: `decode` checks the length of everything; who uses the numbers checks what they mean.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

HEADER: Final = struct.Struct("<III")
#: No message is longer: the largest is a table of eight regions, or a configuration space.
MAX_PAYLOAD: Final = 4096
#: File descriptors that come with a message at most.
MAX_FDS: Final = 8
#: Regions of memory at most (as QSD).
MAX_SLOTS: Final = 509

VERSION: Final = 1
_VERSION_MASK: Final = 3
_REPLY: Final = 4
_NEED_REPLY: Final = 8

#: Feature bits of the transport.
F_NOTIFY_ON_EMPTY: Final = 1 << 24
F_LOG_ALL: Final = 1 << 26
F_PROTOCOL_FEATURES: Final = 1 << 30

#: Protocol feature bits.
P_MQ: Final = 1 << 0
P_LOG_SHMFD: Final = 1 << 1
P_REPLY_ACK: Final = 1 << 3
P_BACKEND_REQ: Final = 1 << 5
P_CONFIG: Final = 1 << 9
P_INFLIGHT_SHMFD: Final = 1 << 12
P_CONFIGURE_MEM_SLOTS: Final = 1 << 15
PROTOCOL_FEATURES: Final = (
    P_MQ | P_LOG_SHMFD | P_REPLY_ACK | P_BACKEND_REQ | P_CONFIG | P_INFLIGHT_SHMFD | P_CONFIGURE_MEM_SLOTS
)

#: Bit of SET_VRING_KICK, _CALL and _ERR: no file descriptor comes with it.
NO_FD: Final = 1 << 8
#: Of SET_VRING_ADDR: what is written to the used ring is logged.
VRING_F_LOG: Final = 1
LOG_PAGE: Final = 4096
#: To the front-end: the configuration space has changed.
BACKEND_CONFIG_CHANGE: Final = 2


class Message(IntEnum):
    """What the front-end asks."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SET_BACKEND_REQ_FD = 21
    GET_CONFIG = 24
    SET_CONFIG = 25
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38


class ProtocolError(Exception):
    """The front-end does not keep to the protocol; its connection ends."""


@dataclass(frozen=True)
class Header:
    """`size`: bytes of payload that follow."""

    request: int
    need_reply: bool
    size: int


@dataclass(frozen=True)
class MemoryRegion:
    """A part of the guest's memory: `guest` and `user` are its addresses for the guest and the front-end, `offset` is
    where it begins in its file."""

    guest: int
    size: int
    user: int
    offset: int


@dataclass(frozen=True)
class VringAddresses:
    """Where a ring is, in the front-end's addresses; `log`: the guest address to log its used ring with."""

    index: int
    flags: int
    desc: int
    used: int
    avail: int
    log: int


@dataclass(frozen=True)
class InflightArea:
    """The shared memory that tracks requests."""

    size: int
    offset: int
    queues: int
    queue_size: int


@dataclass(frozen=True)
class ConfigAccess:
    """A part of the configuration space."""

    offset: int
    flags: int
    data: bytes


_REGION: Final = struct.Struct("<QQQQ")
_ADDRESSES: Final = struct.Struct("<IIQQQQ")
_STATE: Final = struct.Struct("<II")
_U64: Final = struct.Struct("<Q")
_INFLIGHT: Final = struct.Struct("<QQHH")
_CONFIG: Final = struct.Struct("<III")
_LOG: Final = struct.Struct("<QQ")


def decode_header(data: bytes) -> Header:
    """Raises ProtocolError."""
    request, flags, size = HEADER.unpack(data)
    if flags & _VERSION_MASK != VERSION:
        raise ProtocolError(f"request {request} with flags 0x{flags:x}: not version {VERSION}")
    if size > MAX_PAYLOAD:
        raise ProtocolError(f"request {request} with {size} bytes is too long")
    return Header(request, bool(flags & _NEED_REPLY), size)


def reply(request: int, payload: bytes) -> bytes:
    """A whole message that answers `request`."""
    return HEADER.pack(request, VERSION | _REPLY, len(payload)) + payload


def backend_request(request: int) -> bytes:
    """A whole message to the front-end that needs no answer."""
    return HEADER.pack(request, VERSION, 0)


def u64(payload: bytes) -> int:
    """Raises ProtocolError."""
    return int(_unpack(_U64, payload)[0])


def pack_u64(value: int) -> bytes:
    """A number as payload."""
    return _U64.pack(value)


def state(payload: bytes) -> tuple[int, int]:
    """A vring's index and a number. Raises ProtocolError."""
    index, number = _unpack(_STATE, payload)
    return index, number


def pack_state(index: int, number: int) -> bytes:
    """The same as payload."""
    return _STATE.pack(index, number)


def addresses(payload: bytes) -> VringAddresses:
    """Raises ProtocolError."""
    return VringAddresses(*_unpack(_ADDRESSES, payload))


def regions(payload: bytes) -> list[MemoryRegion]:
    """The regions of SET_MEM_TABLE. Raises ProtocolError."""
    count = _unpack(_STATE, payload[: _STATE.size])[0]
    if count > MAX_FDS or len(payload) < _STATE.size + count * _REGION.size:
        raise ProtocolError(f"a memory table of {count} regions in {len(payload)} bytes")
    return [_region(payload, _STATE.size + i * _REGION.size) for i in range(count)]


def region(payload: bytes) -> MemoryRegion:
    """The region of ADD_MEM_REG and REM_MEM_REG. Raises ProtocolError."""
    if len(payload) != 8 + _REGION.size:
        raise ProtocolError(f"a memory region of {len(payload)} bytes")
    return _region(payload, 8)


def _region(payload: bytes, at: int) -> MemoryRegion:
    found = MemoryRegion(*_REGION.unpack_from(payload, at))
    for start in (found.guest, found.user, found.offset):
        if start + found.size > 1 << 64:
            raise ProtocolError(f"a memory region of {found.size} bytes at 0x{start:x}")
    return found


def inflight(payload: bytes) -> InflightArea:
    """Raises ProtocolError."""
    return InflightArea(*_unpack(_INFLIGHT, payload[: _INFLIGHT.size]))


def pack_inflight(area: InflightArea) -> bytes:
    """The same as payload, as long as the front-end's structure."""
    return _INFLIGHT.pack(area.size, area.offset, area.queues, area.queue_size) + bytes(4)


def config(payload: bytes) -> ConfigAccess:
    """Raises ProtocolError."""
    offset, size, flags = _unpack(_CONFIG, payload[: _CONFIG.size])
    if len(payload) < _CONFIG.size + size:
        raise ProtocolError(f"{size} bytes of configuration in {len(payload)} bytes")
    return ConfigAccess(offset, flags, payload[_CONFIG.size : _CONFIG.size + size])


def pack_config(offset: int, data: bytes) -> bytes:
    """A part of the configuration space as payload."""
    return _CONFIG.pack(offset, len(data), 0) + data


def log_area(payload: bytes) -> tuple[int, int]:
    """Size and offset of the log. Raises ProtocolError."""
    size, offset = _unpack(_LOG, payload)
    return size, offset


def _unpack(form: struct.Struct, payload: bytes) -> tuple[int, ...]:
    if len(payload) != form.size:
        raise ProtocolError(f"a payload of {len(payload)} bytes, not {form.size}")
    return form.unpack(payload)
