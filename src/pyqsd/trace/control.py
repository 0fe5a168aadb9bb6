"""Switching trace events: what ``--trace`` means."""

from __future__ import annotations

import fnmatch
import os
import re

from pyqsd.trace import EVENTS, events, log_to, report

assert events


def enable(pattern: str, where: str | None = None) -> None:
    """Switch on the events that `pattern` (a name, or with ``*`` and ``?``) matches; with a ``-`` before it, off.

    A name that no event has is a warning, as a script may name events of another version; `where` is then put after
    the program's name instead of the words of the command line.
    """
    value = not pattern.startswith("-")
    pattern = pattern.removeprefix("-")
    if "*" in pattern:
        # fnmatch also knows [sets], which are plain characters here.
        matcher = re.compile(fnmatch.translate(pattern.replace("[", "[[]")))
        for name, event in EVENTS.items():
            if matcher.match(name):
                event.enabled = value
    elif pattern in EVENTS:
        EVENTS[pattern].enabled = value
    else:
        report.warn_at(where, f"trace event '{pattern}' does not exist")


def enable_from_file(path: str) -> None:
    """Apply every line of the file `path` that is not empty or a comment (``#``). Raises OSError."""
    with open(path, encoding="utf-8", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            pattern = line.rstrip("\n")
            if pattern and not pattern.startswith("#"):
                enable(pattern, f"{path}:{number}")


def set_file(path: str) -> None:
    """Write the log to `path`, where ``%d`` stands for the process id. Raises OSError."""
    log_to(path.replace("%d", str(os.getpid())))


def listing() -> str:
    """All events, a name per line."""
    return "".join(f"{name}\n" for name in EVENTS)
