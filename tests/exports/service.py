"""An NBD server inside the test's process, in a thread with an event loop of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from pyqsd.block.graph import Graph
from pyqsd.block.options import BlockdevOptions
from pyqsd.exports.export import BlockExportOptions, Exports
from pyqsd.exports.nbd.server import NbdServer, NbdServerOptions
from pyqsd.qapi.command import Event, EventBus
from pyqsd.qapi.convert import convert

from tests.exports.rawnbd import RawClient

T = TypeVar("T")
TIMEOUT = 30.0


class Service:
    """Graph, exports and NBD server; `run` runs a coroutine in their loop. Leaving the block shuts everything down and
    fails if the loop's exception handler was called."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = str(directory / "nbd.sock")
        self.loop = asyncio.new_event_loop()
        self.accidents: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda loop, context: self.accidents.append(context))
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.events: list[Event] = []
        self.bus = EventBus()
        self.bus.subscribe(self.events.append)
        self.graph = Graph(self.bus)
        self.exports = Exports(self.graph, self.bus)

    def run(self, coro: Coroutine[Any, Any, T], timeout: float = TIMEOUT) -> T:
        return asyncio.run_coroutine_threadsafe(coro, self.loop).result(timeout)

    def call(self, function: Any, *args: Any) -> Any:
        """Call a plain function in the loop's thread."""

        async def doing() -> Any:
            return function(*args)

        return self.run(doing())

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *exc: object) -> None:
        async def end() -> None:
            await self.exports.shutdown()
            await self.graph.close_all()

        try:
            self.run(end())
        finally:
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join(TIMEOUT)
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.close()
        assert not self.accidents, self.accidents

    # --- shorthands ---

    @property
    def server(self) -> NbdServer:
        return self.exports.shared(NbdServer)

    def blockdev(self, **options: Any) -> Any:
        wire = {name.replace("_", "-"): value for name, value in options.items()}
        return self.run(self.graph.add(convert(wire, BlockdevOptions)))

    def start(self, address: dict[str, Any] | None = None, **options: Any) -> None:
        wire = {name.replace("_", "-"): value for name, value in options.items()}
        wire["addr"] = address or {"type": "unix", "path": self.path}
        self.run(self.server.start_from(convert(wire, NbdServerOptions)))

    def export(self, node: str, id: str | None = None, **options: Any) -> Any:
        wire = {name.replace("_", "-"): value for name, value in options.items()}
        wire |= {"type": "nbd", "id": id or node, "node-name": node}
        return self.run(self.exports.add(convert(wire, BlockExportOptions)))

    def image(self, name: str, size: int, *, data: dict[int, bytes] | None = None, **options: Any) -> Path:
        """A raw file with a node of the same name (driver raw on file) above it."""
        path = self.directory / f"{name}.img"
        with open(path, "wb") as file:
            file.truncate(size)
            for offset, content in (data or {}).items():
                file.seek(offset)
                file.write(content)
        self.blockdev(driver="raw", node_name=name, file={"driver": "file", "filename": str(path)}, **options)
        return path

    def client(self, name: str = "", **options: Any) -> RawClient:
        """A client in transmission."""
        client = RawClient(self.path)
        client.go(name, **options)
        return client
