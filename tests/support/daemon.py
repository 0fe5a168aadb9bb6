"""A storage daemon as a process: the real qemu-storage-daemon or pyqsd, behind one interface."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.support import peers
from tests.support.qmp import QmpClient
from tests.support.warm import WARM, Started

START_TIMEOUT = 20.0
STOP_TIMEOUT = 30.0

# What must never be on a daemon's stderr, whatever was done to it.
DIRT = re.compile(
    r"Traceback \(most recent call last\)|was never awaited|Task was destroyed|exception was never retrieved"
    r"|failed: [A-Z]\w*(Error|Exception)\b|Internal error|internal error"
    r"|Exception ignored|Fatal Python error|Segmentation fault"
)


class DaemonFailed(Exception):
    """The daemon ended (or could not be reached) before it was ready."""

    def __init__(self, text: str, returncode: int | None, stderr: str) -> None:
        super().__init__(f"{text} (exit status {returncode}); stderr:\n{stderr}")
        self.returncode = returncode
        self.stderr = stderr


def argv_of(kind: str) -> list[str]:
    """How a daemon of this kind is started: `qsd` or `pyqsd` (PYQSD_TEST_COMMAND replaces the latter)."""
    if kind == "qsd":
        return [peers.require("qemu-storage-daemon")]
    if kind == "pyqsd":
        override = os.environ.get("PYQSD_TEST_COMMAND")
        return shlex.split(override) if override else [sys.executable, "-m", "pyqsd"]
    raise ValueError(kind)


def starts_warm(kind: str) -> bool:
    """Whether such a daemon is forked off a process that has imported it (tests/support/warm.py)."""
    return kind == "pyqsd" and not os.environ.get("PYQSD_TEST_COMMAND")


def poll(condition: Callable[[], Any], what: str, timeout: float = START_TIMEOUT, interval: float = 0.005) -> Any:
    """Waits until `condition()` is true and returns its value; for states that nothing announces."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout} s for {what}")
        time.sleep(interval)


def may_announce(argv: Sequence[str]) -> bool:
    """Whether the real daemon, started so, can be told to write a pidfile, which it does last. A monitor that is used
    while it still starts is not reliable: it reads what comes in two threads, and may answer with a parse error."""
    waits = any("server=on" in arg and "wait=off" not in arg for arg in argv)
    return not waits and "--pidfile" not in argv and "--daemonize" not in argv


def wait_announced(process: subprocess.Popen[bytes] | Started, pidfile: Path) -> None:
    """Wait until `pidfile` is there, or the process has ended."""
    poll(lambda: pidfile.exists() or process.poll() is not None, "the real daemon")


class DaemonProcess:
    """Runs a daemon in `workdir` with `args`; with `qmp` it also has a QMP monitor, created last, so that its greeting
    says that everything before it on the command line is there.

    Leaving the `with` block ends the daemon with SIGTERM and checks that it ended in time, with exit status 0 and a
    clean stderr, unless the test ended it itself.
    """

    def __init__(
        self,
        kind: str,
        args: Sequence[str] = (),
        *,
        workdir: str | os.PathLike[str],
        qmp: bool = True,
        start: bool = True,
        env: dict[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        preexec: Callable[[], None] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        self.kind = kind
        self.workdir = Path(workdir)
        self.args = list(args)
        self.want_qmp = qmp
        self.qmp_path = self.workdir / "qmp.sock"
        self.stderr_path = self.workdir / f"stderr.{kind}"
        self.env = env
        self.pass_fds = pass_fds
        self.preexec = preexec
        self.prefix = list(prefix)
        self.special = bool(env or pass_fds or preexec or prefix)
        self.room = 0  # for tests: bytes that it may grow by
        self.process: subprocess.Popen[bytes] | Started | None = None
        self._qmp: QmpClient | None = None
        self.ended_by_test = False
        if start:
            self.start()

    def start(self) -> None:
        args = list(self.args)
        self.qmp_path.unlink(missing_ok=True)
        if self.want_qmp:
            args += ["--chardev", "socket,id=qmp0,path=qmp.sock,server=on,wait=off", "--monitor", "chardev=qmp0"]
        ready = None
        if self.kind == "qsd" and self.want_qmp and may_announce(args):
            # Beside the directory, which tests look at.
            ready = self.workdir.absolute().with_name(self.workdir.absolute().name + ".ready")
            ready.unlink(missing_ok=True)
            args += ["--pidfile", str(ready)]
        self.ended_by_test = False
        with open(self.stderr_path, "ab") as stderr:
            self.stderr_start = stderr.tell()
            if self.special or not starts_warm(self.kind):
                self.process = subprocess.Popen(
                    [*self.prefix, *argv_of(self.kind), *args],
                    cwd=self.workdir,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                    env={**os.environ, **(self.env or {})},
                    pass_fds=self.pass_fds,
                    preexec_fn=self.preexec,  # noqa: PLW1509 (the tests that use it have no threads)
                )
            else:
                with open(os.devnull, "r+b") as null:
                    self.process = WARM.start(args, self.workdir, null.fileno(), null.fileno(), stderr.fileno())
        if self.want_qmp:
            try:
                if ready is not None:
                    wait_announced(self.process, ready)
                self._qmp = self.connect_qmp()
            except BaseException:
                self.kill()
                raise

    def connect_qmp(self, **kwargs: Any) -> QmpClient:
        """A further QMP session (of the same monitor: the one before must be closed first)."""

        def attempt() -> QmpClient | None:
            self.check_running()
            try:
                return QmpClient(self.qmp_path, **kwargs)
            except (FileNotFoundError, ConnectionRefusedError):
                return None

        try:
            client = poll(attempt, "the QMP socket")
        except EOFError:
            self.wait()
            self.check_running()
            raise
        assert isinstance(client, QmpClient)
        return client

    @property
    def qmp(self) -> QmpClient:
        assert self._qmp is not None, "started without QMP"
        return self._qmp

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def stderr(self) -> str:
        """What it wrote since it was last started."""
        with open(self.stderr_path, "rb") as stream:
            stream.seek(self.stderr_start)
            return stream.read().decode("utf-8", "replace")

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def check_running(self) -> None:
        if not self.running:
            code = self.process.returncode if self.process else None
            raise DaemonFailed("the daemon ended", code, self.stderr)

    def rss(self) -> int:
        """Resident memory, bytes."""
        with open(f"/proc/{self.pid}/statm", "rb") as stream:
            return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def fd_count(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def wait(self, timeout: float = STOP_TIMEOUT) -> int:
        """Waits for the end of the process; kills it and raises if it does not end in time."""
        assert self.process is not None
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.kind} did not end within {timeout} s; stderr:\n{self.stderr}") from None

    def send_signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def terminate(self, number: int = signal.SIGTERM, timeout: float = STOP_TIMEOUT) -> int:
        """Ends it with a signal and returns the exit status."""
        self.send_signal(number)
        code = self.wait(timeout)
        self._close_qmp()
        self.ended_by_test = True
        return code

    def kill(self) -> None:
        """kill -9, and the corpse collected."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self._close_qmp()
        self.ended_by_test = True

    def _close_qmp(self) -> None:
        if self._qmp is not None:
            self._qmp.close()
            self._qmp = None

    def check_stderr(self) -> None:
        """No traceback, no forgotten coroutine."""
        text = self.stderr
        if DIRT.search(text):
            raise AssertionError(f"{self.kind} left this on stderr:\n{text}")

    def __enter__(self) -> DaemonProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.running:
            self._close_qmp()
            if exc is not None:
                exc.add_note(f"{self.kind} stderr:\n{self.stderr}")
                return
            self.check_stderr()
            if not self.ended_by_test:
                code = self.process.returncode if self.process else None
                raise DaemonFailed("the daemon ended on its own", code, self.stderr)
            return
        if exc is not None:
            exc.add_note(f"{self.kind} stderr:\n{self.stderr}")
            self.kill()
            return
        code = self.terminate()
        self.check_stderr()
        if code != 0:
            raise AssertionError(f"{self.kind} ended with exit status {code}; stderr:\n{self.stderr}")


def run_to_end(
    kind: str,
    args: Sequence[str],
    *,
    workdir: str | os.PathLike[str],
    timeout: float = START_TIMEOUT,
) -> subprocess.CompletedProcess[str]:
    """Runs a daemon whose command line makes it end by itself (help, version, a mistake)."""
    process: subprocess.Popen[bytes] | Started
    with (
        open(os.devnull, "rb") as null,
        tempfile.TemporaryFile() as stdout,
        tempfile.TemporaryFile() as stderr,
    ):
        if starts_warm(kind):
            process = WARM.start(args, workdir, null.fileno(), stdout.fileno(), stderr.fileno())
        else:
            argv = argv_of(kind) + list(args)
            process = subprocess.Popen(argv, cwd=workdir, stdin=null, stdout=stdout, stderr=stderr)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            stderr.seek(0)
            text = f"{kind} {shlex.join(args)} does not end; stderr: {stderr.read()!r}"
            raise AssertionError(text) from None
        stdout.seek(0)
        stderr.seek(0)
        result = subprocess.CompletedProcess(
            [kind, *args], code, stdout.read().decode("utf-8", "replace"), stderr.read().decode("utf-8", "replace")
        )
    if DIRT.search(result.stderr):
        raise AssertionError(f"{kind} {shlex.join(args)} left this on stderr:\n{result.stderr}")
    return result
