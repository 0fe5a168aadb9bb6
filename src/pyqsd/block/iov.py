"""Scatter-gather lists: lists of memoryviews of format ``B``."""

from __future__ import annotations

import ctypes
import mmap

#: Zero bytes to compare with and to write from.
_ZEROES = bytes(1 << 20)


def part(iov: list[memoryview], start: int, length: int) -> list[memoryview]:
    """The bytes ``[start, start + length)`` of `iov`, as views."""
    if len(iov) == 1:
        return [iov[0][start : start + length]]
    found = []
    for view in iov:
        size = len(view)
        if start >= size:
            start -= size
            continue
        piece = view[start : start + length]
        found.append(piece)
        length -= len(piece)
        start = 0
        if not length:
            break
    return found


def fill_zero(iov: list[memoryview]) -> None:
    """Set all bytes to zero."""
    for view in iov:
        size = len(view)
        if size <= len(_ZEROES):
            view[:] = _ZEROES[:size] if size < len(_ZEROES) else _ZEROES
        else:
            for at in range(0, size, len(_ZEROES)):
                n = min(len(_ZEROES), size - at)
                view[at : at + n] = _ZEROES[:n]


def is_zero(iov: list[memoryview]) -> bool:
    """Whether all bytes are zero."""
    for view in iov:
        size = len(view)
        # Most data differs in its first bytes.
        if view[:16] != _ZEROES[: min(16, size)]:
            return False
        for at in range(0, size, len(_ZEROES)):
            piece = view[at : at + len(_ZEROES)]
            if bytes(piece) != _ZEROES[: len(piece)]:
                return False
    return True


def copy(target: list[memoryview], source: list[memoryview]) -> None:
    """Copy all bytes of `source` into `target`, which is as long."""
    t = s = 0
    t_at = s_at = 0
    while t < len(target) and s < len(source):
        n = min(len(target[t]) - t_at, len(source[s]) - s_at)
        target[t][t_at : t_at + n] = source[s][s_at : s_at + n]
        t_at += n
        s_at += n
        if t_at == len(target[t]):
            t, t_at = t + 1, 0
        if s_at == len(source[s]):
            s, s_at = s + 1, 0


def aligned_buffer(length: int) -> memoryview:
    """A writable page-aligned buffer of `length` bytes (zeroed)."""
    return memoryview(mmap.mmap(-1, max(length, 1)))[:length]


def is_aligned(iov: list[memoryview], alignment: int) -> bool:
    """Whether every buffer starts at, and is, a multiple of `alignment` bytes. Read-only buffers count as unaligned,
    because their address cannot be had cheaply."""
    mask = alignment - 1
    for view in iov:
        if view.readonly or len(view) & mask:
            return False
        if len(view) and ctypes.addressof(ctypes.c_char.from_buffer(view)) & mask:
            return False
    return True


def zero_views(length: int) -> list[memoryview]:
    """`length` zero bytes for writing (one shared read-only buffer, several times)."""
    view = memoryview(_ZEROES)
    whole, rest = divmod(length, len(_ZEROES))
    return [view] * whole + ([view[:rest]] if rest else [])
