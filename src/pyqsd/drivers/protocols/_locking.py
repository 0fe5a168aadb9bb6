"""Locks on image files, shared with QEMU's programs: whoever uses an image says which permissions it holds and which it
does not let others have, in open-file-description locks on single bytes.

For the permission with bit number `i` (QAPI ``BlockPermission``: consistent-read 0, write 1, write-unchanged 2, resize
3) a shared lock on byte ``100 + i`` means "held", and one on byte ``200 + i`` means "not shared". Nobody ever takes an
exclusive lock; one looks whether one could be had. Facts from the locks that qemu-storage-daemon 10.0 sets.
"""

from __future__ import annotations

import errno
import fcntl
import struct

from pyqsd.block import permissions as perms
from pyqsd.qapi.errors import Error

_HELD = 100
_UNSHARED = 200
_BITS = 4

#: struct flock: type, whence, start, length, pid (0 with these locks).
_FLOCK = struct.Struct("@hhqqi4x")


def _set(fd: int, kind: int, start: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, 0, start, 1, 0))


def _somebody_has(fd: int, start: int) -> bool:
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, start, 1, 0))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def supported() -> bool:
    """Whether this system has open-file-description locks."""
    return hasattr(fcntl, "F_OFD_SETLK")


class FileLocks:
    """The locks that one open file holds."""

    def __init__(self, fd: int, filename: str) -> None:
        self.fd = fd
        self.filename = filename
        self.held = 0
        self.unshared = 0

    def add(self, held: int, unshared: int) -> None:
        """Lock what is not locked yet. Raises Error, having given back what this call had locked."""
        before = self.held, self.unshared
        try:
            for bit in range(_BITS):
                if held & ~self.held & 1 << bit:
                    self._take(_HELD + bit)
                    self.held |= 1 << bit
                if unshared & ~self.unshared & 1 << bit:
                    self._take(_UNSHARED + bit)
                    self.unshared |= 1 << bit
        except BaseException:
            self.keep(*before)
            raise

    def _take(self, byte: int) -> None:
        try:
            _set(self.fd, fcntl.F_RDLCK, byte)
        except OSError as exc:
            raise Error(f"Failed to lock byte {byte}", exc.errno or errno.EIO, self._hint()) from exc

    def check(self, held: int, unshared: int) -> None:
        """Look whether anybody else's locks forbid this. Raises Error."""
        for bit in range(_BITS):
            if held & 1 << bit and _somebody_has(self.fd, _UNSHARED + bit):
                raise Error(f'Failed to get "{perms.NAMES[1 << bit]}" lock', errno.EAGAIN, self._hint())
        for bit in range(_BITS):
            if unshared & 1 << bit and _somebody_has(self.fd, _HELD + bit):
                raise Error(f'Failed to get shared "{perms.NAMES[1 << bit]}" lock', errno.EAGAIN, self._hint())

    def keep(self, held: int, unshared: int) -> None:
        """Unlock everything else. Cannot fail: that a lock stays is the worst that can happen."""
        for bit in range(_BITS):
            if self.held & ~held & 1 << bit:
                self._drop(_HELD + bit)
            if self.unshared & ~unshared & 1 << bit:
                self._drop(_UNSHARED + bit)
        self.held &= held
        self.unshared &= unshared

    def _drop(self, byte: int) -> None:
        try:
            _set(self.fd, fcntl.F_UNLCK, byte)
        except OSError:
            pass

    def _hint(self) -> str:
        return f"Is another process using the image [{self.filename}]?"
