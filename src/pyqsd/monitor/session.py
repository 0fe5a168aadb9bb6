"""One QMP session: bytes in, replies and events out (QEMU docs/interop/qmp-spec).

A session knows nothing of sockets: its owner hands it what was received, and gives it a function that sends, and two
that stop and go on reading. The session begins with the greeting and knows only ``qmp_capabilities`` until that has
succeeded.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from pyqsd.monitor.dispatcher import SLICE, Dispatcher, error_of
from pyqsd.qapi.command import Command, Event
from pyqsd.qapi.errors import CommandNotFound, Error
from pyqsd.qapi.hash_order import object_order
from pyqsd.qapi.json_stream import INCOMPLETE, JsonStream
from pyqsd.qapi.json_writer import string, to_json, to_wire
from pyqsd.trace import events as trace

#: Requests that wait before reading pauses, once out-of-band execution was negotiated (without it: one at a time).
QUEUE_LIMIT = 8

NEGOTIATE = "qmp_capabilities"
_USUAL = ("execute", "arguments", "id")
_USUAL_SET = frozenset(_USUAL)
_ABSENT = object()


def _nothing() -> None:
    pass


class Session:
    """A QMP session.

    `send` gets complete replies (bytes); it must not block. `pause` and `resume` stop and restart the flow of calls to
    `received`; what arrives nevertheless is kept. `version`: the ``VersionInfo`` of the greeting, as wire values.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        send: Callable[[bytes], None],
        *,
        version: Any,
        pretty: bool = False,
        pause: Callable[[], None] = _nothing,
        resume: Callable[[], None] = _nothing,
    ) -> None:
        self._dispatcher = dispatcher
        self._send = send
        self._pause = pause
        self._resume = resume
        self._pretty = pretty
        self._version = version
        self._stream = JsonStream()
        self._queue = dispatcher.queue()
        self._services = {Session: self}
        #: Whether commands other than `qmp_capabilities` are known yet.
        self.negotiated = False
        #: Whether ``exec-oob`` may be used.
        self.oob = False
        self._closed = False
        self._running = 0
        self._reading = False
        self._paused = False
        self._out: list[str] = []
        self._batching = False
        self._loop = asyncio.get_running_loop()
        self._scheduled = False

    def open(self) -> None:
        """Send the greeting."""
        self._reply_with({"QMP": {"version": self._version, "capabilities": ["oob"]}})

    def close(self) -> None:
        """The client is gone: what waits is forgotten, nothing is sent any more. A command that has begun goes on."""
        self._closed = True
        self._queue.clear()
        self._out.clear()

    def received(self, data: bytes) -> None:
        """Take input of any size."""
        if self._closed:
            return
        self._stream.feed(data)
        self._read()

    def emit(self, event: Event, when: int) -> None:
        """Send `event`, unless the session is still negotiating. `when`: in microseconds since the epoch."""
        if not self.negotiated or self._closed:
            return
        message: dict[str, Any] = {"timestamp": {"seconds": when // 1_000_000, "microseconds": when % 1_000_000}}
        message["event"] = event.NAME
        data = to_wire(event)
        if data:
            message["data"] = data
        self._reply_with(message)

    # --- input ---

    def _read(self) -> None:
        if self._reading or self._scheduled:
            return
        self._reading = self._batching = True
        end = time.monotonic() + SLICE
        try:
            while not self._closed and not self._full():
                try:
                    request = self._stream.next()
                except Error as exc:
                    request = exc
                if request is INCOMPLETE:
                    break
                if trace.HANDLE_QMP_COMMAND.enabled and not isinstance(request, Error):
                    trace.HANDLE_QMP_COMMAND(id(self), to_json(request, echo=True))
                if self.oob and type(request) is dict and "exec-oob" in request and "execute" not in request:
                    self._run_out_of_band(request)
                else:
                    self._enqueue(request)
                if time.monotonic() > end:
                    self._scheduled = True
                    self._loop.call_soon(self._go_on)
                    break
        finally:
            self._reading = self._batching = False
            self._flush()
        full = self._scheduled or self._full()
        if full != self._paused:
            self._paused = full
            (self._pause if full else self._resume)()

    def _go_on(self) -> None:
        self._scheduled = False
        self._read()

    def _full(self) -> bool:
        """Whether the next request must wait: without out-of-band execution, until the last one is answered."""
        if self.oob:
            return len(self._queue) >= QUEUE_LIMIT
        return self._running + len(self._queue) > 0

    def _enqueue(self, request: Any) -> None:
        def begin() -> Coroutine[Any, Any, Any]:
            self._running += 1
            if self._paused and not self._reading and not self._full():
                self._read()
            return self._execute(request, False)

        def done(result: Any, exc: BaseException | None) -> None:
            self._running -= 1
            self._answer(request, result, exc)
            if not self._closed and not self._reading:
                self._read()

        self._queue.put(begin, done)

    def _run_out_of_band(self, request: dict[str, Any]) -> None:
        self._dispatcher.run_now(self._execute(request, True), lambda result, exc: self._answer(request, result, exc))

    # --- requests ---

    async def _execute(self, request: Any, oob: bool) -> Any:
        if isinstance(request, Error):
            raise request
        name, arguments = self._check(request, oob)
        return await self._dispatcher.call(self._find(name, oob), arguments, self._services)

    def _check(self, request: Any, oob: bool) -> tuple[str, dict[str, Any]]:
        """The command and the arguments of a well-formed request (qmp-spec, section 2.3). Raises Error."""
        if type(request) is not dict:
            raise Error("QMP input must be a JSON object")
        key: str | None = None
        name: Any = None
        arguments: dict[str, Any] = {}
        # The usual request has nothing wrong with it. For others the order decides what is told.
        for member in _USUAL if request.keys() <= _USUAL_SET else object_order(request):
            value = request.get(member, _ABSENT)
            if value is _ABSENT:
                continue
            if member == "execute" or (member == "exec-oob" and self.oob):
                if type(value) is not str:
                    raise Error(f"QMP input member '{member}' must be a string")
                if key is not None:
                    raise Error(f"QMP input member '{member}' clashes with '{key}'")
                key = member
                name = value
            elif member == "arguments":
                if type(value) is not dict:
                    raise Error("QMP input member 'arguments' must be an object")
                arguments = value
            elif member != "id":
                raise Error(f"QMP input member '{member}' is unexpected")
        if key is None:
            raise Error("QMP input lacks member 'execute'")
        return name, arguments

    def _find(self, name: str, oob: bool) -> Command:
        if not self.negotiated and name != NEGOTIATE:
            raise CommandNotFound(f"Expecting capabilities negotiation with '{NEGOTIATE}'")
        command = self._dispatcher.find(name)
        if oob and not command.allow_oob:
            raise Error(f"The command {name} does not support OOB")
        return command

    def negotiate(self, oob: bool) -> None:
        """End the negotiation. Raises CommandNotFound when that was done before."""
        if self.negotiated:
            raise CommandNotFound("Capabilities negotiation is already complete, command ignored")
        self.negotiated = True
        self.oob = oob

    # --- output ---

    def _answer(self, request: Any, result: Any, exc: BaseException | None) -> None:
        if self._closed or (self._dispatcher.stopped and isinstance(exc, asyncio.CancelledError)):
            return
        identity = request.get("id", _ABSENT) if type(request) is dict else _ABSENT
        if exc is None:
            try:
                self._reply_result(result, identity)
                return
            except Exception as failure:
                exc = failure
        name = str(request.get("execute")) if type(request) is dict else "?"
        error = error_of(exc, name)
        reply: dict[str, Any] = {} if identity is _ABSENT else {"id": identity}
        reply["error"] = {"class": error.qmp_class, "desc": error.desc}
        self._put(to_json(reply, pretty=self._pretty, echo=True))

    def _reply_result(self, result: Any, identity: Any) -> None:
        value = {} if result is None else to_wire(result)
        if self._pretty:
            self._reply_with({"return": value} if identity is _ABSENT else {"return": value, "id": identity})
            return
        text = to_json(value)
        if identity is _ABSENT:
            text = f'{{"return": {text}}}'
        elif type(identity) is int:
            text = f'{{"return": {text}, "id": {identity}}}'
        elif type(identity) is str:
            text = f'{{"return": {text}, "id": {string(identity)}}}'
        else:
            text = f'{{"return": {text}, "id": {to_json(identity, echo=True)}}}'
        self._put(text)

    def _reply_with(self, message: dict[str, Any]) -> None:
        self._put(to_json(message, pretty=self._pretty))

    def _put(self, text: str) -> None:
        if self._pretty:
            text = text.replace("\n", "\r\n")
        self._out.append(text + "\r\n")
        if trace.MONITOR_QMP_RESPOND.enabled:
            trace.MONITOR_QMP_RESPOND(id(self), text)
        if not self._batching:
            self._flush()

    def _flush(self) -> None:
        if self._out and not self._closed:
            data = "".join(self._out).encode()
            self._out.clear()
            self._send(data)
