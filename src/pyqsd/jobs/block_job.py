"""Block jobs: what those jobs share that work on nodes of the graph.

A block job holds its nodes with edges of its own ("main node", "target" …): nobody can take them away, commands that
would come in its way are refused, and a drain of any of them makes the job stand still. It has a speed limit, a policy
for errors, and events besides those of every job (QAPI ``BLOCK_JOB_*``).
"""

from __future__ import annotations

import asyncio
import errno
import time
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Final

from pyqsd.block import op_blockers
from pyqsd.block.backend import BlockBackend
from pyqsd.block.block_copy import Workers
from pyqsd.block.events import BlockErrorAction, IoOperationType
from pyqsd.block.info import BlockDeviceIoStatus
from pyqsd.jobs.job import Job, JobGroup, Jobs, JobStatus, JobType, JobVerb
from pyqsd.qapi.command import Event, event
from pyqsd.qapi.errors import Error

if TYPE_CHECKING:
    from pyqsd.block.graph import Graph
    from pyqsd.block.node import Node

#: A job that was slow may catch up with its speed limit for so long, seconds.
_SLICE: Final = 0.1


class BlockdevOnError(StrEnum):
    """What to do about a failed request."""

    REPORT = "report"
    IGNORE = "ignore"
    ENOSPC = "enospc"
    STOP = "stop"
    AUTO = "auto"


@event("BLOCK_JOB_COMPLETED")
class BlockJobCompleted(Event, kw_only=True):
    """A job has ended, with `error` if it failed. `len`, `offset`: its progress; `speed`: bytes per second."""

    type: JobType
    device: str
    len: int
    offset: int
    speed: int
    error: str | None = None


@event("BLOCK_JOB_CANCELLED")
class BlockJobCancelled(Event, kw_only=True):
    """A job was cancelled."""

    type: JobType
    device: str
    len: int
    offset: int
    speed: int


@event("BLOCK_JOB_ERROR")
class BlockJobError(Event, kw_only=True):
    """A request of a job failed."""

    device: str
    operation: IoOperationType
    action: BlockErrorAction


@event("BLOCK_JOB_READY")
class BlockJobReady(Event, kw_only=True):
    """A job could end now."""

    type: JobType
    device: str
    len: int
    offset: int
    speed: int


@event("BLOCK_JOB_PENDING")
class BlockJobPending(Event, kw_only=True):
    """A job waits for ``job-finalize``."""

    type: JobType
    id: str


class JobNode(BlockBackend):
    """How a job holds a node. Requests do not go through it (`BlockJob.open_backend`)."""

    def __init__(self, job: BlockJob, name: str, perm: int, shared: int) -> None:
        super().__init__(job.graph, f"{job.kind} job '{job.id}'", perm, shared)
        self.owner = self._job = job
        self.edge_name = name

    def quiesce(self) -> None:
        super().quiesce()
        self._job.pause()

    def resume(self) -> None:
        if self.quiesced:
            self._job.resume()
        super().resume()

    def remove(self) -> None:
        while self.quiesced:
            self.resume()
        super().remove()

    async def wait_idle(self) -> None:
        await self._job.wait_still()


class BlockJob(Job):
    """A job on `node`.

    Arguments:
        node: it becomes the "main node", with the permissions `perm` and `shared`.
        speed: bytes per second, 0: as fast as possible.

    Raises Error, and then there is no such job.

    `run` and drains: between two pause points of `run` no drain of its nodes comes to its end; at a pause point
    nothing of the job may be in flight. If it has `workers`, a pause waits for these, so that their pieces must not
    call a pause point themselves. `run` itself may drain its nodes (it is not waited for then), if it does not call a
    pause point meanwhile.
    """

    #: The operations that others may still do with the nodes of the job.
    allowed_ops: ClassVar[frozenset[op_blockers.Op]] = frozenset()

    def __init__(
        self,
        jobs: Jobs,
        id: str | None,
        graph: Graph,
        node: Node,
        perm: int,
        shared: int,
        *,
        speed: int = 0,
        auto_finalize: bool = True,
        auto_dismiss: bool = True,
        group: JobGroup | None = None,
    ) -> None:
        super().__init__(jobs, id, auto_finalize=auto_finalize, auto_dismiss=auto_dismiss, group=group)
        self.graph = graph
        graph.block_jobs.append(self)
        self.speed = 0
        self.io_status = BlockDeviceIoStatus.OK
        self.workers: Workers | None = None
        self._nodes: list[tuple[JobNode, op_blockers.Blocker]] = []
        self._backends: list[BlockBackend] = []
        self._due = 0.0
        self._yielded = 0.0
        try:
            self.add_node("main node", node, perm, shared)
            if speed:
                self.set_speed(speed)
        except BaseException:
            self.give_up()
            raise

    # --- its nodes ---------------------------------------------------------------------------------------------------

    def add_node(self, name: str, node: Node, perm: int, shared: int) -> None:
        """Hold `node` until the end. Raises Error if a permission is not to be had."""
        edge = JobNode(self, name, perm, shared)
        edge.insert(node)
        blocker = op_blockers.Blocker(f"block device is in use by block job: {self.kind}", self.allowed_ops)
        node.op_blockers.append(blocker)
        self._nodes.append((edge, blocker))

    def remove_node(self, node: Node) -> None:
        """Let go of `node` alone."""
        for entry in [entry for entry in self._nodes if entry[0].node is node]:
            edge, blocker = entry
            node.op_blockers.remove(blocker)
            edge.remove()
            self._nodes.remove(entry)

    def remove_nodes(self) -> None:
        """Let go of all nodes, in good time before the graph is changed around them."""
        for edge, blocker in reversed(self._nodes):
            node = edge.node
            node.op_blockers.remove(blocker)
            edge.remove()
        self._nodes.clear()

    def open_backend(self, node: Node, perm: int, shared: int) -> BlockBackend:
        """What the job does its requests to `node` through; closed at the end (`clean`) or with `close_backend`. Raises
        Error if a permission is not to be had."""
        backend = BlockBackend(self.graph, "an unnamed block device", perm, shared)
        backend.held_back = False
        backend.insert(node)
        self._backends.append(backend)
        return backend

    def close_backend(self, backend: BlockBackend) -> None:
        """Stop using what `open_backend` returned; nothing may be in flight there."""
        self._backends.remove(backend)
        backend.remove()

    @staticmethod
    async def grow(backend: BlockBackend, length: int) -> None:
        """Make the node of `backend` as long as `length`, in bytes. Raises OSError: a job tells only the number of an
        error."""
        try:
            await backend.truncate(length)
        except Error as exc:
            raise OSError(exc.errno or errno.EIO, exc.desc) from exc

    async def clean(self) -> None:
        for backend in reversed(tuple(self._backends)):
            self.close_backend(backend)
        await self.release_nodes()

    async def release_nodes(self) -> None:
        """Let go of all nodes; those that nobody else uses are closed."""
        nodes = [edge.node for edge, _ in self._nodes]
        self.remove_nodes()
        for node in nodes:
            await self.graph.unref(node)

    def give_up(self) -> None:
        for backend in reversed(tuple(self._backends)):
            self.close_backend(backend)
        self.remove_nodes()
        super().give_up()

    def _remove(self) -> None:
        super()._remove()
        self.graph.block_jobs.remove(self)

    # --- what `run` uses ---------------------------------------------------------------------------------------------

    async def throttle(self, done: int) -> None:
        """`done` more bytes were worked on: wait as the speed limit demands. It is a pause point, and lets others have
        their turn now and then."""
        now = time.monotonic()
        if now - self._yielded > 0.0002:
            await asyncio.sleep(0)
            self._yielded = now = time.monotonic()
        if self.speed and done:
            self._due = max(self._due, now - _SLICE) + done / self.speed
        while self.speed and (rest := self._due - time.monotonic()) > 0:
            await self.sleep(rest)
        await self.pause_point()

    async def pausing(self) -> None:
        if self.workers is not None:
            await self.workers.idle()

    def error_action(self, policy: BlockdevOnError, reading: bool, number: int) -> BlockErrorAction:
        """A request failed with the errno `number`: tell so, and what is to be done as `policy` says. `STOP`: the job
        stands still from its next pause point on, until the user lets it go on, and then tries again."""
        if policy in (BlockdevOnError.ENOSPC, BlockdevOnError.AUTO):
            action = BlockErrorAction.STOP if number == errno.ENOSPC else BlockErrorAction.REPORT
        else:
            action = BlockErrorAction(policy.value)
        if self.id is not None:
            operation = IoOperationType.READ if reading else IoOperationType.WRITE
            self.jobs.events.emit(BlockJobError(device=self.id, operation=operation, action=action))
        if action is BlockErrorAction.STOP:
            if not self.user_paused:
                self.user_paused = True
                self.pause()
            if self.io_status is BlockDeviceIoStatus.OK:
                nospace = number == errno.ENOSPC
                self.io_status = BlockDeviceIoStatus.NOSPACE if nospace else BlockDeviceIoStatus.FAILED
        return action

    # --- what is asked of it -----------------------------------------------------------------------------------------

    def set_speed(self, speed: int) -> None:
        """Limit it to so many bytes per second, 0: no limit. Raises Error."""
        self.check_verb(JobVerb.SET_SPEED)
        if speed < 0:
            raise Error("Parameter 'speed' expects a non-negative value")
        slower = speed and speed <= self.speed
        self.speed = speed
        if not slower:
            # What it has to wait for by the old limit is forgotten.
            self._due = 0.0
            self._changed.set()

    def change(self, options: Any) -> None:
        """``block-job-change``, with `pyqsd.jobs.block_job_commands.BlockJobChangeOptions`. Raises Error."""
        raise Error("Job type does not support change")

    def more_info(self) -> dict[str, Any]:
        """The members of ``query-block-jobs`` that only jobs of this type have."""
        return {}

    @property
    def busy(self) -> bool:
        """Whether it does something at this moment."""
        return self._in_run and not self.resting

    def user_resumed(self) -> None:
        self.io_status = BlockDeviceIoStatus.OK

    # --- events ------------------------------------------------------------------------------------------------------

    def reached(self, status: JobStatus) -> None:
        if self.id is None:
            return
        if status is JobStatus.PENDING:
            self.jobs.events.emit(BlockJobPending(type=self.kind, id=self.id))
        else:
            self.jobs.events.emit(
                BlockJobReady(
                    type=self.kind,
                    device=self.id,
                    len=self.progress_total,
                    offset=self.progress_current,
                    speed=self.speed,
                )
            )

    def finished(self) -> None:
        if self.id is None:
            return
        if self.cancelled:
            self.jobs.events.emit(
                BlockJobCancelled(
                    type=self.kind,
                    device=self.id,
                    len=self.progress_total,
                    offset=self.progress_current,
                    speed=self.speed,
                )
            )
        else:
            self.jobs.events.emit(
                BlockJobCompleted(
                    type=self.kind,
                    device=self.id,
                    len=self.progress_total,
                    offset=self.progress_current,
                    speed=self.speed,
                    error=None if self.error is None else self.error.desc,
                )
            )
