"""Starting a coroutine in its caller."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import weakref
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from pyqsd.aio import engine as engines
from pyqsd.aio.eager import Running, start, start_io
from pyqsd.aio.engine import Engine

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


# --- requests: no task while they wait for files --------------------------------------------------------------------


class Recorder:
    """What `start_io` called, and in which task."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []
        self.ended = asyncio.Event()

    def __call__(self, value: Any, exc: BaseException | None) -> None:
        self.outcomes.append((value, exc))
        self.ended.set()


def with_engine(main: Callable[[Engine], Awaitable[None]]) -> None:
    async def run() -> None:
        engine = engines.acquire("io_uring")
        try:
            await asyncio.wait_for(main(engine), 30)
        finally:
            engines.release(engine)

    asyncio.run(run())


@contextlib.contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    try:
        yield reader, writer
    finally:
        os.close(reader)
        os.close(writer)


def test_file_io_needs_no_task() -> None:
    async def main(engine: Engine) -> None:
        tasks = asyncio.all_tasks()
        with pipe() as (reader, writer):
            done = Recorder()
            buffer = bytearray(6)

            async def work() -> bytes:
                for at in (0, 3):
                    await engine.preadv(reader, [memoryview(buffer)[at : at + 3]], 0, 3)
                    assert asyncio.current_task() is None or asyncio.current_task() in tasks
                return bytes(buffer)

            running = start_io(work(), done)
            assert isinstance(running, Running)
            ends: list[Running] = []
            running.on_end = ends.append
            os.write(writer, b"abc")
            for _ in range(20):
                await asyncio.sleep(0)
            assert not done.outcomes and asyncio.all_tasks() == tasks
            os.write(writer, b"def")
            await done.ended.wait()
            assert done.outcomes == [(b"abcdef", None)] and ends == [running]

    with_engine(main)


def test_other_waiting_makes_a_task() -> None:
    async def main(engine: Engine) -> None:
        done = Recorder()

        async def work() -> int:
            await engine.call(os.getpid)
            await asyncio.sleep(0)
            async with asyncio.timeout(10):
                await engine.call(os.getpid)
            return await asyncio.wait_for(engine_call(engine), 10)

        assert start_io(work(), done) is not None
        await done.ended.wait()
        assert done.outcomes == [(os.getpid(), None)]
        # Also when that comes first.
        done = Recorder()

        async def sleep() -> int:
            await asyncio.sleep(0)
            return 5

        start_io(sleep(), done)
        await done.ended.wait()
        assert done.outcomes == [(5, None)]

    with_engine(main)


async def engine_call(engine: Engine) -> int:
    result: int = await engine.call(os.getpid)
    return result


def test_start_io_at_once_and_errors() -> None:
    async def main(engine: Engine) -> None:
        async def nothing() -> int:
            return 3

        async def wrong() -> None:
            raise OSError(5, "now")

        async def late() -> None:
            await engine.call(os.stat, "/nonexistent")

        done = Recorder()
        assert start_io(nothing(), done) is None and done.outcomes == [(3, None)]
        done = Recorder()
        assert start_io(wrong(), done) is None and isinstance(done.outcomes[0][1], OSError)
        done = Recorder()
        assert start_io(late(), done) is not None
        await done.ended.wait()
        assert isinstance(done.outcomes[0][1], FileNotFoundError)

    with_engine(main)


@pytest.mark.parametrize("starter", [start, start_io])
@pytest.mark.parametrize("turns", [0, 1, 5])
def test_cancelled_request_ends_after_the_kernel_has(starter: Any, turns: int) -> None:
    """Even if it is cancelled before the task that it became has begun."""

    async def main(engine: Engine) -> None:
        with pipe() as (reader, writer):
            done = Recorder()
            buffer = bytearray(5)

            async def work() -> None:
                await engine.preadv(reader, [memoryview(buffer)], 0, 5)

            running = starter(work(), done)
            for _ in range(turns):
                await asyncio.sleep(0)
            running.cancel()
            for _ in range(20):
                await asyncio.sleep(0)
            assert not done.outcomes
            os.write(writer, b"later")
            await done.ended.wait()
            assert isinstance(done.outcomes[0][1], asyncio.CancelledError) and len(done.outcomes) == 1
            assert buffer == b"later"

    with_engine(main)


def test_cancelled_while_it_waits_for_something_else() -> None:
    async def main(engine: Engine) -> None:
        done = Recorder()
        event = asyncio.Event()

        async def work() -> None:
            await engine.call(os.getpid)
            await event.wait()

        running = start_io(work(), done)
        assert running is not None
        while running._task is None:  # noqa: ASYNC110 (nothing announces it)
            await asyncio.sleep(0.001)
        running.cancel()
        await done.ended.wait()
        assert isinstance(done.outcomes[0][1], asyncio.CancelledError)

    with_engine(main)


def test_cancelled_task_that_has_not_begun_cancels_its_future() -> None:
    async def main() -> None:
        done = Recorder()
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def work() -> None:
            await future

        task = start(work(), done)
        assert task is not None
        task.cancel()
        await done.ended.wait()
        assert future.cancelled() and isinstance(done.outcomes[0][1], asyncio.CancelledError)

    asyncio.run(main())


def test_error_in_a_callback_stops_nobody_else() -> None:
    async def main(engine: Engine) -> None:
        reports: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: reports.append(context))
        done = Recorder()

        async def work() -> None:
            await engine.call(os.getpid)

        def broken(value: Any, exc: BaseException | None) -> None:
            raise RuntimeError("a mistake")

        start_io(work(), broken)
        start_io(work(), done)
        await done.ended.wait()
        assert done.outcomes == [(None, None)]
        assert [str(report["exception"]) for report in reports] == ["a mistake"]

    with_engine(main)


def test_ended_requests_are_no_garbage() -> None:
    """They are gone at once, not when the collector comes: there are very many of them."""

    class Owner:
        running: Running | None = None
        ended: asyncio.Event

        def done(self, value: Any, exc: BaseException | None) -> None:
            self.ended.set()

    async def main(engine: Engine) -> None:
        async def work() -> None:
            await engine.call(os.getpid)

        gc.disable()
        try:
            owner = Owner()
            owner.ended = ended = asyncio.Event()
            owner.running = start_io(work(), owner.done)
            alive = weakref.ref(owner)
            del owner
            await ended.wait()
            await asyncio.sleep(0)
            assert alive() is None
        finally:
            gc.enable()

    with_engine(main)
