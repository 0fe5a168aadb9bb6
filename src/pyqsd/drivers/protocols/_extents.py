"""What is known about a file's holes: SEEK_DATA and SEEK_HOLE (lseek(2)), and a memory of their last answers."""

from __future__ import annotations

import errno
import os
import time
from bisect import bisect_right

#: ``(start, end, is_hole)`` in bytes.
Run = tuple[int, int, bool]

#: One look-up goes on for at most so many runs and so long (seconds): the next question usually is about what follows.
_MOST_RUNS = 256
_LONGEST = 0.002


def find(fd: int, start: int, end: int) -> list[Run]:
    """The runs from `start` on: at least one, and further ones while that is quick. The first one is only looked for in
    ``[start, end)``, but may be longer. Waits; raises OSError."""
    runs: list[Run] = []
    deadline = time.monotonic() + _LONGEST
    at = start
    while not runs or (len(runs) < _MOST_RUNS and time.monotonic() < deadline):
        run = _next(fd, at)
        if run is None:
            if not runs:
                # At or beyond the end of the file.
                runs.append((start, max(end, start + 1), True))
            break
        runs.append(run)
        at = run[1]
    return runs


def _next(fd: int, at: int) -> Run | None:
    try:
        data = os.lseek(fd, at, os.SEEK_DATA)
    except OSError as exc:
        if exc.errno != errno.ENXIO:
            raise
        size = os.lseek(fd, 0, os.SEEK_END)
        return (at, size, True) if size > at else None
    if data > at:
        return (at, data, True)
    try:
        hole = os.lseek(fd, at, os.SEEK_HOLE)
    except OSError as exc:
        if exc.errno != errno.ENXIO:
            raise
        # Truncated at this very moment.
        return None
    return (at, hole, False) if hole > at else None


class Extents:
    """The runs that were found last, until something changes. `generation` counts the changes, so that an answer which
    was being looked for meanwhile is not remembered."""

    __slots__ = ("generation", "runs", "starts")

    def __init__(self) -> None:
        self.generation = 0
        self.runs: list[Run] = []
        self.starts: list[int] = []

    def forget(self) -> None:
        """The file is being changed, or has been."""
        self.generation += 1
        if self.runs:
            self.runs = []
            self.starts = []

    def store(self, generation: int, runs: list[Run]) -> None:
        """Remember `runs`, which a look-up begun at `generation` found."""
        if generation == self.generation:
            self.runs = runs
            self.starts = [run[0] for run in runs]

    def lookup(self, offset: int) -> tuple[int, bool] | None:
        """``(end, is_hole)`` of the known run that `offset` is in, or None."""
        if not self.runs:
            return None
        at = bisect_right(self.starts, offset) - 1
        if at < 0:
            return None
        _, end, is_hole = self.runs[at]
        return (end, is_hole) if offset < end else None
