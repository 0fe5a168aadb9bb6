"""``host_device``: block devices (a loop device, where one can be had) and character devices."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyqsd.block.driver import FUA, MAY_UNMAP, NO_FALLBACK
from pyqsd.block.extents import DATA
from pyqsd.drivers.protocols import _ioctl
from pyqsd.drivers.protocols._posix import PosixDriver
from pyqsd.qapi.errors import Error
from tests.drivers import opening
from tests.drivers.opening import add, graph, read, run, use, write
from tests.support import peers

SIZE = 4 << 20


class Loop:
    """A loop device over a file."""

    def __init__(self, backing: Path, *args: str) -> None:
        done = subprocess.run(
            [peers.require("losetup"), "--find", "--show", *args, str(backing)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if done.returncode:
            pytest.skip(f"this machine lets nobody set up a loop device: {done.stderr.strip()}")
        self.path = done.stdout.strip()
        self.backing = backing

    def close(self) -> None:
        peers.run("losetup", "--detach", self.path)


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    backing = tmp_path / "backing.img"
    backing.write_bytes(b"\x55" * SIZE)
    device = Loop(backing)
    try:
        yield device
    finally:
        device.close()


def error_of(**wire: Any) -> str:
    found: list[str] = []

    async def main() -> None:
        async with graph() as g:
            with pytest.raises(Error) as caught:
                await add(g, driver="host_device", **wire)
            found.append(caught.value.desc)

    run(main)
    return found[0]


def test_errors_of_opening(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(b"x" * 512)
    for other in (path, "/proc/version"):
        assert (
            error_of(filename=str(other))
            == f"'host_device' driver requires '{other}' to be either a character or block device"
        )
    assert error_of(filename="/dev/nonexistent") == "Could not open '/dev/nonexistent': No such file or directory"
    assert error_of(filename="/tmp") == "Could not open '/tmp': Is a directory"
    assert error_of(filename="") == "The 'host_device' block driver requires a file name"


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero"])
def test_character_device(path: str) -> None:
    async def main() -> None:
        async with graph() as g:
            node = await add(g, driver="host_device", filename=path)
            assert node.length == 0 and node.driver.allocated_size() == 0
            with pytest.raises(Error, match="Cannot grow device files"):
                await node.truncate(512)
            stats: Any = node.driver.driver_specific_stats()
            assert stats.__struct_config__.tag == "host_device"

    run(main)


@pytest.mark.parametrize("aio", ["threads", "io_uring"])
@pytest.mark.parametrize("direct", [False, True])
def test_block_device(loop: Loop, direct: bool, aio: str) -> None:
    async def main() -> None:
        async with graph() as g:
            node = await add(g, driver="host_device", filename=loop.path, cache={"direct": direct}, aio=aio)
            assert node.length == SIZE
            user = use(g, node)
            await write(user, 1000, b"\x66" * 5000)
            await write(user, 100000, b"\x77" * 512, FUA)
            assert await read(user, 999, 5002) == b"\x55" + b"\x66" * 5000 + b"\x55"
            await user.pwrite_zeroes(8192, 4096)
            await user.pwrite_zeroes(16384 + 100, 5000)
            assert await read(user, 8191, 4098) == b"\x55" + bytes(4096) + b"\x55"
            assert await read(user, 16384 + 99, 5002) == b"\x55" + bytes(5000) + b"\x55"
            (n, flags, _, _), _ = await user.block_status_above(None, 0, SIZE)
            assert n == SIZE and flags & DATA
            with pytest.raises(OSError):
                await read(user, SIZE, 1)
            await user.flush()

    run(main)
    content = loop.backing.read_bytes()
    assert content[999:6001] == b"\x55" + b"\x66" * 5000 + b"\x55"
    assert content[100000:100512] == b"\x77" * 512 and content[8192:12288] == bytes(4096)


def test_zeroes_and_discards_give_space_back(loop: Loop) -> None:
    def blocks() -> int:
        os.sync()
        return os.stat(loop.backing).st_blocks * 512

    async def main() -> None:
        async with graph() as g:
            node = await add(g, driver="host_device", filename=loop.path, discard="unmap")
            user = use(g, node)
            full = blocks()
            await user.pdiscard(0, 1 << 20)
            assert blocks() <= full - (1 << 20)
            await user.pwrite_zeroes(1 << 20, 1 << 20, MAY_UNMAP | NO_FALLBACK)
            assert blocks() <= full - (2 << 20)
            assert await read(user, 0, 2 << 20) == bytes(2 << 20)
            assert await read(user, 2 << 20, 512) == b"\x55" * 512
            # BLKZEROOUT may be slow, so that somebody who only wants it fast is refused.
            with pytest.raises(OSError) as caught:
                await user.pwrite_zeroes(2 << 20, 4096, NO_FALLBACK)
            assert caught.value.errno == errno.ENOTSUP
            stats: Any = node.driver.driver_specific_stats()
            assert (stats.discard_nb_ok, stats.discard_nb_failed, stats.discard_bytes_ok) == (1, 0, 1 << 20)

    run(main)


def test_device_without_its_own_zeroes_and_discards(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "the device cannot")

    monkeypatch.setattr(_ioctl, "zero_out", refuse)
    monkeypatch.setattr(_ioctl, "discard", refuse)

    async def main() -> None:
        async with graph() as g:
            node = await add(g, driver="host_device", filename=loop.path, discard="unmap")
            user = use(g, node)
            assert isinstance(node.driver, PosixDriver)
            await user.pwrite_zeroes(4096, 8192)
            assert await read(user, 4095, 8194) == b"\x55" + bytes(8192) + b"\x55"
            await user.pdiscard(0, 4096)
            assert await read(user, 0, 1) == b"\x55"
            assert node.driver._lacking == {"zero out", "discard"}
            assert node.driver.discard_failed == 1

    run(main)


def test_size_of_a_device(loop: Loop) -> None:
    async def main() -> None:
        async with graph() as g:
            node = await add(g, driver="host_device", filename=loop.path)
            await node.truncate(512)
            assert node.length == SIZE
            for length, exact, preallocation, message in (
                (2 * SIZE, False, "off", "Cannot grow device files"),
                (512, True, "off", "Cannot resize device files"),
                (SIZE, False, "full", "Preallocation mode 'full' unsupported for this non-regular file"),
            ):
                with pytest.raises(Error, match=message):
                    await node.truncate(length, exact=exact, preallocation=preallocation)
            # The device has grown; somebody says so.
            os.truncate(loop.backing, 2 * SIZE)
            peers.run("losetup", "--set-capacity", loop.path)
            await node.truncate(2 * SIZE)
            assert node.length == 2 * SIZE
            assert await read(use(g, node), SIZE, 512) == bytes(512)

    run(main)


def test_read_only_device(tmp_path: Path) -> None:
    backing = tmp_path / "backing.img"
    backing.write_bytes(b"\x55" * SIZE)
    device = Loop(backing, "--read-only")
    try:
        said = error_of(filename=device.path)
        assert said in (
            "The device is not writable: Permission denied",
            f"Could not open '{device.path}': Permission denied",
        )
        assert said == qsd_error(device.path)

        async def main() -> None:
            async with graph() as g:
                node = await add(g, driver="host_device", filename=device.path, auto_read_only=True)
                assert await read(use(g, node, opening.READ), 0, 512) == b"\x55" * 512
                with pytest.raises(Error, match=r"not writable|Permission denied"):
                    use(g, node)

        run(main)
    finally:
        device.close()


def qsd_error(path: str) -> str:
    option = f"driver=host_device,node-name=node,filename={path}"
    said = peers.run("qemu-storage-daemon", "--blockdev", option, ok=(1,)).stderr
    return said.strip().removeprefix(f"qemu-storage-daemon: --blockdev {option}: ")


def test_block_sizes(tmp_path: Path) -> None:
    backing = tmp_path / "backing.img"
    backing.write_bytes(b"\x55" * SIZE)
    device = Loop(backing, "--sector-size", "4096")
    try:
        fd = os.open(device.path, os.O_RDONLY)
        assert stat.S_ISBLK(os.fstat(fd).st_mode)
        assert _ioctl.logical_block_size(fd) == 4096 <= _ioctl.physical_block_size(fd)
        assert _ioctl.device_size(fd) == SIZE and not _ioctl.is_read_only(fd)
        os.close(fd)

        async def main() -> None:
            async with graph() as g:
                node = await add(g, driver="host_device", filename=device.path, cache={"direct": True})
                assert node.limits.request_alignment == 4096
                user = use(g, node)
                await write(user, 512, b"\x66" * 512)
                assert await read(user, 500, 600) == b"\x55" * 12 + b"\x66" * 512 + b"\x55" * 76

        run(main)
    finally:
        device.close()


def test_locks_as_the_real_daemon(loop: Loop, tmp_path: Path) -> None:
    """Devices are locked like files."""

    def locked() -> set[str]:
        inode = str(os.stat(loop.path).st_ino)
        lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        return {f"{line[6]}-{line[7]}" for line in lines if line[5].rpartition(":")[2] == inode}

    def flattened() -> set[int]:
        found: set[int] = set()
        for entry in locked():
            start, _, end = entry.partition("-")
            found |= set(range(int(start), int(end) + 1))
        return found

    wire = {"driver": "host_device", "node-name": "node", "filename": loop.path}
    args = ["--blockdev", json.dumps(wire), "--nbd-server", "addr.type=unix,addr.path=nbd.sock"]
    args += ["--export", "type=nbd,id=e,node-name=node,writable=on"]
    with opening.real_daemon(args, tmp_path):
        theirs = flattened()

    async def main() -> None:
        async with graph() as g:
            node = await add(g, driver="host_device", filename=loop.path)
            use(g, node, opening.READ_WRITE, 7)
            assert flattened() == theirs

    run(main)
