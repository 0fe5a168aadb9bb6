"""Run a coroutine at once in the caller, and make it a task only if it really has to wait.

A task per request costs more than most requests do. What is started here must not ask for the current task before its
first suspension (``asyncio.timeout``, ``wait_for``): futures, locks and events are fine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator
from typing import Any, TypeVar

T = TypeVar("T")


class _Suspended(Coroutine[Any, Any, T]):
    """A coroutine that has already yielded `waiting_for`: hands that to the task first, then goes on."""

    __slots__ = ("_coro", "_waiting_for")

    def __init__(self, coro: Coroutine[Any, Any, T], waiting_for: Any) -> None:
        self._coro = coro
        self._waiting_for = waiting_for

    def send(self, value: Any) -> Any:
        waiting_for = self._waiting_for
        if waiting_for is not None:
            self._waiting_for = None
            return waiting_for
        return self._coro.send(value)

    def throw(self, *args: Any) -> Any:
        self._waiting_for = None
        return self._coro.throw(*args)

    def close(self) -> None:
        self._coro.close()

    def __await__(self) -> Generator[Any, Any, T]:
        raise TypeError("a suspended request belongs to its task")


def start(
    coro: Coroutine[Any, Any, T], done: Callable[[T | None, BaseException | None], None]
) -> asyncio.Task[T] | None:
    """Run `coro` now. If it finishes at once, call ``done(result, None)`` or ``done(None, exception)`` before returning
    None; otherwise return the task that it has become, which calls `done` when it ends (the owner keeps and cancels
    it).
    """
    try:
        waiting_for = coro.send(None)
    except StopIteration as stop:
        done(stop.value, None)
        return None
    except Exception as exc:
        done(None, exc)
        return None
    task = asyncio.get_running_loop().create_task(_Suspended(coro, waiting_for))

    def finished(task: asyncio.Task[T]) -> None:
        if task.cancelled():
            done(None, asyncio.CancelledError())
            return
        exc = task.exception()
        if exc is not None:
            done(None, exc)
        else:
            done(task.result(), None)

    task.add_done_callback(finished)
    return task
