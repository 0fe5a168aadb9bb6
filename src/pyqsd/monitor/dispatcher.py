"""Finding and running commands, one at a time in the whole daemon.

Requests of every monitor go through a `RequestQueue` of its own; the dispatcher serves the queues in turn. A command
that finishes without waiting costs no task and no trip through the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from pyqsd.aio.eager import start
from pyqsd.qapi.command import COMMANDS, Command
from pyqsd.qapi.convert import convert_arguments, service_types
from pyqsd.qapi.errors import CommandNotFound, Error, strerror
from pyqsd.qapi.introspect import SchemaInfo, query_qmp_schema

log = logging.getLogger(__name__)

#: How long commands may run in a row, in seconds, before the event loop looks at other things.
SLICE = 0.002

Done = Callable[[Any, BaseException | None], None]


class RequestQueue:
    """The requests of one client, in order. Made by `Dispatcher.queue`."""

    __slots__ = ("_dispatcher", "_requests", "_waiting")

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._requests: deque[tuple[Callable[[], Coroutine[Any, Any, Any]], Done]] = deque()
        #: Whether the dispatcher has it in its list.
        self._waiting = False

    def put(self, run: Callable[[], Coroutine[Any, Any, Any]], done: Done) -> None:
        """Run ``run()`` when its turn comes, then call `done` with its result or exception."""
        self._requests.append((run, done))
        if not self._waiting:
            self._waiting = True
            self._dispatcher._ready.append(self)
        self._dispatcher._serve()

    def clear(self) -> None:
        """Forget the requests that have not begun."""
        self._requests.clear()

    def cancel(self) -> None:
        """Give up the requests that have not begun: `done` is called with a CancelledError."""
        requests, self._requests = self._requests, deque()
        for _, done in requests:
            done(None, asyncio.CancelledError())

    def __len__(self) -> int:
        return len(self._requests)


class Dispatcher:
    """Runs commands with their services.

    `services` maps a type to the object that is handed to commands which ask for it as a positional-only parameter.
    """

    def __init__(self, services: Mapping[Any, object], commands: Mapping[str, Command] = COMMANDS) -> None:
        self.services = services
        self.commands = commands
        self._service_types: dict[str, list[Any]] = {}
        self._ready: deque[RequestQueue] = deque()
        self._busy = False
        self._serving = False
        self._scheduled = False
        self._task: asyncio.Task[Any] | None = None
        self._out_of_band: set[asyncio.Task[Any]] = set()
        self._schema: list[SchemaInfo] | None = None
        #: No more commands are begun.
        self.stopped = False

    def find(self, name: str) -> Command:
        """The command `name`. Raises CommandNotFound."""
        command = self.commands.get(name)
        if command is None:
            raise CommandNotFound(f"The command {name} has not been found")
        return command

    async def call(self, command: Command, arguments: dict[str, Any], extra: Mapping[Any, object] | None = None) -> Any:
        """Convert `arguments` and run `command`. `extra`: services of the caller. Raises what the command raises."""
        keywords = convert_arguments(command, arguments)
        types = self._service_types.get(command.name)
        if types is None:
            types = self._service_types[command.name] = service_types(command)
        if not types:
            return await command.func(**keywords)
        services: list[object] = []
        for typ in types:
            service = extra.get(typ) if extra is not None else None
            services.append(service if service is not None else self.services[typ])
        return await command.func(*services, **keywords)

    async def schema(self) -> list[SchemaInfo]:
        """What ``query-qmp-schema`` tells. The first time all drivers are loaded: in a thread, as it takes a while."""
        if self._schema is None:
            loop = asyncio.get_running_loop()
            self._schema = await loop.run_in_executor(None, query_qmp_schema, self.commands)
        return self._schema

    async def execute(self, name: str, arguments: dict[str, Any] | None = None) -> Any:
        """Run a command for the program itself, in turn with those of the monitors; the result is as the command
        returned it. Raises Error, OSError."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def done(result: Any, exc: BaseException | None) -> None:
            if future.done():
                return
            if exc is None:
                future.set_result(result)
            elif isinstance(exc, asyncio.CancelledError) and self.stopped:
                future.set_exception(_shutting_down())
            elif isinstance(exc, asyncio.CancelledError):
                future.cancel()
            else:
                future.set_exception(exc)

        if self.stopped:
            raise _shutting_down()
        command = self.find(name)
        self.queue().put(lambda: self.call(command, arguments or {}), done)
        return await future

    def queue(self) -> RequestQueue:
        """A new queue of requests."""
        return RequestQueue(self)

    def run_now(self, coro: Coroutine[Any, Any, Any], done: Done) -> None:
        """Run `coro` at once, whatever else runs (out-of-band commands), then call `done`."""
        task = start(coro, done)
        if task is not None:
            self._out_of_band.add(task)
            task.add_done_callback(self._out_of_band.discard)

    def stop(self) -> None:
        """Begin no more commands: the daemon is about to end."""
        self.stopped = True

    async def close(self) -> None:
        """Give up what waits, and cancel what runs."""
        self.stop()
        for queue in tuple(self._ready):
            queue.cancel()
        tasks = {*self._out_of_band, *([self._task] if self._task is not None else [])} - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _serve(self) -> None:
        if self._busy or self._serving:
            return
        self._serving = True
        end = time.monotonic() + SLICE
        try:
            while self._ready and not self._busy and not self.stopped:
                queue = self._ready.popleft()
                queue._waiting = False
                if not queue._requests:
                    continue
                run, done = queue._requests.popleft()
                if queue._requests:
                    queue._waiting = True
                    self._ready.append(queue)
                self._run(run, done)
                if self._ready and time.monotonic() > end:
                    if not self._scheduled:
                        self._scheduled = True
                        asyncio.get_running_loop().call_soon(self._go_on)
                    return
        finally:
            self._serving = False

    def _go_on(self) -> None:
        self._scheduled = False
        self._serve()

    def _run(self, run: Callable[[], Coroutine[Any, Any, Any]], done: Done) -> None:
        self._busy = True

        def finished(result: Any, exc: BaseException | None) -> None:
            self._busy = False
            self._task = None
            try:
                done(result, exc)
            finally:
                self._serve()

        try:
            self._task = start(run(), finished)
        except asyncio.CancelledError as exc:
            finished(None, exc)


def _shutting_down() -> Error:
    return Error("The daemon is shutting down")


def error_of(exc: BaseException, command: str) -> Error:
    """What the client is told about an exception that `command` raised."""
    if isinstance(exc, Error):
        return exc
    if isinstance(exc, OSError) and exc.errno:
        return Error(strerror(exc.errno), exc.errno)
    if isinstance(exc, asyncio.CancelledError):
        return Error(f"The command {command} was cancelled")
    log.error("command %s failed", command, exc_info=exc)
    return Error(f"Internal error in command {command}: {type(exc).__name__}: {exc}")
