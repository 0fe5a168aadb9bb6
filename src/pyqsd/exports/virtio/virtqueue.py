"""Split virtqueues (virtio specification 1.2, section 2.7), from the side of the device.

Nothing here knows of sockets or files: rings and buffers are memory, and whatever is in it may have been put there by
an enemy. `BadRing` says what was wrong; the device is broken then.
"""

from __future__ import annotations

import struct
import sys
import threading
from collections.abc import Callable
from typing import Final

from pyqsd.exports.virtio.memory import BadAddress, GuestMemory

MAX_SIZE: Final = 1024
#: Descriptors of a chain at most (`seg_max`, the header and the status, and something to spare).
MAX_CHAIN: Final = 1024

_DESC: Final = struct.Struct("<QIHH")
_DESC3: Final = struct.Struct("<QIHHQIHHQIHH")
_F_NEXT: Final = 1
_F_WRITE: Final = 2
_F_INDIRECT: Final = 4

#: ``avail.flags``: the driver wants no interrupts; ``used.flags``: the device wants no notifications.
_NO_INTERRUPT: Final = 1
_NO_NOTIFY: Final = 1

_lock = threading.Lock()


def fence() -> None:
    """Order what was written to shared memory before what is read from it next. Taking a lock is the only full memory
    barrier that Python has."""
    _lock.acquire()
    _lock.release()


class BadRing(Exception):
    """The driver has broken the rules of the ring."""


class Inflight:
    """Where a queue notes which requests it has taken and not yet answered, in memory that outlives the daemon
    (vhost-user protocol, "Inflight I/O tracking", split virtqueue)."""

    _HEAD: Final = struct.Struct("<QHHHH")
    _STATE: Final = struct.Struct("<B5xHQ")

    def __init__(self, view: memoryview, size: int) -> None:
        self._view = view
        self._size = size
        self._counter = 0
        _, version, count, _, _ = self._HEAD.unpack_from(view)
        if version == 0:
            self._HEAD.pack_into(view, 0, 0, 1, size, 0, 0)
        elif version != 1 or count != size:
            raise BadRing(f"the inflight area is for {count} descriptors (version {version}), not for {size}")

    @classmethod
    def bytes_for(cls, size: int) -> int:
        """The length of the area of a queue with `size` descriptors."""
        return -(-(cls._HEAD.size + cls._STATE.size * size) // 64) * 64

    def taken(self, head: int) -> None:
        """The chain `head` was taken from the available ring."""
        at = 16 + 16 * head
        struct.pack_into("<Q", self._view, at + 8, self._counter)
        self._counter += 1
        self._view[at] = 1

    def answering(self, heads: list[int]) -> None:
        """These chains are about to be in the used ring: before its index is written."""
        view = self._view
        last = struct.unpack_from("<H", view, 12)[0]
        for head in heads:
            struct.pack_into("<H", view, 16 + 16 * head + 6, last)
            last = head
            struct.pack_into("<H", view, 12, last)

    def answered(self, heads: list[int], used_index: int) -> None:
        """They are, and the index of the used ring is `used_index`."""
        view = self._view
        for head in heads:
            view[16 + 16 * head] = 0
        struct.pack_into("<H", view, 14, used_index)

    def recover(self, used_index: int) -> list[int]:
        """The chains that were taken and not answered by whoever had this area before, in the order in which they were
        taken."""
        view = self._view
        _, _, _, last, noted = self._HEAD.unpack_from(view)
        batch = (used_index - noted) & 0xFFFF
        if batch:
            # It died between writing the index of the used ring and noting that.
            for _ in range(min(batch, self._size)):
                if last >= self._size:
                    raise BadRing(f"the inflight area names descriptor {last} of {self._size}")
                view[16 + 16 * last] = 0
                last = struct.unpack_from("<H", view, 16 + 16 * last + 6)[0]
            struct.pack_into("<H", view, 14, used_index)
        found = []
        for head in range(self._size):
            flag, _, counter = self._STATE.unpack_from(view, 16 + 16 * head)
            if flag:
                found.append((counter, head))
        found.sort()
        self._counter = found[-1][0] + 1 if found else 0
        return [head for _, head in found]


class Virtqueue:
    """One queue that is set up.

    Arguments:
        memory: what descriptors point to.
        size: descriptors; a power of two.
        desc, avail, used: the three parts of the ring.
        next_avail: the index of the first request that was not taken yet.
        event_idx: VIRTIO_F_EVENT_IDX is negotiated.
        notify: tell the driver that something was used.
        used_written: called with offset and length when something of the used ring was written, if it is given.

    Raises BadRing.
    """

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        desc: memoryview,
        avail: memoryview,
        used: memoryview,
        next_avail: int,
        *,
        event_idx: bool,
        notify: Callable[[], None],
        used_written: Callable[[int, int], None] | None = None,
        inflight: Inflight | None = None,
        notify_on_empty: bool = False,
    ) -> None:
        if sys.byteorder != "little":
            raise BadRing("virtio rings are little-endian, this machine is not")
        self.memory = memory
        self.size = size
        self.event_idx = event_idx
        self.next_avail = next_avail
        self.inflight = inflight
        self._mask = size - 1
        self._notify = notify
        self._place(desc, avail, used)
        self._used_written = used_written
        self._notify_on_empty = notify_on_empty
        self._used_index = self._used_head[1]
        self._done: list[int] = []
        #: What is written to for the chains that were taken, where that is to be logged.
        self._to_log: dict[int, list[tuple[int, int]]] = {}
        #: Chains that were taken and not yet answered.
        self.taken = 0
        #: Chains to take again, which somebody else had taken.
        self._again: list[int] = []
        if inflight is not None:
            self._again = inflight.recover(self._used_index)[::-1]
            self.next_avail = (self._used_index + len(self._again)) & 0xFFFF
        self.enable_notifications()

    def _place(self, desc: memoryview, avail: memoryview, used: memoryview) -> None:
        size = self.size
        self._desc = desc
        #: flags, idx, ring[size], used_event
        self._avail = avail.cast("H")
        #: flags, idx
        self._used_head = used[:4].cast("H")
        #: id, len
        self._used_ring = used[4 : 4 + 8 * size].cast("I")
        self._avail_event = used[4 + 8 * size : 6 + 8 * size].cast("H")

    def relocate(
        self,
        memory: GuestMemory,
        desc: memoryview,
        avail: memoryview,
        used: memoryview,
        *,
        used_written: Callable[[int, int], None] | None,
    ) -> None:
        """The same memory is mapped elsewhere, or what is written to it is to be logged, or not any more."""
        self.memory = memory
        self._place(desc, avail, used)
        self._used_written = used_written

    # --- taking ------------------------------------------------------------------------------------------------------

    def disable_notifications(self) -> None:
        """The driver need not notify while its requests are being taken anyway."""
        if not self.event_idx:
            self._used_head[0] = _NO_NOTIFY

    def enable_notifications(self) -> bool:
        """The driver is to notify from now on. True if there is something to take already."""
        if self.event_idx:
            self._avail_event[0] = self.next_avail
        else:
            self._used_head[0] = 0
        fence()
        return self._avail[1] != self.next_avail

    def available(self) -> int:
        """How many chains can be taken. Raises BadRing."""
        count = (self._avail[1] - self.next_avail) & 0xFFFF
        if count + self.taken + len(self._again) > self.size:
            raise BadRing(f"{count} more requests with {self.taken} under way in a ring of {self.size}")
        return count + len(self._again)

    def take(self) -> tuple[int, list[memoryview], list[memoryview]]:
        """The next chain: its head, what the device reads, and what it writes. There is one (`available`). Raises
        BadRing."""
        if self._again:
            head = self._again.pop()
        else:
            next_avail = self.next_avail
            head = self._avail[2 + (next_avail & self._mask)]
            self.next_avail = (next_avail + 1) & 0xFFFF
            if head >= self.size:
                raise BadRing(f"descriptor {head} of {self.size}")
            if self.inflight is not None:
                self.inflight.taken(head)
        self.taken += 1
        table = self._desc
        if self.memory.log is not None:
            return self._walk_logged(head)
        address, length, flags, following = _DESC.unpack_from(table, head << 4)
        # First the usual request, in three parts of which the second is the data. What is anything else, or goes on
        # from one region of the memory to the next, `_walk` finds out.
        memory = self.memory
        try:
            if flags == _F_INDIRECT and length == 48:
                a0, n0, f0, x0, a1, n1, f1, x1, a2, n2, f2, _ = _DESC3.unpack_from(memory.slice(address, 48))
                if f0 == _F_NEXT and x0 == 1 and x1 == 2 and f2 == _F_WRITE and n0 and n1 and n2:
                    first, second, third = memory.three(a0, n0, a1, n1, a2, n2)
                    if f1 == _F_NEXT | _F_WRITE:
                        return head, [first], [second, third]
                    if f1 == _F_NEXT:
                        return head, [first, second], [third]
            elif flags == _F_NEXT and following < self.size and length:
                a1, n1, f1, x1 = _DESC.unpack_from(table, following << 4)
                if f1 & _F_NEXT and x1 < self.size and n1:
                    a2, n2, f2, _ = _DESC.unpack_from(table, x1 << 4)
                    if f2 == _F_WRITE and n2:
                        first, second, third = memory.three(address, length, a1, n1, a2, n2)
                        if f1 == _F_NEXT | _F_WRITE:
                            return head, [first], [second, third]
                        if f1 == _F_NEXT:
                            return head, [first, second], [third]
        except BadAddress:
            pass
        return head, *self._walk(table, self.size, head)

    def _indirect(self, address: int, length: int) -> memoryview:
        if length > 16 * MAX_CHAIN:
            raise BadRing(f"an indirect table of {length} bytes")
        parts = self._slices(address, length)
        return parts[0] if len(parts) == 1 else memoryview(b"".join(parts))

    def _slices(self, address: int, length: int) -> list[memoryview]:
        try:
            return self.memory.slices(address, length)
        except BadAddress as exc:
            raise BadRing(str(exc)) from exc

    def _walk(
        self, table: memoryview, size: int, index: int, written: list[tuple[int, int]] | None = None
    ) -> tuple[list[memoryview], list[memoryview]]:
        """Any chain that begins with descriptor `index` of `table`, which has `size`. What the device may write is
        added to `written`, as addresses and lengths."""
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        for _ in range(min(size, MAX_CHAIN)):
            address, length, flags, following = _DESC.unpack_from(table, index << 4)
            if flags & _F_INDIRECT:
                if table is not self._desc or flags & (_F_NEXT | _F_WRITE) or length & 15 or not length:
                    raise BadRing(f"indirect table of {length} bytes, flags {flags}")
                more_readable, more_writable = self._walk(self._indirect(address, length), length >> 4, 0, written)
                if writable and more_readable:
                    raise BadRing("a part to be read comes after one to be written")
                return readable + more_readable, writable + more_writable
            if not length:
                raise BadRing("an empty descriptor")
            parts = self._slices(address, length)
            if flags & _F_WRITE:
                writable += parts
                if written is not None:
                    written.append((address, length))
            elif writable:
                raise BadRing("a part to be read comes after one to be written")
            else:
                readable += parts
            if not flags & _F_NEXT:
                return readable, writable
            if following >= size:
                raise BadRing(f"descriptor {following} of {size}")
            index = following
        raise BadRing("a chain of descriptors does not end")

    def _walk_logged(self, head: int) -> tuple[int, list[memoryview], list[memoryview]]:
        """The chain `head`, while what is written to the guest's memory is logged."""
        written: list[tuple[int, int]] = []
        readable, writable = self._walk(self._desc, self.size, head, written)
        self._to_log[head] = written
        return head, readable, writable

    # --- answering ---------------------------------------------------------------------------------------------------

    def answer(self, head: int, written: int) -> None:
        """The chain `head` is done, and `written` bytes of it were written. The driver sees that after `publish`."""
        ring = self._used_ring
        slot = ((self._used_index + len(self._done)) & self._mask) << 1
        ring[slot] = head
        ring[slot + 1] = written
        self._done.append(head)
        self.taken -= 1
        if self._to_log:
            log = self.memory.log
            for address, length in self._to_log.pop(head, ()):
                if log is not None:
                    log(address, length)

    def publish(self) -> None:
        """Let the driver see what was answered, and notify it if it wants that."""
        done = self._done
        if not done:
            return
        inflight = self.inflight
        if inflight is not None:
            inflight.answering(done)
        old = self._used_index
        new = (old + len(done)) & 0xFFFF
        fence()
        self._used_head[1] = new
        self._used_index = new
        if inflight is not None:
            inflight.answered(done, new)
        if self._used_written is not None:
            for i in range(len(done)):
                self._used_written(4 + 8 * ((old + i) & self._mask), 8)
            self._used_written(2, 2)
        self._done = []
        fence()
        avail = self._avail
        if self._notify_on_empty and not self.taken and avail[1] == self.next_avail:
            self._notify()
        elif self.event_idx:
            if (new - avail[2 + self.size] - 1) & 0xFFFF < (new - old) & 0xFFFF:
                self._notify()
        elif not avail[0] & _NO_INTERRUPT:
            self._notify()
