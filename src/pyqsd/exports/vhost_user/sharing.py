"""Memory that the front-end shares: mapped from its file descriptors, found again by either of its addresses."""

from __future__ import annotations

import fcntl
import mmap
import os
import stat

from pyqsd.exports.vhost_user.protocol import LOG_PAGE, MAX_SLOTS, MemoryRegion, ProtocolError
from pyqsd.exports.virtio.memory import BadAddress, GuestMemory, Region

_F_ADD_SEALS = 1033
_F_SEAL_SHRINK = 2


def map_shared(fd: int, length: int, offset: int) -> memoryview:
    """``[offset, offset + length)`` of the file `fd`, which stays open for whoever has it. The mapping goes with the
    last view of it. Raises ProtocolError."""
    try:
        info = os.fstat(fd)
        if not length or (stat.S_ISREG(info.st_mode) and offset + length > info.st_size):
            raise ProtocolError(f"{length} bytes at {offset} of a file of {info.st_size} cannot be shared memory")
        try:
            # Touching what somebody has cut off would end this process.
            fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK)
        except OSError:
            pass
        unit = max(mmap.ALLOCATIONGRANULARITY, info.st_blksize if info.st_blksize > 65536 else 0)
        start = offset // unit * unit
        end = min(-(-(offset + length) // unit) * unit, max(info.st_size, offset + length))
        mapped = mmap.mmap(fd, end - start, offset=start)
    except (OSError, ValueError, OverflowError) as exc:
        raise ProtocolError(f"cannot map {length} bytes at {offset}: {exc}") from exc
    return memoryview(mapped)[offset - start : offset - start + length]


class SharedMemory:
    """The regions that the front-end has told of."""

    def __init__(self) -> None:
        self._regions: list[tuple[MemoryRegion, memoryview]] = []
        self._log: memoryview | None = None
        self.logging = False

    def __len__(self) -> int:
        return len(self._regions)

    def replace(self, regions: list[MemoryRegion], fds: list[int]) -> None:
        """These are all regions from now on. Raises ProtocolError."""
        if len(regions) != len(fds):
            raise ProtocolError(f"{len(fds)} file descriptors for {len(regions)} memory regions")
        found: list[tuple[MemoryRegion, memoryview]] = []
        for region, fd in zip(regions, fds, strict=True):
            _check_new(region, found)
            found.append((region, map_shared(fd, region.size, region.offset)))
        self._regions = found

    def add(self, region: MemoryRegion, fd: int) -> None:
        """One more. Raises ProtocolError."""
        if len(self._regions) >= MAX_SLOTS:
            raise ProtocolError(f"more than {MAX_SLOTS} memory regions")
        _check_new(region, self._regions)
        self._regions = [*self._regions, (region, map_shared(fd, region.size, region.offset))]

    def remove(self, region: MemoryRegion) -> None:
        """One less. Raises ProtocolError."""
        for known in self._regions:
            if (known[0].guest, known[0].user, known[0].size) == (region.guest, region.user, region.size):
                self._regions = [other for other in self._regions if other is not known]
                return
        raise ProtocolError(f"no memory region of {region.size} bytes at 0x{region.guest:x} is known")

    def guest(self) -> GuestMemory:
        """The memory by the guest's addresses."""
        log = self.log if self.logging and self._log is not None else None
        return GuestMemory([Region(region.guest, view) for region, view in self._regions], log)

    def ring(self, user: int, length: int) -> memoryview:
        """A part of a ring, by the front-end's address. Raises ProtocolError."""
        memory = GuestMemory([Region(region.user, view) for region, view in self._regions])
        try:
            return memory.slice(user, length)
        except BadAddress as exc:
            raise ProtocolError(f"a ring at {exc}") from exc

    # --- logging what is written (migration) -------------------------------------------------------------------------

    def set_log(self, fd: int, size: int, offset: int) -> None:
        """Where to note which pages were written. Raises ProtocolError."""
        self._log = map_shared(fd, size, offset)

    def log(self, address: int, length: int) -> None:
        """``[address, address + length)`` was written. Others set and clear bits of the same bytes: whole bytes are
        written, because Python has no atomic "or", and a page too many is only copied once more."""
        log = self._log
        if log is None or not length:
            return
        first, last = address // LOG_PAGE >> 3, (address + length - 1) // LOG_PAGE >> 3
        for at in range(first, min(last + 1, len(log))):
            log[at] = 0xFF


def _check_new(region: MemoryRegion, known: list[tuple[MemoryRegion, memoryview]]) -> None:
    for other, _ in known:
        for start, begin in ((region.guest, other.guest), (region.user, other.user)):
            if start < begin + other.size and begin < start + region.size:
                raise ProtocolError(f"memory regions at 0x{start:x} and 0x{begin:x} overlap")
