"""Starts pyqsd without paying, each time, for Python's start and the imports.

A server process (`python -m tests.support.warm`) has imported what nearly every start imports, and forks for each
command line. The child goes on as `python -m pyqsd` does, from the beginning of `main` to the interpreter's own
end. What differs: its parent, its session, and that a module which forgot an import may find it made by another.

Starts from nothing are tested by tests/cli/test_process.py, and wherever the environment, file descriptors or the like
are given.
"""

from __future__ import annotations

import atexit
import gc
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence

MESSAGE = 1 << 17  # the longest command line, bytes


class Started:
    """A process that the server has started; what `subprocess.Popen` has of it."""

    def __init__(self, argv: list[str], pid: int, ended: int) -> None:
        self.args = argv
        self.pid = pid
        self.returncode: int | None = None
        self._ended = ended  # its exit status can be read here

    def poll(self) -> int | None:
        return self._look(0)

    def wait(self, timeout: float | None = None) -> int:
        status = self._look(timeout)
        if status is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self.args, timeout)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _look(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._ended], [], [], timeout)[0]:
            text = os.read(self._ended, 16)
            os.close(self._ended)
            assert text, "the server that started it has ended"
            self.returncode = int(text)
        return self.returncode


class Warm:
    """The server, started when it is first needed and ended with this process."""

    def __init__(self) -> None:
        self._control: socket.socket | None = None
        self._server: subprocess.Popen[bytes] | None = None

    def start(self, argv: Sequence[str], cwd: str | os.PathLike[str], stdin: int, stdout: int, stderr: int) -> Started:
        """Runs ``pyqsd ARGV`` in `cwd`, with these file descriptors as its standard ones."""
        if self._control is None:
            self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            for end in (self._control, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MESSAGE)
            with theirs:
                self._server = subprocess.Popen(
                    [sys.executable, "-m", "tests.support.warm", str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
            atexit.register(self.close)
        ended, report = os.pipe()
        try:
            message = "\0".join([os.fspath(os.path.abspath(cwd)), *argv]).encode("utf-8", "surrogateescape")
            assert len(message) < MESSAGE
            socket.send_fds(self._control, [message], [stdin, stdout, stderr, report])
            pid = int(self._control.recv(16) or b"0")
        finally:
            os.close(report)
        assert pid, "the server that starts pyqsd has ended"
        return Started([*argv], pid, ended)

    def close(self) -> None:
        """Ends the server, and with it what it has started."""
        if self._control is not None and self._server is not None:
            self._control.close()
            self._server.wait()


WARM = Warm()


def serve(control: socket.socket) -> list[str]:
    """Starts processes until the other end is closed. Returns only in one that was started: its arguments."""
    running: dict[int, tuple[int, int]] = {}  # pidfd: process, where its exit status goes
    poller = select.poll()
    poller.register(control, select.POLLIN)
    while True:
        for fd, _ in poller.poll():
            if fd in running:
                pid, report = running.pop(fd)
                poller.unregister(fd)
                os.close(fd)
                _, status = os.waitpid(pid, 0)
                os.write(report, b"%d" % os.waitstatus_to_exitcode(status))
                os.close(report)
                continue
            message, fds, _, _ = socket.recv_fds(control, MESSAGE, 4)
            if not message:
                for pid, _ in running.values():
                    os.kill(pid, signal.SIGKILL)
                os._exit(0)
            pid = os.fork()
            if pid == 0:
                control.detach()
                return become(message, fds[:3])
            running[os.pidfd_open(pid)] = pid, fds[3]
            poller.register(list(running)[-1], select.POLLIN)
            for fd in fds[:3]:
                os.close(fd)
            control.send(b"%d" % pid)


def become(message: bytes, fds: list[int]) -> list[str]:
    """Makes the child what it would be if it had been executed; returns its arguments."""
    for number, fd in enumerate(fds):  # all above 2, as the server has its own 0 to 2
        os.dup2(fd, number)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    cwd, *argv = message.decode("utf-8", "surrogateescape").split("\0")
    os.chdir(cwd)
    return argv


if __name__ == "__main__":
    from pyqsd.aio import threads  # noqa: F401
    from pyqsd.block.registry import driver_class
    from pyqsd.chardev import socket as chardev_socket  # noqa: F401
    from pyqsd.cli import daemon, run  # noqa: F401
    from pyqsd.exports.export import export_class
    from pyqsd.monitor import registry

    registry.load()
    for driver in ("file", "raw", "qcow2"):
        driver_class(driver)
    export_class("nbd")
    gc.freeze()
    arguments = serve(socket.socket(fileno=int(sys.argv[1])))
    sys.exit(daemon.main(["pyqsd", *arguments]))
