"""The backend ``file``: what is written goes to a file, and what is read comes from another one."""

from __future__ import annotations

import os
from typing import Any

from pyqsd.chardev.chardev import Chardev
from pyqsd.chardev.options import ChardevBackend, ChardevCommon
from pyqsd.chardev.opts import Opts
from pyqsd.chardev.paths import encode
from pyqsd.chardev.stream import Stream
from pyqsd.qapi.errors import Error, from_oserror


class ChardevFile(ChardevCommon, kw_only=True):
    """`out`: the file to write, emptied first unless `append`. `in_`: the file to read, if any."""

    in_: str | None = None
    out: str
    append: bool | None = None


class FileBackend(ChardevBackend, tag="file"):
    """The branch ``file``."""

    data: ChardevFile


class FdChardev(Chardev):
    """Base of the backends that have plain file descriptors: one to read and one to write, or one for both."""

    qom_parent = "chardev-fd"

    def __init__(self, label: str, options: Any) -> None:
        super().__init__(label, options)
        self._fds: tuple[int, int] | None = None
        self._stream: Stream | None = None

    def _start(self, input_fd: int, output_fd: int) -> None:
        """Go on with these (non-blocking; -1 for none); they are closed at the end."""
        self._fds = (input_fd, output_fd)
        self._stream = Stream(input_fd, output_fd, self._received, self._ended, self._output_lost)
        self._opened()
        self._update_reading()

    def _ended(self) -> None:
        """There is nothing more to read. What is written still goes out."""
        if self.frontend is not None:
            self.frontend.closed()

    async def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        if self._fds is not None:
            self._release(self._fds)
            self._fds = None
        self._closed()

    def _release(self, fds: tuple[int, int]) -> None:
        for fd in {fd for fd in fds if fd >= 0}:
            os.close(fd)

    @property
    def pressed(self) -> bool:
        return self._stream is not None and self._stream.pressed

    def _write(self, data: bytes) -> None:
        if self._stream is not None:
            self._stream.write(data)

    def _update_reading(self) -> None:
        if self._stream is not None:
            self._stream.read(self._wants_input)


def open_fd(path: str, flags: int) -> int:
    """Open `path` without ever blocking. Raises Error."""
    try:
        return os.open(encode(path), flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    except OSError as exc:
        raise from_oserror(exc, f"Could not open '{path}'") from exc


class FileChardev(FdChardev):
    """See above."""

    name = "file"

    @classmethod
    def options_from(cls, opts: Opts) -> ChardevCommon:
        path = opts.get("path")
        if path is None:
            raise Error("chardev: file: no filename given")
        return ChardevFile(out=path, in_=opts.get("input-path"), append=opts.get("append"), **opts.common())

    async def open(self) -> None:
        options: ChardevFile = self.options
        flags = os.O_WRONLY | os.O_CREAT | (os.O_APPEND if options.append else os.O_TRUNC)
        output_fd = open_fd(options.out, flags)
        input_fd = -1
        if options.in_ is not None:
            try:
                input_fd = open_fd(options.in_, os.O_RDONLY)
            except Error:
                os.close(output_fd)
                raise
        self._start(input_fd, output_fd)


CHARDEV = FileChardev
BACKEND = FileBackend
