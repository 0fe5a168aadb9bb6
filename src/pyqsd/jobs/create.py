"""The job that makes an image (``blockdev-create``)."""

from __future__ import annotations

import errno

from pyqsd.block import registry
from pyqsd.block.create import BlockdevCreateOptions
from pyqsd.block.graph import Graph
from pyqsd.jobs.job import Job, Jobs, JobType
from pyqsd.qapi.command import command
from pyqsd.qapi.errors import Error

#: How long the command waits for a file to be there, seconds.
_SOON = 0.2


class CreateJob(Job):
    """Makes an image of the driver that `options` name. Progress is 0 of 1, then 1."""

    kind = JobType.CREATE
    # A half-made image is no image, so there is no better moment to give up than now.
    interruptible = True

    def __init__(self, jobs: Jobs, id: str, graph: Graph, options: BlockdevCreateOptions) -> None:
        super().__init__(jobs, id, auto_dismiss=False)
        self._graph = graph
        self._options = options

    async def run(self) -> None:
        self.expect(1)
        driver = registry.driver_class(str(self._options.__struct_config__.tag))
        try:
            await driver.create(self._graph, self._options)
        finally:
            self.advance(1)


@command("blockdev-create")
async def blockdev_create(jobs: Jobs, graph: Graph, /, *, job_id: str, options: BlockdevCreateOptions) -> None:
    """Make an image, as a job."""
    driver = registry.driver_class(str(options.__struct_config__.tag))
    if driver.create_options() is None:
        raise Error("Driver does not support blockdev-create", errno.ENOTSUP)
    job = CreateJob(jobs, job_id, graph, options)
    job.start()
    if driver.is_protocol:
        # In QSD a file is there when the command returns (if it is not preallocated), and the next one may open it.
        await job.wait(_SOON)
