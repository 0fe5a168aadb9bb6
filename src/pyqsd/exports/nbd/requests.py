"""What NBD requests do: the rules that they have to keep, and those that need a coroutine."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Final

from pyqsd.block.driver import FUA, MAY_UNMAP, NO_FALLBACK
from pyqsd.exports.nbd import protocol as p
from pyqsd.exports.nbd.buffers import POOL

if TYPE_CHECKING:
    from pyqsd.exports.nbd.export import NbdExport

#: (length in bytes, flags)
Extents = list[tuple[int, int]]

#: The message of a failed request by its type.
FAILURES: Final = {
    p.CMD_READ: "reading from file failed",
    p.CMD_WRITE: "writing to file failed",
    p.CMD_FLUSH: "flush failed",
    p.CMD_TRIM: "discard failed",
    p.CMD_CACHE: "caching data failed",
    p.CMD_WRITE_ZEROES: "writing to file failed",
    p.CMD_BLOCK_STATUS: "can't get block status",
}

_CHANGES: Final = (p.CMD_WRITE, p.CMD_TRIM, p.CMD_WRITE_ZEROES)
_FLAGS: Final = {
    p.CMD_WRITE_ZEROES: p.CMD_FLAG_FUA | p.CMD_FLAG_NO_HOLE | p.CMD_FLAG_FAST_ZERO,
    p.CMD_BLOCK_STATUS: p.CMD_FLAG_FUA | p.CMD_FLAG_REQ_ONE,
}
_CACHE_STEP: Final = 1 << 20


def check(export: NbdExport, mode: int, flags: int, kind: int, offset: int, length: int) -> str | None:
    """What is wrong with the form of a request, or None. `length`: bytes that it is about."""
    if kind in _CHANGES and not export.writable:
        return "Export is read-only"
    if offset > export.size or length > export.size - offset:
        return f"operation past EOF; From: {offset}, Len: {length}, Size: {export.size}"
    valid = _FLAGS.get(kind, p.CMD_FLAG_FUA)
    if kind == p.CMD_READ and mode != p.SIMPLE:
        valid |= p.CMD_FLAG_DF
    elif kind in (p.CMD_WRITE, p.CMD_BLOCK_STATUS) and mode == p.EXTENDED:
        valid |= p.CMD_FLAG_PAYLOAD_LEN
    if flags & ~valid:
        return f"unsupported flags for command {p.COMMAND_NAMES.get(kind, '<unknown>')} (got 0x{flags:x})"
    if kind not in p.COMMAND_NAMES:
        return f"invalid request type ({kind}) received"
    return None


def check_status(negotiated: frozenset[int], ids: frozenset[int], length: int) -> str | None:
    """What is wrong with a block status request for the contexts `ids`, or None."""
    if not negotiated:
        return "CMD_BLOCK_STATUS not negotiated"
    if not ids:
        return "CMD_BLOCK_STATUS payload not valid"
    return None if length else "need non-zero length"


def read_now(export: NbdExport, offset: int, length: int, view: memoryview) -> bool:
    """Read if that takes no waiting."""
    try:
        return export.backend.read_now(offset, length, [view])
    except OSError:
        return False


def write_now(export: NbdExport, offset: int, length: int, view: memoryview) -> bool:
    """Write if that takes no waiting."""
    try:
        return export.backend.write_now(offset, length, [view])
    except OSError:
        return False


async def block_status(
    export: NbdExport, ids: list[int], offset: int, length: int, most: int
) -> list[tuple[int, Extents]]:
    """The extents of every context. Raises OSError."""
    return [(context, await export.status(context, offset, length, most)) for context in ids]


def start(export: NbdExport, kind: int, flags: int, offset: int, length: int) -> Coroutine[Any, Any, None]:
    """The coroutine of a request without payload."""
    backend = export.backend
    fua = bool(flags & p.CMD_FLAG_FUA)
    if kind == p.CMD_TRIM:
        return _trim(export, offset, length, fua)
    if kind == p.CMD_WRITE_ZEROES:
        how = FUA if fua or export.writethrough else 0
        if not flags & p.CMD_FLAG_NO_HOLE:
            how |= MAY_UNMAP
        if flags & p.CMD_FLAG_FAST_ZERO:
            how |= NO_FALLBACK
        return backend.pwrite_zeroes(offset, length, how)
    if kind == p.CMD_CACHE:
        return _cache(export, offset, length)
    return backend.flush()


async def _trim(export: NbdExport, offset: int, length: int, fua: bool) -> None:
    await export.backend.pdiscard(offset, length)
    if fua:
        await export.backend.flush()


async def _cache(export: NbdExport, offset: int, length: int) -> None:
    """Read the range, which brings it into the caches on its way."""
    end = offset + length
    buffer = POOL.get(min(length, _CACHE_STEP))
    try:
        while offset < end:
            n = min(end - offset, _CACHE_STEP)
            await export.backend.preadv(offset, n, [buffer.data[:n]])
            offset += n
    finally:
        POOL.put(buffer)
