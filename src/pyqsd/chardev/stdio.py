"""The backend ``stdio``: the program's own standard input and output."""

from __future__ import annotations

import asyncio
import atexit
import os
import signal
import termios
from typing import Any, ClassVar

from pyqsd.chardev.chardev import Frontend
from pyqsd.chardev.file import FdChardev
from pyqsd.chardev.options import ChardevBackend, ChardevCommon
from pyqsd.chardev.opts import Opts
from pyqsd.qapi.errors import Error, from_oserror


class ChardevStdio(ChardevCommon):
    """`signal`: keys such as Ctrl-C send signals (true unless given)."""

    signal: bool | None = None


class StdioBackend(ChardevBackend, tag="stdio"):
    """The branch ``stdio``."""

    data: ChardevStdio


class StdioChardev(FdChardev):
    """See above. The terminal's mode is put back when it is closed, or at exit at the latest."""

    name = "stdio"

    _in_use: ClassVar[bool] = False

    def __init__(self, label: str, options: ChardevStdio) -> None:
        super().__init__(label, options)
        self._mode: list[Any] | None = None
        self._blocking: dict[int, bool] = {}
        self._echo = False

    @classmethod
    def options_from(cls, opts: Opts) -> ChardevCommon:
        return ChardevStdio(signal=opts.get("signal"), **opts.common())

    async def open(self) -> None:
        if StdioChardev._in_use:
            raise Error("cannot use stdio by multiple character devices")
        try:
            self._blocking = {fd: os.get_blocking(fd) for fd in (0, 1)}
        except OSError as exc:
            raise from_oserror(exc, "Failed to set FD nonblocking") from exc
        StdioChardev._in_use = True
        atexit.register(self._restore)
        for fd in (0, 1):
            os.set_blocking(fd, False)
        if os.isatty(0):
            self._mode = termios.tcgetattr(0)
            # Whoever stopped and continued this program may have changed the mode.
            try:
                self._wakeup_fd = signal.set_wakeup_fd(-1)
                signal.set_wakeup_fd(self._wakeup_fd)
                asyncio.get_running_loop().add_signal_handler(signal.SIGCONT, self._set_mode)
            except (RuntimeError, ValueError):
                pass  # only the main thread's loop can have signals
        self._set_mode()
        self._start(0, 1)

    def attach(self, frontend: Frontend) -> None:
        super().attach(frontend)
        # A monitor's user sees what they type, and can edit it.
        self._echo = True
        self._set_mode()

    def _set_mode(self) -> None:
        if self._mode is None:
            return
        iflag, oflag, cflag, lflag, ispeed, ospeed, cc = self._mode
        cc = list(cc)
        if not self._echo:
            iflag &= ~(
                termios.IGNBRK
                | termios.BRKINT
                | termios.PARMRK
                | termios.ISTRIP
                | termios.INLCR
                | termios.IGNCR
                | termios.ICRNL
                | termios.IXON
            )
            oflag |= termios.OPOST
            lflag &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.IEXTEN)
            cflag = (cflag & ~(termios.CSIZE | termios.PARENB)) | termios.CS8
            cc[termios.VMIN] = 1
            cc[termios.VTIME] = 0
        if self.options.signal is False:
            lflag &= ~termios.ISIG
        try:
            termios.tcsetattr(0, termios.TCSANOW, [iflag, oflag, cflag, lflag, ispeed, ospeed, cc])
        except termios.error:
            pass  # the terminal is gone

    def _restore(self) -> None:
        for fd, blocking in self._blocking.items():
            try:
                os.set_blocking(fd, blocking)
            except OSError:
                pass
        if self._mode is not None:
            try:
                termios.tcsetattr(0, termios.TCSANOW, self._mode)
            except termios.error:
                pass
            self._mode = None
        self._blocking.clear()

    def _release(self, fds: tuple[int, int]) -> None:
        if self._mode is not None:
            try:
                asyncio.get_running_loop().remove_signal_handler(signal.SIGCONT)
                # Which the loop has taken away with its last handler.
                signal.set_wakeup_fd(self._wakeup_fd)
            except (RuntimeError, ValueError):
                pass
        self._restore()
        atexit.unregister(self._restore)
        StdioChardev._in_use = False


CHARDEV = StdioChardev
BACKEND = StdioBackend
