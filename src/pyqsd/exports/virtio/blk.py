"""The virtio block device (virtio specification 1.2, section 5.2), as QSD offers it.

`BlkDevice` is what its driver sees of it: features, configuration, requests. `BlkQueue` runs the requests of one queue:
all that are available at once, those that need no waiting within the call, with one update of the used ring and one
notification. Data goes from the guest's memory to the node and back without being copied here.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Coroutine
from typing import Any, Final

from pyqsd.aio import eager
from pyqsd.block.backend import BlockBackend
from pyqsd.block.driver import FUA, MAY_UNMAP
from pyqsd.exports.virtio.virtqueue import BadRing, Virtqueue

F_SIZE_MAX: Final = 1 << 1
F_SEG_MAX: Final = 1 << 2
F_RO: Final = 1 << 5
F_BLK_SIZE: Final = 1 << 6
F_FLUSH: Final = 1 << 9
F_TOPOLOGY: Final = 1 << 10
F_CONFIG_WCE: Final = 1 << 11
F_MQ: Final = 1 << 12
F_DISCARD: Final = 1 << 13
F_WRITE_ZEROES: Final = 1 << 14
F_RING_INDIRECT: Final = 1 << 28
F_RING_EVENT_IDX: Final = 1 << 29
F_VERSION_1: Final = 1 << 32

_T_IN: Final = 0
_T_OUT: Final = 1
_T_FLUSH: Final = 4
_T_GET_ID: Final = 8
_T_DISCARD: Final = 11
_T_WRITE_ZEROES: Final = 13

_OK: Final = 0
_IOERR: Final = 1
_UNSUPP: Final = 2

_HEADER: Final = struct.Struct("<IIQ")
_RANGE: Final = struct.Struct("<QII")
_RANGE_UNMAP: Final = 1

#: capacity, size_max, seg_max, geometry (cylinders, heads, sectors), blk_size, physical_block_exp, alignment_offset,
#: min_io_size, opt_io_size, writeback, unused, num_queues, max_discard_sectors, max_discard_seg,
#: discard_sector_alignment, max_write_zeroes_sectors, max_write_zeroes_seg, write_zeroes_may_unmap, unused
_CONFIG: Final = struct.Struct("<QIIHBBIBBHIBBHIIIIIB3x")
_WRITEBACK_AT: Final = 32
_SEG_MAX: Final = 126
_MOST_SECTORS: Final = 32768
_ID_BYTES: Final = 20
#: Requests that are begun before others have their turn.
_TURN: Final = 256


class BlkDevice:
    """A block device over a node.

    Arguments:
        backend: the use of the node.
        writable: without it the device is read-only.
        writethrough: every write is durable when it is answered, whatever the driver says.
        block_size: the logical block size in bytes.
        queues: how many there are.
        serial: what GET_ID gives, at most 20 bytes of it.
    """

    def __init__(
        self, backend: BlockBackend, *, writable: bool, writethrough: bool, block_size: int, queues: int, serial: bytes
    ) -> None:
        self.backend = backend
        self.writable = writable
        self.block_size = block_size
        self.queues = queues
        self._serial = serial[:_ID_BYTES].ljust(_ID_BYTES, b"\0")
        self._writethrough = writethrough
        #: The driver flushes; else every write is to be durable when it is answered.
        self.writeback = not writethrough

    @property
    def features(self) -> int:
        """The feature bits of the device and its rings."""
        features = F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY | F_CONFIG_WCE | F_MQ
        features |= F_DISCARD | F_WRITE_ZEROES | F_RING_INDIRECT | F_RING_EVENT_IDX | F_VERSION_1
        return features if self.writable else features | F_RO

    def reset(self) -> None:
        """A new driver begins."""
        self.writeback = not self._writethrough

    def config(self) -> bytes:
        """The configuration space."""
        return _CONFIG.pack(
            self.backend.length >> 9,
            0,
            _SEG_MAX,
            0,
            0,
            0,
            self.block_size,
            0,
            0,
            1,
            1,
            self.writeback,
            0,
            self.queues,
            _MOST_SECTORS,
            1,
            self.block_size >> 9,
            _MOST_SECTORS,
            1,
            0,
        )

    def set_config(self, offset: int, data: bytes) -> None:
        """The driver writes to the configuration space. Raises ValueError where it may not."""
        if offset != _WRITEBACK_AT or len(data) != 1:
            raise ValueError(f"the driver writes {len(data)} bytes to offset {offset} of the configuration")
        self.writeback = bool(data[0]) and not self._writethrough

    def identity(self) -> bytes:
        """What GET_ID gives."""
        return self._serial


class BlkQueue:
    """Runs the requests of one queue of `device`.

    Arguments:
        failed: called with what was wrong when the driver has broken the rules; the queue does nothing any more then.
    """

    def __init__(self, device: BlkDevice, queue: Virtqueue, failed: Callable[[str], None]) -> None:
        self._device = device
        self._queue = queue
        self._failed = failed
        self._loop = asyncio.get_running_loop()
        self._running: set[_Request] = set()
        self._idle: asyncio.Event | None = None
        self._publish_scheduled = False
        self._turn_scheduled = False
        #: No further requests are begun (a drain, or the end).
        self.paused = False
        self._broken = False
        #: `process` is at work, and publishes in the end.
        self._busy = False

    @property
    def next_avail(self) -> int:
        """The index of the first request in the available ring that was not taken."""
        return self._queue.next_avail

    def process(self) -> None:
        """Begin all requests that are available."""
        self._turn_scheduled = False
        if self.paused or self._broken:
            return
        queue, left = self._queue, _TURN
        self._busy = True
        try:
            queue.disable_notifications()
            while True:
                count = queue.available()
                if not count:
                    if not queue.enable_notifications():
                        break
                    continue
                for _ in range(min(count, left)):
                    self._begin(*queue.take())
                left -= count
                if left <= 0:
                    self._schedule_turn()
                    break
            queue.publish()
        except BadRing as exc:
            self._broken = True
            self._failed(str(exc))
        finally:
            self._busy = False

    def _schedule_turn(self) -> None:
        if not self._turn_scheduled:
            self._turn_scheduled = True
            self._loop.call_soon(self.process)

    async def stop(self) -> None:
        """Begin nothing more, and wait for what is under way."""
        self.paused = True
        while self._running:
            self._idle = asyncio.Event()
            await self._idle.wait()
        if not self._broken:
            self._queue.publish()

    def abandon(self) -> None:
        """The driver is gone: whatever ends from now on is answered to nobody."""
        self.paused = self._broken = True

    # --- requests ----------------------------------------------------------------------------------------------------

    def _begin(self, head: int, readable: list[memoryview], writable: list[memoryview]) -> None:
        if not writable or not readable:
            raise BadRing("a request without a header, or without room for its status")
        first = readable[0]
        if len(first) == 16:
            kind, _, sector = _HEADER.unpack_from(first)
            data = readable[1:]
        else:
            header, data = _split(readable, 16)
            if len(header) < 16:
                raise BadRing("a request with a part of a header")
            kind, _, sector = _HEADER.unpack(header)
        status = writable.pop()
        if len(status) != 1:
            writable.append(status[:-1])
            status = status[-1:]
        if kind != _T_IN:
            begin = self._BEGINS.get(kind)
            if begin is None:
                self._answer(head, status, _UNSUPP, 1)
            else:
                begin(self, head, status, sector, data, writable)
            return
        length = len(writable[0]) if len(writable) == 1 else sum(map(len, writable))
        device = self._device
        offset = sector << 9
        if not self._in_range(offset, length):
            self._answer(head, status, _IOERR, length + 1)
        elif device.backend.read_now(offset, length, writable):
            status[0] = _OK
            self._queue.answer(head, length + 1)
        else:
            self._run(head, status, length + 1, device.backend.preadv(offset, length, writable))

    def _in_range(self, offset: int, length: int) -> bool:
        # As in QSD, only the beginning has to be that of a block.
        device = self._device
        return not (offset & (device.block_size - 1) or length & 511) and offset + length <= device.backend.length

    def _write(
        self, head: int, status: memoryview, sector: int, data: list[memoryview], writable: list[memoryview]
    ) -> None:
        length = len(data[0]) if len(data) == 1 else sum(map(len, data))
        device = self._device
        offset = sector << 9
        if not device.writable or not self._in_range(offset, length):
            self._answer(head, status, _IOERR, 1)
        elif device.writeback and device.backend.write_now(offset, length, data):
            status[0] = _OK
            self._queue.answer(head, 1)
        else:
            flags = 0 if device.writeback else FUA
            self._run(head, status, 1, device.backend.pwritev(offset, length, data, flags))

    def _flush(
        self, head: int, status: memoryview, sector: int, data: list[memoryview], writable: list[memoryview]
    ) -> None:
        self._run(head, status, 1, self._device.backend.flush())

    def _get_id(
        self, head: int, status: memoryview, sector: int, data: list[memoryview], writable: list[memoryview]
    ) -> None:
        identity = memoryview(self._device.identity())
        for view in writable:
            n = min(len(view), len(identity))
            view[:n] = identity[:n]
            identity = identity[n:]
        self._answer(head, status, _OK, sum(map(len, writable)) + 1)

    def _discard(
        self, head: int, status: memoryview, sector: int, data: list[memoryview], writable: list[memoryview]
    ) -> None:
        found = self._range(head, status, data, 0)
        if found is not None:
            self._run(head, status, 1, self._device.backend.pdiscard(*found[:2]))

    def _write_zeroes(
        self, head: int, status: memoryview, sector: int, data: list[memoryview], writable: list[memoryview]
    ) -> None:
        found = self._range(head, status, data, _RANGE_UNMAP)
        if found is not None:
            offset, length, flags = found
            device = self._device
            request_flags = (MAY_UNMAP if flags & _RANGE_UNMAP else 0) | (0 if device.writeback else FUA)
            self._run(head, status, 1, device.backend.pwrite_zeroes(offset, length, request_flags))

    _BEGINS: Final = {
        _T_OUT: _write,
        _T_FLUSH: _flush,
        _T_GET_ID: _get_id,
        _T_DISCARD: _discard,
        _T_WRITE_ZEROES: _write_zeroes,
    }

    def _range(
        self, head: int, status: memoryview, data: list[memoryview], allowed: int
    ) -> tuple[int, int, int] | None:
        """The one range that a discard or a zero write names: offset and length in bytes, and flags. None if it was
        answered with an error."""
        payload = b"".join(data)
        if not self._device.writable or len(payload) < _RANGE.size:
            self._answer(head, status, _IOERR, 1)
            return None
        sector, count, flags = _RANGE.unpack_from(payload)
        if len(payload) != _RANGE.size or flags & ~allowed:
            self._answer(head, status, _UNSUPP, 1)
        elif count > _MOST_SECTORS or not self._in_range(sector << 9, count << 9):
            self._answer(head, status, _IOERR, 1)
        else:
            return sector << 9, count << 9, flags
        return None

    def _answer(self, head: int, status: memoryview, result: int, written: int) -> None:
        status[0] = result
        self._queue.answer(head, written)

    def _run(self, head: int, status: memoryview, written: int, request: Coroutine[Any, Any, None]) -> None:
        """Run a request that may have to wait."""
        running = _Request(self, head, status, written)
        self._running.add(running)
        running.task = eager.start_io(request, running.finished)

    def finished(self, request: _Request, exc: BaseException | None) -> None:
        """A request that `_run` has begun has ended."""
        self._running.discard(request)
        if not self._broken:
            self._answer(request.head, request.status, _OK if exc is None else _IOERR, request.written)
            if not self._publish_scheduled and not self._busy:
                self._publish_scheduled = True
                self._loop.call_soon(self._publish)
        if not self._running and self._idle is not None:
            self._idle.set()

    def _publish(self) -> None:
        self._publish_scheduled = False
        if not self._broken:
            self._queue.publish()


class _Request:
    """One that waits."""

    __slots__ = ("head", "queue", "status", "task", "written")

    def __init__(self, queue: BlkQueue, head: int, status: memoryview, written: int) -> None:
        self.queue = queue
        self.head = head
        self.status = status
        self.written = written
        #: Nobody else may hold it.
        self.task: eager.Running | None = None

    def finished(self, result: Any, exc: BaseException | None) -> None:
        self.queue.finished(self, exc)


def _split(views: list[memoryview], length: int) -> tuple[bytes, list[memoryview]]:
    """The first `length` bytes (or all that there are), and the rest."""
    head = b""
    rest = []
    for view in views:
        n = min(len(view), length - len(head))
        head += bytes(view[:n])
        if n < len(view):
            rest.append(view[n:])
    return head, rest
