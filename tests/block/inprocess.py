"""What the tests of the block room's commands share."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from pyqsd.monitor.daemon import Daemon
from pyqsd.qapi.command import Event
from pyqsd.qapi.errors import Error


class Commands:
    """A daemon in this process; calling it runs a command. `events` has what it has sent so far."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.graph = daemon.graph
        self.events: list[Event] = []
        daemon.events.subscribe(self.events.append)

    async def __call__(self, command: str, /, **arguments: Any) -> Any:
        return await self.daemon.qmp(command, {name.replace("_", "-"): value for name, value in arguments.items()})

    async def add(self, driver: str, name: str, **options: Any) -> None:
        await self("blockdev-add", driver=driver, node_name=name, **options)

    async def refused(self, command: str, /, **arguments: Any) -> str:
        """The message of the error that the command ends with."""
        with pytest.raises(Error) as info:
            await self(command, **arguments)
        return info.value.desc

    async def node(self, name: str) -> Any:
        """The node as ``query-named-block-nodes`` shows it."""
        return next(n for n in await self("query-named-block-nodes") if n["node-name"] == name)


def run(test: Callable[[Commands], Awaitable[None]]) -> None:
    """Run `test` with a fresh daemon."""

    async def main() -> None:
        async with Daemon() as daemon:
            await test(Commands(daemon))

    asyncio.run(main())
