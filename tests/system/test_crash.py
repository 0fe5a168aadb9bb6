"""kill -9 in the middle of allocating writes: no corruption, and everything that was flushed is there.

A client keeps many writes in flight, with flushes in between, over an image that has to allocate for each. The daemon
is killed while replies are still coming in, at a point that varies with the seed. Then `qemu-img check` may find leaks
but no corruption (an image with lazy refcounts is repaired first, as any opener does), and each sector is either what
it was at the last completed flush or something that was written there afterwards.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import images, nbd, peers
from tests.support.daemon import DaemonProcess, poll
from tests.support.images import KiB, MiB
from tests.support.nbd import NbdClient

SECTOR = 512
SIZE = 16 * MiB


@dataclass(frozen=True)
class Kind:
    options: str
    backing: bool = False
    direct: bool = False
    kills: int = 5
    longest: int = 200 * KiB


KINDS = {
    "64k": Kind(""),
    "64k-direct": Kind("", direct=True),
    "64k-backing": Kind("", backing=True),
    "64k-backing-direct": Kind("", backing=True, direct=True),
    "4k": Kind("cluster_size=4k"),
    "4k-backing": Kind("cluster_size=4k", backing=True),
    "512-direct": Kind("cluster_size=512", direct=True, longest=8 * KiB),
    "v2-refcount-growth": Kind("compat=0.10,cluster_size=512", longest=24 * KiB),
    "lazy": Kind("lazy_refcounts=on,cluster_size=16k"),
    "lazy-backing-direct": Kind("lazy_refcounts=on,cluster_size=16k", backing=True, direct=True),
}


class History:
    """Per sector: what it held at the last completed flush, and what has been written (or may have been) since.

    A value is the number of the write, 0 for what was there at the beginning; the content is derived from it.
    """

    def __init__(self, initial: bytes) -> None:
        self.initial = initial
        self.flushed = [0] * (SIZE // SECTOR)
        self.acknowledged = list(self.flushed)
        self.since: dict[int, set[int]] = {}

    @staticmethod
    def content(number: int, sector: int) -> bytes:
        """A sector that says who wrote it: half of them are zeroes, which must not be lost either."""
        if number % 5 == 0:
            return bytes(SECTOR)
        return number.to_bytes(4, "big") * 64 + sector.to_bytes(4, "big") * 64

    def payload(self, number: int, offset: int, length: int) -> bytes:
        first = offset // SECTOR
        return b"".join(self.content(number, first + i) for i in range(length // SECTOR))

    def sent(self, number: int, offset: int, length: int) -> None:
        for sector in range(offset // SECTOR, (offset + length) // SECTOR):
            self.since.setdefault(sector, set()).add(number)

    def done(self, number: int, offset: int, length: int) -> None:
        for sector in range(offset // SECTOR, (offset + length) // SECTOR):
            self.acknowledged[sector] = number

    def check(self, data: bytes) -> None:
        for sector in range(SIZE // SECTOR):
            at = sector * SECTOR
            have = data[at : at + SECTOR]
            allowed = {self.flushed[sector]} | self.since.get(sector, set())
            for number in allowed:
                want = self.initial[at : at + SECTOR] if number == 0 else self.content(number, sector)
                if have == want:
                    break
            else:
                raise AssertionError(
                    f"sector {sector} holds {have[:8].hex()}…{have[-8:].hex()}, which is none of the writes {allowed}"
                )


def crash(root: Path, kind: Kind, seed: int, daemon_kind: str) -> int:
    """One life and death; how many writes had been answered."""
    rng = random.Random(seed)
    initial = bytes(SIZE)
    if kind.backing:
        images.create("base.qcow2", SIZE, cwd=root)
        images.io("base.qcow2", "write -P 0xbb 0 8M", cwd=root)
        initial = b"\xbb" * (8 * MiB) + bytes(SIZE - 8 * MiB)
        images.create("disk.qcow2", None, "qcow2", kind.options, backing="base.qcow2", cwd=root)
    else:
        images.create("disk.qcow2", SIZE, "qcow2", kind.options, cwd=root)
    cache = f",file.cache.direct={'on' if kind.direct else 'off'},cache.direct={'on' if kind.direct else 'off'}"
    args = [
        "--blockdev",
        f"qcow2,node-name=disk,file.driver=file,file.filename=disk.qcow2{cache},discard=unmap",
        "--nbd-server",
        "addr.type=unix,addr.path=nbd.sock",
        "--export",
        "nbd,id=e,node-name=disk,writable=on",
    ]
    history = History(initial)
    answers = rng.randrange(20, 400)  # the daemon dies when this many have come
    answered = 0
    number = 0
    in_flight: dict[int, tuple[int, int, int]] = {}
    busy: set[int] = set()
    with DaemonProcess(daemon_kind, args, workdir=root) as daemon:
        with NbdClient(root / "nbd.sock", "disk") as client:
            while answered < answers:
                # Fill the pipe, every request somewhere else than those in flight (their order is not defined).
                while len(in_flight) < 24:
                    length = min(kind.longest, rng.choice((512, 4 * KiB, 4 * KiB, 24 * KiB, 64 * KiB, 200 * KiB)))
                    offset = rng.randrange(0, SIZE - length, SECTOR)
                    chunk = set(range(offset // SECTOR, (offset + length) // SECTOR))
                    if chunk & busy:
                        continue
                    number += 1
                    history.sent(number, offset, length)
                    if number % 5 == 0:
                        cookie = client.send(nbd.CMD_WRITE_ZEROES, offset, length, rng.choice((0, nbd.F_NO_HOLE)))
                    else:
                        payload = history.payload(number, offset, length)
                        cookie = client.send(nbd.CMD_WRITE, offset, length, 0, payload)
                    in_flight[cookie] = (number, offset, length)
                    busy |= chunk
                reply = client.receive()
                assert not reply.error, reply
                done, offset, length = in_flight.pop(reply.cookie)
                busy -= set(range(offset // SECTOR, (offset + length) // SECTOR))
                history.done(done, offset, length)
                answered += 1
                if rng.random() < 0.05:
                    # A flush covers the writes answered before it was sent; the others may or may not be there.
                    covered = list(history.acknowledged)
                    cookie = client.send(nbd.CMD_FLUSH)
                    while True:
                        reply = client.receive()
                        assert not reply.error, reply
                        if reply.cookie == cookie:
                            break
                        done, offset, length = in_flight.pop(reply.cookie)
                        busy -= set(range(offset // SECTOR, (offset + length) // SECTOR))
                        history.done(done, offset, length)
                        answered += 1
                    for sector in list(history.since):
                        # What was not answered before the flush was sent stays possible, whatever the flush covered.
                        later = {n for n in history.since[sector] if n > covered[sector]}
                        history.flushed[sector] = covered[sector]
                        if later:
                            history.since[sector] = later
                        else:
                            del history.since[sector]
            daemon.kill()
        daemon.check_stderr()
    return judge(root, kind, history, answered)


def judge(root: Path, kind: Kind, history: History, answered: int) -> int:
    """The image after the crash."""
    disk = root / "disk.qcow2"
    # Requests that the kernel still has in its hands (io_uring) hold the file, and its locks, for a moment.
    poll(lambda: peers.run("qemu-img", "info", disk, ok=()).returncode == 0, "the locks to go")
    found = images.check(disk)
    assert not found.get("check-errors"), found
    if "lazy" in kind.options:
        # Refcounts may be too low until the image is opened for writing; nothing else may be wrong.
        assert images.info(disk)["format-specific"]["data"]["corrupt"] is False
        images.check(disk, "qcow2", "-r", "all")
        images.assert_clean(disk)
    else:
        assert not found.get("corruptions"), found
        images.assert_clean(disk, leaks=True)
    history.check(images.read_all(disk, "qcow2", root / "content.raw"))
    return answered


@pytest.mark.parametrize("name", KINDS)
def test_kill(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    for seed in range(kind.kills):
        root = tmp_path / str(seed)
        root.mkdir()
        assert crash(root, kind, seed * 100 + sum(map(ord, name)), "pyqsd") >= 20


def test_number_of_kills() -> None:
    assert sum(kind.kills for kind in KINDS.values()) >= 50


@pytest.mark.parametrize("daemon", ["qsd", "pyqsd"])
def test_opened_again_after_a_crash(daemon: str, tmp_path: Path) -> None:
    """pyqsd leaves an image that either daemon can open and write to, and it is clean after that."""
    kind = KINDS["lazy"]
    crash_root = tmp_path / "crash"
    crash_root.mkdir()
    images.create("disk.qcow2", SIZE, "qcow2", kind.options, cwd=crash_root)
    args = [
        "--blockdev",
        "qcow2,node-name=disk,file.driver=file,file.filename=disk.qcow2",
        "--nbd-server",
        "addr.type=unix,addr.path=nbd.sock",
        "--export",
        "nbd,id=e,node-name=disk,writable=on",
    ]
    with (
        DaemonProcess("pyqsd", args, workdir=crash_root) as first,
        NbdClient(crash_root / "nbd.sock", "disk") as client,
    ):
        for index in range(20):
            client.pwrite(index * 700 * KiB, bytes([index + 1]) * (64 * KiB))
        client.flush()
        first.kill()
    with DaemonProcess(daemon, args, workdir=crash_root), NbdClient(crash_root / "nbd.sock", "disk") as client:
        for index in range(20):
            assert client.pread(index * 700 * KiB, 64 * KiB) == bytes([index + 1]) * (64 * KiB)
        client.pwrite(15 * MiB, b"after" * 100)
        client.flush()
    images.assert_clean(crash_root / "disk.qcow2")
    assert images.read_all(crash_root / "disk.qcow2", "qcow2", crash_root / "raw")[15 * MiB :][:500] == b"after" * 100
