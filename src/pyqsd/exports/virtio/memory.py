"""The memory of a guest: regions of its address space, as they are mapped here.

All addresses come from somebody else: nothing is touched before its range was found to lie inside the regions.
"""

from __future__ import annotations

from collections.abc import Callable


class BadAddress(Exception):
    """A range that is not in the guest's memory."""

    def __init__(self, address: int, length: int) -> None:
        super().__init__(f"0x{address:x} (length {length}) is not in the guest's memory")


class Region:
    """``[start, start + size)`` of the address space; `view` is its content."""

    __slots__ = ("size", "start", "view")

    def __init__(self, start: int, view: memoryview) -> None:
        self.start = start
        self.size = len(view)
        self.view = view


class GuestMemory:
    """Regions that do not overlap. `log`, if there is one, is called with the address and the length of whatever was
    written."""

    __slots__ = ("_last", "_regions", "log")

    def __init__(self, regions: list[Region], log: Callable[[int, int], None] | None = None) -> None:
        self._regions = sorted(regions, key=lambda region: region.start)
        self._last = self._regions[0] if self._regions else Region(0, memoryview(b""))
        self.log = log

    def slice(self, address: int, length: int) -> memoryview:
        """A range that lies in one region. Raises BadAddress."""
        region = self._last
        offset = address - region.start
        if 0 <= offset <= region.size - length and length >= 0:
            return region.view[offset : offset + length]
        for region in self._regions:
            offset = address - region.start
            if 0 <= offset <= region.size - length and length >= 0:
                self._last = region
                return region.view[offset : offset + length]
        raise BadAddress(address, length)

    def three(self, a0: int, n0: int, a1: int, n1: int, a2: int, n2: int) -> tuple[memoryview, memoryview, memoryview]:
        """Three ranges, by address and length, the same as `slice` of each: the parts of the usual request, mostly in
        the same region."""
        region = self._last
        start, size, view = region.start, region.size, region.view
        o0, o1, o2 = a0 - start, a1 - start, a2 - start
        if 0 <= o0 <= size - n0 and 0 <= o1 <= size - n1 and 0 <= o2 <= size - n2:
            return view[o0 : o0 + n0], view[o1 : o1 + n1], view[o2 : o2 + n2]
        return self.slice(a0, n0), self.slice(a1, n1), self.slice(a2, n2)

    def slices(self, address: int, length: int) -> list[memoryview]:
        """A range that may go on from one region to the next. Raises BadAddress."""
        try:
            return [self.slice(address, length)]
        except BadAddress:
            pass
        found: list[memoryview] = []
        at, left = address, length
        for region in self._regions:
            offset = at - region.start
            if 0 <= offset < region.size and left:
                n = min(left, region.size - offset)
                found.append(region.view[offset : offset + n])
                at += n
                left -= n
        if left:
            raise BadAddress(address, length)
        return found
