"""Backup jobs: the target is what the source was when the job began, whatever users do meanwhile, and whatever fails.

Replies, events and the graph are compared with QSD in tests/system/test_differential_backup.py.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from pyqsd.block import permissions as perms
from pyqsd.block.backend import BlockBackend
from pyqsd.block.extents import ZERO
from pyqsd.jobs.job import Job, JobStatus
from tests.block.inprocess import Commands, run
from tests.drivers.opening import read, write
from tests.drivers.test_copy_on_read import slow_down
from tests.support import peers

SIZE = (2 << 20) + 1536
CLUSTER = 65536


def make(directory: Path) -> bytes:
    """An overlay ``s.qcow2`` of ``base.qcow2`` with data, zeroes and holes in both; returns what can be read there."""
    for name, more in (("base", []), ("s", ["-b", "base.qcow2", "-F", "qcow2"])):
        peers.run("qemu-img", "create", "-q", "-f", "qcow2", *more, f"{name}.qcow2", str(SIZE), cwd=directory)
    peers.run("qemu-io", "-c", "write -P 9 0 1500k", "-c", "write -z 100k 300k", "base.qcow2", cwd=directory)
    commands = ("write -P 5 200k 70k", "write -z 900k 200k", "write -P 6 2000k 49664")
    peers.run("qemu-io", *(word for c in commands for word in ("-c", c)), "s.qcow2", cwd=directory)
    return converted(directory / "s.qcow2")


def converted(path: Path) -> bytes:
    out = path.with_suffix(".out")
    peers.run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, out)
    return out.read_bytes()


async def add(c: Commands, directory: Path, name: str, **more: Any) -> Any:
    file = {"driver": "file", "filename": str(directory / f"{name}.qcow2")}
    await c.add("qcow2", name, file=file, **more)
    return c.graph.nodes[name]


def use(c: Commands, name: str) -> BlockBackend:
    user = BlockBackend(c.graph, "a test", perms.CONSISTENT_READ | perms.WRITE, perms.ALL)
    user.insert(c.graph.nodes[name])
    return user


async def ended(job: Job) -> str | None:
    """Wait for the job; its error."""
    await job.wait()
    return job.error.desc if job.error is not None else None


async def turn_by_turn(until: Callable[[], bool]) -> None:
    """Let the loop go on until something is so."""
    while not until():  # noqa: ASYNC110 (what nothing announces)
        await asyncio.sleep(0.001)


async def stopped(job: Job) -> None:
    """Wait until the job stands still because of an error."""
    await turn_by_turn(lambda: job.status is JobStatus.PAUSED and job.user_paused)


class Guest:
    """Writes at random, and knows what is there."""

    def __init__(self, user: BlockBackend, content: bytes, seed: int) -> None:
        self.user = user
        self.content = bytearray(content)
        self.rnd = random.Random(seed)
        self.stopped = False

    async def write_some(self, count: int = 1) -> None:
        rnd, user = self.rnd, self.user
        for _ in range(count):
            length = rnd.choice((512, 5000, CLUSTER, 150_000))
            at = rnd.randrange(SIZE)
            length = min(length, SIZE - at)
            kind = rnd.choice(("write", "write", "zero", "now"))
            data = bytes(length) if kind == "zero" else bytes([rnd.randrange(1, 255)]) * length
            if kind == "zero":
                await user.pwrite_zeroes(at, length)
            elif kind == "write" or not user.write_now(at, length, [memoryview(data)]):
                await write(user, at, data)
            self.content[at : at + length] = data

    async def go_on(self) -> None:
        while not self.stopped:
            await self.write_some()
            await asyncio.sleep(0)


@asynccontextmanager
async def guest(user: BlockBackend, content: bytes, seed: int) -> AsyncIterator[Guest]:
    """A guest that writes until the block ends."""
    one = Guest(user, content, seed)
    task = asyncio.ensure_future(one.go_on())
    try:
        yield one
    finally:
        one.stopped = True
        await task
    assert await read(one.user, 0, SIZE) == one.content


def slowly(c: Commands, seed: int) -> None:
    rnd = random.Random(seed)
    for node in c.graph.nodes.values():
        slow_down(node, rnd)


def check_clean(c: Commands) -> None:
    """Nothing of a job is left."""
    assert all(node.in_flight == 0 for node in c.graph.nodes.values())
    assert not [name for name in c.graph.nodes if c.graph.nodes[name].driver.name == "copy-before-write"]
    assert all(bitmap.name for node in c.graph.nodes.values() for bitmap in node.dirty_bitmaps.values())


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "options",
    [
        {"sync": "full"},
        {"sync": "full", "compress": True},
        {"sync": "full", "x-perf": {"max-workers": 1, "min-cluster-size": 1 << 18}},
        {"sync": "full", "x-perf": {"max-workers": 3, "max-chunk": CLUSTER, "use-copy-range": False}},
        {"sync": "top"},
    ],
    ids="-".join,
)
def test_the_point_in_time(seed: int, options: dict[str, Any], tmp_path: Path) -> None:
    past = make(tmp_path)
    top = ["-b", "base.qcow2", "-F", "qcow2"] if options["sync"] == "top" else []
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", *top, "t.qcow2", str(SIZE), cwd=tmp_path)

    async def test(c: Commands) -> None:
        await add(c, tmp_path, "s")
        await add(c, tmp_path, "t")
        user = use(c, "s")
        if seed:
            slowly(c, seed)
        await c("blockdev-backup", job_id="j", device="s", target="t", **options)
        job = c.daemon.jobs.find("j")
        async with guest(user, past, seed):
            progress = []
            while job.status is JobStatus.RUNNING:
                progress.append(job.progress_current)
                await asyncio.sleep(0)
            assert await ended(job) is None
        assert progress == sorted(progress)
        assert job.progress_current == job.progress_total > 0
        check_clean(c)

    run(test)
    peers.run("qemu-img", "check", "-q", tmp_path / "t.qcow2")
    assert converted(tmp_path / "t.qcow2") == past


@pytest.mark.parametrize("seed", range(4))
def test_bitmaps(seed: int, tmp_path: Path) -> None:
    """Whatever became of the jobs before: once one succeeds that uses the bitmap as a record of what is missing, the
    target has everything."""
    past = make(tmp_path)
    rnd = random.Random(seed)
    peers.run("qemu-img", "convert", "-O", "qcow2", "s.qcow2", "t.qcow2", cwd=tmp_path)

    async def test(c: Commands) -> None:
        source, target = await add(c, tmp_path, "s"), await add(c, tmp_path, "t")
        await c("block-dirty-bitmap-add", node="s", name="b", granularity=rnd.choice((4096, CLUSTER, 1 << 18)))
        user = use(c, "s")
        slowly(c, seed)
        content = past
        for turn in range(8):
            before = Guest(user, content, seed * 100 + turn)
            await before.write_some(rnd.randrange(1, 5))
            content = bytes(before.content)
            mode = rnd.choice(("never", "on-success", "always"))
            await c(
                "blockdev-backup",
                job_id="j",
                device="s",
                target="t",
                sync="bitmap",
                bitmap="b",
                bitmap_mode=mode,
                x_perf={"max-workers": 2, "max-chunk": CLUSTER},
            )
            job = c.daemon.jobs.find("j")
            cancelled = rnd.random() < 0.5
            async with guest(user, content, seed * 1000 + turn) as g:
                for _ in range(rnd.randrange(100) if cancelled else 0):
                    await asyncio.sleep(0)
                if cancelled:
                    job.cancel()
                error = await ended(job)
                assert error == ("Operation canceled" if cancelled else None) or job.progress_current
            if error is None:
                assert await read(target, 0, SIZE) == content
            content = bytes(g.content)
            bitmap = source.dirty_bitmaps["b"]
            assert bitmap.recording and not bitmap.busy
            check_clean(c)
            # All that differs is dirty.
            copy = await read(target, 0, SIZE)
            for at in range(0, SIZE, 512):
                assert bitmap.is_dirty(at) or copy[at : at + 512] == content[at : at + 512]

    run(test)


@pytest.mark.parametrize("seed", range(3))
def test_stopping_it_at_any_moment(seed: int, tmp_path: Path) -> None:
    """Cancel, pause and resume, drains, and the end of the daemon: users never notice, and nothing is left."""
    past = make(tmp_path)
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", "t.qcow2", str(SIZE), cwd=tmp_path)
    rnd = random.Random(seed)

    async def turns() -> None:
        for _ in range(rnd.randrange(60)):
            await asyncio.sleep(0)

    async def test(c: Commands) -> None:
        source = await add(c, tmp_path, "s")
        await add(c, tmp_path, "t")
        user = use(c, "s")
        slowly(c, seed)
        content = past
        for turn in range(12):
            options = {"speed": rnd.choice((0, 0, 1 << 20)), "sync": rnd.choice(("full", "full", "none"))}
            await c("blockdev-backup", job_id="j", device="s", target="t", **options)
            job = c.daemon.jobs.find("j")
            async with guest(user, content, turn) as g:
                await turns()
                for _ in range(rnd.randrange(4)):
                    if job.status not in (JobStatus.RUNNING, JobStatus.PAUSED):
                        break
                    if rnd.random() < 0.5:
                        async with c.graph.drained(rnd.choice((source, c.graph.nodes["t"]))):
                            await turns()
                    elif not job.user_paused:
                        await c("job-pause", id="j")
                        await turns()
                        if job.status is JobStatus.PAUSED and rnd.random() < 0.7:
                            await c("job-resume", id="j")
                    await turns()
                if turn == 11:
                    break
                job.cancel()
                assert await ended(job) in ("Operation canceled", None)
            content = bytes(g.content)
            check_clean(c)
        # The daemon ends while there is a job.
        user.remove()

    run(test)
    peers.run("qemu-img", "check", "-q", tmp_path / "t.qcow2")
    peers.run("qemu-img", "check", "-q", tmp_path / "s.qcow2")


@pytest.mark.parametrize("end", ["s", "t"])
@pytest.mark.parametrize("event", ["read_aio", "write_aio", "l2_load", "l2_alloc_write", "refblock_load", "none"])
def test_requests_that_fail(end: str, event: str, tmp_path: Path) -> None:
    """Every third request of a kind, or any request, fails; they are tried again, and the result is whole."""
    past = make(tmp_path)
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", "t.qcow2", str(SIZE), cwd=tmp_path)

    async def test(c: Commands) -> None:
        for name in ("s", "t"):
            file: dict[str, Any] = {"driver": "file", "filename": str(tmp_path / f"{name}.qcow2")}
            if name == end:
                kinds = ["read"] if name == "s" else ["write"]
                rules = [
                    {"event": event, "errno": number, "once": True, "sector": sector, "iotype": kind}
                    for sector in range(512, 8192, 384)
                    for number, kind in zip((5, 28), kinds * 2, strict=True)
                ]
                file = {"driver": "blkdebug", "image": file, "inject-error": rules}
            await c.add("qcow2", name, file=file)
        slowly(c, 1)
        options = {"on-source-error": "ignore", "on-target-error": "ignore"}
        await c("blockdev-backup", job_id="j", device="s", target="t", **options, sync="full")
        assert await ended(c.daemon.jobs.find("j")) is None
        check_clean(c)

    run(test)
    assert converted(tmp_path / "t.qcow2") == past


def test_a_target_that_is_full_breaks_writes_and_not_the_source(tmp_path: Path) -> None:
    past = make(tmp_path)
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", "t.qcow2", str(SIZE), cwd=tmp_path)

    async def test(c: Commands) -> None:
        source = await add(c, tmp_path, "s")
        below = {"driver": "file", "filename": str(tmp_path / "t.qcow2")}
        full = {"event": "write_aio", "errno": 28, "iotype": "write"}
        await c.add("qcow2", "t", file={"driver": "blkdebug", "image": below, "inject-error": [full]})
        options = {"on-target-error": "enospc"}
        user = use(c, "s")
        await c("blockdev-backup", job_id="j", device="s", target="t", sync="full", **options)
        job = c.daemon.jobs.find("j")
        await stopped(job)
        with pytest.raises(OSError, match="No space"):
            await write(user, 0, b"x" * 512)
        assert await read(user, 0, SIZE) == past
        await c("job-resume", id="j")
        await stopped(job)
        assert (await c("query-block-jobs"))[0]["io-status"] == "nospace"
        await c("job-cancel", id="j")
        assert await ended(job) == "Operation canceled"
        await write(user, 0, b"x" * 512)
        assert await read(source, 0, 512) == b"x" * 512
        check_clean(c)

    run(test)


def test_an_error_that_stays_is_not_tried_without_a_break(tmp_path: Path) -> None:
    make(tmp_path)
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", "t.qcow2", str(SIZE), cwd=tmp_path)

    async def test(c: Commands) -> None:
        await add(c, tmp_path, "s")
        below = {"driver": "file", "filename": str(tmp_path / "t.qcow2")}
        broken = {"event": "write_aio", "errno": 5, "iotype": "write"}
        await c.add("qcow2", "t", file={"driver": "blkdebug", "image": below, "inject-error": [broken]})
        await c("blockdev-backup", job_id="j", device="s", target="t", sync="full", **{"on-target-error": "ignore"})
        job: Any = c.daemon.jobs.find("j")
        await turn_by_turn(lambda: job._wait >= 0.01)
        errors = [event for event in c.events if event.NAME == "BLOCK_JOB_ERROR"]  # type: ignore[attr-defined]
        assert len(errors) < 20
        job.cancel()
        assert await ended(job) == "Operation canceled"
        check_clean(c)

    run(test)


def test_what_was_copied_is_discarded_at_the_source(tmp_path: Path) -> None:
    past = make(tmp_path)
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", "t.qcow2", str(SIZE), cwd=tmp_path)
    peers.run("qemu-img", "rebase", "-b", "", "s.qcow2", cwd=tmp_path)

    async def test(c: Commands) -> None:
        source = await add(c, tmp_path, "s", discard="unmap")
        target = await add(c, tmp_path, "t")
        user = use(c, "s")
        slowly(c, 1)
        await c("blockdev-backup", job_id="j", device="s", target="t", sync="full", discard_source=True)
        await write(user, 5 * CLUSTER, b"x" * 512)
        assert await ended(c.daemon.jobs.find("j")) is None
        assert await read(target, 0, SIZE) == past
        assert await read(source, 5 * CLUSTER, 512) == b"x" * 512
        at = 0
        while at < 5 * CLUSTER:
            (n, flags, _, _), _ = await source.block_status_above(None, at, 5 * CLUSTER - at)
            assert flags & ZERO
            at += n

    run(test)


@pytest.mark.parametrize("seed", range(2))
def test_several_at_once_and_a_snapshot_meanwhile(seed: int, tmp_path: Path) -> None:
    """Each has its own point in time, also where the source below the filters becomes an overlay."""
    past = make(tmp_path)
    for name in ("t", "t2", "u"):
        peers.run("qemu-img", "create", "-q", "-f", "qcow2", f"{name}.qcow2", str(SIZE), cwd=tmp_path)

    async def test(c: Commands) -> None:
        await add(c, tmp_path, "s")
        for name in ("t", "t2"):
            await add(c, tmp_path, name)
        await add(c, tmp_path, "u", backing=None)
        user = use(c, "s")
        slowly(c, seed)
        few = {"x-perf": {"max-workers": 1, "max-chunk": CLUSTER}}
        await c("blockdev-backup", job_id="j", device="s", target="t", sync="full", **few)
        first = Guest(user, past, seed)
        await first.write_some(5)
        second_point = bytes(first.content)
        await c("blockdev-backup", job_id="k", device="s", target="t2", sync="full", **few)
        jobs = [c.daemon.jobs.find(id) for id in "jk"]
        async with guest(user, second_point, seed):
            await c("blockdev-snapshot", node="s", overlay="u")
            for job in jobs:
                assert await ended(job) is None
        assert user.node is c.graph.nodes["u"]
        assert await read(c.graph.nodes["t"], 0, SIZE) == past
        assert await read(c.graph.nodes["t2"], 0, SIZE) == second_point
        check_clean(c)

    run(test)


def test_the_job_that_other_jobs_wait_for_is_cancelled(tmp_path: Path) -> None:
    """Grouped jobs: neither bitmap is cleared when one of the jobs comes to nothing."""
    make(tmp_path)
    for name in ("t", "t2"):
        peers.run("qemu-img", "create", "-q", "-f", "qcow2", f"{name}.qcow2", str(SIZE), cwd=tmp_path)

    async def test(c: Commands) -> None:
        source = await add(c, tmp_path, "s")
        for name in ("t", "t2"):
            await add(c, tmp_path, name)
        await c("block-dirty-bitmap-add", node="s", name="a")
        await c("block-dirty-bitmap-add", node="s", name="b")
        user = use(c, "s")
        await write(user, 0, b"x" * 512)
        common = {"device": "s", "sync": "incremental"}
        actions = [
            {"type": "blockdev-backup", "data": {**common, "job-id": "j", "target": "t", "bitmap": "a"}},
            {"type": "blockdev-backup", "data": {**common, "job-id": "k", "target": "t2", "bitmap": "b", "speed": 1}},
        ]
        await c("block-dirty-bitmap-merge", node="s", target="b", bitmaps=["a"])
        await write(user, 10 * CLUSTER, b"x" * 9 * CLUSTER)
        await c("transaction", actions=actions, properties={"completion-mode": "grouped"})
        jobs = [c.daemon.jobs.find(id) for id in "jk"]
        await turn_by_turn(lambda: jobs[0].status is JobStatus.WAITING)
        await write(user, 30 * CLUSTER, b"y" * 512)
        await c("job-cancel", id="k")
        assert [await ended(job) for job in jobs] == ["Operation canceled"] * 2
        for name in "ab":
            assert source.dirty_bitmaps[name].count == 11 * CLUSTER
        check_clean(c)

    run(test)
