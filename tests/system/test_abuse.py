"""Hostile and careless peers, broken images, full disks: an error for who earned it, and the daemon goes on serving."""

from __future__ import annotations

import ctypes
import os
import random
import resource
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import images, nbd, peers
from tests.support.daemon import DaemonProcess, argv_of, poll
from tests.support.images import KiB, MiB
from tests.support.nbd import NbdClient, NbdError, is_alive
from tests.support.qmp import QmpError
from tests.system import fuzz

NBD_SERVER = ["--nbd-server", "addr.type=unix,addr.path=nbd.sock"]
OTHER = b"\x11" * 512
ROOM = 96 * MiB  # how much a daemon may grow while it is being abused


def two_exports(image_set: Path, workdir: Path) -> list[str]:
    """`victim` (qcow2, writable) is for abuse, `other` must go on."""
    images_ = {"plain.qcow2": "victim.qcow2", "raw.img": "other.img"}
    for source, target in images_.items():
        (workdir / target).write_bytes((image_set / source).read_bytes())
    return [
        "--blockdev",
        "qcow2,node-name=victim,file.driver=file,file.filename=victim.qcow2",
        "--blockdev",
        "file,node-name=other,filename=other.img,read-only=on",
        *NBD_SERVER,
        "--export",
        "nbd,id=v,node-name=victim,writable=on",
        "--export",
        "nbd,id=o,node-name=other",
    ]


@pytest.fixture
def served(image_set: Path, tmp_path: Path) -> Iterator[DaemonProcess]:
    with DaemonProcess("pyqsd", two_exports(image_set, tmp_path), workdir=tmp_path) as daemon:
        is_alive(tmp_path / "nbd.sock", "other", OTHER)
        before = daemon.rss()
        daemon.room = ROOM
        yield daemon
        if daemon.running:
            is_alive(tmp_path / "nbd.sock", "other", OTHER)
            daemon.check_stderr()
            assert daemon.rss() < before + daemon.room
    images.assert_clean(tmp_path / "victim.qcow2")


# -- fuzz ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_fuzzed_handshakes(served: DaemonProcess, seed: int) -> None:
    rng = random.Random(seed)
    path = served.workdir / "nbd.sock"
    for round_ in range(150):
        state = rng.getstate()
        try:
            fuzz.attack_handshake(path, rng, rng.choice(("victim", "other", "", "nosuch")))
            if round_ % 10 == 0:
                is_alive(path, "other", OTHER)
        except BaseException as exc:
            exc.add_note(f"round {round_}, random state {hash(state)}")
            raise
    poll(lambda: served.fd_count() < 60, "the connections to be closed")


@pytest.mark.parametrize("seed", range(4))
def test_fuzzed_requests(served: DaemonProcess, seed: int) -> None:
    rng = random.Random(1000 + seed)
    path = served.workdir / "nbd.sock"
    for round_ in range(150):
        fuzz.attack_requests(path, rng, rng.choice(("victim", "victim", "other")))
        if round_ % 10 == 0:
            is_alive(path, "other", OTHER)
    poll(lambda: served.fd_count() < 60, "the connections to be closed")


@pytest.mark.parametrize("seed", range(4))
def test_fuzzed_qmp(served: DaemonProcess, seed: int) -> None:
    rng = random.Random(2000 + seed)
    qmp = served.qmp
    for round_ in range(300):
        # 0xFF is never part of JSON: what was left open ends there.
        qmp.send_raw(fuzz.broken_qmp(rng) + b"\n\xff\n")
        qmp.send({"execute": "query-version", "id": f"sync-{round_}"})
        while qmp.reply().get("id") != f"sync-{round_}":
            pass
    assert qmp.execute("query-version")["qemu"]["major"] == 10


def test_endless_qmp_input(served: DaemonProcess) -> None:
    """A string that never ends is cut off at the limit (64 MiB in QSD), with an error, and memory is given back."""
    qmp = served.qmp
    qmp.timeout = 60
    replies: list[dict[str, object]] = []
    reader = threading.Thread(target=lambda: replies.append(qmp.reply(60)))
    reader.start()
    qmp.send_raw(b'{"execute": "' + b"x" * (64 * MiB + 4096))
    reader.join()
    assert "error" in replies[0]
    qmp.send_raw(b'"\n\xff\n')
    qmp.send({"execute": "query-version", "id": "sync"})
    while qmp.reply().get("id") != "sync":
        pass


def test_endless_qmp_tokens(served: DaemonProcess) -> None:
    """So is an array that never ends."""
    served.room = 512 * MiB  # 2 Mi values; the allocator need not give that back
    qmp = served.qmp
    qmp.timeout = 90
    replies: list[dict[str, object]] = []
    reader = threading.Thread(target=lambda: replies.append(qmp.reply(90)))
    reader.start()
    # QSD gives up beyond 2 Mi tokens; not one more, or each of them would get an error of its own.
    qmp.send_raw(b"[")
    for _ in range(64):
        qmp.send_raw(b"1," * (1 << 14))
    reader.join()
    assert replies[0]["error"] == {"class": "GenericError", "desc": "JSON token count limit exceeded"}
    qmp.send_raw(b"\n\xff\n")
    qmp.send({"execute": "query-version", "id": "sync"})
    while qmp.reply().get("id") != "sync":
        pass


def test_qmp_client_that_does_not_read(served: DaemonProcess) -> None:
    """Replies nobody reads do not pile up without bound, and do not stop the exports."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    served.qmp.close()
    with sock:
        sock.connect(str(served.qmp_path))
        sock.setblocking(False)
        message = b'{"execute":"qmp_capabilities"}' + b'{"execute":"query-qmp-schema"}' * 2000
        try:
            while message:
                message = message[sock.send(message) :]
        except BlockingIOError:
            pass
        for _ in range(20):
            is_alive(served.workdir / "nbd.sock", "other", OTHER)
    with served.connect_qmp() as again:
        assert "qemu" in again.execute("query-version")


@pytest.mark.parametrize("negotiated", [False, True])
def test_vanishing_qmp_clients(served: DaemonProcess, negotiated: bool) -> None:
    served.qmp.close()
    for size in range(40):
        with served.connect_qmp(negotiate=negotiated) as client:
            client.send_raw(b'{"execute":"query-named-block-nodes"}'[:size] * (size % 3))
    with served.connect_qmp() as client:
        assert client.execute("query-block-exports")


# -- mistakes on which QSD itself aborts -------------------------------------------------------------------------------


def test_commands_that_abort_qsd(served: DaemonProcess) -> None:
    for name, arguments in (
        ("blockdev-add", {"driver": "null-co", "node-name": "n", "size": -1}),
        ("blockdev-reopen", {"options": []}),
    ):
        reply = served.qmp.command(name, **arguments)
        assert "return" in reply or reply["error"]["class"] == "GenericError"
    assert served.running


# -- clients -----------------------------------------------------------------------------------------------------------


def test_vanishing_nbd_clients(served: DaemonProcess) -> None:
    """Clients that go away at every point of a write request and in the middle of replies."""
    path = served.workdir / "nbd.sock"
    request = struct.pack(">IHHQQI", nbd.REQUEST, 0, nbd.CMD_WRITE, 1, 3 * MiB, 4096) + b"v" * 4096
    for cut in (*range(0, 30, 3), 100, 4095, len(request)):
        with NbdClient(path, "victim") as client:
            client.send_raw(request[:cut])
    for _ in range(10):
        with NbdClient(path, "victim") as client:
            for _ in range(16):
                client.send(nbd.CMD_READ, 0, MiB)
            client.read(1000)
    poll(lambda: served.fd_count() < 60, "the connections to be closed")


def test_half_closed_client(served: DaemonProcess) -> None:
    """Requests sent before a half-close are answered."""
    with NbdClient(served.workdir / "nbd.sock", "victim") as client:
        for index in range(20):
            client.send(nbd.CMD_READ, index * 4096, 4096)
        client.sock.shutdown(socket.SHUT_WR)
        answered = 0
        while client.pending:
            assert not client.receive().error
            answered += 1
        assert answered == 20
        assert client.wait_closed() == b""


def test_slow_readers(served: DaemonProcess) -> None:
    """Clients that ask for gigabytes and read nothing cost bounded memory and nobody else's service."""
    path = served.workdir / "nbd.sock"
    before = served.rss()
    slow = [NbdClient(path, "victim") for _ in range(4)]
    try:
        for client in slow:
            client.sock.setblocking(False)
            stream = b"".join(client.pack_request(nbd.CMD_READ, 0, 4 * MiB, cookie=n) for n in range(256))
            try:
                while stream:
                    stream = stream[client.sock.send(stream) :]
            except BlockingIOError:
                pass
        for _ in range(50):
            is_alive(path, "other", OTHER)
        # QSD keeps at most 16 requests per client in memory
        assert served.rss() < before + 4 * 16 * 4 * MiB + ROOM
    finally:
        for client in slow:
            client.close()
    poll(lambda: served.fd_count() < 60, "the connections to be closed")
    poll(lambda: served.rss() < before + ROOM, "the memory to be given back")


def test_large_requests(served: DaemonProcess) -> None:
    """32 MiB is the most that a request may carry; many at once do not add up without bound."""
    path = served.workdir / "nbd.sock"
    served.qmp.execute("blockdev-add", driver="null-co", node_name="n", size=1 << 40, read_zeroes=True)
    served.qmp.execute("block-export-add", type="nbd", id="n", node_name="n", writable=True)
    with NbdClient(path, "n", structured=False) as client:
        data = client.pread(1 << 39, 32 * MiB)
        assert data == bytes(32 * MiB)
        client.pwrite(1 << 39, data)
        for _ in range(8):
            client.send(nbd.CMD_READ, 0, 32 * MiB)
        for _ in range(8):
            assert not client.receive().error
        cookie = client.send(nbd.CMD_READ, 0, 32 * MiB + 1)
        reply = client.receive()
        assert (reply.cookie, reply.error) == (cookie, 22)
        client.disconnect()
    served.qmp.execute("block-export-del", id="n", mode="hard")
    served.qmp.wait_event("BLOCK_EXPORT_DELETED")
    served.qmp.execute("blockdev-del", node_name="n")


def test_hundred_connections(served: DaemonProcess) -> None:
    path = served.workdir / "nbd.sock"
    # QSD's default for max-connections is 100, and `other` wants to be asked as well.
    clients = [NbdClient(path, "victim") for _ in range(99)]
    try:
        for index, client in enumerate(clients):
            client.send(nbd.CMD_WRITE, 3 * MiB + index * 512, 512, 0, bytes([index]) * 512)
        for client in clients:
            assert not client.receive().error
        for index, client in enumerate(reversed(clients)):
            assert client.pread(3 * MiB + (index) * 512, 512) == bytes([index]) * 512
        is_alive(path, "other", OTHER)
    finally:
        for client in clients:
            client.close()
    poll(lambda: served.fd_count() < 60, "the connections to be closed")


def test_max_connections(tmp_path: Path) -> None:
    """The third waits, unanswered, until one of the two leaves."""
    args = [
        "--blockdev",
        "null-co,node-name=n,size=65536,read-zeroes=on",
        "--nbd-server",
        "addr.type=unix,addr.path=nbd.sock,max-connections=2",
        "--export",
        "nbd,id=e,node-name=n",
    ]
    with DaemonProcess("pyqsd", args, workdir=tmp_path):
        path = tmp_path / "nbd.sock"
        first, second = NbdClient(path, "n"), NbdClient(path, "n")
        third = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with first, second, third:
            third.connect(str(path))
            third.setblocking(False)
            assert first.pread(0, 512) == second.pread(0, 512) == bytes(512)
            with pytest.raises(BlockingIOError):
                third.recv(1)
            first.close()
            third.settimeout(10)
            assert third.recv(8) == b"NBDMAGIC"


def test_handshake_timeout(served: DaemonProcess) -> None:
    """Who does not finish the handshake in time is sent away; who did is not."""
    qmp = served.qmp
    qmp.execute("nbd-server-stop")
    qmp.execute(
        "nbd-server-start",
        addr={"type": "unix", "data": {"path": "nbd.sock"}},
        handshake_max_seconds=1,
    )
    qmp.execute("block-export-add", type="nbd", id="v2", node_name="victim")
    qmp.execute("block-export-add", type="nbd", id="o2", node_name="other")
    path = served.workdir / "nbd.sock"
    with NbdClient(path, "victim") as done, NbdClient(path) as greeted, NbdClient(path, greet=False) as silent:
        greeted.send_option(nbd.OPT_LIST)
        assert silent.wait_closed(10).startswith(b"NBDMAGIC")
        greeted.wait_closed(10)
        assert len(done.pread(0, 512)) == 512


def test_server_restart_with_clients(served: DaemonProcess) -> None:
    """nbd-server-stop cuts everyone off, and the next server starts afresh."""
    path = served.workdir / "nbd.sock"
    for round_ in range(10):
        clients = [NbdClient(path, "victim") for _ in range(5)]
        for client in clients:
            client.send(nbd.CMD_WRITE, 0, 65536, 0, bytes([round_]) * 65536)
        served.qmp.execute("nbd-server-stop")
        for client in clients:
            client.wait_closed(10)
            client.close()
        served.qmp.execute("nbd-server-start", addr={"type": "unix", "data": {"path": "nbd.sock"}})
        served.qmp.execute("block-export-add", type="nbd", id="v", node_name="victim", writable=True)
        served.qmp.execute("block-export-add", type="nbd", id="o", node_name="other")


def test_overlapping_writes_are_whole(served: DaemonProcess) -> None:
    """Requests over each other at once: each sector ends as one of them wrote it, and later reads agree."""
    path = served.workdir / "nbd.sock"
    with NbdClient(path, "victim") as client:
        for round_ in range(20):
            for number in range(16):
                client.send(nbd.CMD_WRITE, 3 * MiB + number * 100, 3000, 0, bytes([round_ * 16 + number & 0xFF]) * 3000)
            for _ in range(16):
                assert not client.receive().error
            first = client.pread(3 * MiB, 8192)
            assert client.pread(3 * MiB, 8192) == first
            assert first[:100] == bytes([round_ * 16 & 0xFF]) * 100


# -- the host ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_full_disk(fmt: str, tmp_path: Path) -> None:
    """Writes fail with ENOSPC, what was written before stays, other exports go on, and the image is not corrupt."""
    peers.require("unshare")
    (tmp_path / "disk").mkdir()
    (tmp_path / "other.img").write_bytes(OTHER * 128)
    inside = tmp_path / "run.sh"
    inside.write_text(
        "set -e\n"
        "mount -t tmpfs -o size=4m tmpfs disk\n"
        f"qemu-img create -q -f {fmt} disk/image 16M\n"
        '"$@"\n'
        f"qemu-img check -f {fmt} disk/image > check.txt 2>&1 || echo $? > check.status\n"
        f"qemu-img convert -f {fmt} -O raw disk/image after.raw\n"
    )
    args = [
        "--blockdev",
        f"{fmt},node-name=disk,file.driver=file,file.filename=disk/image",
        "--blockdev",
        "file,node-name=other,filename=other.img,read-only=on",
        *NBD_SERVER,
        "--export",
        "nbd,id=e,node-name=disk,writable=on",
        "--export",
        "nbd,id=o,node-name=other",
    ]
    with DaemonProcess("pyqsd", args, workdir=tmp_path, prefix=["unshare", "-rm", "sh", str(inside)]) as daemon:
        path = tmp_path / "nbd.sock"
        written = []
        with NbdClient(path, "disk") as client:
            errors = 0
            for index in range(32):
                try:
                    client.pwrite(index * 256 * KiB, bytes([index + 1]) * (256 * KiB))
                    written.append(index)
                except NbdError as error:
                    assert error.number == 28, error
                    errors += 1
            assert errors > 5
            assert len(written) >= 10
            for index in written:
                assert client.pread(index * 256 * KiB, 256 * KiB) == bytes([index + 1]) * (256 * KiB)
            is_alive(path, "other", OTHER)
            client.disconnect()
        assert "return" in daemon.qmp.command("query-block-exports")
        daemon.qmp.execute("quit")
        assert daemon.wait() == 0
        daemon.ended_by_test = True
    assert not (tmp_path / "check.status").exists() or (tmp_path / "check.status").read_text().strip() in ("3", "63")
    after = (tmp_path / "after.raw").read_bytes()
    for index in written:
        assert after[index * 256 * KiB : (index + 1) * 256 * KiB] == bytes([index + 1]) * (256 * KiB)


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_file_truncated_beneath(fmt: str, image_set: Path, tmp_path: Path) -> None:
    """Somebody cuts the file of a running export: the same answers as from the real daemon, and no fall."""
    results = {}
    for kind in ("qsd", "pyqsd"):
        root = tmp_path / kind
        root.mkdir()
        (root / "disk").write_bytes((image_set / ("raw.img" if fmt == "raw" else "plain.qcow2")).read_bytes())
        args = ["--blockdev", f"{fmt},node-name=disk,file.driver=file,file.filename=disk", *NBD_SERVER]
        args += ["--export", "nbd,id=e,node-name=disk,writable=on"]
        with DaemonProcess(kind, args, workdir=root) as daemon:
            answers = []
            with NbdClient(root / "nbd.sock", "disk", structured=False) as client:
                client.pread(0, 4096)
                os.truncate(root / "disk", 300 * KiB)
                for offset in range(0, client.size, 64 * KiB):
                    try:
                        answers.append(client.pread(offset, 64 * KiB))
                    except NbdError as error:
                        answers.append(str(error).encode())
                client.disconnect()
            assert daemon.running
            results[kind] = answers
            daemon.qmp.execute("block-export-del", id="e", mode="hard")
            if fmt == "qcow2":
                daemon.kill()  # the image is broken, and was not by us
    assert results["pyqsd"] == results["qsd"]


@pytest.mark.parametrize("way", ["SIGTERM", "SIGINT", "quit"])
@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_end_under_load(way: str, fmt: str, tmp_path: Path) -> None:
    """Ended in the middle of writes: status 0, a clean image, and every answered write is in it."""
    images.create(tmp_path / "disk", 64 * MiB, fmt)
    args = ["--blockdev", f"{fmt},node-name=disk,file.driver=file,file.filename=disk", *NBD_SERVER]
    args += ["--export", "nbd,id=e,node-name=disk,writable=on"]
    answered: set[int] = set()
    with DaemonProcess("pyqsd", args, workdir=tmp_path) as daemon:
        with NbdClient(tmp_path / "nbd.sock", "disk") as client:
            sent: dict[int, int] = {}
            number = 0
            ended = False
            try:
                while True:
                    while len(sent) < 32:
                        number += 1
                        offset = number * 20 * KiB
                        if offset + 12 * KiB > 64 * MiB:
                            raise AssertionError("the daemon did not end under load")
                        payload = number.to_bytes(4, "big") * (3 * KiB)
                        sent[client.send(nbd.CMD_WRITE, offset, len(payload), 0, payload)] = number
                    reply = client.receive()
                    done = sent.pop(reply.cookie)
                    if not reply.error:
                        answered.add(done)
                    if len(answered) == 200 and not ended:
                        ended = True
                        if way == "quit":
                            daemon.qmp.send({"execute": "quit"})
                        else:
                            daemon.send_signal(getattr(signal, way))
            except (EOFError, ConnectionError):
                pass
        assert daemon.wait() == 0
        daemon.ended_by_test = True
    assert len(answered) >= 200
    if fmt == "qcow2":
        images.assert_clean(tmp_path / "disk")
    content = images.read_all(tmp_path / "disk", fmt, tmp_path / "raw")
    for number in answered:
        assert content[number * 20 * KiB : number * 20 * KiB + 12 * KiB] == number.to_bytes(4, "big") * (3 * KiB), (
            number
        )


def test_out_of_file_descriptors(image_set: Path, tmp_path: Path) -> None:
    """More connections than file descriptors: those that exist go on, and it recovers when some leave."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    args = two_exports(image_set, tmp_path)
    with DaemonProcess("pyqsd", args, workdir=tmp_path, preexec=limit) as daemon:
        path = tmp_path / "nbd.sock"
        first = NbdClient(path, "other")
        crowd = []
        for _ in range(80):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.setblocking(False)
            try:
                sock.connect(str(path))
            except BlockingIOError:
                sock.close()
                break
            crowd.append(sock)
        for _ in range(50):
            assert first.pread(0, 512) == OTHER
        assert "return" in daemon.qmp.command("query-version")
        spent = os.times()
        for sock in crowd:
            sock.close()
        is_alive(path, "other", OTHER)
        assert first.pread(0, 512) == OTHER
        first.close()
        assert spent


def test_stopped_client_does_not_hold_shutdown(served: DaemonProcess) -> None:
    """A connected client that does nothing does not delay the end."""
    with NbdClient(served.workdir / "nbd.sock", "victim"), NbdClient(served.workdir / "nbd.sock"):
        assert served.terminate(timeout=10) == 0


def test_signal_in_another_thread(served: DaemonProcess) -> None:
    """A signal that the kernel gives to a worker thread while the loop sleeps ends the daemon like any other."""
    with NbdClient(served.workdir / "nbd.sock", "victim") as client:
        client.pwrite(0, b"x")
        client.flush()
        client.disconnect()
    libc = ctypes.CDLL(None, use_errno=True)

    def others() -> list[int]:
        tasks = Path(f"/proc/{served.pid}/task")
        names = {int(task.name): (task / "comm").read_text().strip() for task in tasks.iterdir()}
        return [tid for tid, name in names.items() if tid != served.pid and name == names[served.pid]]

    if not others():
        # Everything is done in the loop or by io_uring: have the driver ask for holes, which is a worker's.
        with NbdClient(served.workdir / "nbd.sock", "other", contexts=("base:allocation",)) as client:
            client.block_status(0, 4096)
            client.disconnect()
    (tid, *_) = others()
    sys_tgkill = {"x86_64": 234, "aarch64": 131}[os.uname().machine]
    assert libc.syscall(sys_tgkill, served.pid, tid, int(signal.SIGTERM)) == 0
    assert served.wait(10) == 0
    served.ended_by_test = True


def test_wrong_images_from_the_command_line(image_set: Path, tmp_path: Path) -> None:
    """A broken image is one line on stderr and exit status 1."""
    for name in ("garbage.qcow2", "short.qcow2", "empty.img"):
        done = subprocess.run(
            [*argv_of("pyqsd"), "--blockdev", f"qcow2,node-name=a,file.driver=file,file.filename={image_set / name}"],
            capture_output=True,
            timeout=30,
            cwd=tmp_path,
            check=False,
        )
        assert done.returncode == 1
        assert done.stderr.count(b"\n") == 1, done.stderr
        assert b"Traceback" not in done.stderr


def test_unknown_node_after_abuse(served: DaemonProcess) -> None:
    with pytest.raises(QmpError, match="Failed to find node"):
        served.qmp.execute("blockdev-del", node_name="nosuch")
