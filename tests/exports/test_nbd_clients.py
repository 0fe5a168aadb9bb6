"""The real clients: libnbd's tools and library, qemu-img, qemu-io, qemu-nbd."""

from __future__ import annotations

import json
import os
import struct
import subprocess
from pathlib import Path

import pytest

from tests.exports import rawnbd as raw
from tests.exports.service import Service
from tests.support import images, peers

MiB = 1 << 20


@pytest.fixture
def pattern() -> bytes:
    return os.urandom(MiB + 4096 + 7)


def libnbd(script: str, *arguments: str) -> str:
    """Run a script with the system's Python, which has libnbd's module; `h` is a fresh handle."""
    peers.require("nbdsh")
    program = "import sys, nbd\nh = nbd.NBD()\n" + script
    done = subprocess.run(
        ["/usr/bin/python3", "-c", program, *arguments], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nbdinfo(service: Service) -> None:
    service.start()
    service.image("disk", 4 * MiB, data={MiB: b"x" * 65536})
    service.export("disk", writable=True, name="näme", description="dis is a disk", allocation_depth=True)
    service.blockdev(driver="null-co", node_name="zero", size=1 << 40, read_zeroes=True)
    service.export("zero", name="")
    listed = json.loads(peers.run("nbdinfo", "--list", "--json", service.uri()).stdout)
    assert listed["protocol"] == "newstyle-fixed"
    first, second = listed["exports"]
    assert first["export-name"] == "näme"
    assert first["description"] == "dis is a disk"
    assert first["contexts"] == ["base:allocation", "qemu:allocation-depth"]
    assert first["export-size"] == 4 * MiB
    assert not first["is_read_only"]
    for name in (
        "can_cache",
        "can_df",
        "can_fast_zero",
        "can_flush",
        "can_fua",
        "can_multi_conn",
        "can_trim",
        "can_zero",
    ):
        assert first[name], name
    assert (first["block_size_minimum"], first["block_size_preferred"], first["block_size_maximum"]) == (
        1,
        4096,
        32 * MiB,
    )
    assert second["is_read_only"]
    assert second["export-size"] == 1 << 40
    assert not second["can_trim"]
    assert peers.run("nbdinfo", "--map", service.uri()).stdout.split() == ["0", str(1 << 40), "3", "hole,zero"]
    content = json.loads(peers.run("nbdinfo", "--map", "--json", service.uri("n%C3%A4me")).stdout)
    assert [(e["offset"], e["length"], e["type"]) for e in content] == [
        (0, MiB, 3),
        (MiB, 65536, 0),
        (MiB + 65536, 3 * MiB - 65536, 3),
    ]


@pytest.mark.parametrize("connections", [1, 4])
@pytest.mark.parametrize("request_size", [4096, 262144, 32 * MiB])
def test_nbdcopy_both_ways(service: Service, connections: int, request_size: int, pattern: bytes) -> None:
    service.start()
    source = service.image("source", 8 * MiB, data={4096: pattern, 6 * MiB: pattern[:100]})
    target = service.image("target", 8 * MiB, data={0: pattern})
    service.export("source")
    service.export("target", writable=True)
    copy = service.directory / "copy"
    options = (f"--connections={connections}", f"--request-size={request_size}")
    peers.run("nbdcopy", *options, service.uri("source"), copy)
    assert copy.read_bytes() == source.read_bytes()
    peers.run("nbdcopy", *options, "--flush", service.uri("source"), service.uri("target"))
    assert target.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("size", [512, 4096, 65536, 131072, 131073, MiB, 5 * MiB + 13])
def test_libnbd_reads_and_writes(service: Service, size: int, structured: bool) -> None:
    service.start()
    path = service.image("disk", 12 * MiB)
    service.export("disk", writable=True)
    out = libnbd(
        """
import os
uri, size, structured = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True"
h.set_request_structured_replies(structured)
h.connect_uri(uri)
assert h.get_structured_replies_negotiated() == structured
data = os.urandom(size)
h.pwrite(data, 777)
assert h.pread(size + 20, 767) == bytes(10) + data + bytes(10)
other = os.urandom(size)
h.pwrite(other, 6 * (1 << 20), nbd.CMD_FLAG_FUA)
h.flush()
h.trim(512, 0)
h.cache(4096, 0)
h.zero(size, 777, nbd.CMD_FLAG_NO_HOLE)
assert h.pread(size, 777) == bytes(size)
assert h.pread(size, 6 * (1 << 20)) == other
if structured:
    assert h.pread_structured(size, 6 * (1 << 20), lambda *args: 0, nbd.CMD_FLAG_DF) == other
# Many at once, of all sizes.
buffers = []
for i in range(64):
    n = 1 + i * size // 64
    buffer = nbd.Buffer(n)
    buffers.append((buffer, i, n, h.aio_pread(buffer, 6 * (1 << 20) + i)))
waiting = {cookie for _, _, _, cookie in buffers}
while waiting:
    h.poll(-1)
    waiting -= {cookie for cookie in waiting if h.aio_command_completed(cookie)}
whole = h.pread(size + 64, 6 * (1 << 20))
for buffer, i, n, _ in buffers:
    assert buffer.to_bytearray() == whole[i:i + n], (i, n)
h.shutdown()
sys.stdout.write("done")
""",
        service.uri("disk"),
        str(size),
        str(structured),
    )
    assert out == "done"
    assert path.stat().st_size == 12 * MiB


def test_libnbd_sees_errors(service: Service) -> None:
    service.start()
    service.image("disk", MiB)
    service.export("disk")
    out = libnbd(
        """
h.connect_uri(sys.argv[1])
h.set_strict_mode(0)
for name, call in (("read", lambda: h.pread(10, 1 << 20)), ("write", lambda: h.pwrite(b"x", 0)),
                   ("trim", lambda: h.trim(10, 0)), ("zero", lambda: h.zero(10, 0)), ("flags", lambda: h.flush(16))):
    try:
        call()
        print(name, "worked")
    except nbd.Error as exc:
        print(name, exc.errno)
assert h.pread(10, 0) == bytes(10)
""",
        service.uri("disk"),
    )
    assert out.splitlines() == ["read EINVAL", "write EINVAL", "trim EINVAL", "zero EINVAL", "flags EINVAL"]


def test_libnbd_dirty_bitmaps_and_depth(service: Service) -> None:
    service.start()
    service.image("disk", 4 * MiB)
    service.must("block-dirty-bitmap-add", {"node": "disk", "name": "b0", "granularity": 65536})
    export = service.export("disk", writable=True, bitmaps=["b0"], allocation_depth=True)
    assert export.bitmaps[0].busy
    script = """
import json
h.add_meta_context("qemu:dirty-bitmap:b0")
h.add_meta_context("qemu:allocation-depth")
h.connect_uri(sys.argv[1])
seen = {}
h.pwrite(b"x", 65536 + 5)
h.pwrite(b"x" * 100000, 1 << 20)
h.block_status(4 << 20, 0, lambda name, offset, entries, error: seen.__setitem__(name, entries) or 0)
print(json.dumps(seen))
"""
    seen = json.loads(libnbd(script, service.uri("disk")))
    assert seen == {
        "qemu:dirty-bitmap:b0": [65536, 0, 65536, 1, MiB - 131072, 0, 131072, 1, 3 * MiB - 131072, 0],
        "qemu:allocation-depth": [4 * MiB, 1],
    }
    service.must("block-export-del", {"id": "disk", "mode": "hard"})
    service.run(service.exports.remove_all())
    assert not export.backend.edge
    assert not service.graph.find("disk").dirty_bitmaps["b0"].busy


def test_qemu_img_and_qemu_io(service: Service, pattern: bytes) -> None:
    service.start()
    source = service.directory / "source.img"
    source.write_bytes(pattern + bytes(4 * MiB - len(pattern)))
    service.image("disk", 4 * MiB)
    service.export("disk", writable=True)
    uri = service.uri("disk")
    info = json.loads(peers.run("qemu-img", "info", "--output=json", uri).stdout)
    assert (info["virtual-size"], info["format"]) == (4 * MiB, "raw")
    peers.run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, uri)
    peers.run("qemu-img", "compare", "-f", "raw", "-F", "raw", source, uri)
    mapped = json.loads(peers.run("qemu-img", "map", "--output=json", "-f", "raw", uri).stdout)
    assert mapped[0]["data"]
    assert not mapped[-1]["data"]
    out = images.io(
        uri,
        "read -P 0 3M 64k",
        "write -P 5 3M 1000",
        "write -f -P 6 2M 64k",
        "read -P 5 3M 1000",
        "write -z 2M 1000",
        "read -P 0 2M 1000",
        "read -P 6 2098152 4k",
        "write -z -u 1M 1M",
        "discard 0 1M",
        "flush",
        "aio_write -P 9 0 2M",
        "aio_write -P 8 2M 2M",
        "aio_flush",
        "read -P 9 0 2M",
        "read -P 8 2M 2M",
        fmt="raw",
    )
    assert "failed" not in out
    assert "ERROR" not in out


def test_qcow2_inside_an_export(service: Service, pattern: bytes) -> None:
    """An image format on the client's side: growth is not possible, everything else is."""
    service.start()
    service.image("disk", 8 * MiB)
    service.export("disk", writable=True)
    uri = service.uri("disk")
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", uri, "4M")
    images.io(uri, "write -P 3 100k 1M", "write -z 200k 64k", "discard 0 64k", "read -P 0 200k 64k")
    images.assert_clean(uri)


def test_qemu_nbd_lists(service: Service) -> None:
    service.start()
    service.image("a", MiB)
    service.export("a", description="first")
    out = peers.run("qemu-nbd", "--list", "-k", service.path).stdout
    assert "exports available: 1" in out
    assert "description: first" in out
    assert "transaction size: 64-bit" in out


def test_overlay_depths(service: Service) -> None:
    directory = service.directory
    images.create(directory / "base.qcow2", 4 * MiB, "qcow2", "", None, None, directory)
    images.io(directory / "base.qcow2", "write -P 7 0 256k", cwd=directory)
    images.create(directory / "top.qcow2", 4 * MiB, "qcow2", "", "base.qcow2", "qcow2", directory)
    images.io(directory / "top.qcow2", "write -P 9 64k 64k", "write -z 1M 64k", cwd=directory)
    service.start()
    service.blockdev(driver="qcow2", node_name="q", file={"driver": "file", "filename": str(directory / "top.qcow2")})
    service.export("q", allocation_depth=True)
    lines = peers.run("nbdinfo", "--map=qemu:allocation-depth", service.uri("q")).stdout.split("\n")
    assert [tuple(map(int, line.split()[:3])) for line in lines if line] == [
        (0, 65536, 2),
        (65536, 65536, 1),
        (131072, 131072, 2),
        (262144, MiB - 262144, 0),
        (MiB, 65536, 1),
        (MiB + 65536, 3 * MiB - 65536, 0),
    ]
    copy = directory / "copy.img"
    peers.run("nbdcopy", service.uri("q"), copy)
    peers.run("qemu-img", "compare", "-U", "-f", "qcow2", "-F", "raw", directory / "top.qcow2", copy)


def test_sparse_copies_stay_sparse(service: Service, tmp_path: Path) -> None:
    service.start()
    service.image("disk", 64 * MiB, data={32 * MiB: b"x" * 4096})
    service.export("disk")
    copy = tmp_path / "copy"
    peers.run("nbdcopy", service.uri("disk"), copy)
    assert copy.stat().st_size == 64 * MiB
    assert copy.stat().st_blocks * 512 < MiB


def test_zeroes_in_metadata_come_as_holes(service: Service) -> None:
    """What a qcow2 image's tables know to be zero is not sent byte by byte; with DF, and for small reads, it is."""
    directory = service.directory
    images.create(directory / "base.qcow2", 4 * MiB, "qcow2", "", None, None, directory)
    images.io(directory / "base.qcow2", "write -P 7 0 256k", cwd=directory)
    images.create(directory / "top.qcow2", 8 * MiB, "qcow2", "", "base.qcow2", "qcow2", directory)
    images.io(directory / "top.qcow2", "write -z 64k 64k", cwd=directory)
    service.start()
    service.blockdev(driver="qcow2", node_name="q", file={"driver": "file", "filename": str(directory / "top.qcow2")})
    service.export("q")
    client = service.client("q")
    client.read(0, 8 * MiB)  # the tables are in memory now
    for offset, length in ((65536, 65536), (65536 + 100, 30000), (MiB, 65536), (5 * MiB, MiB), (3 * MiB, 65536)):
        ((_, flags, kind, payload),) = client.ask(raw.READ, offset, length)
        assert (flags, kind, payload) == (1, 2, struct.pack(">QI", offset, length))
        ((_, flags, kind, payload),) = client.ask(raw.READ, offset, length, b"", raw.DF)
        assert (flags, kind, payload) == (1, 1, struct.pack(">Q", offset) + bytes(length))
    for offset, length in ((0, 65536), (65536 - 1, 65536), (65536, 65537), (192 * 1024, 128 * 1024)):
        expected = bytearray(b"\7" * 65536 + bytes(65536) + b"\7" * 131072 + bytes(MiB))[offset : offset + length]
        assert client.read(offset, length) == expected
