"""Ranges that somebody works on, and waiting for that.

Offsets are bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Final

_INT64_MAX: Final = (1 << 63) - 1


class Piece:
    """``[start, end)``, until it is done."""

    __slots__ = ("done", "end", "start")

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end
        self.done: asyncio.Future[None] | None = None


class Pieces:
    """Those in progress."""

    __slots__ = ("_pieces",)

    def __init__(self) -> None:
        self._pieces: set[Piece] = set()

    def __len__(self) -> int:
        return len(self._pieces)

    def __iter__(self) -> Iterator[Piece]:
        return iter(self._pieces)

    def begin(self, start: int, end: int) -> Piece:
        """One more, until `finish`."""
        piece = Piece(start, end)
        self._pieces.add(piece)
        return piece

    def finish(self, piece: Piece) -> None:
        """It is done; those who wait for it go on."""
        self._pieces.discard(piece)
        if piece.done is not None and not piece.done.done():
            piece.done.set_result(None)

    def touching(self, start: int, end: int) -> Piece | None:
        """One that touches the range."""
        for piece in self._pieces:
            if piece.start < end and start < piece.end:
                return piece
        return None

    @staticmethod
    async def wait(piece: Piece) -> None:
        """Until `piece` is done, whatever comes of it."""
        if piece.done is None:
            piece.done = asyncio.get_running_loop().create_future()
        await asyncio.shield(piece.done)

    async def wait_for_all(self, start: int = 0, end: int = _INT64_MAX) -> None:
        """Until none touches the range."""
        while (piece := self.touching(start, end)) is not None:
            await self.wait(piece)
