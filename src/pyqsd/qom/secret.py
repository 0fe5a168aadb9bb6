"""The object type ``secret``: a password or key, given in the options or in a file."""

from __future__ import annotations

import asyncio
import os
import stat
from typing import ClassVar

from pyqsd.chardev.paths import encode
from pyqsd.qapi.errors import Error
from pyqsd.qom.object import Property, text
from pyqsd.qom.secret_common import SecretObject, SecretOptions


class SecretFileOptions(SecretOptions, tag="secret"):
    """`data`: the secret itself (visible to everybody who sees the command line); `file`: a file that has it."""

    data: str | None = None
    file: str | None = None


class Secret(SecretObject):
    """See above."""

    type_name = "secret"
    Options = SecretFileOptions
    properties: ClassVar[tuple[Property, ...]] = (*SecretObject.properties, text("file"), text("data"))

    async def load(self) -> bytes:
        options: SecretFileOptions = self.options
        if options.file is not None:
            if options.data is not None:
                raise Error("'file' and 'data' are mutually exclusive")
            return await _read(options.file)
        if options.data is None:
            raise Error("Either 'file' or 'data' must be provided")
        return options.data.encode("utf-8", "surrogateescape")


async def _read(path: str) -> bytes:
    """The content of a file. Raises Error."""
    what = "Failed to open file"
    try:
        fd = os.open(encode(path), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            what = "Error reading file"
            if stat.S_ISREG(os.fstat(fd).st_mode):
                with open(fd, "rb", closefd=False) as file:
                    return file.read()
            # A pipe (such as a shell's process substitution) may take its time.
            os.set_blocking(fd, True)
            return await asyncio.to_thread(_read_all, fd)
        finally:
            os.close(fd)
    except OSError as exc:
        raise Error(f"Unable to read {path}: {what} “{path}”: {os.strerror(exc.errno or 0)}", exc.errno or 0) from exc


def _read_all(fd: int) -> bytes:
    parts = []
    while part := os.read(fd, 65536):
        parts.append(part)
    return b"".join(parts)


OBJECT = Secret
