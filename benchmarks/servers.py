"""The programs that are measured, each started on an image behind a unix socket."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

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
    argv += ["--blockdev", json.dumps(node), "--nbd-server", f"addr.type=unix,addr.path={sock}"]
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
        return daemon_argv(["qemu-storage-daemon"], image, sock, qmp, self.name.removeprefix("qsd-"))


SERVERS = ("pyqsd", "qsd-threads", "qsd-io_uring", "nbdkit")


class Running:
    """A server that serves; `started` is the number of seconds from its start to the first byte of data read."""

    def __init__(self, server: Server, image: Image, workdir: Path, *, qmp: bool = False) -> None:
        self.sock = workdir / "nbd.sock"
        self.qmp = workdir / "qmp.sock" if qmp else None
        for path in (self.sock, self.qmp):
            if path:
                path.unlink(missing_ok=True)
        argv = server.argv(image, str(self.sock), str(self.qmp) if self.qmp else None)
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
        with sock:
            sock.settimeout(START_TIMEOUT)
            stream = sock.makefile("rwb")
            if stream.read(16) != b"NBDMAGICIHAVEOPT":
                raise RuntimeError(f"{self.name} does not speak NBD: {self.log.read_text(errors='replace')}")
            stream.read(2)
            name = EXPORT.encode()
            stream.write(struct.pack(">IQII", 3, 0x49484156454F5054, 1, len(name)) + name)
            stream.write(struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, 0, 512))
            stream.flush()
            stream.read(10)  # size and flags
            magic, error, _ = struct.unpack(">IIQ", stream.read(16))
            if magic != 0x67446698 or error or len(stream.read(512)) != 512:
                raise RuntimeError(f"{self.name} does not answer a read")
            stream.write(struct.pack(">IHHQQI", 0x25609513, 0, 2, 2, 0, 0))
            stream.flush()

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
