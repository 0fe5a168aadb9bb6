"""What all block jobs share, with a small job that copies one node to another; and the copying engine."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyqsd.block import op_blockers
from pyqsd.block import permissions as perms
from pyqsd.block.block_copy import CopyError, Transfer, Workers
from pyqsd.block.events import BlockErrorAction
from pyqsd.jobs.block_job import BlockdevOnError, BlockJob
from pyqsd.jobs.job import JobStatus, JobType
from pyqsd.qapi.errors import Error
from tests.block.inprocess import Commands, run

MIB = 1 << 20
PIECE = 65536
SHARED = perms.ALL & ~perms.RESIZE


class CopyJob(BlockJob):
    """Copies the node `s` to `t`, four pieces at a time, and tries again what failed."""

    kind = JobType.STREAM

    def __init__(self, c: Commands, id: str = "j", on_error: BlockdevOnError = BlockdevOnError.REPORT, **more: Any):
        self.source, self.target = c.graph.find("s"), c.graph.find("t")
        super().__init__(c.daemon.jobs, id, c.graph, self.source, 0, SHARED, **more)
        self.on_error = on_error
        try:
            self.add_node("target", self.target, 0, perms.ALL)
            self.transfer = Transfer(
                self.open_backend(self.source, perms.CONSISTENT_READ, perms.ALL),
                self.open_backend(self.target, perms.WRITE, SHARED & ~perms.WRITE),
            )
        except Error:
            self.give_up()
            raise

    async def run(self) -> None:
        length = self.source.length
        self.expect(length)
        todo = list(range(0, length, PIECE))[::-1]

        async def copy(at: int) -> None:
            try:
                await self.transfer.copy(at, PIECE)
            except CopyError as exc:
                if self.error_action(self.on_error, exc.reading, exc.error.errno or 0) is BlockErrorAction.REPORT:
                    raise exc.error from None
                todo.append(at)
            else:
                self.advance(PIECE)

        async with Workers(4, 4 * PIECE) as self.workers:
            while todo or self.workers.running:
                await self.throttle(PIECE)
                if todo:
                    await self.workers.run(PIECE, copy(todo.pop()))
                else:
                    await self.workers.wait_one()


async def disks(c: Commands, tmp_path: Path, size: int = MIB, inject: list[dict[str, Any]] | None = None) -> bytes:
    content = random.Random(1).randbytes(size)
    (tmp_path / "s").write_bytes(content)
    with (tmp_path / "t").open("wb") as file:
        file.truncate(size)
    await c.add("raw", "s", file={"driver": "file", "filename": str(tmp_path / "s")})
    file = {"driver": "file", "filename": str(tmp_path / "t")}
    if inject is not None:
        file = {"driver": "blkdebug", "inject-error": inject, "image": file}
    await c.add("raw", "t", file=file)
    return content


def names(c: Commands) -> list[str]:
    """The events, those of a job's state by the state."""
    return [str(getattr(event, "status", event.NAME)) for event in c.events]


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1_000_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it does not come to that")


def test_it_copies_and_tells_of_it(tmp_path: Path) -> None:
    async def test(c: Commands) -> None:
        content = await disks(c, tmp_path)
        job = CopyJob(c, auto_finalize=False, auto_dismiss=False)
        job.start()
        await until(lambda: job.status is JobStatus.PENDING)
        (told,) = await c("query-block-jobs")
        assert told == {
            "type": "stream",
            "device": "j",
            "len": MIB,
            "offset": MIB,
            "busy": False,
            "paused": False,
            "speed": 0,
            "io-status": "ok",
            "ready": False,
            "status": "pending",
            "auto-finalize": False,
            "auto-dismiss": False,
        }
        await c("block-job-finalize", id="j")
        assert names(c) == [
            "created",
            "running",
            "waiting",
            "pending",
            "BLOCK_JOB_PENDING",
            "BLOCK_JOB_COMPLETED",
            "concluded",
        ]
        await c("block-job-dismiss", id="j")
        assert await c.refused("block-job-dismiss", id="j") == "Block job 'j' not found"
        assert (tmp_path / "t").read_bytes() == content
        assert not c.graph.backends and not job.source.op_blockers

    run(test)


def test_its_nodes_are_shown_and_kept(tmp_path: Path) -> None:
    async def test(c: Commands) -> None:
        await disks(c, tmp_path)
        job = CopyJob(c)
        graph = await c("x-debug-query-block-graph")
        (vertex,) = [node for node in graph["nodes"] if node["type"] == "block-job"]
        assert vertex["name"] == "j"
        edges = {edge["name"]: edge for edge in graph["edges"] if edge["parent"] == vertex["id"]}
        assert set(edges) == {"main node", "target"} and edges["target"]["perm"] == []
        busy = "Node 's' is busy: block device is in use by block job: stream"
        assert await c.refused("blockdev-del", node_name="s") == "Node s is in use"
        assert await c.refused("block_resize", node_name="s", size=0) == busy
        with pytest.raises(Error, match="is busy"):
            op_blockers.check(job.target, op_blockers.Op.STREAM)
        with pytest.raises(Error, match="Job ID 'j' already in use"):
            CopyJob(c)
        # Another one cannot write there too; it leaves nothing behind.
        before = len(c.graph.backends)
        with pytest.raises(Error, match="Permission conflict on node 't'"):
            CopyJob(c, "k")
        assert len(c.graph.backends) == before and names(c)[-2:] == ["created", "null"]
        job.start()
        await job.wait()
        assert not c.graph.backends

    run(test)


def test_a_drain_makes_it_stand_still(tmp_path: Path) -> None:
    async def test(c: Commands) -> None:
        content = await disks(c, tmp_path)
        job = CopyJob(c, speed=MIB)
        job.start()
        await until(lambda: job.progress_current >= 4 * PIECE)
        for node in (job.target, job.source, job.target.children[0].node):
            async with c.graph.drained(node):
                assert job.status is JobStatus.PAUSED and job.workers is not None and not job.workers.running
                before = job.progress_current
                for _ in range(20):
                    await asyncio.sleep(0)
                assert job.progress_current == before
        job.set_speed(0)
        await job.wait()
        assert (tmp_path / "t").read_bytes() == content

    run(test)


def test_its_speed(tmp_path: Path) -> None:
    async def test(c: Commands) -> None:
        await disks(c, tmp_path)
        assert names(c) == []
        with pytest.raises(Error, match="Parameter 'speed' expects a non-negative value"):
            CopyJob(c, speed=-1)
        assert names(c) == ["created", "null"]
        job = CopyJob(c, speed=2 * MIB)
        job.start()
        start = time.monotonic()
        await job.wait()
        # A tenth of a second may be made up for.
        assert 0.3 < time.monotonic() - start < 2
        slow = CopyJob(c, "slow", speed=1)
        slow.start()
        await until(lambda: slow.resting)
        await c("block-job-set-speed", device="slow", speed=0)
        await slow.wait()
        assert slow.error is None

    run(test)


@pytest.mark.parametrize("policy", ["report", "ignore", "stop", "enospc"])
@pytest.mark.parametrize("number", [5, 28])
def test_errors(tmp_path: Path, policy: str, number: int) -> None:
    async def test(c: Commands) -> None:
        content = await disks(c, tmp_path, inject=[{"event": "none", "iotype": "write", "errno": number, "once": True}])
        job = CopyJob(c, on_error=BlockdevOnError(policy), auto_dismiss=False)
        job.start()
        stops = policy == "stop" or (policy == "enospc" and number == 28)
        if stops:
            await until(lambda: job.status is JobStatus.PAUSED)
            (told,) = await c("query-block-jobs")
            assert told["io-status"] == ("nospace" if number == 28 else "failed") and told["paused"]
            assert await c.refused("block-job-cancel", device="j") == (
                "The block job for device 'j' is currently paused"
            )
            await c("block-job-resume", device="j")
            assert (await c("query-block-jobs"))[0]["io-status"] == "ok"
        await job.wait()
        (error,) = [event for event in c.events if event.NAME == "BLOCK_JOB_ERROR"]
        fails = policy == "report" or (policy == "enospc" and not stops)
        assert error.action == ("stop" if stops else "report" if fails else "ignore")  # type: ignore[attr-defined]
        assert error.operation == "write"  # type: ignore[attr-defined]
        (told,) = await c("query-block-jobs")
        if fails:
            assert told["error"] == ("No space left on device" if number == 28 else "Input/output error")
            assert names(c)[-3:] == ["aborting", "BLOCK_JOB_COMPLETED", "concluded"]
        else:
            assert "error" not in told and (tmp_path / "t").read_bytes() == content

    run(test)


def test_cancelling(tmp_path: Path) -> None:
    async def test(c: Commands) -> None:
        await disks(c, tmp_path)
        job = CopyJob(c, speed=1)
        job.start()
        await until(lambda: job.resting)
        await c("block-job-pause", device="j")
        await c("block-job-cancel", device="j", force=True)
        await job.wait()
        assert names(c)[-4:] == ["aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]
        assert not c.graph.backends

    run(test)
