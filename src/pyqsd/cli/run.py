"""The second pass over the command line, and the daemon's life after it."""

from __future__ import annotations

import asyncio
import gc
import logging
import operator
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

from pyqsd.cli.background import Background
from pyqsd.cli.getopt import Word
from pyqsd.cli.pidfile import Pidfile
from pyqsd.monitor.daemon import Daemon
from pyqsd.qapi.convert import convert
from pyqsd.qapi.errors import Error, strerror
from pyqsd.qapi.keyval import HelpRequested, parse_option
from pyqsd.trace import report

S = TypeVar("S")

#: Requests make hardly any cycles. With these the collector's passes are too rare to be seen in a request's latency.
GC_THRESHOLDS = (10_000, 20, 50)
#: They end the daemon in order.
SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)


class Finished(Exception):
    """The start ends here, with an exit status; what is to be said has been said."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def run(words: Sequence[Word], background: Background | None) -> int:
    """Do what the command line says and serve until the end. Returns the exit status."""
    # Nothing that is made while starting is garbage soon; `_run` switches the collector on again.
    gc.disable()
    log = logging.getLogger("pyqsd")
    log.addHandler(_Reporter())
    log.propagate = False
    return asyncio.run(_run(words, background))


class _Reporter(logging.Handler):
    """Log messages of the daemon's parts as messages of the program: one line each."""

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            text += f": {_describe(record.exc_info[1])}"
        if record.levelno >= logging.ERROR:
            report.error(text)
        elif record.levelno >= logging.WARNING:
            report.warn(text)
        else:
            report.info(text)


def _describe(exc: BaseException) -> str:
    """A mistake of ours on one line, with the place where it was made."""
    place, trace = "", exc.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        place = f" ({os.path.basename(code.co_filename)}:{trace.tb_lineno} in {code.co_name})"
        trace = trace.tb_next
    return f"{type(exc).__name__}: {exc}{place}"


def _unexpected(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """A mistake of ours, in a callback or in a task that nobody waits for."""
    exc = context.get("exception")
    report.error(f"internal error: {context.get('message', '')}" + (f": {_describe(exc)}" if exc else ""))


async def _run(words: Sequence[Word], background: Background | None) -> int:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_unexpected)
    daemon = Daemon()
    start = loop.create_task(_start(daemon, words, background))

    def stop() -> None:
        daemon.request_shutdown()
        start.cancel()

    def caught() -> None:
        if any(number in SIGNALS for number in _drained(awake)):
            stop()

    # A signal says so through this pipe, which wakes the loop also if it arrives just before that goes to sleep, or in
    # another thread.
    awake, alarm = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    loop.add_reader(awake, caught)
    signal.set_wakeup_fd(alarm, warn_on_full_buffer=False)
    # Not loop.add_signal_handler(): that leaves a gap when the loop is closed, and a second signal is to have no effect
    # at any time. The handler is one that is not written in Python, as that could be interrupted by the next signal,
    # and so on until the stack is exhausted.
    for number in SIGNALS:
        signal.signal(number, operator.is_)
    pidfile = None
    try:
        status = 1
        try:
            pidfile = await start
            # What was made up to here stays, and the collector need not look at it again and again.
            gc.freeze()
            gc.set_threshold(*GC_THRESHOLDS)
            gc.enable()
            await daemon.wait_shutdown_requested()
            status = 0
        except Finished as end:
            status = end.status
        except asyncio.CancelledError:
            if not daemon.shutdown_requested:
                raise
            status = 0
        except Error as exc:
            report.error(exc.desc, exc.hint)
        except OSError as exc:
            report.error(strerror(exc.errno) if exc.errno else str(exc))
        except Exception as exc:
            report.error(f"internal error: {_describe(exc)}")
        report.set_location()
        await daemon.shutdown()
        return status
    finally:
        # None must arrive while they become ineffective: the interpreter would complain of it.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)
        loop.remove_reader(awake)
        os.close(awake)
        os.close(alarm)
        if pidfile is not None:
            pidfile.remove()


def _drained(fd: int) -> bytes:
    """The numbers of the signals that have arrived."""
    try:
        return os.read(fd, 512)
    except BlockingIOError:
        return b""


async def _start(daemon: Daemon, words: Sequence[Word], background: Background | None) -> Pidfile | None:
    """Everything that the command line says. Raises Error, OSError, Finished."""
    pidfile_path = None
    async with daemon.starting():
        for word in words:
            if word.value is None:
                continue
            if word.spelling:
                report.set_location(word.spelling)
            if word.name == "pidfile":
                pidfile_path = word.value
            elif word.name:
                await _OPTIONS[word.name](daemon, word.value, background is not None)
            else:
                raise Error("Unexpected argument")
        report.set_location()
        pidfile = None
        if pidfile_path is not None:
            try:
                pidfile = Pidfile(pidfile_path)
            except Error as exc:
                raise exc.prefixed("cannot create PID file: ") from None
        if background is not None:
            background.ready()
    return pidfile


# --- the options ------------------------------------------------------------------------------------------------------


async def _blockdev(daemon: Daemon, text: str, background: bool) -> None:
    from pyqsd.block.options import BlockdevOptions

    await daemon.graph.add(_convert(text, "driver", BlockdevOptions))


async def _chardev(daemon: Daemon, text: str, background: bool) -> None:
    from pyqsd.chardev import opts

    help_text = opts.help_for(text)
    if help_text is not None:
        _print(*help_text)
    if background and ("backend", "stdio") in ((name, value) for name, value, _ in opts.split(text)):
        raise Error("cannot use stdio with -daemonize")
    await daemon.chardevs.add_from_command_line(text)


async def _export(daemon: Daemon, text: str, background: bool) -> None:
    from pyqsd.exports.export import BlockExportOptions

    await daemon.exports.add(_convert(text, "type", BlockExportOptions))


async def _monitor(daemon: Daemon, text: str, background: bool) -> None:
    from pyqsd.monitor.monitor import MonitorOptions

    daemon.monitors.add(_convert(text, "chardev", MonitorOptions))


async def _nbd_server(daemon: Daemon, text: str, background: bool) -> None:
    from pyqsd.exports.nbd.server import NbdServerOptions

    await daemon.nbd_server.start_from(_convert(text, None, NbdServerOptions))


async def _object(daemon: Daemon, text: str, background: bool) -> None:
    from pyqsd.qom.options import ObjectOptions

    try:
        options = _convert(text, "qom-type", ObjectOptions, allow_help=True)
    except HelpRequested as request:
        from pyqsd.qom.help import help_text

        _print(help_text(request.options.get("qom-type")))
    await daemon.objects.add(options)


async def _trace(daemon: Daemon, text: str, background: bool) -> None:
    from pyqsd.chardev.opts import check_id, split, warn_short_form
    from pyqsd.trace import control

    given: dict[str, str] = {}
    pairs = split(text, "enable")
    for identifier in [value for name, value, _ in pairs if name == "id"][:1]:
        check_id(identifier)
    for name, value, short in pairs:
        if short:
            warn_short_form(name, value)
        if name not in ("enable", "events", "file", "id"):
            raise Error(f"Invalid parameter '{name}'")
        given[name] = value
    if "enable" in given:
        if given["enable"] in ("help", "?"):
            _print(control.listing())
        control.enable(given["enable"])
    if "events" in given:
        path = given["events"]
        try:
            control.enable_from_file(path)
        except OSError as exc:
            report.set_location()
            report.error_at(path, exc.strerror or str(exc))
            raise Finished(1) from None
    if "file" in given:
        path = given["file"]
        try:
            control.set_file(path)
        except OSError as exc:
            raise Error(f"Error opening logfile {path}: {exc.strerror}") from None


_OPTIONS = {
    "blockdev": _blockdev,
    "chardev": _chardev,
    "export": _export,
    "monitor": _monitor,
    "nbd-server": _nbd_server,
    "object": _object,
    "trace": _trace,
}


def _convert(text: str, implied_key: str | None, typ: type[S], *, allow_help: bool = False) -> S:
    """The struct that the argument of an option describes. Raises Error, and HelpRequested if `allow_help`."""
    options, keyval = parse_option(text, implied_key, allow_help=allow_help)
    return convert(options, typ, keyval=keyval)


def _print(text: str, status: int = 0) -> NoReturn:
    """Print information that was asked for, and end."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as exc:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise Error(f"cannot write to standard output: {exc.strerror}") from None
    raise Finished(status)
