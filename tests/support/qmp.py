"""A small QMP client over a unix socket, for tests: no threads, everything with a deadline."""

from __future__ import annotations

import json
import os
import select
import socket
import time
from collections.abc import Callable
from typing import Any

TIMEOUT = 20.0


class QmpError(Exception):
    """An error reply, raised by `execute`."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(f"{error['class']}: {error['desc']}")
        self.qmp_class: str = error["class"]
        self.desc: str = error["desc"]


class QmpClient:
    """One QMP session.

    `command` gives the reply as it came (``{"return": …}`` or ``{"error": …}``); events that arrive in between are
    kept in `events` in order of arrival.
    """

    def __init__(self, path: str | os.PathLike[str], *, negotiate: bool = True, timeout: float = TIMEOUT) -> None:
        self.timeout = timeout
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(os.fspath(path))
        self.sock.setblocking(False)
        self.buffer = b""
        self.events: list[dict[str, Any]] = []
        self.greeting = self.message()
        if "QMP" not in self.greeting:
            raise AssertionError(f"not a QMP greeting: {self.greeting}")
        if negotiate:
            self.execute("qmp_capabilities")

    def __enter__(self) -> QmpClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self.sock.close()

    def send_raw(self, data: bytes) -> None:
        deadline = time.monotonic() + self.timeout
        view = memoryview(data)
        while view:
            if not select.select([], [self.sock], [], max(0, deadline - time.monotonic()))[1]:
                raise TimeoutError("the daemon does not read its QMP socket")
            view = view[self.sock.send(view) :]

    def send(self, message: Any) -> None:
        self.send_raw(json.dumps(message).encode() + b"\n")

    def message(self, timeout: float | None = None) -> dict[str, Any]:
        """The next message, event or not. Raises TimeoutError, or EOFError when the daemon closed the session."""
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        while b"\n" not in self.buffer:
            if not select.select([self.sock], [], [], max(0, deadline - time.monotonic()))[0]:
                raise TimeoutError("no QMP message came")
            data = self.sock.recv(1 << 20)
            if not data:
                raise EOFError("the daemon closed the QMP session")
            self.buffer += data
        line, self.buffer = self.buffer.split(b"\n", 1)
        message = json.loads(line)
        if not isinstance(message, dict):
            raise AssertionError(f"not a QMP message: {message!r}")
        return message

    def reply(self, timeout: float | None = None) -> dict[str, Any]:
        """The next message that is not an event."""
        while True:
            message = self.message(timeout)
            if message == self.greeting:  # QSD greets twice when the client connects while the monitor is being made
                continue
            if "event" not in message:
                return message
            self.events.append(message)

    def command(self, name: str, /, **arguments: Any) -> dict[str, Any]:
        message: dict[str, Any] = {"execute": name}
        if arguments:
            message["arguments"] = arguments
        return self.raw_command(message)

    def raw_command(self, message: Any) -> dict[str, Any]:
        self.send(message)
        return self.reply()

    def execute(self, name: str, /, **arguments: Any) -> Any:
        """What the command returns; raises `QmpError`. A trailing underscore of an argument's name is dropped, and
        the others become dashes, for names that Python does not allow (`id_`, `node_name`)."""
        fixed = {key.rstrip("_").replace("_", "-"): value for key, value in arguments.items()}
        reply = self.command(name, **fixed)
        if "error" in reply:
            raise QmpError(reply["error"])
        return reply["return"]

    def wait_event(
        self, name: str, match: Callable[[dict[str, Any]], bool] = lambda event: True, timeout: float | None = None
    ) -> dict[str, Any]:
        """Takes the first event of that name (that `match` accepts) out of `events`, waiting for it."""
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        seen = 0
        while True:
            for index in range(seen, len(self.events)):
                event = self.events[index]
                if event["event"] == name and match(event):
                    return self.events.pop(index)
            seen = len(self.events)
            message = self.message(max(0.0, deadline - time.monotonic()))
            if "event" not in message:
                raise AssertionError(f"a reply that nobody waits for: {message}")
            self.events.append(message)
