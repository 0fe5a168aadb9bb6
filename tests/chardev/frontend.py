"""A frontend that remembers what it was told, and a loop to run tests in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from pyqsd.chardev.chardev import Chardev

TIMEOUT = 20.0


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a test in a loop of its own; an exception in any callback fails it."""

    async def main() -> None:
        problems: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: problems.append(context))
        async with asyncio.timeout(TIMEOUT):
            await coroutine
        assert not problems

    asyncio.run(main())


async def until(condition: Callable[[], Any]) -> None:
    """Wait for what nothing announces."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.002)


class Recorder:
    """Attached to a chardev: everything that happens is in `log`, and the bytes are in `data`."""

    def __init__(self, chardev: Chardev, attach: bool = True) -> None:
        self.log: list[str] = []
        self.data = b""
        self._changed = asyncio.Event()
        self.chardev = chardev
        if attach:
            chardev.attach(self)

    def opened(self) -> None:
        self.log.append("opened")
        self._changed.set()

    def received(self, data: bytes) -> None:
        self.data += data
        self._changed.set()

    def closed(self) -> None:
        self.log.append("closed")
        self._changed.set()

    async def wait(self, condition: Callable[[], Any]) -> None:
        """Wait until `condition` is true; it is looked at whenever something happened."""
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    async def wait_data(self, data: bytes) -> None:
        """Wait until exactly `data` was received since the last time."""
        await self.wait(lambda: len(self.data) >= len(data))
        assert self.data == data
        self.data = b""

    async def wait_log(self, *log: str) -> None:
        """Wait until exactly this happened."""
        await self.wait(lambda: len(self.log) >= len(log))
        assert self.log == list(log)
