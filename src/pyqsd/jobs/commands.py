"""The QMP commands for jobs of any type."""

from __future__ import annotations

from pyqsd.jobs.job import JobInfo, Jobs
from pyqsd.qapi.command import command


@command("job-pause")
async def job_pause(jobs: Jobs, /, *, id: str) -> None:
    """Let a job stand still until ``job-resume``."""
    job = jobs.find(id)
    job.user_pause()
    await job.react()


@command("job-resume")
async def job_resume(jobs: Jobs, /, *, id: str) -> None:
    """Let a job go on that ``job-pause`` has stopped."""
    job = jobs.find(id)
    job.user_resume()
    await job.react()


@command("job-cancel")
async def job_cancel(jobs: Jobs, /, *, id: str) -> None:
    """End a job early. It fails, and says so when it is queried."""
    await jobs.find(id).user_cancel()


@command("job-complete")
async def job_complete(jobs: Jobs, /, *, id: str) -> None:
    """End a job that is ready."""
    jobs.find(id).user_complete()


@command("job-dismiss")
async def job_dismiss(jobs: Jobs, /, *, id: str) -> None:
    """Forget a job that has concluded."""
    await jobs.find(id).user_dismiss()


@command("job-finalize")
async def job_finalize(jobs: Jobs, /, *, id: str) -> None:
    """Let a pending job conclude."""
    await jobs.find(id).user_finalize()


@command("query-jobs")
async def query_jobs(jobs: Jobs, /) -> list[JobInfo]:
    """All jobs, the newest first."""
    return jobs.query()
