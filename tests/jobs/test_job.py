"""The state machine of jobs, with a job that does nothing but what the test says."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from pyqsd.jobs import job as jobs_module
from pyqsd.jobs.job import TRANSITIONS, VERBS, Job, JobCancelled, Jobs, JobStatus, JobStatusChange, JobType, JobVerb
from pyqsd.qapi.command import Event, EventBus
from pyqsd.qapi.errors import Error

S = JobStatus


class Fake(Job):
    """`script` is its work; `log` has the hooks that were called."""

    kind = JobType.BACKUP
    can_complete = True

    def __init__(self, jobs: Jobs, script: Callable[[Fake], Awaitable[None]] | None = None, **how: Any) -> None:
        self.log: list[str] = []
        self.script = script
        self.fail_in = ""
        self.gate = asyncio.Event()
        self.soft = False
        super().__init__(jobs, how.pop("id", "job"), **how)

    async def run(self) -> None:
        self.log.append("run")
        if self.script is not None:
            await self.script(self)

    def _hook(self, name: str) -> None:
        self.log.append(name)
        if self.fail_in == name:
            raise OSError(errno.ENOSPC, "injected")

    async def prepare(self) -> None:
        self._hook("prepare")
        await asyncio.sleep(0)

    async def commit(self) -> None:
        self._hook("commit")

    async def abort(self) -> None:
        self._hook("abort")

    async def clean(self) -> None:
        self._hook("clean")

    async def pausing(self) -> None:
        self.log.append("pausing")

    def resumed(self) -> None:
        self.log.append("resumed")

    def completing(self) -> None:
        self._hook("completing")
        self.gate.set()

    def cancel_requested(self, force: bool) -> bool:
        return force or not self.soft


class Interruptible(Fake):
    interruptible = True


class Bench:
    def __init__(self) -> None:
        self.bus = EventBus()
        self.seen: list[Event] = []
        self.bus.subscribe(self.seen.append)
        self.jobs = Jobs(self.bus)

    @property
    def states(self) -> list[str]:
        return [str(event.status) for event in self.seen if isinstance(event, JobStatusChange)]


def run(test: Callable[[Bench], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(test(Bench()), 20)

    asyncio.run(main())


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def steps(job: Fake) -> None:
    """Works until the gate opens, with a pause point in each step."""
    while not job.gate.is_set():
        await job.pause_point()
        await asyncio.sleep(0)


async def until_ready(job: Fake) -> None:
    job.ready()
    while not job.gate.is_set() and not job.soft_cancelled:
        await job.sleep(10)


# --- the tables -----------------------------------------------------------------------------------


def test_every_transition_is_allowed_or_refused() -> None:
    async def test(bench: Bench) -> None:
        job = Fake(bench.jobs)
        for before in S:
            for after in S:
                job.status = before
                if after in TRANSITIONS[before]:
                    job._become(after)
                    assert job.status is after
                else:
                    with pytest.raises(AssertionError):
                        job._become(after)
                    assert job.status is before

    run(test)


def test_every_state_is_reached_and_left() -> None:
    reached = {S.UNDEFINED}
    while True:
        more = reached.union(*(TRANSITIONS[state] for state in reached))
        if more == reached:
            break
        reached = more
    assert reached == set(S)
    assert [state for state in S if not TRANSITIONS[state]] == [S.NULL]


def test_verbs_by_state() -> None:
    """Every verb in every state: refused with the state's name, or not."""

    async def test(bench: Bench) -> None:
        job = Fake(bench.jobs)
        for verb in JobVerb:
            for state in S:
                job.status = state
                if state in VERBS[verb]:
                    job.check_verb(verb)
                else:
                    words = f"Job 'job' in state '{state}' cannot accept command verb '{verb}'"
                    with pytest.raises(Error, match=words):
                        job.check_verb(verb)

    run(test)
    for verb in (JobVerb.CANCEL, JobVerb.PAUSE, JobVerb.RESUME, JobVerb.SET_SPEED, JobVerb.CHANGE):
        assert {S.CREATED, S.RUNNING, S.PAUSED, S.READY, S.STANDBY} <= VERBS[verb]
    assert not any({S.UNDEFINED, S.ABORTING, S.NULL} & states for states in VERBS.values())


# --- ways through a life --------------------------------------------------------------------------


def test_a_job_that_succeeds() -> None:
    async def test(bench: Bench) -> None:
        job = Fake(bench.jobs)
        assert bench.states == ["created"]
        job.start()
        assert bench.states == ["created", "running"] and job.log == []
        await job.wait()
        assert bench.states == ["created", "running", "waiting", "pending", "concluded", "null"]
        assert job.log == ["run", "prepare", "commit", "clean"]
        assert bench.jobs.query() == []

    run(test)


@pytest.mark.parametrize("fail_in", ["run", "prepare"])
def test_a_job_that_fails(fail_in: str) -> None:
    async def test(bench: Bench) -> None:
        async def script(job: Fake) -> None:
            if fail_in == "run":
                raise Error("no such luck")

        job = Fake(bench.jobs, script, auto_dismiss=False)
        job.fail_in = fail_in
        job.start()
        await job.wait()
        middle = [] if fail_in == "run" else ["waiting", "pending"]
        assert bench.states == ["created", "running", *middle, "aborting", "concluded"]
        assert job.log[-2:] == ["abort", "clean"] and "commit" not in job.log
        (info,) = bench.jobs.query()
        assert info.error == ("no such luck" if fail_in == "run" else "No space left on device")
        await job.user_dismiss()
        assert bench.states[-1] == "null" and bench.jobs.query() == []

    run(test)


@pytest.mark.parametrize("fail_in", ["commit", "clean"])
def test_what_cannot_fail_does_not_hold_up_the_end(fail_in: str, caplog: pytest.LogCaptureFixture) -> None:
    async def test(bench: Bench) -> None:
        job = Fake(bench.jobs)
        job.fail_in = fail_in
        job.start()
        await job.wait()
        assert bench.states[-2:] == ["concluded", "null"]

    run(test)
    assert "its end was not clean" in caplog.text


def test_a_mistake_in_a_job_is_its_failure(caplog: pytest.LogCaptureFixture) -> None:
    async def test(bench: Bench) -> None:
        async def script(job: Fake) -> None:
            raise KeyError("mistake")

        job = Fake(bench.jobs, script, auto_dismiss=False)
        job.start()
        await job.wait()
        assert bench.states[-2:] == ["aborting", "concluded"]
        assert bench.jobs.query()[0].error == "Internal error: 'mistake'"

    run(test)
    assert "mistake" in caplog.text


def test_manual_finalize() -> None:
    async def test(bench: Bench) -> None:
        job = Fake(bench.jobs, auto_finalize=False, auto_dismiss=False)
        with pytest.raises(Error, match="in state 'created' cannot accept command verb 'finalize'"):
            await job.user_finalize()
        job.start()
        await turns()
        assert bench.states[-1] == "pending" and job.log == ["run"]
        await job.user_finalize()
        assert bench.states[-1] == "concluded"
        assert job.log == ["run", "prepare", "commit", "clean"]
        with pytest.raises(Error, match="in state 'concluded' cannot accept command verb 'finalize'"):
            await job.user_finalize()

    run(test)


def test_pending_job_is_cancelled() -> None:
    async def test(bench: Bench) -> None:
        job = Fake(bench.jobs, auto_finalize=False, auto_dismiss=False)
        job.start()
        await turns()
        await job.user_cancel()
        assert bench.states[-3:] == ["pending", "aborting", "concluded"]
        assert job.log == ["run", "abort", "clean"]
        assert bench.jobs.query()[0].error == "Operation canceled"

    run(test)


def test_cancelled_while_it_prepares() -> None:
    async def test(bench: Bench) -> None:
        job = Fake(bench.jobs)
        job.start()
        await turns(1)
        assert job.log == ["run", "prepare"]
        await job.user_cancel()
        assert job.log == ["run", "prepare", "abort", "clean"]

    run(test)


def test_cancelled_before_it_starts() -> None:
    async def test(bench: Bench) -> None:
        job = Fake(bench.jobs)
        await job.user_cancel()
        assert bench.states == ["created", "aborting", "concluded", "null"]
        assert job.log == ["abort", "clean"]

    run(test)


@pytest.mark.parametrize("kind", [Fake, Interruptible])
@pytest.mark.parametrize("after", range(12))
def test_cancelled_at_every_turn(kind: type[Fake], after: int) -> None:
    """However far it has got, it ends, as cancelled or as finished, and never in between."""

    async def test(bench: Bench) -> None:
        async def script(job: Fake) -> None:
            for _ in range(3):
                await job.pause_point()
                await asyncio.sleep(0)

        job = kind(bench.jobs, script, auto_dismiss=False)
        job.start()
        await turns(after)
        if job.status in VERBS[JobVerb.CANCEL]:
            await job.user_cancel()
        await job.wait()
        assert job.status is S.CONCLUDED
        assert ("commit" in job.log) != ("abort" in job.log) and job.log[-1] == "clean"
        assert ("abort" in job.log) == (job.error is not None)

    run(test)


def test_interruptible_job_ends_in_the_middle_of_a_wait() -> None:
    async def test(bench: Bench) -> None:
        async def script(job: Fake) -> None:
            await asyncio.Event().wait()

        job = Interruptible(bench.jobs, script, auto_dismiss=False)
        job.start()
        await turns()
        await job.user_cancel()
        await job.wait()
        assert job.error is not None and job.error.errno == errno.ECANCELED

    run(test)


# --- pausing --------------------------------------------------------------------------------------


def test_user_pause() -> None:
    async def test(bench: Bench) -> None:
        job = Fake(bench.jobs, steps)
        with pytest.raises(Error, match="Can't resume a job that was not paused"):
            job.user_resume()
        job.start()
        await turns()
        job.user_pause()
        assert job.status is S.RUNNING  # not before the next pause point
        await turns()
        assert job.status is S.PAUSED and job.log == ["run", "pausing"]
        with pytest.raises(Error, match="already paused"):
            job.user_pause()
        job.gate.set()
        await turns(20)
        assert job.status is S.PAUSED
        job.user_resume()
        await job.wait()
        assert bench.states[1:5] == ["running", "paused", "running", "waiting"]
        assert job.log[:3] == ["run", "pausing", "resumed"]

    run(test)


def test_paused_before_it_starts() -> None:
    async def test(bench: Bench) -> None:
        job = Fake(bench.jobs)
        job.user_pause()
        job.start()
        await turns()
        assert job.status is S.PAUSED and "run" not in job.log
        job.user_resume()
        await job.wait()
        assert job.log[-1] == "clean"

    run(test)


def test_drains_and_the_user_pause_independently() -> None:
    async def test(bench: Bench) -> None:
        job = Fake(bench.jobs, steps)
        job.start()
        job.pause()
        job.pause()
        job.user_pause()
        await turns()
        job.resume()
        job.user_resume()
        await turns()
        assert job.status is S.PAUSED
        with pytest.raises(Error, match="Can't resume a job that was not paused"):
            job.user_resume()
        job.resume()
        await turns()
        assert job.status is S.RUNNING
        job.gate.set()
        await job.wait()

    run(test)


@pytest.mark.parametrize("kind", [Fake, Interruptible])
def test_cancel_of_a_paused_job(kind: type[Fake]) -> None:
    async def test(bench: Bench) -> None:
        job = kind(bench.jobs, steps)
        job.start()
        job.user_pause()
        job.pause()
        await turns()
        assert job.status is S.PAUSED
        await job.user_cancel()
        await job.wait()
        assert bench.states[-4:] == ["running", "aborting", "concluded", "null"]

    run(test)


def test_sleep_ends_when_something_is_asked() -> None:
    async def test(bench: Bench) -> None:
        async def script(job: Fake) -> None:
            await job.sleep(0)
            await job.sleep(1000)

        job = Fake(bench.jobs, script, auto_dismiss=False)
        job.start()
        await turns(20)
        job.user_pause()
        await turns()
        assert job.status is S.PAUSED
        job.cancel()
        await job.wait()
        assert isinstance(job.error, JobCancelled)

    run(test)


# --- ready jobs -----------------------------------------------------------------------------------


def test_ready_job_is_completed() -> None:
    async def test(bench: Bench) -> None:
        job = Fake(bench.jobs, until_ready)
        with pytest.raises(Error, match="in state 'created' cannot accept command verb 'complete'"):
            job.user_complete()
        job.start()
        await turns()
        assert job.status is S.READY
        job.user_pause()
        await turns()
        assert job.status is S.STANDBY
        # Also while it stands still: it ends when it goes on.
        job.user_complete()
        await turns()
        assert job.status is S.STANDBY
        job.user_resume()
        await job.wait()
        assert bench.states[2:6] == ["ready", "standby", "ready", "waiting"]

    run(test)


def test_soft_cancel_is_the_jobs_own_way_to_end() -> None:
    async def test(bench: Bench) -> None:
        job = Fake(bench.jobs, until_ready, auto_dismiss=False)
        job.soft = True
        job.start()
        await turns()
        await job.user_cancel(force=False)
        with pytest.raises(Error, match="The active block job 'job' cannot be completed"):
            job.user_complete()
        await job.wait()
        assert job.error is None and "commit" in job.log

    run(test)


def test_forced_cancel_of_a_ready_job() -> None:
    async def test(bench: Bench) -> None:
        job = Fake(bench.jobs, until_ready, auto_dismiss=False)
        job.soft = True
        job.start()
        await turns()
        job.cancel(force=True)
        await job.wait()
        assert isinstance(job.error, JobCancelled) and job.log == ["run", "abort", "clean"]

    run(test)


# --- the service ----------------------------------------------------------------------------------


def test_ids() -> None:
    async def test(bench: Bench) -> None:
        for wrong in ("", "1a", "a b", "#a", "ä", "a\n"):
            with pytest.raises(Error) as caught:
                Fake(bench.jobs, id=wrong)
            assert caught.value.desc == f"Invalid job ID '{wrong}'"
        first, second = Fake(bench.jobs, id="A-1._x"), Fake(bench.jobs, id="b")
        with pytest.raises(Error, match="Job ID 'b' already in use"):
            Fake(bench.jobs, id="b")
        assert [info.id for info in bench.jobs.query()] == ["b", "A-1._x"]
        assert bench.jobs.find("b") is second
        with pytest.raises(Error, match="Job not found"):
            bench.jobs.find("c")
        await first.user_cancel()
        assert [info.id for info in bench.jobs.query()] == ["b"]
        second.start()
        await second.wait()

    run(test)


def test_jobs_of_our_own_are_not_told_of() -> None:
    async def test(bench: Bench) -> None:
        job = Fake(bench.jobs, id=None)
        other = Fake(bench.jobs, id=None)
        assert bench.jobs.query() == []
        for one in (job, other):
            one.start()
            await one.wait()
        assert bench.states == []

    run(test)


def test_progress() -> None:
    async def test(bench: Bench) -> None:
        job = Fake(bench.jobs)
        job.expect(10)
        job.advance(4)
        job.expect(8)
        (info,) = bench.jobs.query()
        assert (info.current_progress, info.total_progress) == (4, 12)
        await job.user_cancel()

    run(test)


def test_shutdown_ends_everything() -> None:
    async def test(bench: Bench) -> None:
        pending = Fake(bench.jobs, id="pending", auto_finalize=False, auto_dismiss=False)
        working = Fake(bench.jobs, steps, id="working")
        paused = Fake(bench.jobs, steps, id="paused")
        waiting = Interruptible(bench.jobs, lambda job: asyncio.Event().wait(), id="waiting")  # type: ignore[arg-type,return-value]
        Fake(bench.jobs, id="created")
        done = Fake(bench.jobs, id="done", auto_dismiss=False)
        for job in (pending, working, paused, waiting, done):
            job.start()
        paused.user_pause()
        await turns(8)
        assert done.status is S.CONCLUDED
        await bench.jobs.shutdown()
        assert bench.jobs.query() == []
        assert all(job.status is S.NULL for job in (pending, working, paused, waiting, done))

    run(test)


def test_shutdown_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(jobs_module, "_CANCEL_TIMEOUT", 0.01)

    async def test(bench: Bench) -> None:
        async def deaf(job: Fake) -> None:
            await asyncio.Event().wait()

        job = Fake(bench.jobs, deaf)
        job.start()
        await turns()
        await bench.jobs.shutdown()
        assert job.status is S.NULL and job.log[-2:] == ["abort", "clean"]

    run(test)
    assert "does not end" in caplog.text
