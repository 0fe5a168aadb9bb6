"""What is done to files in the worker threads: these functions wait. They raise OSError or, for the user, Error."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import struct
import sys

from pyqsd.aio import libc
from pyqsd.drivers.protocols import _ioctl
from pyqsd.qapi.errors import Error, from_oserror

#: Where nothing says what O_DIRECT needs, and nothing refuses: the unit of all lengths.
_UNENFORCED = 512
_PIECE = 1 << 20

_FS_IOC_FSGETXATTR = 0x801C581F
#: struct fsxattr: flags, extsize, nextents, project id, cowextsize, padding.
_FSXATTR = struct.Struct("@IIIII8x")
_FS_XFLAG_EXTSIZE = 0x800
_FS_IOC_FSSETXATTR = 0x401C5820
_FS_IOC_GETFLAGS = 0x80086601
_FS_IOC_SETFLAGS = 0x40086602
_FS_NOCOW_FL = 0x00800000


def size_of(fd: int) -> int:
    """Bytes in the file or on the device; 0 for character devices."""
    info = os.fstat(fd)
    if stat.S_ISREG(info.st_mode):
        # Files of /proc and the like have no size to speak of, and cannot be sought in.
        return os.lseek(fd, 0, os.SEEK_END)
    if stat.S_ISBLK(info.st_mode):
        return _ioctl.device_size(fd)
    return os.lseek(fd, 0, os.SEEK_END)


def alignment_of(fd: int) -> tuple[int, int]:
    """``(memory, offset)``: what O_DIRECT on `fd` needs addresses, and offsets and lengths, to be multiples of (bytes).
    Raises Error where that cannot be found out."""
    told = libc.dio_alignment(fd)
    if told is not None and all(told):
        return told
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        size = _ioctl.logical_block_size(fd)
        return size, size
    with mmap.mmap(-1, 2 * mmap.PAGESIZE) as buffer:
        view = memoryview(buffer)
        try:
            for size in (1, 512, 1024, 2048, 4096):
                try:
                    os.preadv(fd, [view[:size]], 0)
                except OSError as exc:
                    if exc.errno == errno.EINVAL:
                        continue
                size = max(size, _UNENFORCED)
                # Its addresses are not worth a second search: a page suits everybody.
                return mmap.PAGESIZE if size > _UNENFORCED else size, size
        finally:
            view.release()
    raise Error("Could not find working O_DIRECT alignment", errno.EINVAL, "Try cache.direct=off")


def truncate(fd: int, length: int, preallocation: str) -> None:
    """Give a regular file another length. Raises Error."""
    size = os.fstat(fd).st_size
    if length < size and preallocation != "off":
        raise Error("Cannot use preallocation for shrinking files", errno.ENOTSUP)
    if preallocation not in ("off", "falloc", "full"):
        raise Error(f"Unsupported preallocation mode: {preallocation}", errno.ENOTSUP)
    if preallocation == "off" or length == size:
        try:
            os.ftruncate(fd, length)
        except OSError as exc:
            raise from_oserror(exc, "Could not resize file") from exc
        return
    try:
        if preallocation == "falloc":
            try:
                os.posix_fallocate(fd, size, length - size)
            except OSError as exc:
                raise from_oserror(exc, "Could not preallocate new data") from exc
        else:
            _write_zeroes(fd, size, length)
    except BaseException:
        try:
            os.ftruncate(fd, size)
        except OSError:
            # The first error is the one to be told.
            pass
        raise


def _write_zeroes(fd: int, start: int, end: int) -> None:
    # A second file without O_DIRECT: the old end need not be aligned.
    out = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        zeroes = bytes(_PIECE)
        at = start
        try:
            while at < end:
                at += os.pwrite(out, zeroes[: min(_PIECE - at % _PIECE, end - at)], at)
        except OSError as exc:
            raise from_oserror(exc, "Could not write zeros for preallocation") from exc
        try:
            os.fsync(out)
        except OSError as exc:
            raise from_oserror(exc, "Could not flush file to disk") from exc
    finally:
        os.close(out)


def drop_cache(fd: int) -> None:
    """Write back what is dirty and forget what is clean of this host's page cache."""
    os.fdatasync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def extent_size_hint(fd: int) -> int | None:
    """Bytes that the file system allocates at once for this file, or None if it has no such setting."""
    try:
        answer = fcntl.ioctl(fd, _FS_IOC_FSGETXATTR, bytes(_FSXATTR.size))
    except OSError:
        return None
    flags, size, *_ = _FSXATTR.unpack(answer)
    return size if flags & _FS_XFLAG_EXTSIZE and size else None


def set_extent_size_hint(fd: int, size: int) -> None:
    """Ask the file system to allocate multiples of `size` bytes for this file. Raises OSError, ENOTTY or EOPNOTSUPP if
    it knows no such setting."""
    answer = fcntl.ioctl(fd, _FS_IOC_FSGETXATTR, bytes(_FSXATTR.size))
    flags, _, *rest = _FSXATTR.unpack(answer)
    fcntl.ioctl(fd, _FS_IOC_FSSETXATTR, _FSXATTR.pack(flags | _FS_XFLAG_EXTSIZE, size, *rest))


def set_nocow(fd: int) -> None:
    """Ask the file system not to copy on write in this file; nothing happens where it knows no such setting."""
    try:
        flags = int.from_bytes(fcntl.ioctl(fd, _FS_IOC_GETFLAGS, bytes(8))[:4], sys.byteorder)
        fcntl.ioctl(fd, _FS_IOC_SETFLAGS, (flags | _FS_NOCOW_FL).to_bytes(8, sys.byteorder))
    except OSError:
        pass


def copy_range(source: int, at: int, target: int, offset: int, length: int) -> bool:
    """Let the kernel copy from the file descriptor `source` to `target`. False if it does not do all of it, for
    whatever reason: who then reads and writes himself learns whose error it was."""
    try:
        while length:
            n = os.copy_file_range(source, target, length, at, offset)
            if not n:
                return False
            at += n
            offset += n
            length -= n
    except OSError:
        return False
    return True
