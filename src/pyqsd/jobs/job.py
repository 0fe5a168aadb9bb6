"""Jobs: the state machine that all of them share, and the service that holds them.

A job is a subclass of `Job` that says what is done (`run`) and how it ends (`prepare`, `commit`, `abort`, `clean`).
States, verbs, and the order of the events are those of QAPI ``JobStatus`` and ``JobVerb``, as QSD has them.

A job runs in one task of its own, which is also the only one that takes it from its start to its end; commands and the
end of the daemon only tell it something (`cancel`, `pause`, `finalize` …) and wait for it where QSD does.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import re
from collections.abc import Awaitable, Iterator
from enum import StrEnum
from typing import ClassVar, Final

from pyqsd.qapi.command import Event, EventBus, event
from pyqsd.qapi.errors import Error, strerror
from pyqsd.qapi.types import Struct

log = logging.getLogger(__name__)

_WELL_FORMED = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
#: How long, in seconds, a job that was cancelled because the daemon ends may go on until it sees that by itself.
_CANCEL_TIMEOUT: Final = 5.0
#: How long, in seconds, a command waits for the end of a job that has nothing else to do.
_SOON: Final = 1.0


class JobType(StrEnum):
    """What a job does."""

    COMMIT = "commit"
    STREAM = "stream"
    MIRROR = "mirror"
    BACKUP = "backup"
    CREATE = "create"
    AMEND = "amend"
    SNAPSHOT_LOAD = "snapshot-load"
    SNAPSHOT_SAVE = "snapshot-save"
    SNAPSHOT_DELETE = "snapshot-delete"


class JobStatus(StrEnum):
    """The life of a job."""

    UNDEFINED = "undefined"
    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    READY = "ready"
    STANDBY = "standby"
    WAITING = "waiting"
    PENDING = "pending"
    ABORTING = "aborting"
    CONCLUDED = "concluded"
    NULL = "null"


class JobVerb(StrEnum):
    """What can be asked of a job."""

    CANCEL = "cancel"
    PAUSE = "pause"
    RESUME = "resume"
    SET_SPEED = "set-speed"
    COMPLETE = "complete"
    DISMISS = "dismiss"
    FINALIZE = "finalize"
    CHANGE = "change"


_S = JobStatus

TRANSITIONS: Final[dict[JobStatus, frozenset[JobStatus]]] = {
    _S.UNDEFINED: frozenset({_S.CREATED}),
    _S.CREATED: frozenset({_S.RUNNING, _S.ABORTING, _S.NULL}),
    _S.RUNNING: frozenset({_S.PAUSED, _S.READY, _S.WAITING, _S.ABORTING}),
    _S.PAUSED: frozenset({_S.RUNNING}),
    _S.READY: frozenset({_S.STANDBY, _S.WAITING, _S.ABORTING}),
    _S.STANDBY: frozenset({_S.READY}),
    _S.WAITING: frozenset({_S.PENDING, _S.ABORTING}),
    _S.PENDING: frozenset({_S.ABORTING, _S.CONCLUDED}),
    _S.ABORTING: frozenset({_S.CONCLUDED}),
    _S.CONCLUDED: frozenset({_S.NULL}),
    _S.NULL: frozenset(),
}

_ACTIVE = frozenset({_S.CREATED, _S.RUNNING, _S.PAUSED, _S.READY, _S.STANDBY})

VERBS: Final[dict[JobVerb, frozenset[JobStatus]]] = {
    JobVerb.CANCEL: _ACTIVE | {_S.WAITING, _S.PENDING},
    JobVerb.PAUSE: _ACTIVE,
    JobVerb.RESUME: _ACTIVE,
    JobVerb.SET_SPEED: _ACTIVE,
    JobVerb.COMPLETE: frozenset({_S.READY, _S.STANDBY}),
    JobVerb.FINALIZE: frozenset({_S.PENDING}),
    JobVerb.DISMISS: frozenset({_S.CONCLUDED}),
    JobVerb.CHANGE: _ACTIVE,
}


class JobInfo(Struct, kw_only=True):
    """What ``query-jobs`` tells of a job. The unit of progress is the job's own; `error` is there if it failed."""

    id: str
    type: JobType
    status: JobStatus
    current_progress: int
    total_progress: int
    error: str | None = None


@event("JOB_STATUS_CHANGE")
class JobStatusChange(Event):
    """A job is in another state."""

    id: str
    status: JobStatus


class JobCancelled(Error):
    """What ends `Job.run` at its next pause point after the job was cancelled."""

    def __init__(self) -> None:
        super().__init__(strerror(errno.ECANCELED), errno.ECANCELED)


class Job:
    """One job.

    Arguments:
        jobs: the service; the job is in its list from now on.
        id: as the user knows it, or None for one of our own that no command and no event tells of.
        auto_finalize: go on after `PENDING` without being told to.
        auto_dismiss: vanish after `CONCLUDED` without being told to.
        group: the jobs that it ends with; None: it is on its own.

    Raises Error if the id cannot be had.
    """

    kind: ClassVar[JobType]
    #: Cancelling also interrupts whatever `run` waits for (with `asyncio.CancelledError`), rather than only its next
    #: `pause_point` or `sleep`.
    interruptible: ClassVar[bool] = False
    #: It has a point at which it is `READY`, and `complete` ends it from there.
    can_complete: ClassVar[bool] = False

    def __init__(
        self,
        jobs: Jobs,
        id: str | None,
        *,
        auto_finalize: bool = True,
        auto_dismiss: bool = True,
        group: JobGroup | None = None,
    ) -> None:
        jobs.check_id(id)
        self.jobs = jobs
        self.id = id
        self.auto_finalize = auto_finalize
        self.auto_dismiss = auto_dismiss
        self.status = JobStatus.UNDEFINED
        self.progress_current = 0
        self.progress_total = 0
        self.error: Error | None = None
        #: It was cancelled and ends as soon as it can.
        self.cancelled = False
        #: It was asked to end early, and does it in its own way (`cancel_requested`).
        self.soft_cancelled = False
        #: How many ask it to stand still: the user at most once, each drain of its nodes once.
        self.pause_count = 0
        self.user_paused = False
        self._task: asyncio.Task[None] | None = None
        self._in_run = False
        #: It sleeps or stands still.
        self.resting = False
        self._still_waiters: list[asyncio.Future[None]] = []
        #: Wakes the task from a pause, a sleep, or the wait for the rest of its group and for `finalize`.
        self._changed = asyncio.Event()
        self._finalize_wanted = False
        self._started = False
        self.group = group or JobGroup()
        self.group.jobs.insert(0, self)
        jobs.enter(self)
        self._become(JobStatus.CREATED)

    # --- what a job says ---------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """The work. It calls `pause_point` often. Raises Error, OSError; then the job fails."""
        raise NotImplementedError

    async def prepare(self) -> None:
        """What can still fail, after `run` and before `commit`. Raises Error, OSError."""

    async def commit(self) -> None:
        """The job has succeeded. Cannot fail."""

    async def abort(self) -> None:
        """The job has failed or was cancelled: undo. Cannot fail."""

    async def clean(self) -> None:
        """Release everything, after `commit` or `abort`. Cannot fail."""

    async def dismissed(self) -> None:
        """Nobody can ask for the job any more: release what `clean` has kept for that. Cannot fail."""

    async def pausing(self) -> None:
        """It is about to stand still: wait for all that it has under way. Raises nothing."""

    def resumed(self) -> None:
        """It goes on."""

    def user_resumed(self) -> None:
        """The user lets it go on."""

    def cancel_requested(self, force: bool) -> bool:
        """The user cancels. False if the job ends in its own way (a ready mirror does, unless `force`)."""
        return True

    def completing(self) -> None:
        """The user wants a ready job to end. Raises Error."""

    def reached(self, status: JobStatus) -> None:
        """It is `READY`, or `PENDING` and waits for ``job-finalize``."""

    def finished(self) -> None:
        """A job that was started has ended, and is about to be `CONCLUDED`."""

    # --- what `run` uses ---------------------------------------------------------------------------------------------

    async def pause_point(self) -> None:
        """Stand still here as long as somebody wants it. Raises JobCancelled once the job is cancelled."""
        if self.pause_count and not self.cancelled:
            await self.pausing()
        if self.pause_count and not self.cancelled:
            before = self.status
            self._become(JobStatus.STANDBY if before is JobStatus.READY else JobStatus.PAUSED)
            self.resting = True
            self._stands_still()
            try:
                while self.pause_count and not self.cancelled:
                    await self._wait_changed()
            finally:
                self.resting = False
                # Also when it is interrupted: it fails as what it was.
                self._become(before)
            self.resumed()
        if self.cancelled:
            raise JobCancelled

    async def sleep(self, seconds: float) -> None:
        """Wait, until something is asked of the job at the latest, and then `pause_point`."""
        self._changed.clear()
        if not self.cancelled and not self.pause_count:
            self.resting = True
            try:
                async with asyncio.timeout(seconds):
                    await self._changed.wait()
            except TimeoutError:
                pass
            finally:
                self.resting = False
        await self.pause_point()

    def ready(self) -> None:
        """It could end now, and goes on until it is told to (`completing`, `cancel_requested`)."""
        self._become(JobStatus.READY)
        self.reached(JobStatus.READY)

    def expect(self, more: int) -> None:
        """So much is left to do."""
        self.progress_total = self.progress_current + more

    def advance(self, done: int) -> None:
        """So much more is done."""
        self.progress_current += done

    async def _wait_changed(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    # --- its way -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin. `run` is called when the caller next waits."""
        self._started = True
        self._become(JobStatus.RUNNING)
        self._task = asyncio.get_running_loop().create_task(self._live())

    def _become(self, status: JobStatus) -> None:
        if status not in TRANSITIONS[self.status]:
            raise AssertionError(f"job '{self.id}': {self.status} cannot become {status}")
        self.status = status
        if self.id is not None:
            self.jobs.events.emit(JobStatusChange(id=self.id, status=status))

    async def _live(self) -> None:
        await self._try(self._run())
        if self.cancelled and self.error is None:
            self.error = JobCancelled()
        self._become(JobStatus.WAITING if self.error is None else JobStatus.ABORTING)
        await self.group._end(self)

    @property
    def _run_is_over(self) -> bool:
        return self.status not in _ACTIVE

    def _fails_if_over(self) -> None:
        """If it has no more work to do and was cancelled, or has failed otherwise, it is aborted."""
        if self._run_is_over:
            if self.cancelled and self.error is None:
                self.error = JobCancelled()
            if self.error is not None and self.status is not JobStatus.ABORTING:
                self._become(JobStatus.ABORTING)

    async def _conclude(self) -> None:
        """The last steps, in the task of whichever job of the group ends it."""
        self._fails_if_over()
        if self.error is None:
            await self._must(self.commit())
        else:
            await self._must(self.abort())
        await self._must(self.clean())
        self.group.jobs.remove(self)
        if self._started:
            self.finished()
        self._become(JobStatus.CONCLUDED)
        if self.auto_dismiss:
            self._remove()
            await self._must(self.dismissed())
        # Its own task has nothing more to do.
        self._changed.set()

    async def _run(self) -> None:
        self._in_run = True
        try:
            await self.pause_point()
            await self.run()
        finally:
            self._in_run = False
            self._stands_still()

    def _interrupted(self) -> None:
        """The job was cancelled and the task that works for it interrupted; from here on that is like any other."""
        task = asyncio.current_task()
        assert task is not None
        task.uncancel()
        self.cancelled = True

    async def _wait_in_group(self) -> None:
        try:
            await self._wait_changed()
        except asyncio.CancelledError:
            self._interrupted()

    async def _try(self, step: Awaitable[None]) -> None:
        try:
            await step
        except asyncio.CancelledError:
            self._interrupted()
            self.error = JobCancelled()
        except Error as exc:
            self.error = exc
        except OSError as exc:
            self.error = Error(strerror(exc.errno or errno.EIO), exc.errno or errno.EIO)
        except Exception as exc:
            log.exception("job '%s' failed", self.id)
            self.error = Error(f"Internal error: {exc}")

    async def _must(self, step: Awaitable[None]) -> None:
        try:
            await step
        except (Exception, asyncio.CancelledError):
            log.exception("job '%s': its end was not clean", self.id)

    def give_up(self) -> None:
        """Whoever made it could not finish that: it was never there. It has not been started."""
        self.group.jobs.remove(self)
        self._remove()

    def _remove(self) -> None:
        self._become(JobStatus.NULL)
        self.jobs.leave(self)

    async def wait(self, seconds: float | None = None) -> None:
        """Until the job has concluded, or for so long."""
        if self._task is not None:
            await asyncio.wait([self._task], timeout=seconds)

    def _stands_still(self) -> None:
        waiters, self._still_waiters = self._still_waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def wait_still(self) -> None:
        """Until it does nothing that a drain of its nodes has to wait for: it stands still, or `run` has ended. Does
        not wait when the job itself asks, because it drains."""
        while self._in_run and not self._is_still and asyncio.current_task() is not self._task:
            waiter = asyncio.get_running_loop().create_future()
            self._still_waiters.append(waiter)
            await waiter

    @property
    def _is_still(self) -> bool:
        return self.status in (JobStatus.PAUSED, JobStatus.STANDBY)

    # --- what is asked of it -----------------------------------------------------------------------------------------

    def check_verb(self, verb: JobVerb) -> None:
        """Raises Error if the job's state does not allow `verb`."""
        if self.status not in VERBS[verb]:
            raise Error(f"Job '{self.id}' in state '{self.status}' cannot accept command verb '{verb}'", errno.EPERM)

    def pause(self) -> None:
        """Stand still at the next pause point, until `resume` (a drain of the nodes that the job uses)."""
        self.pause_count += 1
        # It may be asleep.
        self._changed.set()

    def resume(self) -> None:
        """The opposite of `pause`."""
        assert self.pause_count > 0
        self.pause_count -= 1
        self._changed.set()

    def user_pause(self) -> None:
        """``job-pause``. Raises Error."""
        self.check_verb(JobVerb.PAUSE)
        if self.user_paused:
            raise Error("Job is already paused")
        self.user_paused = True
        self.pause()

    def user_resume(self) -> None:
        """``job-resume``. Raises Error."""
        if not self.user_paused:
            raise Error("Can't resume a job that was not paused")
        self.check_verb(JobVerb.RESUME)
        self.user_paused = False
        self.user_resumed()
        self.resume()

    async def user_cancel(self, force: bool = True) -> None:
        """``job-cancel``. Raises Error."""
        self.check_verb(JobVerb.CANCEL)
        # When it does not run, nothing is left to do that could take long.
        at_rest = self.status in (JobStatus.CREATED, JobStatus.WAITING, JobStatus.PENDING)
        resting = self.resting
        self.cancel(force)
        if at_rest:
            await self.wait()
        elif resting and self.cancelled:
            await self.wait(_SOON)

    async def react(self) -> None:
        """A job that sleeps or stands still acts on what it was told before the command is answered."""
        await asyncio.sleep(0)

    def cancel(self, force: bool = True) -> None:
        """End as soon as possible; without `force`, in the way of the job."""
        if self.user_paused:
            self.user_paused = False
            self.user_resumed()
            self.resume()
        if not self.cancel_requested(force):
            self.soft_cancelled = True
        else:
            self.cancelled = True
            if self._task is None:
                # It has not begun.
                self._task = asyncio.get_running_loop().create_task(self._live())
            elif self.interruptible and self._in_run:
                self._task.cancel()
        self._changed.set()

    def user_complete(self) -> None:
        """``job-complete``. Raises Error."""
        self.check_verb(JobVerb.COMPLETE)
        if self.soft_cancelled or self.cancelled or not self.can_complete:
            raise Error(f"The active block job '{self.id}' cannot be completed")
        self.completing()
        self._changed.set()

    async def user_finalize(self) -> None:
        """``job-finalize``. Raises Error."""
        self.check_verb(JobVerb.FINALIZE)
        self._finalize_wanted = True
        self._changed.set()
        await self.wait()

    async def user_dismiss(self) -> None:
        """``job-dismiss``. Raises Error."""
        self.check_verb(JobVerb.DISMISS)
        self._remove()
        await self._must(self.dismissed())

    def info(self) -> JobInfo:
        """What ``query-jobs`` tells."""
        assert self.id is not None
        return JobInfo(
            id=self.id,
            type=self.kind,
            status=self.status,
            current_progress=self.progress_current,
            total_progress=self.progress_total,
            error=None if self.error is None else self.error.desc,
        )

    async def end(self) -> None:
        """Wait for a job that was cancelled because the daemon ends, and forget it."""
        task = self._task
        if task is not None and not (await asyncio.wait([task], timeout=_CANCEL_TIMEOUT))[0]:
            log.warning("job '%s' does not end, it is interrupted", self.id)
            task.cancel()
            await asyncio.wait([task])
        if self.status is JobStatus.CONCLUDED:
            self._remove()
            await self._must(self.dismissed())


class JobGroup:
    """Jobs that end together, all of them well or none: those of a transaction with ``completion-mode`` ``grouped``.
    Any other job is a group of its own.

    Who has done its work waits (`WAITING`) for the others, and then all are `PENDING`. If one of them is not to go on
    by itself, none does, and to finalize one is to finalize all. When one fails or is cancelled, all others are
    cancelled. The last steps of all of them are done one job after the other, the newest first, by the task of one of
    them.
    """

    def __init__(self) -> None:
        #: Those that have not concluded, the newest first.
        self.jobs: list[Job] = []
        #: A task is at the last steps of all jobs.
        self._ending = False

    async def _end(self, job: Job) -> None:
        """What the task of `job` does after `Job.run`."""
        self._wake()
        while job in self.jobs:
            if self._ending:
                await job._wait_in_group()
            elif job.error is not None or job.cancelled:
                await self._fail(job)
            elif all(one.status is JobStatus.WAITING for one in self.jobs):
                for one in self.jobs:
                    one._become(JobStatus.PENDING)
                    if not one.auto_finalize:
                        one.reached(JobStatus.PENDING)
            elif job.status is JobStatus.PENDING and (
                job._finalize_wanted or all(one.auto_finalize for one in self.jobs)
            ):
                await self._finalize(job)
            else:
                await job._wait_in_group()

    def _wake(self) -> None:
        for job in self.jobs:
            job._changed.set()

    async def _finalize(self, own: Job) -> None:
        self._ending = True
        for job in self.jobs:
            await job._try(job.prepare())
            if job.error is not None:
                job._fails_if_over()
                break
        failed = next((job for job in self.jobs if job.error is not None or job.cancelled), None)
        if failed is not None:
            self._cancel_all_but(failed)
        await self._conclude(own)

    async def _fail(self, own: Job) -> None:
        self._ending = True
        self._cancel_all_but(own)
        # As in QSD, its turn is before the others have come to their end.
        self.jobs[0]._fails_if_over()
        await self._conclude(own)

    def _cancel_all_but(self, failed: Job) -> None:
        for job in self.jobs:
            if job is not failed:
                job.cancel()

    async def _conclude(self, own: Job) -> None:
        """In the task of `own`."""
        while not all(job._run_is_over for job in self.jobs):
            await own._wait_in_group()
        for job in tuple(self.jobs):
            await job._conclude()


class Jobs:
    """All jobs of a daemon (a service)."""

    def __init__(self, events: EventBus) -> None:
        self.events = events
        self._jobs: list[Job] = []

    def check_id(self, id: str | None) -> None:
        """Raises Error if a new job cannot have this id."""
        if id is None:
            return
        if not _WELL_FORMED.fullmatch(id):
            raise Error(f"Invalid job ID '{id}'")
        if any(job.id == id for job in self._jobs):
            raise Error(f"Job ID '{id}' already in use")

    def enter(self, job: Job) -> None:
        """Used by `Job` only."""
        self._jobs.append(job)

    def leave(self, job: Job) -> None:
        """Used by `Job` only."""
        self._jobs.remove(job)

    def find(self, id: str) -> Job:
        """The job `id`. Raises Error."""
        for job in self._jobs:
            if job.id == id:
                return job
        raise Error("Job not found")

    def __iter__(self) -> Iterator[Job]:
        """All jobs of users, the newest first."""
        return (job for job in reversed(self._jobs) if job.id is not None)

    def query(self) -> list[JobInfo]:
        """What ``query-jobs`` tells."""
        return [job.info() for job in self]

    async def shutdown(self) -> None:
        """The end of the daemon: cancel everything and wait for it."""
        jobs = tuple(reversed(self._jobs))
        for job in jobs:
            if job.status in VERBS[JobVerb.CANCEL]:
                job.cancel()
        await asyncio.gather(*(job.end() for job in jobs))
