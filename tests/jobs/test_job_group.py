"""Jobs that end together. The orders of events are those of QSD with groups of backups."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from pyqsd.jobs.job import JobGroup, JobStatus, JobStatusChange
from pyqsd.qapi.errors import Error
from tests.jobs.test_job import Bench, Fake, Interruptible, run, steps, turns


async def nothing(job: Fake) -> None:
    pass


async def fails(job: Fake) -> None:
    await asyncio.sleep(0)
    raise Error("no such luck")


def group_of(bench: Bench, *scripts: Callable[[Fake], Awaitable[None]], **how: Any) -> list[Fake]:
    """Jobs j1, j2, … of one group, all started."""
    group = JobGroup()
    jobs = [Fake(bench.jobs, script, id=f"j{n}", group=group, **how) for n, script in enumerate(scripts, 1)]
    for job in reversed(jobs):
        job.start()
    return jobs


async def ended(*jobs: Fake) -> None:
    for job in jobs:
        await job.wait()


def since(bench: Bench, start: int = 0) -> list[str]:
    return [f"{e.id} {e.status}" for e in bench.seen[start:] if isinstance(e, JobStatusChange)]


def both(*events: str) -> list[str]:
    """The same event of the newer job, then of the older one."""
    return [f"{job} {event}" for event in events for job in ("j2", "j1")]


def after_the_end(job: str, *first: str) -> list[str]:
    return [f"{job} {event}" for event in (*first, "concluded", "null")]


def test_all_succeed() -> None:
    async def test(bench: Bench) -> None:
        jobs = group_of(bench, steps, nothing)
        await turns()
        assert [str(job.status) for job in jobs] == ["running", "waiting"]
        assert jobs[1].log == ["run"]
        jobs[0].gate.set()
        await ended(*jobs)
        assert since(bench) == [
            *("j1 created", "j2 created", "j2 running", "j1 running", "j2 waiting", "j1 waiting"),
            *both("pending"),
            *after_the_end("j2"),
            *after_the_end("j1"),
        ]
        assert all(job.log == ["run", "prepare", "commit", "clean"] for job in jobs)
        assert bench.jobs.query() == []

    run(test)


@pytest.mark.parametrize("which", [0, 1])
def test_one_that_is_not_to_go_on_by_itself_holds_all(which: int) -> None:
    async def test(bench: Bench) -> None:
        group = JobGroup()
        jobs = [Fake(bench.jobs, id=f"j{n}", group=group, auto_finalize=n != 1) for n in (1, 2)]
        reached: list[str | None] = []
        for job in jobs:
            job.reached = lambda status, id=job.id: reached.append(id)  # type: ignore[method-assign]
            job.start()
        await turns(20)
        assert {str(job.status) for job in jobs} == {"pending"} and reached == ["j1"]
        start = len(bench.seen)
        await jobs[which].user_finalize()
        assert since(bench, start) == [*after_the_end("j2"), *after_the_end("j1")]
        await ended(*jobs)

    run(test)


def test_one_that_fails_takes_the_others_along() -> None:
    async def test(bench: Bench) -> None:
        jobs = group_of(bench, nothing, steps, fails, auto_dismiss=False)
        await ended(*jobs)
        # j2 is over at its next pause point; who has ended its work already, when its turn comes.
        assert since(bench)[6:] == [
            *("j1 waiting", "j3 aborting", "j2 aborting", "j3 concluded", "j2 concluded", "j1 aborting", "j1 concluded")
        ]
        assert [None if job.error is None else job.error.desc for job in jobs] == [
            *("Operation canceled", "Operation canceled", "no such luck")
        ]
        assert all(job.log[-2:] == ["abort", "clean"] for job in jobs)

    run(test)


@pytest.mark.parametrize("which", [0, 1])
def test_one_is_cancelled_while_another_waits(which: int) -> None:
    async def test(bench: Bench) -> None:
        jobs = group_of(bench, steps, nothing)
        await turns()
        with pytest.raises(Error, match=r"^Job 'j2' in state 'waiting' cannot accept command verb 'finalize'$"):
            await jobs[1].user_finalize()
        start = len(bench.seen)
        await jobs[which].user_cancel()
        await ended(*jobs)
        assert since(bench, start) == [
            *(("j1 aborting", "j2 aborting") if which == 0 else ("j2 aborting", "j1 aborting")),
            *("j2 concluded", "j2 null", "j1 concluded", "j1 null"),
        ]
        assert all(job.log[-2:] == ["abort", "clean"] for job in jobs)

    run(test)


@pytest.mark.parametrize("which", [0, 1])
def test_one_is_cancelled_while_all_are_pending(which: int) -> None:
    async def test(bench: Bench) -> None:
        jobs = group_of(bench, nothing, nothing, auto_finalize=False)
        await turns(20)
        start = len(bench.seen)
        await jobs[which].user_cancel()
        # The command returns when all are over.
        assert since(bench, start) == [*after_the_end("j2", "aborting"), *after_the_end("j1", "aborting")]
        assert all(job.log == ["run", "abort", "clean"] for job in jobs)

    run(test)


def test_one_that_cannot_be_prepared_takes_the_others_along() -> None:
    async def test(bench: Bench) -> None:
        jobs = group_of(bench, nothing, nothing, nothing, auto_dismiss=False)
        jobs[1].fail_in = "prepare"
        await ended(*jobs)
        assert [None if job.error is None else job.error.desc for job in jobs] == [
            *("Operation canceled", "No space left on device", "Operation canceled")
        ]
        assert [job.log for job in jobs] == [
            ["run", "abort", "clean"],
            ["run", "prepare", "abort", "clean"],
            ["run", "prepare", "abort", "clean"],
        ]

    run(test)


def test_a_group_that_has_not_begun() -> None:
    """What a transaction does whose last action fails."""

    async def test(bench: Bench) -> None:
        group = JobGroup()
        jobs = [Fake(bench.jobs, id=f"j{n}", group=group) for n in (1, 2)]
        other = Fake(bench.jobs, id="j3", group=group)
        other.give_up()
        start = len(bench.seen)
        for job in reversed(jobs):
            # The others go along with the first.
            job.cancel()
            await job.wait()
        assert sorted(since(bench, start)) == sorted(
            [*after_the_end("j2", "aborting"), *after_the_end("j1", "aborting")]
        )
        assert all(job.log == ["abort", "clean"] for job in jobs)
        assert bench.jobs.query() == [] and not group.jobs

    run(test)


def test_a_paused_job_of_a_cancelled_group() -> None:
    async def test(bench: Bench) -> None:
        jobs = group_of(bench, steps, steps)
        await turns()
        jobs[0].user_pause()
        await turns()
        assert jobs[0].status is JobStatus.PAUSED
        start = len(bench.seen)
        await jobs[1].user_cancel()
        await ended(*jobs)
        assert since(bench, start) == [
            *("j2 aborting", "j1 running", "j1 aborting"),
            *after_the_end("j2"),
            *after_the_end("j1"),
        ]

    run(test)


def test_the_end_of_the_daemon() -> None:
    async def test(bench: Bench) -> None:
        async def stuck(job: Fake) -> None:
            await asyncio.Event().wait()

        group = JobGroup()
        jobs: list[Fake] = [
            Fake(bench.jobs, id="waits", group=group),
            Interruptible(bench.jobs, stuck, id="stuck", group=group),
            Fake(bench.jobs, steps, id="works", group=group),
        ]
        for job in jobs:
            job.start()
        await turns()
        await bench.jobs.shutdown()
        assert all(job.log[-2:] == ["abort", "clean"] for job in jobs) and bench.jobs.query() == []

    run(test)


def test_random_groups() -> None:
    """Whatever is done to them: all are committed or none, each is cleaned up once, and all come to their end."""
    dice = random.Random(4)

    async def once(bench: Bench) -> None:
        count = dice.randrange(1, 5)
        group = JobGroup()
        scripts = [steps, nothing, steps, nothing, nothing, fails if dice.random() < 0.3 else nothing]
        jobs = [
            dice.choice([Fake, Interruptible])(
                bench.jobs,
                dice.choice(scripts),
                id=f"j{n}",
                group=group,
                auto_finalize=dice.random() < 0.7,
                auto_dismiss=dice.random() < 0.7,
            )
            for n in range(count)
        ]
        if dice.random() < 0.15:
            dice.choice(jobs).fail_in = "prepare"
        tasks = []
        for job in jobs:
            job.start()
        for _ in range(100):
            await turns(dice.randrange(4))
            job = dice.choice(jobs)
            what = dice.choice(["open", "open", "open", "finalize", "pause", "resume", "cancel", "nothing"])
            if what == "open":
                job.gate.set()
            elif what == "cancel":
                if dice.random() < 0.1:
                    tasks.append(asyncio.create_task(job.user_cancel()))
            elif what == "finalize":
                tasks.append(asyncio.create_task(job.user_finalize()))
            elif what != "nothing":
                try:
                    getattr(job, f"user_{what}")()
                except Error:
                    pass
        for job in jobs:
            job.gate.set()
            while job.pause_count:
                job.user_paused = False
                job.resume()
        await turns(50)
        for job in jobs:
            if job.status is JobStatus.PENDING:
                await job.user_finalize()
        await ended(*jobs)
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert result is None or isinstance(result, Error)
        assert {job.status for job in jobs} <= {JobStatus.CONCLUDED, JobStatus.NULL}
        outcomes = {"commit" if "commit" in job.log else "abort" for job in jobs}
        assert len(outcomes) == 1
        for job in jobs:
            assert job.log.count("commit") + job.log.count("abort") == 1
            assert job.log[-1] == "clean" and job.log.count("clean") == 1
            assert (job.error is None) is (outcomes == {"commit"})
        assert not group.jobs

    for _ in range(150):
        run(once)
