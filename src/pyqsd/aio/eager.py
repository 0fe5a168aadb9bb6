"""Run a coroutine at once in the caller, and make it a task only if it really has to wait.

A task per request costs more than most requests do. `start` makes one when the coroutine first suspends. `start_io`
does without one also while the coroutine waits for file I/O; when it waits for something else, it becomes a task.

What is started here must not ask for the current task (``asyncio.timeout``, ``wait_for``) before it has become one:
futures, locks and events are fine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator
from typing import Any, TypeVar

from pyqsd.aio.engine import Request

T = TypeVar("T")
#: Gets the result and None, or None and the exception.
Done = Callable[[Any, BaseException | None], None]


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
        waiting_for, self._waiting_for = self._waiting_for, None
        if waiting_for is not None and _is_cancel(args[0]) and waiting_for.cancel():
            # Cancelled before its first step: as a task that waits already, it learns that from what it waits for.
            # A request to the kernel lets nobody go before it has ended.
            return waiting_for
        return self._coro.throw(*args)

    def close(self) -> None:
        self._coro.close()

    def __await__(self) -> Generator[Any, Any, T]:
        raise TypeError("a suspended request belongs to its task")


def _is_cancel(exc: Any) -> bool:
    return isinstance(exc, asyncio.CancelledError) or exc is asyncio.CancelledError


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
    return _make_task(coro, waiting_for, done)


def _make_task(coro: Coroutine[Any, Any, T], waiting_for: Any, done: Done) -> asyncio.Task[T]:
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


class Running:
    """A coroutine that `start_io` has started and that has not ended yet. Its owner may cancel it."""

    __slots__ = ("_coro", "_done", "_request", "_task", "on_end")

    def __init__(self, coro: Coroutine[Any, Any, Any], waiting_for: Any, done: Done) -> None:
        self._coro = coro
        self._done: Done = done
        self._request: Request | None = None
        self._task: asyncio.Task[Any] | None = None
        #: Called with this when it has ended, before `done` is.
        self.on_end: Callable[[Running], None] | None = None
        self._wait(waiting_for)

    def cancel(self) -> None:
        """Raise CancelledError where it waits, after the I/O that it waits for has ended."""
        if self._task is not None:
            self._task.cancel()
        elif self._request is not None:
            self._request.cancel()

    def _wait(self, waiting_for: Any) -> None:
        if isinstance(waiting_for, Request):
            self._request = waiting_for
            waiting_for.call_when_done(self._step)
        else:
            self._task = _make_task(self._coro, waiting_for, self._end)

    def _step(self, request: Request) -> None:
        self._request = None
        try:
            waiting_for = self._coro.send(None)
        except StopIteration as stop:
            self._end(stop.value, None)
        except (Exception, asyncio.CancelledError) as exc:
            self._end(None, exc)
        else:
            self._wait(waiting_for)

    def _end(self, result: Any, exc: BaseException | None) -> None:
        # Whoever `done` belongs to usually has this one too: a ring that only the garbage collector would break.
        done, self._done = self._done, _nobody
        try:
            if self.on_end is not None:
                self.on_end(self)
            done(result, exc)
        except Exception as error:
            # As in a task's callback: the caller is the engine, which has others to wake.
            asyncio.get_running_loop().call_exception_handler(
                {"message": "Exception in the callback of a request", "exception": error}
            )


def _nobody(result: Any, exc: BaseException | None) -> None:
    """Has been called already."""


def start_io(coro: Coroutine[Any, Any, T], done: Callable[[T | None, BaseException | None], None]) -> Running | None:
    """Like `start`, for the coroutines of requests, of which there are very many: waiting for files takes no task."""
    try:
        waiting_for = coro.send(None)
    except StopIteration as stop:
        done(stop.value, None)
        return None
    except Exception as exc:
        done(None, exc)
        return None
    return Running(coro, waiting_for, done)
