"""The backends other than sockets, with real files, pipes and terminals."""

from __future__ import annotations

import asyncio
import os
import select
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest

from pyqsd.chardev import commands, stream
from pyqsd.chardev.chardev import Chardev, Chardevs
from pyqsd.chardev.options import ChardevBackend
from pyqsd.qapi.convert import convert
from pyqsd.qapi.errors import Error
from tests.chardev.frontend import Recorder, run, until
from tests.support import peers


async def add(chardevs: Chardevs, kind: str, label: str = "a", **data: Any) -> Chardev:
    return await chardevs.add(label, convert({"type": kind, "data": data}, ChardevBackend))


# --- file -------------------------------------------------------------------------------------------------------------


def test_file(tmp_path: Path) -> None:
    async def body() -> None:
        chardevs = Chardevs()
        out, source = tmp_path / "out", tmp_path / "in"
        out.write_bytes(b"old ")
        source.write_bytes(os.urandom(10_000))
        for append, before in ((True, b"old "), (False, b"")):
            chardev = await add(chardevs, "file", **{"out": str(out), "in": str(source)}, append=append)
            frontend = Recorder(chardev, attach=False)
            assert chardev.filename() == "file"
            chardev.attach(frontend)
            chardev.pause_reading()
            for _ in range(20):
                await asyncio.sleep(0)
            assert frontend.data == b""
            chardev.resume_reading()
            await frontend.wait_data(source.read_bytes())
            await frontend.wait_log("opened", "closed")
            # What is read has an end; what is written does not.
            chardev.write(b"one ")
            chardev.write(b"two")
            await chardevs.close_all()
            assert out.read_bytes() == before + b"one two"

    run(body())


def test_file_that_cannot_be_opened(tmp_path: Path) -> None:
    async def body() -> None:
        chardevs = Chardevs()
        fds = len(os.listdir("/proc/self/fd"))
        with pytest.raises(Error, match="Could not open '/nonexistent/f': No such file or directory"):
            await add(chardevs, "file", out="/nonexistent/f")
        with pytest.raises(Error, match="Could not open '/nonexistent/f': No such file or directory"):
            await add(chardevs, "file", **{"out": str(tmp_path / "out"), "in": "/nonexistent/f"})
        os.mkfifo(tmp_path / "fifo")
        with pytest.raises(Error, match=r"Could not open '.*/fifo': No such device or address"):
            await add(chardevs, "file", out=str(tmp_path / "fifo"))
        assert len(os.listdir("/proc/self/fd")) == fds

    run(body())


def test_full_disk_does_not_matter() -> None:
    async def body() -> None:
        chardevs = Chardevs()
        chardev = await add(chardevs, "file", out="/dev/full")
        for _ in range(10):
            chardev.write(b"x" * 100_000)
            await asyncio.sleep(0)
        assert not chardev.pressed
        await chardevs.close_all()

    run(body())


# --- pipe -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("two", [True, False])
def test_pipe(tmp_path: Path, two: bool) -> None:
    async def body() -> None:
        chardevs = Chardevs()
        path = tmp_path / "p"
        names = [f"{path}.in", f"{path}.out"] if two else [str(path)]
        for name in names:
            os.mkfifo(name)
        chardev = await add(chardevs, "pipe", device=str(path))
        frontend = Recorder(chardev)
        assert (frontend.log, chardev.filename()) == (["opened"], "pipe")
        for text in (b"first", b"second"):
            # Writers come and go.
            fd = os.open(names[0], os.O_WRONLY | os.O_NONBLOCK)
            os.write(fd, text)
            os.close(fd)
            await frontend.wait_data(text)
        if two:
            fd = os.open(names[1], os.O_RDONLY | os.O_NONBLOCK)
            chardev.write(b"answer")
            await until(lambda: select.select([fd], [], [], 0)[0])
            assert os.read(fd, 100) == b"answer"
            os.close(fd)
        assert frontend.log == ["opened"]
        await chardevs.close_all()

    run(body())


def test_pipe_that_nobody_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Memory stays bounded, whole pieces are lost, and what is kept arrives once somebody reads."""
    monkeypatch.setattr(stream, "LIMIT", 1 << 20)

    async def body() -> None:
        chardevs = Chardevs()
        path = tmp_path / "p"
        os.mkfifo(f"{path}.in")
        os.mkfifo(f"{path}.out")
        chardev = await add(chardevs, "pipe", device=str(path))
        Recorder(chardev)
        for number in range(100_000):
            chardev.write(b"%09d\n" % number * 10)
        assert chardev.pressed
        lost = "character device a: nobody reads it, output is lost"
        assert [record.getMessage() for record in caplog.records] == [lost]
        assert chardev._stream._unsent_bytes <= 1 << 20  # type: ignore[attr-defined]
        fd = os.open(f"{path}.out", os.O_RDONLY | os.O_NONBLOCK)
        data = b""
        while chardev.pressed or select.select([fd], [], [], 0)[0]:
            try:
                data += os.read(fd, 1 << 16)
            except BlockingIOError:
                await asyncio.sleep(0)
        os.close(fd)
        await chardevs.close_all()
        lines = data.split(b"\n")
        assert len(lines) > 10_000 and lines[0] == b"%09d" % 0
        assert all(len(line) == 9 for line in lines[:-1])

    run(body())


def test_no_such_pipe(tmp_path: Path) -> None:
    async def body() -> None:
        fds = len(os.listdir("/proc/self/fd"))
        os.mkfifo(tmp_path / "p.in")
        with pytest.raises(Error, match=r"Could not open '.*/p': No such file or directory"):
            await add(Chardevs(), "pipe", device=str(tmp_path / "p"))
        assert len(os.listdir("/proc/self/fd")) == fds

    run(body())


# --- pty --------------------------------------------------------------------------------------------------------------


def test_pty(tmp_path: Path) -> None:
    async def body() -> None:
        chardevs = Chardevs()
        link = tmp_path / "link"
        chardev = await add(chardevs, "pty", path=str(link))
        name = chardev.reply()
        assert name is not None and os.readlink(link) == name
        assert chardev.filename() == f"pty:{name}"
        frontend = Recorder(chardev)
        assert frontend.log == []
        for round_ in range(2):
            slave = os.open(link, os.O_RDWR | os.O_NOCTTY)
            await frontend.wait_log(*["opened", "closed"] * round_, "opened")
            os.write(slave, b"hello\n")
            await frontend.wait_data(b"hello\n")
            chardev.write(b"raw\r\n\x03")
            await until(lambda slave=slave: select.select([slave], [], [], 0)[0])
            assert os.read(slave, 100) == b"raw\r\n\x03"
            os.close(slave)
            await frontend.wait_log(*["opened", "closed"] * (round_ + 1))
            chardev.write(b"nobody hears this")
        await chardevs.close_all()
        assert not link.is_symlink()

    run(body())


def test_pty_link_in_the_way(tmp_path: Path) -> None:
    async def body() -> None:
        chardevs = Chardevs()
        fds = len(os.listdir("/proc/self/fd"))
        (tmp_path / "link").write_bytes(b"data")
        with pytest.raises(Error, match="Failed to create PTY symlink: File exists"):
            await add(chardevs, "pty", path=str(tmp_path / "link"))
        assert (tmp_path / "link").read_bytes() == b"data"
        assert len(os.listdir("/proc/self/fd")) == fds
        # A link that is somebody else's by now stays.
        link = tmp_path / "other"
        await add(chardevs, "pty", path=str(link))
        link.unlink()
        link.symlink_to("elsewhere")
        await chardevs.close_all()
        assert os.readlink(link) == "elsewhere"

    run(body())


def test_pty_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    async def body() -> None:
        chardevs = Chardevs()
        chardev = await chardevs.add_from_command_line("pty,id=p")
        assert capsys.readouterr().out == f"char device redirected to {chardev.reply()} (label p)\n"
        await chardevs.close_all()

    run(body())


def test_pty_and_socat() -> None:
    async def body() -> None:
        chardevs = Chardevs()
        chardev = await add(chardevs, "pty")
        frontend = Recorder(chardev)
        process = await asyncio.create_subprocess_exec(
            peers.require("socat"), "-", f"{chardev.reply()},raw,echo=0", stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdin is not None and process.stdout is not None
        await frontend.wait_log("opened")
        process.stdin.write(b"to pyqsd")
        await frontend.wait_data(b"to pyqsd")
        chardev.write(b"to socat")
        assert await process.stdout.readexactly(8) == b"to socat"
        process.terminate()
        await process.wait()
        await frontend.wait_log("opened", "closed")
        await chardevs.close_all()

    run(body())


# --- stdio ------------------------------------------------------------------------------------------------------------

#: Echoes what it reads on the chardev until "q" comes; "r" first attaches a frontend.
STDIO = """
import asyncio, sys
from pyqsd.chardev.chardev import Chardevs
from tests.chardev.frontend import Recorder
async def main():
    chardevs = Chardevs()
    chardev = await chardevs.add_from_command_line(sys.argv[1])
    frontend = Recorder(chardev)
    chardev.write(b"ready ")
    await frontend.wait(lambda: b"q" in frontend.data or "closed" in frontend.log)
    chardev.write(frontend.data + b" " + " ".join(frontend.log).encode())
    if b"crash" in frontend.data:
        raise SystemExit(3)
    await chardevs.close_all()
asyncio.run(main())
"""


def test_stdio_on_pipes() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STDIO, "stdio,id=a"], input=b"hello", capture_output=True, check=True, timeout=20
    )
    assert (done.stdout, done.stderr) == (b"ready hello opened closed", b"")


def test_stdio_on_files(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"x" * 10_000 + b"q")
    with open(tmp_path / "in", "rb") as source, open(tmp_path / "out", "wb") as out:
        subprocess.run([sys.executable, "-c", STDIO, "stdio,id=a"], stdin=source, stdout=out, check=True, timeout=20)
    assert (tmp_path / "out").read_bytes() == b"ready " + b"x" * 10_000 + b"q opened"


def test_end_of_input_does_not_end_the_output() -> None:
    """A script's answers arrive although they are more than the pipe holds and the reader is slow."""

    async def body() -> None:
        from pyqsd.chardev.file import FdChardev
        from pyqsd.chardev.options import ChardevCommon

        chardev = FdChardev("a", ChardevCommon())
        source, sink = os.pipe(), os.pipe()
        for fd in (source[0], sink[1]):
            os.set_blocking(fd, False)
        chardev._start(source[0], sink[1])
        frontend = Recorder(chardev)
        data = os.urandom(1_000_000)
        os.write(source[1], b"x")
        await frontend.wait_data(b"x")
        chardev.write(data[:500_000])
        os.close(source[1])
        await until(lambda: not chardev.pressed or select.select([sink[0]], [], [], 0)[0])
        received = await asyncio.to_thread(os.read, sink[0], 1000)
        while len(received) < 400_000:
            received += await asyncio.to_thread(os.read, sink[0], 65536)
        await frontend.wait_log("opened", "closed")
        chardev.write(data[500_000:])
        while len(received) < len(data):
            received += await asyncio.to_thread(os.read, sink[0], 65536)
        assert received == data
        await chardev.close()
        os.close(sink[0])

    run(body())


@pytest.mark.parametrize("end", ["q", "crash q"])
@pytest.mark.parametrize("signals", [True, False])
def test_stdio_on_a_terminal(end: str, signals: bool) -> None:
    master, slave = os.openpty()
    before = termios.tcgetattr(slave)
    blocking = os.get_blocking(slave)
    process = subprocess.Popen(
        [sys.executable, "-c", STDIO, f"stdio,id=a,signal={'on' if signals else 'off'}"], stdin=slave, stdout=slave
    )
    try:
        assert read_until(master, b"ready ") == b"ready "
        during = termios.tcgetattr(slave)
        # A frontend's user sees what they type; only the keys for signals can be off.
        expected = list(before)
        if not signals:
            expected[3] &= ~termios.ISIG
        assert during == expected
        os.write(master, end.encode() + b"\n")
        assert process.wait(20) == (3 if "crash" in end else 0)
        assert termios.tcgetattr(slave) == before
        assert os.get_blocking(slave) == blocking
    finally:
        process.kill()
        process.wait()
        os.close(master)
        os.close(slave)


def test_raw_terminal_without_a_frontend() -> None:
    """Between opening and the frontend's arrival nothing is echoed."""

    async def body() -> None:
        from pyqsd.chardev.stdio import ChardevStdio, StdioChardev

        master, slave = os.openpty()
        saved = [os.dup(0), os.dup(1)]
        os.dup2(slave, 0)
        os.dup2(slave, 1)
        try:
            before = termios.tcgetattr(slave)
            chardev = StdioChardev("a", ChardevStdio())
            await chardev.open()
            lflag = termios.tcgetattr(slave)[3]
            assert not lflag & (termios.ECHO | termios.ICANON) and lflag & termios.ISIG
            with pytest.raises(Error, match="cannot use stdio by multiple character devices"):
                await StdioChardev("b", ChardevStdio()).open()
            await chardev.close()
            assert termios.tcgetattr(slave) == before
            # It can be had again.
            await chardev.open()
            await chardev.close()
        finally:
            os.dup2(saved[0], 0)
            os.dup2(saved[1], 1)
            for fd in (*saved, master, slave):
                os.close(fd)

    run(body())


def read_until(fd: int, text: bytes) -> bytes:
    data = b""
    while text not in data:
        assert select.select([fd], [], [], 20)[0], data
        data += os.read(fd, 1000)
    return data


# --- null, ringbuf ----------------------------------------------------------------------------------------------------


def test_null() -> None:
    async def body() -> None:
        chardevs = Chardevs()
        chardev = await add(chardevs, "null")
        frontend = Recorder(chardev)
        chardev.write(b"x" * 1_000_000)
        assert (frontend.log, chardev.filename(), chardev.pressed) == ([], "null", False)
        await chardevs.close_all()

    run(body())


def test_ringbuf() -> None:
    async def body() -> None:
        chardevs = Chardevs()
        for name in ("ringbuf", "memory"):
            chardev = await add(chardevs, name, size=16)
            frontend = Recorder(chardev)
            assert (frontend.log, chardev.filename()) == (["opened"], name)
            chardev.write(b"0123456789")
            chardev.write(b"abcdefghij")
            assert await commands.ringbuf_read(chardevs, device="a", size=6) == "456789"
            await commands.ringbuf_write(chardevs, device="a", data="ä")
            assert await commands.ringbuf_read(chardevs, device="a", size=1000) == "abcdefghijä"
            assert await commands.ringbuf_read(chardevs, device="a", size=1000) == ""
            chardev.write(bytes(range(100)))
            base64 = commands.DataFormat.BASE64
            assert await commands.ringbuf_read(chardevs, device="a", size=1000, format=base64) == (
                "VFVWV1hZWltcXV5fYGFiYw=="
            )
            await commands.ringbuf_write(chardevs, device="a", data="//79", format=base64)
            assert await commands.ringbuf_read(chardevs, device="a", size=1000) == "\ufffd\ufffd\ufffd"
            await chardevs.close_all()
        with pytest.raises(Error, match="size of ringbuf chardev must be power of two"):
            await add(chardevs, "ringbuf", size=12)
        with pytest.raises(Error, match="size of ringbuf chardev must be power of two"):
            await add(chardevs, "ringbuf", size=-16)

    run(body())


# --- names ------------------------------------------------------------------------------------------------------------


def test_names_with_nul_are_not_cut_short(tmp_path: Path) -> None:
    async def body() -> None:
        chardevs = Chardevs()
        (tmp_path / "a").write_bytes(b"data")
        name = f"{tmp_path}/a\0b"
        encoded = os.fsencode(tmp_path) + b"/a\xc0\x80b"
        await add(chardevs, "file", out=name)
        assert os.path.exists(encoded)
        os.unlink(encoded)
        await add(chardevs, "null", "b", logfile=name)
        assert os.path.exists(encoded)
        os.unlink(encoded)
        await add(chardevs, "pty", "c", path=name)
        assert os.path.islink(encoded)
        await chardevs.remove("c")
        await add(chardevs, "socket", "d", addr={"type": "unix", "data": {"path": name}})
        assert os.path.exists(encoded)
        await chardevs.close_all()
        assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"data"

    run(body())
