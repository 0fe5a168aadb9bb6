"""A flush that fails at any one of its writes loses nothing: what is not on disk is still in memory, and the next
flush, or the close, brings it there.

Every slice, table and refcount block is changed before the flush and never again, so that nothing but the write-back's
own memory of what is left makes the second attempt write it.
"""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pyqsd.block.node import Node
from tests.support import peers

from .support import LogFile, close, open_logged, run

KiB = 1024


class Case(NamedTuple):
    """An image and what is done to it. In each `step` bytes of it one piece of `length` is written, which is what
    makes one slice (or one refcount block, or nearly all of a table) dirty."""

    create: str
    size: int
    step: int
    length: int = 512
    #: Every how many steps the base image has a table already, and what is discarded in it.
    every: int = 2
    #: Written to the base image, so that the refcount table is nearly full.
    fill: int = 0
    snapshot: bool = False
    options: tuple[tuple[str, int], ...] = (("l2_cache_entry_size", 512),)


SMALL_REFCOUNTS = (("l2_cache_entry_size", 512), ("refcount_cache_size", 2048))
SMALL_L2 = (("l2_cache_entry_size", 512), ("l2_cache_size", 28 * 512))

CASES = {
    "tables": Case("cluster_size=512", 384 * KiB, 32 * KiB),
    "slices": Case("cluster_size=4k", 3072 * KiB, 256 * KiB, every=4),
    "blocks": Case("cluster_size=512,refcount_bits=64", 384 * KiB, 32 * KiB, 8 * KiB, options=SMALL_REFCOUNTS),
    "growing": Case(
        "cluster_size=512,refcount_bits=64",
        2304 * KiB,
        128 * KiB,
        8 * KiB,
        fill=1936 * KiB,
        every=4,
    ),
    # Slices that are written in several pieces, and a cache that has to evict for reads.
    "wide": Case("cluster_size=8k", 8192 * KiB, 2048 * KiB, options=(("l2_cache_entry_size", 8192),)),
    "evicting": Case("cluster_size=512", 1536 * KiB, 64 * KiB, every=3, options=SMALL_L2),
    "subclusters": Case("cluster_size=16k,extended_l2=on", 4096 * KiB, 512 * KiB, every=3),
    "snapshot": Case("cluster_size=1k", 512 * KiB, 64 * KiB, snapshot=True),
    "v2": Case("cluster_size=1k,compat=0.10", 512 * KiB, 64 * KiB),
    "lazy": Case("cluster_size=1k,lazy_refcounts=on", 512 * KiB, 64 * KiB),
}


def make(path: Path, case: Case) -> tuple[bytes, bytes]:
    """The base image, and the content of its disk."""
    peers.run("qemu-img", "create", "-f", "qcow2", "-o", case.create, str(path), str(case.size))
    commands = []
    if case.fill:
        commands.append(f"write -P 0x10 0 {case.fill}")
    for at in range(0, case.size, case.step * case.every):
        commands.append(f"write -P 0x11 {at + case.step // 2} {case.step // 4}")
    arguments = [part for command in commands for part in ("-c", command)]
    peers.run("qemu-io", "-f", "qcow2", *arguments, str(path))
    if case.snapshot:
        peers.run("qemu-img", "snapshot", "-c", "first", str(path))
    raw = path.with_suffix(".raw")
    peers.run("qemu-img", "convert", "-O", "raw", str(path), str(raw))
    return path.read_bytes(), raw.read_bytes()


class Fault:
    """Fails the write or flush number `at` from now on, once."""

    def __init__(self, at: int, error: int) -> None:
        self.left = at
        self.error = error

    def __call__(self, kind: str) -> None:
        if kind in ("write", "flush"):
            self.left -= 1
            if self.left == 0:
                raise OSError(self.error, "injected")


async def change(node: Node, content: bytearray, case: Case) -> None:
    """Make every slice dirty once, and drop references to clusters."""
    for number, at in enumerate(range(0, case.size, case.step)):
        value = bytes([0x80 + number]) * case.length
        await node.pwrite(at, value)
        content[at : at + case.length] = value
        if number % case.every == 0 and "compat" not in case.create:
            start, length = at + case.step // 2, case.step // 4
            await node.pdiscard(start, length)
            content[start : start + length] = bytes(length)


async def flush(node: Node) -> bool:
    try:
        await node.flush()
    except OSError:
        return False
    return True


def judge(path: Path, image: bytes, content: bytes, leaks: bool) -> None:
    """The image is sound, and the disk is `content`."""
    path.write_bytes(image)
    told = json.loads(peers.run("qemu-img", "check", "--output=json", str(path), ok=()).stdout)
    assert not told.get("corruptions") and not told.get("check-errors"), told
    assert leaks or not told.get("leaks"), told
    run(verify(image, content))


async def verify(image: bytes, content: bytes) -> None:
    node, _ = await open_logged(image, read_only=True)
    data = bytes(await node.pread(0, node.length))
    await close(node)
    if data != content:
        first = next(at for at in range(len(data)) if data[at] != content[at])
        raise AssertionError(f"the disk differs at {first:#x}")


async def attempt(image: bytes, content: bytes, case: Case, at: int, again: bool) -> Any:
    """One flush whose request number `at` fails, and then a second one (`again`) or just the close. Returns whether the
    first one worked, the image file after the second flush and after the close, and the disk."""
    options: dict[str, Any] = dict(case.options)
    node, file = await open_logged(image, **options)
    disk = bytearray(content)
    await change(node, disk, case)
    file.fault = Fault(at, errno.EIO if again else errno.ENOSPC)
    worked = await flush(node)
    hit = file.fault.left <= 0
    assert worked != hit, "the error was not reported"
    file.fault = None
    # Reads see what could not be written, even if they have to make room for other tables.
    assert bytes(await node.pread(0, node.length)) == disk, "the disk differs after the error"
    killed = None
    if again:
        assert await flush(node)
        killed = state(file)
    await close(node)
    return hit, killed, state(file), bytes(disk)


def state(file: LogFile) -> bytes:
    return bytes(file.data)


@pytest.mark.parametrize("name", CASES)
def test_every_request_of_a_flush(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    image, content = make(tmp_path / "base.qcow2", case)
    path = tmp_path / "image.qcow2"
    at, hit = 0, True
    while hit:
        at += 1
        # Both ways on; the largest image takes them in turns.
        for again in (at % 2 == 1,) if case.fill else (True, False):
            try:
                hit, killed, closed, disk = run(attempt(image, content, case, at, again))
                if killed is not None and "lazy" not in case.create:
                    judge(path, killed, disk, leaks=True)
                judge(path, closed, disk, leaks=False)
            except AssertionError as exc:
                raise AssertionError(f"request {at}, {'flushed' if again else 'closed'}: {exc}") from exc
    # Offset 48 of the header: where the refcount table is.
    assert (closed[48:56] != image[48:56]) == bool(case.fill)
    assert at > 6, "hardly anything was written"


def test_counts_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a flush wants to free leaks then, as in QSD; all else is on disk."""
    case = CASES["growing"]
    image, content = make(tmp_path / "base.qcow2", case)

    async def main() -> tuple[bytes, bytes]:
        options: dict[str, Any] = dict(case.options)
        node, file = await open_logged(image, **options)
        disk = bytearray(content)
        await change(node, disk, case)
        left = 3

        def fault(kind: str) -> None:
            nonlocal left
            if kind == "read" and left:
                left -= 1
                raise OSError(errno.EIO, "injected")

        file.fault = fault
        assert await flush(node)
        assert not left
        await close(node)
        return state(file), bytes(disk)

    closed, disk = run(main())
    assert capsys.readouterr().err == "qcow2_free_clusters failed: Input/output error\n" * 3
    path = tmp_path / "image.qcow2"
    path.write_bytes(closed)
    assert json.loads(peers.run("qemu-img", "check", "--output=json", str(path), ok=(3,)).stdout)["leaks"]
    judge(path, closed, disk, leaks=True)
