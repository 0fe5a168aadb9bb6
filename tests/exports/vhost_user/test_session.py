"""The vhost-user protocol: connecting, memory, stopping and starting rings, and front-ends that come and go."""

from __future__ import annotations

import mmap
import os
import random
import select
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from pyqsd.exports.virtio.virtqueue import Inflight
from tests.exports.vhost_user import frontend as vu
from tests.exports.vhost_user.conftest import MIB, SIZE, Served
from tests.exports.vhost_user.frontend import GUEST, USER, Frontend
from tests.support.daemon import DaemonProcess, poll

PATTERN = random.Random(9).randbytes(4096)


def works(front: Frontend, ring: int = 0) -> None:
    queue = front.rings[ring]
    assert front.run(queue, vu.T_OUT, 8, PATTERN)[0] == vu.S_OK
    assert front.run(queue, vu.T_IN, 8, length=4096)[1] == PATTERN


def test_a_ring_is_stopped_and_goes_on(served: Served) -> None:
    with served.connect() as front:
        front.start()
        (ring,) = front.rings
        for _ in range(5):
            works(front)
        base = front.stop_ring(ring)
        assert base == ring.next_avail
        head, _, status = front.request(ring, vu.T_OUT, 0, b"z" * 512)
        front.publish(ring, head)
        front.kick(ring)
        assert front.ask_u64(vu.GET_QUEUE_NUM) == 4
        assert front.used(ring) == [] and front.mem[status] == 0xFF
        front.start_ring(ring, base=base)
        front.kick(ring)
        front.wait(ring)
        assert front.mem[status] == vu.S_OK
        works(front)


def test_a_disabled_ring_waits(serve: Callable[..., Served]) -> None:
    served = serve()
    with served.connect() as front:
        front.start()
        (ring,) = front.rings
        front.send(vu.SET_VRING_ENABLE, struct.pack("<II", 0, 0))
        front.ask_u64(vu.GET_QUEUE_NUM)
        head, _, status = front.request(ring, vu.T_FLUSH)
        front.publish(ring, head)
        front.kick(ring)
        front.ask_u64(vu.GET_QUEUE_NUM)
        assert front.mem[status] == 0xFF
        front.send(vu.SET_VRING_ENABLE, struct.pack("<II", 0, 1))
        front.wait(ring)
        assert front.mem[status] == vu.S_OK


def test_one_after_the_other(served: Served) -> None:
    first = served.connect()
    first.start()
    works(first)
    second = served.connect()
    second.send(vu.SET_OWNER)
    second.send(vu.GET_FEATURES)
    works(first)
    assert not select.select([second.sock], [], [], 0)[0]
    first.close()
    second.receive()
    second.start()
    works(second)
    second.close()


def test_memory_that_comes_and_goes(served: Served) -> None:
    """Regions that are added and removed while the ring runs (CONFIGURE_MEM_SLOTS)."""
    with served.connect() as front:
        front.negotiate()
        half = front.size // 2

        def region(guest: int, user: int, offset: int) -> bytes:
            return bytes(8) + struct.pack("<QQQQ", guest, half, user, offset)

        assert front.acked(vu.ADD_MEM_REG, region(GUEST, USER, 0), (front.fd,)) == 0
        front.start_ring(front.add_ring())
        works(front)
        front.data = half + MIB
        second = region(GUEST + half, USER + half, half)
        for _ in range(3):
            assert front.acked(vu.ADD_MEM_REG, second, (front.fd,)) == 0
            works(front)
            assert front.acked(vu.REM_MEM_REG, second) == 0
        # A buffer that goes on from one region to the next.
        assert front.acked(vu.ADD_MEM_REG, second, (front.fd,)) == 0
        front.data = half - 4096 - 512
        works(front)


def test_the_memory_table_may_be_sent_again(served: Served) -> None:
    with served.connect() as front:
        front.start()
        for _ in range(3):
            works(front)
            half = front.size // 2
            front.share_memory([(GUEST, half, USER, 0), (GUEST + half, half, USER + half, half)])
            works(front)
            front.share_memory()


def test_what_is_written_is_logged(serve: Callable[..., Served]) -> None:
    """As for a migration: the pages of buffers and of the used ring."""
    served = serve()
    with served.connect() as front:
        front.negotiate(protocol=0xFFFF, without=1 << 26)
        front.share_memory()
        ring = front.add_ring()
        front.start_ring(ring)
        works(front)
        log_fd = os.memfd_create("log")
        pages = (GUEST + front.size) // 4096
        os.ftruncate(log_fd, pages // 8 + 8)
        log = mmap.mmap(log_fd, pages // 8 + 8)
        assert front.ask(vu.SET_LOG_BASE, struct.pack("<QQ", len(log), 0), (log_fd,)) == bytes(8)
        works(front)
        assert log[:] == bytes(len(log))
        front.send(vu.SET_FEATURES, struct.pack("<Q", front.features | 1 << 26))
        addresses = (USER + ring.desc, USER + ring.used, USER + ring.avail, GUEST + ring.used)
        front.send(vu.SET_VRING_ADDR, struct.pack("<IIQQQQ", 0, 1, *addresses))
        front.ask_u64(vu.GET_QUEUE_NUM)
        front.run(ring, vu.T_IN, 8, length=8192)

        def logged(offset: int) -> bool:
            page = (GUEST + offset) // 4096
            return bool(log[page // 8] >> page % 8 & 1)

        body = front.data + 4096
        assert logged(body) and logged(body + 8191) and logged(front.data + 2048) and logged(ring.used)
        assert not logged(32 * MIB)
        front.send(vu.SET_FEATURES, struct.pack("<Q", front.features & ~(1 << 26)))
        front.ask_u64(vu.GET_QUEUE_NUM)
        log[:] = bytes(len(log))
        works(front)
        assert log[:] == bytes(len(log))
        os.close(log_fd)


def test_the_front_end_learns_of_a_new_size(serve: Callable[..., Served]) -> None:
    served = serve()
    with served.connect() as front:
        front.start(protocol=0xFFFF)
        ours, theirs = socket.socketpair(socket.AF_UNIX)
        ours.settimeout(20)
        assert front.acked(vu.SET_BACKEND_REQ_FD, b"", (theirs.fileno(),)) == 0
        theirs.close()
        assert struct.unpack("<Q", front.config(0, 8))[0] == SIZE // 512
        served.daemon.qmp.execute("block_resize", node_name="disk", size=2 * SIZE)
        assert struct.unpack("<III", ours.recv(64)) == (2, 1, 0)
        assert struct.unpack("<Q", front.config(0, 8))[0] == 2 * SIZE // 512
        (ring,) = front.rings
        assert front.run(ring, vu.T_OUT, 2 * SIZE // 512 - 1, b"e" * 512)[0] == vu.S_OK
        ours.close()


@pytest.mark.parametrize("mode", ["safe", "hard"])
def test_removing_an_export(served: Served, mode: str) -> None:
    """A front-end does not count as a user (as in QSD)."""
    qmp = served.daemon.qmp
    with served.connect() as front:
        front.start()
        works(front)
        qmp.execute("block-export-del", id="e", mode=mode)
        assert front.closed()
        qmp.wait_event("BLOCK_EXPORT_DELETED")
    assert qmp.execute("query-block-exports") == [] and not served.path.exists()


def test_a_drain_holds_requests_back(serve: Callable[..., Served]) -> None:
    """A snapshot under a running front-end: what was written before is in the old layer, the rest in the new one."""
    served = serve()
    qmp = served.daemon.qmp
    with served.connect() as front:
        front.start()
        works(front)
        for i in range(3):
            target = served.workdir / f"layer{i}.qcow2"
            head, _, status = front.request(front.rings[0], vu.T_OUT, 16 * i, bytes([i]) * 4096)
            front.publish(front.rings[0], head)
            front.kick(front.rings[0])
            qmp.execute(
                "blockdev-snapshot-sync",
                node_name=f"layer{i - 1}" if i else "disk",
                snapshot_file=str(target),
                snapshot_node_name=f"layer{i}",
                format="qcow2",
            )
            front.wait(front.rings[0])
            assert front.mem[status] == vu.S_OK
        works(front)
        for i in range(3):
            assert front.run(front.rings[0], vu.T_IN, 16 * i, length=512)[1] in (bytes([i]) * 512, PATTERN[:512])


@pytest.mark.parametrize("seed", range(3))
def test_requests_in_flight_outlive_the_daemon(serve: Callable[..., Served], seed: int) -> None:
    """kill -9 with requests under way, a new daemon, the same inflight area: each request is answered, and done."""
    rng = random.Random(seed)
    served = serve()
    front = served.connect()
    front.negotiate()
    front.share_memory()
    ring = front.add_ring(64)
    front.send(vu.GET_INFLIGHT_FD, struct.pack("<QQHH", 0, 0, 1, ring.size) + bytes(4))
    _, _, area, fds = front.receive()
    assert len(area) == 24 and len(fds) == 1
    front.start_ring(ring)
    model = bytearray(SIZE)
    for round_ in range(6):
        waiting = {}
        for i in range(12):
            sector = rng.randrange(SIZE // 512 // 12) + i * (SIZE // 512 // 12)
            data = rng.randbytes(512)
            head, _, status = front.request(ring, vu.T_OUT, sector, data, at=front.data + i * 8192)
            front.publish(ring, head)
            front.kick(ring)
            waiting[head] = status
            model[sector * 512 : sector * 512 + 512] = data
        for head, _ in front.used(ring):
            del waiting[head]
        served.daemon.kill()
        served.daemon.start()
        # What was answered between the last look and the end is in the used ring as well.
        for head, _ in front.used(ring):
            del waiting[head]
        front.sock.close()
        front.sock = socket.socket(socket.AF_UNIX)
        front.sock.settimeout(20)
        front.sock.connect(str(served.path))
        front.negotiate()
        front.share_memory()
        front.send(vu.SET_INFLIGHT_FD, area, (fds[0],))
        front.start_ring(ring, base=ring.seen_used)
        front.kick(ring)
        for head, _ in front.wait(ring, len(waiting)):
            assert front.mem[waiting.pop(head)] == vu.S_OK, round_
        assert not waiting and sorted(ring.free) == list(range(ring.size))
    assert front.run(ring, vu.T_FLUSH)[0] == vu.S_OK
    assert served.image.read_bytes() == model
    os.close(fds[0])
    front.close()


def test_what_the_inflight_area_says_is_done_again() -> None:
    """By itself: a crash at each point between taking and answering (vhost-user, "Inflight I/O tracking")."""
    size = 8
    view = memoryview(bytearray(Inflight.bytes_for(size)))
    area = Inflight(view, size)
    for head in (5, 2, 7, 0):
        area.taken(head)
    assert Inflight(view, size).recover(0) == [5, 2, 7, 0]
    area.answering([2, 0])
    # It died before the index was written ...
    assert Inflight(memoryview(bytearray(view)), size).recover(0) == [5, 2, 7, 0]
    # ... or after that, and before the entries were cleared ...
    assert Inflight(memoryview(bytearray(view)), size).recover(2) == [5, 7]
    area.answered([2, 0], 2)
    # ... or after all of it.
    assert Inflight(memoryview(bytearray(view)), size).recover(2) == [5, 7]


def test_without_an_area_it_goes_on_after_what_was_used(served: Served) -> None:
    """A front-end that reconnects and says where its ring stands."""
    with served.connect() as front:
        front.start()
        for _ in range(4):
            works(front)
        front.sock.close()
        front.sock = socket.socket(socket.AF_UNIX)
        front.sock.settimeout(20)
        front.sock.connect(str(served.path))
        front.negotiate()
        front.share_memory()
        (ring,) = front.rings
        front.start_ring(ring, base=ring.seen_used)
        works(front)


def test_two_exports_of_one_daemon(serve: Callable[..., Served]) -> None:
    served = serve()
    path = served.workdir / "second.sock"
    address = {"type": "unix", "path": str(path)}
    served.daemon.qmp.execute(
        "block-export-add", type="vhost-user-blk", id="f", node_name="disk", writable=True, addr=address
    )
    with served.connect() as one, Frontend(path) as other:
        one.start()
        other.start()
        for i in range(50):
            data = bytes([i]) * 512
            assert one.run(one.rings[0], vu.T_OUT, i, data)[0] == vu.S_OK
            assert other.run(other.rings[0], vu.T_IN, i, length=512)[1] == data


def test_a_listening_socket_that_is_passed_on(tmp_path: Path) -> None:
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "passed.sock"))
    listening.listen()
    args = [
        "--blockdev",
        "driver=null-co,node-name=n,size=1048576,read-zeroes=on",
        "--export",
        f"type=vhost-user-blk,id=e,node-name=n,addr.type=fd,addr.str={listening.fileno()}",
    ]
    with (
        DaemonProcess("pyqsd", args, workdir=tmp_path, pass_fds=[listening.fileno()]),
        Frontend(tmp_path / "passed.sock") as front,
    ):
        front.start()
        assert front.run(front.rings[0], vu.T_IN, 0, length=512) == (vu.S_OK, bytes(512), 513)
    listening.close()


def test_the_socket_is_gone_with_the_daemon(serve: Callable[..., Served]) -> None:
    served = serve()
    with served.connect() as front:
        front.start()
        works(front)
        assert served.daemon.terminate() == 0
        assert front.closed()
    poll(lambda: not served.path.exists(), "the socket to go")
