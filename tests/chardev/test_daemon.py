"""The whole program, with its monitor on each kind of chardev; where it makes sense, the real daemon does the same."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import QMPClient

from tests.support import peers
from tests.support.daemon import DaemonProcess, argv_of, may_announce, poll, wait_announced
from tests.support.qmp import QmpClient

TIMEOUT = 20.0
KINDS = ["qsd", "pyqsd"]


@contextmanager
def daemon(kind: str, *args: str, cwd: Path, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    pidfile = cwd.with_name(cwd.name + ".ready") if kind == "qsd" and may_announce(args) else None
    more = ["--pidfile", str(pidfile)] if pidfile is not None else []
    process = subprocess.Popen([*argv_of(kind), *args, *more], cwd=cwd, stderr=subprocess.PIPE, **options)
    try:
        if pidfile is not None:
            wait_announced(process, pidfile)
        yield process
    finally:
        process.kill()
        process.communicate()


def lines(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.splitlines()]


COMMANDS = b'{"execute": "qmp_capabilities"}\n{"execute": "query-chardev"}\n{"execute": "quit"}\n'


@pytest.mark.parametrize("kind", KINDS)
def test_stdio(kind: str, tmp_path: Path) -> None:
    """All at once, and the input stays open: ``quit`` ends it, and its reply is still there."""
    with daemon(
        kind, "--chardev", "stdio,id=c", "--monitor", "c", cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(COMMANDS)
        process.stdin.flush()
        replies = lines(process.stdout.read())
        assert process.wait(TIMEOUT) == 0
    assert "QMP" in replies[0]
    assert replies[1:] == [
        {"return": {}},
        {"return": [{"frontend-open": True, "filename": "stdio", "label": "c"}]},
        {"return": {}},
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_end_of_stdin_is_not_the_end(kind: str, tmp_path: Path) -> None:
    args = ["--chardev", "stdio,id=c", "--monitor", "c"]
    args += ["--chardev", "socket,id=d,path=s,server=on,wait=off", "--monitor", "d"]
    with daemon(kind, *args, cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        poll((tmp_path / "s").exists, "the socket")
        with QmpClient(tmp_path / "s") as client:
            client.execute("query-chardev")
            assert process.poll() is None
            client.execute("quit")
        assert process.wait(TIMEOUT) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_pty(kind: str, tmp_path: Path) -> None:
    with daemon(
        kind, "--chardev", "pty,id=c,path=link", "--monitor", "c", cwd=tmp_path, stdin=subprocess.DEVNULL
    ) as process:
        poll((tmp_path / "link").is_symlink, "the terminal")
        fd = os.open(tmp_path / "link", os.O_RDWR | os.O_NOCTTY)
        first, quit_, rest = COMMANDS.partition(b'{"execute": "quit"}')
        os.write(fd, first)
        replies: list[dict[str, Any]] = []
        while len(replies) < 2:
            # QSD greets a terminal twice.
            replies += [reply for reply in lines(read_lines(fd, 1)) if "QMP" not in reply]
        # The reply to the last one may be lost with the terminal.
        os.write(fd, quit_ + rest)
        assert replies[0] == {"return": {}}
        assert replies[1]["return"][0]["filename"].startswith("pty:/dev/pts/")
        assert process.wait(TIMEOUT) == 0
        os.close(fd)
        assert not (tmp_path / "link").is_symlink()


def read_lines(fd: int, count: int) -> bytes:
    data = b""
    while data.count(b"\n") < count or not data.endswith(b"\n"):
        assert select.select([fd], [], [], TIMEOUT)[0], data
        part = os.read(fd, 65536)
        assert part, data
        data += part
    return data


@pytest.mark.parametrize("kind", KINDS)
def test_pipe(kind: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p.in")
    os.mkfifo(tmp_path / "p.out")
    reader = os.open(tmp_path / "p.out", os.O_RDWR)
    with daemon(
        kind, "--chardev", "pipe,id=c,path=p", "--monitor", "c", cwd=tmp_path, stdin=subprocess.DEVNULL
    ) as process:
        assert "QMP" in json.loads(read_lines(reader, 1))
        for command in COMMANDS.splitlines(True):
            # A writer for each command, as a shell's ``echo … > p.in`` is.
            with open(tmp_path / "p.in", "wb") as writer:
                writer.write(command)
            assert "return" in json.loads(read_lines(reader, 1))
        assert process.wait(TIMEOUT) == 0
    os.close(reader)


@pytest.mark.parametrize("kind", KINDS)
def test_files(kind: str, tmp_path: Path) -> None:
    """A script of commands in a file, the answers in another one."""
    (tmp_path / "in").write_bytes(COMMANDS)
    with daemon(
        kind, "--chardev", "file,id=c,path=out,input-path=in", "--monitor", "c", cwd=tmp_path, stdin=subprocess.DEVNULL
    ) as process:
        assert process.wait(TIMEOUT) == 0
    replies = lines((tmp_path / "out").read_bytes())
    assert "QMP" in replies[0]
    assert replies[2] == {"return": [{"frontend-open": True, "filename": "file", "label": "c"}]}
    assert replies[3] == {"return": {}}


@pytest.mark.parametrize("kind", KINDS)
def test_client_that_comes_back(kind: str, tmp_path: Path) -> None:
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "s"))
    listening.listen()
    listening.settimeout(TIMEOUT)
    args = ["--chardev", "socket,id=c,path=s,reconnect-ms=10", "--monitor", "c"]
    with daemon(kind, *args, cwd=tmp_path, stdin=subprocess.DEVNULL) as process:
        for last in (False, True):
            peer, _ = listening.accept()
            peer.sendall(COMMANDS if last else COMMANDS.partition(b'{"execute": "quit"}')[0])
            replies = lines(read_lines(peer.fileno(), 4 if last else 3))
            assert "QMP" in replies[0] and replies[2]["return"][0]["filename"] == f"unix:{tmp_path}/s"
            peer.close()
        assert process.wait(TIMEOUT) == 0
    listening.close()


def test_inherited_listening_socket(tmp_path: Path) -> None:
    """The socket is there before the daemon: a client may connect at once, and is served when it is up. (QSD reads what
    such a client has sent in two threads while it starts, and now and then answers with a parse error.)"""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        listening.listen()
        fd = listening.fileno()
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(str(tmp_path / "s"))
            peer.sendall(COMMANDS)
            args = ["--chardev", f"socket,id=c,fd={fd},server=on,wait=off", "--monitor", "c"]
            with daemon("pyqsd", *args, cwd=tmp_path, stdin=subprocess.DEVNULL, pass_fds=[fd]) as process:
                assert "return" in lines(read_lines(peer.fileno(), 4))[-1]
                assert process.wait(TIMEOUT) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_wait_for_a_client(kind: str, tmp_path: Path) -> None:
    """Nothing after it on the command line happens before somebody connects."""
    args = ["--chardev", "socket,id=c,path=s,server=on", "--monitor", "c"]
    args += ["--chardev", "file,id=d,path=later", "--pidfile", "pid"]
    with daemon(kind, *args, cwd=tmp_path, stdin=subprocess.DEVNULL) as process:
        assert process.stderr is not None
        line = process.stderr.readline().decode()
        assert line.endswith("info: QEMU waiting for connection on: disconnected:unix:s,server=on\n")
        assert not (tmp_path / "later").exists()
        with QmpClient(tmp_path / "s") as client:
            assert (tmp_path / "later").exists()
            client.execute("quit")
        assert process.wait(TIMEOUT) == 0


def test_end_while_waiting_for_a_client(tmp_path: Path) -> None:
    with daemon(
        "pyqsd", "--chardev", "socket,id=c,path=s,server=on", cwd=tmp_path, stdin=subprocess.DEVNULL
    ) as process:
        assert process.stderr is not None
        assert b"waiting for connection" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT) == 0
        assert process.stderr.read() == b""
    assert list(tmp_path.iterdir()) == []


def test_qmp_library_over_tcp(tmp_path: Path) -> None:
    async def talk(port: int) -> list[Any]:
        client = QMPClient("test")
        await client.connect(("127.0.0.1", port))
        try:
            return [await client.execute("query-chardev"), await client.execute("qom-list", {"path": "/chardevs"})]
        finally:
            await client.disconnect()

    with DaemonProcess("pyqsd", workdir=tmp_path) as process:
        addr = {"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}}
        backend = {"type": "socket", "data": {"addr": addr, "wait": False}}
        process.qmp.execute("chardev-add", id="t", backend=backend)
        port = int(process.qmp.execute("qom-get", path="t", property="addr")["port"])
        process.terminate()
        args = ["--chardev", f"socket,id=t,host=127.0.0.1,port={port},server=on,wait=off", "--monitor", "t"]
        with DaemonProcess("pyqsd", args, workdir=tmp_path):
            for _ in range(2):
                infos, children = asyncio.run(talk(port))
                assert infos[0]["filename"].startswith(f"tcp:127.0.0.1:{port},server=on <-> 127.0.0.1:")
                assert {child["type"] for child in children} == {"string", "child<chardev-socket>"}


def test_socat(tmp_path: Path) -> None:
    with DaemonProcess("pyqsd", workdir=tmp_path, qmp=True) as process:
        process.qmp.close()
        done = subprocess.run(
            [peers.require("socat"), "-t5", "-", "UNIX-CONNECT:qmp.sock"],
            input=COMMANDS.partition(b'{"execute": "quit"}')[0],
            cwd=tmp_path,
            capture_output=True,
            timeout=TIMEOUT,
            check=True,
        )
        # It closed its sending half at once; everything it had asked for was answered.
        replies = lines(done.stdout)
        assert "QMP" in replies[0] and replies[1] == {"return": {}}
        assert [info["label"] for info in replies[2]["return"]] == ["qmp0"]


def test_peer_that_never_reads(tmp_path: Path) -> None:
    """It holds up neither the daemon nor another monitor, and memory stays bounded."""
    args = ["--chardev", "socket,id=c,path=s,server=on,wait=off", "--monitor", "c"]
    with DaemonProcess("pyqsd", args, workdir=tmp_path) as process:
        process.qmp.execute("query-qmp-schema")
        before = process.rss()
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(str(tmp_path / "s"))
            peer.setblocking(False)
            stop = threading.Event()

            def flood() -> None:
                data = b'{"execute": "qmp_capabilities"}' + b'{"execute": "query-qmp-schema"}' * 1000
                while not stop.is_set():
                    if select.select([], [peer], [], 0.05)[1]:
                        try:
                            peer.send(data)
                        except BlockingIOError:
                            pass

            thread = threading.Thread(target=flood)
            thread.start()
            try:
                end = time.monotonic() + 2
                while time.monotonic() < end:
                    assert process.qmp.execute("query-chardev")
                assert process.rss() - before < 64 << 20
            finally:
                stop.set()
                thread.join()
        poll(
            lambda: any(i["filename"].startswith("disconnected:") for i in process.qmp.execute("query-chardev")),
            "the end of the connection",
        )


def test_secret_from_a_shell_pipe(tmp_path: Path) -> None:
    """``--object secret,id=s,file=/dev/fd/N``, as process substitution makes it."""
    reader, writer = os.pipe()
    args = ["--object", f"secret,id=s,file=/dev/fd/{reader}"]
    with daemon("pyqsd", *args, "--object", "nosuch", cwd=tmp_path, pass_fds=[reader]) as process:
        os.write(writer, b"secret")
        os.close(writer)
        assert process.wait(TIMEOUT) == 1
        assert process.stderr is not None
        assert process.stderr.read().endswith(b"--object nosuch: Parameter 'qom-type' does not accept value 'nosuch'\n")
    os.close(reader)
