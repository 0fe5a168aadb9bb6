"""``transaction``: several actions, all or none of them, at one point in time.

All nodes are drained from before the first action is prepared until the last is cleaned up, so that no write can come
between two actions. (An action must not send requests through a `BlockBackend` of a node that was there before: they
would wait for the end of the drain. Through the node itself it can.)

**Another type of action** is a branch of `pyqsd.block.action.TransactionAction`, beside its command, in whichever room
that is. One that starts a job looks like this, and works with ``completion-mode: grouped``::

    class BlockdevBackupWrapper(TransactionAction, tag="blockdev-backup"):
        GROUPED = True
        data: BlockdevBackup

        def action(self, transaction: Transaction) -> Action:
            return BackupAction(job_transaction(transaction), self.data)

    class BackupAction(Action):
        async def prepare(self) -> None:
            # All that can fail: nodes, permissions, the filter; the point in time is now.
            self._job = BackupJob(self._transaction.jobs, …, group=self._transaction.group)

        async def commit(self) -> None:
            self._job.start()

        async def abort(self) -> None:
            # Ends a job that has not begun (created, aborting, concluded, null), and so takes back what it has done.
            self._job.cancel()
            await self._job.wait()

`JobTransaction.group` is None where every job is on its own. The plain command runs the same action alone, with a
`JobTransaction` without a group.
"""

from __future__ import annotations

import asyncio
from enum import StrEnum

from pyqsd.block import action
from pyqsd.block.action import Action, Transaction, TransactionAction
from pyqsd.block.graph import Graph
from pyqsd.jobs.job import JobGroup, Jobs
from pyqsd.qapi.command import command
from pyqsd.qapi.errors import Error
from pyqsd.qapi.types import Struct


class ActionCompletionMode(StrEnum):
    """Whether each job of a transaction ends as it may, or all of them well or none."""

    INDIVIDUAL = "individual"
    GROUPED = "grouped"


class TransactionProperties(Struct, kw_only=True):
    """What holds for all actions."""

    completion_mode: ActionCompletionMode = ActionCompletionMode.INDIVIDUAL


class Abort(Struct):
    """It has no parameters."""


class AbortWrapper(TransactionAction, tag="abort"):
    """Fails, so that the other actions are taken back: for tests."""

    data: Abort

    def action(self, transaction: Transaction) -> Action:
        return _AbortAction()


class _AbortAction(Action):
    async def prepare(self) -> None:
        raise Error("Transaction aborted using Abort action")


class JobTransaction(Transaction):
    """What actions that start jobs have in common; `group` is the one of their jobs, if these end together."""

    def __init__(self, graph: Graph, jobs: Jobs, group: JobGroup | None = None) -> None:
        super().__init__(graph)
        self.jobs = jobs
        self.group = group


def job_transaction(transaction: Transaction) -> JobTransaction:
    """The transaction as actions that start jobs know it: every one that `transaction` makes is one of these."""
    assert isinstance(transaction, JobTransaction)
    return transaction


@command("transaction")
async def transaction(
    graph: Graph,
    jobs: Jobs,
    /,
    *,
    actions: list[TransactionAction],
    properties: TransactionProperties | None = None,
) -> None:
    """Do all of the actions, or none."""
    grouped = properties is not None and properties.completion_mode is ActionCompletionMode.GROUPED
    if grouped:
        for one in actions:
            if not one.GROUPED:
                kind = one.__struct_config__.tag
                raise Error(f"Action '{kind}' does not support transaction property completion-mode = grouped")
    shared = JobTransaction(graph, jobs, JobGroup() if grouped else None)
    async with graph.drained(*graph.nodes.values()):
        await action.run(*(one.action(shared) for one in actions))
    # Jobs go on, and say so, before the command returns.
    await asyncio.sleep(0)
