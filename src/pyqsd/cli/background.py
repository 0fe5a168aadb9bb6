"""Going into the background (``--daemonize``)."""

from __future__ import annotations

import os
import signal


class Background:
    """Forks; in the child, which goes on, tells the waiting parent how the start went.

    Made before anything else happens (no thread, no event loop exists yet). The parent does not return: it exits with
    status 0 when `ready` is called, and with 1 when the child ends without that. Relative paths go on working and
    stderr goes on being the user's until then.
    """

    def __init__(self) -> None:
        read_end, self._write_end = os.pipe()
        if os.fork():
            os.close(self._write_end)
            os._exit(0 if _read(read_end) == b"\0" else 1)
        os.close(read_end)
        # A session of our own, and not its leader, so that no terminal can ever become ours.
        os.setsid()
        if os.fork():
            os._exit(0)
        os.umask(0o027)
        for number in (signal.SIGTSTP, signal.SIGTTOU, signal.SIGTTIN):
            signal.signal(number, signal.SIG_IGN)

    def ready(self) -> None:
        """Everything is up: let go of the terminal and of the working directory, and let the parent exit. Raises
        OSError."""
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        if null > 2:
            os.close(null)
        os.write(self._write_end, b"\0")
        os.close(self._write_end)


def _read(fd: int) -> bytes:
    return os.read(fd, 1)
