"""The backend ``pty``: a pseudo terminal, whose slave others open."""

from __future__ import annotations

import asyncio
import os
import select
import tty

from pyqsd.chardev.chardev import Chardev
from pyqsd.chardev.options import ChardevBackend, ChardevCommon
from pyqsd.chardev.opts import Opts
from pyqsd.chardev.paths import encode
from pyqsd.chardev.stream import Stream
from pyqsd.qapi.errors import from_oserror

#: Seconds between looks whether somebody has opened the slave; the kernel does not tell.
_LOOK_EVERY = 0.2


class ChardevPty(ChardevCommon):
    """`path`: a symbolic link to make to the slave."""

    path: str | None = None


class PtyBackend(ChardevBackend, tag="pty"):
    """The branch ``pty``."""

    data: ChardevPty


class PtyChardev(Chardev):
    """See above. There is a peer while the slave is open somewhere."""

    name = "pty"

    def __init__(self, label: str, options: ChardevPty) -> None:
        super().__init__(label, options)
        self._master = -1
        self._slave_name = ""
        self._link: bytes | None = None
        self._stream: Stream | None = None
        self._look: asyncio.TimerHandle | None = None

    @classmethod
    def options_from(cls, opts: Opts) -> ChardevCommon:
        return ChardevPty(path=opts.get("path"), **opts.common())

    async def open(self) -> None:
        try:
            self._master, slave = os.openpty()
        except OSError as exc:
            raise from_oserror(exc, "Failed to create PTY") from exc
        self._slave_name = os.ttyname(slave)
        tty.setraw(slave)
        os.close(slave)
        os.set_blocking(self._master, False)
        path: str | None = self.options.path
        if path is not None:
            try:
                os.symlink(os.fsencode(self._slave_name), encode(path))
            except OSError as exc:
                os.close(self._master)
                self._master = -1
                raise from_oserror(exc, "Failed to create PTY symlink") from exc
            self._link = os.path.abspath(encode(path))
        self._look_for_peer()

    def _look_for_peer(self) -> None:
        self._look = None
        poll = select.poll()
        poll.register(self._master, select.POLLIN)
        if any(events & select.POLLHUP for _, events in poll.poll(0)):
            self._look = asyncio.get_running_loop().call_later(_LOOK_EVERY, self._look_for_peer)
            return
        self._stream = Stream(self._master, self._master, self._received, self._lost, self._output_lost)
        self._opened()
        self._update_reading()

    def _lost(self) -> None:
        self._stream = None
        self._closed()
        self._look = asyncio.get_running_loop().call_later(_LOOK_EVERY, self._look_for_peer)

    async def close(self) -> None:
        if self._look is not None:
            self._look.cancel()
            self._look = None
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        if self._link is not None:
            try:
                if os.readlink(self._link) == os.fsencode(self._slave_name):
                    os.unlink(self._link)
            except OSError:
                pass
            self._link = None
        if self._master >= 0:
            os.close(self._master)
            self._master = -1
        self._closed()

    def filename(self) -> str:
        return f"pty:{self._slave_name}"

    def reply(self) -> str | None:
        return self._slave_name

    @property
    def pressed(self) -> bool:
        return self._stream is not None and self._stream.pressed

    def _write(self, data: bytes) -> None:
        if self._stream is not None:
            self._stream.write(data)

    def _update_reading(self) -> None:
        if self._stream is not None:
            self._stream.read(self._wants_input, watch=self.frontend is None)


CHARDEV = PtyChardev
BACKEND = PtyBackend
