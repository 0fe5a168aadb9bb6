"""Messages for whoever started the program: ``pyqsd: --OPTION VALUE: what is wrong``.

The command line sets the program's name and the words being worked on, and messages go to stderr; a program that uses
pyqsd as a library gets them through `logging`, logger ``pyqsd``, instead.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

_program: str | None = None
_location: tuple[str, ...] = ()


def use_stderr(program: str) -> None:
    """Write messages to stderr from now on, after ``program:``."""
    global _program
    _program = program


def set_location(words: Iterable[str] = ()) -> None:
    """The words of the command line that messages are about; none: messages name only the program."""
    global _location
    _location = tuple(words)


def error(text: str, hint: str | None = None) -> None:
    """Report an error. `hint` is a second sentence, on a line of its own."""
    _report("", text, hint)


def warn(text: str, hint: str | None = None) -> None:
    """Report something that the user should know, but that goes on."""
    _report("warning: ", text, hint)


def info(text: str) -> None:
    """Report what is going on."""
    _report("info: ", text, None)


def error_at(where: str, text: str) -> None:
    """Report an error in a file: `where` is ``file`` or ``file:line``."""
    _report("", text, None, where)


def warn_at(where: str | None, text: str) -> None:
    """The same for a warning; without `where`, plain `warn`."""
    _report("warning: ", text, None, where)


def _report(kind: str, text: str, hint: str | None, where: str | None = None) -> None:
    if _program is None:
        import logging

        level = {"": logging.ERROR, "warning: ": logging.WARNING}.get(kind, logging.INFO)
        logging.getLogger("pyqsd").log(level, "%s", f"{where}: {text}" if where else text)
        return
    place = f"{where}:" if where else "".join(f" {word}" for word in _location) + (":" if _location else "")
    _write(2, f"{_program}:{place} {kind}{text}\n" + (f"{hint}\n" if hint else ""))


def _write(fd: int, text: str) -> None:
    """All of `text` with one system call where that is possible, so that lines of several processes do not mix. Bytes
    that are no UTF-8 come out as they went in."""
    data = text.encode("utf-8", "surrogateescape")
    try:
        while data:
            data = data[os.write(fd, data) :]
    except OSError:
        pass  # there is nobody to tell
