"""The NBD server as a server: listening, limits, ends of all kinds, slow and hostile clients."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyqsd.exports.nbd.connection import Connection
from pyqsd.qapi.errors import Error
from tests.block.memory_driver import Aligned, Memory
from tests.exports import rawnbd as raw
from tests.exports.rawnbd import RawClient
from tests.exports.service import Service

MiB = 1 << 20


def poll(condition: Callable[[], Any], what: str, timeout: float = 20.0) -> Any:
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.002)
    return value


@pytest.fixture
def disk(service: Service) -> Service:
    """A running server with one writable export of a raw file, ``disk``."""
    service.start()
    service.image("disk", 4 * MiB, data={MiB: b"a" * 65536})
    service.export("disk", writable=True)
    return service


@pytest.fixture
def memory(service: Service) -> Iterator[tuple[Service, Memory]]:
    """The same with a driver whose requests all have to wait, and stay in flight while its `gate` is closed."""
    service.start()
    driver = service.memory("mem")
    service.export("mem", writable=True)
    yield service, driver
    if driver.gate is not None:
        service.call(driver.gate.set)


def connections(service: Service) -> set[Connection]:
    return service.server._connections


# --- where it listens ---


def test_unix_socket_comes_and_goes(service: Service) -> None:
    # What another program has left behind goes; anything else may be somebody's data, and stays.
    Path(service.path).write_text("in the way")
    with pytest.raises(Error, match=r"Failed to unlink socket .*: it is not a socket"):
        service.start()
    assert Path(service.path).read_text() == "in the way"
    os.unlink(service.path)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(service.path)
    service.start()
    assert RawClient(service.path).greet()[2] == 3
    with pytest.raises(Error, match="NBD server already running"):
        service.start()
    service.must("nbd-server-stop")
    assert not os.path.exists(service.path)
    assert service.qmp("nbd-server-stop")["error"]["desc"] == "NBD server not running"
    service.start()
    assert os.path.exists(service.path)


def test_relative_path_is_removed_after_chdir(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(service.directory)
    service.start({"type": "unix", "path": "relative.sock"})
    monkeypatch.chdir("/")
    service.must("nbd-server-stop")
    assert not (service.directory / "relative.sock").exists()


def test_abstract_socket(service: Service) -> None:
    name = f"pyqsd-test-{os.getpid()}"
    service.start({"type": "unix", "path": name, "abstract": True})
    assert RawClient("\0" + name).greet()[2] == 3
    service.must("nbd-server-stop")
    service.start({"type": "unix", "path": name, "abstract": True, "tight": False})
    assert RawClient(("\0" + name).ljust(108, "\0")).greet()[2] == 3


@pytest.mark.parametrize(
    ("host", "members", "families"),
    [
        ("127.0.0.1", {}, {socket.AF_INET}),
        ("::1", {}, {socket.AF_INET6}),
        ("", {}, {socket.AF_INET, socket.AF_INET6}),
        ("", {"ipv4": True}, {socket.AF_INET}),
        ("", {"ipv4": False}, {socket.AF_INET6}),
        ("", {"ipv6": True}, {socket.AF_INET6}),
        ("", {"ipv4": True, "ipv6": True}, {socket.AF_INET6}),
        ("127.0.0.1", {"numeric": True, "keep-alive": True}, {socket.AF_INET}),
    ],
)
def test_inet(service: Service, host: str, members: dict[str, Any], families: set[int]) -> None:
    service.start({"type": "inet", "host": host, "port": "0", **members})
    sockets = service.server._sockets()
    assert {sock.family for sock in sockets} == families
    for sock in sockets:
        port = sock.getsockname()[1]
        client = RawClient(("::1" if sock.family == socket.AF_INET6 else "127.0.0.1", port))
        assert client.greet()[2] == 3
        if members.get("ipv4") and members.get("ipv6"):
            assert RawClient(("127.0.0.1", port)).greet()[2] == 3
        assert bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)) == ("keep-alive" in members)


def test_first_free_port(service: Service) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        address = {"type": "inet", "host": "127.0.0.1", "port": str(port)}
        with pytest.raises(Error, match="Failed to find an available port: Address already in use"):
            service.start(address)
        service.start({**address, "to": min(port + 20, 65535)})
        assert service.server._sockets()[0].getsockname()[1] > port


def test_inherited_socket(disk: Service) -> None:
    disk.must("nbd-server-stop")
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    address = listening.getsockname()
    disk.start({"type": "fd", "str": str(listening.detach())})
    assert RawClient(address).greet()[2] == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x", "Unable to parse FD number x"),
        ("", "Unable to parse FD number "),
        ("-1", "File descriptor '-1' is not a socket"),
        ("999999", "File descriptor '999999' is not a socket"),
    ],
)
def test_wrong_file_descriptors(service: Service, text: str, message: str) -> None:
    with pytest.raises(Error) as caught:
        service.start({"type": "fd", "str": text})
    assert caught.value.desc == message
    with pytest.raises(Error, match="NBD server not running"):
        service.server.check_running()


def test_file_descriptor_that_cannot_listen(service: Service) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        with pytest.raises(Error, match="Failed to listen on fd socket: Operation not supported"):
            service.start({"type": "fd", "str": str(datagrams.fileno())})
        datagrams.getsockname()


def test_tls_needs_credentials(service: Service) -> None:
    with pytest.raises(Error, match="No TLS credentials with id 'tls0'"):
        service.start(tls_creds="tls0")
    assert not os.path.exists(service.path)
    service.start()


# --- limits ---


def test_max_connections(disk: Service) -> None:
    disk.must("nbd-server-stop")
    disk.start(max_connections=2)
    disk.export("disk", writable=True)
    first, second = disk.client("disk"), disk.client("disk")
    third = RawClient(disk.path, timeout=0.2)
    with pytest.raises(TimeoutError):
        third.recv(1)
    assert second.read(MiB, 4) == b"aaaa"
    first.close()
    third.sock.settimeout(10)
    assert third.go("disk") == 4 * MiB


def test_one_connection_is_no_multi_conn(service: Service) -> None:
    service.start(max_connections=1)
    service.image("disk", MiB)
    service.export("disk")
    client = service.client("disk")
    assert not client.flags & 0x100


def test_handshake_timeout(disk: Service) -> None:
    disk.must("nbd-server-stop")
    disk.start(handshake_max_seconds=1)
    disk.export("disk")
    served = disk.client("disk")
    silent, talker = RawClient(disk.path), RawClient(disk.path)
    begin = time.monotonic()
    talker.greet()
    assert talker.option(raw.OPT_LIST)[-1][0] == raw.REP_ACK
    assert silent.recv(18) and silent.at_eof() and talker.at_eof()
    assert 0.5 < time.monotonic() - begin < 10
    assert served.read(MiB, 2) == b"aa"
    poll(lambda: len(connections(disk)) == 1, "the others to be forgotten")


def test_without_resources_accepting_pauses(disk: Service) -> None:
    """EMFILE: no busy loop, and clients are served when there are file descriptors again."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    client = socket.socket(socket.AF_UNIX)
    in_use = max(int(name) for name in os.listdir("/proc/self/fd"))
    fillers = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 8, limits[1]))
    try:
        try:
            while True:
                fillers.append(os.dup(0))
        except OSError as exc:
            assert exc.errno == errno.EMFILE
        client.connect(disk.path)
        poll(lambda: disk.server._retry is not None, "the pause")
        assert not disk.server._accepting
    finally:
        for fd in fillers:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert RawClient(client).go("disk") == 4 * MiB


def test_hold(service: Service) -> None:
    service.call(service.server.hold)
    service.start()
    service.image("disk", MiB)
    client = RawClient(service.path, timeout=0.1)
    with pytest.raises(TimeoutError):
        client.recv(1)
    service.export("disk")
    service.call(service.server.release)
    client.sock.settimeout(10)
    assert client.go("disk") == MiB


# --- exports come and go ---


def test_export_in_use(disk: Service) -> None:
    client = disk.client("disk")
    reply = disk.qmp("block-export-del", {"id": "disk"})
    assert reply["error"]["desc"] == "export 'disk' still in use"
    assert client.read(MiB, 2) == b"aa"
    client.request(raw.DISC)
    assert client.at_eof()
    poll(lambda: not disk.call(disk.exports.find("disk").in_use), "the client to be forgotten")  # type: ignore[union-attr]
    disk.must("block-export-del", {"id": "disk"})
    assert [event["data"] for event in disk.events] == [{"id": "disk"}]
    assert disk.must("query-block-exports") == []
    assert disk.server.exports == {}


def test_hard_removal_waits_for_what_is_in_flight(memory: tuple[Service, Memory]) -> None:
    service, driver = memory
    driver.gate = service.call(asyncio.Event)
    client = service.client("mem")
    client.request(raw.WRITE, 0, 4, b"abcd")
    poll(lambda: driver.log, "the write to arrive")
    service.must("block-export-del", {"id": "mem", "mode": "hard"})
    assert client.at_eof()
    assert service.must("query-block-exports")[0]["shutting-down"]
    again = service.qmp("block-export-del", {"id": "mem", "mode": "hard"})
    assert again["error"]["desc"] == "Export 'mem' is already shutting down"
    taken = service.qmp("block-export-add", {"type": "nbd", "id": "mem", "node-name": "mem", "name": "other"})
    assert taken["error"]["desc"] == "Block export id 'mem' is already in use"
    assert not service.events
    service.call(driver.gate.set)
    poll(lambda: service.events, "the event")
    assert service.events[0]["event"] == "BLOCK_EXPORT_DELETED"
    assert driver.data[:4] == b"abcd"
    service.must("blockdev-del", {"node-name": "mem"})


def test_server_stop_disconnects_everybody(disk: Service) -> None:
    clients = [disk.client("disk") for _ in range(3)]
    waiting = RawClient(disk.path)
    waiting.greet()
    disk.must("nbd-server-stop")
    assert all(client.at_eof() for client in (*clients, waiting))
    assert not connections(disk)
    assert [event["data"]["id"] for event in disk.events] == ["disk"]
    assert disk.must("query-block-exports") == []
    disk.must("blockdev-del", {"node-name": "disk"})


def test_failed_export_leaves_nothing(disk: Service) -> None:
    node = disk.graph.find("disk")
    users = len(node.parents)
    for members in ({"bitmaps": ["nosuch"]}, {"name": "disk"}, {"description": "x" * 5000}, {"iothread": "none"}):
        assert "error" in disk.qmp("block-export-add", {"type": "nbd", "id": "e2", "node-name": "disk", **members})
    assert len(node.parents) == users
    assert [export["id"] for export in disk.must("query-block-exports")] == ["disk"]
    disk.export("disk", "e2", name="e2")


def test_no_resize_while_exported(disk: Service) -> None:
    reply = disk.qmp("block_resize", {"node-name": "disk", "size": 8 * MiB})
    assert reply["error"]["desc"].startswith("Permission conflict on node 'disk': permissions 'resize'")


# --- draining ---


def test_drained_requests_wait(disk: Service) -> None:
    client = disk.client("disk")
    assert client.read(MiB, 2) == b"aa"
    node = disk.graph.find("disk")
    section = disk.graph.drained(node)
    disk.run(section.__aenter__())
    client.request(raw.READ, MiB, 2)
    client.request(raw.WRITE, 0, 2, b"zz")
    late = RawClient(disk.path)
    assert late.go("disk") == 4 * MiB
    late.request(raw.READ, MiB, 1)
    client.sock.settimeout(0.1)
    with pytest.raises(TimeoutError):
        client.recv(1)
    client.sock.settimeout(10)
    disk.run(section.__aexit__(None, None, None))
    assert client.reply()[0][4][8:] == b"aa"
    assert client.reply()[0][2] == 0
    assert late.reply()[0][4][8:] == b"a"


def test_drain_waits_for_requests_in_flight(memory: tuple[Service, Memory]) -> None:
    service, driver = memory
    driver.gate = service.call(asyncio.Event)
    client = service.client("mem")
    client.request(raw.WRITE, 0, 4, b"abcd")
    poll(lambda: driver.log, "the write to arrive")

    async def drain() -> bytes:
        async with service.graph.drained(driver.node):
            return bytes(driver.data[:4])

    drained = asyncio.run_coroutine_threadsafe(drain(), service.loop)
    with pytest.raises(TimeoutError):
        drained.result(0.1)
    service.call(driver.gate.set)
    assert drained.result(10) == b"abcd"
    assert client.reply()[0][2] == 0
    assert client.read(0, 4) == b"abcd"


# --- clients that go ---


def test_disconnect_after_replies(memory: tuple[Service, Memory]) -> None:
    """DISC and the end of input both let the requests before them finish, and their replies are sent."""
    service, driver = memory
    for leave in (lambda c: c.request(raw.DISC), lambda c: c.sock.shutdown(socket.SHUT_WR)):
        driver.gate = service.call(asyncio.Event)
        driver.log.clear()
        client = service.client("mem")
        cookies = {client.request(raw.READ, i, 10) for i in range(5)}
        leave(client)
        poll(lambda: len(driver.log) == 5, "the reads to arrive")
        service.call(driver.gate.set)
        assert {client.reply()[0][1] for _ in range(5)} == cookies
        assert client.at_eof()
        poll(lambda: not connections(service), "the connection to be forgotten")


@pytest.mark.parametrize("sent", [0, 1, 27, 28, 29, 70000, 200000])
def test_clients_that_vanish_in_the_middle(disk: Service, sent: int) -> None:
    request = struct.pack(">IHHQQI", raw.REQUEST, 0, raw.WRITE, 1, 0, 300000) + b"x" * 300000
    client = disk.client("disk")
    client.send(request[:sent])
    client.close()
    poll(lambda: not connections(disk), "the connection to be forgotten")
    assert disk.client("disk").read(0, 4) == bytes(4)


def test_client_that_vanishes_with_requests_in_flight(memory: tuple[Service, Memory]) -> None:
    service, driver = memory
    driver.gate = service.call(asyncio.Event)
    client = service.client("mem")
    for i in range(20):
        client.request(raw.READ, i, 1000)
    poll(lambda: len(driver.log) == 20, "the reads to arrive")
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    assert connections(service)
    service.call(driver.gate.set)
    poll(lambda: not connections(service), "the connection to be forgotten")
    driver.gate = None
    assert service.client("mem").read(0, 4) == bytes(4)


# --- clients that take much ---


def test_client_that_does_not_read(disk: Service) -> None:
    """It gets no more than a bounded amount of memory and harms nobody; when it reads, it gets everything."""
    greedy = disk.client("disk")
    greedy.sock.settimeout(0.5)
    request = struct.Struct(">IHHQQI")
    sent = 0
    try:
        while sent < 20000:
            greedy.send(b"".join(request.pack(raw.REQUEST, 0, raw.READ, sent + i, 0, 65536) for i in range(100)))
            sent += 100
    except TimeoutError:
        pass
    (hog,) = connections(disk)
    assert hog._out_bytes <= 2 * MiB
    assert hog._requests <= 256
    other = disk.client("disk")
    begin = time.monotonic()
    for _ in range(100):
        assert other.read(MiB, 10) == b"a" * 10
    assert time.monotonic() - begin < 5
    greedy.sock.settimeout(10)
    for cookie in range(sent):
        assert greedy.reply()[0][1] == cookie
    greedy.close()
    poll(lambda: len(connections(disk)) == 1, "the connection to be forgotten")


def test_requests_in_flight_are_bounded(memory: tuple[Service, Memory]) -> None:
    service, driver = memory
    driver.gate = service.call(asyncio.Event)
    client = service.client("mem")
    client.send(b"".join(struct.pack(">IHHQQI", raw.REQUEST, 0, raw.READ, cookie, 0, 10) for cookie in range(1000)))
    poll(lambda: len(driver.log) >= 200, "requests to arrive")
    (connection,) = connections(service)
    assert len(driver.log) <= 256
    assert connection._requests <= 256
    service.call(driver.gate.set)
    assert sorted(client.reply()[0][1] for _ in range(1000)) == list(range(1000))


@pytest.mark.parametrize("length", [0, 1, 4096])
def test_more_requests_than_one_turn_handles(disk: Service, length: int) -> None:
    """The receive buffer full of small requests, again and again."""
    client = disk.client("disk", structured=False)
    count = 60000 if length < 4096 else 20000
    data = b"".join(struct.pack(">IHHQQI", raw.REQUEST, 0, raw.READ, i, MiB, length) for i in range(count))
    sender = threading.Thread(target=client.send, args=(data,))
    sender.start()
    expected = b"".join(struct.pack(">IIQ", raw.SIMPLE, 0, i) + b"a" * length for i in range(count))
    assert client.recv(len(expected)) == expected
    sender.join()


def test_many_clients_are_served_fairly(disk: Service) -> None:
    """Somebody who keeps the server busy does not keep it from others."""
    stop = threading.Event()

    def flood() -> None:
        client = disk.client("disk")
        batch = struct.pack(">IHHQQI", raw.REQUEST, 0, raw.READ, 0, 0, 4096) * 256
        while not stop.is_set():
            client.send(batch)
            client.recv(256 * (28 + 4096))
        client.close()

    threads = [threading.Thread(target=flood) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        client = disk.client("disk")
        worst = 0.0
        for _ in range(200):
            begin = time.monotonic()
            assert client.read(MiB, 1) == b"a"
            worst = max(worst, time.monotonic() - begin)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert worst < 2.0


def test_many_connections(disk: Service) -> None:
    disk.must("nbd-server-stop")
    disk.start(max_connections=0)
    disk.export("disk", writable=True)
    clients = [disk.client("disk") for _ in range(150)]
    for number, client in enumerate(clients):
        client.write(number * 4096, bytes([number]) * 4096)
    for number, client in enumerate(reversed(clients)):
        assert client.read((149 - number) * 4096, 4096) == bytes([149 - number]) * 4096
    for client in clients:
        client.close()
    poll(lambda: not connections(disk), "the connections to be forgotten")


# --- errors from below ---


@pytest.mark.parametrize("mode", [{"structured": False}, {}, {"extended": True}])
def test_errors_from_below(memory: tuple[Service, Memory], mode: dict[str, Any]) -> None:
    service, driver = memory

    async def fail(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    class Broken(Exception):
        pass

    async def broken(*arguments: Any) -> None:
        raise Error("driver error", errno.EPERM)

    client = service.client("mem", **mode)
    words = (lambda text: text) if mode != {"structured": False} else (lambda text: "")
    driver.pwritev = driver.preadv = fail  # type: ignore[method-assign, assignment]
    driver.flush = broken  # type: ignore[method-assign]
    assert client.error(raw.READ, 0, 10) == (28, words("reading from file failed"))
    assert client.error(raw.WRITE, 0, 4, b"abcd") == (28, words("writing to file failed"))
    assert client.error(raw.CACHE, 0, 4) == (28, words("caching data failed"))
    assert client.error(raw.FLUSH) == (1, words("flush failed"))
    del driver.preadv, driver.pwritev, driver.flush
    assert client.error(raw.FLUSH) == (0, "")
    assert client.read(0, 10) == bytes(10)


def test_writethrough(memory: tuple[Service, Memory]) -> None:
    service, driver = memory
    service.export("mem", "through", name="through", writable=True, writethrough=True)
    seen: list[int] = []
    original = driver.pwritev

    async def watched(offset: int, length: int, iov: list[memoryview], flags: int) -> None:
        seen.append(flags)
        await original(offset, length, iov, flags)

    driver.pwritev = watched  # type: ignore[method-assign]
    service.client("mem").write(0, b"x")
    service.client("mem").write(0, b"x", flags=raw.FUA)
    service.client("through").write(0, b"x")
    assert seen == [0, 1, 1]


# --- everything at once ---


@pytest.mark.parametrize("mode", [{"structured": False}, {}, {"extended": True}])
@pytest.mark.parametrize("driver", ["raw", "memory", "aligned"])
def test_random_requests_in_flight_together(service: Service, driver: str, mode: dict[str, Any]) -> None:
    """Pipelined requests that do not overlap, of all sizes, against a model."""
    size = 8 * MiB
    rng = random.Random(driver + str(mode))
    service.start()
    if driver == "raw":
        service.image("disk", size)
    else:
        service.memory("disk", Memory if driver == "memory" else Aligned, size)
    service.export("disk", writable=True)
    client = service.client("disk", **mode)
    model = bytearray(size)
    for _ in range(12):
        pending: dict[int, tuple[int, int, int]] = {}
        requests = bytearray()
        cuts = sorted(rng.sample(range(size), 2 * rng.randrange(1, 40)))
        for offset, end in zip(cuts[::2], cuts[1::2], strict=True):
            length = min(end - offset, rng.choice((1, 500, 4096, 65536, 131072, 140000, MiB)))
            kind = rng.choice((raw.READ, raw.READ, raw.WRITE, raw.WRITE, raw.WRITE_ZEROES))
            client.cookie += 1
            flags = rng.choice((0, 0, raw.FUA))
            payload = b""
            if kind == raw.WRITE:
                payload = rng.randbytes(min(length, 64)) * (length // 64 + 1)
                payload = payload[:length]
                if client.extended:
                    flags |= raw.PAYLOAD_LEN
            layout, magic = (">IHHQQQ", raw.EXT_REQUEST) if client.extended else (">IHHQQI", raw.REQUEST)
            requests += struct.pack(layout, magic, flags, kind, client.cookie, offset, length) + payload
            pending[client.cookie] = (kind, offset, length)
            if kind == raw.WRITE:
                model[offset : offset + length] = payload
            elif kind == raw.WRITE_ZEROES:
                model[offset : offset + length] = bytes(length)
        sender = threading.Thread(target=client.send, args=(bytes(requests),))
        sender.start()
        while pending:
            magic = client.sock.recv(16, socket.MSG_PEEK | socket.MSG_WAITALL)
            # Simple replies do not say how long they are.
            reading = 0
            if magic[:4] == struct.pack(">I", raw.SIMPLE):
                kind, _, length = pending[struct.unpack(">Q", magic[8:])[0]]
                reading = length if kind == raw.READ else 0
            chunk = client.chunk(reading)
            kind, offset, length = pending[chunk[1]]
            if chunk[0] == "simple":
                assert chunk[2] == 0
                if kind == raw.READ:
                    assert chunk[3] == model[offset : offset + length]
                del pending[chunk[1]]
                continue
            assert not chunk[3] & 0x8000, chunk
            if chunk[3] == 1:
                start = struct.unpack(">Q", chunk[4][:8])[0]
                assert offset <= start
                assert start + len(chunk[4]) - 8 <= offset + length
                assert chunk[4][8:] == model[start : start + len(chunk[4]) - 8]
            elif chunk[3] == 2:
                start, length = struct.unpack(">QI", chunk[4])
                assert not any(model[start : start + length])
            if chunk[2] & 1:
                del pending[chunk[1]]
        sender.join()
    whole = b"".join(client.read(at, MiB) for at in range(0, size, MiB))
    assert whole == model


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([{"structured": False}, {}, {"extended": True}]),
    st.lists(
        st.one_of(
            st.binary(max_size=60),
            st.builds(
                lambda flags, kind, offset, length, data: (flags, kind, offset, length, data),
                st.integers(0, 0xFFFF) | st.sampled_from([0, 1, 4, 8, 32]),
                st.integers(0, 0xFFFF) | st.integers(0, 8),
                st.integers(0, (1 << 64) - 1) | st.integers(0, 5 * MiB),
                st.integers(0, 0xFFFFFFFF) | st.integers(0, 100000),
                st.binary(max_size=50),
            ),
        ),
        max_size=12,
    ),
)
def test_fuzzed_transmission(disk: Service, mode: dict[str, Any], messages: list[Any]) -> None:
    """Whatever a client sends: an answer or the end of its connection, and the others are served."""
    client = disk.client("disk", contexts=("base:allocation",) if mode != {"structured": False} else (), **mode)
    layout, magic = (">IHHQQQ", raw.EXT_REQUEST) if client.extended else (">IHHQQI", raw.REQUEST)
    try:
        for message in messages:
            if isinstance(message, bytes):
                client.send(message)
            else:
                flags, kind, offset, length, data = message
                client.send(struct.pack(layout, magic, flags, kind, 7, offset, length) + data)
        client.sock.shutdown(socket.SHUT_WR)
        while client.sock.recv(MiB):
            pass
    except OSError:
        pass
    client.close()
    with disk.client("disk") as other:
        other.read(0, 1)
        other.request(raw.DISC)
        assert other.at_eof()
    poll(lambda: not connections(disk), "the connections to be forgotten")


# --- inactive nodes ---


@pytest.mark.parametrize("mode", [{"structured": False}, {}, {"extended": True}])
def test_inactive_node(service: Service, mode: dict[str, Any]) -> None:
    """It can be read from, if that was asked for, and nothing else."""
    service.start()
    service.image("disk", MiB, data={0: b"abcd"}, active=False)
    service.export("disk", writable=True, allow_inactive=True)
    client = service.client("disk", contexts=("base:allocation",) if mode != {"structured": False} else (), **mode)
    text = "" if mode == {"structured": False} else "export is inactive"
    for kind, data in (
        (raw.WRITE, b"xy"),
        (raw.TRIM, b""),
        (raw.WRITE_ZEROES, b""),
        (raw.FLUSH, b""),
        (raw.CACHE, b""),
    ):
        assert client.error(kind, 0, 2, data) == (1, text)
    if text:
        assert client.error(raw.BLOCK_STATUS, 0, 512) == (1, text)
    assert client.error(raw.WRITE, 0, 200000, b"z" * 200000) == (1, text)
    assert client.read(0, 6) == b"abcd\0\0"


# --- where QSD does not do well ---


def test_status_payload_without_contexts(disk: Service) -> None:
    client = disk.client("disk", extended=True)
    data = struct.pack(">QI", 4096, 0)
    assert client.error(raw.BLOCK_STATUS, 0, len(data), data, raw.PAYLOAD_LEN) == (
        22,
        "CMD_BLOCK_STATUS not negotiated",
    )
    assert client.read(MiB, 1) == b"a"


def test_option_data_after_the_queries(disk: Service) -> None:
    client = RawClient(disk.path)
    client.greet()
    client.option(raw.OPT_STRUCTURED_REPLY)
    for option in (raw.OPT_LIST_META_CONTEXT, raw.OPT_SET_META_CONTEXT):
        ((kind, text),) = client.option(option, raw.meta("disk", "base:allocation") + b"zz")
        assert kind == 0x80000003
        assert text.endswith(b"has unexpected length")
    assert client.option(raw.OPT_GO, raw.info("disk"))[-1][0] == raw.REP_ACK
    assert client.error(raw.BLOCK_STATUS, 0, 10) == (22, "CMD_BLOCK_STATUS not negotiated")


def test_vsock(service: Service) -> None:
    """Any address of this machine, unless the kernel has no such sockets."""
    try:
        socket.socket(socket.AF_VSOCK).close()
    except OSError as exc:
        with pytest.raises(Error, match="Failed to create socket") as caught:
            service.start({"type": "vsock", "cid": "4294967295", "port": "10999"})
        assert caught.value.errno == exc.errno
        return
    service.start({"type": "vsock", "cid": "4294967295", "port": "10999"})
    assert service.server._sockets()[0].getsockname() == (socket.VMADDR_CID_ANY, 10999)
    with pytest.raises(Error, match="NBD server already running"):
        service.start({"type": "vsock", "cid": "4294967295", "port": "11000"})
