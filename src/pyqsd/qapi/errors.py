"""The one tree of errors.

An error is raised with the words that the user shall read and, where a system call or an image caused it, the errno.
It is translated once, at an edge: QMP class and description, NBD error number, exit status and a line on stderr.
The input/output path itself raises plain ``OSError`` (what the kernel raised), which every edge understands as well.
"""

from __future__ import annotations

import errno as _errno
import os


class Error(Exception):
    """A failure that is reported to the user.

    Arguments:
        desc: the description, in QSD's words where QSD has this error.
        errno: the system error number behind it, or 0.
        hint: a second sentence for people; QMP does not carry it, the command line prints it on its own line.
    """

    qmp_class = "GenericError"

    def __init__(self, desc: str, errno: int = 0, hint: str | None = None) -> None:
        super().__init__(desc)
        self.desc = desc
        self.errno = errno
        self.hint = hint

    def __str__(self) -> str:
        return self.desc

    def prefixed(self, prefix: str) -> Error:
        """The same error with `prefix` before its description."""
        clone = type(self)(prefix + self.desc, self.errno, self.hint)
        clone.__cause__ = self
        return clone


class CommandNotFound(Error):
    """QMP error class of the same name (qmp-spec, section 2.4.2)."""

    qmp_class = "CommandNotFound"


class DeviceNotFound(Error):
    """QMP error class of the same name."""

    qmp_class = "DeviceNotFound"


class DeviceNotActive(Error):
    """QMP error class of the same name."""

    qmp_class = "DeviceNotActive"


def strerror(number: int) -> str:
    """The system's text for an errno, as C's strerror() gives it."""
    return os.strerror(number)


def from_oserror(exc: OSError, prefix: str) -> Error:
    """`prefix: strerror`, as QSD reports failed system calls."""
    number = exc.errno or _errno.EIO
    return Error(f"{prefix}: {os.strerror(number)}", number)
