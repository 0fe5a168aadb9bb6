"""Trace events: what happens inside, told while it happens.

An event costs one attribute test while it is off::

    if events.NBD_NEGOTIATE_BEGIN.enabled:
        events.NBD_NEGOTIATE_BEGIN()

Events are switched with ``--trace`` (`pyqsd.trace.control`) and written by the ``log`` backend: a line per event on
stderr, or in the file that ``--trace file=`` names. Their names and formats are those of qemu-storage-daemon, so that
scripts which read such logs go on working.
"""

from __future__ import annotations

import os

#: Every event by name, in the order of their declaration in `pyqsd.trace.events`.
EVENTS: dict[str, Event] = {}

_log_fd = 2


class Event:
    """One trace event. Call it with the arguments of its `format` (``%`` formatting) when it is `enabled`."""

    __slots__ = ("enabled", "format", "name")

    def __init__(self, name: str, format: str) -> None:
        self.name = name
        self.format = format
        self.enabled = False
        EVENTS[name] = self

    def __call__(self, *args: object) -> None:
        line = f"{self.name} {self.format % args}\n".encode("utf-8", "surrogateescape")
        try:
            os.write(_log_fd, line)
        except OSError:
            pass  # a full disk or a closed pipe must not stop what is being traced


def log_to(path: str) -> None:
    """Write events to the file `path` from now on (truncated). Raises OSError."""
    global _log_fd
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o666)
    if _log_fd != 2:
        os.close(_log_fd)
    _log_fd = fd
