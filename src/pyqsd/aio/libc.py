"""System calls that the os module lacks. They raise OSError; each call releases the GIL."""

from __future__ import annotations

import ctypes
import os

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = _libc.fallocate64 if hasattr(_libc, "fallocate64") else _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

# fallocate(2), linux/falloc.h
FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2): allocate, punch or zero `length` bytes from `offset`."""
    while _fallocate(fd, mode, offset, length):
        number = ctypes.get_errno()
        if number != 4:  # EINTR
            raise OSError(number, os.strerror(number))


class _Statx(ctypes.Structure):
    """struct statx, linux/stat.h: only the mask and the O_DIRECT members have names."""

    _fields_ = [
        ("stx_mask", ctypes.c_uint32),
        ("_before", ctypes.c_uint32 * 37),
        ("stx_dio_mem_align", ctypes.c_uint32),
        ("stx_dio_offset_align", ctypes.c_uint32),
        ("_after", ctypes.c_uint64 * 12),
    ]


assert ctypes.sizeof(_Statx) == 256 and _Statx.stx_dio_mem_align.offset == 0x98

_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN = 0x2000


def dio_alignment(fd: int) -> tuple[int, int] | None:
    """``(memory, offset)`` alignment in bytes that O_DIRECT needs on this file (statx(2), since Linux 6.1), (0, 0) if
    it cannot be used, or None when the kernel or file system does not say."""
    try:
        statx = _libc.statx
    except AttributeError:
        return None
    buffer = _Statx()
    if statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, ctypes.byref(buffer)):
        return None
    if not buffer.stx_mask & _STATX_DIOALIGN:
        return None
    return buffer.stx_dio_mem_align, buffer.stx_dio_offset_align
