"""Socket chardevs, with real sockets at the other end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from pyqsd.chardev import stream
from pyqsd.chardev.chardev import Chardev, Chardevs
from pyqsd.chardev.options import ChardevBackend
from pyqsd.qapi.convert import convert
from pyqsd.qapi.errors import Error
from tests.chardev.frontend import Recorder, run, until
from tests.support import peers


def backend(**data: Any) -> ChardevBackend:
    wire = {key.replace("_", "-"): value for key, value in data.items()}
    return convert({"type": "socket", "data": wire}, ChardevBackend)


def unix(path: Path | str, **members: Any) -> dict[str, Any]:
    return {"type": "unix", "data": {"path": str(path), **members}}


def inet(host: str = "127.0.0.1", port: str = "0", **members: Any) -> dict[str, Any]:
    return {"type": "inet", "data": {"host": host, "port": port, **members}}


async def server(chardevs: Chardevs, path: Path, label: str = "a") -> Chardev:
    return await chardevs.add(label, backend(addr=unix(path)))


def test_talks_and_ends(tmp_path: Path) -> None:
    async def body() -> None:
        chardevs = Chardevs()
        path = tmp_path / "s"
        chardev = await server(chardevs, path)
        frontend = Recorder(chardev)
        assert stat.S_ISSOCK(path.stat().st_mode)
        assert chardev.filename() == f"disconnected:unix:{path},server=on"
        chardev.write(b"nobody hears this")
        reader, writer = await asyncio.open_unix_connection(path)
        await frontend.wait_log("opened")
        assert chardev.filename() == f"unix:{path},server=on"
        chardev.write(b"one ")
        chardev.write(b"two")
        assert await reader.readexactly(7) == b"one two"
        writer.write(b"three")
        await frontend.wait_data(b"three")
        writer.close()
        await frontend.wait_log("opened", "closed")
        assert chardev.filename() == f"disconnected:unix:{path},server=on"
        reader, writer = await asyncio.open_unix_connection(path)
        await frontend.wait_log("opened", "closed", "opened")
        chardev.write(b"last words")
        await chardevs.close_all()
        assert await reader.read() == b"last words"
        writer.close()
        assert not path.exists()
        assert frontend.log == ["opened", "closed", "opened"]  # nobody is told any more

    run(body())


def test_what_is_written_in_one_turn_goes_out_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        chardevs = Chardevs()
        chardev = await server(chardevs, tmp_path / "s")
        frontend = Recorder(chardev)
        _, writer = await asyncio.open_unix_connection(tmp_path / "s")
        await frontend.wait_log("opened")
        sizes: list[int] = []
        writev = os.writev

        def counted(fd: int, parts: list[Any]) -> int:
            sent = writev(fd, parts)
            sizes.append(sent)
            return sent

        monkeypatch.setattr(os, "writev", counted)
        for _ in range(100):
            chardev.write(b"0123456789")
        await until(lambda: sum(sizes) == 1000)
        assert sizes == [1000]
        writer.close()
        await chardevs.close_all()

    run(body())


def test_one_client_at_a_time(tmp_path: Path) -> None:
    async def body() -> None:
        chardevs = Chardevs()
        chardev = await server(chardevs, tmp_path / "s")
        frontend = Recorder(chardev)
        _, first = await asyncio.open_unix_connection(tmp_path / "s")
        reader, second = await asyncio.open_unix_connection(tmp_path / "s")
        second.write(b"later")
        first.write(b"first")
        await frontend.wait_data(b"first")
        chardev.write(b"x")
        first.close()
        await frontend.wait_data(b"later")
        await frontend.wait_log("opened", "closed", "opened")
        chardev.write(b"now")
        assert await reader.readexactly(3) == b"now"
        second.close()
        await chardevs.close_all()

    run(body())


def test_nothing_is_read_without_a_frontend(tmp_path: Path) -> None:
    async def body() -> None:
        chardevs = Chardevs()
        chardev = await server(chardevs, tmp_path / "s")
        _, writer = await asyncio.open_unix_connection(tmp_path / "s")
        writer.write(b"early words")
        await until(lambda: chardev.is_open)
        assert chardev.filename().startswith("unix:")
        frontend = Recorder(chardev)
        assert frontend.log == ["opened"]
        await frontend.wait_data(b"early words")
        with pytest.raises(Error, match="chardev 'a' is already in use"):
            Recorder(chardev)
        with pytest.raises(Error, match="Chardev 'a' is busy"):
            await chardevs.remove("a")
        chardev.detach()
        writer.write(b"unread")
        writer.close()
        # A client that goes makes room for the next one even so.
        await until(lambda: not chardev.is_open)
        _, writer = await asyncio.open_unix_connection(tmp_path / "s")
        await until(lambda: chardev.is_open)
        writer.close()
        await chardevs.remove("a")
        assert not (tmp_path / "s").exists()

    run(body())


def test_pause(tmp_path: Path) -> None:
    async def body() -> None:
        chardevs = Chardevs()
        chardev = await server(chardevs, tmp_path / "s")
        frontend = Recorder(chardev)
        _, writer = await asyncio.open_unix_connection(tmp_path / "s")
        await frontend.wait_log("opened")
        chardev.pause_reading()
        writer.write(b"abc")
        writer.close()
        await writer.wait_closed()
        for _ in range(20):
            await asyncio.sleep(0)
        # What was sent before the end is not lost, although the client has gone already.
        assert (frontend.data, frontend.log) == (b"", ["opened"])
        chardev.resume_reading()
        await frontend.wait_data(b"abc")
        await frontend.wait_log("opened", "closed")
        await chardevs.close_all()

    run(body())


def test_a_client_that_does_not_read_is_not_read_either(tmp_path: Path) -> None:
    async def body() -> None:
        chardevs = Chardevs()
        chardev = await server(chardevs, tmp_path / "s")
        frontend = Recorder(chardev)
        peer = socket.socket(socket.AF_UNIX)
        peer.connect(str(tmp_path / "s"))
        await frontend.wait_log("opened")
        block = os.urandom(64 * 1024)
        sent = 0
        while not chardev.pressed:
            chardev.write(block)
            sent += len(block)
            await asyncio.sleep(0)
        assert sent < stream.HIGH_WATER + (4 << 20)
        peer.send(b"a request")
        for _ in range(20):
            await asyncio.sleep(0)
        assert frontend.data == b""
        received = await asyncio.to_thread(read_exactly, peer, sent)
        assert received == block * (sent // len(block))
        await frontend.wait_data(b"a request")
        assert not chardev.pressed
        peer.close()
        await chardevs.close_all()

    run(body())


def read_exactly(peer: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = peer.recv(1 << 20)
        assert part
        data += part
    return bytes(data)


def test_a_client_that_never_reads_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stream, "LIMIT", 1 << 20)

    async def body() -> None:
        chardevs = Chardevs()
        chardev = await server(chardevs, tmp_path / "s")
        frontend = Recorder(chardev)
        peer = socket.socket(socket.AF_UNIX)
        peer.connect(str(tmp_path / "s"))
        await frontend.wait_log("opened")
        for _ in range(200):
            chardev.write(bytes(64 * 1024))
        await frontend.wait_log("opened", "closed")
        peer.close()
        # The next one is served.
        _, writer = await asyncio.open_unix_connection(tmp_path / "s")
        await frontend.wait_log("opened", "closed", "opened")
        writer.close()
        await chardevs.close_all()

    run(body())
    assert "the peer does not read" in caplog.text


def test_a_stale_socket_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    async def body() -> None:
        chardevs = Chardevs()
        path = tmp_path / "s"
        stale = socket.socket(socket.AF_UNIX)
        stale.bind(str(path))
        stale.close()
        await server(chardevs, path)
        _, writer = await asyncio.open_unix_connection(path)
        writer.close()
        data = tmp_path / "disk.img"
        data.write_bytes(b"the only copy")
        with pytest.raises(Error, match=r"Failed to unlink socket .*/disk.img: it is not a socket"):
            await server(chardevs, data, "b")
        assert data.read_bytes() == b"the only copy"
        with pytest.raises(Error, match=r"Failed to unlink socket .*: Is a directory"):
            await server(chardevs, tmp_path, "b")
        # Somebody else's socket of the same name stays at the end.
        path.unlink()
        other = socket.socket(socket.AF_UNIX)
        other.bind(str(path))
        await chardevs.close_all()
        assert path.exists()
        other.close()

    run(body())


def test_relative_path_is_removed_after_chdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        chardevs = Chardevs()
        monkeypatch.chdir(tmp_path)
        await server(chardevs, Path("s"))
        assert (tmp_path / "s").exists()
        monkeypatch.chdir("/")
        await chardevs.close_all()
        assert not (tmp_path / "s").exists()

    run(body())


@pytest.mark.parametrize("tight", [True, False])
def test_abstract(tight: bool) -> None:
    async def body() -> None:
        chardevs = Chardevs()
        name = f"pyqsd-test-{os.getpid()}"
        chardev = await chardevs.add("a", backend(addr=unix(name, abstract=True, tight=tight)))
        frontend = Recorder(chardev)
        shown = f"unix:{name},abstract=on" + (",tight=on" if tight else "")
        assert chardev.filename() == f"disconnected:{shown},server=on"
        wire = {"type": "unix", "path": name, "abstract": True, "tight": tight}
        assert chardev.qom_get("addr") == wire
        raw = b"\0" + name.encode()
        peer = socket.socket(socket.AF_UNIX)
        peer.connect(raw if tight else raw.ljust(108, b"\0"))
        await frontend.wait_log("opened")
        assert chardev.filename() == "unix:,server=on"
        client = await chardevs.add("b", backend(addr=unix(name, abstract=True, tight=tight), server=False))
        assert client.is_open  # it waits in the queue
        peer.close()
        await frontend.wait_log("opened", "closed", "opened")
        await chardevs.close_all()

    run(body())


def test_too_long_a_path(tmp_path: Path) -> None:
    async def body() -> None:
        chardevs = Chardevs()
        path = f"{tmp_path}/" + "a" * 120
        for server_ in (True, False):
            with pytest.raises(Error) as caught:
                await chardevs.add("a", backend(addr=unix(path), server=server_))
            assert caught.value.desc == f"UNIX socket path '{path}' is too long"
            assert caught.value.hint == "Path must be less than 108 bytes"

    run(body())


def test_tcp() -> None:
    async def body() -> None:
        chardevs = Chardevs()
        chardev = await chardevs.add("a", backend(addr=inet(**{"keep-alive": True}), nodelay=True))
        frontend = Recorder(chardev)
        address = chardev.qom_get("addr")
        port = address["port"]
        assert address == {"type": "inet", "host": "127.0.0.1", "port": port, "ipv4": True}
        assert chardev.filename() == f"disconnected:tcp:127.0.0.1:{port},server=on"
        client = await chardevs.add("c", backend(addr=inet(port=port), server=False))
        other = Recorder(client)
        await frontend.wait_log("opened")
        assert chardev.qom_get("connected") is client.qom_get("connected") is True
        here = client.filename().split()[0].removeprefix("tcp:")
        assert client.filename() == f"tcp:{here} <-> 127.0.0.1:{port}"
        assert chardev.filename() == f"tcp:127.0.0.1:{port},server=on <-> {here}"
        client.write(b"ping")
        await frontend.wait_data(b"ping")
        chardev.write(b"pong")
        await other.wait_data(b"pong")
        # The next port, if one may be taken.
        with pytest.raises(Error, match="Failed to find an available port: Address already in use"):
            await chardevs.add("d", backend(addr=inet(port=port)))
        second = await chardevs.add("d", backend(addr=inet(port=port, to=min(int(port) + 50, 65535))))
        assert int(second.qom_get("addr")["port"]) > int(port)
        await chardevs.remove("d")
        client.detach()
        await chardevs.remove("c")
        await frontend.wait_log("opened", "closed")
        await chardevs.close_all()
        with pytest.raises(Error, match=f"Failed to connect to '127.0.0.1:{port}': Connection refused"):
            await chardevs.add("c", backend(addr=inet(port=port), server=False))

    run(body())


def test_every_address_of_no_host_is_listened_on() -> None:
    async def body() -> None:
        chardevs = Chardevs()
        chardev = await chardevs.add("a", backend(addr=inet(host="", port="0")))
        frontend = Recorder(chardev)
        sockets = chardev._listener.sockets  # type: ignore[attr-defined]
        assert {sock.family for sock in sockets} == {socket.AF_INET, socket.AF_INET6}
        for sock in sockets:
            host = "127.0.0.1" if sock.family == socket.AF_INET else "::1"
            log = len(frontend.log)
            _, writer = await asyncio.open_connection(host, sock.getsockname()[1])
            await frontend.wait(lambda log=log: len(frontend.log) == log + 1)
            writer.close()
            await frontend.wait(lambda log=log: len(frontend.log) == log + 2)
        await chardevs.close_all()

    run(body())


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ({"ipv4": False, "ipv6": False}, "Cannot disable IPv4 and IPv6 at same time"),
        (
            {"host": "::1", "ipv4": True},
            "address resolution failed for ::1:0: Address family for hostname not supported",
        ),
        ({"port": "nosuch"}, "address resolution failed for 127.0.0.1:nosuch: Servname not supported for ai_socktype"),
        (
            {"host": "localhost", "numeric": True},
            "address resolution failed for localhost:0: Name or service not known",
        ),
        ({"host": "", "port": ""}, "address resolution failed for :: Name or service not known"),
        ({"host": "192.0.2.1"}, "Failed to bind socket: Cannot assign requested address"),
    ],
)
def test_tcp_mistakes(members: dict[str, Any], text: str) -> None:
    async def body() -> None:
        with pytest.raises(Error) as caught:
            await Chardevs().add("a", backend(addr=inet(**members)))
        assert caught.value.desc == text

    run(body())


def test_descriptors(tmp_path: Path) -> None:
    async def body() -> None:
        chardevs = Chardevs()
        ours, theirs = socket.socketpair()
        number = ours.detach()
        chardev = await chardevs.add_from_command_line(f"socket,id=a,fd={number}")
        frontend = Recorder(chardev)
        assert (frontend.log, chardev.filename()) == (["opened"], "unix:")
        assert not os.get_inheritable(number)
        theirs.send(b"hello")
        await frontend.wait_data(b"hello")
        theirs.close()
        await frontend.wait_log("opened", "closed")
        assert chardev.filename() == f"disconnected:fd:{number}"

        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(tmp_path / "s"))
        number = listening.detach()
        chardev = await chardevs.add_from_command_line(f"socket,id=b,fd={number},server=on,wait=off")
        frontend = Recorder(chardev)
        assert chardev.filename() == f"disconnected:unix:{tmp_path}/s,server=on"
        _, writer = await asyncio.open_unix_connection(tmp_path / "s")
        await frontend.wait_log("opened")
        writer.close()
        await chardevs.close_all()
        # It was made by somebody else.
        assert (tmp_path / "s").exists()

        file = os.open(tmp_path, os.O_RDONLY)
        for text, message in {
            str(file): f"File descriptor '{file}' is not a socket",
            "999": "File descriptor '999' is not a socket",
            "x": "Unable to parse FD number x",
            "99999999999": "Unable to parse FD number 99999999999: Numerical result out of range",
        }.items():
            with pytest.raises(Error) as caught:
                await chardevs.add_from_command_line(f"socket,id=c,fd={text}")
            assert caught.value.desc == message
        os.fstat(file)  # it is still open
        os.close(file)
        with pytest.raises(Error, match="only QEMU supports file descriptor passing"):
            await chardevs.add("c", backend(addr={"type": "fd", "data": {"str": "0"}}))

    run(body())


def test_client_comes_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        chardevs = Chardevs()
        path = tmp_path / "s"
        client = await chardevs.add("c", backend(addr=unix(path), server=False, reconnect_ms=10))
        frontend = Recorder(client)
        assert client.filename() == f"disconnected:unix:{path}"
        await until(lambda: len(caplog.records) == 1)
        for round_ in range(2):
            await server(chardevs, path, "s")
            await frontend.wait_log(*["opened", "closed"] * round_, "opened")
            assert client.filename() == f"unix:{path}"
            await chardevs.remove("s")
            await frontend.wait_log(*["opened", "closed"] * (round_ + 1))
            await until(lambda round_=round_: len(caplog.records) == round_ + 2)
        await chardevs.close_all()

    run(body())
    # Once for each time that the connection was lost, not once for each try.
    message = f"Unable to connect character device c: Failed to connect to '{tmp_path}/s': No such file or directory"
    assert [record.getMessage() for record in caplog.records] == [message] * 3


def test_without_reconnect_a_client_is_gone_for_good(tmp_path: Path) -> None:
    async def body() -> None:
        chardevs = Chardevs()
        with pytest.raises(Error, match=r"Failed to connect to '.*/s': No such file or directory"):
            await chardevs.add("c", backend(addr=unix(tmp_path / "s"), server=False))
        assert list(chardevs) == []
        other = await server(chardevs, tmp_path / "s", "s")
        client = await chardevs.add("c", backend(addr=unix(tmp_path / "s"), server=False))
        frontend = Recorder(client)
        await until(lambda: other.is_open)
        await chardevs.remove("s")
        await frontend.wait_log("opened", "closed")
        await chardevs.close_all()

    run(body())


def test_wait_for_the_first_client(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        chardevs = Chardevs()
        caplog.set_level("INFO")
        adding = asyncio.create_task(chardevs.add("a", backend(addr=unix(tmp_path / "s"), wait=True)))
        await until((tmp_path / "s").exists)
        with pytest.raises(Error, match="attempt to add duplicate property 'a'"):
            await chardevs.add("a", backend(addr=unix(tmp_path / "t")))
        assert not adding.done() and chardevs.get("a") is None
        _, writer = await asyncio.open_unix_connection(tmp_path / "s")
        chardev = await adding
        assert chardev.is_open and chardevs.get("a") is chardev
        assert f"QEMU waiting for connection on: disconnected:unix:{tmp_path}/s,server=on" in caplog.text
        writer.close()
        await chardevs.close_all()
        # Whoever waits can be told to give up.
        adding = asyncio.create_task(chardevs.add("a", backend(addr=unix(tmp_path / "s"), wait=True)))
        await until((tmp_path / "s").exists)
        adding.cancel()
        with pytest.raises(asyncio.CancelledError):
            await adding
        assert not (tmp_path / "s").exists()

    run(body())


@pytest.mark.parametrize(
    ("cid", "port", "what"),
    [("x", "1", "cid 'x'"), ("1", "", "port ''"), ("9" * 5000, "1", "cid '999"), ("-1", "1", "cid")],
)
def test_vsock_mistakes(cid: str, port: str, what: str) -> None:
    async def body() -> None:
        for server_ in (True, False):
            with pytest.raises(Error) as caught:
                address = {"type": "vsock", "data": {"cid": cid, "port": port}}
                await Chardevs().add("a", backend(addr=address, server=server_))
            assert caught.value.desc.startswith(f"Failed to parse {what}")

    run(body())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"server": False, "wait": True}, "'wait' option is incompatible with socket in client connect mode"),
        ({"reconnect": 1}, "'reconnect' option is incompatible with socket in server listen mode"),
        (
            {"server": False, "reconnect": 1, "reconnect_ms": 1},
            "'reconnect' and 'reconnect-ms' are mutually exclusive",
        ),
        ({"tls_creds": "t"}, "No TLS credentials with id 't'"),
        ({"tls_authz": "t"}, "'tls_authz' option requires 'tls_creds' option"),
        ({"server": False, "websocket": True}, "Websocket client is not implemented"),
        ({"websocket": True}, "chardev: socket: 'websocket' is not supported"),
        ({"telnet": True}, "chardev: socket: 'telnet' is not supported"),
        ({"tn3270": True}, "chardev: socket: 'tn3270' is not supported"),
    ],
)
def test_options_that_are_refused(tmp_path: Path, options: dict[str, Any], text: str) -> None:
    async def body() -> None:
        with pytest.raises(Error) as caught:
            await Chardevs().add("a", backend(addr=unix(tmp_path / "s"), **options))
        assert caught.value.desc == text

    run(body())
    assert list(tmp_path.iterdir()) == []


def test_log(tmp_path: Path) -> None:
    async def body() -> None:
        chardevs = Chardevs()
        log = tmp_path / "log"
        log.write_bytes(b"old ")
        for append, before in ((True, b"old "), (False, b"")):
            chardev = await chardevs.add("a", backend(addr=unix(tmp_path / "s"), logfile=str(log), logappend=append))
            frontend = Recorder(chardev)
            reader, writer = await asyncio.open_unix_connection(tmp_path / "s")
            await frontend.wait_log("opened")
            chardev.write(b"said")
            assert await reader.readexactly(4) == b"said"
            writer.write(b"heard")
            await frontend.wait_data(b"heard")
            writer.close()
            await chardevs.close_all()
            assert log.read_bytes() == before + b"said"
        with pytest.raises(Error, match="Could not create '/nonexistent/log': No such file or directory"):
            await chardevs.add("a", backend(addr=unix(tmp_path / "s"), logfile="/nonexistent/log"))
        os.mkfifo(tmp_path / "fifo")
        with pytest.raises(Error, match=r"Could not create '.*/fifo': No such device or address"):
            await chardevs.add("a", backend(addr=unix(tmp_path / "s"), logfile=str(tmp_path / "fifo")))

    run(body())


def test_no_descriptors_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that cannot be accepted is accepted later."""

    async def body() -> None:
        chardevs = Chardevs()
        chardev = await server(chardevs, tmp_path / "s")
        frontend = Recorder(chardev)
        calls = 0
        accept = socket.socket.accept

        def failing(self: socket.socket) -> Any:
            nonlocal calls
            calls += 1
            if calls == 1:
                raise OSError(24, "Too many open files")
            return accept(self)

        monkeypatch.setattr(socket.socket, "accept", failing)
        peer = socket.socket(socket.AF_UNIX)
        peer.connect(str(tmp_path / "s"))
        await frontend.wait_log("opened")
        assert calls == 2
        peer.close()
        await chardevs.close_all()

    run(body())


def test_vanishing_clients(tmp_path: Path) -> None:
    """Clients that come and go at once, from another thread, while the chardev writes."""

    async def body() -> None:
        chardevs = Chardevs()
        chardev = await server(chardevs, tmp_path / "s")
        frontend = Recorder(chardev)

        def clients() -> None:
            for number in range(100):
                with socket.socket(socket.AF_UNIX) as peer:
                    peer.connect(str(tmp_path / "s"))
                    if number % 2:
                        peer.send(b"x")

        thread = threading.Thread(target=clients)
        thread.start()
        while frontend.log.count("closed") < 100:
            chardev.write(b"y" * 100)
            await asyncio.sleep(0)
        thread.join()
        assert frontend.log == ["opened", "closed"] * 100
        assert frontend.data == b"x" * 50
        fds = len(os.listdir("/proc/self/fd"))
        await chardevs.close_all()
        assert len(os.listdir("/proc/self/fd")) < fds

    run(body())


def test_socat(tmp_path: Path) -> None:
    async def body() -> None:
        chardevs = Chardevs()
        chardev = await server(chardevs, tmp_path / "s")
        frontend = Recorder(chardev)
        process = await asyncio.create_subprocess_exec(
            peers.require("socat"),
            "-",
            f"UNIX-CONNECT:{tmp_path}/s",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdin is not None and process.stdout is not None
        await frontend.wait_log("opened")
        data = os.urandom(300_000)
        process.stdin.write(data)
        await frontend.wait_data(data)
        chardev.write(data)
        assert await process.stdout.readexactly(len(data)) == data
        process.send_signal(signal.SIGTERM)
        await process.wait()
        await frontend.wait_log("opened", "closed")
        await chardevs.close_all()

    run(body())
