"""The programs that are measured, each started on an image behind a unix socket."""

from __future__ import annotations

import json
import os
import select
import shutil
import socket
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

EXPORT = "disk"
START_TIMEOUT = 30.0


#: The passphrase of encrypted images.
PASSPHRASE = "benchmark"


@dataclass(frozen=True)
class Image:
    """What is served: `fmt` is raw or qcow2; with `direct`, the file is opened with O_DIRECT; with `encrypted`, the
    image is opened with `PASSPHRASE`; with `compress`, what is written to it is stored compressed."""

    path: Path
    fmt: str
    direct: bool = False
    encrypted: bool = False
    compress: bool = False


def daemon_argv(command: list[str], image: Image, sock: str, qmp: str | None, aio: str | None) -> list[str]:
    """QSD's command line, which is pyqsd's as well."""
    cache = {"direct": image.direct}
    file: dict[str, object] = {"driver": "file", "filename": str(image.path), "cache": cache}
    if aio:
        file["aio"] = aio
    node: dict[str, object] = {"driver": image.fmt, "file": file, "cache": cache}
    argv = [*command]
    if image.encrypted:
        argv += ["--object", f"secret,id=passphrase,data={PASSPHRASE}"]
        node["encrypt"] = {"format": "luks", "key-secret": "passphrase"}
    if image.compress:
        node = {"driver": "compress", "file": node}
    node["node-name"] = EXPORT
    return argv + serving([node], sock, qmp)


def serving(nodes: list[dict[str, object]], sock: str, qmp: str | None) -> list[str]:
    """Options that open `nodes` in order and serve the one called `EXPORT`."""
    argv = []
    for node in nodes:
        argv += ["--blockdev", json.dumps(node)]
    argv += ["--nbd-server", f"addr.type=unix,addr.path={sock}"]
    argv += ["--export", f"nbd,id=export,node-name={EXPORT},writable=on"]
    if qmp:
        argv += ["--chardev", f"socket,id=qmp,path={qmp},server=on,wait=off", "--monitor", "chardev=qmp"]
    return argv


def pyqsd_command() -> list[str]:
    """The console script beside this Python, else the module."""
    script = Path(sys.executable).parent / "pyqsd"
    return [str(script)] if script.exists() else [sys.executable, "-m", "pyqsd"]


class Server:
    """One peer program. `argv` gives None for what it cannot do (nbdkit: other formats, O_DIRECT, QMP)."""

    def __init__(self, name: str) -> None:
        self.name = name

    def missing(self) -> str | None:
        """What is not installed."""
        program = {"nbdkit": "nbdkit", "pyqsd": pyqsd_command()[0]}.get(self.name, "qemu-storage-daemon")
        return None if shutil.which(program) else program

    def argv(self, image: Image, sock: str, qmp: str | None = None) -> list[str] | None:
        if self.name == "pyqsd":
            return daemon_argv(pyqsd_command(), image, sock, qmp, None)
        if self.name == "nbdkit":
            if image.fmt != "raw" or image.direct or qmp:
                return None
            return ["nbdkit", "-f", "-U", sock, "file", str(image.path)]
        return daemon_argv(["qemu-storage-daemon"], image, sock, qmp, self.aio)

    @property
    def aio(self) -> str | None:
        """The option ``aio`` of file nodes."""
        return self.name.removeprefix("qsd-") if self.name.startswith("qsd-") else None

    def nodes_argv(self, nodes: list[dict[str, object]], sock: str, qmp: str) -> list[str] | None:
        """The same for several nodes, the files of which have `aio` already."""
        if self.name == "nbdkit":
            return None
        command = pyqsd_command() if self.name == "pyqsd" else ["qemu-storage-daemon"]
        return command + serving(nodes, sock, qmp)


SERVERS = ("pyqsd", "qsd-threads", "qsd-io_uring", "nbdkit")


class NbdClient:
    """One request at a time, with as little work of its own as can be. It owns the connected socket `sock`."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        sock.settimeout(START_TIMEOUT)
        self._stream = sock.makefile("rb")
        if self._stream.read(16) != b"NBDMAGICIHAVEOPT":
            raise RuntimeError("the server does not speak NBD")
        self._stream.read(2)
        name = EXPORT.encode()
        sock.sendall(struct.pack(">IQII", 3, 0x49484156454F5054, 1, len(name)) + name)
        self._stream.read(10)  # size and flags

    def _reply(self) -> None:
        magic, error, _ = struct.unpack(">IIQ", self._stream.read(16))
        if magic != 0x67446698 or error:
            raise RuntimeError(f"a request failed with error {error}")

    def read(self, offset: int, length: int) -> bytes:
        self._sock.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, offset, length))
        self._reply()
        return self._stream.read(length)

    def write(self, offset: int, data: bytes) -> None:
        self._sock.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 1, 1, offset, len(data)) + data)
        self._reply()

    def __enter__(self) -> NbdClient:
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self._sock.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 2, 2, 0, 0))
        finally:
            self._stream.close()
            self._sock.close()


class Qmp:
    """A QMP session; `events` are those that came and were not asked for yet."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(120)
        self.sock.connect(str(path))
        self._buffer = b""
        self.events: list[dict[str, Any]] = []
        self._message()
        self.command("qmp_capabilities")

    def _message(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            data = self.sock.recv(1 << 16)
            if not data:
                raise RuntimeError("the daemon closed the QMP session")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        message: dict[str, Any] = json.loads(line)
        return message

    def command(self, name: str, **arguments: Any) -> Any:
        """What it returns; underscores in the names of arguments stand for dashes."""
        fixed = {key.replace("_", "-"): value for key, value in arguments.items()}
        self.sock.sendall(json.dumps({"execute": name, "arguments": fixed}).encode() + b"\n")
        while True:
            message = self._message()
            if "error" in message:
                raise RuntimeError(f"{name}: {message['error']['desc']}")
            if "return" in message:
                return message["return"]
            if "event" in message:
                self.events.append(message)

    def event(self, *names: str, wait: bool = True) -> dict[str, Any] | None:
        """The next event with one of `names`; without `wait`, None if it has not come yet."""
        while True:
            while self.events:
                found = self.events.pop(0)
                if found["event"] in names:
                    return found
            if not wait and b"\n" not in self._buffer and not select.select([self.sock], [], [], 0)[0]:
                return None
            message = self._message()
            if "event" in message:
                self.events.append(message)

    def __enter__(self) -> Qmp:
        return self

    def __exit__(self, *exc: object) -> None:
        self.sock.close()


class Running:
    """A server that serves; `started` is the number of seconds from its start to the first byte of data read."""

    def __init__(
        self, server: Server, image: Image | list[dict[str, object]], workdir: Path, *, qmp: bool = False
    ) -> None:
        self.sock = workdir / "nbd.sock"
        self.qmp = workdir / "qmp.sock" if qmp else None
        for path in (self.sock, self.qmp):
            if path:
                path.unlink(missing_ok=True)
        if isinstance(image, Image):
            argv = server.argv(image, str(self.sock), str(self.qmp) if self.qmp else None)
        else:
            argv = server.nodes_argv(image, str(self.sock), str(self.qmp))
        if argv is None:
            raise LookupError(f"{server.name} cannot do this")
        self.name = server.name
        self.log = workdir / "server.log"
        begin = time.perf_counter()
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=workdir)
        try:
            self._first_read(begin + START_TIMEOUT)
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise
        self.started = time.perf_counter() - begin

    @property
    def uri(self) -> str:
        return f"nbd+unix:///{EXPORT}?socket={self.sock}"

    def _first_read(self, deadline: float) -> None:
        """Connects as soon as that is possible and reads one sector."""
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.connect(str(self.sock))
                break
            except (FileNotFoundError, ConnectionRefusedError):
                sock.close()
                if self.process.poll() is not None:
                    raise RuntimeError(f"{self.name} ended: {self.log.read_text(errors='replace')}") from None
                if time.perf_counter() > deadline:
                    raise TimeoutError(f"{self.name} does not serve") from None
                time.sleep(0.0005)
        with NbdClient(sock) as client:
            client.read(0, 512)

    def client(self) -> NbdClient:
        """A connection for requests."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(str(self.sock))
        return NbdClient(sock)

    def rss(self) -> int:
        """Resident memory, bytes."""
        with open(f"/proc/{self.process.pid}/statm", "rb") as stream:
            return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def qmp_commands(self, seconds: float) -> float:
        """QMP commands per second, one after the other."""
        assert self.qmp is not None
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.connect(str(self.qmp))
            stream = sock.makefile("rwb", buffering=1 << 16)

            def command(name: bytes) -> None:
                stream.write(b'{"execute":"' + name + b'"}\n')
                stream.flush()
                while b'"return"' not in stream.readline():
                    pass

            stream.readline()
            command(b"qmp_capabilities")
            count = 0
            begin = time.perf_counter()
            while (spent := time.perf_counter() - begin) < seconds:
                command(b"query-block-exports")
                count += 1
            return count / spent

    def __enter__(self) -> Running:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise RuntimeError(f"{self.name} did not end") from None
        if exc is None and self.process.returncode != 0:
            text = self.log.read_text(errors="replace")
            raise RuntimeError(f"{self.name} ended with status {self.process.returncode}: {text}")
