"""The mirror and the active commit, with storage that takes its time and users who write meanwhile."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from pyqsd.block import permissions as perms
from pyqsd.block.backend import BlockBackend
from pyqsd.block.driver import MAY_UNMAP
from pyqsd.block.extents import ALLOCATED, DATA, OFFSET_VALID, ZERO, Extent
from pyqsd.block.node import Node
from pyqsd.block.options import BlockdevDiscardOptions
from pyqsd.jobs.job import JobStatus
from tests.block.inprocess import Commands, run
from tests.block.memory_driver import Memory, MemoryOptions, memory_drivers

SIZE = 160 << 10
BLOCK = 4096
#: Users have a part of the disk each, and one in which all of them write.
USERS = 3
PART = 40 << 10


class Slow(Memory):
    """Every request takes some turns of the loop, and is done in two halves. It knows which blocks are zeroes."""

    rng = random.Random(0)
    #: How many of a thousand writes fail.
    failures = 0
    #: The same for reads.
    read_failures = 0
    error = errno.EIO

    def __init__(self, node: Node, options: MemoryOptions) -> None:
        super().__init__(node, options)
        self.data = bytearray(SIZE)
        self.unflushed = False

    async def _turns(self) -> None:
        for _ in range(self.rng.randrange(5)):
            await asyncio.sleep(0)

    def map(self, offset: int, length: int) -> Extent | None:
        end = min(offset + length, (offset // BLOCK + 1) * BLOCK)
        kind = self._is_zero(offset, end)
        while end < offset + length and self._is_zero(end, end + BLOCK) == kind:
            end = min(end + BLOCK, offset + length)
        flags = ZERO if kind else DATA
        return (end - offset, flags | ALLOCATED | OFFSET_VALID, self.node, offset)

    def _is_zero(self, start: int, end: int) -> bool:
        return not self.data[start:end].strip(b"\0")

    async def preadv(self, offset: int, length: int, iov: list[memoryview]) -> None:
        await self._turns()
        if self.rng.randrange(1000) < self.read_failures:
            raise OSError(self.error, "injected")
        view = memoryview(bytearray(length))
        half = length // 2
        view[:half] = self.data[offset : offset + half]
        await self._turns()
        view[half:] = self.data[offset + half : offset + length]
        at = 0
        for piece in iov:
            piece[:] = view[at : at + len(piece)]
            at += len(piece)

    async def _change(self, offset: int, data: bytes) -> None:
        self.unflushed = True
        await self._turns()
        half = len(data) // 2
        self.data[offset : offset + half] = data[:half]
        await self._turns()
        if self.rng.randrange(1000) < self.failures:
            raise OSError(self.error, "injected")
        self.data[offset + half : offset + len(data)] = data[half:]
        await self._turns()

    async def pwritev(self, offset: int, length: int, iov: list[memoryview], flags: int) -> None:
        await self._change(offset, b"".join(iov))

    async def pwrite_zeroes(self, offset: int, length: int, flags: int) -> None:
        await self._change(offset, bytes(length))

    async def pdiscard(self, offset: int, length: int) -> None:
        await self._change(offset, bytes(length))

    async def flush(self) -> None:
        await self._turns()
        self.unflushed = False


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1_000_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it does not come to that")


class Bench:
    """Two nodes, and users of the first one, each with what it expects to read in its part."""

    def __init__(self, commands: Commands, rng: random.Random) -> None:
        self.c = commands
        self.rng = rng
        self.graph = commands.graph
        self.users: list[tuple[BlockBackend, bytearray]] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.ends = False
        #: How often source and target were compared when the job was about to end.
        self.compared = 0
        commands.daemon.events.subscribe(self._event)

    def data(self, name: str) -> bytearray:
        driver = self.graph.find(name).driver
        assert isinstance(driver, Slow)
        return driver.data

    async def set_up(self) -> None:
        unmap = self.rng.choice((BlockdevDiscardOptions.UNMAP, BlockdevDiscardOptions.IGNORE))
        await self.graph.add(MemoryOptions(node_name="s", discard=BlockdevDiscardOptions.UNMAP))
        await self.graph.add(MemoryOptions(node_name="t", discard=unmap))
        for at in range(0, SIZE, BLOCK):
            if self.rng.random() < 0.6:
                self.data("s")[at : at + BLOCK] = self.rng.randbytes(BLOCK)
            if self.rng.random() < 0.6:
                self.data("t")[at : at + BLOCK] = self.rng.randbytes(BLOCK)

    def add_user(self, number: int, node: str = "s") -> None:
        backend = BlockBackend(self.graph, "a test", perms.CONSISTENT_READ | perms.WRITE, perms.ALL & ~perms.RESIZE)
        backend.insert(self.graph.find(node))
        part = self.data("s")[number * PART : (number + 1) * PART]
        self.users.append((backend, part))
        self.tasks.append(asyncio.get_running_loop().create_task(self._use(number, backend, part)))

    async def _use(self, number: int, backend: BlockBackend, part: bytearray) -> None:
        rng, base = random.Random(self.rng.random()), number * PART
        while not self.ends:
            align = rng.choice((1, 512, BLOCK))
            at = rng.randrange(PART) // align * align
            length = min(rng.choice((1, 512, BLOCK, 3 * BLOCK, 5000)), PART - at)
            match rng.randrange(8):
                case 0:
                    got = bytearray(length)
                    await backend.preadv(base + at, length, [memoryview(got)])
                    assert got == part[at : at + length]
                case 1:
                    await backend.pwrite_zeroes(base + at, length, rng.choice((0, MAY_UNMAP)))
                    part[at : at + length] = bytes(length)
                case 2:
                    await backend.pdiscard(base + at, length)
                    # Whatever is there now.
                    await backend.preadv(base + at, length, [memoryview(part)[at : at + length]])
                case 3:
                    # Where everybody writes.
                    at = rng.randrange(SIZE - USERS * PART - length)
                    await backend.pwritev(USERS * PART + at, length, [memoryview(rng.randbytes(length))])
                case 4:
                    for _ in range(rng.randrange(100)):
                        await asyncio.sleep(0)
                case _:
                    data = rng.randbytes(length)
                    await backend.pwritev(base + at, length, [memoryview(bytearray(data))])
                    part[at : at + length] = data

    def _event(self, event: Any) -> None:
        if getattr(event, "status", None) is JobStatus.PENDING:
            # All users are held back now.
            self.compared += 1
            assert self.data("s") == self.data("t")
            assert not self.graph.find("t").driver.unflushed  # type: ignore[attr-defined]

    async def stop(self, node: str) -> None:
        """The users stop, and `node` has what they expect."""
        self.ends = True
        await asyncio.gather(*self.tasks)
        for number, (backend, part) in enumerate(self.users):
            assert backend.node is self.graph.find(node)
            assert self.data(node)[number * PART : (number + 1) * PART] == part
            backend.remove()

    def job_ended(self) -> bool:
        return not self.graph.block_jobs


@contextmanager
def slow(seed: int) -> Iterator[random.Random]:
    rng = Slow.rng = random.Random(seed)
    Slow.failures = Slow.read_failures = 0
    Slow.error = errno.EIO
    with memory_drivers(Slow):
        yield rng


def scenario(seed: int, test: Callable[[Bench], Awaitable[None]]) -> None:
    with slow(seed) as rng:
        run(lambda commands: test(Bench(commands, rng)))


def ready(bench: Bench) -> bool:
    return any(event.NAME == "BLOCK_JOB_READY" for event in bench.c.events)


def options(rng: random.Random, **more: Any) -> dict[str, Any]:
    return {
        "job-id": "j",
        "device": "s",
        "target": "t",
        "sync": "full",
        "granularity": rng.choice((512, 4096, 16384, 65536)),
        "buf-size": rng.choice((0, 1, 100_001, 1 << 17)),
        "copy-mode": rng.choice(("background", "write-blocking")),
        **more,
    }


@pytest.mark.parametrize("end", ["complete", "soft", "cancel"])
@pytest.mark.parametrize("seed", range(8))
def test_users_write_meanwhile(seed: int, end: str) -> None:
    async def test(bench: Bench) -> None:
        rng = bench.rng
        await bench.set_up()
        bench.add_user(0)
        bench.add_user(1)
        how = options(rng)
        await bench.c("blockdev-mirror", **how)
        # This one writes past the filter.
        bench.add_user(2)
        if rng.random() < 0.5:
            await wait_turns(rng.randrange(300))
            await bench.c("job-pause", id="j")
            await wait_turns(rng.randrange(300))
            await bench.c("job-resume", id="j")
        if rng.random() < 0.5:
            await wait_turns(rng.randrange(300))
            await bench.c("block-job-change", id="j", type="mirror", copy_mode="write-blocking")
        if end == "cancel":
            await wait_turns(rng.randrange(2000))
            await bench.c("job-cancel", id="j")
        else:
            await until(lambda: ready(bench))
            await wait_turns(rng.randrange(500))
            if end == "complete":
                await bench.c("job-complete", id="j")
            else:
                await bench.c("block-job-cancel", device="j")
        await until(bench.job_ended)
        assert bench.compared == (end != "cancel")
        await wait_turns(100)
        await bench.stop("t" if end == "complete" else "s")
        assert set(bench.graph.nodes) == {"s", "t"}
        assert not bench.graph.find("s").dirty_bitmaps

    scenario(seed, test)


@pytest.mark.parametrize("mode", ["background", "write-blocking"])
@pytest.mark.parametrize("seed", range(3))
def test_everybody_writes_to_the_same_place(seed: int, mode: str) -> None:
    """Through the filter and past it, zeroes and data, and some of the writes fail."""

    async def write(bench: Bench, backend: BlockBackend) -> None:
        rng = random.Random(bench.rng.random())
        while not bench.ends:
            at, length = rng.choice((0, 512, 4096, 5000)), rng.choice((512, 4096, 8192))
            try:
                if rng.random() < 0.4:
                    await backend.pwrite_zeroes(at, length)
                else:
                    await backend.pwritev(at, length, [memoryview(rng.randbytes(length))])
            except OSError:
                pass
            await wait_turns(rng.randrange(40))

    async def test(bench: Bench) -> None:
        rng = bench.rng
        await bench.set_up()
        bench.data("s")[:] = bytes(SIZE)
        source = bench.graph.find("s").driver
        assert isinstance(source, Slow)
        source.failures = 50
        backends = []
        for _ in range(100):
            for past in (False, True):
                if past:
                    bench.c.events.clear()
                    how = options(rng, **{"copy-mode": mode, "granularity": rng.choice((512, 4096, 65536))})
                    await bench.c("blockdev-mirror", **how)
                for _user in range(2):
                    backend = BlockBackend(bench.graph, "a test", perms.WRITE, perms.ALL & ~perms.RESIZE)
                    backend.insert(bench.graph.find("s"))
                    backends.append(backend)
                    bench.tasks.append(asyncio.get_running_loop().create_task(write(bench, backend)))
            await until(lambda: ready(bench))
            await wait_turns(rng.randrange(100))
            await bench.c("block-job-cancel", device="j")
            await until(bench.job_ended)
            bench.ends = True
            await asyncio.gather(*bench.tasks)
            bench.ends = False
            for backend in backends:
                backend.remove()
            backends.clear()
            bench.tasks.clear()
        assert bench.compared == 100

    scenario(seed, test)


async def wait_turns(turns: int) -> None:
    for _ in range(turns):
        await asyncio.sleep(0)


@pytest.mark.parametrize("seed", range(4))
def test_errors_of_the_target_that_are_ignored(seed: int) -> None:
    async def test(bench: Bench) -> None:
        await bench.set_up()
        for number in range(USERS):
            bench.add_user(number)
        target = bench.graph.find("t").driver
        assert isinstance(target, Slow)
        target.failures = 200
        await bench.c("blockdev-mirror", **options(bench.rng, **{"on-target-error": "ignore"}))
        await until(lambda: sum(event.NAME == "BLOCK_JOB_ERROR" for event in bench.c.events) > 20)
        target.failures = 0
        await until(lambda: ready(bench))
        await bench.c("job-complete", id="j")
        await until(bench.job_ended)
        assert bench.compared == 1
        await bench.stop("t")

    scenario(seed, test)


@pytest.mark.parametrize("mode", ["background", "write-blocking"])
@pytest.mark.parametrize("policy", ["report", "enospc", "stop"])
def test_errors_of_the_target(policy: str, mode: str) -> None:
    """No user notices, and the source is as it was."""

    async def test(bench: Bench) -> None:
        await bench.set_up()
        for number in range(USERS):
            bench.add_user(number)
        target = bench.graph.find("t").driver
        assert isinstance(target, Slow)
        await bench.c("blockdev-mirror", **options(bench.rng, **{"on-target-error": policy, "copy-mode": mode}))
        await until(lambda: ready(bench))
        target.failures = 500
        target.error = errno.ENOSPC if policy == "enospc" else errno.EIO
        if policy == "report":
            await until(bench.job_ended)
            assert "Input/output error" in str(bench.c.events[-3])
            assert bench.compared == 0
            await bench.stop("s")
            return
        await until(lambda: bench.graph.block_jobs[0].status is JobStatus.STANDBY)
        await wait_turns(300)
        target.failures = 0
        await bench.c("job-resume", id="j")
        await bench.c("job-complete", id="j")
        await until(bench.job_ended)
        assert bench.compared == 1
        await bench.stop("t")

    scenario(7, test)


def test_errors_of_the_source() -> None:
    async def test(bench: Bench) -> None:
        await bench.set_up()
        source = bench.graph.find("s").driver
        assert isinstance(source, Slow)
        source.read_failures = 1000
        before = bytes(bench.data("s"))
        await bench.c("blockdev-mirror", **options(bench.rng))
        await until(bench.job_ended)
        assert "Input/output error" in str(bench.c.events[-3])
        await bench.c("blockdev-mirror", **options(bench.rng, **{"on-source-error": "stop"}))
        await until(lambda: bench.graph.block_jobs[0].status is JobStatus.PAUSED)
        source.read_failures = 0
        await bench.c("job-resume", id="j")
        await until(lambda: ready(bench))
        await bench.c("job-complete", id="j")
        await until(bench.job_ended)
        assert bench.data("t") == before

    scenario(1, test)


@pytest.mark.parametrize("mode", ["background", "write-blocking"])
def test_drains_hold_the_job_and_its_users(mode: str) -> None:
    """Whoever drains the source or the target finds it still, and nobody waits for ever."""

    async def test(bench: Bench) -> None:
        rng, graph = bench.rng, bench.graph
        await bench.set_up()
        for number in range(USERS):
            bench.add_user(number)
        await bench.c("blockdev-mirror", **options(rng, **{"copy-mode": mode}))
        for count in range(60):
            names = rng.choice(("t", "s", "st", "ts"))
            async with graph.drained(*(graph.find(name) for name in names)):
                before = {name: bytes(bench.data(name)) for name in names}
                await wait_turns(30)
                assert before == {name: bench.data(name) for name in names}
            await wait_turns(rng.randrange(60))
            if count == 30:
                await until(lambda: ready(bench))
        await bench.c("job-complete", id="j")
        await until(bench.job_ended)
        assert bench.compared == 1
        await bench.stop("t")

    scenario(3, test)
