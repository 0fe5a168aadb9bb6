"""The daemon: all services together, for the command line and for programs that use pyqsd as a library."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any

from pyqsd.block.graph import Graph
from pyqsd.chardev.chardev import Chardevs
from pyqsd.exports.export import Exports
from pyqsd.exports.nbd.server import NbdServer
from pyqsd.jobs.job import Jobs
from pyqsd.monitor import registry
from pyqsd.monitor.commands import VERSION, Shutdown
from pyqsd.monitor.dispatcher import Dispatcher, error_of
from pyqsd.monitor.monitor import Monitors
from pyqsd.qapi.command import Event, EventBus
from pyqsd.qapi.errors import Error
from pyqsd.qapi.json_writer import to_wire
from pyqsd.qapi.types import wire_name
from pyqsd.qom.objects import Objects

log = logging.getLogger(__name__)

#: How long, in seconds, peers (clients that do not read, devices that do not close) may hold up the end.
PEER_TIMEOUT = 10.0


class Daemon:
    """A storage daemon inside the running event loop.

    >>> async with Daemon() as daemon:
    ...     await daemon.qmp("blockdev-add", driver="file", node_name="disk", filename="disk.img")

    The services are there as attributes (`graph`, `exports`, …), for use from the same loop.
    """

    def __init__(self) -> None:
        registry.load()
        self.events = EventBus()
        self.graph = Graph(self.events)
        self.jobs = Jobs(self.events)
        self.exports = Exports(self.graph, self.events)
        self.chardevs = Chardevs()
        self.objects = Objects(self.chardevs)
        self.graph.objects = self.objects
        self._stop_wanted = asyncio.Event()
        self._stopping: asyncio.Task[None] | None = None
        services: dict[Any, object] = {
            EventBus: self.events,
            Graph: self.graph,
            Jobs: self.jobs,
            Exports: self.exports,
            Objects: self.objects,
            Chardevs: self.chardevs,
            Shutdown: _Shutdown(self),
        }
        self.dispatcher = services[Dispatcher] = Dispatcher(services)
        self.monitors = Monitors(self.dispatcher, self.events, self.chardevs, VERSION)

    @property
    def nbd_server(self) -> NbdServer:
        """The NBD server, running or not."""
        return self.exports.shared(NbdServer)

    # --- commands and events ----------------------------------------------------------------------------------------

    async def qmp(self, command: str, arguments: Mapping[str, Any] | None = None, /, **members: Any) -> Any:
        """Run a QMP command and return its result as plain dicts, lists, strings, numbers.

        The members of its arguments come as a dict in wire spelling, or as keyword arguments, where ``_`` stands for
        ``-`` and None for "not given". A command that returns nothing gives ``{}``, as in QMP. Raises `pyqsd.Error`, as
        a client of a monitor would be told.
        """
        if self._stopping is not None:
            raise Error("The daemon is shutting down")
        given = dict(arguments or {})
        given.update((wire_name(name), value) for name, value in members.items() if value is not None)
        try:
            result = await self.dispatcher.execute(command, to_wire(given))
        except OSError as exc:
            raise error_of(exc, command) from exc
        return {} if result is None else to_wire(result)

    def on_event(self, callback: Callable[[dict[str, Any]], None]) -> Callable[[], None]:
        """Call `callback` with every event, as ``{"event": name, "data": {…}}`` (``data`` only where there is any).
        The returned function ends that."""

        def listener(event: Event) -> None:
            message: dict[str, Any] = {"event": event.NAME}
            data = to_wire(event)
            if data:
                message["data"] = data
            try:
                callback(message)
            except Exception:
                # A listener's mistake is not to break what the event tells of.
                log.exception("a listener failed on the event %s", event.NAME)

        return self.events.subscribe(listener)

    # --- life --------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Daemon:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.shutdown()

    @asynccontextmanager
    async def starting(self) -> AsyncIterator[None]:
        """While the block runs, things are being set up: clients can connect, and are served when it is done. So
        nobody sees half of what is to be there."""
        up = asyncio.get_running_loop().create_future()

        async def hold() -> None:
            await up

        self.dispatcher.queue().put(hold, lambda result, exc: None)
        self.nbd_server.hold()
        try:
            yield
        finally:
            if not up.done():
                up.set_result(None)
            self.nbd_server.release()

    def request_shutdown(self) -> None:
        """Say that the daemon shall end, as ``quit`` does; who runs it sees that in `wait_shutdown_requested`."""
        self._stop_wanted.set()

    @property
    def shutdown_requested(self) -> bool:
        """Whether somebody said so."""
        return self._stop_wanted.is_set()

    async def wait_shutdown_requested(self) -> None:
        """Wait for ``quit``, or `request_shutdown`."""
        await self._stop_wanted.wait()

    async def shutdown(self) -> None:
        """End everything in order: clients are disconnected when their requests in flight are done, what is cached is
        written back, the images are closed. Afterwards nothing of the daemon is left. May be called more than once.

        Peers cannot hold this up for long. Writing back takes as long as the storage takes.
        """
        self._stop_wanted.set()
        if self._stopping is None:
            self._stopping = asyncio.get_running_loop().create_task(self._shutdown())
        # A caller that is cancelled must not leave images half closed.
        await asyncio.shield(self._stopping)

    async def _shutdown(self) -> None:
        await _step("the running command", self.dispatcher.close(), PEER_TIMEOUT)
        await _step("jobs", self.jobs.shutdown(), PEER_TIMEOUT)
        await _step("exports", self.exports.shutdown())
        await _step("block nodes", self.graph.close_all())
        self.monitors.close()
        await _step("character devices", self.chardevs.close_all(), PEER_TIMEOUT)
        await _step("objects", self.objects.close_all())


async def _step(what: str, action: Coroutine[Any, Any, None], timeout: float | None = None) -> None:
    """One step of the end. Its failure is reported, and does not keep the next ones from being taken."""
    try:
        async with asyncio.timeout(timeout):
            await action
    except TimeoutError:
        log.error("closing %s takes too long, going on without", what)
    except Exception as exc:
        log.error("closing %s failed", what, exc_info=exc)


class _Shutdown(Shutdown):
    """What ``quit`` asks."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def request(self) -> None:
        self._daemon.request_shutdown()
