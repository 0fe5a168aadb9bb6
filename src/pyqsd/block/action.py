"""Actions: changes that are prepared, and then committed or taken back, alone or as a group (``transaction``).

First every action of the group is prepared, in order. If that worked for all, all are committed, which cannot fail;
else those that were prepared are aborted. In the end all are cleaned up. These steps begin with the last action, also
the commits: that is the order in which QSD starts the jobs of a transaction.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from pyqsd.qapi.types import Struct

if TYPE_CHECKING:
    from pyqsd.block.graph import Graph


class Action:
    """One of them. An action holds what it needs (drained parts of the graph, new nodes) until `clean`."""

    async def prepare(self) -> None:
        """Do all that can fail, so that it can be taken back. Raises Error; `clean` is called then, `abort` is not."""
        raise NotImplementedError

    async def commit(self) -> None:
        """Make it final. Cannot fail."""

    async def abort(self) -> None:
        """Take back what `prepare` did. Cannot fail."""

    async def clean(self) -> None:
        """Let go of everything, whatever came of it. Cannot fail."""


class Transaction:
    """What the actions of one ``transaction`` share. All nodes are drained from before the first is prepared until the
    last is cleaned up: what the actions do is done at one point in time."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph


class TransactionAction(Struct, tag_field="type", tag="pyqsd-base"):
    """An action as ``transaction`` is told of it. Each type of them is a branch, beside its command::

    class BlockDirtyBitmapAddWrapper(TransactionAction, tag="block-dirty-bitmap-add"):
        data: BlockDirtyBitmapAdd

        def action(self, transaction: Transaction) -> Action:
            return AddBitmapAction(transaction.graph, self.data)
    """

    __tag_features__: ClassVar[Mapping[str, tuple[str, ...]]] = {"drive-backup": ("deprecated",)}

    #: Whether it can be an action of a transaction with ``completion-mode`` ``grouped``: it starts a job.
    GROUPED: ClassVar[bool] = False

    def action(self, transaction: Transaction) -> Action:
        """What is to be done."""
        raise NotImplementedError


async def run(*actions: Action) -> None:
    """Do all of `actions`, or none. Raises Error. Not even a cancellation keeps them from their end."""
    task = asyncio.get_running_loop().create_task(_run(actions))
    try:
        await asyncio.shield(task)
    finally:
        if not task.done():
            await asyncio.wait([task])


async def _run(actions: Sequence[Action]) -> None:
    begun: list[Action] = []
    try:
        try:
            for action in actions:
                begun.append(action)
                await action.prepare()
        except BaseException:
            for action in reversed(begun[:-1]):
                await action.abort()
            raise
        for action in reversed(begun):
            await action.commit()
    finally:
        for action in reversed(begun):
            await action.clean()
