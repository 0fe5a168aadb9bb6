"""The command ``pyqsd``: the options of qemu-storage-daemon, in its order of evaluation.

There are two passes. The first sees only mistakes in the form of the command line, ``--help``, ``--version`` and
``--daemonize``; the second does everything else, in the order given. This module is what has to be imported for the
first one, and nothing more: the rest is in `pyqsd.cli.run`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from pyqsd import __version__
from pyqsd.cli.getopt import Option, parse
from pyqsd.trace import report

OPTIONS = (
    Option("blockdev", True),
    Option("chardev", True),
    Option("daemonize", False),
    Option("export", True),
    Option("help", False, "h"),
    Option("monitor", True),
    Option("nbd-server", True),
    Option("object", True),
    Option("pidfile", True),
    Option("trace", True, "T"),
    Option("version", False, "V"),
)

#: The version of qemu-storage-daemon whose behaviour this is; `query-version` gives it too.
QSD_VERSION = "10.0.2"

VERSION_TEXT = f"""\
pyqsd version {__version__} (qemu-storage-daemon version {QSD_VERSION})
Copyright (c) the pyqsd contributors
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the daemon with the command line `argv` (program name first; default: ``sys.argv``). Returns the exit
    status."""
    # Until the event loop has its own handlers, signals do what they do to any program: no traceback from Ctrl-C.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    argv = sys.argv if argv is None else argv
    program = program_name(argv[0])
    report.use_stderr(program)
    words = list(parse(argv[1:], OPTIONS))
    daemonize = False
    for word in words:
        match word.name:
            case "?":
                report.error(word.value or "")
                return 1
            case "help":
                from pyqsd.cli.help import TEXT

                return _print(TEXT.format(program=program))
            case "version":
                return _print(VERSION_TEXT)
            case "daemonize":
                daemonize = True
    background = None
    if daemonize:
        from pyqsd.cli.background import Background

        background = Background()
    from pyqsd.cli.run import run

    return run(words, background)


def program_name(path: str) -> str:
    """How the program calls itself: as it was called."""
    name = os.path.basename(path)
    return "pyqsd" if name.endswith(".py") or not name else name


def _print(text: str) -> int:
    """Print `text`; exit status 0, or 1 if nobody could read it."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as exc:
        report.error(f"cannot write to standard output: {exc.strerror}")
        # Nothing that is left in the buffer may fail once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
