"""Actions: changes that are prepared, and then committed or taken back, alone or as a group (``transaction``).

First every action of the group is prepared, in order. If that worked for all, all are committed, which cannot fail;
else those that were prepared are aborted, the last one first. In the end all are cleaned up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence


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
        for action in begun:
            await action.commit()
    finally:
        for action in begun:
            await action.clean()
