"""``file``: content, holes, sizes, errors, reopening. Locks are in test_file_locking.py."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import resource
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyqsd.block.driver import FUA, MAY_UNMAP, NO_FALLBACK
from pyqsd.block.extents import DATA, OFFSET_VALID, ZERO
from pyqsd.block.node import Node
from pyqsd.drivers.protocols import _extents, _posix
from pyqsd.qapi.errors import Error
from tests.drivers import opening
from tests.drivers.opening import add, graph, read, run, use, write
from tests.support import peers

SIZE = 1 << 17


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"")
    os.truncate(path, SIZE)
    return path


def driver_of(node: Node) -> _posix.PosixDriver:
    assert isinstance(node.driver, _posix.PosixDriver)
    return node.driver


def error_of(**wire: Any) -> Error:
    """What opening says."""
    found: list[Error] = []

    async def main() -> None:
        async with graph() as g:
            with pytest.raises(Error) as caught:
                await add(g, driver="file", **wire)
            found.append(caught.value)

    run(main)
    return found[0]


# --- content ---------------------------------------------------------------------------------------------------------

steps = st.lists(
    st.tuples(
        st.sampled_from(["write", "fua", "read", "zero", "unmap", "discard", "flush", "status", "resize", "reopen"]),
        st.integers(0, SIZE - 1),
        st.integers(1, 40000),
    ),
    max_size=30,
)


@pytest.mark.parametrize("aio", ["threads", "io_uring"])
@pytest.mark.parametrize("direct", [False, True])
@settings(max_examples=25, deadline=None)
@given(steps=steps)
def test_matches_a_bytearray(
    tmp_path_factory: pytest.TempPathFactory, aio: str, direct: bool, steps: list[tuple[str, int, int]]
) -> None:
    path = tmp_path_factory.mktemp("file") / "disk.img"
    path.write_bytes(b"")
    os.truncate(path, SIZE)
    model = bytearray(SIZE)

    async def main() -> None:
        wire = {"driver": "file", "filename": str(path), "aio": aio, "discard": "unmap", "node_name": "node"}
        now_direct = direct
        async with graph() as g:
            node = await g.add(opening.options(**wire, cache={"direct": direct}))
            user = use(g, node)
            for number, (what, offset, length) in enumerate(steps):
                offset = min(offset, len(model))
                length = min(length, len(model) - offset)
                if what in ("write", "fua"):
                    data = bytes([number + 1]) * length
                    await write(user, offset, data, FUA if what == "fua" else 0)
                    model[offset : offset + length] = data
                elif what == "read":
                    assert await read(user, offset, length) == model[offset : offset + length]
                elif what in ("zero", "unmap"):
                    await user.pwrite_zeroes(offset, length, MAY_UNMAP if what == "unmap" else 0)
                    model[offset : offset + length] = bytes(length)
                elif what == "discard":
                    # What is given back reads as zeroes, in whole sectors where the file is aligned so.
                    align = node.limits.request_alignment
                    await user.pdiscard(offset, length)
                    start, end = -(-offset // align) * align, (offset + length) // align * align
                    if offset + length == len(model):
                        end = len(model)
                    if start < end:
                        model[start:end] = bytes(end - start)
                elif what == "flush":
                    await user.flush()
                elif what == "status" and length:
                    (n, flags, _, _), _ = await user.block_status_above(None, offset, length)
                    assert 0 < n <= length
                    if flags & ZERO:
                        assert not any(model[offset : offset + n])
                elif what == "resize":
                    size = -(-length // 4096) * 4096
                    await node.truncate(size)
                    del model[size:]
                    model.extend(bytes(size - len(model)))
                    assert node.length == size
                elif what == "reopen":
                    now_direct = not now_direct
                    await g.reopen([opening.options(**wire, cache={"direct": now_direct})])
            assert await read(user, 0, len(model)) == model
            backend_size = os.stat(path).st_size
        assert path.read_bytes() == model
        assert backend_size == len(model)

    run(main)


@pytest.mark.parametrize("aio", ["threads", "io_uring"])
@pytest.mark.parametrize("direct", [False, True])
def test_many_requests_at_once(image: Path, aio: str, direct: bool) -> None:
    """Neighbouring and unaligned requests, all started before one has ended."""

    async def main() -> None:
        async with graph() as g:
            node = await add(g, driver="file", filename=str(image), aio=aio, cache={"direct": direct})
            user = use(g, node)
            pieces = [(at, 300) for at in range(0, SIZE - 300, 300)]

            async def one(offset: int, length: int) -> None:
                await write(user, offset, (offset // 300).to_bytes(2, "big") * (length // 2))

            await asyncio.gather(*[one(*piece) for piece in pieces])
            results = await asyncio.gather(*[read(user, *piece) for piece in pieces])
            for (offset, length), data in zip(pieces, results, strict=True):
                assert data == (offset // 300).to_bytes(2, "big") * (length // 2)

    run(main)


def test_content_is_what_qemu_sees(image: Path) -> None:
    async def main() -> None:
        async with graph() as g:
            node = await add(g, driver="file", filename=str(image), discard="unmap")
            user = use(g, node)
            await write(user, 0, b"\x11" * 65536)
            await user.pwrite_zeroes(4096, 8192, MAY_UNMAP)
            await user.pdiscard(32768, 4096)
            await user.flush()

    run(main)
    for command in ("-P 0x11 0 4096", "-P 0 4096 8192", "-P 0x11 12288 20480", "-P 0 32768 4096", "-P 0 65536 65536"):
        out = peers.run("qemu-io", "-r", "-f", "raw", "-c", f"read {command}", str(image)).stdout
        assert "Pattern verification failed" not in out, out


def test_unaligned_file_is_rounded_up_to_whole_sectors(tmp_path: Path) -> None:
    path = tmp_path / "odd.img"
    path.write_bytes(b"\x22" * 1000)

    async def main() -> None:
        async with graph() as g:
            node = await add(g, driver="file", filename=str(path))
            assert node.length == 1024
            user = use(g, node)
            assert await read(user, 900, 124) == b"\x22" * 100 + bytes(24)
            (n, flags, _, _), _ = await user.block_status_above(None, 0, 1024)
            assert n == 1000 and flags & DATA
            (n, flags, _, _), _ = await user.block_status_above(None, 1000, 24)
            assert n == 24 and flags & ZERO and not flags & DATA
            await write(user, 1010, b"\x33" * 14)
            assert await read(user, 990, 34) == b"\x22" * 10 + bytes(10) + b"\x33" * 14

    run(main)
    assert path.read_bytes() == b"\x22" * 1000 + bytes(10) + b"\x33" * 14


def test_far_offsets(tmp_path: Path) -> None:
    path = tmp_path / "huge.img"
    path.write_bytes(b"")
    size = 1 << 43

    async def main() -> None:
        async with graph() as g:
            node = await add(g, driver="file", filename=str(path))
            await node.truncate(size)
            user = use(g, node)
            await write(user, size - 10, b"0123456789")
            assert await read(user, size - 20, 20) == bytes(10) + b"0123456789"
            (n, flags, _, _), _ = await user.block_status_above(None, 0, size)
            assert flags & ZERO and n == size - 4096
            for offset, length in ((size - 1, 2), (size, 1), (1 << 62, 512), (-512, 512)):
                with pytest.raises(OSError):
                    await read(user, offset, length)
                with pytest.raises(OSError):
                    await write(user, offset, bytes(length))
            with pytest.raises(Error, match="Could not resize file: File too large"):
                await node.truncate(1 << 60)
            with pytest.raises(Error):
                await node.truncate((1 << 63) - 1)
            assert node.length == size == os.stat(path).st_size

    run(main)


# --- opening ---------------------------------------------------------------------------------------------------------


def test_errors_of_opening(tmp_path: Path, image: Path) -> None:
    assert error_of(filename="/nonexistent").desc == "Could not open '/nonexistent': No such file or directory"
    assert error_of(filename=str(tmp_path)).desc == f"Could not open '{tmp_path}': Is a directory"
    assert error_of(filename="/dev/null").desc == "'file' driver requires '/dev/null' to be a regular file"
    assert error_of(filename="").desc == "The 'file' block driver requires a file name"
    long = "x" * 5000
    assert error_of(filename=long).desc == f"Could not open '{long}': File name too long"
    assert error_of(filename="a\0b").desc.startswith("Could not open 'a")
    assert (
        error_of(filename=str(image), aio="native").desc
        == "aio=native was specified, but it requires cache.direct=on, which was not specified."
    )
    assert error_of(filename="/proc/version").desc == "Could not refresh total sector count: Invalid argument"
    assert error_of(filename=str(image), pr_manager="x").desc == "No persistent reservation manager with id 'x'"
    assert "x-check-cache-dropped" in error_of(filename=str(image), x_check_cache_dropped=True).desc


def test_fifo_does_not_hang(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    assert "to be a regular file" in error_of(filename=str(path)).desc
    assert "to be a regular file" in error_of(filename=str(path), read_only=True).desc


def flags_of(node: Node) -> int:
    return fcntl.fcntl(driver_of(node)._fd, fcntl.F_GETFL)


@pytest.mark.parametrize(
    ("wire", "mode"), [({}, os.O_RDWR), ({"read_only": True}, os.O_RDONLY), ({"auto_read_only": True}, os.O_RDONLY)]
)
def test_opened_for_writing_only_if_need_be(image: Path, wire: dict[str, Any], mode: int) -> None:
    async def main() -> None:
        async with graph() as g:
            node = await add(g, driver="file", filename=str(image), **wire)
            assert flags_of(node) & os.O_ACCMODE == mode
            assert not os.get_inheritable(driver_of(node)._fd)
            use(g, node, opening.READ)
            assert flags_of(node) & os.O_ACCMODE == mode

    run(main)


def test_auto_read_only_is_for_writing_while_there_are_writers(image: Path) -> None:
    async def main() -> None:
        async with graph() as g:
            node = await add(g, driver="file", filename=str(image), auto_read_only=True)
            reader = use(g, node, opening.READ)
            before = set(os.listdir("/proc/self/fd"))
            for _ in range(3):
                writer = use(g, node)
                assert flags_of(node) & os.O_ACCMODE == os.O_RDWR
                await write(writer, 100, b"written")
                assert await read(reader, 100, 7) == b"written"
                writer.remove()
                assert flags_of(node) & os.O_ACCMODE == os.O_RDONLY
            assert set(os.listdir("/proc/self/fd")) == before

    run(main)


def test_auto_read_only_upgrades_the_file_that_is_open(tmp_path: Path, image: Path) -> None:
    """Not the one that has its name by then."""

    async def main() -> None:
        async with graph() as g:
            node = await add(g, driver="file", filename=str(image), auto_read_only=True)
            kept = tmp_path / "kept.img"
            os.rename(image, kept)
            image.write_bytes(b"somebody else's")
            await write(use(g, node), 0, b"ours")
            assert kept.read_bytes()[:4] == b"ours"
            assert image.read_bytes() == b"somebody else's"

    run(main)


def test_auto_read_only_says_when_it_cannot_write(tmp_path: Path) -> None:
    """A program that runs cannot be written to, not even by root."""
    program = tmp_path / "program"
    shutil.copy("/bin/sleep", program)
    process = subprocess.Popen([program, "60"])
    try:

        async def main() -> None:
            async with graph() as g:
                node = await add(g, driver="file", filename=str(program), auto_read_only=True)
                use(g, node, opening.READ)
                with pytest.raises(Error, match=f"Could not open '{program}': Text file busy"):
                    use(g, node)
                assert not node.read_only
                assert len(await read(node, 0, 512)) == 512

        run(main)
        assert error_of(filename=str(program)).desc == f"Could not open '{program}': Text file busy"
    finally:
        process.kill()
        process.wait()


def test_vanished_file_stays_usable(image: Path) -> None:
    async def main() -> None:
        async with graph() as g:
            node = await add(g, driver="file", filename=str(image))
            user = use(g, node)
            image.unlink()
            await write(user, 0, b"still here")
            assert await read(user, 0, 10) == b"still here"
            await user.flush()

    run(main)


def test_truncated_beneath_us(image: Path) -> None:
    """By somebody who does not know locks: no error, no old bytes."""
    image.write_bytes(b"\x44" * SIZE)

    async def main() -> None:
        async with graph() as g:
            for direct in (False, True):
                node = await add(
                    g, driver="file", filename=str(image), cache={"direct": direct}, node_name=f"n{direct}"
                )
                os.truncate(image, SIZE)
                user = use(g, node, opening.READ)
                os.truncate(image, 5000)
                assert await read(user, 4096, 8192) == b"\x44" * 904 + bytes(8192 - 904)
                assert await read(user, 65536, 4096) == bytes(4096)
                (n, flags, _, _), _ = await user.block_status_above(None, 65536, 4096)
                assert n == 4096 and flags & ZERO
                user.remove()
                image.write_bytes(b"\x44" * SIZE)

    run(main)


# --- without waiting -------------------------------------------------------------------------------------------------


def test_cached_data_is_read_without_waiting(image: Path) -> None:
    async def main() -> None:
        async with graph() as g:
            node = await add(g, driver="file", filename=str(image))
            user = use(g, node)
            data = os.urandom(8192)
            assert user.write_now(4096, 8192, [memoryview(data[:100]), memoryview(data[100:])])
            buffer = bytearray(10000)
            assert user.read_now(4096, 8192, [memoryview(buffer)[:5000], memoryview(buffer)[5000:8192]])
            assert buffer[:8192] == data
            # Outside of the image, and what O_DIRECT has, is for the others.
            assert not user.read_now(SIZE - 1, 2, [memoryview(bytearray(2))])
            assert not user.write_now(SIZE - 1, 2, [memoryview(bytes(2))])
            direct = await add(
                g, driver="file", filename=str(image), cache={"direct": True}, locking="off", node_name="direct"
            )
            other = use(g, direct)
            assert not other.read_now(4096, 512, [memoryview(bytearray(512))])
            assert not other.write_now(4096, 512, [memoryview(bytearray(512))])

    run(main)


def test_slow_writes_go_to_the_worker(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    takes = 0.0

    def clock() -> float:
        nonlocal now
        now += takes
        return now

    monkeypatch.setattr(_posix, "_perf_counter", clock)

    async def main() -> None:
        nonlocal now, takes
        async with graph() as g:
            user = use(g, await add(g, driver="file", filename=str(image)))

            def try_now() -> bool:
                return user.write_now(0, 4, [memoryview(b"data")])

            assert try_now() and try_now()
            takes = 0.2
            # One slow write says nothing. After a second one the next are not tried for a while.
            assert try_now() and try_now()
            takes = 0.0
            assert not try_now()
            await write(user, 0, b"slow")
            assert await read(user, 0, 4) == b"slow"
            now += 0.1
            assert try_now()
            # Still slow: it is tried less and less often.
            takes, pause = 0.2, 0.05
            for _ in range(10):
                now += 2 * pause
                assert try_now()
                takes = 0.0
                now += pause * 0.9
                assert not try_now()
                pause = min(2 * pause, 2.0)
                takes = 0.2

    run(main)


# --- holes -----------------------------------------------------------------------------------------------------------


async def extents(user: Any, size: int) -> list[tuple[int, int, bool]]:
    found: list[tuple[int, int, bool]] = []
    at = 0
    while at < size:
        (n, flags, _, where), _ = await user.block_status_above(None, at, size - at)
        assert flags & OFFSET_VALID and where == at and bool(flags & DATA) != bool(flags & ZERO)
        if found and found[-1][2] == bool(flags & ZERO):
            found[-1] = (found[-1][0], found[-1][1] + n, found[-1][2])
        else:
            found.append((at, n, bool(flags & ZERO)))
        at += n
    return found


def test_holes_are_those_that_qemu_finds(tmp_path: Path) -> None:
    path = tmp_path / "holes.img"
    with open(path, "wb") as file:
        for number in range(0, 600, 2):
            file.seek(number * 8192)
            file.write(b"data")
        file.truncate(600 * 8192 + 4096)

    async def main() -> None:
        async with graph() as g:
            node = await add(g, driver="file", filename=str(path), read_only=True)
            user = use(g, node, opening.READ)
            found = await extents(user, node.length)
            assert len(found) == 600
            # Again, now from memory, and from the middle.
            assert await extents(user, node.length) == found
            (n, flags, _, _), _ = await user.block_status_above(None, 8192 * 100 + 100, 1 << 20)
            assert n == 4096 - 100 and flags & DATA
            said = json.loads(peers.run("qemu-img", "map", "-f", "raw", "--output=json", str(path)).stdout)
            assert found == [(e["start"], e["length"], e["zero"]) for e in said]

    run(main)


def test_writes_change_what_is_known_about_holes(image: Path) -> None:
    async def main() -> None:
        async with graph() as g:
            node = await add(g, driver="file", filename=str(image), discard="unmap")
            user = use(g, node)
            assert await extents(user, SIZE) == [(0, SIZE, True)]
            assert user.write_now(8192, 4096, [memoryview(b"x" * 4096)])
            assert await extents(user, SIZE) == [(0, 8192, True), (8192, 4096, False), (12288, SIZE - 12288, True)]
            await write(user, 12288, b"y" * 4096, FUA)
            assert (await extents(user, SIZE))[1] == (8192, 8192, False)
            await user.pdiscard(8192, 4096)
            assert (await extents(user, SIZE))[1] == (12288, 4096, False)
            await user.pwrite_zeroes(12288, 4096, MAY_UNMAP)
            assert await extents(user, SIZE) == [(0, SIZE, True)]
            await node.truncate(2 * SIZE)
            assert await extents(user, 2 * SIZE) == [(0, 2 * SIZE, True)]
            # Without want_zero nobody looks.
            (n, flags, _, _), _ = await user.block_status_above(None, 0, SIZE, want_zero=False)
            assert n == SIZE and flags & DATA

    run(main)


def test_answer_that_a_write_overtook_is_not_remembered(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with graph() as g:
            user = use(g, await add(g, driver="file", filename=str(image)))
            loop = asyncio.get_running_loop()
            real = _posix.find

            def find(*args: int) -> Any:
                found = real(*args)
                # The write comes after the look at the file and before its answer is there.
                asyncio.run_coroutine_threadsafe(write(user, 0, b"x" * 4096), loop).result(20)
                return found

            monkeypatch.setattr(_posix, "find", find)
            await user.block_status_above(None, 0, SIZE)
            monkeypatch.setattr(_posix, "find", real)
            assert (await extents(user, SIZE))[0] == (0, 4096, False)

    run(main)


def test_file_systems_without_holes_have_data(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: int) -> int:
        raise OSError(errno.EINVAL, "no SEEK_DATA here")

    async def main() -> None:
        async with graph() as g:
            user = use(g, await add(g, driver="file", filename=str(image)))
            monkeypatch.setattr(_extents.os, "lseek", refuse)
            assert await extents(user, SIZE) == [(0, SIZE, False)]
            monkeypatch.undo()

    run(main)


# --- zeroes and discards ---------------------------------------------------------------------------------------------


def blocks(path: Path) -> int:
    return os.stat(path).st_blocks * 512


def test_zeroes_keep_or_give_back_space(image: Path) -> None:
    image.write_bytes(b"\x55" * SIZE)

    async def main() -> None:
        async with graph() as g:
            node = await add(g, driver="file", filename=str(image), discard="unmap")
            user = use(g, node)
            await user.flush()
            full = blocks(image)
            assert node.driver.allocated_size() == full >= SIZE
            await user.pwrite_zeroes(0, 65536, NO_FALLBACK)
            assert blocks(image) == full
            await user.pwrite_zeroes(0, 65536, MAY_UNMAP | NO_FALLBACK)
            assert blocks(image) == full - 65536
            # Beyond the end, both make the file longer.
            await node.pwrite_zeroes(SIZE, 8192, MAY_UNMAP)
            assert os.stat(image).st_size == node.length == SIZE + 8192
            await node.pwrite_zeroes(SIZE + 4096, 8192)
            assert os.stat(image).st_size == node.length == SIZE + 12288
            assert await read(user, SIZE - 4, 8) == b"\x55" * 4 + bytes(4)

    run(main)


def test_space_is_not_given_back_unless_wanted(image: Path) -> None:
    image.write_bytes(b"\x55" * SIZE)

    async def main() -> None:
        async with graph() as g:
            node = await add(g, driver="file", filename=str(image), discard="ignore")
            user = use(g, node)
            await user.flush()
            full = blocks(image)
            await user.pwrite_zeroes(0, 65536, MAY_UNMAP)
            await user.pdiscard(65536, 65536)
            assert blocks(image) == full
            assert await read(user, 0, SIZE) == bytes(65536) + b"\x55" * 65536

    run(main)


@pytest.mark.parametrize(
    "lacking", [{"zero range"}, {"zero range", "punch hole"}, {"zero range", "punch hole", "allocate"}]
)
def test_zeroes_where_the_file_system_can_do_less(image: Path, lacking: set[str]) -> None:
    image.write_bytes(b"\x55" * SIZE)

    async def main() -> None:
        async with graph() as g:
            node = await add(g, driver="file", filename=str(image), discard="unmap")
            driver_of(node)._lacking |= lacking
            user = use(g, node)
            if "punch hole" in lacking:
                with pytest.raises(OSError) as caught:
                    await user.pwrite_zeroes(4096, 8192, NO_FALLBACK)
                assert caught.value.errno == errno.ENOTSUP
                assert await read(user, 4096, 8192) == b"\x55" * 8192
            for offset, flags in ((4096, 0), (20480, MAY_UNMAP)):
                await user.pwrite_zeroes(offset, 8192, flags)
                assert await read(user, offset - 1, 8194) == b"\x55" + bytes(8192) + b"\x55"
            await node.pwrite_zeroes(SIZE, 4096)
            assert node.length == os.stat(image).st_size == SIZE + 4096
            await user.pdiscard(0, 4096)

    run(main)


def test_what_does_not_work_is_not_tried_again(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with graph() as g:
            node = await add(g, driver="file", filename=str(image), discard="unmap")
            user = use(g, node)
            driver = driver_of(node)
            calls: list[int] = []

            async def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
                calls.append(mode)
                raise OSError(numbers[0], "no")

            monkeypatch.setattr(driver.engine, "fallocate", fallocate)
            numbers = [errno.EINVAL]
            await user.pwrite_zeroes(0, 4096)
            first = len(calls)
            await user.pwrite_zeroes(0, 4096)
            assert len(calls) == 2 * first > 0
            numbers = [errno.EOPNOTSUPP]
            await user.pwrite_zeroes(0, 4096)
            calls.clear()
            await user.pwrite_zeroes(0, 4096)
            assert calls == []
            driver._lacking.clear()
            numbers = [errno.EIO]
            with pytest.raises(OSError) as caught:
                await user.pwrite_zeroes(0, 4096)
            assert caught.value.errno == errno.EIO
            with pytest.raises(OSError):
                await user.pdiscard(0, 4096)

    run(main)


def test_discards_are_counted(image: Path) -> None:
    async def main() -> None:
        async with graph() as g:
            node = await add(g, driver="file", filename=str(image), discard="unmap")
            user = use(g, node)
            await user.pdiscard(0, 8192)
            await user.pdiscard(8192, 4096)
            driver_of(node)._lacking.add("punch hole")
            await user.pdiscard(0, 4096)
            stats: Any = node.driver.driver_specific_stats()
            assert (stats.discard_nb_ok, stats.discard_nb_failed, stats.discard_bytes_ok) == (2, 1, 12288)
            assert stats.__struct_config__.tag == "file"

    run(main)


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aio", ["threads", "io_uring"])
def test_write_beyond_the_size_limit_of_the_process(image: Path, aio: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    async def main() -> None:
        async with graph() as g:
            node = await add(g, driver="file", filename=str(image), aio=aio)
            user = use(g, node)
            resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
            try:
                with pytest.raises(OSError) as caught:
                    await write(user, 60000, b"x" * 10000)
                assert caught.value.errno == errno.EFBIG
                await write(user, 0, b"fits")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert await read(user, 0, 4) == b"fits"
            assert node.in_flight == 0

    run(main)


def test_failed_flush_is_never_forgotten(image: Path) -> None:
    """The kernel says it once; then the pages count as clean, and what was lost is lost."""

    async def main() -> None:
        async with graph() as g:
            node = await add(g, driver="file", filename=str(image))
            user = use(g, node)
            driver = driver_of(node)
            real = driver.engine.fdatasync
            calls: list[int] = []

            async def fdatasync(fd: int) -> None:
                calls.append(fd)
                if len(calls) == 1:
                    raise OSError(errno.EIO, "the disk is gone")
                await real(fd)

            driver.engine.fdatasync = fdatasync  # type: ignore[assignment,method-assign]
            await write(user, 0, b"data")
            for _ in range(3):
                with pytest.raises(OSError) as caught:
                    await user.flush()
                assert caught.value.errno == errno.EIO
                await write(user, 0, b"more")
            with pytest.raises(OSError) as caught:
                await write(user, 0, b"data", FUA)
            assert caught.value.errno == errno.EIO
            assert len(calls) == 1
            # Reading and plain writing go on.
            assert await read(user, 0, 4) == b"more"

    run(main)


def test_failed_flush_with_o_direct_may_succeed_later(image: Path) -> None:
    async def main() -> None:
        async with graph() as g:
            node = await add(g, driver="file", filename=str(image), cache={"direct": True})
            user = use(g, node)
            driver = driver_of(node)
            real = driver.engine.fdatasync
            failures = [errno.EIO]

            async def fdatasync(fd: int) -> None:
                if failures:
                    raise OSError(failures.pop(), "once")
                await real(fd)

            driver.engine.fdatasync = fdatasync  # type: ignore[assignment,method-assign]
            await write(user, 0, b"data")
            with pytest.raises(OSError):
                await user.flush()
            await user.flush()

    run(main)


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direct", [False, True])
def test_preallocation(image: Path, direct: bool) -> None:
    image.write_bytes(b"\x66" * 1000)

    async def main() -> None:
        async with graph() as g:
            node = await add(g, driver="file", filename=str(image), cache={"direct": direct})
            await node.truncate(65536, preallocation="off")
            assert blocks(image) <= 4096
            await node.truncate(131072, preallocation="falloc")
            assert 65536 <= blocks(image) <= 65536 + 4096
            await node.truncate(262144 + 512, preallocation="full")
            assert blocks(image) >= 65536 + 131072
            assert os.stat(image).st_size == node.length == 262144 + 512
            for mode in ("falloc", "full"):
                with pytest.raises(Error, match="Cannot use preallocation for shrinking files"):
                    await node.truncate(512, preallocation=mode)
            with pytest.raises(Error, match="Unsupported preallocation mode: metadata"):
                await node.truncate(1 << 20, preallocation="metadata")
            assert node.length == 262144 + 512
            await node.truncate(512)
            assert node.length == 512 == os.stat(image).st_size
        assert image.read_bytes() == b"\x66" * 512

    run(main)


def test_failed_preallocation_leaves_the_old_size(image: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    async def main() -> None:
        async with graph() as g:
            node = await add(g, driver="file", filename=str(image))
            resource.setrlimit(resource.RLIMIT_FSIZE, (2 * SIZE, hard))
            try:
                with pytest.raises(Error, match="Could not write zeros for preallocation: File too large"):
                    await node.truncate(4 * SIZE, preallocation="full")
                with pytest.raises(Error, match="Could not preallocate new data: File too large"):
                    await node.truncate(4 * SIZE, preallocation="falloc")
                with pytest.raises(Error, match="Could not resize file: File too large"):
                    await node.truncate(4 * SIZE)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert node.length == SIZE == os.stat(image).st_size

    run(main)


# --- reopening -------------------------------------------------------------------------------------------------------


def test_reopen_between_the_cache_modes(image: Path) -> None:
    async def main() -> None:
        async with graph() as g:
            wire: dict[str, Any] = {"driver": "file", "node_name": "node", "filename": str(image)}
            node = await g.add(opening.options(**wire))
            user = use(g, node)
            fds = len(os.listdir("/proc/self/fd"))
            for direct in (True, False, True, None):
                cache = {} if direct is None else {"cache": {"direct": direct}}
                await g.reopen([opening.options(**wire, **cache)])
                assert bool(flags_of(node) & os.O_DIRECT) == bool(direct)
                assert (node.limits.request_alignment > 1) == bool(direct)
                await write(user, 1000, b"direct" if direct else b"cached")
                assert await read(user, 1000, 6) == (b"direct" if direct else b"cached")
            # The first waiting request may have made the ring.
            assert len(os.listdir("/proc/self/fd")) <= fds + 2

    run(main)


def test_reopen_between_read_only_and_not(image: Path) -> None:
    async def main() -> None:
        async with graph() as g:
            wire: dict[str, Any] = {"driver": "file", "node_name": "node", "filename": str(image)}
            node = await g.add(opening.options(**wire))
            await g.reopen([opening.options(**wire, read_only=True)])
            assert flags_of(node) & os.O_ACCMODE == os.O_RDONLY and node.read_only
            reader = use(g, node, opening.READ)
            with pytest.raises(Error, match="read-only"):
                use(g, node)
            await g.reopen([opening.options(**wire)])
            assert flags_of(node) & os.O_ACCMODE == os.O_RDWR and not node.read_only
            user = use(g, node)
            await write(user, 0, b"data")
            with pytest.raises(Error):
                await g.reopen([opening.options(**wire, read_only=True)])
            assert flags_of(node) & os.O_ACCMODE == os.O_RDWR and not node.read_only
            await write(user, 0, b"more")
            # To auto-read-only and back, with a writer and without one.
            await g.reopen([opening.options(**wire, auto_read_only=True)])
            await write(user, 0, b"auto")
            user.remove()
            assert flags_of(node) & os.O_ACCMODE == os.O_RDONLY
            await g.reopen([opening.options(**wire)])
            assert flags_of(node) & os.O_ACCMODE == os.O_RDWR
            await write(use(g, node), 4, b"!")
            assert await read(reader, 0, 5) == b"auto!"

    run(main)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"filename": "/other"}, "Cannot change the option 'filename'"),
        ({"locking": "off"}, "Cannot change the option 'locking'"),
        ({"aio": "io_uring"}, "Cannot change the option 'aio'"),
        ({"aio_max_batch": 5}, "Cannot change the option 'aio-max-batch'"),
        ({"pr_manager": "x"}, "Cannot change the option 'pr-manager'"),
        ({"x_check_cache_dropped": True}, "'x-check-cache-dropped' is not supported"),
    ],
)
def test_what_reopening_cannot_change(image: Path, change: dict[str, Any], message: str) -> None:
    async def main() -> None:
        async with graph() as g:
            wire: dict[str, Any] = {"driver": "file", "node_name": "node", "filename": str(image)}
            node = await g.add(opening.options(**wire))
            with pytest.raises(Error) as caught:
                await g.reopen([opening.options(**{**wire, **change})])
            assert caught.value.desc == message
            await write(use(g, node), 0, b"goes on")

    run(main)


def test_reopen_drop_cache(image: Path) -> None:
    async def main() -> None:
        async with graph() as g:
            wire: dict[str, Any] = {"driver": "file", "node_name": "node", "filename": str(image)}
            await g.add(opening.options(**wire))
            await g.reopen([opening.options(**wire, drop_cache=False)])
            await g.reopen([opening.options(**wire, drop_cache=True)])
            with pytest.raises(Error) as caught:
                await g.reopen([opening.options(**wire)])
            assert caught.value.desc == "Option 'drop-cache' cannot be reset to its default value"

    run(main)


@pytest.mark.parametrize(("drop", "dropped"), [(None, True), (True, True), (False, False)])
def test_drop_cache_when_activated(
    image: Path, drop: bool | None, dropped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    advice: list[tuple[int, int, int]] = []
    real = os.posix_fadvise

    def fadvise(fd: int, offset: int, length: int, what: int) -> None:
        advice.append((offset, length, what))
        real(fd, offset, length, what)

    monkeypatch.setattr(os, "posix_fadvise", fadvise)

    async def main() -> None:
        async with graph() as g:
            node = await add(g, driver="file", filename=str(image), drop_cache=drop)
            await node.driver.activate()
            assert advice == ([(0, 0, os.POSIX_FADV_DONTNEED)] if dropped else [])

    if drop is None:
        monkeypatch.setattr(opening, "options", _without_none(opening.options))
    run(main)


def _without_none(real: Any) -> Any:
    return lambda **wire: real(**{name: value for name, value in wire.items() if value is not None})


def test_requests_under_way_keep_the_old_descriptor(image: Path) -> None:
    """A writer goes while its last flush is still with the kernel: the file is not closed under it."""

    async def main() -> None:
        async with graph() as g:
            node = await add(g, driver="file", filename=str(image), auto_read_only=True)
            user = use(g, node)
            await write(user, 0, b"data")
            driver = driver_of(node)
            old = driver._file
            pending = asyncio.ensure_future(driver.flush())
            await asyncio.sleep(0)
            user.set_perms(opening.READ, 15)
            assert driver._file is not old
            if not pending.done():
                assert old.fd >= 0
            await pending
            assert old.fd == -1

    run(main)


# --- what people see -------------------------------------------------------------------------------------------------


def test_information(image: Path) -> None:
    async def main() -> None:
        async with graph() as g:
            node = await add(g, driver="file", filename=str(image))
            assert node.driver.exact_filename() == str(image)
            info: Any = node.driver.format_specific()
            assert info.__struct_config__.tag == "file" and info.data.extent_size_hint is None
            assert node.driver.allocated_size() == blocks(image)

    run(main)


def test_batch_limit_is_the_engines_while_it_is_open(image: Path) -> None:
    async def main() -> None:
        async with graph() as g:
            node = await add(g, driver="file", filename=str(image), aio_max_batch=3)
            engine = driver_of(node).engine
            assert engine.max_batch == 3
            other = await add(g, driver="file", filename=str(image), aio_max_batch=-1, node_name="other")
            assert driver_of(other).engine is engine and engine.max_batch == 3
            await g.remove("node")
            assert engine.max_batch > 1000

    run(main)


def test_engine_is_the_one_asked_for(image: Path) -> None:
    async def main() -> None:
        async with graph() as g:
            for number, (aio, name) in enumerate(
                [({}, "io_uring"), ({"aio": "io_uring"}, "io_uring"), ({"aio": "threads"}, "threads")]
            ):
                node = await add(g, driver="file", filename=str(image), node_name=f"n{number}", **aio)
                assert driver_of(node).engine.name == name
            node = await add(
                g, driver="file", filename=str(image), aio="native", cache={"direct": True}, node_name="native"
            )
            assert driver_of(node).engine.name == "io_uring"

    run(main)
