"""block-stream in this process: each request of the overlay's file fails in turn, or is the last before a crash."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from pyqsd.block.graph import Graph
from pyqsd.block.node import Node
from pyqsd.jobs import block_job_commands
from pyqsd.jobs.block_job import BlockdevOnError
from pyqsd.jobs.job import Job, Jobs, JobStatus
from pyqsd.jobs.stream import block_stream
from pyqsd.qapi.command import EventBus
from tests.drivers import opening
from tests.drivers.qcow2 import crash
from tests.drivers.qcow2.support import LogFile, open_logged, run
from tests.support import images
from tests.support.images import KiB

SIZE = 1500 * KiB


class Disk:
    """base.raw ← mid.qcow2 ← top.qcow2; `content`: what is read from the top."""

    def __init__(self, root: Path, options: str = "cluster_size=4k") -> None:
        self.root = root
        self.base, self.mid, self.top = root / "base.raw", root / "mid.qcow2", root / "top.qcow2"
        images.create(self.base, 1200 * KiB, "raw")
        images.io(self.base, "write -P 1 0 300k", "write -P 2 900k 300k", fmt="raw")
        images.create(self.mid, 1000 * KiB, "qcow2", "cluster_size=16k", self.base, "raw")
        images.io(self.mid, "write -P 3 200k 70k", "write -z 920k 40k", "write -P 4 600k 5k")
        # Many pieces.
        images.io(self.mid, *(f"write -P {at % 200 + 10} {at}k 1k" for at in range(300, 900, 33)))
        images.create(self.top, SIZE, "qcow2", options, self.mid, "qcow2")
        images.io(self.top, "write -P 5 250k 30k", "write -P 6 1400k 1k")
        self.image = self.top.read_bytes()
        self.content = self.read()

    def read(self) -> bytes:
        return images.read_all(self.top, "qcow2", self.root / "raw")


async def start(disk: Disk, **arguments: Any) -> tuple[Graph, Node, LogFile, Job]:
    graph = Graph(EventBus())
    base = {"driver": "file", "filename": str(disk.base)}
    await opening.add(graph, node_name="base", driver="raw", file=base, read_only=True)
    mid = {"driver": "file", "filename": str(disk.mid)}
    await opening.add(graph, node_name="mid", driver="qcow2", file=mid, backing="base", read_only=True)
    top, file = await open_logged(disk.image, graph, node_name="top", backing="mid")
    file.inline = 0.5
    jobs = Jobs(graph.events)
    await block_stream(jobs, graph, job_id="j", device="top", auto_dismiss=False, **arguments)
    return graph, top, file, jobs.find("j")


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(100_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never came to this")


async def finish(graph: Graph, job: Job) -> None:
    """Close everything, once the job has ended."""
    await until(lambda: job.status is JobStatus.CONCLUDED)
    await job.user_dismiss()
    assert not graph.backends
    assert {node for node in graph.nodes if not node.startswith(("#", "log"))} == {"base", "mid", "top"}
    await graph.close_all()


def counted(disk: Disk, **arguments: Any) -> int:
    """How many requests the job makes of the overlay's file."""
    count = 0

    def fault(kind: str) -> None:
        nonlocal count
        count += 1

    async def main() -> None:
        graph, _, file, job = await start(disk, **arguments)
        file.fault = fault
        await finish(graph, job)

    run(main())
    return count


@pytest.mark.parametrize("power", [False, True], ids=["kill", "power"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "base"])
def test_every_cut(whole: bool, power: bool, tmp_path: Path) -> None:
    disk = Disk(tmp_path)

    async def main() -> list[tuple[Any, ...]]:
        graph, _, file, job = await start(disk, **({} if whole else {"base_node": "base"}))
        await finish(graph, job)
        assert job.error is None
        return file.log

    log = run(main())
    rnd = random.Random(f"{whole}{power}")
    # Most of all around the change of the header.
    cuts = sorted(rnd.sample(range(len(log)), 15) + list(range(len(log) - 12, len(log) + 1)))
    named = set()
    for cut in cuts:
        crashed = crash.after_power_cut(disk.image, log, cut, rnd) if power else crash.after_kill(disk.image, log, cut)
        disk.top.write_bytes(crashed)
        images.assert_clean(disk.top, leaks=True)
        assert disk.read() == disk.content, cut
        named.add(images.info(disk.top).get("backing-filename"))
    assert named == {str(disk.mid), None if whole else str(disk.base)}


@pytest.mark.parametrize("policy", ["report", "stop"])
def test_every_request_fails_in_turn(policy: str, tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    total = counted(disk)
    ended: dict[bool, int] = {True: 0, False: 0}

    async def main(victim: int) -> None:
        count = 0

        def fault(kind: str) -> None:
            nonlocal count
            count += 1
            if count == victim:
                raise OSError(errno.ENOSPC, "full")

        graph, top, file, job = await start(disk, on_error=BlockdevOnError(policy))
        file.fault = fault
        while job.status is not JobStatus.CONCLUDED:
            await until(lambda: job.status in (JobStatus.PAUSED, JobStatus.CONCLUDED))
            if job.status is JobStatus.PAUSED:
                assert policy == "stop"
                job.user_resume()
                await until(lambda: job.status is not JobStatus.PAUSED)
        file.fault = None
        ended[job.error is None] += 1
        assert bytes(await top.pread(0, SIZE)) == disk.content
        assert job.error is not None or top.below() is None
        await finish(graph, job)
        disk.top.write_bytes(file.data)

    for victim in random.Random(policy).sample(range(1, total + 1), 25):
        run(main(victim))
        assert disk.read() == disk.content, victim
        images.assert_clean(disk.top, leaks=True)
    # An error of the last flush ends it whatever the policy is.
    assert ended[False] > ended[True] if policy == "report" else ended[True]


@pytest.mark.parametrize("force", [True, False])
def test_cancelled_at_any_moment(force: bool, tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    errors = set()

    async def main(turns: int) -> None:
        graph, top, file, job = await start(disk)
        for _ in range(turns):
            await asyncio.sleep(0)
        if job.status in (JobStatus.RUNNING, JobStatus.PENDING):
            await block_job_commands.block_job_cancel(job.jobs, device="j", force=force)
        await until(lambda: job.status is JobStatus.CONCLUDED)
        errors.add(job.error is None)
        assert bytes(await top.pread(0, SIZE)) == disk.content
        await finish(graph, job)
        disk.top.write_bytes(file.data)

    for turns in (*range(12), *random.Random(1).sample(range(12, 400), 12), 1000):
        run(main(turns))
        assert disk.read() == disk.content, turns
        images.assert_clean(disk.top, leaks=True)
    assert errors == {True, False}


def test_drained_again_and_again(tmp_path: Path) -> None:
    """Drains come to their end while it runs, nothing of it happens in them, and it ends all the same."""
    disk = Disk(tmp_path, "cluster_size=512")

    async def main() -> None:
        graph, _, file, job = await start(disk)
        rng = random.Random(1)
        drains = 0
        while job.status in (JobStatus.RUNNING, JobStatus.PAUSED):
            async with graph.drained(graph.find(rng.choice(("top", "mid", "base")))):
                before = len(file.log)
                for _ in range(rng.randrange(5)):
                    await asyncio.sleep(0)
                if job.status is JobStatus.PAUSED:
                    assert len(file.log) == before
                    drains += 1
            for _ in range(rng.randrange(8)):
                await asyncio.sleep(0)
        assert drains > 3
        await finish(graph, job)
        assert job.error is None
        disk.top.write_bytes(file.data)

    run(main())
    assert disk.read() == disk.content
    assert images.info(disk.top).get("backing-filename") is None


def test_a_longer_base_does_not_show_through(tmp_path: Path) -> None:
    """Between the end of mid and that of the base, zeroes are read before and after."""
    disk = Disk(tmp_path)
    assert not any(disk.content[1000 * KiB : 1200 * KiB])

    async def main() -> None:
        graph, _, file, job = await start(disk, bottom="mid")
        await finish(graph, job)
        disk.top.write_bytes(file.data)

    run(main())
    assert images.info(disk.top).get("backing-filename") == str(disk.base)
    assert disk.read() == disk.content


def test_guests_write_meanwhile(tmp_path: Path) -> None:
    """Writes to where it copies at the moment are never lost, with requests that wait at random."""
    disk = Disk(tmp_path, "cluster_size=64k")

    async def main() -> None:
        graph, top, file, job = await start(disk)
        rng = random.Random(2)
        content = bytearray(disk.content)

        async def guest(lane: int) -> None:
            while job.status is not JobStatus.CONCLUDED:
                at = rng.randrange(0, SIZE - 4096, 512) // 2048 * 2048 + lane * 512
                data = rng.randbytes(512)
                content[at : at + 512] = data
                await user.pwritev(at, 512, [memoryview(data)])

        user = opening.use(graph, next(node for node in graph.nodes.values() if node.driver.name == "copy-on-read"))
        lanes: list[Awaitable[None]] = [guest(lane) for lane in range(4)]
        await asyncio.gather(*lanes)
        assert job.error is None
        assert bytes(await top.pread(0, SIZE)) == content
        user.remove()
        await finish(graph, job)
        disk.top.write_bytes(file.data)
        disk.content = bytes(content)

    run(main())
    assert disk.read() == disk.content
