"""The rules of ``blkdebug``: their options, and the file that they can be written in.

The file is in the form that QEMU has for its ``-readconfig``: sections ``[inject-error]`` and ``[set-state]``, each of
them a rule, with lines ``name = "value"`` (QEMU docs/devel/testing/blkdebug).
"""

from __future__ import annotations

import errno
import os
import re
from enum import StrEnum
from typing import Any, Final

from pyqsd.qapi.errors import Error
from pyqsd.qapi.types import Int64, Struct, field


class BlkdebugEvent(StrEnum):
    """What a driver, or the node itself, is about to do (or has just done)."""

    L1_UPDATE = "l1_update"
    L1_GROW_ALLOC_TABLE = "l1_grow_alloc_table"
    L1_GROW_WRITE_TABLE = "l1_grow_write_table"
    L1_GROW_ACTIVATE_TABLE = "l1_grow_activate_table"
    L2_LOAD = "l2_load"
    L2_UPDATE = "l2_update"
    L2_UPDATE_COMPRESSED = "l2_update_compressed"
    L2_ALLOC_COW_READ = "l2_alloc_cow_read"
    L2_ALLOC_WRITE = "l2_alloc_write"
    READ_AIO = "read_aio"
    READ_BACKING_AIO = "read_backing_aio"
    READ_COMPRESSED = "read_compressed"
    WRITE_AIO = "write_aio"
    WRITE_COMPRESSED = "write_compressed"
    VMSTATE_LOAD = "vmstate_load"
    VMSTATE_SAVE = "vmstate_save"
    COW_READ = "cow_read"
    COW_WRITE = "cow_write"
    REFTABLE_LOAD = "reftable_load"
    REFTABLE_GROW = "reftable_grow"
    REFTABLE_UPDATE = "reftable_update"
    REFBLOCK_LOAD = "refblock_load"
    REFBLOCK_UPDATE = "refblock_update"
    REFBLOCK_UPDATE_PART = "refblock_update_part"
    REFBLOCK_ALLOC = "refblock_alloc"
    REFBLOCK_ALLOC_HOOKUP = "refblock_alloc_hookup"
    REFBLOCK_ALLOC_WRITE = "refblock_alloc_write"
    REFBLOCK_ALLOC_WRITE_BLOCKS = "refblock_alloc_write_blocks"
    REFBLOCK_ALLOC_WRITE_TABLE = "refblock_alloc_write_table"
    REFBLOCK_ALLOC_SWITCH_TABLE = "refblock_alloc_switch_table"
    CLUSTER_ALLOC = "cluster_alloc"
    CLUSTER_ALLOC_BYTES = "cluster_alloc_bytes"
    CLUSTER_FREE = "cluster_free"
    FLUSH_TO_OS = "flush_to_os"
    FLUSH_TO_DISK = "flush_to_disk"
    PWRITEV_RMW_HEAD = "pwritev_rmw_head"
    PWRITEV_RMW_AFTER_HEAD = "pwritev_rmw_after_head"
    PWRITEV_RMW_TAIL = "pwritev_rmw_tail"
    PWRITEV_RMW_AFTER_TAIL = "pwritev_rmw_after_tail"
    PWRITEV = "pwritev"
    PWRITEV_ZERO = "pwritev_zero"
    PWRITEV_DONE = "pwritev_done"
    EMPTY_IMAGE_PREPARE = "empty_image_prepare"
    L1_SHRINK_WRITE_TABLE = "l1_shrink_write_table"
    L1_SHRINK_FREE_L2_CLUSTERS = "l1_shrink_free_l2_clusters"
    COR_WRITE = "cor_write"
    CLUSTER_ALLOC_SPACE = "cluster_alloc_space"
    NONE = "none"


class BlkdebugIOType(StrEnum):
    """Kinds of requests."""

    READ = "read"
    WRITE = "write"
    WRITE_ZEROES = "write-zeroes"
    DISCARD = "discard"
    FLUSH = "flush"
    BLOCK_STATUS = "block-status"


class BlkdebugInjectErrorOptions(Struct, kw_only=True):
    """After `event`, in `state`, requests of the kind `iotype` (default: all but block status) that touch `sector` (of
    512 bytes) fail with `errno` (default: EIO)."""

    event: BlkdebugEvent
    state: Int64 | None = None
    iotype: BlkdebugIOType | None = None
    errno: Int64 | None = None
    sector: Int64 | None = None
    once: bool | None = None
    immediately: bool | None = None


class BlkdebugSetStateOptions(Struct, kw_only=True):
    """After `event`, in `state`, the state is `new_state`."""

    event: BlkdebugEvent
    state: Int64 | None = None
    new_state: Int64 = field(name="new_state")


Rule = BlkdebugInjectErrorOptions | BlkdebugSetStateOptions

_EVERY_IO_BUT_STATUS: Final = frozenset(BlkdebugIOType) - {BlkdebugIOType.BLOCK_STATUS}


class Injection:
    """An error to inject; `offset` in bytes, -1: anywhere."""

    def __init__(self, options: BlkdebugInjectErrorOptions) -> None:
        self.state = int32(options.state or 0)
        self.kinds = _EVERY_IO_BUT_STATUS if options.iotype is None else frozenset({options.iotype})
        self.errno = errno.EIO if options.errno is None else int32(options.errno)
        sector = -1 if options.sector is None else options.sector
        self.offset = -1 if sector == -1 else sector * 512
        self.once = bool(options.once)
        self.immediately = bool(options.immediately)

    def matches(self, kind: BlkdebugIOType, offset: int, length: int) -> bool:
        """Whether it is meant for this request (flushes have no length, and so no sector)."""
        return kind in self.kinds and (self.offset == -1 or offset <= self.offset < offset + length)


class Transition:
    """A change of state."""

    def __init__(self, options: BlkdebugSetStateOptions) -> None:
        self.state = int32(options.state or 0)
        self.new_state = int32(options.new_state)


def int32(value: int) -> int:
    """`value` as QEMU keeps it: in 32 bits."""
    return (value + (1 << 31)) % (1 << 32) - (1 << 31)


# --- the file --------------------------------------------------------------------------------------------------------

#: Nobody writes that many rules.
_LONGEST: Final = 1 << 20

_SECTION_WITH_ID = re.compile(r'\[(\S{1,63})\s*"([^"]{1,63})')
_SECTION = re.compile(r"\[([^]]{1,63})")
_MEMBER = re.compile(r'\s*(\S{1,63})(?:\s*=\s*"([^"]{1,1023}))?')
_IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
_NUMBER = re.compile(r"\s*([+-]?)(?:0[xX]([0-9a-fA-F]+)|(0[0-7]*)|([1-9][0-9]*))")

_MEMBERS: Final[dict[str, dict[str, type]]] = {
    "inject-error": {
        "event": str,
        "state": int,
        "iotype": str,
        "errno": int,
        "sector": int,
        "once": bool,
        "immediately": bool,
    },
    "set-state": {"event": str, "state": int, "new_state": int},
}


def read_config(filename: str) -> list[Rule]:
    """The rules in the file `filename`. Raises Error."""
    try:
        # A pipe must not keep the daemon waiting.
        fd = os.open(filename, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as exc:
        number = exc.errno if isinstance(exc, OSError) and exc.errno else errno.ENOENT
        raise Error(f"Could not read blkdebug config file: {os.strerror(number)}", number) from exc
    try:
        text = os.read(fd, _LONGEST).decode(errors="surrogateescape")
    except OSError as exc:
        number = exc.errno or errno.EIO
        raise Error(f"Cannot read config file: {os.strerror(number)}", number) from exc
    finally:
        os.close(fd)
    return parse_config(text)


def parse_config(text: str) -> list[Rule]:
    """The rules in `text`. Raises Error with QSD's words."""
    sections: list[tuple[str, dict[str, Any]]] = []
    ids: set[tuple[str, str]] = set()
    members: dict[str, Any] | None = None
    for line in text.splitlines(keepends=True):
        if line.startswith(("\n", "#")):
            continue
        if line.startswith("["):
            named = _SECTION_WITH_ID.match(line)
            match = named or _SECTION.match(line)
            if match is None:
                raise Error("parse error", errno.EINVAL)
            group = match[1]
            if group not in _MEMBERS:
                raise Error(f"There is no option group '{group}'", errno.EINVAL)
            if named is not None:
                _check_id(group, named[2], ids)
            members = {}
            sections.append((group, members))
            continue
        match = _MEMBER.match(line)
        if match is None:
            raise Error("parse error", errno.EINVAL)
        if members is None:
            raise Error("no group defined", errno.EINVAL)
        name = match[1]
        kind = _MEMBERS[sections[-1][0]].get(name)
        if kind is None:
            raise Error(f"Invalid parameter '{name}'", errno.EINVAL)
        members[name] = _value(name, kind, match[2] or "")
    return [
        _rule(group, found) for wanted in ("inject-error", "set-state") for group, found in sections if group == wanted
    ]


def _check_id(group: str, identifier: str, ids: set[tuple[str, str]]) -> None:
    if not _IDENTIFIER.fullmatch(identifier):
        raise Error("Parameter 'id' expects an identifier", errno.EINVAL)
    if (group, identifier) in ids:
        raise Error(f"Duplicate ID '{identifier}' for {group}", errno.EINVAL)
    ids.add((group, identifier))


def _value(name: str, kind: type, text: str) -> Any:
    if kind is bool:
        if text not in ("on", "off"):
            raise Error(f"Parameter '{name}' expects 'on' or 'off'", errno.EINVAL)
        return text == "on"
    if kind is int:
        match = _NUMBER.fullmatch(text)
        if match is None:
            raise Error(f"Parameter '{name}' expects a number", errno.EINVAL)
        sign, hexadecimal, octal, decimal = match.groups()
        value = int(hexadecimal, 16) if hexadecimal else int(octal, 8) if octal else int(decimal)
        if value >> 64:
            raise Error(f"Value '{text}' is too large for parameter '{name}'", errno.EINVAL)
        value = -value if sign == "-" else value
        return (value + (1 << 63)) % (1 << 64) - (1 << 63)
    return text


def _rule(group: str, members: dict[str, Any]) -> Rule:
    if "event" not in members:
        raise Error("Missing event name for rule", errno.EINVAL)
    for name, values in (("event", BlkdebugEvent), ("iotype", BlkdebugIOType)):
        if name in members:
            try:
                members[name] = values(members[name])
            except ValueError:
                raise Error(f"invalid parameter value: {members[name]}", errno.EINVAL) from None
    if group == "inject-error":
        return BlkdebugInjectErrorOptions(**members)
    return BlkdebugSetStateOptions(**{"new_state": 0, **members})
