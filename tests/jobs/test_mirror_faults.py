"""A mirror when a request of the target's image fails, at each of the steps that qcow2 announces."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest

from tests.block.inprocess import Commands, run
from tests.support import images
from tests.support.images import KiB

from .test_mirror_chains import SIZE, Users, chain, compare, told, until

#: Announced while the target is written to and flushed.
EVENTS = (
    "cluster_alloc",
    "cluster_alloc_bytes",
    "flush_to_disk",
    "flush_to_os",
    "l2_update",
    "pwritev",
    "pwritev_done",
    "refblock_update_part",
    "write_aio",
)


async def set_up(c: Commands, root: Path, inject: dict[str, object]) -> None:
    await chain(c, root, SIZE)
    images.create(root / "target", SIZE, "qcow2", "cluster_size=4096")
    file = {"driver": "file", "filename": str(root / "target")}
    await c(
        "blockdev-add",
        driver="qcow2",
        node_name="target",
        file={"driver": "blkdebug", "inject-error": [inject], "image": file},
    )


@pytest.mark.parametrize(
    "event,policy",
    [(event, "stop") for event in EVENTS]
    + [("flush_to_disk", "ignore"), ("write_aio", "ignore")]
    + [(event, "report") for event in ("cluster_alloc", "flush_to_os", "l2_update", "pwritev")],
)
def test_a_request_of_the_target_fails(event: str, policy: str, tmp_path: Path) -> None:
    """It is tried again, or the job fails and can be begun again; and all is well in the end."""
    users: Users | None = None

    async def test(c: Commands) -> None:
        nonlocal users
        await set_up(c, tmp_path, {"event": event, "errno": errno.EIO, "once": True})
        users = Users(c, "n0", 1)
        await users.start()
        mirror = {
            "job-id": "j",
            "device": "n0",
            "target": "target",
            "sync": "full",
            "on-target-error": policy,
            "copy-mode": "write-blocking",
        }
        await c("blockdev-mirror", **mirror)
        ready, failed = told(c, "BLOCK_JOB_READY"), told(c, "BLOCK_JOB_ERROR")
        await until(lambda: ready() or failed())
        if failed():
            if policy == "report":
                await until(lambda: not c.graph.block_jobs)
                assert "Input/output error" in str(c.events)
                c.events.clear()
                await c("blockdev-mirror", **mirror)
            elif policy == "stop":
                await until(lambda: c.graph.block_jobs[0].user_paused)
                await asyncio.sleep(0.01)
                await c("job-resume", id="j")
        await until(ready)
        if failed() and policy == "report":
            pytest.fail("it failed twice")
        await c("job-complete", id="j")
        await until(told(c, "BLOCK_JOB_COMPLETED"))
        await users.stop("target")

    run(test)
    assert users is not None
    compare(tmp_path / "target", users.model, tmp_path)


def test_no_space(tmp_path: Path) -> None:
    """The job waits for the user; all that is tried again fits then."""

    async def test(c: Commands) -> None:
        await set_up(c, tmp_path, {"event": "none", "iotype": "write", "errno": errno.ENOSPC, "sector": 200})
        await c("blockdev-mirror", job_id="j", device="n0", target="target", sync="full", on_target_error="enospc")
        await until(told(c, "BLOCK_JOB_ERROR"))
        await until(lambda: c.graph.block_jobs[0].status == "paused")
        (job,) = await c("query-block-jobs")
        assert (job["io-status"], job["status"], job["paused"]) == ("nospace", "paused", True)
        # It is as far as it was without it.
        await c("job-resume", id="j")
        await until(lambda: [event.NAME for event in c.events].count("BLOCK_JOB_ERROR") > 1)
        await c("job-cancel", id="j")
        await until(lambda: not c.graph.block_jobs)

    run(test)
    images.io(tmp_path / "0", f"read -P 1 0 {150 * KiB}")


def test_the_end_of_the_daemon(tmp_path: Path) -> None:
    """At any moment: the source has all that was written."""
    for moment in range(6):
        root = tmp_path / str(moment)
        root.mkdir()
        users: Users | None = None

        async def test(c: Commands, root: Path = root, moment: int = moment) -> None:
            nonlocal users
            await set_up(c, root, {"event": "none", "iotype": "discard"})
            users = Users(c, "n0", moment)
            await users.start()
            speed = 1 << 20 if moment % 2 else 0
            await c("blockdev-mirror", job_id="j", device="n0", target="target", sync="full", speed=speed)
            await asyncio.sleep(0.004 * moment)
            users.ends = True
            await asyncio.gather(*users.tasks)
            for backend in users.backends:
                backend.remove()

        run(test)
        assert users is not None
        compare(root / "0", users.model, root)
        assert images.check(root / "target")["exit"] == 0
