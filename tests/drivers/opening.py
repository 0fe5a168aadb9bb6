"""Opening nodes for the tests of drivers: a graph of its own, and a user of a node."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from pyqsd.aio import engine as engines
from pyqsd.block import permissions as perms
from pyqsd.block.backend import BlockBackend
from pyqsd.block.graph import Graph
from pyqsd.block.node import Node
from pyqsd.block.options import BlockdevOptions
from pyqsd.qapi.command import EventBus
from pyqsd.qapi.convert import convert
from tests.support.daemon import DaemonProcess, poll

READ = perms.CONSISTENT_READ
READ_WRITE = perms.CONSISTENT_READ | perms.WRITE


def options(**wire: Any) -> BlockdevOptions:
    """The options from their wire form, with ``_`` for ``-`` in names."""
    return convert(_wired(wire), BlockdevOptions)


def _wired(value: Any) -> Any:
    if isinstance(value, dict):
        keep = {"host_device"}
        return {name if name in keep else name.replace("_", "-"): _wired(inner) for name, inner in value.items()}
    return value


@asynccontextmanager
async def graph() -> AsyncIterator[Graph]:
    """A graph whose nodes are closed in the end, and then nothing of theirs may be left."""
    made = Graph(EventBus())
    try:
        yield made
    finally:
        for backend in tuple(made.backends):
            backend.remove()
        await made.close_all()
    assert not made.nodes
    # Tests that leave a node open, as a crash does, leave the engine of their own loop.
    loop = asyncio.get_running_loop()
    assert not [engine for engine in engines._engines.values() if engine.loop is loop]


async def add(made: Graph, **wire: Any) -> Node:
    """Open a node; its name is ``node`` if none is given."""
    wire.setdefault("node_name", "node")
    return await made.add(options(**wire))


def use(made: Graph, node: Node, perm: int = READ_WRITE, shared: int = perms.ALL) -> BlockBackend:
    """A user of the node, as an export is one."""
    backend = BlockBackend(made, "a test", perm, shared)
    backend.insert(node)
    return backend


def run(main: Callable[[], Awaitable[None]]) -> None:
    """Run a coroutine function, with an end."""

    async def limited() -> None:
        await asyncio.wait_for(main(), 60)

    asyncio.run(limited())


async def read(user: BlockBackend | Node, offset: int, length: int) -> bytes:
    """The bytes of a range, read into a buffer that held something else."""
    data = bytearray(b"\xee" * length)
    await user.preadv(offset, length, [memoryview(data)])
    return bytes(data)


async def write(user: BlockBackend | Node, offset: int, data: bytes, flags: int = 0) -> None:
    """Write bytes."""
    await user.pwritev(offset, len(data), [memoryview(data)], flags)


@contextmanager
def real_daemon(args: list[str], workdir: Path) -> Iterator[None]:
    """qemu-storage-daemon, when it has done what its command line says. (It writes its pidfile last; a monitor that is
    used while the daemon still starts is not reliable.)"""
    pidfile = workdir / "qsd.pid"
    with DaemonProcess("qsd", [*args, "--pidfile", str(pidfile)], workdir=workdir, qmp=False) as daemon:

        def ready() -> bool:
            daemon.check_running()
            return pidfile.exists()

        poll(ready, "the daemon")
        yield
