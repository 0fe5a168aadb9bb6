"""The engine of threads: for systems without io_uring, for ``aio=threads``, and for the calls that io_uring lacks."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, ClassVar

from pyqsd.aio.engine import NO_SPACE, Engine, Request, at_end, error, piece_of, rest_of, zero

#: As many as QEMU's pool: the threads are cheap while they sleep, and the disk's queue wants to be full.
_MAX_THREADS = 64


class _Call(Request):
    """A function to be run by a worker."""

    __slots__ = ("args", "func")

    def __init__(self, loop: asyncio.AbstractEventLoop, func: Callable[..., Any], args: tuple[Any, ...]) -> None:
        super().__init__(loop)
        self.func = func
        self.args = args


def read_all(fd: int, iov: list[memoryview], offset: int, length: int) -> None:
    """Fill `iov`; zeroes beyond the end of the file. Waits."""
    while length:
        done = os.preadv(fd, piece_of(iov, length), offset)
        if done == length:
            return
        iov = rest_of(iov, done)
        offset += done
        length -= done
        if not done or at_end(fd, offset):
            zero(iov)
            return


def write_all(fd: int, iov: list[memoryview], offset: int, length: int, flags: int) -> None:
    """Write all of `iov`. Waits."""
    while length:
        done = os.pwritev(fd, piece_of(iov, length), offset, flags)
        if done == length:
            return
        if not done:
            raise error(NO_SPACE)
        iov = rest_of(iov, done)
        offset += done
        length -= done


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2), which the os module does not have."""
    from pyqsd.aio.libc import fallocate as call

    call(fd, mode, offset, length)


class ThreadsEngine(Engine):
    """Workers take requests from one queue; what is done comes back in batches, with one wake-up of the loop for all
    that has ended since the last."""

    name: ClassVar[str] = "threads"

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self._todo: SimpleQueue[_Call | None] = SimpleQueue()
        self._done: deque[tuple[_Call, BaseException | None]] = deque()
        self._threads: list[threading.Thread] = []
        self._under_way = 0
        self._closed = False
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._woken = False
        loop.add_reader(self._wake_fd, self._reap)

    def call(self, func: Callable[..., Any], *args: Any) -> Request:
        request = _Call(self.loop, func, args)
        self._under_way += 1
        if self._under_way > len(self._threads) < _MAX_THREADS:
            thread = threading.Thread(target=self._work, name=f"pyqsd-io-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._todo.put(request)
        return request

    def preadv(self, fd: int, iov: list[memoryview], offset: int, length: int) -> Request:
        return self.call(read_all, fd, iov, offset, length)

    def pwritev(self, fd: int, iov: list[memoryview], offset: int, length: int, flags: int = 0) -> Request:
        return self.call(write_all, fd, iov, offset, length, flags)

    def fdatasync(self, fd: int) -> Request:
        return self.call(os.fdatasync, fd)

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> Request:
        return self.call(fallocate, fd, mode, offset, length)

    def _work(self) -> None:
        get, done = self._todo.get, self._done
        while (request := get()) is not None:
            exception: BaseException | None = None
            # One that was cancelled before it began need not begin.
            if not request.cancelled_:
                try:
                    request.value = request.func(*request.args)
                except BaseException as exc:
                    exception = exc
            done.append((request, exception))
            # Drop what this frame holds: the buffers are the caller's again.
            del request, exception
            # The loop clears the mark before it looks at the deque, so nothing is left there unseen.
            if not self._woken:
                self._woken = True
                os.eventfd_write(self._wake_fd, 1)

    def _reap(self) -> None:
        try:
            os.eventfd_read(self._wake_fd)
        except BlockingIOError:
            pass
        self._woken = False
        self._finish()

    def _finish(self) -> None:
        done = self._done
        for _ in range(len(done)):
            request, exception = done.popleft()
            self._under_way -= 1
            request.finish(exception)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for _ in self._threads:
            self._todo.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        if not self.loop.is_closed():
            self.loop.remove_reader(self._wake_fd)
            # Not at once: whoever closes may be in the middle of a task.
            self.loop.call_soon(self._finish)
        os.close(self._wake_fd)
