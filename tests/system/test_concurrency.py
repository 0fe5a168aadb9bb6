"""Many writes and zero writes in flight at once, to different sectors of the same clusters: none may be lost.

The disk is smaller than what is in flight touches, so that most requests meet another one in their cluster.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.support import images, nbd
from tests.support.daemon import DaemonProcess
from tests.support.images import KiB, MiB
from tests.support.nbd import NbdClient

SECTOR = 512
SIZE = 6 * MiB

# name → (format, qemu-img options, backing, O_DIRECT)
KINDS = {
    "raw": ("raw", "", False, False),
    "raw-direct": ("raw", "", False, True),
    "64k": ("qcow2", "", False, False),
    "64k-direct": ("qcow2", "", False, True),
    "64k-backing-direct": ("qcow2", "", True, True),
    "4k-backing-direct": ("qcow2", "cluster_size=4k", True, True),
    "2M-direct": ("qcow2", "cluster_size=2M", False, True),
    "v2-direct": ("qcow2", "compat=0.10", False, True),
    "v2-backing": ("qcow2", "compat=0.10", True, False),
    "lazy-direct": ("qcow2", "lazy_refcounts=on", False, True),
}


def storm(root: Path, name: str, seed: int, requests: int = 500, depth: int = 24) -> None:
    fmt, options, backing, direct = KINDS[name]
    rng = random.Random(seed)
    model = bytearray(SIZE)
    root.mkdir()
    if backing:
        images.create("base.qcow2", SIZE, cwd=root)
        images.io("base.qcow2", "write -P 0xbb 0 3M", cwd=root)
        model[: 3 * MiB] = b"\xbb" * (3 * MiB)
    images.create("disk", None if backing else SIZE, fmt, options, backing="base.qcow2" if backing else None, cwd=root)
    on = "on" if direct else "off"
    node = f"{fmt},node-name=disk,discard=unmap,cache.direct={on}"
    args = [
        *("--blockdev", f"{node},file.driver=file,file.filename=disk,file.cache.direct={on}"),
        *("--nbd-server", "addr.type=unix,addr.path=nbd.sock", "--export", "nbd,id=e,node-name=disk,writable=on"),
    ]
    pending: dict[int, tuple[int, bytes]] = {}
    busy: set[int] = set()
    sent = 0
    with DaemonProcess("pyqsd", args, workdir=root), NbdClient(root / "nbd.sock", "disk") as client:
        while sent < requests or pending:
            while sent < requests and len(pending) < depth:
                length = rng.choice((512, 1536, 4 * KiB, 4 * KiB, 24 * KiB, 64 * KiB, 130 * KiB))
                offset = rng.randrange(0, SIZE - length, SECTOR)
                sectors = set(range(offset // SECTOR, (offset + length) // SECTOR))
                if sectors & busy:
                    continue
                sent += 1
                busy |= sectors
                if sent % 4:
                    data = sent.to_bytes(4, "big") * (length // 4)
                    cookie = client.send(nbd.CMD_WRITE, offset, length, rng.choice((0, 0, 0, nbd.F_FUA)), data)
                else:
                    data = bytes(length)
                    cookie = client.send(nbd.CMD_WRITE_ZEROES, offset, length, rng.choice((0, nbd.F_NO_HOLE)))
                pending[cookie] = (offset, data)
            reply = client.receive()
            assert not reply.error, reply
            offset, data = pending.pop(reply.cookie)
            busy -= set(range(offset // SECTOR, (offset + len(data)) // SECTOR))
            model[offset : offset + len(data)] = data
        content = b"".join(client.pread(at, MiB) for at in range(0, SIZE, MiB))
        client.disconnect()
    for sector in range(SIZE // SECTOR):
        at = sector * SECTOR
        have, want = content[at : at + SECTOR], model[at : at + SECTOR]
        assert have == want, f"sector {sector}: {have[:4].hex()} instead of {want[:4].hex()}"
    if fmt == "qcow2":
        images.assert_clean(root / "disk")
    assert images.read_all(root / "disk", fmt, root / "raw") == content


@pytest.mark.parametrize("name", KINDS)
def test_storm(name: str, tmp_path: Path) -> None:
    for seed in range(3):
        storm(tmp_path / str(seed), name, seed)
