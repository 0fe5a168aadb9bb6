"""pyqsd with the real clients, and images that one side makes and the other reads and checks."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import QMPClient

from tests.support import images, nbd, peers
from tests.support.daemon import DaemonProcess
from tests.support.images import KiB, MiB
from tests.support.nbd import NbdClient

SYSTEM_PYTHON = "/usr/bin/python3"
NBD_SERVER = ["--nbd-server", "addr.type=unix,addr.path=nbd.sock"]


def serve(workdir: Path, fmt: str, filename: str, *more: str, export: str = "", node: str = "") -> DaemonProcess:
    args = [
        "--blockdev",
        f"{fmt},node-name=disk,file.driver=file,file.filename={filename},discard=unmap{node}",
        *NBD_SERVER,
        "--export",
        f"nbd,id=e,node-name=disk,writable=on{export}",
        *more,
    ]
    return DaemonProcess("pyqsd", args, workdir=workdir)


def uri(workdir: Path, name: str = "disk") -> str:
    return f"nbd+unix:///{name}?socket={workdir / 'nbd.sock'}"


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    """8 MiB of all sorts: random, repeated, zero; also as the file `content`."""
    data = os.urandom(MiB) + b"\xaa" * MiB + bytes(2 * MiB) + os.urandom(70000) + bytes(2 * MiB - 70000)
    data += b"end." * (512 * KiB)
    assert len(data) == 8 * MiB
    (tmp_path / "content").write_bytes(data)
    return data


# -- clients -----------------------------------------------------------------------------------------------------------


def test_nbdinfo(tmp_path: Path) -> None:
    images.create(tmp_path / "disk", 4 * MiB)
    images.io(tmp_path / "disk", "write -P 1 64k 64k")
    with serve(tmp_path, "qcow2", "disk", export=",description=a disk,name=it"):
        info = json.loads(peers.run("nbdinfo", "--json", "--list", uri(tmp_path, "")).stdout)
        assert info["protocol"] == "newstyle-fixed"
        (export,) = info["exports"]
        assert (export["export-name"], export["description"]) == ("it", "a disk")
        assert export["export-size"] == 4 * MiB
        assert not export["is_read_only"]
        for can in ("can_cache", "can_df", "can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero"):
            assert export[can], can
        assert "base:allocation" in export["contexts"]
        extents = json.loads(peers.run("nbdinfo", "--map", "--json", uri(tmp_path, "it")).stdout)
        assert [(e["offset"], e["length"], e["type"]) for e in extents] == [
            (0, 65536, 3),
            (65536, 65536, 0),
            (131072, 4 * MiB - 131072, 3),
        ]
        assert peers.run("nbdinfo", "--size", uri(tmp_path, "it")).stdout == f"{4 * MiB}\n"
        peers.run("nbdinfo", "--can", "write", uri(tmp_path, "it"))
        peers.run("nbdinfo", "--is", "rotational", uri(tmp_path, "it"), ok=(2,))
        assert "No such file" in peers.run("nbdinfo", uri(tmp_path, "nosuch"), ok=(1,)).stderr


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_nbdcopy_both_ways(fmt: str, tmp_path: Path, content: bytes) -> None:
    images.create(tmp_path / "disk", len(content), fmt)
    with serve(tmp_path, fmt, "disk"):
        peers.run("nbdcopy", "--flush", tmp_path / "content", uri(tmp_path))
        peers.run("nbdcopy", uri(tmp_path), tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == content
    images.compare(tmp_path / "disk", fmt, tmp_path / "content", "raw")
    if fmt == "qcow2":
        images.assert_clean(tmp_path / "disk")


def test_nbdcopy_between_two_exports(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "from").write_bytes(content)
    images.create(tmp_path / "disk", len(content))
    more = ["--blockdev", "file,node-name=from,filename=from,read-only=on", "--export", "nbd,id=f,node-name=from"]
    with serve(tmp_path, "qcow2", "disk", *more):
        peers.run("nbdcopy", uri(tmp_path, "from"), uri(tmp_path))
    images.compare(tmp_path / "disk", "qcow2", tmp_path / "content", "raw")


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_qemu_img(fmt: str, tmp_path: Path, content: bytes) -> None:
    images.create(tmp_path / "disk", len(content), fmt)
    with serve(tmp_path, fmt, "disk"):
        peers.run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", tmp_path / "content", uri(tmp_path))
        peers.run("qemu-img", "compare", "-f", "raw", "-F", "raw", tmp_path / "content", uri(tmp_path))
        peers.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", uri(tmp_path), tmp_path / "packed.qcow2")
        info = images.info(uri(tmp_path))
        assert info["virtual-size"] == len(content)
        extents = json.loads(peers.run("qemu-img", "map", "--output=json", "-f", "raw", uri(tmp_path)).stdout)
        zero = sum(extent["length"] for extent in extents if extent["zero"])
        assert zero >= 3 * MiB
    images.compare(tmp_path / "packed.qcow2", "qcow2", tmp_path / "content", "raw")


def test_qemu_io(tmp_path: Path) -> None:
    images.create(tmp_path / "disk", 4 * MiB)
    with serve(tmp_path, "qcow2", "disk"):
        images.io(
            uri(tmp_path),
            "write -P 1 0 64k",
            "write -f -P 2 100 1000",
            "read -P 1 0 100",
            "read -P 2 100 1000",
            "write -z 4k 4k",
            "read -P 0 4k 4k",
            "write -z -u 8k 4k",
            "discard 64k 64k",
            "aio_write -P 3 1M 1M",
            "aio_write -P 4 2M 1M",
            "aio_flush",
            "read -P 3 1M 1M",
            "read -P 4 2M 1M",
            "flush",
            "writev -P 5 3M 512 1024 2048",
            "readv -P 5 3M 3584",
            fmt="raw",
        )
    images.assert_clean(tmp_path / "disk")
    images.io(tmp_path / "disk", "read -P 2 100 1000", "read -P 0 8k 4k", "read -P 4 2M 1M", "read -P 5 3M 3584")


def test_qemu_nbd_list(tmp_path: Path) -> None:
    images.create(tmp_path / "disk", 4 * MiB)
    with serve(tmp_path, "qcow2", "disk", export=",allocation-depth=on,description=text"):
        out = peers.run("qemu-nbd", "--list", "-k", tmp_path / "nbd.sock").stdout
    assert "exports available: 1" in out
    assert "export: 'disk'" in out
    assert "description: text" in out
    assert "size:  4194304" in out
    assert "base:allocation" in out and "qemu:allocation-depth" in out
    assert "min block: 1" in out and "max block: 33554432" in out


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
@pytest.mark.parametrize("jobs", [1, 4])
def test_fio_verify(fmt: str, jobs: int, tmp_path: Path) -> None:
    """Random writes of many sizes, every block verified by its checksum."""
    images.create(tmp_path / "disk", 32 * MiB, fmt)
    with serve(tmp_path, fmt, "disk"):
        peers.run(
            *("fio", "--name=verify", "--ioengine=nbd", f"--uri={uri(tmp_path)}", "--rw=randwrite", "--iodepth=16"),
            *("--bsrange=512-64k", "--bs_unaligned=0", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1"),
            *("--size=8m", "--offset_increment=8m", f"--numjobs={jobs}", "--thread", "--randseed=7", "--end_fsync=1"),
            cwd=tmp_path,
        )
    if fmt == "qcow2":
        images.assert_clean(tmp_path / "disk")


class LibNbd:
    """python3-libnbd in a process of the system's Python."""

    def __init__(self) -> None:
        worker = Path(nbd.__file__).with_name("libnbd_worker.py")
        peers.require(SYSTEM_PYTHON)
        self.process = subprocess.Popen(
            [SYSTEM_PYTHON, "-P", worker],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, method: str, *args: Any) -> Any:
        assert self.process.stdin and self.process.stdout
        coded = [{"hex": arg.hex()} if isinstance(arg, bytes) else arg for arg in args]
        self.process.stdin.write(json.dumps([method, *coded]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read() if self.process.stderr else ""
        answer = json.loads(line)
        if "error" in answer:
            raise OSError(answer["errno"], answer["error"])
        value = answer["return"]
        return bytes.fromhex(value["hex"]) if isinstance(value, dict) else value


@pytest.fixture
def libnbd() -> Iterator[LibNbd]:
    worker = LibNbd()
    yield worker
    worker.process.kill()
    worker.process.communicate()


def test_libnbd(tmp_path: Path, libnbd: LibNbd) -> None:
    images.create(tmp_path / "disk", 4 * MiB)
    with serve(tmp_path, "qcow2", "disk", export=",allocation-depth=on"):
        libnbd("set_opt_mode", True)
        libnbd("connect_uri", uri(tmp_path))
        assert libnbd("opt_list") == [["disk", ""]]
        assert libnbd("opt_list_meta_context") == ["base:allocation", "qemu:allocation-depth"]
        libnbd("add_meta_context", "base:allocation")
        libnbd("add_meta_context", "qemu:allocation-depth")
        libnbd("opt_go")
        libnbd("set_strict_mode", 0)
        assert libnbd("get_size") == 4 * MiB
        assert libnbd("get_structured_replies_negotiated")
        assert libnbd("can_meta_context", "base:allocation")
        assert (libnbd("get_block_size", 0), libnbd("get_block_size", 2)) == (1, 32 * MiB)
        libnbd("pwrite", b"abc" * 1000, 1000)
        assert libnbd("pread", 3000, 1000) == b"abc" * 1000
        libnbd("pwrite", b"fua", 0, 1)
        libnbd("flush")
        libnbd("zero", 512, 1024)
        assert libnbd("pread", 512, 1024) == bytes(512)
        libnbd("trim", 65536, 65536)
        libnbd("cache", 65536, 0)
        base, depth = libnbd("block_status", 4 * MiB, 0)
        assert depth == ["qemu:allocation-depth", 0, [65536, 1, 4 * MiB - 65536, 0]]
        # Inside of the one cluster, what was never written may be known to be zero.
        assert base[:2] == ["base:allocation", 0]
        lengths, states = base[2][::2], base[2][1::2]
        assert sum(lengths) == 4 * MiB
        assert (states[0], states[-1], lengths[-1]) == (0, 3, 4 * MiB - 65536)
        assert libnbd("storm", 64, 4096) == 64
        assert libnbd("storm", 16, 100000) == 16
        with pytest.raises(OSError):
            libnbd("pread", 512, 4 * MiB)
        assert libnbd("pread", 4, 0) == bytes([1]) * 4
        libnbd("shutdown")
    images.assert_clean(tmp_path / "disk")


def test_tcp(tmp_path: Path, content: bytes) -> None:
    """Over TCP, on a port that the kernel chose."""
    (tmp_path / "disk").write_bytes(content)
    with DaemonProcess("pyqsd", ["--blockdev", "file,node-name=disk,filename=disk"], workdir=tmp_path) as daemon:
        address = {"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}}
        daemon.qmp.execute("nbd-server-start", addr=address)
        daemon.qmp.execute("block-export-add", type="nbd", id="e", node_name="disk")
        listening = peers.run("sh", "-c", f"cat /proc/{daemon.pid}/net/tcp").stdout
        inodes = {
            os.readlink(f"/proc/{daemon.pid}/fd/{fd}").removeprefix("socket:[").rstrip("]")
            for fd in os.listdir(f"/proc/{daemon.pid}/fd")
            if os.readlink(f"/proc/{daemon.pid}/fd/{fd}").startswith("socket:")
        }
        (port,) = {
            int(line.split()[1].split(":")[1], 16)
            for line in listening.splitlines()[1:]
            if line.split()[3] == "0A" and line.split()[9] in inodes
        }
        peers.run("nbdcopy", f"nbd://127.0.0.1:{port}/disk", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == content


def test_passed_socket(tmp_path: Path, content: bytes) -> None:
    """A listening socket that the parent made (addr.type=fd)."""
    import socket

    (tmp_path / "disk").write_bytes(content)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "passed.sock"))
        listener.listen()
        number = listener.fileno()
        args = ["--blockdev", "file,node-name=disk,filename=disk,read-only=on", "--nbd-server"]
        args += [f"addr.type=fd,addr.str={number}", "--export", "nbd,id=e,node-name=disk"]
        with DaemonProcess("pyqsd", args, workdir=tmp_path, pass_fds=[number]):
            peers.run("nbdcopy", f"nbd+unix:///disk?socket={tmp_path / 'passed.sock'}", tmp_path / "back")
            assert (tmp_path / "back").read_bytes() == content


# -- QMP clients -------------------------------------------------------------------------------------------------------


def test_qemu_qmp(tmp_path: Path) -> None:
    """The PyPI package qemu.qmp: negotiation, commands, errors, events."""
    images.create(tmp_path / "disk", 4 * MiB)
    with serve(tmp_path, "qcow2", "disk") as daemon:
        daemon.qmp.close()

        async def talk() -> None:
            client = QMPClient("test")
            await client.connect(str(daemon.qmp_path))
            version = await client.execute("query-version")
            assert isinstance(version, dict)
            exports = await client.execute("query-block-exports")
            assert isinstance(exports, list) and len(exports) == 1
            with pytest.raises(Exception, match="Failed to find node with node-name='nosuch'"):
                await client.execute("blockdev-del", {"node-name": "nosuch"})
            with client.listener("BLOCK_EXPORT_DELETED") as listener:
                await client.execute("block-export-del", {"id": "e"})
                event = await asyncio.wait_for(listener.get(), 10)
            assert event["data"] == {"id": "e"}
            await client.disconnect()

        asyncio.run(talk())


def test_socat(tmp_path: Path) -> None:
    """A shell with socat, also with single quotes and everything in one write."""
    with DaemonProcess("pyqsd", workdir=tmp_path) as daemon:
        daemon.qmp.close()
        done = peers.run(
            *("socat", "-t5", "STDIO", "UNIX-CONNECT:qmp.sock"),
            cwd=tmp_path,
            stdin=b"{'execute':'qmp_capabilities'}{'execute':'query-block'}\n{'execute':'nosuch','id':1}\n",
        )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert "QMP" in lines[0]
    assert lines[1:] == [
        {"return": {}},
        {"return": []},
        {"id": 1, "error": {"class": "CommandNotFound", "desc": "The command nosuch has not been found"}},
    ]


@pytest.mark.parametrize("module", [False, True])
def test_started_as_users_do(module: bool, tmp_path: Path) -> None:
    """The console script and `python -m pyqsd`."""
    script = Path(sys.executable).with_name("pyqsd")
    command = [sys.executable, "-m", "pyqsd"] if module else [str(script)]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.startswith("pyqsd version ")


# -- images ------------------------------------------------------------------------------------------------------------

# What an image can be like; each is filled by one side and read by the other.
FEATURES = {
    "v2": "compat=0.10",
    "v3": "compat=1.1",
    "cluster-512": "cluster_size=512",
    "cluster-4k": "cluster_size=4k",
    "cluster-2M": "cluster_size=2M",
    "refcount-1": "refcount_bits=1",
    "refcount-2": "refcount_bits=2",
    "refcount-4": "refcount_bits=4",
    "refcount-8": "refcount_bits=8",
    "refcount-32": "refcount_bits=32",
    "refcount-64": "refcount_bits=64,cluster_size=4k",
    "lazy": "lazy_refcounts=on",
    "zstd": "compression_type=zstd",
    "preallocated": "preallocation=metadata",
    "preallocated-full": "preallocation=full,cluster_size=16k",
}


ALONE = [(name, False) for name in FEATURES]
# qemu-img does not preallocate what has a backing file.
OVERLAYS = [(name, True) for name in FEATURES if "preallocation" not in FEATURES[name]]


@pytest.mark.parametrize(("name", "backing"), [*ALONE, *OVERLAYS])
def test_written_here_read_there(name: str, backing: bool, tmp_path: Path, content: bytes) -> None:
    """pyqsd fills it over NBD; qemu-img finds it clean and reads the same; the real daemon goes on writing to it."""
    if backing:
        images.create("base.qcow2", 8 * MiB, cwd=tmp_path)
        images.io("base.qcow2", "write -P 0xcc 0 8M", cwd=tmp_path)
        images.create("disk", None, "qcow2", FEATURES[name], backing="base.qcow2", cwd=tmp_path)
        model = bytearray(b"\xcc" * (8 * MiB))
    else:
        images.create("disk", 8 * MiB, "qcow2", FEATURES[name], cwd=tmp_path)
        model = bytearray(8 * MiB)

    def change(kind: str, salt: int) -> None:
        args = ["--blockdev", "qcow2,node-name=disk,file.driver=file,file.filename=disk,discard=unmap", *NBD_SERVER]
        args += ["--export", "nbd,id=e,node-name=disk,writable=on"]
        with DaemonProcess(kind, args, workdir=tmp_path), NbdClient(tmp_path / "nbd.sock", "disk") as client:
            for index in range(24):
                offset = (index * 337 + salt * 101) * KiB % (7 * MiB) + salt * 100
                length = (1, 700, 5 * KiB, 64 * KiB, 130 * KiB)[index % 5]
                if index % 6 == 5:
                    client.zero(offset, length, nbd.F_NO_HOLE if index % 4 else 0)
                    model[offset : offset + length] = bytes(length)
                else:
                    data = content[offset : offset + length]
                    client.pwrite(offset, data)
                    model[offset : offset + length] = data
            client.flush()
            whole = b"".join(client.pread(at, 4 * MiB) for at in (0, 4 * MiB))
            assert whole == bytes(model)
            client.disconnect()

    change("pyqsd", 1)
    images.assert_clean(tmp_path / "disk")
    assert images.read_all(tmp_path / "disk", "qcow2", tmp_path / "raw") == bytes(model)
    change("qsd", 2)
    change("pyqsd", 3)
    images.assert_clean(tmp_path / "disk")
    assert images.read_all(tmp_path / "disk", "qcow2", tmp_path / "raw") == bytes(model)


@pytest.mark.parametrize("name", FEATURES)
def test_written_there_read_here(name: str, tmp_path: Path, content: bytes) -> None:
    """qemu-img fills it (compressed, where that is possible); pyqsd reads the same and maps it the same."""
    options = FEATURES[name]
    if "preallocation" in options:
        peers.run("qemu-img", "convert", "-O", "qcow2", "-o", options, tmp_path / "content", tmp_path / "disk")
    else:
        peers.run("qemu-img", "convert", "-c", "-O", "qcow2", "-o", options, tmp_path / "content", tmp_path / "disk")
        images.io(tmp_path / "disk", "write -P 9 1M 100k", "write -z 3M 512k", "write -z -u 0 64k")
        content = content[: 1 * MiB] + b"\x09" * (100 * KiB) + content[1 * MiB + 100 * KiB :]
        content = bytes(64 * KiB) + content[64 * KiB : 3 * MiB] + bytes(512 * KiB) + content[3 * MiB + 512 * KiB :]
    results = {}
    for kind in ("qsd", "pyqsd"):
        args = ["--blockdev", "qcow2,node-name=disk,read-only=on,file.driver=file,file.filename=disk", *NBD_SERVER]
        args += ["--export", "nbd,id=e,node-name=disk,allocation-depth=on"]
        with DaemonProcess(kind, args, workdir=tmp_path):
            contexts = ("base:allocation", "qemu:allocation-depth")
            with NbdClient(tmp_path / "nbd.sock", "disk", contexts=contexts) as client:
                whole = b"".join(client.pread(at, 4 * MiB) for at in (0, 4 * MiB))
                assert whole == content, kind
                results[kind] = [client.block_map(context) for context in contexts]
                client.disconnect()
    assert results["pyqsd"] == results["qsd"]


def test_locks(tmp_path: Path) -> None:
    """QEMU's programs and pyqsd keep each other off a file exactly as QEMU's programs do among themselves."""
    images.create(tmp_path / "disk", MiB)
    node = "qcow2,node-name=disk,file.driver=file,file.filename=disk"
    for holder, other in (("pyqsd", "qsd"), ("qsd", "pyqsd"), ("pyqsd", "pyqsd"), ("qsd", "qsd")):
        for options, writer_ok, reader_ok in (
            ("", False, False),
            (",read-only=on", False, True),
            (",read-only=on,force-share=on", True, True),
        ):
            with DaemonProcess(holder, ["--blockdev", node + options], workdir=tmp_path):
                second = tmp_path / "second"
                second.mkdir(exist_ok=True)
                with DaemonProcess(other, workdir=second) as daemon:
                    for read_only, ok in ((False, writer_ok), (True, reader_ok)):
                        reply = daemon.qmp.command(
                            "blockdev-add",
                            **{
                                "driver": "qcow2",
                                "node-name": "x",
                                "read-only": read_only,
                                "file": {"driver": "file", "filename": str(tmp_path / "disk")},
                            },
                        )
                        assert ("return" in reply) == ok, (holder, other, options, read_only, reply)
                        if ok:
                            daemon.qmp.execute("blockdev-del", node_name="x")
                done = peers.run("qemu-img", "info", tmp_path / "disk", ok=())
                assert (done.returncode == 0) == reader_ok, (holder, options)
