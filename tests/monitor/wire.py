"""Sessions to talk to: one inside the test, and the real daemon's."""

from __future__ import annotations

import asyncio
import json
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pyqsd.monitor.commands import VERSION
from pyqsd.monitor.dispatcher import Dispatcher
from pyqsd.monitor.session import Session
from pyqsd.qapi.command import COMMANDS, Command
from pyqsd.qapi.json_writer import to_wire
from tests.support import peers
from tests.support.daemon import wait_announced

TIMEOUT = 20.0
NEGOTIATE = b'{"execute": "qmp_capabilities"}\n'
NEGOTIATE_OOB = b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}\n'


def command(name: str, func: Callable[..., Any], *, boxed: bool = False, allow_oob: bool = False) -> Command:
    return Command(name, func, boxed, allow_oob, (), {})


#: The commands that every session has.
OWN = {name: COMMANDS[name] for name in ("qmp_capabilities", "query-version", "query-commands")}


class Local:
    """A session without a transport. Must be made inside an event loop."""

    def __init__(
        self,
        *commands: Command,
        services: Mapping[Any, object] | None = None,
        pretty: bool = False,
        dispatcher: Dispatcher | None = None,
    ) -> None:
        if dispatcher is None:
            all_services: dict[Any, object] = dict(services or {})
            dispatcher = Dispatcher(all_services, {**OWN, **{command.name: command for command in commands}})
            all_services[Dispatcher] = dispatcher
        self.dispatcher = dispatcher
        self.paused = False
        self.output: list[bytes] = []
        self.session = Session(
            dispatcher,
            self.output.append,
            version=to_wire(VERSION),
            pretty=pretty,
            pause=lambda: self.pause(True),
            resume=lambda: self.pause(False),
        )
        self.session.open()
        self.greeting = self.take()

    def pause(self, paused: bool) -> None:
        assert self.paused != paused
        self.paused = paused

    def send(self, data: bytes) -> bytes:
        """Hands `data` over; what the session has answered at once."""
        self.session.received(data)
        return self.take()

    def take(self) -> bytes:
        data = b"".join(self.output)
        self.output.clear()
        return data

    def messages(self) -> list[Any]:
        return [json.loads(line) for line in self.take().split(b"\r\n")[:-1]]

    def call(self, message: Any) -> Any:
        """Sends a request and gives its answer, which must come at once."""
        self.session.received(json.dumps(message).encode() + b"\n")
        (answer,) = self.messages()
        return answer

    async def feed(self, data: bytes, piece: int = 4096) -> bytes:
        """Hands `data` over as a transport does that heeds being paused; all that was answered in the end."""
        deadline = time.monotonic() + TIMEOUT
        for at in range(0, len(data), piece):
            self.session.received(data[at : at + piece])
            while self.paused:
                assert time.monotonic() < deadline, "the session stays paused"
                await asyncio.sleep(0)
        return self.take()


class Theirs:
    """The real daemon with a monitor on its standard input and output."""

    def __init__(self, *, pretty: bool = False) -> None:
        monitor = "chardev=c,pretty=on" if pretty else "chardev=c"
        self._directory = tempfile.TemporaryDirectory()
        pidfile = Path(self._directory.name) / "ready"
        argv = [peers.require("qemu-storage-daemon"), "--chardev", "stdio,id=c", "--monitor", monitor]
        self.process = subprocess.Popen(
            [*argv, "--pidfile", str(pidfile)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        wait_announced(self.process, pidfile)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.input = self.process.stdin.fileno()
        self.output = self.process.stdout.fileno()
        os.set_blocking(self.input, False)

    def __enter__(self) -> Theirs:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.communicate()
        self._directory.cleanup()

    def talk(self, data: bytes, end: bytes) -> bytes:
        """Sends `data` and reads until `end` has come."""
        deadline = time.monotonic() + TIMEOUT
        received = b""
        while end not in received[-4096:]:
            left = deadline - time.monotonic()
            readable, writable, _ = select.select([self.output], [self.input] if data else [], [], max(left, 0))
            assert readable or writable, f"nothing more after {received[-500:]!r}"
            if readable:
                received += os.read(self.output, 1 << 20)
            if writable:
                data = data[os.write(self.input, data[:4096]) :]
        return received
