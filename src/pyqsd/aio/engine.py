"""The file I/O engine of an event loop: what the inline path cannot do without waiting goes through it.

There is at most one engine of a kind per loop. `acquire` makes it when it is needed, the last `release` closes it::

    engine = acquire("io_uring")
    await engine.preadv(fd, iov, offset, length)
    release(engine)

The methods start the operation at once and return an awaitable `Request`. A transfer is all or nothing: short reads and
writes are continued, reads beyond the end of the file give zeroes. Errors are OSError.

**Cancelling.** The kernel cannot be made to let go of a buffer. A waiter that is cancelled therefore stays until the
operation has ended, and only then raises CancelledError: the caller may reuse or free its buffers as soon as the await
is over, however it ended, and no write lands later than that.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import threading
from collections.abc import Callable, Generator
from contextvars import Context
from typing import Any, ClassVar, Final

#: What Linux transfers at most in one call (MAX_RW_COUNT), rounded down to a power of two.
MAX_TRANSFER: Final = 1 << 30
NO_LIMIT: Final = 1 << 30
#: What preadv and pwritev take at most.
IOV_MAX: Final = 1024


class Request:
    """An operation under way: an awaitable for exactly one task (or one `start`ed coroutine).

    It looks enough like a future for asyncio's tasks, but wakes its waiter directly, without a turn of the loop, and
    does not let it go before the operation has ended.
    """

    __slots__ = (
        "_asyncio_future_blocking",
        "_callback",
        "_context",
        "_loop",
        "cancelled_",
        "done_",
        "exception_",
        "value",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._asyncio_future_blocking = False
        self._callback: Callable[[Any], object] | None = None
        self._context: Context | None = None
        self.cancelled_ = False
        self.done_ = False
        self.exception_: BaseException | None = None
        self.value: Any = None

    def finish(self, exception: BaseException | None = None) -> None:
        """The operation has ended (its result is in `value`); called once, by the engine, on the loop's thread and
        outside of any task."""
        self.done_ = True
        self.exception_ = exception
        callback = self._callback
        if callback is not None:
            self._callback = None
            context = self._context
            if context is None:
                callback(self)
            else:
                context.run(callback, self)

    def call_when_done(self, callback: Callable[[Request], object]) -> None:
        """Instead of a task, `callback` waits for the end of the operation, which must not have come yet. It is called
        outside of any task, and must not raise."""
        assert self._callback is None and not self.done_
        self._asyncio_future_blocking = False
        self._callback = callback

    # What a task uses of a future.

    def __await__(self) -> Generator[Any, None, Any]:
        if not self.done_:
            self._asyncio_future_blocking = True
            yield self
        return self.result()

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """The loop it belongs to."""
        return self._loop

    def add_done_callback(self, callback: Callable[[Any], object], *, context: Context) -> None:
        """For the task that waits."""
        if self.done_:
            self._loop.call_soon(callback, self, context=context)
            return
        assert self._callback is None, "a request has one waiter"
        self._callback = callback
        self._context = context

    def remove_done_callback(self, callback: Callable[[Any], object]) -> int:
        """For the task that waits."""
        if self._callback == callback:
            self._callback = None
            return 1
        return 0

    def cancel(self, msg: Any = None) -> bool:
        """Remember that the waiter was cancelled: it learns that when the operation has ended."""
        if self.done_:
            return False
        self.cancelled_ = True
        return True

    def done(self) -> bool:
        """Whether the operation has ended."""
        return self.done_

    def result(self) -> Any:
        """What the operation returned; raises what it raised, or CancelledError."""
        if self.cancelled_:
            raise asyncio.CancelledError
        if self.exception_ is not None:
            raise self.exception_
        return self.value


class Engine:
    """Base of the engines. It belongs to one loop and is used on that loop's thread only."""

    #: As in QAPI ``BlockdevAioOptions``.
    name: ClassVar[str]

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        #: Users that have not released it.
        self.users = 0
        #: So many requests go to the kernel at once at most (QAPI ``aio-max-batch``: the least that a user asks for).
        self.max_batch = NO_LIMIT
        self._batch_limits: list[int] = []

    def limit_batch(self, most: int) -> None:
        """Ask for batches of at most `most` requests, until `unlimit_batch`."""
        self._batch_limits.append(most)
        self.max_batch = min(self._batch_limits)

    def unlimit_batch(self, most: int) -> None:
        """Take back a `limit_batch`."""
        self._batch_limits.remove(most)
        self.max_batch = min(self._batch_limits, default=NO_LIMIT)

    def preadv(self, fd: int, iov: list[memoryview], offset: int, length: int) -> Request:
        """Fill the buffers, `length` bytes in all, from `offset`; zeroes beyond the end of the file."""
        raise NotImplementedError

    def pwritev(self, fd: int, iov: list[memoryview], offset: int, length: int, flags: int = 0) -> Request:
        """Write all of the buffers. `flags`: ``os.RWF_DSYNC`` or 0."""
        raise NotImplementedError

    def fdatasync(self, fd: int) -> Request:
        """Make what was written durable, with the metadata that is needed to read it."""
        raise NotImplementedError

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> Request:
        """Linux fallocate(2)."""
        raise NotImplementedError

    def call(self, func: Callable[..., Any], *args: Any) -> Request:
        """Run a function that blocks, in another thread. Its result is the request's."""
        raise NotImplementedError

    def close(self) -> None:
        """Wait for what is under way, and give everything back. A second time it does nothing."""
        raise NotImplementedError


def rest_of(iov: list[memoryview], done: int) -> list[memoryview]:
    """`iov` without its first `done` bytes."""
    rest = []
    for view in iov:
        size = len(view)
        if done >= size:
            done -= size
        elif done:
            rest.append(view[done:])
            done = 0
        else:
            rest.append(view)
    return rest


def zero(iov: list[memoryview]) -> None:
    """Set all bytes to zero."""
    for view in iov:
        view[:] = bytes(len(view))


def piece_of(iov: list[memoryview], length: int) -> list[memoryview]:
    """What one system call may take of `iov`: at most `IOV_MAX` buffers and `MAX_TRANSFER` bytes."""
    if len(iov) > IOV_MAX:
        iov = iov[:IOV_MAX]
    elif length <= MAX_TRANSFER:
        return iov
    taken = []
    room = MAX_TRANSFER
    for view in iov:
        if len(view) >= room:
            taken.append(view[:room])
            break
        taken.append(view)
        room -= len(view)
    return taken


def at_end(fd: int, position: int) -> bool:
    """Whether a regular file ends at or before `position`: then a short read needs no second one, which O_DIRECT would
    refuse at such an offset."""
    info = os.fstat(fd)
    return stat.S_ISREG(info.st_mode) and position >= info.st_size


_engines: dict[tuple[int, str], Engine] = {}
_lock = threading.Lock()
_uring_works: bool | None = None


def uring_available() -> bool:
    """Whether io_uring can be used here (kernel.io_uring_disabled, seccomp and old kernels may forbid it)."""
    global _uring_works
    if _uring_works is None:
        try:
            from pyqsd.aio.uring import works

            _uring_works = works()
        except ImportError:
            _uring_works = False
    return _uring_works


def acquire(kind: str) -> Engine:
    """The running loop's engine: ``io_uring``, or ``threads``. Where there is no io_uring, it is ``threads`` too."""
    loop = asyncio.get_running_loop()
    if kind == "io_uring" and not uring_available():
        kind = "threads"
    _close_orphans()
    with _lock:
        found = _engines.get((id(loop), kind))
        if found is None:
            if kind == "io_uring":
                from pyqsd.aio.uring import UringEngine

                found = UringEngine(loop)
            else:
                from pyqsd.aio.threads import ThreadsEngine

                found = ThreadsEngine(loop)
            _engines[id(loop), kind] = found
        found.users += 1
        return found


def _close_orphans() -> None:
    """Close engines whose users went down with their loop."""
    with _lock:
        orphans = [(key, engine) for key, engine in _engines.items() if engine.loop.is_closed()]
        for key, _ in orphans:
            del _engines[key]
    for _, engine in orphans:
        engine.close()


def release(engine: Engine) -> None:
    """Give back what `acquire` returned; the last one closes the engine."""
    with _lock:
        engine.users -= 1
        if engine.users:
            return
        key = id(engine.loop), engine.name
        if _engines.get(key) is engine:
            del _engines[key]
    engine.close()


def error(number: int) -> OSError:
    """OSError with the system's words."""
    return OSError(number, os.strerror(number))


#: What a write that makes no progress means.
NO_SPACE: Final = errno.ENOSPC
