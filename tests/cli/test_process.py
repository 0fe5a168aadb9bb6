"""The daemon as a process: start, background, process ID file, signals, end."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import images, peers
from tests.support.daemon import DIRT, DaemonProcess, argv_of, poll, run_to_end
from tests.support.qmp import QmpClient

KINDS = ("qsd", "pyqsd")
MiB = 1 << 20


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    images.create(tmp_path / "disk.qcow2", 8 * MiB, "qcow2")
    images.create(tmp_path / "raw.img", 8 * MiB, "raw")
    return tmp_path


@pytest.fixture(autouse=True)
def cold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here processes start from nothing, as they do for users."""
    monkeypatch.setattr("tests.support.daemon.starts_warm", lambda kind: False)


@pytest.fixture
def reap() -> Iterator[Callable[[int], None]]:
    """Makes sure that daemons in the background are gone in the end."""
    pids: list[int] = []
    yield pids.append
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


SERVED = [
    *("--blockdev", "qcow2,node-name=q,file.driver=file,file.filename=disk.qcow2"),
    *("--nbd-server", "addr.type=unix,addr.path=nbd.sock"),
    *("--export", "nbd,id=e,node-name=q,name=disk,writable=on"),
]


def gone(pid: int) -> bool:
    """Whether the process has ended (a zombie that nobody collects has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


# --- information ----------------------------------------------------------------------------------


def test_version(tmp_path: Path) -> None:
    ours = run_to_end("pyqsd", ["--version"], workdir=tmp_path)
    theirs = run_to_end("qsd", ["--version"], workdir=tmp_path)
    number = "qemu-storage-daemon version 10.0.2"
    assert number in theirs.stdout.splitlines()[0]
    assert ours.stdout.splitlines()[0].startswith("pyqsd version ") and number in ours.stdout.splitlines()[0]
    assert ours.stdout.splitlines()[1].startswith("Copyright")
    assert (ours.returncode, ours.stderr) == (0, "")


def test_help(tmp_path: Path) -> None:
    ours = run_to_end("pyqsd", ["--blockdev", "nosuch", "-h"], workdir=tmp_path)
    assert ours.returncode == 0 and ours.stderr == ""
    assert ours.stdout.startswith("Usage: pyqsd [options]\n")


def test_help_to_nobody(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*argv_of("pyqsd"), "--help"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr == "pyqsd: cannot write to standard output: No space left on device\n"


# --- the process ID file --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_pidfile(kind: str, workdir: Path) -> None:
    pidfile = workdir / "daemon.pid"
    with DaemonProcess(kind, ["--pidfile", "daemon.pid"], workdir=workdir) as daemon:
        poll(pidfile.exists, "the process ID file")
        poll(lambda: pidfile.read_text() == f"{daemon.pid}\n", "its content")
        assert pidfile.stat().st_mode & 0o777 == 0o600
        with open(pidfile, "r+") as file, pytest.raises(BlockingIOError):
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Nobody else can use it: neither a daemon of the same kind nor one of the other.
        for other in KINDS:
            second = run_to_end(other, ["--pidfile", str(pidfile)], workdir=workdir)
            assert second.returncode == 1
            assert second.stderr.endswith(
                ": cannot create PID file: Cannot lock pid file: Resource temporarily unavailable\n"
            )
        assert pidfile.read_text() == f"{daemon.pid}\n"
    assert not pidfile.exists()


def test_pidfile_left_by_a_crash_is_used_again(workdir: Path) -> None:
    pidfile = workdir / "daemon.pid"
    pidfile.write_text("123456789012\nand more\n")
    with DaemonProcess("pyqsd", ["--pidfile", "daemon.pid"], workdir=workdir) as daemon:
        poll(lambda: pidfile.read_text() == f"{daemon.pid}\n", "the process ID file")


def test_pidfile_of_somebody_else_is_not_removed(workdir: Path) -> None:
    pidfile = workdir / "daemon.pid"
    with DaemonProcess("pyqsd", ["--pidfile", "daemon.pid"], workdir=workdir) as daemon:
        poll(lambda: pidfile.exists() and pidfile.read_text() == f"{daemon.pid}\n", "the process ID file")
        pidfile.unlink()
        pidfile.write_text("somebody else\n")
    assert pidfile.read_text() == "somebody else\n"


def test_pidfile_says_that_all_is_up(workdir: Path) -> None:
    with DaemonProcess("pyqsd", [*SERVED, "--pidfile", "daemon.pid"], workdir=workdir, qmp=False):
        poll((workdir / "daemon.pid").exists, "the process ID file")
        assert "8388608" in peers.run("nbdinfo", "nbd+unix:///disk?socket=nbd.sock", cwd=workdir).stdout


# --- the background -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_daemonize(kind: str, workdir: Path, reap: Callable[[int], None]) -> None:
    argv = [*argv_of(kind), *SERVED, "--pidfile", "daemon.pid", "--daemonize"]
    argv += ["--chardev", "socket,id=m,path=qmp.sock,server=on,wait=off", "--monitor", "m"]
    done = subprocess.run(argv, cwd=workdir, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    # When the command returns, everything is up: no waiting here.
    pid = int((workdir / "daemon.pid").read_text())
    reap(pid)
    assert "8388608" in peers.run("nbdinfo", "nbd+unix:///disk?socket=nbd.sock", cwd=workdir).stdout
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (0, 1, 2)} == {"/dev/null"}
    assert os.getsid(pid) not in (pid, os.getsid(0))
    assert "Umask:\t0027" in Path(f"/proc/{pid}/status").read_text()
    with QmpClient(workdir / "qmp.sock") as qmp:
        qmp.execute("quit")
        poll(lambda: gone(pid), "its end")
    assert not (workdir / "daemon.pid").exists()


def test_daemonize_tells_of_a_mistake(workdir: Path) -> None:
    done = run_to_end("pyqsd", ["--daemonize", *SERVED, "--export", "nbd,id=e,node-name=q"], workdir=workdir)
    assert done.returncode == 1
    assert done.stderr == "pyqsd: --export nbd,id=e,node-name=q: Block export id 'e' is already in use\n"
    # And the image is free again.
    images.io(workdir / "disk.qcow2", "write -P 1 0 64k")


def test_daemonize_does_not_hold_the_pipes_of_its_caller(workdir: Path, reap: Callable[[int], None]) -> None:
    """`$(pyqsd --daemonize …)` in a shell waits for the end of the pipe."""
    script = " ".join(argv_of("pyqsd")) + " --daemonize --pidfile daemon.pid --blockdev null-co,node-name=a"
    output = subprocess.run(
        ["sh", "-c", f'x=$({script}); echo "[$x]"'], cwd=workdir, capture_output=True, text=True, timeout=30, check=True
    )
    reap(pid := int((workdir / "daemon.pid").read_text()))
    assert output.stdout == "[]\n"
    os.kill(pid, signal.SIGTERM)
    poll(lambda: gone(pid), "its end")


# --- the end --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
def test_signals_end_it_cleanly(number: int, workdir: Path) -> None:
    daemon = DaemonProcess("pyqsd", [*SERVED, "--pidfile", "daemon.pid"], workdir=workdir)
    with daemon:
        poll((workdir / "daemon.pid").exists, "the start")
        peers.run("qemu-io", "-f", "raw", "-c", "write -P 5 1M 64k", "nbd+unix:///disk?socket=nbd.sock", cwd=workdir)
        assert daemon.terminate(number) == 0
        assert daemon.stderr == ""
    assert sorted(path.name for path in workdir.iterdir()) == ["disk.qcow2", "raw.img", "stderr.pyqsd"]
    images.check(workdir / "disk.qcow2")
    images.io(workdir / "disk.qcow2", "read -P 5 1M 64k")


def test_quit(workdir: Path) -> None:
    with DaemonProcess("pyqsd", SERVED, workdir=workdir) as daemon:
        daemon.qmp.send({"execute": "quit"})
        # As with QSD: the reply, the export's end, the end of the connection.
        messages = []
        try:
            while True:
                messages.append(daemon.qmp.message())
        except EOFError:
            pass
        assert {"return": {}} in messages
        assert any(message.get("event") == "BLOCK_EXPORT_DELETED" for message in messages)
        assert daemon.wait() == 0
        daemon.ended_by_test = True
        assert daemon.stderr == ""
    assert not (workdir / "nbd.sock").exists() and not (workdir / "qmp.sock").exists()


def test_more_signals_do_not_break_the_end(workdir: Path) -> None:
    """Signals rain down while it ends with dirty metadata: still status 0 and a clean image."""
    daemon = DaemonProcess("pyqsd", SERVED, workdir=workdir)
    with daemon:
        peers.run("qemu-io", "-f", "raw", "-c", "write -P 5 0 4M", "nbd+unix:///disk?socket=nbd.sock", cwd=workdir)
        while daemon.running:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                daemon.send_signal(number)
        assert daemon.wait() == 0
        daemon.ended_by_test = True
        assert daemon.stderr == ""
    images.check(workdir / "disk.qcow2")


def test_end_with_clients_that_do_nothing(workdir: Path) -> None:
    """Connected NBD and QMP clients that neither read nor leave do not hold it up."""
    daemon = DaemonProcess("pyqsd", SERVED, workdir=workdir)
    with daemon, socket.socket(socket.AF_UNIX) as nbd:
        nbd.connect(str(workdir / "nbd.sock"))
        begin = time.monotonic()
        assert daemon.terminate() == 0
        assert time.monotonic() - begin < 10


def test_signal_while_a_chardev_waits_for_its_client(workdir: Path) -> None:
    with DaemonProcess(
        "pyqsd", ["--chardev", "socket,id=a,path=a.sock,server=on,wait=on"], workdir=workdir, qmp=False
    ) as daemon:
        poll((workdir / "a.sock").exists, "the socket")
        assert daemon.terminate() == 0
        assert not DIRT.search(daemon.stderr)
    assert not (workdir / "a.sock").exists()


@pytest.mark.parametrize("delay", [0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3])
def test_ctrl_c_during_the_start_has_no_traceback(delay: float, workdir: Path) -> None:
    """At any moment of the start, from our first line on."""
    process = subprocess.Popen([*argv_of("pyqsd"), *SERVED], cwd=workdir, stderr=subprocess.PIPE, text=True)
    caught_before = False

    def began() -> bool:
        nonlocal caught_before
        caught = Path(f"/proc/{process.pid}/status").read_text()
        bits = int(re.search(r"SigCgt:\s*(\w+)", caught)[1], 16)  # type: ignore[index]
        is_caught = bool(bits & 1 << signal.SIGINT - 1)
        over = caught_before and not is_caught
        caught_before = caught_before or is_caught
        # On a busy machine that moment may pass between two looks.
        return over or (workdir / "nbd.sock").exists()

    poll(began, "our first line", interval=0.0005)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode in (0, -signal.SIGINT)
    assert stderr == ""
    assert not (workdir / "nbd.sock").exists()


# --- the order of things --------------------------------------------------------------------------


def test_nobody_is_served_before_the_end_of_the_command_line(workdir: Path) -> None:
    """A client that connects as soon as the socket is there gets the export, though that is made much later."""
    nodes = [word for n in range(30) for word in ("--blockdev", f"null-co,node-name=n{n}")]
    argv = [*argv_of("pyqsd"), "--nbd-server", "addr.type=unix,addr.path=nbd.sock", *nodes, *SERVED[:2], *SERVED[4:]]
    process = subprocess.Popen(argv, cwd=workdir)
    try:

        def connect() -> socket.socket | None:
            client = socket.socket(socket.AF_UNIX)
            try:
                client.connect(str(workdir / "nbd.sock"))
            except OSError:
                client.close()
                return None
            return client

        with poll(connect, "the socket", interval=0.0005) as client:
            client.settimeout(10)
            client.sendall(b"\0\0\0\3" + b"IHAVEOPT" + b"\0\0\0\1\0\0\0\4disk")
            received = b""
            while len(received) < 18 + 10:
                data = client.recv(4096)
                assert data, "the export was not there"
                received += data
        assert int.from_bytes(received[18:26], "big") == 8 * MiB
    finally:
        process.terminate()
        assert process.wait(30) == 0


def test_monitor_commands_wait_for_the_end_of_the_command_line(workdir: Path) -> None:
    nodes = [word for n in range(30) for word in ("--blockdev", f"null-co,node-name=n{n}")]
    argv = [*argv_of("pyqsd"), "--chardev", "socket,id=m,path=q.sock,server=on,wait=off", "--monitor", "m", *nodes]
    process = subprocess.Popen(argv, cwd=workdir)
    try:

        def connect() -> QmpClient | None:
            try:
                return QmpClient(workdir / "q.sock")
            except (FileNotFoundError, ConnectionRefusedError):
                return None

        with poll(connect, "the socket", interval=0.0005) as qmp:
            assert len(qmp.execute("query-named-block-nodes")) == 30
    finally:
        process.terminate()
        assert process.wait(30) == 0


# --- sockets from the outside ---------------------------------------------------------------------


def test_passed_listening_socket(workdir: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(workdir / "passed.sock"))
        listener.listen()
        fd = listener.fileno()
        args = [*SERVED[:2], "--nbd-server", f"addr.type=fd,addr.str={fd}", *SERVED[4:]]
        with DaemonProcess("pyqsd", args, workdir=workdir, pass_fds=[fd]):
            assert "8388608" in peers.run("nbdinfo", "nbd+unix:///disk?socket=passed.sock", cwd=workdir).stdout


# --- the two command lines that the project began with --------------------------------------------


def test_raw_image_over_a_unix_socket(workdir: Path) -> None:
    args = ["--blockdev", "driver=file,node-name=disk,filename=raw.img"]
    args += ["--nbd-server", "addr.type=unix,addr.path=nbd.sock"]
    args += ["--export", "type=nbd,id=export,node-name=disk,writable=on"]
    with DaemonProcess("pyqsd", args, workdir=workdir, qmp=False):
        poll((workdir / "nbd.sock").exists, "the socket")
        uri = "nbd+unix:///disk?socket=nbd.sock"
        info = json.loads(peers.run("nbdinfo", "--json", uri, cwd=workdir).stdout)
        assert info["exports"][0]["export-size"] == 8 * MiB
        peers.run("qemu-io", "-f", "raw", "-c", "write -P 66 1M 1M", "-c", "flush", uri, cwd=workdir)
    content = (workdir / "raw.img").read_bytes()
    assert content[MiB : 2 * MiB] == b"\x42" * MiB and not any(content[:MiB]) and len(content) == 8 * MiB


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def test_qcow2_image_over_tcp_in_the_background(workdir: Path, reap: Callable[[int], None]) -> None:
    port = free_port()
    argv = [*argv_of("pyqsd"), "--chardev", "socket,id=char1,path=qsd-qmp.sock,server=on,wait=off"]
    argv += ["--monitor", "chardev=char1"]
    argv += ["--blockdev", "driver=qcow2,node-name=q,file.driver=file,file.filename=disk.qcow2"]
    argv += ["--nbd-server", f"addr.type=inet,addr.host=127.0.0.1,addr.port={port},max-connections=8"]
    argv += ["--export", "nbd,id=e,node-name=q,name=disk,writable=on", "--pidfile", "qsd.pid", "--daemonize"]
    assert subprocess.run(argv, cwd=workdir, timeout=30, check=False).returncode == 0
    reap(pid := int((workdir / "qsd.pid").read_text()))
    uri = f"nbd://127.0.0.1:{port}/disk"
    assert "8388608" in peers.run("nbdinfo", uri).stdout
    peers.run("qemu-io", "-f", "raw", "-c", "write -P 66 1M 1M", "-c", "read -P 0 0 1M", uri)
    # socat, as people use it.
    text = '{"execute":"qmp_capabilities"}{"execute":"query-block-exports","id":1}'
    lines = peers.run("socat", "-t5", "-", "UNIX-CONNECT:qsd-qmp.sock", cwd=workdir, stdin=text.encode()).stdout
    replies: list[dict[str, Any]] = [json.loads(line) for line in lines.splitlines()]
    assert "QMP" in replies[0] and replies[1] == {"return": {}}
    assert replies[2] == {
        "return": [{"id": "e", "type": "nbd", "node-name": "q", "shutting-down": False}],
        "id": 1,
    }
    os.kill(pid, signal.SIGTERM)
    poll(lambda: gone(pid), "its end")
    images.check(workdir / "disk.qcow2")
    images.io(workdir / "disk.qcow2", "read -P 66 1M 1M")
    assert not (workdir / "qsd.pid").exists() and not (workdir / "qsd-qmp.sock").exists()


def test_qemu_qmp_library(workdir: Path) -> None:
    """The client library of the field (PyPI: qemu.qmp)."""
    script = """
import asyncio, sys
from qemu.qmp import QMPClient
async def main():
    client = QMPClient("test")
    await client.connect("q.sock")
    print(await client.execute("query-block-exports"))
    with client.listener("BLOCK_EXPORT_DELETED") as listener:
        await client.execute("block-export-del", {"id": "e"})
        async for event in listener:
            print(event["data"])
            break
    await client.disconnect()
asyncio.run(main())
"""
    args = [*SERVED, "--chardev", "socket,id=m,path=q.sock,server=on,wait=off", "--monitor", "m"]
    with DaemonProcess("pyqsd", args, workdir=workdir):
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=workdir, capture_output=True, text=True, timeout=30, check=True
        )
        assert done.stdout.splitlines()[-1] == "{'id': 'e'}" and "'node-name': 'q'" in done.stdout
