"""``null-aio``: like ``null-co``, but every request waits for a turn of the event loop at least."""

from __future__ import annotations

import asyncio

from pyqsd.block.options import BlockdevOptions
from pyqsd.drivers.protocols._null import Null
from pyqsd.qapi.types import Int64, Uint64


class Options(BlockdevOptions, tag="null-aio"):
    """QAPI ``BlockdevOptionsNull``; `size` in bytes (1 GiB), `latency_ns` in nanoseconds."""

    size: Int64 | None = None
    latency_ns: Uint64 | None = None
    read_zeroes: bool | None = None


class NullAio(Null):
    """Never answers at once, as a disk would. See docs/drivers/null-aio.md."""

    name = "null-aio"
    Options = Options

    async def _delay(self) -> None:
        if self._latency:
            await asyncio.sleep(self._latency)
        else:
            loop = asyncio.get_running_loop()
            turn = loop.create_future()
            loop.call_soon(_next_turn, turn)
            await turn

    def read_now(self, offset: int, length: int, iov: list[memoryview]) -> bool:
        return False

    def write_now(self, offset: int, length: int, iov: list[memoryview]) -> bool:
        return False


def _next_turn(turn: asyncio.Future[None]) -> None:
    if not turn.done():
        turn.set_result(None)


DRIVER = NullAio
