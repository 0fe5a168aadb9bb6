"""Front-ends and drivers that break the rules lose their device; the daemon and the next front-end do not mind."""

from __future__ import annotations

import os
import random
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyqsd.exports.vhost_user import protocol
from pyqsd.exports.vhost_user.protocol import ProtocolError
from pyqsd.exports.virtio.memory import BadAddress, GuestMemory, Region
from pyqsd.exports.virtio.virtqueue import BadRing, Inflight, Virtqueue
from tests.exports.vhost_user import frontend as vu
from tests.exports.vhost_user.conftest import Served
from tests.exports.vhost_user.frontend import GUEST, USER, Disconnected, Frontend, Ring
from tests.support.daemon import poll


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One daemon for all of them; in the end it still serves, has no file descriptors too many, and ends cleanly."""
    served = Served(tmp_path_factory.mktemp("hostile"), export="writable=on,num-queues=2")
    with served.daemon:
        well(served)
        count = served.daemon.fd_count()
        yield served
        well(served)
        # One more for the rings of io_uring, which come with the first request that waits. Memory is given back with
        # the connection, not when the garbage is collected.
        poll(lambda: served.daemon.fd_count() <= count + 2, "files to be closed")


def well(served: Served) -> None:
    with served.connect() as front:
        front.start()
        assert front.run(front.rings[0], vu.T_OUT, 3, b"w" * 512)[0] == vu.S_OK
        assert front.run(front.rings[0], vu.T_IN, 3, length=512)[1] == b"w" * 512


def lost(front: Frontend) -> None:
    """The connection is closed, and not by a timeout."""
    while True:
        try:
            if not front.sock.recv(4096):
                return
        except ConnectionError:
            return


U64 = struct.Struct("<Q")
STATE = struct.Struct("<II")
ADDR = struct.Struct("<IIQQQQ")

#: Messages that end the connection at once, sent after a good start.
MESSAGES: dict[str, tuple[int, bytes]] = {
    "unknown": (99, b""),
    "zero": (0, b""),
    "postcopy": (vu.POSTCOPY_ADVISE, b""),
    "features not offered": (vu.SET_FEATURES, U64.pack(1 << 63)),
    "protocol features not offered": (vu.SET_PROTOCOL_FEATURES, U64.pack(1 << 8)),
    "short features": (vu.SET_FEATURES, b"1234"),
    "memory table without file descriptors": (vu.SET_MEM_TABLE, STATE.pack(1, 0) + struct.pack("<QQQQ", 0, 4096, 0, 0)),
    "memory table that is cut off": (vu.SET_MEM_TABLE, STATE.pack(8, 0)),
    "memory table of very many": (vu.SET_MEM_TABLE, STATE.pack(1 << 31, 0)),
    "memory region of nothing known": (vu.REM_MEM_REG, bytes(8) + struct.pack("<QQQQ", 5, 4096, 5, 0)),
    "ring beyond the last": (vu.SET_VRING_NUM, STATE.pack(2, 256)),
    "ring of nothing": (vu.SET_VRING_NUM, STATE.pack(1, 0)),
    "ring of no power of two": (vu.SET_VRING_NUM, STATE.pack(1, 100)),
    "ring that is too large": (vu.SET_VRING_NUM, STATE.pack(1, 1 << 16)),
    "ring that runs is sized": (vu.SET_VRING_NUM, STATE.pack(0, 128)),
    "ring that runs is moved": (vu.SET_VRING_ADDR, ADDR.pack(0, 0, USER + 65536, USER, USER, 0)),
    "ring that runs is set back": (vu.SET_VRING_BASE, STATE.pack(0, 7)),
    "ring off its alignment": (vu.SET_VRING_ADDR, ADDR.pack(1, 0, USER + 1, USER, USER, 0)),
    "kick without a file descriptor": (vu.SET_VRING_KICK, U64.pack(1)),
    "kick by polling": (vu.SET_VRING_KICK, U64.pack(1 | 1 << 8)),
    "call of a ring beyond the last": (vu.SET_VRING_CALL, U64.pack(77)),
    "configuration that is cut off": (vu.GET_CONFIG, struct.pack("<III", 0, 60, 0)),
    "configuration that is read-only": (vu.SET_CONFIG, struct.pack("<III", 0, 8, 0) + bytes(8)),
    "inflight area of no queues": (vu.GET_INFLIGHT_FD, struct.pack("<QQHH", 0, 0, 0, 128) + bytes(4)),
    "inflight area of too many": (vu.GET_INFLIGHT_FD, struct.pack("<QQHH", 0, 0, 3, 128) + bytes(4)),
    "inflight area without a file": (vu.SET_INFLIGHT_FD, struct.pack("<QQHH", 4096, 0, 1, 128) + bytes(4)),
    "log without a file": (vu.SET_LOG_BASE, struct.pack("<QQ", 4096, 0)),
    "a channel that is none": (vu.SET_BACKEND_REQ_FD, b""),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_message(name: str, served: Served) -> None:
    with served.connect() as front:
        front.start()
        front.send(*MESSAGES[name])
        lost(front)


@pytest.mark.parametrize("name", ["ring of nothing", "memory table that is cut off", "unknown"])
def test_a_refusal_can_be_asked_for(name: str, served: Served) -> None:
    """With REPLY_ACK the front-end learns that it was refused, and may go on."""
    with served.connect() as front:
        front.start()
        assert front.acked(*MESSAGES[name]) == 1
        assert front.run(front.rings[0], vu.T_FLUSH)[0] == vu.S_OK


@pytest.mark.parametrize(
    "data", [b"\0" * 12, b"\1\0\0\0\2\0\0\0\0\0\0\0", struct.pack("<III", 1, 1, 1 << 30), b"GET / HTTP"]
)
def test_no_message_at_all(data: bytes, served: Served) -> None:
    with served.connect() as front:
        front.sock.sendall(data)
        front.sock.shutdown(socket.SHUT_WR)
        lost(front)


def test_files_that_are_no_memory(served: Served, tmp_path: Path) -> None:
    short = os.open(tmp_path / "short", os.O_RDWR | os.O_CREAT)
    null = os.open("/dev/null", os.O_RDWR)
    for fd, size, offset in ((short, 4096, 0), (null, 4096, 0), (short, 1 << 62, 0), (short, 4096, 1 << 62)):
        with served.connect() as front:
            front.negotiate()
            front.send(vu.SET_MEM_TABLE, STATE.pack(1, 0) + struct.pack("<QQQQ", GUEST, size, USER, offset), (fd,))
            lost(front)
    with served.connect() as front:
        front.negotiate()
        front.send(vu.SET_MEM_TABLE, *front.table([(GUEST, 8192, USER, 0), (GUEST + 4096, 8192, USER + 65536, 0)]))
        lost(front)
    with served.connect() as front:
        front.start()
        front.send(vu.SET_VRING_CALL, U64.pack(0), (short, null, short))
        lost(front)
    with served.connect() as front:
        # Nothing can be waited for in a plain file.
        front.negotiate()
        front.share_memory()
        ring = front.add_ring()
        front.start_ring(ring)
        front.stop_ring(ring)
        front.send(vu.SET_VRING_KICK, U64.pack(0), (short,))
        lost(front)
    os.close(short)
    os.close(null)


def put(front: Frontend, ring: Ring, head: int = 0) -> None:
    front.publish(ring, head)
    front.kick(ring)


def bad_head(front: Frontend, ring: Ring) -> None:
    put(front, ring, ring.size)


def bad_next(front: Frontend, ring: Ring) -> None:
    front.descriptor(ring, 0, GUEST, 16, vu.NEXT, ring.size)
    put(front, ring)


def loop(front: Frontend, ring: Ring) -> None:
    front.descriptor(ring, 0, GUEST, 16, vu.NEXT, 1)
    front.descriptor(ring, 1, GUEST, 16, vu.NEXT, 0)
    put(front, ring)


def bad_address(front: Frontend, ring: Ring) -> None:
    front.descriptor(ring, 0, GUEST + front.size - 8, 16, vu.NEXT, 1)
    front.descriptor(ring, 1, GUEST, 1, vu.WRITE)
    put(front, ring)


def address_that_wraps(front: Frontend, ring: Ring) -> None:
    front.descriptor(ring, 0, (1 << 64) - 8, 16, vu.NEXT, 1)
    front.descriptor(ring, 1, GUEST, 1, vu.WRITE)
    put(front, ring)


def huge_length(front: Frontend, ring: Ring) -> None:
    front.descriptor(ring, 0, GUEST, 0xFFFFFFFF, vu.NEXT, 1)
    front.descriptor(ring, 1, GUEST, 1, vu.WRITE)
    put(front, ring)


def empty_descriptor(front: Frontend, ring: Ring) -> None:
    front.descriptor(ring, 0, GUEST, 0, vu.NEXT, 1)
    front.descriptor(ring, 1, GUEST, 1, vu.WRITE)
    put(front, ring)


def no_status(front: Frontend, ring: Ring) -> None:
    front.descriptor(ring, 0, GUEST, 16, 0)
    put(front, ring)


def no_header(front: Frontend, ring: Ring) -> None:
    front.descriptor(ring, 0, GUEST, 16, vu.WRITE)
    put(front, ring)


def short_header(front: Frontend, ring: Ring) -> None:
    front.descriptor(ring, 0, GUEST, 8, vu.NEXT, 1)
    front.descriptor(ring, 1, GUEST, 1, vu.WRITE)
    put(front, ring)


def read_after_write(front: Frontend, ring: Ring) -> None:
    front.descriptor(ring, 0, GUEST, 16, vu.WRITE | vu.NEXT, 1)
    front.descriptor(ring, 1, GUEST, 16, 0)
    put(front, ring)


def indirect_of_no_length(front: Frontend, ring: Ring) -> None:
    front.descriptor(ring, 0, GUEST, 0, vu.INDIRECT)
    put(front, ring)


def indirect_of_odd_length(front: Frontend, ring: Ring) -> None:
    front.descriptor(ring, 0, GUEST, 20, vu.INDIRECT)
    put(front, ring)


def indirect_outside(front: Frontend, ring: Ring) -> None:
    front.descriptor(ring, 0, 0, 48, vu.INDIRECT)
    put(front, ring)


def indirect_in_indirect(front: Frontend, ring: Ring) -> None:
    struct.pack_into("<QIHH", front.mem, front.data, GUEST + front.data, 48, vu.INDIRECT, 0)
    front.descriptor(ring, 0, GUEST + front.data, 48, vu.INDIRECT)
    put(front, ring)


def huge_indirect(front: Frontend, ring: Ring) -> None:
    front.descriptor(ring, 0, GUEST, 16 << 20, vu.INDIRECT)
    put(front, ring)


def more_than_the_ring_has(front: Frontend, ring: Ring) -> None:
    struct.pack_into("<H", front.mem, ring.avail + 2, ring.size + 1)
    front.kick(ring)


RINGS = [
    bad_head,
    bad_next,
    loop,
    bad_address,
    address_that_wraps,
    huge_length,
    empty_descriptor,
    no_status,
    no_header,
    short_header,
    read_after_write,
    indirect_of_no_length,
    indirect_of_odd_length,
    indirect_outside,
    indirect_in_indirect,
    huge_indirect,
    more_than_the_ring_has,
]


@pytest.mark.parametrize("what", RINGS, ids=lambda what: what.__name__)
def test_ring(what: Callable[[Frontend, Ring], None], served: Served) -> None:
    with served.connect() as front:
        front.start(queues=2)
        what(front, front.rings[0])
        lost(front)
        assert "export 'e': the vhost-user front-end is disconnected: ring 0: " in served.daemon.stderr


def test_random_messages(served: Served) -> None:
    rng = random.Random(11)
    for _ in range(60):
        with served.connect() as front:
            front.start(queues=2)
            for _ in range(rng.randrange(1, 8)):
                request = rng.choice([*range(1, 40), 99])
                size = rng.choice([0, 4, 8, 12, 16, 24, 40, 72, 264])
                payload = bytes(rng.choice([0, 0, 0, 1, 2, 255, rng.randrange(256)]) for _ in range(size))
                try:
                    front.send(request, payload, rng.choice([(), (), (front.fd,)]), rng.choice([0, 8]))
                except OSError:
                    break


def test_random_rings(served: Served) -> None:
    """Random bytes where descriptors and the available ring are."""
    rng = random.Random(12)
    for _ in range(60):
        with served.connect() as front:
            front.start(queues=2)
            ring = front.rings[0]
            for _ in range(20):
                at = rng.choice([ring.desc + rng.randrange(64), ring.avail + 2 + rng.randrange(16), front.data])
                front.mem[at] = rng.randrange(256)
                if rng.random() < 0.5:
                    front.descriptor(
                        ring,
                        rng.randrange(4),
                        GUEST + rng.choice([0, front.data, front.size - 16, 1 << 40]),
                        rng.choice([0, 1, 16, 48, 512, 1 << 31]),
                        rng.randrange(8),
                        rng.randrange(5),
                    )
                if rng.random() < 0.5:
                    front.kick(ring)


# --- the decoders by themselves --------------------------------------------------------------------------------


def test_decoders_raise_nothing_else() -> None:
    rng = random.Random(13)
    decoders = [
        protocol.u64,
        protocol.state,
        protocol.addresses,
        protocol.regions,
        protocol.region,
        protocol.inflight,
        protocol.config,
        protocol.log_area,
    ]
    for _ in range(3000):
        payload = rng.randbytes(rng.choice([0, 1, 4, 8, 12, 16, 20, 24, 40, 72, rng.randrange(300)]))
        for decode in decoders:
            try:
                decode(payload)  # type: ignore[operator]
            except ProtocolError:
                pass
        try:
            protocol.decode_header(rng.randbytes(12))
        except ProtocolError:
            pass


def test_queues_raise_nothing_else() -> None:
    """A queue whose every byte is random, also the tables that descriptors point to."""
    rng = random.Random(14)
    for _ in range(2000):
        size = rng.choice([1, 2, 8, 16])
        block = bytearray(rng.choice([rng.randbytes(4096), bytes(4096)]))
        view = memoryview(block)
        memory = GuestMemory([Region(0, view[:2048]), Region(2048, view[2048:])])
        for _ in range(size):
            address = rng.choice([rng.randrange(4096), rng.getrandbits(64)])
            where = 16 * rng.randrange(size)
            struct.pack_into(
                "<QIHH", block, where, address, rng.choice([16, 32, 48, 513]), rng.randrange(8), rng.randrange(size + 1)
            )
        struct.pack_into("<HH", block, 1024, 0, rng.choice([1, size, rng.randrange(65536)]))
        queue = Virtqueue(
            memory,
            size,
            view[:1024],
            view[1024 : 1024 + 6 + 2 * size],
            view[1536 : 1536 + 6 + 8 * size],
            0,
            event_idx=rng.random() < 0.5,
            notify=lambda: None,
        )
        try:
            for _ in range(queue.available()):
                head, readable, writable = queue.take()
                for part in [*readable, *writable]:
                    assert 0 < len(part) <= 4096
                queue.answer(head, 0)
            queue.publish()
        except BadRing:
            pass


def test_inflight_areas_raise_nothing_else() -> None:
    rng = random.Random(15)
    for _ in range(2000):
        size = rng.choice([1, 4, 64])
        view = memoryview(bytearray(rng.randbytes(Inflight.bytes_for(size))))
        if rng.random() < 0.7:
            struct.pack_into("<QHHHH", view, 0, 0, 1, size, rng.randrange(size + 1), rng.randrange(65536))
        try:
            found = Inflight(view, size).recover(rng.randrange(65536))
        except BadRing:
            continue
        assert all(0 <= head < size for head in found) and len(found) == len(set(found))


def test_memory() -> None:
    memory = GuestMemory([Region(100, memoryview(bytearray(50))), Region(150, memoryview(bytearray(50)))])
    assert len(memory.slice(100, 50)) == 50 and len(memory.slice(199, 1)) == 1
    assert [len(part) for part in memory.slices(140, 20)] == [10, 10]
    for address, length in ((99, 1), (200, 1), (149, 2), (0, 0), (100, -1)):
        with pytest.raises(BadAddress):
            memory.slice(address, length)
    for address, length in ((99, 2), (190, 11), (1 << 64, 1)):
        with pytest.raises(BadAddress):
            memory.slices(address, length)


def test_a_front_end_that_dies_with_requests_under_way(served: Served) -> None:
    for _ in range(20):
        front = served.connect()
        front.start()
        (ring,) = front.rings
        for i in range(40):
            front.publish(ring, front.request(ring, vu.T_OUT, i, bytes(4096), at=front.data + 8192 * i)[0])
        front.kick(ring)
        front.close()
    with pytest.raises((Disconnected, OSError)), served.connect() as front:
        front.start()
        front.sock.shutdown(socket.SHUT_RDWR)
        front.ask_u64(vu.GET_QUEUE_NUM)
