"""The backend ``pipe``: named pipes, ``PATH.in`` to read and ``PATH.out`` to write, or ``PATH`` for both."""

from __future__ import annotations

import os

from pyqsd.chardev.file import FdChardev, open_fd
from pyqsd.chardev.options import ChardevBackend, ChardevCommon
from pyqsd.chardev.opts import Opts
from pyqsd.qapi.errors import Error


class ChardevHostdev(ChardevCommon, kw_only=True):
    """`device`: a path."""

    device: str


class PipeBackend(ChardevBackend, tag="pipe"):
    """The branch ``pipe``."""

    data: ChardevHostdev


class PipeChardev(FdChardev):
    """See above. The pipes are opened for reading and writing, so that writers may come and go."""

    name = "pipe"

    @classmethod
    def options_from(cls, opts: Opts) -> ChardevCommon:
        path = opts.get("path")
        if path is None:
            raise Error("chardev: pipe: no device path given")
        return ChardevHostdev(device=path, **opts.common())

    async def open(self) -> None:
        path: str = self.options.device
        try:
            input_fd = open_fd(f"{path}.in", os.O_RDWR)
        except Error:
            input_fd = -1
        try:
            output_fd = open_fd(f"{path}.out", os.O_RDWR)
        except Error:
            output_fd = -1
        if input_fd < 0 or output_fd < 0:
            for fd in (input_fd, output_fd):
                if fd >= 0:
                    os.close(fd)
            input_fd = output_fd = open_fd(path, os.O_RDWR)
        self._start(input_fd, output_fd)


CHARDEV = PipeChardev
BACKEND = PipeBackend
