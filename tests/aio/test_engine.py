"""The file I/O engines: whole transfers, errors, cancelling, batches, and when they come and go."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyqsd.aio import engine as engines
from pyqsd.aio import libc
from pyqsd.aio.engine import Engine

SIZE = 1 << 16
KINDS = ["threads", "io_uring"]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def run(kind: str, use: Callable[[Engine], Awaitable[None]]) -> None:
    """Run `use` with an engine that is surely of this kind, and check that it is gone afterwards."""

    async def main() -> None:
        engine = engines.acquire(kind)
        assert engine.name == kind
        try:
            await asyncio.wait_for(use(engine), 30)
        finally:
            engines.release(engine)
        assert not engines._engines

    asyncio.run(main())


@contextmanager
def opened(path: Path, content: bytes = b"", flags: int = os.O_RDWR) -> Iterator[int]:
    path.write_bytes(content)
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def buffers(*sizes: int) -> list[memoryview]:
    """Buffers full of something that nobody wants to read."""
    return [memoryview(bytearray(b"\xee" * size)) for size in sizes]


def test_io_uring_works_here() -> None:
    """Otherwise the tests of it would be tests of the threads."""
    assert engines.uring_available()


def test_transfers_several_buffers(kind: str, tmp_path: Path) -> None:
    async def use(engine: Engine) -> None:
        with opened(tmp_path / "f") as fd:
            await engine.pwritev(fd, [memoryview(b"abc"), memoryview(b""), memoryview(b"defgh")], 10, 8)
            iov = buffers(2, 4)
            await engine.preadv(fd, iov, 11, 6)
            assert b"".join(iov) == b"bcdefg"
            assert os.pread(fd, 100, 0) == bytes(10) + b"abcdefgh"

    run(kind, use)


@pytest.mark.parametrize("offset", [0, 90, 100, 1000, 1 << 40])
def test_beyond_the_end_is_zeroes(kind: str, tmp_path: Path, offset: int) -> None:
    content = bytes(range(1, 101))

    async def use(engine: Engine) -> None:
        with opened(tmp_path / "f", content) as fd:
            iov = buffers(60, 70)
            await engine.preadv(fd, iov, offset, 130)
            assert b"".join(iov) == (content[offset : offset + 130]).ljust(130, b"\0")

    run(kind, use)


def test_more_buffers_than_one_call_takes(kind: str, tmp_path: Path) -> None:
    content = os.urandom(3000 * 7)

    async def use(engine: Engine) -> None:
        with opened(tmp_path / "f") as fd:
            source = [memoryview(content)[at : at + 7] for at in range(0, len(content), 7)]
            assert len(source) > 2 * engines.IOV_MAX
            await engine.pwritev(fd, source, 0, len(content))
            iov = buffers(*[7] * 3000)
            await engine.preadv(fd, iov, 0, len(content))
            assert b"".join(iov) == content == os.pread(fd, 1 << 20, 0)

    run(kind, use)


def test_pieces_are_limited_in_bytes() -> None:
    big = memoryview(b"x").cast("B")
    assert engines.piece_of([big], 1) == [big]

    class Long:
        def __init__(self, size: int) -> None:
            self.size = size

        def __len__(self) -> int:
            return self.size

        def __getitem__(self, part: slice) -> Long:
            return Long(part.stop)

    half = engines.MAX_TRANSFER // 2
    iov = [Long(half), Long(half - 1), Long(100)]
    piece = engines.piece_of(iov, 2 * half + 99)  # type: ignore[arg-type]
    assert [len(view) for view in piece] == [half, half - 1, 1]


def test_more_requests_than_the_ring_holds(kind: str, tmp_path: Path) -> None:
    count = 1000

    async def use(engine: Engine) -> None:
        with opened(tmp_path / "f") as fd:

            async def one(number: int) -> None:
                await engine.pwritev(fd, [memoryview(number.to_bytes(8, "big"))], number * 8, 8)
                iov = buffers(8)
                await engine.preadv(fd, iov, number * 8, 8)
                assert int.from_bytes(iov[0], "big") == number

            await asyncio.gather(*[one(number) for number in range(count)])
            assert os.pread(fd, 8 * count, 0) == b"".join(number.to_bytes(8, "big") for number in range(count))

    run(kind, use)


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["read", "write", "zero", "punch", "sync"]), st.integers(0, SIZE), st.integers(0, 9000)
        ),
        max_size=25,
    ),
    kind=st.sampled_from(KINDS),
)
def test_matches_a_bytearray(
    tmp_path_factory: pytest.TempPathFactory, kind: str, steps: list[tuple[str, int, int]]
) -> None:
    path = tmp_path_factory.mktemp("engine") / "f"
    model = bytearray(2 * SIZE)

    async def use(engine: Engine) -> None:
        with opened(path) as fd:
            for number, (what, offset, length) in enumerate(steps):
                if what == "write":
                    data = bytes([number + 1]) * length
                    await engine.pwritev(fd, [memoryview(data)[:100], memoryview(data)[100:]], offset, length)
                    model[offset : offset + length] = data
                elif what == "read":
                    iov = buffers(length // 3, length - length // 3)
                    await engine.preadv(fd, iov, offset, length)
                    assert b"".join(iov) == model[offset : offset + length]
                elif what == "sync":
                    await engine.fdatasync(fd)
                elif length:
                    mode = (
                        libc.FALLOC_FL_ZERO_RANGE
                        if what == "zero"
                        else libc.FALLOC_FL_PUNCH_HOLE | libc.FALLOC_FL_KEEP_SIZE
                    )
                    await engine.fallocate(fd, mode, offset, length)
                    model[offset : offset + length] = bytes(length)
            size = os.fstat(fd).st_size
            assert os.pread(fd, size, 0) == model[:size] and not any(model[size:])

    run(kind, use)


@pytest.mark.parametrize(
    ("flags", "start", "number"),
    [
        (os.O_RDONLY, lambda e, fd: e.pwritev(fd, [memoryview(b"x")], 0, 1), errno.EBADF),
        (os.O_WRONLY, lambda e, fd: e.preadv(fd, buffers(1), 0, 1), errno.EBADF),
        (os.O_RDONLY, lambda e, fd: e.fallocate(fd, 0, 0, 10), errno.EBADF),
        (os.O_RDWR, lambda e, fd: e.fallocate(fd, 0, 0, 0), errno.EINVAL),
        (os.O_RDWR, lambda e, fd: e.fdatasync(9999), errno.EBADF),
        (os.O_RDWR, lambda e, fd: e.call(os.stat, "/nonexistent"), errno.ENOENT),
    ],
)
def test_errors_are_raised(
    kind: str, tmp_path: Path, flags: int, start: Callable[[Engine, int], Awaitable[None]], number: int
) -> None:
    async def use(engine: Engine) -> None:
        with opened(tmp_path / "f", b"content", flags) as fd:
            with pytest.raises(OSError) as caught:
                await start(engine, fd)
            assert caught.value.errno == number
            # And the engine goes on.
            assert await engine.call(os.getpid) == os.getpid()

    run(kind, use)


def test_no_space_left(kind: str) -> None:
    async def use(engine: Engine) -> None:
        fd = os.open("/dev/full", os.O_WRONLY)
        try:
            with pytest.raises(OSError) as caught:
                await engine.pwritev(fd, [memoryview(bytes(4096))], 0, 4096)
            assert caught.value.errno == errno.ENOSPC
        finally:
            os.close(fd)

    run(kind, use)


def test_short_write_is_continued_up_to_the_error(kind: str, tmp_path: Path) -> None:
    """The kernel writes up to the size limit and says so; the rest then is an error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    async def use(engine: Engine) -> None:
        with opened(tmp_path / "f") as fd:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10000, hard))
            try:
                with pytest.raises(OSError) as caught:
                    await engine.pwritev(fd, [memoryview(b"a" * 9000), memoryview(b"b" * 9000)], 0, 18000)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert caught.value.errno == errno.EFBIG
            assert os.pread(fd, 20000, 0) == b"a" * 9000 + b"b" * 1000

    run(kind, use)


def test_synchronous_write(kind: str, tmp_path: Path) -> None:
    async def use(engine: Engine) -> None:
        with opened(tmp_path / "f") as fd:
            await engine.pwritev(fd, [memoryview(b"durable")], 0, 7, os.RWF_DSYNC)
            assert os.pread(fd, 7, 0) == b"durable"

    run(kind, use)


def test_nothing_to_do(kind: str, tmp_path: Path) -> None:
    async def use(engine: Engine) -> None:
        with opened(tmp_path / "f") as fd:
            await engine.preadv(fd, [], 0, 0)
            await engine.pwritev(fd, [memoryview(b"")], 5, 0)
            assert os.fstat(fd).st_size == 0

    run(kind, use)


def test_impossible_arguments_start_nothing(tmp_path: Path) -> None:
    """What stood in the entry of the queue before, a write, must not be made a second time."""

    async def use(engine: Engine) -> None:
        with opened(tmp_path / "f", b"before") as fd:
            for _ in range(300):
                await engine.pwritev(fd, [memoryview(b"written")], 0, 7)
            os.pwrite(fd, b"changed", 0)
            for offset in (-1, 1 << 64):
                with pytest.raises((OverflowError, TypeError, ValueError)):
                    engine.pwritev(fd, [memoryview(b"never")], offset, 5)
            await asyncio.gather(*[_await(engine.fdatasync(fd)) for _ in range(300)])
            assert os.pread(fd, 100, 0) == b"changed"

    run("io_uring", use)


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM])
def test_refused_submission_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    from pyqsd.aio import uring

    real = uring.io_uring_submit
    refusals = [number] * 3

    def submit(ring: object) -> int:
        if refusals:
            raise OSError(refusals.pop(), "not now")
        done: int = real(ring)
        return done

    monkeypatch.setattr(uring, "io_uring_submit", submit)

    async def use(engine: Engine) -> None:
        with opened(tmp_path / "f") as fd:
            await asyncio.gather(*[_await(engine.pwritev(fd, [memoryview(b"x")], at, 1)) for at in range(200)])
            assert os.pread(fd, 1000, 0) == b"x" * 200
            assert not refusals

    run("io_uring", use)
    assert ("cannot submit" in caplog.text) == (number == errno.ENOMEM)


# --- cancelling ------------------------------------------------------------------------------------------------------


def test_cancelled_waiter_stays_until_the_call_has_ended(kind: str) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        assert go_on.wait(20)

    async def use(engine: Engine) -> None:
        async def wait() -> None:
            await engine.call(work)

        task = asyncio.create_task(wait())
        assert await asyncio.to_thread(begun.wait, 20)
        for _ in range(2):
            task.cancel()
            for _ in range(20):
                await asyncio.sleep(0)
            assert not task.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(kind, use)


def test_cancelled_read_keeps_its_buffer() -> None:
    """The kernel fills the buffer long after the waiter was cancelled, and before it is let go."""

    async def use(engine: Engine) -> None:
        reader, writer = os.pipe()
        try:
            buffer = bytearray(5)

            async def read() -> None:
                await engine.preadv(reader, [memoryview(buffer)], 0, 5)

            task = asyncio.create_task(read())
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            task.cancel()
            for _ in range(20):
                await asyncio.sleep(0)
            assert not task.done()
            os.write(writer, b"later")
            with pytest.raises(asyncio.CancelledError):
                await task
            assert buffer == b"later"
        finally:
            os.close(reader)
            os.close(writer)

    run("io_uring", use)


def test_buffers_live_as_long_as_the_request() -> None:
    """Even when everybody else has forgotten them: nothing else could be said of the kernel's next write."""

    async def use(engine: Engine) -> None:
        reader, writer = os.pipe()
        try:
            data = bytearray(4096)
            request = engine.preadv(reader, [memoryview(data)], 0, 4096)
            with pytest.raises(BufferError):
                data.extend(b"more")
            os.write(writer, b"x" * 4096)
            await request
            assert data == b"x" * 4096
        finally:
            os.close(reader)
            os.close(writer)

    run("io_uring", use)


def test_cancelled_before_a_thread_took_it_is_not_begun() -> None:
    release, ran = threading.Event(), []

    async def use(engine: Engine) -> None:
        blockers = [engine.call(release.wait, 20) for _ in range(64)]

        async def wait() -> None:
            await engine.call(ran.append, 1)

        task = asyncio.create_task(wait())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0)
        release.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        for blocker in blockers:
            await blocker
        assert ran == []

    run("threads", use)


@pytest.mark.parametrize("number", [errno.EINTR, errno.EAGAIN])
def test_interrupted_requests_are_made_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int) -> None:
    """Whatever else the kernel may say instead of a result: interrupted, or not possible without waiting."""
    from pyqsd.aio.uring import UringEngine

    real = UringEngine._take
    seen: list[int] = []

    def take(engine: UringEngine) -> list[tuple[object, int]]:
        found = []
        for operation, result in real(engine):
            seen.append(operation.kind)
            found.append((operation, -number if len(seen) <= 4 else result))
        return found

    monkeypatch.setattr(UringEngine, "_take", take)

    async def use(engine: Engine) -> None:
        with opened(tmp_path / "f", b"?" * 100) as fd:
            iov = buffers(50, 60)
            await asyncio.gather(
                _await(engine.preadv(fd, iov, 0, 110)),
                _await(engine.pwritev(fd, [memoryview(b"x" * 10)], 200, 10)),
                _await(engine.fdatasync(fd)),
                _await(engine.fallocate(fd, 0, 300, 100)),
            )
            assert b"".join(iov) == b"?" * 100 + bytes(10)
            assert os.pread(fd, 1000, 0) == b"?" * 100 + bytes(100) + b"x" * 10 + bytes(190)

    run("io_uring", use)
    assert len(seen) > 4


# --- coming and going -----------------------------------------------------------------------------------------------


def test_one_engine_per_loop_and_kind() -> None:
    async def main() -> None:
        first, second = engines.acquire("io_uring"), engines.acquire("io_uring")
        threads = engines.acquire("threads")
        assert first is second is not threads
        engines.release(first)
        assert await second.call(os.getpid) == os.getpid()
        engines.release(second)
        again = engines.acquire("io_uring")
        assert again is not first
        engines.release(again)
        engines.release(threads)
        assert not engines._engines

    asyncio.run(main())


def test_engines_of_other_loops_are_separate() -> None:
    found: list[Engine] = []

    async def main() -> None:
        engine = engines.acquire("io_uring")
        found.append(engine)
        assert await engine.call(threading.get_ident) != threading.get_ident()
        engines.release(engine)

    async def outer() -> None:
        engine = engines.acquire("io_uring")
        found.append(engine)
        await asyncio.to_thread(asyncio.run, main())
        engines.release(engine)

    asyncio.run(outer())
    assert found[0] is not found[1]


def test_engines_of_closed_loops_are_cleared_away(kind: str) -> None:
    async def forget() -> None:
        await engines.acquire(kind).call(os.getpid)

    async def main() -> None:
        engine = engines.acquire("threads")
        assert all(other.loop is engine.loop for other in engines._engines.values())
        engines.release(engine)

    asyncio.run(forget())
    assert engines._engines
    asyncio.run(main())
    assert not engines._engines


def test_nothing_is_left_open(kind: str, tmp_path: Path) -> None:
    def open_now() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    async def use(engine: Engine) -> None:
        with opened(tmp_path / "f") as fd:
            await asyncio.gather(*[_await(engine.pwritev(fd, [memoryview(b"x")], at, 1)) for at in range(50)])
            await engine.call(os.getpid)

    run(kind, use)
    before = open_now()
    for _ in range(5):
        run(kind, use)
    assert open_now() == before


async def _await(request: Awaitable[None]) -> None:
    await request


def test_closing_waits_for_what_is_under_way(kind: str, tmp_path: Path) -> None:
    data = os.urandom(8 << 20)

    async def main() -> None:
        with opened(tmp_path / "f") as fd:
            engine = engines.acquire(kind)
            request = engine.pwritev(fd, [memoryview(data)], 0, len(data))
            engines.release(engine)
            # The file is still open, and everything is in it.
            assert os.fstat(fd).st_size == len(data)
            try:
                await request
            except OSError as exc:
                assert exc.errno == errno.ECANCELED

    asyncio.run(main())
    assert (tmp_path / "f").read_bytes() == data


def test_without_io_uring_there_are_threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engines, "_uring_works", False)

    async def main() -> None:
        engine = engines.acquire("io_uring")
        assert engine.name == "threads"
        with opened(tmp_path / "f", b"content") as fd:
            iov = buffers(7)
            await engine.preadv(fd, iov, 0, 7)
            assert iov[0] == b"content"
        engines.release(engine)

    asyncio.run(main())


def test_batches_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyqsd.aio import uring

    sizes: list[int] = []
    real = uring.io_uring_submit

    def submit(ring: object) -> int:
        done: int = real(ring)
        sizes.append(done)
        return done

    monkeypatch.setattr(uring, "io_uring_submit", submit)

    async def use(engine: Engine) -> None:
        with opened(tmp_path / "f") as fd:

            async def write(count: int) -> None:
                await asyncio.gather(*[_await(engine.pwritev(fd, [memoryview(b"x")], at, 1)) for at in range(count)])

            await write(21)
            assert sizes == [1, 20]
            sizes.clear()
            engine.limit_batch(8)
            engine.limit_batch(5)
            await write(21)
            assert sizes == [1, 5, 5, 5, 5]
            sizes.clear()
            engine.unlimit_batch(5)
            await write(21)
            assert sizes == [1, 8, 8, 4]
            engine.unlimit_batch(8)

    run("io_uring", use)


def test_request_wakes_one_waiter_only() -> None:
    async def use(engine: Engine) -> None:
        request = engine.call(os.getpid)
        assert await request == os.getpid()
        assert request.done() and request.result() == os.getpid()
        assert not request.cancel()
        assert await request == os.getpid()

    run("threads", use)


def test_dio_alignment(tmp_path: Path) -> None:
    with opened(tmp_path / "f", b"x") as fd:
        told = libc.dio_alignment(fd)
        assert told is None or all(value & (value - 1) == 0 for value in told)
    assert libc.dio_alignment(-1) is None
