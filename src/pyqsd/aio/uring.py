"""The engine of io_uring (io_uring(7), liburing).

What a turn of the loop starts goes to the kernel with one system call at the end of the turn; what has completed comes
back in batches when the ring's descriptor becomes readable. A request that finds nothing under way is submitted at
once: it need not wait for others to share its system call.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar, Final

import liburing as ring_lib
from liburing import (
    Cqe,
    CqeIter,
    Iovec,
    Ring,
    io_uring_cq_advance,
    io_uring_get_sqe,
    io_uring_prep_fallocate,
    io_uring_prep_fsync,
    io_uring_prep_readv,
    io_uring_prep_writev,
    io_uring_submit,
)

from pyqsd.aio.engine import NO_SPACE, Engine, Request, acquire, at_end, error, piece_of, release, rest_of, zero
from pyqsd.aio.threads import read_all, write_all

#: Requests that the kernel gets at one time; more wait here. As QEMU's ring.
_ENTRIES: Final = 128

_READ: Final = 0
_WRITE: Final = 1
_SYNC: Final = 2
_FALLOCATE: Final = 3

#: The user_data of entries that stand for nothing.
_NOBODY: Final = _ENTRIES


def works() -> bool:
    """Whether a ring can be made, and knows all the operations that the engine needs."""
    ring = Ring()
    try:
        ring_lib.io_uring_queue_init(4, ring, 0)
    except OSError:
        return False
    try:
        known = ring_lib.probe()
        features = int(ring.features)
    except (OSError, RuntimeError):
        return False
    finally:
        ring_lib.io_uring_queue_exit(ring)
    needed = ("IORING_OP_READV", "IORING_OP_WRITEV", "IORING_OP_FSYNC", "IORING_OP_FALLOCATE")
    # Completions must not be dropped, and argument memory must not be needed after submission.
    stable = ring_lib.IORING_FEAT_NODROP | ring_lib.IORING_FEAT_SUBMIT_STABLE
    return features & stable == stable and all(known.get(name, False) for name in needed)


log = logging.getLogger(__name__)


class _Operation(Request):
    """A request with its arguments: they live here until the kernel is done with them."""

    __slots__ = ("fd", "flags", "iov", "iovec", "kind", "length", "offset")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        kind: int,
        fd: int,
        iov: list[memoryview],
        offset: int,
        length: int,
        flags: int,
    ) -> None:
        self._loop = loop
        self._asyncio_future_blocking = False
        self._callback = None
        self._context = None
        self.cancelled_ = False
        self.done_ = False
        self.exception_ = None
        self.value = None
        self.kind = kind
        self.fd = fd
        self.iov = iov
        self.offset = offset
        self.length = length
        self.flags = flags
        self.iovec: Any = None


class UringEngine(Engine):
    """One ring per loop."""

    name: ClassVar[str] = "io_uring"

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self._ring = Ring()
        ring_lib.io_uring_queue_init(_ENTRIES, self._ring, 0)
        # Children of this process must not write into its rings.
        ring_lib.io_uring_ring_dontfork(self._ring)
        self._cqe = Cqe()
        #: What the kernel has, or is about to get, by user_data.
        self._slots: list[_Operation | None] = [None] * _ENTRIES
        self._free = list(range(_ENTRIES))
        #: What waits for a free slot.
        self._backlog: deque[_Operation] = deque()
        #: Entries in the submission queue that have not been submitted.
        self._pending = 0
        self._submit_scheduled = False
        self._threads: Engine | None = None
        self._closed = False
        loop.add_reader(self._ring.ring_fd, self._reap)

    # --- starting -----------------------------------------------------------------------------------------------------

    def preadv(self, fd: int, iov: list[memoryview], offset: int, length: int) -> Request:
        operation = _Operation(self.loop, _READ, fd, iov, offset, length, 0)
        if length:
            self._start(operation)
        else:
            operation.finish()
        return operation

    def pwritev(self, fd: int, iov: list[memoryview], offset: int, length: int, flags: int = 0) -> Request:
        operation = _Operation(self.loop, _WRITE, fd, iov, offset, length, flags)
        if length:
            self._start(operation)
        else:
            operation.finish()
        return operation

    def fdatasync(self, fd: int) -> Request:
        operation = _Operation(self.loop, _SYNC, fd, [], 0, 0, 0)
        self._start(operation)
        return operation

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> Request:
        operation = _Operation(self.loop, _FALLOCATE, fd, [], offset, length, mode)
        self._start(operation)
        return operation

    def call(self, func: Callable[..., Any], *args: Any) -> Request:
        if self._threads is None:
            self._threads = acquire("threads")
        return self._threads.call(func, *args)

    def _start(self, operation: _Operation) -> None:
        free = self._free
        if not free:
            self._backlog.append(operation)
            return
        kind = operation.kind
        if kind <= _WRITE:
            iov = operation.iov
            try:
                iovec = operation.iovec = Iovec(iov)
            except ValueError:
                # More buffers than one call takes.
                iovec = operation.iovec = Iovec(piece_of(iov, operation.length))
        # The submission queue has as many entries as there are slots.
        sqe = io_uring_get_sqe(self._ring)
        try:
            if kind == _READ:
                io_uring_prep_readv(sqe, operation.fd, iovec, operation.offset, 0)
            elif kind == _WRITE:
                io_uring_prep_writev(sqe, operation.fd, iovec, operation.offset, operation.flags)
            elif kind == _SYNC:
                io_uring_prep_fsync(sqe, operation.fd, ring_lib.IORING_FSYNC_DATASYNC)
            else:
                io_uring_prep_fallocate(sqe, operation.fd, operation.flags, operation.offset, operation.length)
        except BaseException:
            # The entry is taken, and what stands in it is an old request, which must not be made again.
            ring_lib.io_uring_prep_nop(sqe)
            sqe.user_data = _NOBODY
            self._pending += 1
            raise
        alone = len(free) == _ENTRIES
        sqe.user_data = slot = free.pop()
        self._slots[slot] = operation
        self._pending += 1
        if alone or self._pending >= self.max_batch:
            self._submit()
        elif not self._submit_scheduled:
            self._submit_scheduled = True
            self.loop.call_soon(self._submit)

    def _submit(self) -> None:
        self._submit_scheduled = False
        while self._pending and not self._closed:
            try:
                submitted = io_uring_submit(self._ring)
            except InterruptedError:
                continue
            except OSError as exc:
                if exc.errno not in (errno.EAGAIN, errno.EBUSY):
                    log.error("io_uring: cannot submit requests: %s", exc)
                submitted = 0
            if not submitted:
                # The kernel is short of memory. Nobody may be told of an error, for the requests are in its queue.
                self._submit_scheduled = True
                self.loop.call_later(0.001, self._submit)
                return
            self._pending -= submitted

    # --- completing ---------------------------------------------------------------------------------------------------

    def _take(self) -> list[tuple[_Operation, int]]:
        """What has completed, with the results. The queue's entries and the slots are free again afterwards."""
        cqe, slots, free = self._cqe, self._slots, self._free
        done: list[tuple[_Operation, int]] = []
        count = 0
        for _ in CqeIter(self._ring, cqe):
            count += 1
            entry = cqe[0]
            try:
                result = entry.res
            except OSError as exc:
                result = -(exc.errno or errno.EIO)
            slot = entry.user_data
            if slot == _NOBODY:
                continue
            operation = slots[slot]
            assert operation is not None
            slots[slot] = None
            free.append(slot)
            done.append((operation, result))
        if count:
            io_uring_cq_advance(self._ring, count)
        return done

    def _reap(self) -> None:
        for operation, result in self._take():
            operation.iovec = None
            if result != operation.length or operation.kind > _WRITE:
                self._go_on(operation, result)
                continue
            # As `finish`, of which this is by far the most frequent case.
            operation.done_ = True
            callback = operation._callback
            if callback is not None:
                operation._callback = None
                if operation._context is None:
                    callback(operation)
                else:
                    operation._context.run(callback, operation)
        while self._backlog and self._free:
            operation = self._backlog.popleft()
            if operation.cancelled_:
                operation.finish()
                continue
            try:
                self._start(operation)
            except Exception as exc:
                operation.finish(exc)

    def _go_on(self, operation: _Operation, result: int) -> None:
        """What has not simply done all that it should have: errors, short transfers, and operations without data."""
        kind = operation.kind
        if result < 0:
            number = -result
            if number == errno.EINTR or (number == errno.EAGAIN and kind > _WRITE):
                self._start(operation)
            elif number == errno.EAGAIN:
                # The kernel could not do it without waiting, nor hand it to its own workers.
                self._in_thread(operation)
            else:
                operation.finish(error(number))
            return
        if kind > _WRITE:
            operation.finish()
            return
        operation.iov = rest_of(operation.iov, result)
        operation.offset += result
        operation.length -= result
        if kind == _READ:
            try:
                end = not result or at_end(operation.fd, operation.offset)
            except OSError as exc:
                operation.finish(exc)
                return
            if end:
                zero(operation.iov)
                operation.finish()
                return
        elif not result:
            operation.finish(error(NO_SPACE))
            return
        if operation.cancelled_:
            # Nobody is interested in the rest.
            operation.finish()
            return
        self._start(operation)

    def _in_thread(self, operation: _Operation) -> None:
        if operation.kind == _READ:
            request = self.call(read_all, operation.fd, operation.iov, operation.offset, operation.length)
        else:
            request = self.call(
                write_all, operation.fd, operation.iov, operation.offset, operation.length, operation.flags
            )
        request.call_when_done(lambda ended: operation.finish(ended.exception_))

    def close(self) -> None:
        if self._closed:
            return
        open_loop = not self.loop.is_closed()
        while len(self._free) < _ENTRIES:
            # The memory must outlive the requests: wait for the kernel to let go of the last buffer.
            self._submit()
            ring_lib.io_uring_wait_cqe(self._ring, self._cqe)
            for operation, result in self._take():
                self._fail(operation, errno.ECANCELED if result >= 0 else -result)
        for operation in self._backlog:
            self._fail(operation, errno.ECANCELED)
        self._backlog.clear()
        self._closed = True
        if open_loop:
            self.loop.remove_reader(self._ring.ring_fd)
        ring_lib.io_uring_queue_exit(self._ring)
        if self._threads is not None:
            release(self._threads)

    def _fail(self, operation: _Operation, number: int) -> None:
        """Its engine goes away before it has ended: never in the middle of a task, which may be the one that closes."""
        if not self.loop.is_closed():
            self.loop.call_soon(operation.finish, error(number))
