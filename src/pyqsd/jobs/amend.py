"""The job that changes properties of an image (``x-blockdev-amend``)."""

from __future__ import annotations

import errno

from pyqsd.block import permissions as perms
from pyqsd.block.amend import BlockdevAmendOptions
from pyqsd.block.backend import BlockBackend
from pyqsd.block.graph import Graph
from pyqsd.block.node import Node
from pyqsd.jobs.job import Job, Jobs, JobType
from pyqsd.qapi.command import command
from pyqsd.qapi.errors import Error


class AmendJob(Job):
    """Changes the image of `node` as `options` say; `force`: also if that makes its content unreadable. Progress is
    0 of 1, then 1."""

    kind = JobType.AMEND

    def __init__(self, jobs: Jobs, id: str, node: Node, options: BlockdevAmendOptions, force: bool) -> None:
        super().__init__(jobs, id, auto_dismiss=False)
        self._node = node
        # Needs nothing of the node but that it stays.
        self._hold = BlockBackend(node.graph, f"job '{id}'", 0, perms.ALL)
        self._hold.insert(node)
        self._options = options
        self._force = force

    async def run(self) -> None:
        self.expect(1)
        try:
            await self._node.driver.amend(self._options, self._force)
        finally:
            self.advance(1)

    async def clean(self) -> None:
        self._hold.remove()


@command("x-blockdev-amend", features=("unstable",))
async def x_blockdev_amend(
    jobs: Jobs,
    graph: Graph,
    /,
    *,
    job_id: str,
    node_name: str,
    options: BlockdevAmendOptions,
    force: bool | None = None,
) -> None:
    """Change properties of an image, as a job."""
    node = graph.get(node_name)
    if node is None:
        raise Error(f"Cannot find device='' nor node-name='{node_name}'")
    if options.__struct_config__.tag != node.driver.name:
        raise Error("x-blockdev-amend doesn't support changing the block driver")
    if node.driver.amend_options() is None:
        raise Error("Driver does not support x-blockdev-amend", errno.ENOTSUP)
    AmendJob(jobs, job_id, node, options, bool(force)).start()
