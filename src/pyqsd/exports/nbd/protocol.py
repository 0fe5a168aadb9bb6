"""The wire format of NBD: bytes to values and back, with every length checked. No sockets here.

Source: the NBD protocol (NetworkBlockDevice doc/proto.md) with its extension EXTENDED_HEADERS.
"""

from __future__ import annotations

import errno
import struct
from typing import Final

# --- limits ---
#: Largest name, description, query or message in bytes ("Conventions").
MAX_STRING: Final = 4096
#: Largest payload of a request or reply, and largest data of an option, in bytes.
MAX_PAYLOAD: Final = 32 << 20
#: Most extents in one block status chunk.
MAX_EXTENTS: Final = (1 << 20) // 8
#: Longest extent where lengths have 32 bits.
MAX_LENGTH32: Final = 0xFFFFFFFF

# --- magic numbers ---
NBDMAGIC: Final = 0x4E42444D41474943
IHAVEOPT: Final = 0x49484156454F5054
REPLY_MAGIC: Final = 0x3E889045565A9
REQUEST_MAGIC: Final = 0x25609513
EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71
SIMPLE_MAGIC: Final = 0x67446698
STRUCTURED_MAGIC: Final = 0x668E33EF
EXTENDED_REPLY_MAGIC: Final = 0x6E8A278C

# --- handshake ---
FLAG_FIXED_NEWSTYLE: Final = 1
FLAG_NO_ZEROES: Final = 2

OPT_EXPORT_NAME: Final = 1
OPT_ABORT: Final = 2
OPT_LIST: Final = 3
OPT_STARTTLS: Final = 5
OPT_INFO: Final = 6
OPT_GO: Final = 7
OPT_STRUCTURED_REPLY: Final = 8
OPT_LIST_META_CONTEXT: Final = 9
OPT_SET_META_CONTEXT: Final = 10
OPT_EXTENDED_HEADERS: Final = 11

OPTION_NAMES: Final = {
    OPT_EXPORT_NAME: "export name",
    OPT_ABORT: "abort",
    OPT_LIST: "list",
    OPT_STARTTLS: "starttls",
    OPT_INFO: "info",
    OPT_GO: "go",
    OPT_STRUCTURED_REPLY: "structured reply",
    OPT_LIST_META_CONTEXT: "list meta context",
    OPT_SET_META_CONTEXT: "set meta context",
    OPT_EXTENDED_HEADERS: "extended headers",
}

REP_ACK: Final = 1
REP_SERVER: Final = 2
REP_INFO: Final = 3
REP_META_CONTEXT: Final = 4
REP_ERR_UNSUP: Final = 0x80000001
REP_ERR_POLICY: Final = 0x80000002
REP_ERR_INVALID: Final = 0x80000003
REP_ERR_TLS_REQD: Final = 0x80000005
REP_ERR_UNKNOWN: Final = 0x80000006
REP_ERR_SHUTDOWN: Final = 0x80000007
REP_ERR_BLOCK_SIZE_REQD: Final = 0x80000008
REP_ERR_TOO_BIG: Final = 0x80000009
REP_ERR_EXT_HEADER_REQD: Final = 0x8000000A

INFO_EXPORT: Final = 0
INFO_NAME: Final = 1
INFO_DESCRIPTION: Final = 2
INFO_BLOCK_SIZE: Final = 3

# --- transmission flags ---
HAS_FLAGS: Final = 0x0001
READ_ONLY: Final = 0x0002
SEND_FLUSH: Final = 0x0004
SEND_FUA: Final = 0x0008
SEND_TRIM: Final = 0x0020
SEND_WRITE_ZEROES: Final = 0x0040
SEND_DF: Final = 0x0080
CAN_MULTI_CONN: Final = 0x0100
SEND_CACHE: Final = 0x0400
SEND_FAST_ZERO: Final = 0x0800
BLOCK_STATUS_PAYLOAD: Final = 0x1000

# --- transmission ---
CMD_READ: Final = 0
CMD_WRITE: Final = 1
CMD_DISC: Final = 2
CMD_FLUSH: Final = 3
CMD_TRIM: Final = 4
CMD_CACHE: Final = 5
CMD_WRITE_ZEROES: Final = 6
CMD_BLOCK_STATUS: Final = 7

COMMAND_NAMES: Final = {
    CMD_READ: "read",
    CMD_WRITE: "write",
    CMD_DISC: "disconnect",
    CMD_FLUSH: "flush",
    CMD_TRIM: "trim",
    CMD_CACHE: "cache",
    CMD_WRITE_ZEROES: "write zeroes",
    CMD_BLOCK_STATUS: "block status",
}

CMD_FLAG_FUA: Final = 0x01
CMD_FLAG_NO_HOLE: Final = 0x02
CMD_FLAG_DF: Final = 0x04
CMD_FLAG_REQ_ONE: Final = 0x08
CMD_FLAG_FAST_ZERO: Final = 0x10
CMD_FLAG_PAYLOAD_LEN: Final = 0x20

REPLY_FLAG_DONE: Final = 1
REPLY_NONE: Final = 0
REPLY_OFFSET_DATA: Final = 1
REPLY_OFFSET_HOLE: Final = 2
REPLY_BLOCK_STATUS: Final = 5
REPLY_BLOCK_STATUS_EXT: Final = 6
REPLY_ERROR: Final = 0x8001

STATE_HOLE: Final = 1
STATE_ZERO: Final = 2
STATE_DIRTY: Final = 1

EPERM: Final = 1
EIO: Final = 5
ENOMEM: Final = 12
EINVAL: Final = 22
ENOSPC: Final = 28
EOVERFLOW: Final = 75
ENOTSUP: Final = 95
ESHUTDOWN: Final = 108

_ERRORS: Final = {
    errno.EPERM: EPERM,
    errno.EROFS: EPERM,
    errno.EIO: EIO,
    errno.ENOMEM: ENOMEM,
    errno.ENOSPC: ENOSPC,
    errno.EDQUOT: ENOSPC,
    errno.EFBIG: ENOSPC,
    errno.EOVERFLOW: EOVERFLOW,
    errno.ENOTSUP: ENOTSUP,
    errno.ESHUTDOWN: ESHUTDOWN,
}

# --- the fixed parts ---
OPTION_HEADER: Final = struct.Struct(">QII")
OPTION_REPLY: Final = struct.Struct(">QIII")
#: magic, flags, type, cookie, offset, length
REQUEST: Final = struct.Struct(">IHHQQI")
EXTENDED_REQUEST: Final = struct.Struct(">IHHQQQ")
#: magic, error, cookie
SIMPLE_REPLY: Final = struct.Struct(">IIQ")
#: magic, flags, type, cookie, length
CHUNK: Final = struct.Struct(">IHHQI")
#: magic, flags, type, cookie, offset, length
EXTENDED_CHUNK: Final = struct.Struct(">IHHQQQ")
#: A chunk header and the offset of a data chunk.
DATA_CHUNK: Final = struct.Struct(">IHHQIQ")
EXTENDED_DATA_CHUNK: Final = struct.Struct(">IHHQQQQ")
#: The payload of a hole: offset, length
HOLE: Final = struct.Struct(">QI")

# Modes of a connection: how it replies.
SIMPLE: Final = 0
STRUCTURED: Final = 1
EXTENDED: Final = 2


def nbd_error(number: int | None) -> int:
    """The NBD error number for an errno ("Error values"); EINVAL for what has none."""
    return _ERRORS.get(number or errno.EIO, EINVAL)


class OptionError(Exception):
    """An option is refused with an error reply of this `kind`; the negotiation goes on."""

    def __init__(self, kind: int, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message


class Violation(Exception):
    """The peer does not speak the protocol: its connection ends."""


def option_reply(option: int, kind: int, data: bytes = b"") -> bytes:
    """A reply to an option."""
    return OPTION_REPLY.pack(REPLY_MAGIC, option, kind, len(data)) + data


def text_bytes(text: str) -> bytes:
    """A string as it is on the wire. Bytes that were no UTF-8 come out as they came in."""
    return text.encode("utf-8", "surrogateescape")


def bytes_text(data: bytes) -> str:
    """A string from the wire."""
    return data.decode("utf-8", "surrogateescape")


def sane_name(name: str) -> str:
    """A peer's name, fit for a message: not of any length."""
    data = text_bytes(name)
    return name if len(data) < 80 else bytes_text(data[:80]) + "..."


class OptionData:
    """Reads the data of an option from its start. Every method raises `OptionError` rather than read beyond the end."""

    __slots__ = ("_at", "_data", "_option")

    def __init__(self, option: int, data: bytes) -> None:
        self._option = option
        self._data = data
        self._at = 0

    def _take(self, length: int) -> bytes:
        end = self._at + length
        if end > len(self._data):
            raise OptionError(REP_ERR_INVALID, f"Inconsistent lengths in option {OPTION_NAMES[self._option]}")
        data = self._data[self._at : end]
        self._at = end
        return data

    def uint16(self) -> int:
        """An unsigned number of 16 bits."""
        return int.from_bytes(self._take(2), "big")

    def uint32(self) -> int:
        """An unsigned number of 32 bits."""
        return int.from_bytes(self._take(4), "big")

    def name(self) -> str:
        """The name of an export, after its length."""
        length = self.uint32()
        if length > MAX_STRING:
            raise OptionError(REP_ERR_INVALID, f"Invalid name length: {length}")
        data = self._take(length)
        if b"\0" in data:
            raise OptionError(REP_ERR_INVALID, f"Unexpected embedded NUL in option {OPTION_NAMES[self._option]}")
        return bytes_text(data)

    def query(self) -> str | None:
        """A query, after its length; None for one that is too long to match anything."""
        length = self.uint32()
        data = self._take(length)
        return bytes_text(data) if length <= MAX_STRING else None

    def end(self) -> None:
        """Nothing may be left."""
        if self._at != len(self._data):
            raise OptionError(REP_ERR_INVALID, f"option '{OPTION_NAMES[self._option]}' has unexpected length")


def decode_status_payload(data: bytes | memoryview, known: frozenset[int]) -> tuple[int, list[int]] | None:
    """The payload of a block status request: (effect length in bytes, metadata context ids). None if it is not valid: a
    wrong size, an id that was not negotiated (`known`) or one given twice."""
    count, odd = divmod(len(data) - 8, 4)
    if count < 1 or odd or count > len(known):
        return None
    length, *ids = struct.unpack(f">Q{count}I", data)
    if len(set(ids)) != count or not known.issuperset(ids):
        return None
    return length, ids


def error_payload(error: int, message: str) -> bytes:
    """The payload of an error chunk."""
    text = text_bytes(message)[:MAX_STRING]
    return struct.pack(">IH", error, len(text)) + text


def status_payload(context: int, extents: list[tuple[int, int]], wide: bool) -> bytes:
    """The payload of a block status chunk with extents ``(length, flags)``; `wide`: with 64 bits for each number."""
    numbers = [number for extent in extents for number in extent]
    if wide:
        return struct.pack(f">II{len(numbers)}Q", context, len(extents), *numbers)
    return struct.pack(f">I{len(numbers)}I", context, *numbers)
