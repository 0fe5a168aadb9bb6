"""The file with the process id, locked for as long as the process lives, as other daemons and scripts expect it."""

from __future__ import annotations

import errno
import fcntl
import os

from pyqsd.qapi.errors import Error


class Pidfile:
    """Creates and locks the file `path` and writes the process id into it; `remove` takes it away.

    The lock is a POSIX record lock over the whole file, which qemu-storage-daemon takes too: whoever starts a second
    daemon with the same file is refused, and a file left behind by a crash is simply used again. Raises Error.
    """

    def __init__(self, path: str) -> None:
        try:
            self._fd = self._create(path)
        except OSError as exc:
            raise Error(f"Could not create '{path}': {exc.strerror}", exc.errno or 0) from None
        # The daemon may change its working directory later.
        self._path = os.path.realpath(path)
        try:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, b"%d\n" % os.getpid(), 0)
        except OSError as exc:
            self.remove()
            raise Error(f"Failed to write pid file: {exc.strerror}", exc.errno or 0) from None

    @staticmethod
    def _create(path: str) -> int:
        while True:
            fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)
            try:
                try:
                    fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as exc:
                    number = errno.EAGAIN if exc.errno == errno.EACCES else exc.errno or errno.EIO
                    raise Error(f"Cannot lock pid file: {os.strerror(number)}", number) from None
                # Another daemon may have removed the file between our open and our lock, which is then worth nothing.
                try:
                    there = os.stat(path)
                except FileNotFoundError:
                    there = None
                if there is not None and os.path.samestat(there, os.fstat(fd)):
                    return fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    def remove(self) -> None:
        """Remove the file, if it is still ours, and give up the lock. Never raises."""
        try:
            if os.path.samestat(os.stat(self._path), os.fstat(self._fd)):
                os.unlink(self._path)
        except OSError:
            pass
        os.close(self._fd)
