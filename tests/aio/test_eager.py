"""Starting a coroutine in its caller."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from pyqsd.aio.eager import start

Outcome = tuple[Any, BaseException | None]


def test_finishes_at_once_without_a_task() -> None:
    async def main() -> None:
        outcomes: list[Outcome] = []

        async def work() -> int:
            return 7

        assert start(work(), lambda value, exc: outcomes.append((value, exc))) is None
        assert outcomes == [(7, None)]

    asyncio.run(main())


def test_raises_at_once() -> None:
    async def main() -> None:
        outcomes: list[Outcome] = []

        async def work() -> None:
            raise OSError(5, "no")

        assert start(work(), lambda value, exc: outcomes.append((value, exc))) is None
        assert isinstance(outcomes[0][1], OSError)

    asyncio.run(main())


@pytest.mark.parametrize("how", ["future", "sleep", "lock", "late error", "cancel"])
def test_becomes_a_task_when_it_suspends(how: str) -> None:
    async def main() -> None:
        outcomes: list[Outcome] = []
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        lock = asyncio.Lock()
        await lock.acquire()
        cleaned: list[bool] = []

        async def work() -> int:
            try:
                if how == "sleep":
                    await asyncio.sleep(0)
                    return 1
                if how == "lock":
                    async with lock:
                        return 1
                value = await future
                # After its first suspension it is in a task like any other.
                assert asyncio.current_task() is task
                await asyncio.sleep(0)
                if how == "late error":
                    raise OSError(5, "no")
                return value
            finally:
                cleaned.append(True)

        task = start(work(), lambda value, exc: outcomes.append((value, exc)))
        assert task is not None and not outcomes
        if how == "cancel":
            task.cancel()
        else:
            future.set_result(1)
            lock.release()
        with contextlib.suppress(asyncio.CancelledError, OSError):
            await task
        await asyncio.sleep(0)
        assert cleaned == [True] and len(outcomes) == 1
        value, exc = outcomes[0]
        if how == "cancel":
            assert isinstance(exc, asyncio.CancelledError)
        elif how == "late error":
            assert isinstance(exc, OSError)
        else:
            assert (value, exc) == (1, None)

    asyncio.run(main())
