"""A vhost-user front-end for tests: guest memory, virtqueues and the protocol, as a virtual machine would have them.

Layout of the guest's memory (one memfd, or two regions of it): for every queue a page-aligned area with descriptor
table, available ring and used ring, then data.
"""

from __future__ import annotations

import array
import mmap
import os
import select
import socket
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GET_FEATURES, SET_FEATURES, SET_OWNER, RESET_OWNER, SET_MEM_TABLE = 1, 2, 3, 4, 5
SET_LOG_BASE, SET_LOG_FD, SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE, GET_VRING_BASE = 6, 7, 8, 9, 10, 11
SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR, GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES = 12, 13, 14, 15, 16
GET_QUEUE_NUM, SET_VRING_ENABLE, SET_BACKEND_REQ_FD, GET_CONFIG, SET_CONFIG = 17, 18, 21, 24, 25
POSTCOPY_ADVISE, GET_INFLIGHT_FD, SET_INFLIGHT_FD = 28, 31, 32
GET_MAX_MEM_SLOTS, ADD_MEM_REG, REM_MEM_REG = 36, 37, 38

REPLY, NEED_REPLY = 4, 8

F_SIZE_MAX, F_SEG_MAX, F_RO, F_BLK_SIZE, F_FLUSH, F_TOPOLOGY, F_CONFIG_WCE, F_MQ = 1, 2, 5, 6, 9, 10, 11, 12
F_DISCARD, F_WRITE_ZEROES, F_INDIRECT, F_EVENT_IDX, F_PROTOCOL, F_VERSION_1 = 13, 14, 28, 29, 30, 32
P_MQ, P_REPLY_ACK, P_BACKEND_REQ, P_CONFIG, P_INFLIGHT, P_MEM_SLOTS = 0, 3, 5, 9, 12, 15

T_IN, T_OUT, T_FLUSH, T_GET_ID, T_DISCARD, T_WRITE_ZEROES = 0, 1, 4, 8, 11, 13
S_OK, S_IOERR, S_UNSUPP = 0, 1, 2

NEXT, WRITE, INDIRECT = 1, 2, 4

#: Where the guest's memory begins in its own address space, and in that of the front-end.
GUEST = 0x100000000
USER = 0x7F0000000000


@dataclass
class Ring:
    """A virtqueue as its driver sees it; addresses are offsets into the memory."""

    index: int
    size: int
    desc: int
    avail: int
    used: int
    kick: int = -1
    call: int = -1
    next_avail: int = 0
    seen_used: int = 0
    free: list[int] = field(default_factory=list)


class Disconnected(Exception):
    """The back-end has closed the connection."""


class Frontend:
    """One connection."""

    def __init__(self, path: str | Path, *, memory: int = 64 << 20, timeout: float = 20, fd: int | None = None) -> None:
        self.fd = os.memfd_create("guest") if fd is None else fd
        if fd is None:
            os.ftruncate(self.fd, memory)
        self.size = memory
        self.mem = mmap.mmap(self.fd, memory)
        self.view = memoryview(self.mem)
        self.data = 1 << 20
        self.rings: list[Ring] = []
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(timeout)
        self.timeout = timeout
        self.sock.connect(str(path))
        self.features = 0
        self.inflight: tuple[int, bytes] | None = None

    # --- messages ----------------------------------------------------------------------------------------------------

    def send(self, request: int, payload: bytes = b"", fds: tuple[int, ...] = (), flags: int = 0) -> None:
        message = struct.pack("<III", request, 1 | flags, len(payload)) + payload
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.sock.sendmsg([message], ancillary)

    def receive(self) -> tuple[int, int, bytes, list[int]]:
        fds: list[int] = []
        data = b""
        while len(data) < 12 or len(data) < 12 + struct.unpack_from("<I", data, 8)[0]:
            want = 12 - len(data) if len(data) < 12 else 12 + struct.unpack_from("<I", data, 8)[0] - len(data)
            part, ancillary, _, _ = self.sock.recvmsg(want, socket.CMSG_SPACE(64))
            for level, kind, payload in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    fds += list(array.array("i", payload[: len(payload) // 4 * 4]))
            if not part:
                raise Disconnected
            data += part
        request, flags, _ = struct.unpack_from("<III", data)
        return request, flags, data[12:], fds

    def ask(self, request: int, payload: bytes = b"", fds: tuple[int, ...] = ()) -> bytes:
        """Send a request that has a reply of its own; the reply's payload."""
        self.send(request, payload, fds)
        got, flags, reply, _ = self.receive()
        assert got == request and flags == 1 | REPLY, (got, flags)
        return reply

    def ask_u64(self, request: int) -> int:
        return int(struct.unpack("<Q", self.ask(request))[0])

    def acked(self, request: int, payload: bytes = b"", fds: tuple[int, ...] = ()) -> int:
        """Send a request and have it acknowledged (REPLY_ACK)."""
        self.send(request, payload, fds, NEED_REPLY)
        got, _, reply, _ = self.receive()
        assert got == request
        return int(struct.unpack("<Q", reply)[0])

    def closed(self) -> bool:
        """Wait until the back-end closes the connection."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionError:
            return True

    # --- set-up ------------------------------------------------------------------------------------------------------

    def negotiate(self, protocol: int | None = None, without: int = 0) -> None:
        self.send(SET_OWNER)
        offered = self.ask_u64(GET_FEATURES)
        self.offered = offered
        self.protocol = self.ask_u64(GET_PROTOCOL_FEATURES)
        wanted = 1 << P_MQ | 1 << P_REPLY_ACK | 1 << P_CONFIG | 1 << P_MEM_SLOTS | 1 << P_INFLIGHT
        chosen = self.protocol & (wanted if protocol is None else protocol)
        self.send(SET_PROTOCOL_FEATURES, struct.pack("<Q", chosen))
        self.features = offered & ~without
        self.send(SET_FEATURES, struct.pack("<Q", self.features))

    def config(self, offset: int = 0, size: int = 60) -> bytes:
        reply = self.ask(GET_CONFIG, struct.pack("<III", offset, size, 0) + bytes(size))
        return reply[12:]

    def set_config(self, offset: int, data: bytes) -> None:
        self.send(SET_CONFIG, struct.pack("<III", offset, len(data), 0) + data)

    def table(self, regions: list[tuple[int, int, int, int]] | None = None) -> tuple[bytes, tuple[int, ...]]:
        regions = regions or [(GUEST, self.size, USER, 0)]
        payload = struct.pack("<II", len(regions), 0) + b"".join(struct.pack("<QQQQ", *region) for region in regions)
        return payload, (self.fd,) * len(regions)

    def share_memory(self, regions: list[tuple[int, int, int, int]] | None = None) -> None:
        self.send(SET_MEM_TABLE, *self.table(regions))

    def add_ring(self, size: int = 256) -> Ring:
        index = len(self.rings)
        base = index * 65536
        ring = Ring(index, size, base, base + 16 * size, base + (16 * size + 6 + 2 * size + 4095) // 4096 * 4096)
        ring.free = list(range(size))
        self.rings.append(ring)
        return ring

    def start_ring(self, ring: Ring, *, base: int = 0) -> None:
        state = struct.Struct("<II")
        if ring.kick < 0:
            ring.kick, ring.call = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)
        self.send(SET_VRING_NUM, state.pack(ring.index, ring.size))
        self.send(SET_VRING_BASE, state.pack(ring.index, base))
        self.send(
            SET_VRING_ADDR,
            struct.pack("<IIQQQQ", ring.index, 0, USER + ring.desc, USER + ring.used, USER + ring.avail, 0),
        )
        self.send(SET_VRING_CALL, struct.pack("<Q", ring.index), (ring.call,))
        self.send(SET_VRING_KICK, struct.pack("<Q", ring.index), (ring.kick,))
        self.send(SET_VRING_ENABLE, state.pack(ring.index, 1))

    def stop_ring(self, ring: Ring) -> int:
        index, base = struct.unpack("<II", self.ask(GET_VRING_BASE, struct.pack("<II", ring.index, 0)))
        assert index == ring.index
        return int(base)

    def start(self, queues: int = 1, size: int = 256, **negotiate: Any) -> None:
        """All of it."""
        self.negotiate(**negotiate)
        self.share_memory()
        for _ in range(queues):
            self.start_ring(self.add_ring(size))

    # --- requests ----------------------------------------------------------------------------------------------------

    def descriptor(self, ring: Ring, index: int, address: int, length: int, flags: int, following: int = 0) -> None:
        struct.pack_into("<QIHH", self.mem, ring.desc + 16 * index, address, length, flags, following)

    def put(self, ring: Ring, parts: list[tuple[int, int, bool]], *, indirect: int | None = None) -> int:
        """Make a chain of ``(offset into the memory, length, writable by the device)``; its head. `indirect`: where in
        the memory its table goes."""
        if indirect is not None:
            for i, (at, length, writable) in enumerate(parts):
                last = i == len(parts) - 1
                flags = (WRITE if writable else 0) | (0 if last else NEXT)
                struct.pack_into("<QIHH", self.mem, indirect + 16 * i, GUEST + at, length, flags, 0 if last else i + 1)
            head = ring.free.pop()
            self.descriptor(ring, head, GUEST + indirect, 16 * len(parts), INDIRECT)
            return head
        indices = [ring.free.pop() for _ in parts]
        for i, (at, length, writable) in enumerate(parts):
            last = i == len(parts) - 1
            flags = (WRITE if writable else 0) | (0 if last else NEXT)
            self.descriptor(ring, indices[i], GUEST + at, length, flags, 0 if last else indices[i + 1])
        return indices[0]

    def publish(self, ring: Ring, *heads: int) -> None:
        """Make chains available."""
        for head in heads:
            struct.pack_into("<H", self.mem, ring.avail + 4 + 2 * (ring.next_avail % ring.size), head)
            ring.next_avail = (ring.next_avail + 1) & 0xFFFF
        struct.pack_into("<H", self.mem, ring.avail + 2, ring.next_avail)

    def kick(self, ring: Ring) -> None:
        os.eventfd_write(ring.kick, 1)

    def used(self, ring: Ring) -> list[tuple[int, int]]:
        """What was used since the last call, as ``(head, bytes written)``; the descriptors are free again."""
        index = struct.unpack_from("<H", self.mem, ring.used + 2)[0]
        found = []
        while ring.seen_used != index:
            head, length = struct.unpack_from("<II", self.mem, ring.used + 4 + 8 * (ring.seen_used % ring.size))
            found.append((head, length))
            ring.seen_used = (ring.seen_used + 1) & 0xFFFF
            while True:
                _, _, flags, following = struct.unpack_from("<QIHH", self.mem, ring.desc + 16 * head)
                ring.free.append(head)
                if not flags & NEXT:
                    break
                head = following
        if self.features >> F_EVENT_IDX & 1:
            struct.pack_into("<H", self.mem, ring.avail + 4 + 2 * ring.size, ring.seen_used)
        return found

    def wait(self, ring: Ring, count: int = 1) -> list[tuple[int, int]]:
        """Wait until `count` chains are used."""
        found = self.used(ring)
        while len(found) < count:
            ready, _, _ = select.select([ring.call, self.sock], [], [], self.timeout)
            if ring.call not in ready:
                more = self.used(ring)
                if ready and not more:
                    raise Disconnected
                if not ready and not more:
                    raise TimeoutError(f"{len(found)} of {count} requests were answered")
                found += more
                continue
            os.eventfd_read(ring.call)
            found += self.used(ring)
        return found

    def request(
        self,
        ring: Ring,
        kind: int,
        sector: int = 0,
        data: bytes = b"",
        length: int = 0,
        *,
        at: int | None = None,
        pieces: int = 1,
        indirect: bool = False,
    ) -> tuple[int, int, int]:
        """Make a request's chain; ``(head, where its data is, where its status is)``."""
        at = self.data if at is None else at
        size = len(data) or length
        body = at + 4096
        struct.pack_into("<IIQ", self.mem, at, kind, 0, sector)
        if data:
            self.view[body : body + size] = data
        status = at + 2048
        self.mem[status] = 0xFF
        parts: list[tuple[int, int, bool]] = [(at, 16, False)]
        step = -(-size // pieces) if size else 0
        parts += [(body + i, min(step, size - i), not data) for i in range(0, size, step or 1)]
        parts.append((status, 1, True))
        return self.put(ring, parts, indirect=at + 2560 if indirect else None), body, status

    def run(self, ring: Ring, kind: int, sector: int = 0, data: bytes = b"", length: int = 0, **more: Any) -> Any:
        """One request; ``(status, data read, bytes written by the device)``."""
        head, body, status = self.request(ring, kind, sector, data, length, **more)
        self.publish(ring, head)
        self.kick(ring)
        ((used_head, written),) = self.wait(ring)
        assert used_head == head
        return self.mem[status], bytes(self.view[body : body + length]), written

    def close(self) -> None:
        self.sock.close()
        for ring in self.rings:
            for fd in (ring.kick, ring.call):
                if fd >= 0:
                    os.close(fd)
        self.rings.clear()
        self.view.release()
        self.mem.close()
        os.close(self.fd)

    def __enter__(self) -> Frontend:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
