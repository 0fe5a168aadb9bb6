"""The QMP commands for block jobs. Those that jobs of any type have as well (`pyqsd.jobs.commands`) differ in the error
when there is no such job, and in that ``block-job-cancel`` lets a ready job end in its own way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from functools import cache

from pyqsd.block.info import BlockDeviceIoStatus
from pyqsd.jobs.block_job import BlockJob
from pyqsd.jobs.job import Jobs, JobStatus, JobType, JobVerb
from pyqsd.qapi.command import command
from pyqsd.qapi.errors import DeviceNotActive, Error
from pyqsd.qapi.types import Struct


class MirrorCopyMode(StrEnum):
    """When a mirror copies what a user writes: some time later, or together with the write."""

    BACKGROUND = "background"
    WRITE_BLOCKING = "write-blocking"


class BlockJobInfo(Struct, kw_only=True, tag_field="type", tag="pyqsd-base"):
    """What ``query-block-jobs`` tells of a job. `len` and `offset`: its progress; `speed`: bytes per second, 0: no
    limit; `busy`: it does something."""

    device: str
    len: int
    offset: int
    busy: bool
    paused: bool
    speed: int
    io_status: BlockDeviceIoStatus
    ready: bool
    status: JobStatus
    auto_finalize: bool
    auto_dismiss: bool
    error: str | None = None

    @classmethod
    def tags(cls) -> Iterable[str]:
        return [str(kind) for kind in JobType]

    @classmethod
    def branches(cls) -> Mapping[str, type[Struct]]:
        return {"mirror": BlockJobInfoMirror}

    @classmethod
    def branch(cls, tag: str) -> type[Struct] | None:
        return cls.branches().get(tag) or _without_members(cls, tag)


class BlockJobInfoMirror(BlockJobInfo, kw_only=True, tag="mirror"):
    """That of a mirror. `actively_synced`: source and target are the same, and stay so."""

    actively_synced: bool


class BlockJobChangeOptions(Struct, kw_only=True, tag_field="type", tag="pyqsd-base"):
    """What of a job can be changed while it runs."""

    id: str

    @classmethod
    def tags(cls) -> Iterable[str]:
        return [str(kind) for kind in JobType]

    @classmethod
    def branches(cls) -> Mapping[str, type[Struct]]:
        return {"mirror": BlockJobChangeOptionsMirror}

    @classmethod
    def branch(cls, tag: str) -> type[Struct] | None:
        if tag not in cls.tags():
            return None
        return cls.branches().get(tag) or _without_members(cls, tag)


class BlockJobChangeOptionsMirror(BlockJobChangeOptions, kw_only=True, tag="mirror"):
    """That of a mirror."""

    copy_mode: MirrorCopyMode


@cache
def _without_members(union: type[Struct], tag: str) -> type[Struct]:
    return type(union.__name__, (union,), {}, tag=str(tag))


def find(jobs: Jobs, id: str) -> BlockJob:
    """The block job `id`. Raises Error."""
    try:
        job = jobs.find(id)
    except Error:
        job = None
    if not isinstance(job, BlockJob):
        raise DeviceNotActive(f"Block job '{id}' not found")
    return job


def info(job: BlockJob) -> BlockJobInfo:
    """What ``query-block-jobs`` tells of `job`."""
    cls = BlockJobInfo.branch(job.kind)
    assert cls is not None
    assert issubclass(cls, BlockJobInfo)
    return cls(
        device=job.id or "",
        len=job.progress_total,
        offset=job.progress_current,
        busy=job.busy,
        paused=job.pause_count > 0,
        speed=job.speed,
        io_status=job.io_status,
        ready=job.status in (JobStatus.READY, JobStatus.STANDBY),
        status=job.status,
        auto_finalize=job.auto_finalize,
        auto_dismiss=job.auto_dismiss,
        error=None if job.error is None else job.error.desc,
        **job.more_info(),
    )


@command("query-block-jobs")
async def query_block_jobs(jobs: Jobs, /) -> list[BlockJobInfo]:
    """All block jobs, the newest first."""
    return [info(job) for job in jobs if isinstance(job, BlockJob)]


@command("block-job-set-speed")
async def block_job_set_speed(jobs: Jobs, /, *, device: str, speed: int) -> None:
    """Limit a job to `speed` bytes per second; 0: no limit."""
    job = find(jobs, device)
    job.set_speed(speed)
    await job.react()


@command("block-job-cancel")
async def block_job_cancel(jobs: Jobs, /, *, device: str, force: bool | None = None) -> None:
    """End a job early. A ready mirror ends with a complete copy then, unless `force`."""
    job = find(jobs, device)
    if job.user_paused and not force:
        raise Error(f"The block job for device '{device}' is currently paused")
    await job.user_cancel(bool(force))


@command("block-job-pause")
async def block_job_pause(jobs: Jobs, /, *, device: str) -> None:
    """Let a job stand still until ``block-job-resume``."""
    job = find(jobs, device)
    job.user_pause()
    await job.react()


@command("block-job-resume")
async def block_job_resume(jobs: Jobs, /, *, device: str) -> None:
    """Let a job go on that was stopped by ``block-job-pause``, or by an error."""
    job = find(jobs, device)
    job.user_resume()
    await job.react()


@command("block-job-complete")
async def block_job_complete(jobs: Jobs, /, *, device: str) -> None:
    """End a job that is ready."""
    find(jobs, device).user_complete()


@command("block-job-dismiss")
async def block_job_dismiss(jobs: Jobs, /, *, id: str) -> None:
    """Forget a job that has concluded."""
    await find(jobs, id).user_dismiss()


@command("block-job-finalize")
async def block_job_finalize(jobs: Jobs, /, *, id: str) -> None:
    """Let a pending job conclude."""
    await find(jobs, id).user_finalize()


@command("block-job-change", boxed=True)
async def block_job_change(jobs: Jobs, /, options: BlockJobChangeOptions) -> None:
    """Change options of a job while it runs."""
    job = find(jobs, options.id)
    job.check_verb(JobVerb.CHANGE)
    job.change(options)
