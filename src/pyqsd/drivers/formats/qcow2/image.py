"""The state of an open qcow2 image that its parts share."""

from __future__ import annotations

import asyncio
import errno
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from pyqsd.block.events import BlockImageCorrupted
from pyqsd.drivers.formats.qcow2 import header as headers
from pyqsd.drivers.formats.qcow2.overlap import MetadataMap
from pyqsd.drivers.formats.qcow2.snapshots import Surplus
from pyqsd.drivers.formats.qcow2.tables import COMPRESSED, COPIED, OFFSET_MASK, ZERO
from pyqsd.qapi.errors import Error

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from pyqsd.block.node import Node
    from pyqsd.drivers.formats.qcow2.bitmap_format import StoredBitmap
    from pyqsd.drivers.formats.qcow2.header import Header
    from pyqsd.drivers.formats.qcow2.options import Settings
    from pyqsd.drivers.formats.qcow2.refcounts import Refcounts
    from pyqsd.drivers.formats.qcow2.snapshots import Snapshot
    from pyqsd.drivers.formats.qcow2.tables import L2Tables, Slice
    from pyqsd.drivers.formats.qcow2.writeback import WriteBack


#: How far the image file is extended at a time, bytes.
_RESERVE_LEAST = 1 << 20
_RESERVE_MOST = 64 << 20


class Image:
    """What the parts of the driver share. `file` is the node with the image file, and `data` the one with the guest's
    data: every access to ordinary clusters goes there; all metadata and compressed clusters are in `file`. Sizes and
    offsets are bytes."""

    l2: L2Tables
    refcounts: Refcounts
    writeback: WriteBack

    def __init__(
        self, node: Node, file: Node, header: Header, settings: Settings, data_file: Node | None = None
    ) -> None:
        self.node = node
        self.file = file
        self.data = file if data_file is None else data_file
        #: The guest's data is in an external data file, each cluster at its guest offset and without a refcount.
        self.external = data_file is not None
        #: The data file must be a raw image of the disk by itself.
        self.raw_data = self.external and bool(header.autoclear & headers.AUTOCLEAR_RAW_DATA)
        #: The bits of an L2 entry one of which is set where it has a cluster. Offset 0 is one in a data file.
        self.place_mask = OFFSET_MASK | (COPIED if self.external else 0)
        self.header = header
        self.settings = settings
        #: Ordinary clusters are encrypted (see `encryption`).
        self.encrypted = header.crypt_method != headers.CRYPT_NONE
        self.cluster_bits = header.cluster_bits
        self.cluster_size = header.cluster_size
        self.cluster_mask = header.cluster_size - 1
        #: Allocation is decided in units of this size: subclusters, or whole clusters.
        self.extended = bool(header.incompatible & headers.INCOMPAT_EXTENDED_L2)
        self.unit_bits = header.cluster_bits - (5 if self.extended else 0)
        self.unit_size = 1 << self.unit_bits
        self.meta = MetadataMap(settings.overlap)
        self.snapshots: list[Snapshot] = []
        #: What was left out of `snapshots`, as it is too much.
        self.surplus = Surplus()
        #: The bitmap directory, as it is on disk.
        self.bitmaps: list[StoredBitmap] = []
        #: Written since the last flush of `file`: something that must be durable before L2 entries that rely on it.
        self.barrier = False
        #: References to clusters that were dropped in memory: (first cluster, count, kind of discard).
        self.frees: list[tuple[int, int, str]] = []
        self.freed_clusters = 0
        self.refcount_lock = asyncio.Lock()
        #: Held by whoever writes to the header on disk; taken after all other locks.
        self.header_lock = asyncio.Lock()
        #: Held by whatever changes the image as a whole (snapshots, bitmaps).
        self.operation_lock = asyncio.Lock()
        #: The image must not be used any more.
        self.broken = False
        self._signalled = False
        self._marking: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        #: The driver's shortcuts: called when a slice leaves the cache, and when the image must not be used any more.
        self.forget_slice: Callable[[Slice], None] = lambda found: None
        self.forget_all: Callable[[], None] = lambda: None
        #: Nothing was ever written to the file beyond this offset, so it reads as zeroes there.
        self.touched_end = 0
        #: The length that the image file must keep, whatever else is cut off its end.
        self.kept_length = file.length
        #: The file was made longer than it has content, so that writes to new clusters do not extend it one by one.
        self.reserved = False
        self._can_reserve = True
        self._reserving = asyncio.Lock()

    def use_file(self, file: Node) -> None:
        """`file` is the node with the image file now. It has the same content, but perhaps another end."""
        if self.data is self.file:
            self.data = file
        self.file = file
        self.touched_end = max(self.touched_end, file.length)
        self.kept_length = max(self.kept_length, file.length)
        self._can_reserve = True

    def event(self, name: str) -> None:
        """Something that QEMU has a ``BlkdebugEvent`` for is about to happen; a ``blkdebug`` below may want to know."""
        if self.file.debug_event is not None:
            self.file.debug_event(name)

    @property
    def backing(self) -> Node | None:
        """The backing file, whichever it is now."""
        child = self.node.driver.backing
        return child.node if child is not None else None

    @property
    def meta(self) -> MetadataMap:
        """Where the metadata is in the image file."""
        return self._meta

    @meta.setter
    def meta(self, meta: MetadataMap) -> None:
        self._meta = meta
        #: The same for `data`: there is none in a data file.
        self.data_meta = MetadataMap(frozenset()) if self.external else meta

    def has_place(self, entry: int) -> bool:
        """Whether an L2 entry that is not compressed has a cluster, be it for data or behind zeroes."""
        if entry & OFFSET_MASK:
            return True
        return self.external and bool(entry & COPIED) and (self.extended or not entry & ZERO)

    # --- corruption --------------------------------------------------------------------------------------------------

    def corrupt(self, message: str, offset: int | None = None, size: int | None = None, fatal: bool = True) -> OSError:
        """Tell everybody that the image is corrupt, and mark it so if it is writable. Returns the error to raise."""
        fatal = fatal and not self.node.read_only and self.node.active
        if not self._signalled or (fatal and not self.header.incompatible & headers.INCOMPAT_CORRUPT):
            self._signalled = True
            if fatal:
                text = f"qcow2: Marking image as corrupt: {message}; further corruption events will be suppressed"
            else:
                text = f"qcow2: Image is corrupt: {message}; further non-fatal corruption events will be suppressed"
            print(text, file=sys.stderr)
            name = self.node.name
            self.node.graph.events.emit(
                BlockImageCorrupted(
                    device="", node_name=name or None, msg=message, offset=offset, size=size, fatal=fatal
                )
            )
            if fatal:
                self.broken = True
                self.forget_all()
                if self.header.version >= 3:
                    self.header.incompatible |= headers.INCOMPAT_CORRUPT
                    self._marking = asyncio.get_running_loop().create_task(self._mark())
        return OSError(errno.EIO, message)

    def bad_entry(self, found: Slice, index: int, message: str, host: int = 0) -> OSError:
        """An L2 entry is invalid: the same as `corrupt`, saying which."""
        l2 = self.l2
        table = l2.l1[found.key >> l2.key_bits] & 0x00FFFFFFFFFFFE00
        number = (found.key & ((1 << l2.key_bits) - 1)) * l2.slice_entries + index
        text = message.format(host=host)
        return self.corrupt(f"{text} (L2 offset: {headers.hexed(table)}, L2 index: {headers.hexed(number)})")

    async def _mark(self) -> None:
        try:
            async with self.header_lock:
                at, data = headers.feature_fields(self.header)
                await self.file.pwrite(at, data)
                await self.file.flush()
        except OSError as exc:
            print(f"qcow2: Could not mark the image as corrupt: {exc.strerror}", file=sys.stderr)

    async def marked(self) -> None:
        """Wait until the mark is on disk."""
        if self._marking is not None:
            await self._marking

    def check_external(self, found: Slice, index: int, entry: int) -> None:
        """Refuse an L2 entry that cannot be in an image with a data file. Raises OSError."""
        if entry & COMPRESSED:
            raise self.bad_entry(found, index, "Compressed cluster entry found in image with external data file")
        guest = ((found.key << self.l2.slice_bits) + index) << self.cluster_bits
        host = entry & OFFSET_MASK
        if host != guest and self.has_place(entry) and not host & self.cluster_mask:
            number = (found.key & ((1 << self.l2.key_bits) - 1)) * self.l2.slice_entries + index
            # QSD's words, with the parenthesis that it does not open.
            raise self.corrupt(
                f"External data file host cluster offset {headers.hexed(host)} does not match guest cluster offset: "
                f"{headers.hexed(guest)}, L2 index: {headers.hexed(number)})"
            )

    def check_usable(self) -> None:
        """Raises OSError when the image must not be used any more."""
        if self.broken:
            raise OSError(errno.ENOMEDIUM, "The image is corrupt")

    def check_overlap(self, cluster: int, count: int) -> None:
        """Refuse a write to `count` clusters of the image file that would hit metadata. Raises OSError."""
        self._check_hit(self.meta.hit(cluster, count), cluster, count)

    def check_data_overlap(self, cluster: int, count: int) -> None:
        """The same for the guest's data."""
        self._check_hit(self.data_meta.hit(cluster, count), cluster, count)

    def _check_hit(self, hit: str | None, cluster: int, count: int) -> None:
        if hit is not None:
            raise self.corrupt(
                f"Preventing invalid write on metadata (overlaps with {hit})",
                cluster << self.cluster_bits,
                count << self.cluster_bits,
            )

    # --- freeing -----------------------------------------------------------------------------------------------------

    def free_later(self, first: int, count: int, kind: str) -> None:
        """A reference to each of these clusters was dropped in memory: once that is on disk, their counts go down.
        `kind`: which ``pass-discard-…`` option decides whether the space is given back (request, snapshot, other), or
        never."""
        if self.frees and self.frees[-1][0] + self.frees[-1][1] == first and self.frees[-1][2] == kind:
            last = self.frees[-1]
            self.frees[-1] = (last[0], last[1] + count, kind)
        else:
            self.frees.append((first, count, kind))
        self.freed_clusters += count

    # --- the end of the image file -----------------------------------------------------------------------------------

    async def reserve(self, end: int) -> None:
        """Make the image file reach to `end` and some way beyond, with a hole: writes inside of a file are faster than
        those that extend it. Where that does not work, nothing happens."""
        if not self._can_reserve or self.file.driver.grows_ahead:
            return
        async with self._reserving:
            if end <= self.file.length:
                return
            step = min(max(end >> 3, _RESERVE_LEAST, self.cluster_size), _RESERVE_MOST)
            try:
                await self.file.truncate((end + step) & ~self.cluster_mask)
            except (OSError, Error):
                self._can_reserve = False
                return
            self.reserved = True

    async def cut_tail(self) -> None:
        """Make the image file end with the last cluster that is in use, if nothing is in flight. That may fail without
        harm."""
        bits, refcounts = self.cluster_bits, self.refcounts
        last = ((self.file.length + self.cluster_mask) >> bits) - 1
        try:
            while last > 0:
                index = last >> refcounts.block_bits
                base = index << refcounts.block_bits
                block = await refcounts.load(index)
                if block is None:
                    last = base - 1
                    continue
                while last >= base and not block.counts.get(last - base):
                    last -= 1
                if last >= base:
                    break
            end = max((last + 1) << bits, self.kept_length)
            if end < self.file.length:
                await self.file.truncate(end)
                self.touched_end = min(self.touched_end, end)
        except (OSError, Error):
            return
        self.reserved = False

    async def write_back(self) -> None:
        """Bring all metadata to disk. Raises OSError."""
        await self.writeback.run()

    async def uncancelled(self, coro: Coroutine[Any, Any, None]) -> None:
        """Run `coro` to its end, even if the caller is cancelled: a metadata write that was given up could still reach
        the disk, after a later one."""
        task = asyncio.get_running_loop().create_task(coro)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        await asyncio.shield(task)

    async def to_the_end(self, coro: Coroutine[Any, Any, None]) -> None:
        """Run `coro`, and return when it has ended, even if the caller is cancelled: what it relies on (no requests in
        flight, the node being open) holds as long as the caller is here. The cancellation is passed on after it."""
        task = asyncio.get_running_loop().create_task(coro)
        cancelled = None
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError as exc:
                cancelled = exc
        if cancelled is not None and not task.cancelled() and task.exception() is None:
            raise cancelled
        task.result()

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            # Whoever still waits gets the error; otherwise what failed is still dirty, and the next round meets it.
            task.exception()

    async def tasks_done(self) -> None:
        """Wait for what `uncancelled` still runs."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def clear_autoclear(self) -> None:
        """Before the first write: what this program does not keep up to date must not look consistent afterwards."""
        header = self.header
        # The bitmaps are kept up to date, if they are right, and so is a raw data file.
        mine = headers.AUTOCLEAR_BITMAPS if header.bitmaps is not None else 0
        if self.external:
            mine |= headers.AUTOCLEAR_RAW_DATA
        kept = header.autoclear & mine
        if header.autoclear != kept:
            await self.set_features(header.incompatible, header.compatible, kept)

    async def mark_dirty(self) -> None:
        """Before the first write with lazy refcounts: the counts on disk are not right from now on. Raises OSError."""
        header = self.header
        await self.set_features(header.incompatible | headers.INCOMPAT_DIRTY, header.compatible, header.autoclear)

    async def mark_clean(self) -> None:
        """All counts on disk are right. Raises OSError."""
        header = self.header
        if header.incompatible & headers.INCOMPAT_DIRTY:
            await self.file.flush()
            await self.set_features(header.incompatible & ~headers.INCOMPAT_DIRTY, header.compatible, header.autoclear)

    # --- header ------------------------------------------------------------------------------------------------------

    async def set_features(self, incompatible: int, compatible: int, autoclear: int) -> None:
        """Change the feature masks, and make that durable. Version 3 only. Raises OSError."""
        async with self.changed_header(incompatible=incompatible, compatible=compatible, autoclear=autoclear):
            at, data = headers.feature_fields(self.header)
            await self.file.pwrite(at, data)
            await self.file.flush()

    async def switch_header(self, fields: Callable[[Header], tuple[int, bytes]], **changes: Any) -> None:
        """Change attributes of the header, and write those fields of it (one of `header`'s functions), durably. What
        they refer to has been flushed. After an error the header is the old one. Raises OSError."""
        async with self.changed_header(**changes):
            at, data = fields(self.header)
            await self.exchange(at, data, bytes(await self.file.pread(at, len(data))))

    async def exchange(self, at: int, new: bytes, old: bytes) -> None:
        """Write a part of the header, durably. After an error nobody knows which one is on disk: then `old` is written
        again, and without success in this the image must not be used any more. Raises OSError."""
        try:
            await self.file.pwrite(at, new)
            await self.file.flush()
        except OSError:
            try:
                await self.file.pwrite(at, old)
                await self.file.flush()
            except OSError:
                self.broken = True
                self.forget_all()
            raise

    async def rewrite_header(self, **changes: Any) -> None:
        """Write the whole header area anew: fixed fields, extensions, backing file name. `changes` are attributes of
        the header (`size`, `extensions`, `bitmaps` …); what they refer to has been written, and is flushed before.
        After a crash the header is the old one or the new one. Raises OSError, and Error when it does not fit; the
        attributes are as before then."""
        from pyqsd.drivers.formats.qcow2 import header_area

        async def rewrite() -> None:
            async with self.changed_header(**changes):
                await header_area.write(self)

        await self.uncancelled(rewrite())

    @asynccontextmanager
    async def changed_header(self, **changes: Any) -> AsyncIterator[None]:
        """Change attributes of the header while the caller brings that to disk; back again if that fails."""
        async with self.header_lock:
            header = self.header
            old = {name: getattr(header, name) for name in changes}
            places = (header.header_length, header.backing_offset, header.backing_size)
            for name, value in changes.items():
                setattr(header, name, value)
            try:
                yield
            except BaseException:
                for name, value in old.items():
                    setattr(header, name, value)
                header.header_length, header.backing_offset, header.backing_size = places
                raise
