"""Which clusters of the image file hold metadata, so that no write hits them by mistake (option ``overlap-check``)."""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Iterable

from pyqsd.drivers.formats.qcow2.options import OVERLAP_NAMES

_KINDS = tuple(OVERLAP_NAMES)
#: So many clusters are added one by one.
_FEW = 64
_INDEX = {name: index for index, name in enumerate(_KINDS)}


class MetadataMap:
    """The host clusters with metadata of the kinds that are checked.

    A sorted array of ``cluster << 4 | kind``: eight bytes a cluster, also for an image that claims millions of tables.
    L1 tables of snapshots, of which a hostile image has as many as it likes, are runs that do not overlap.
    """

    __slots__ = ("_checked", "_inactive_ends", "_inactive_starts", "items")

    def __init__(self, checked: frozenset[str]) -> None:
        self._checked = frozenset(_INDEX[name] for name in checked)
        self.items = array("Q")
        self._inactive_starts = array("Q")
        self._inactive_ends = array("Q")

    def add(self, kind: str, cluster: int, count: int = 1) -> None:
        """`count` clusters from `cluster` on hold metadata of this kind."""
        code = _INDEX[kind]
        if count > _FEW:
            self.add_many(kind, range(cluster, cluster + count))
        elif code in self._checked:
            for index in range(cluster, cluster + count):
                insort(self.items, index << 4 | code)

    def add_many(self, kind: str, clusters: Iterable[int]) -> None:
        """The same for many single clusters at once."""
        code = _INDEX[kind]
        if code in self._checked:
            self.items.extend(cluster << 4 | code for cluster in clusters)
            self.items = array("Q", sorted(self.items))

    def set_inactive_l1(self, runs: Iterable[tuple[int, int]]) -> None:
        """Where the L1 tables of snapshots are: (first cluster, count)."""
        starts, ends = array("Q"), array("Q")
        if _INDEX["inactive_l1"] in self._checked:
            for first, count in sorted(runs):
                if ends and first <= ends[-1]:
                    ends[-1] = max(ends[-1], first + count)
                elif count:
                    starts.append(first)
                    ends.append(first + count)
        self._inactive_starts, self._inactive_ends = starts, ends

    def remove(self, kind: str, cluster: int, count: int = 1) -> None:
        """They do not any more."""
        code = _INDEX[kind]
        for index in range(cluster, cluster + count):
            at = bisect_left(self.items, index << 4 | code)
            if at < len(self.items) and self.items[at] == index << 4 | code:
                del self.items[at]

    def hit(self, cluster: int, count: int) -> str | None:
        """What a write to these clusters would overwrite (as messages call it), or None."""
        items = self.items
        at = bisect_left(items, cluster << 4)
        if at < len(items) and items[at] < (cluster + count) << 4:
            return OVERLAP_NAMES[_KINDS[items[at] & 15]]
        if self._inactive_starts:
            run = bisect_left(self._inactive_starts, cluster + count) - 1
            if run >= 0 and self._inactive_ends[run] > cluster:
                return OVERLAP_NAMES["inactive_l1"]
        return None
