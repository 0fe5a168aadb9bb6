"""An NBD server inside the test's process, in a thread with an event loop of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from pyqsd.exports.nbd.export import NbdExport
from pyqsd.exports.nbd.server import NbdServer, NbdServerOptions
from pyqsd.monitor.daemon import Daemon
from pyqsd.qapi.convert import convert
from pyqsd.qapi.errors import Error
from tests.block.memory_driver import Memory, MemoryOptions, memory_drivers
from tests.exports.rawnbd import RawClient

T = TypeVar("T")
TIMEOUT = 30.0


def wire(members: dict[str, Any]) -> dict[str, Any]:
    """Python's spelling of names into the wire's."""
    return {name.replace("_", "-"): value for name, value in members.items()}


class Service:
    """A daemon; `run` runs a coroutine in its loop. Leaving the block shuts everything down and fails if the loop's
    exception handler was called."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = str(directory / "nbd.sock")
        self.loop = asyncio.new_event_loop()
        self.accidents: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda loop, context: self.accidents.append(context))
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.events: list[dict[str, Any]] = []
        self.daemon: Daemon = self.call(Daemon)
        self.daemon.on_event(self.events.append)
        self.exports = self.daemon.exports
        self.graph = self.daemon.graph

    def run(self, coro: Coroutine[Any, Any, T], timeout: float = TIMEOUT) -> T:
        """The result of `coro`, run in the daemon's loop."""
        return asyncio.run_coroutine_threadsafe(coro, self.loop).result(timeout)

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """Call a plain function in the loop's thread."""

        async def doing() -> T:
            return function(*args)

        return self.run(doing())

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self.run(self.daemon.shutdown())
        finally:
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join(TIMEOUT)
            self.loop.run_until_complete(self.loop.shutdown_default_executor())
            self.loop.close()
        assert not self.accidents, self.accidents

    # --- shorthands ---

    @property
    def server(self) -> NbdServer:
        return self.daemon.nbd_server

    def qmp(self, command: str, arguments: dict[str, Any] | None = None) -> dict[str, Any]:
        """The reply as QMP has it: ``{"return": …}`` or ``{"error": …}``."""
        try:
            result = self.run(self.daemon.qmp(command, arguments or {}))
        except Error as exc:
            return {"error": {"class": exc.qmp_class, "desc": exc.desc}}
        return {"return": {} if result is None else result}

    def must(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """What the command returns; fails if it fails."""
        reply = self.qmp(command, arguments)
        assert "return" in reply, reply
        return reply["return"]

    def blockdev(self, **options: Any) -> None:
        self.must("blockdev-add", wire(options))

    def start(self, address: dict[str, Any] | None = None, **options: Any) -> None:
        """Start the NBD server as the command line does."""
        members = wire(options) | {"addr": address or {"type": "unix", "path": self.path}}
        self.run(self.server.start_from(convert(members, NbdServerOptions)))

    def export(self, node: str, id: str | None = None, **options: Any) -> NbdExport:
        self.must("block-export-add", wire(options) | {"type": "nbd", "id": id or node, "node-name": node})
        export = self.exports.find(id or node)
        assert isinstance(export, NbdExport)
        return export

    def uri(self, name: str = "") -> str:
        return f"nbd+unix:///{name}?socket={self.path}"

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

    def memory(self, name: str, cls: type[Memory] = Memory, size: int = 1 << 16) -> Memory:
        """A node over a bytearray; all of its requests have to wait."""
        with memory_drivers(cls):
            node = self.run(self.graph.add(MemoryOptions(node_name=name)))
        driver = node.driver
        assert isinstance(driver, Memory)

        def grow() -> None:
            driver.data = bytearray(size)
            node.length = size

        self.call(grow)
        return driver

    def client(self, name: str = "", **options: Any) -> RawClient:
        """A client in transmission."""
        client = RawClient(self.path)
        client.go(name, **options)
        return client
