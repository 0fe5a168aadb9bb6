"""Requests to block devices (linux/fs.h, linux/blkdev.h). They wait, and raise OSError."""

from __future__ import annotations

import fcntl
import struct

_BLKSSZGET = 0x1268
_BLKPBSZGET = 0x127B
_BLKGETSIZE64 = 0x80081272
_BLKDISCARD = 0x1277
_BLKZEROOUT = 0x127F
_BLKROGET = 0x125E

_INT = struct.Struct("@i")
_U64 = struct.Struct("@Q")
_RANGE = struct.Struct("@QQ")


def logical_block_size(fd: int) -> int:
    """The sector size in bytes: the unit of O_DIRECT."""
    return int(_INT.unpack(fcntl.ioctl(fd, _BLKSSZGET, bytes(_INT.size)))[0])


def physical_block_size(fd: int) -> int:
    """The size in bytes below which the device reads and writes back."""
    return int(_INT.unpack(fcntl.ioctl(fd, _BLKPBSZGET, bytes(_INT.size)))[0])


def device_size(fd: int) -> int:
    """Bytes on the device."""
    return int(_U64.unpack(fcntl.ioctl(fd, _BLKGETSIZE64, bytes(_U64.size)))[0])


def is_read_only(fd: int) -> bool:
    """Whether the device refuses writes, although it may have been opened for writing."""
    return bool(_INT.unpack(fcntl.ioctl(fd, _BLKROGET, bytes(_INT.size)))[0])


def discard(fd: int, offset: int, length: int) -> None:
    """Tell the device that the range is no longer needed."""
    fcntl.ioctl(fd, _BLKDISCARD, _RANGE.pack(offset, length))


def zero_out(fd: int, offset: int, length: int) -> None:
    """Make the range read as zeroes; the kernel may have to write them."""
    fcntl.ioctl(fd, _BLKZEROOUT, _RANGE.pack(offset, length))
