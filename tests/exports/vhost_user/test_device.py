"""The virtio block device, as a driver of it sees pyqsd's and QSD's."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable
from typing import Any

import pytest

from tests.exports.vhost_user import frontend as vu
from tests.exports.vhost_user.conftest import MIB, SIZE, Served

SECTORS = SIZE // 512

#: Requests, by what they are for; what both daemons answer is the same.
REQUESTS: dict[str, tuple[int, int, bytes, int]] = {
    "read": (vu.T_IN, 0, b"", 4096),
    "write": (vu.T_OUT, 8, b"x" * 4096, 0),
    "read it": (vu.T_IN, 8, b"", 4096),
    "read nothing": (vu.T_IN, 0, b"", 0),
    "write nothing": (vu.T_OUT, 0, b"", 0),
    "read the last sector": (vu.T_IN, SECTORS - 1, b"", 512),
    "read beyond the end": (vu.T_IN, SECTORS, b"", 512),
    "read over the end": (vu.T_IN, SECTORS - 1, b"", 1024),
    "write over the end": (vu.T_OUT, SECTORS - 1, b"x" * 1024, 0),
    "read at a huge sector": (vu.T_IN, (1 << 64) - 1, b"", 512),
    "read a part of a sector": (vu.T_IN, 0, b"", 100),
    "write a part of a sector": (vu.T_OUT, 0, b"x" * 100, 0),
    "flush": (vu.T_FLUSH, 0, b"", 0),
    "unknown": (99, 0, b"", 0),
    "SCSI": (2, 0, b"", 0),
    "discard": (vu.T_DISCARD, 0, struct.pack("<QII", 0, 8, 0), 0),
    "discard nothing": (vu.T_DISCARD, 0, struct.pack("<QII", 0, 0, 0), 0),
    "discard with a flag": (vu.T_DISCARD, 0, struct.pack("<QII", 0, 8, 1), 0),
    "discard too much": (vu.T_DISCARD, 0, struct.pack("<QII", 0, 32769, 0), 0),
    "discard beyond the end": (vu.T_DISCARD, 0, struct.pack("<QII", SECTORS, 8, 0), 0),
    "discard two ranges": (vu.T_DISCARD, 0, struct.pack("<QII", 0, 8, 0) * 2, 0),
    "discard half a range": (vu.T_DISCARD, 0, b"1234", 0),
    "zero": (vu.T_WRITE_ZEROES, 0, struct.pack("<QII", 8, 4, 0), 0),
    "read the zeroes": (vu.T_IN, 8, b"", 4096),
    "zero and unmap": (vu.T_WRITE_ZEROES, 0, struct.pack("<QII", 8, 8, 1), 0),
    "zero with another flag": (vu.T_WRITE_ZEROES, 0, struct.pack("<QII", 0, 8, 2), 0),
    "zero too much": (vu.T_WRITE_ZEROES, 0, struct.pack("<QII", 0, 32769, 0), 0),
    "zero beyond the end": (vu.T_WRITE_ZEROES, 0, struct.pack("<QII", SECTORS - 1, 2, 0), 0),
    "zero half a range": (vu.T_WRITE_ZEROES, 0, b"1234", 0),
}


def answers(served: Served) -> tuple[dict[str, Any], bytes]:
    with served.connect() as front:
        front.start()
        (ring,) = front.rings
        found = {
            name: front.run(ring, kind, sector, data, length) for name, (kind, sector, data, length) in REQUESTS.items()
        }
        status, identity, written = front.run(ring, vu.T_GET_ID, length=20)
        found["identity"] = (status, identity[:15], written)
        found["offered"] = front.offered
        found["queues"] = front.ask_u64(vu.GET_QUEUE_NUM)
        found["slots"] = front.ask_u64(vu.GET_MAX_MEM_SLOTS)
        config = bytearray(front.config())
        # Whether writes are cached: QSD says no, and caches them.
        config[32] = 0
        found["config"] = bytes(config)
    return found, served.image.read_bytes()


@pytest.mark.parametrize(
    "options",
    ["writable=on", "writable=off", "writable=on,logical-block-size=4096,num-queues=3", "writable=on,writethrough=on"],
)
def test_every_request_is_answered_as_by_qsd(options: str, serve: Callable[..., Served]) -> None:
    ours, our_content = answers(serve("pyqsd", export=options))
    theirs, their_content = answers(serve("qsd", export=options))
    for name, answer in theirs.items():
        assert ours[name] == answer, name
    assert our_content == their_content


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("pieces", [1, 3, 7])
def test_buffers_in_pieces(served: Served, indirect: bool, pieces: int) -> None:
    data = random.Random(pieces).randbytes(7 * 4096)
    with served.connect() as front:
        front.start()
        (ring,) = front.rings
        for at in (0, 64, 4096):
            assert front.run(ring, vu.T_OUT, at, data, pieces=pieces, indirect=indirect)[0] == vu.S_OK
            status, back, written = front.run(ring, vu.T_IN, at, length=len(data), pieces=pieces, indirect=indirect)
            assert (status, written) == (vu.S_OK, len(data) + 1) and back == data


def test_the_header_and_the_status_may_be_anywhere(served: Served) -> None:
    """A device must not rely on how a request is divided (virtio 1.2, section 2.7.4)."""
    with served.connect() as front:
        front.start()
        (ring,) = front.rings
        at = front.data
        # Header and data in one part, and divided in the middle of the header.
        for parts in ([(at, 16 + 512, False)], [(at, 5, False), (at + 5, 11 + 300, False), (at + 316, 212, False)]):
            struct.pack_into("<IIQ", front.mem, at, vu.T_OUT, 0, 7)
            front.view[at + 16 : at + 528] = bytes([len(parts)]) * 512
            front.mem[at + 1024] = 0xFF
            front.publish(ring, front.put(ring, [*parts, (at + 1024, 1, True)]))
            front.kick(ring)
            front.wait(ring)
            assert front.mem[at + 1024] == vu.S_OK
            # The status is the last byte of the part that the data is in.
            struct.pack_into("<IIQ", front.mem, at, vu.T_IN, 0, 7)
            front.mem[at + 4096 + 512] = 0xFF
            front.publish(ring, front.put(ring, [(at, 16, False), (at + 4096, 513, True)]))
            front.kick(ring)
            front.wait(ring)
            assert front.mem[at + 4096 + 512] == vu.S_OK
            assert front.view[at + 4096 : at + 4608] == bytes([len(parts)]) * 512


def test_many_requests_at_once(served: Served) -> None:
    """All of a ring are available before the only notification; each is answered once."""
    with served.connect() as front:
        front.start()
        (ring,) = front.rings
        written = []
        for i in range(ring.size // 3):
            at = front.data + i * 8192
            head, _, status = front.request(ring, vu.T_OUT, 8 * i, bytes([i]) * 4096, at=at)
            written.append((head, status))
        front.publish(ring, *(head for head, _ in written))
        front.kick(ring)
        used = front.wait(ring, len(written))
        assert sorted(head for head, _ in used) == sorted(head for head, _ in written)
        assert all(front.mem[status] == vu.S_OK for _, status in written)
        for i in range(ring.size // 3):
            assert front.run(ring, vu.T_IN, 8 * i, length=4096)[1] == bytes([i]) * 4096


def test_random_requests_in_many_queues(served: Served) -> None:
    """Requests of all kinds, many under way in four queues, against a model; more than an index has bits."""
    rng = random.Random(5)
    model = bytearray(2 * MIB)
    with served.connect() as front:
        front.start(queues=4, size=32)
        for _ in range(40):
            batch = []
            units = rng.sample(range(len(model) // 4096), 20)
            for slot, unit in enumerate(units):
                ring = rng.choice(front.rings)
                kind = rng.choice([vu.T_IN, vu.T_OUT, vu.T_OUT, vu.T_WRITE_ZEROES])
                start, length = unit * 4096, rng.choice([512, 1536, 4096])
                at = front.data + slot * 16384
                data, room = b"", 0
                if kind == vu.T_OUT:
                    data = rng.randbytes(length)
                elif kind == vu.T_IN:
                    room = length
                else:
                    data = struct.pack("<QII", start // 512, length // 512, rng.randrange(2))
                pieces, indirect = rng.choice([1, 1, 2]), rng.random() < 0.5
                request = front.request(ring, kind, start // 512, data, room, at=at, pieces=pieces, indirect=indirect)
                front.publish(ring, request[0])
                batch.append((kind, start, length, data, request))
            for ring in front.rings:
                front.kick(ring)
            for ring in front.rings:
                while len(ring.free) < ring.size:
                    front.wait(ring, 1)
            for kind, start, length, data, (_, body, status) in batch:
                assert front.mem[status] == vu.S_OK
                if kind == vu.T_IN:
                    assert front.view[body : body + length] == model[start : start + length]
                else:
                    model[start : start + length] = data if kind == vu.T_OUT else bytes(length)
        assert front.run(front.rings[0], vu.T_FLUSH)[0] == vu.S_OK
        assert served.image.read_bytes()[: len(model)] == model


@pytest.mark.parametrize("without", [vu.F_EVENT_IDX, vu.F_INDIRECT])
def test_without_a_feature(served: Served, without: int) -> None:
    with served.connect() as front:
        front.start(without=1 << without)
        (ring,) = front.rings
        for i in range(300):
            assert front.run(ring, vu.T_OUT, i, bytes([i & 0xFF]) * 512)[0] == vu.S_OK
        assert front.run(ring, vu.T_IN, 299, length=512)[1] == bytes([299 & 0xFF]) * 512


def test_no_interrupt_is_sent_where_none_is_wanted(serve: Callable[..., Served]) -> None:
    served = serve()
    with served.connect() as front:
        front.start(without=1 << vu.F_EVENT_IDX | 1 << 24)
        (ring,) = front.rings
        front.run(ring, vu.T_FLUSH)
        struct.pack_into("<H", front.mem, ring.avail, 1)
        head, _, status = front.request(ring, vu.T_OUT, 0, b"x" * 512)
        front.publish(ring, head)
        front.kick(ring)
        while not front.used(ring):
            pass
        assert front.mem[status] == vu.S_OK
        # The next answer to a message comes after anything that might have been sent.
        front.ask_u64(vu.GET_QUEUE_NUM)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(ring.call)


def test_write_cache(serve: Callable[..., Served]) -> None:
    """The driver learns whether it must flush, and may do without: every write is durable then."""
    served = serve()
    with served.connect() as front:
        front.start()
        (ring,) = front.rings
        assert front.config(32, 1) == b"\1"
        front.set_config(32, b"\0")
        assert front.config(32, 1) == b"\0"
        assert front.run(ring, vu.T_OUT, 0, b"x" * 512)[0] == vu.S_OK
    with served.connect() as front:
        # A new driver begins anew.
        front.start()
        assert front.config(32, 1) == b"\1"
    served = serve(export="writable=on,writethrough=on")
    with served.connect() as front:
        front.start()
        front.set_config(32, b"\1")
        assert front.config(32, 1) == b"\0"


@pytest.mark.parametrize("data", [b"\1\0", b""])
def test_the_configuration_is_not_the_drivers(served: Served, data: bytes) -> None:
    with served.connect() as front:
        front.start()
        front.set_config(0, data)
        assert front.closed()
    served_again(served)


def served_again(served: Served) -> None:
    """The next front-end is served as ever."""
    with served.connect() as front:
        front.start()
        assert front.run(front.rings[0], vu.T_OUT, 1, b"y" * 512)[0] == vu.S_OK
