"""Making a file for an image: runs in a worker thread, as it waits."""

from __future__ import annotations

import errno
import os
import stat
from typing import Final

from pyqsd.block import permissions as perms
from pyqsd.drivers.protocols import _calls
from pyqsd.drivers.protocols._locking import FileLocks
from pyqsd.drivers.protocols._locking import supported as locks_supported
from pyqsd.qapi.errors import Error, from_oserror

#: What the file system is asked to allocate at once unless something else is wanted (bytes).
_EXTENT_SIZE_HINT: Final = 1 << 20


def create(filename: str, size: int, preallocation: str, nocow: bool, extent_size_hint: int | None) -> None:
    """Make the file `filename`, or empty an existing one that nobody uses, and give it `size` bytes.

    Arguments:
        preallocation: off, falloc or full.
        nocow: ask the file system not to copy on write, where it knows that.
        extent_size_hint: as `_calls.set_extent_size_hint`; None: a usual one, if the file system knows that.

    Raises Error.
    """
    hint = _EXTENT_SIZE_HINT if extent_size_hint is None else extent_size_hint
    if hint >= 1 << 32:
        raise Error("Extent size hint is too large", errno.EINVAL)
    try:
        fd = os.open(filename, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
    except OSError as exc:
        raise from_oserror(exc, f"Could not create '{filename}'") from exc
    except ValueError as exc:
        # A name that no file can have.
        raise Error(f"Could not create '{filename}': {os.strerror(errno.ENOENT)}", errno.ENOENT) from exc
    try:
        # Closing the file gives the locks back.
        if locks_supported():
            _lock(FileLocks(fd, filename))
        _empty(fd)
        if nocow:
            _calls.set_nocow(fd)
        try:
            if hint:
                _calls.set_extent_size_hint(fd, hint)
        except OSError as exc:
            if extent_size_hint is not None and exc.errno != errno.ENOTTY:
                raise from_oserror(exc, "Failed to set extent size hint") from exc
        if size >= 1 << 63:
            # QSD takes it for a negative number.
            if preallocation != "off":
                raise Error("Cannot use preallocation for shrinking files", errno.ENOTSUP)
            raise Error(f"Could not resize file: {os.strerror(errno.EINVAL)}", errno.EINVAL)
        _calls.truncate(fd, size, preallocation)
    finally:
        os.close(fd)


def _lock(locks: FileLocks) -> None:
    held = perms.WRITE | perms.RESIZE
    locks.add(held, perms.RESIZE)
    locks.check(held, perms.RESIZE)


def _empty(fd: int) -> None:
    """Remove the content of a regular file."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        # Nothing else can be given a size.
        raise Error(f"Could not resize file: {os.strerror(errno.EINVAL)}", errno.EINVAL)
    try:
        os.ftruncate(fd, 0)
    except OSError as exc:
        raise from_oserror(exc, "Could not resize file") from exc
