"""Ranges of bytes that somebody works on, of which no two overlap."""

from __future__ import annotations

import asyncio


class RangeLocks:
    """Who works on a range takes it first. They are few at a time, so that it is enough to look at all of them."""

    def __init__(self) -> None:
        self._held: list[tuple[int, int]] = []
        #: In the order in which they came; a range is not given to anybody past one that waits for a part of it.
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._changed: list[asyncio.Future[None]] = []

    def end_of_taken(self, start: int, end: int) -> int:
        """Where the last of those ranges ends, taken or waited for, that have a part of ``[start, end)``; 0: there is
        none."""
        taken = (high for low, high in self._held if low < end and start < high)
        waiting = (high for low, high, _ in self._waiting if low < end and start < high)
        return max(*taken, *waiting, 0, 0)

    def start_of_taken(self, start: int, end: int) -> int:
        """Where the first of them begins; `end`: there is none."""
        taken = (low for low, high in self._held if low < end and start < high)
        waiting = (low for low, high, _ in self._waiting if low < end and start < high)
        return min(*taken, *waiting, end, end)

    def try_take(self, start: int, end: int) -> bool:
        """Take ``[start, end)`` if nobody has, or waits for, a part of it."""
        if self.end_of_taken(start, end):
            return False
        self._held.append((start, end))
        return True

    async def take(self, start: int, end: int) -> None:
        """Take ``[start, end)``, when it is free."""
        if self.try_take(start, end):
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((start, end, turn))
        try:
            await turn
        except BaseException:
            if turn.done() and not turn.cancelled():
                self.release(start, end)
            else:
                self._waiting.remove((start, end, turn))
                self._hand_out()
            raise

    def release(self, start: int, end: int) -> None:
        """Give back what was taken."""
        self._held.remove((start, end))
        self._hand_out()
        changed, self._changed = self._changed, []
        for waiter in changed:
            if not waiter.done():
                waiter.set_result(None)

    async def wait_release(self) -> None:
        """Until the next range is given back; if none is taken, for one turn of the loop."""
        if not self._held:
            await asyncio.sleep(0)
            return
        waiter = asyncio.get_running_loop().create_future()
        self._changed.append(waiter)
        await waiter

    def _hand_out(self) -> None:
        left: list[tuple[int, int, asyncio.Future[None]]] = []
        for start, end, turn in self._waiting:
            blocked = any(low < end and start < high for low, high in self._held)
            if blocked or any(low < end and start < high for low, high, _ in left):
                left.append((start, end, turn))
            else:
                self._held.append((start, end))
                turn.set_result(None)
        self._waiting = left
