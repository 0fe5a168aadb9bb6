"""Commands for the program itself, and the end of the dispatcher."""

from __future__ import annotations

import asyncio

import pytest

from pyqsd.monitor.dispatcher import Dispatcher
from pyqsd.qapi.errors import CommandNotFound, Error
from tests.monitor.wire import command


async def double(*, number: int) -> int:
    await asyncio.sleep(0)
    return 2 * number


async def sleep(order: list[str], /, *, name: str) -> None:
    order.append(f"{name} begins")
    try:
        await asyncio.sleep(0.01)
        order.append(f"{name} ends")
    finally:
        order.append(f"{name} left")


async def boom() -> None:
    raise ValueError("boom")


async def cancelled() -> None:
    raise asyncio.CancelledError


def make(order: list[str] | None = None) -> Dispatcher:
    commands = (
        command("double", double),
        command("sleep", sleep),
        command("boom", boom),
        command("cancelled", cancelled),
    )
    return Dispatcher({list[str]: order if order is not None else []}, {command.name: command for command in commands})


async def test_execute() -> None:
    dispatcher = make()
    assert await dispatcher.execute("double", {"number": 4}) == 8
    with pytest.raises(Error, match="Parameter 'number' is missing"):
        await dispatcher.execute("double")
    with pytest.raises(CommandNotFound, match="The command nosuch has not been found"):
        await dispatcher.execute("nosuch")
    with pytest.raises(ValueError, match="boom"):
        await dispatcher.execute("boom")
    assert await dispatcher.execute("double", {"number": 1}) == 2


async def test_one_at_a_time() -> None:
    order: list[str] = []
    dispatcher = make(order)
    await asyncio.gather(*(dispatcher.execute("sleep", {"name": name}) for name in "abc"))
    assert order == [f"{name} {what}" for name in "abc" for what in ("begins", "ends", "left")]


async def test_a_command_that_is_cancelled_at_once_does_not_block_the_others() -> None:
    dispatcher = make()
    with pytest.raises(asyncio.CancelledError):
        await dispatcher.execute("cancelled")
    assert await dispatcher.execute("double", {"number": 3}) == 6


async def test_who_stops_waiting_does_not_stop_the_command() -> None:
    order: list[str] = []
    dispatcher = make(order)
    task = asyncio.get_running_loop().create_task(dispatcher.execute("sleep", {"name": "a"}))
    await asyncio.sleep(0)
    task.cancel()
    await dispatcher.execute("sleep", {"name": "b"})
    assert order == ["a begins", "a ends", "a left", "b begins", "b ends", "b left"]


async def test_close() -> None:
    order: list[str] = []
    dispatcher = make(order)
    queue = dispatcher.queue()
    ended: list[object] = []
    sleeping = dispatcher.find("sleep")
    for name in "ab":
        queue.put(lambda name=name: dispatcher.call(sleeping, {"name": name}), lambda result, exc: ended.append(exc))
    assert len(queue) == 1
    await dispatcher.close()
    assert order == ["a begins", "a left"]
    assert len(ended) == 2 and all(isinstance(exc, asyncio.CancelledError) for exc in ended)
    assert len(queue) == 0
    await dispatcher.close()


async def test_nobody_waits_for_ever_at_the_end() -> None:
    dispatcher = make()
    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(dispatcher.execute("sleep", {"name": name})) for name in "abc"]
    await asyncio.sleep(0)
    await dispatcher.close()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [str(result) for result in results] == ["The daemon is shutting down"] * 3
    with pytest.raises(Error, match="The daemon is shutting down"):
        await dispatcher.execute("double", {"number": 1})


async def test_nothing_begins_after_the_stop() -> None:
    order: list[str] = []
    dispatcher = make(order)
    loop = asyncio.get_running_loop()
    first = loop.create_task(dispatcher.execute("sleep", {"name": "a"}))
    second = loop.create_task(dispatcher.execute("sleep", {"name": "b"}))
    await asyncio.sleep(0)
    dispatcher.stop()
    await first
    assert order == ["a begins", "a ends", "a left"]
    await dispatcher.close()
    with pytest.raises(Error, match="The daemon is shutting down"):
        await second


async def test_close_cancels_out_of_band_commands() -> None:
    order: list[str] = []
    dispatcher = make(order)
    ended: list[object] = []
    dispatcher.run_now(dispatcher.call(dispatcher.find("sleep"), {"name": "a"}), lambda _, exc: ended.append(exc))
    dispatcher.run_now(dispatcher.call(dispatcher.find("boom"), {}), lambda _, exc: ended.append(exc))
    assert len(ended) == 1 and isinstance(ended[0], ValueError)
    await dispatcher.close()
    assert order == ["a begins", "a left"]
    assert len(ended) == 2 and isinstance(ended[1], asyncio.CancelledError)
