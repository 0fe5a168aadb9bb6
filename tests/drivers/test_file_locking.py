"""Locks on image files: the same bytes as QEMU's programs lock, and everybody refuses everybody as they do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pyqsd.block import permissions as perms
from pyqsd.drivers.protocols._locking import FileLocks
from pyqsd.drivers.protocols._posix import PosixDriver
from pyqsd.qapi.errors import Error
from tests.drivers import opening
from tests.drivers.opening import add, graph, run, use
from tests.support import peers

SIZE = 1 << 20
WRITE_ALL = perms.ALL


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"")
    os.truncate(path, SIZE)
    return path


def locked_bytes(path: Path) -> set[int]:
    """The bytes of the file that anybody has locked, and all of these locks must be shared ones."""
    inode = os.stat(path).st_ino
    found: set[int] = set()
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.split()
        if fields[5].rpartition(":")[2] == str(inode):
            assert fields[1:4] == ["OFDLCK", "ADVISORY", "READ"]
            found |= set(range(int(fields[6]), int(fields[7]) + 1))
    return found


def qemu_io(path: Path, *args: str) -> str:
    """What qemu-io says when it opens the image: nothing if it may."""
    done = subprocess.run(
        [peers.require("qemu-io"), "-f", "raw", *args, "-c", "length", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.stderr


# --- the bytes -------------------------------------------------------------------------------------------------------

#: How the image is used: the top node over the file, and whether it is exported, writable or not.
USES: dict[str, tuple[dict[str, Any] | None, str | None]] = {
    "nobody": (None, None),
    "file, reader": (None, "r"),
    "file, writer": (None, "w"),
    "raw, nobody": ({"driver": "raw"}, None),
    "raw, reader": ({"driver": "raw"}, "r"),
    "raw, writer": ({"driver": "raw"}, "w"),
    "raw with an offset, writer": ({"driver": "raw", "offset": 4096}, "w"),
    "read-only raw, reader": ({"driver": "raw", "read-only": True}, "r"),
    "shared raw, reader": ({"driver": "raw", "read-only": True, "force-share": True}, "r"),
    "auto-read-only raw, reader": ({"driver": "raw", "auto-read-only": True}, "r"),
    "auto-read-only raw, writer": ({"driver": "raw", "auto-read-only": True}, "w"),
}


@pytest.mark.parametrize("name", USES)
def test_same_bytes_as_the_real_daemon(image: Path, tmp_path: Path, name: str) -> None:
    top, user = USES[name]
    protocol = {"driver": "file", "filename": str(image)}
    wire = {"node-name": "node", **(protocol if top is None else {**top, "file": protocol})}
    args = ["--blockdev", json.dumps(wire), "--nbd-server", "addr.type=unix,addr.path=nbd.sock"]
    if user is not None:
        args += ["--export", f"type=nbd,id=e,node-name=node,writable={'on' if user == 'w' else 'off'}"]
    with opening.real_daemon(args, tmp_path):
        theirs = locked_bytes(image)

    async def main() -> None:
        async with graph() as g:
            node = await g.add(opening.convert(wire, opening.BlockdevOptions))
            assert locked_bytes(image) == (theirs if user is None else locked_bytes(image))
            if user is not None:
                # As an NBD export uses its node.
                need = opening.READ_WRITE if user == "w" else opening.READ
                backend = use(g, node, need, perms.ALL & ~perms.RESIZE)
                assert locked_bytes(image) == theirs
                backend.remove()
            await g.remove("node")
        assert locked_bytes(image) == set()

    run(main)


# --- who refuses whom ------------------------------------------------------------------------------------------------


def test_qemu_is_refused(image: Path) -> None:
    async def main() -> None:
        async with graph() as g:
            node = await add(g, driver="raw", file={"driver": "file", "filename": str(image)})
            assert qemu_io(image) == "" and qemu_io(image, "-r") == ""
            writer = use(g, node, opening.READ_WRITE, perms.ALL & ~perms.WRITE)
            hint = f"Is another process using the image [{image}]?"
            assert 'Failed to get "write" lock' in qemu_io(image) and hint in qemu_io(image)
            assert 'Failed to get shared "write" lock' in qemu_io_exclusive(image)
            # A reader who does not mind writers is welcome; one who minds is not.
            assert qemu_io(image, "-r", "-U") == ""
            writer.remove()
            assert qemu_io(image) == ""
            reader = use(g, node, opening.READ, perms.ALL & ~perms.RESIZE)
            said = peers.run("qemu-img", "resize", "-f", "raw", str(image), "2M", ok=(1,)).stderr
            assert said == f"qemu-img: Could not open '{image}': Failed to get \"resize\" lock\n{hint}\n"
            reader.remove()

    run(main)
    assert os.stat(image).st_size == SIZE


def qemu_io_exclusive(path: Path) -> str:
    """A reader that lets nobody write: a qcow2 image with this file below it."""
    overlay = path.with_suffix(".qcow2")
    if not overlay.exists():
        peers.run("qemu-img", "create", "-q", "-f", "qcow2", str(overlay), "1M")
    # blkdebug can be told which permissions to take and to share.
    return subprocess.run(
        [
            peers.require("qemu-io"),
            "--image-opts",
            "-r",
            "-c",
            "length",
            f"driver=blkdebug,unshare-child-perms.0=write,image.driver=file,image.filename={path}",
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    ).stderr


def test_we_are_refused(image: Path, tmp_path: Path) -> None:
    """By a daemon whose user shares nothing (a device in a virtual machine would be one)."""
    lock = (
        "driver=blkdebug,node-name=node,take-child-perms.0=write,unshare-child-perms.0=write,"
        f"unshare-child-perms.1=resize,image.driver=file,image.filename={image}"
    )

    async def main() -> None:
        async with graph() as g:
            node = await add(g, driver="file", filename=str(image))
            before = locked_bytes(image)
            with pytest.raises(Error) as caught:
                use(g, node)
            assert caught.value.desc == 'Failed to get "write" lock'
            assert caught.value.hint == f"Is another process using the image [{image}]?"
            # Nothing is left of the attempt.
            assert locked_bytes(image) == before
            with pytest.raises(Error) as caught:
                use(g, node, opening.READ, perms.ALL & ~perms.WRITE)
            assert caught.value.desc == 'Failed to get shared "write" lock'
            use(g, node, opening.READ)
            # And with locking=off nobody asks.
            free = await add(g, driver="file", filename=str(image), locking="off", node_name="free")
            use(g, free)
            assert locked_bytes(image) == before | {100}

    with opening.real_daemon(["--blockdev", lock], tmp_path):
        run(main)


def test_two_of_us_refuse_each_other(image: Path) -> None:
    """Also within one process: every node has its own open file."""

    async def main() -> None:
        async with graph() as g:
            one = await add(g, driver="file", filename=str(image), node_name="one")
            two = await add(g, driver="file", filename=str(image), node_name="two")
            first = use(g, one, opening.READ_WRITE, perms.ALL & ~perms.WRITE)
            with pytest.raises(Error, match='Failed to get "write" lock'):
                use(g, two)
            use(g, two, opening.READ)
            first.remove()
            use(g, two)

    run(main)


def test_locks_are_gone_with_a_killed_process(image: Path) -> None:
    script = f"""
import asyncio, sys
sys.path[:0] = {sys.path!r}
from tests.drivers import opening
from tests.drivers.opening import add, graph, use
async def main():
    async with graph() as g:
        node = await add(g, driver="file", filename={str(image)!r})
        use(g, node, opening.READ_WRITE, 1)
        print("locked", flush=True)
        await asyncio.sleep(60)
asyncio.run(main())
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        assert locked_bytes(image) == {100, 101, 201, 202, 203}
        assert 'Failed to get "write" lock' in qemu_io(image)
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    assert locked_bytes(image) == set()
    assert qemu_io(image) == ""


# --- permissions that change -----------------------------------------------------------------------------------------


def test_every_permission_has_its_bytes(image: Path) -> None:
    async def main() -> None:
        async with graph() as g:
            node = await add(g, driver="file", filename=str(image))
            user = use(g, node, 0)
            assert locked_bytes(image) == set()
            for perm in range(16):
                for shared in (0, 5, 15):
                    user.set_perms(perm, shared)
                    expected = {100 + bit for bit in range(4) if perm & 1 << bit}
                    expected |= {200 + bit for bit in range(4) if not shared & 1 << bit}
                    assert locked_bytes(image) == expected

    run(main)


def test_refused_change_keeps_the_old_locks(image: Path) -> None:
    async def main() -> None:
        async with graph() as g:
            one = await add(g, driver="file", filename=str(image), node_name="one")
            two = await add(g, driver="file", filename=str(image), node_name="two", auto_read_only=True)
            blocker = use(g, one, opening.READ, perms.ALL & ~perms.WRITE)
            user = use(g, two, opening.READ)
            driver = two.driver
            assert isinstance(driver, PosixDriver)
            file, before = driver._file, locked_bytes(image)
            for _ in range(3):
                with pytest.raises(Error, match='Failed to get "write" lock'):
                    user.set_perms(opening.READ_WRITE, 0)
                assert driver._file is file and locked_bytes(image) == before
            blocker.remove()
            user.set_perms(opening.READ_WRITE, 1)
            assert driver._file is not file and locked_bytes(image) == {100, 101, 201, 202, 203}

    run(main)


def test_locks_move_with_reopening(image: Path) -> None:
    async def main() -> None:
        async with graph() as g:
            wire: dict[str, Any] = {"driver": "file", "node_name": "node", "filename": str(image)}
            node = await g.add(opening.options(**wire))
            user = use(g, node, opening.READ_WRITE, perms.ALL & ~perms.WRITE)
            expected = {100, 101, 201}
            for cache in ({"direct": True}, {"direct": False}):
                await g.reopen([opening.options(**wire, cache=cache)])
                assert locked_bytes(image) == expected
                assert 'Failed to get "write" lock' in qemu_io(image)
            user.remove()
            assert locked_bytes(image) == set()

    run(main)


def test_no_locks_with_locking_off(image: Path) -> None:
    async def main() -> None:
        async with graph() as g:
            node = await add(g, driver="file", filename=str(image), locking="off")
            use(g, node, WRITE_ALL, 0)
            assert locked_bytes(image) == set()
            assert qemu_io(image) == ""
            on = await add(g, driver="file", filename=str(image), locking="on", node_name="on")
            use(g, on)
            assert locked_bytes(image) == {100, 101}

    run(main)


def test_lock_that_the_file_system_refuses(image: Path) -> None:
    fd = os.open(image, os.O_WRONLY)
    try:
        # A shared lock needs a descriptor that can read.
        locks = FileLocks(fd, str(image))
        with pytest.raises(Error) as caught:
            locks.add(1, 0)
        assert caught.value.desc == "Failed to lock byte 100"
        assert locks.held == 0
    finally:
        os.close(fd)


def test_half_taken_locks_are_given_back(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyqsd.drivers.protocols import _locking

    real = _locking._set
    fd = os.open(image, os.O_RDWR)
    try:
        locks = FileLocks(fd, str(image))
        locks.add(1, 0)

        def refuse(fd: int, kind: int, start: int) -> None:
            if start == 203:
                raise OSError(37, "no locks available")
            real(fd, kind, start)

        monkeypatch.setattr(_locking, "_set", refuse)
        with pytest.raises(Error, match="Failed to lock byte 203"):
            locks.add(15, 15)
        assert (locks.held, locks.unshared) == (1, 0)
        assert locked_bytes(image) == {100}
    finally:
        os.close(fd)
