"""What the cached pieces of metadata tables have in common: which of their entries are not on disk yet."""

from __future__ import annotations


class Cached:
    """A piece of a table in memory. `lo`, `hi`: the entries that are not on disk yet (`hi` 0: none); `busy`: being
    written; `used`: since the cache last looked for what can go."""

    __slots__ = ("busy", "hi", "lo", "used")

    def __init__(self) -> None:
        self.lo = 0
        self.hi = 0
        self.busy = False
        self.used = True

    def touched(self, lo: int, hi: int) -> None:
        """The entries ``[lo, hi)`` were changed."""
        if self.hi == 0:
            self.lo, self.hi = lo, hi
        else:
            if lo < self.lo:
                self.lo = lo
            if hi > self.hi:
                self.hi = hi
