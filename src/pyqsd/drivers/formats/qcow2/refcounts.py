"""Reference counts: the cache of refcount blocks, finding free clusters, and growing the table.

Source: QEMU docs/interop/qcow2, section "Host cluster management".

Everything is changed in memory only; `Refcounts.write` brings it to disk. That may happen at any time: counts are
raised here before anything refers to a cluster, and are lowered only when nothing on disk refers to it any more (see
`pyqsd.drivers.formats.qcow2.writeback`), so an early write can at worst leak clusters.
"""

from __future__ import annotations

import asyncio
import errno
from array import array
from typing import TYPE_CHECKING

from pyqsd.drivers.formats.qcow2 import header as headers
from pyqsd.drivers.formats.qcow2.cached import Cached

if TYPE_CHECKING:
    from pyqsd.drivers.formats.qcow2.image import Image

REFTABLE_MASK = 0xFFFFFFFFFFFFFE00
#: Host offsets have 56 bits in L1 and L2 entries.
MAX_HOST_OFFSET = 1 << 56
#: Blocks are written in pieces of this alignment, which needs no read-modify-write on O_DIRECT files.
_WRITE_ALIGN = 4096

_TYPECODES = {4: "H", 5: "I", 6: "Q"}


class MissingBlock(Exception):
    """The refcount block `index` must be in memory first (`Refcounts.load_missing`). `together`: with those that are
    there already, so none of them may be evicted for it."""

    def __init__(self, index: int, together: bool) -> None:
        super().__init__(index)
        self.index = index
        self.together = together


class Block(Cached):
    """A refcount block: the counts of consecutive clusters."""

    __slots__ = ("counts", "offset")

    def __init__(self, offset: int, counts: Counts) -> None:
        super().__init__()
        self.offset = offset
        self.counts = counts


class Counts:
    """An array of `entries` counts of 8, 16, 32 or 64 bits."""

    __slots__ = ("entries", "order", "values")

    def __init__(self, order: int, entries: int, data: bytes | bytearray | None = None) -> None:
        self.order = order
        self.entries = entries
        self.values: array[int] | bytearray
        if order == 3:
            self.values = bytearray(entries) if data is None else bytearray(data)
        else:
            code = _TYPECODES[order]
            self.values = array(code, bytes(entries << (order - 3)) if data is None else bytes(data))
            self.values.byteswap()

    def get(self, index: int) -> int:
        return self.values[index]

    def set(self, index: int, value: int) -> None:
        self.values[index] = value

    def set_ones(self, start: int, stop: int) -> None:
        values = self.values
        if isinstance(values, bytearray):
            values[start:stop] = b"\1" * (stop - start)
        elif stop - start == 1:
            values[start] = 1
        else:
            values[start:stop] = array(values.typecode, (1,)) * (stop - start)

    def next_free(self, start: int) -> int:
        """The first index from `start` on with count 0, or -1."""
        try:
            return self.values.index(0, start)
        except ValueError:
            return -1

    def free_run(self, start: int, stop: int) -> int:
        """How many counts from `start` on are 0, at most up to `stop`."""
        values = self.values
        if not any(values[start:stop]):
            return stop - start
        at = start
        while not values[at]:
            at += 1
        return at - start

    def used(self, stop: int) -> int:
        """How many of the first `stop` counts are not 0."""
        values = self.values[:stop]
        # Most blocks have no gap.
        ones = b"\1" * stop if isinstance(values, bytearray) else array(values.typecode, (1,)) * stop
        return stop if values == ones else stop - values.count(0)

    def encode(self, start: int, stop: int) -> bytes:
        piece = self.values[start:stop]
        if isinstance(piece, array):
            piece.byteswap()
            return piece.tobytes()
        return bytes(piece)


class PackedCounts(Counts):
    """Counts of 1, 2 or 4 bits, the first in the least significant bits of a byte."""

    __slots__ = ("_mask",)

    def __init__(self, order: int, entries: int, data: bytes | bytearray | None = None) -> None:
        self.order = order
        self.entries = entries
        self._mask = (1 << (1 << order)) - 1
        self.values = bytearray(entries >> (3 - order)) if data is None else bytearray(data)

    def get(self, index: int) -> int:
        shift = 3 - self.order
        return self.values[index >> shift] >> ((index & ((1 << shift) - 1)) << self.order) & self._mask

    def set(self, index: int, value: int) -> None:
        shift = 3 - self.order
        bit = (index & ((1 << shift) - 1)) << self.order
        at = index >> shift
        self.values[at] = self.values[at] & ~(self._mask << bit) & 0xFF | value << bit

    def set_ones(self, start: int, stop: int) -> None:
        for index in range(start, stop):
            self.set(index, 1)

    def next_free(self, start: int) -> int:
        per_byte = 1 << (3 - self.order)
        at = start
        while at < self.entries:
            if not self.get(at):
                return at
            at += 1
            if at % per_byte == 0 and self.order == 0:
                # Whole bytes of ones are passed over at once.
                byte = at >> 3
                values = self.values
                while byte < len(values) and values[byte] == 0xFF:
                    byte += 1
                at = byte << 3
        return -1

    def free_run(self, start: int, stop: int) -> int:
        at = start
        while at < stop and not self.get(at):
            at += 1
        return at - start

    def used(self, stop: int) -> int:
        return sum(1 for index in range(stop) if self.get(index))

    def encode(self, start: int, stop: int) -> bytes:
        shift = 3 - self.order
        return bytes(self.values[start >> shift : -(-stop >> shift)])


def new_counts(order: int, entries: int, data: bytes | bytearray | None = None) -> Counts:
    """Counts of ``1 << order`` bits each, zero or decoded from `data`."""
    return (PackedCounts if order < 3 else Counts)(order, entries, data)


class Refcounts:
    """The refcount table and its blocks. Cluster numbers are host offsets divided by the cluster size."""

    def __init__(self, image: Image, cache_bytes: int) -> None:
        header = image.header
        self.image = image
        self.order = header.refcount_order
        #: Entries in a block, as bits of a cluster number.
        self.block_bits = header.cluster_bits + 3 - self.order
        self.block_entries = 1 << self.block_bits
        self.maximum = (1 << (1 << self.order)) - 1
        self.max_blocks = max(2, cache_bytes >> header.cluster_bits)
        self.table = array("Q")
        self.blocks: dict[int, Block] = {}
        #: No cluster below this one is free.
        self.hint = 0
        #: The cluster that is being filled with compressed ones, -1: none. Any that becomes free could be this one.
        self.shared = -1
        self._dirty: set[Block] = set()
        self._loading: dict[int, asyncio.Future[None]] = {}
        self._new_entries: set[int] = set()
        #: The table has outgrown its place on disk: (offset, clusters) of the new one, or None.
        self._moving: tuple[int, int] | None = None
        #: New blocks that have no space on disk yet, and whether that goes for the new place of the table as well.
        self._unreserved: list[Block] = []
        self._unreserved_table = False

    # --- reading ---------------------------------------------------------------------------------------------------

    async def read_table(self) -> None:
        """Read the table. Raises OSError."""
        header = self.image.header
        self.image.event("reftable_load")
        data = await self.image.file.pread(header.reftable_offset, header.reftable_clusters << header.cluster_bits)
        self.table = array("Q", bytes(data))
        self.table.byteswap()

    async def load_missing(self, missing: MissingBlock) -> None:
        """Bring what an allocation lacked to memory. Raises OSError."""
        await self.load(missing.index, not missing.together)

    async def load(self, index: int, evict: bool = True) -> Block | None:
        """The block `index`, from disk if need be; None if there is none. Raises OSError."""
        while True:
            block = self.blocks.get(index)
            if block is not None:
                block.used = True
                return block
            waiting = self._loading.get(index)
            if waiting is None:
                break
            # Read once only: a second read may have begun before changes that were written back since.
            await asyncio.shield(waiting)
        offset = self.table[index] & REFTABLE_MASK if index < len(self.table) else 0
        if not offset:
            return None
        image = self.image
        if offset & image.cluster_mask:
            raise image.corrupt(f"Refblock offset {offset:#x} unaligned (reftable index: {headers.hexed(index)})")
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._loading[index] = done
        try:
            if evict:
                await self.make_room()
            image.event("refblock_load")
            data = await image.file.pread(offset, image.cluster_size)
            block = Block(offset, new_counts(self.order, self.block_entries, data))
            self.blocks[index] = block
            return block
        finally:
            del self._loading[index]
            done.set_result(None)

    async def make_room(self) -> None:
        """Evict blocks until there is room for one more. Raises OSError."""
        if len(self.blocks) < self.max_blocks:
            return
        if len(self._dirty) * 2 > len(self.blocks):
            await self.image.uncancelled(self.write())
        for _ in range(2):
            for index in list(self.blocks):
                block = self.blocks.get(index)
                if block is None:
                    continue
                if block.used:
                    # A second chance; it goes to the end of the queue.
                    block.used = False
                    del self.blocks[index]
                    self.blocks[index] = block
                elif not block.hi and not block.busy:
                    del self.blocks[index]
                    if len(self.blocks) < self.max_blocks:
                        return

    def drop_unused(self) -> None:
        """Forget clean blocks that were not used since the last call (``cache-clean-interval``)."""
        for index, block in list(self.blocks.items()):
            if block.used:
                block.used = False
            elif not block.hi and not block.busy:
                del self.blocks[index]

    async def get(self, cluster: int) -> int:
        """The count of `cluster`. Raises OSError."""
        block = await self.load(cluster >> self.block_bits)
        return 0 if block is None else block.counts.get(cluster & (self.block_entries - 1))

    async def at_least_in_use(self, least: int, total: int) -> bool:
        """Whether at least `least` of the first `total` clusters are in use. Raises OSError."""
        found = 0
        for index in range(-(-total // self.block_entries)):
            block = await self.load(index)
            if block is not None:
                found += block.counts.used(min(self.block_entries, total - (index << self.block_bits)))
                if found >= least:
                    return True
                # Others get their turn: this may be many blocks.
                await asyncio.sleep(0)
        return False

    # --- allocating --------------------------------------------------------------------------------------------------

    def _check_place(self, first: int, count: int, what: str) -> None:
        """Refuse clusters that only look free. Raises OSError."""
        if first == 0 and what:
            raise self.image.corrupt(f"Preventing invalid allocation of {what} at offset 0")
        self.image.check_overlap(first, count)
        if first == 0:
            # Never, even if the user wants no checks.
            raise self.image.corrupt("Preventing invalid write on metadata (overlaps with qcow2_header)")

    def allocate_now(self, count: int, contiguous: bool = False, floor: int = 0, what: str = "") -> tuple[int, int]:
        """Take up to `count` (exactly, if `contiguous`) free consecutive clusters at or above `floor`, the lowest that
        are free, and return ``(first cluster, how many)``. `what`: the kind of metadata that they are for, as messages
        call it. Raises MissingBlock when a block must be loaded first, and OSError."""
        hint = self.hint
        if floor <= hint:
            # Mostly, what follows the last allocation is free, and its block is in memory.
            block = self.blocks.get(hint >> self.block_bits)
            index = hint & (self.block_entries - 1)
            stop = index + count
            if block is not None and stop <= self.block_entries and block.counts.free_run(index, stop) == count:
                self._check_place(hint, count, what)
                block.used = True
                block.counts.set_ones(index, stop)
                block.touched(index, stop)
                self._dirty.add(block)
                self.hint = hint + count
                return hint, count
        from_hint = floor <= hint
        at = hint if from_hint else floor
        while True:
            at = self._next_free(at)
            if from_hint:
                self.hint = at
            run, blocks = self._run(at, count)
            if run - blocks >= count or (not contiguous and run > blocks):
                break
            from_hint = False
            at += max(run, 1)
        end = at + run
        last = (end - 1) >> self.block_bits
        if (end << self.image.header.cluster_bits) > MAX_HOST_OFFSET:
            raise OSError(errno.EFBIG, "The image file would be too large")
        if last >= len(self.table):
            self._grow_table(last)
            return self.allocate_now(count, contiguous, floor, what)
        self._check_place(at, run, "refcount block" if blocks else what)
        if blocks:
            self._add_blocks(at, end)
        self._set_ones(at, end)
        if from_hint:
            self.hint = end
        return at + blocks, run - blocks

    async def allocate(self, count: int, contiguous: bool = False, floor: int = 0, what: str = "") -> tuple[int, int]:
        """`allocate_now`, loading blocks as needed."""
        self.image.event("cluster_alloc")
        while True:
            try:
                first, got = self.allocate_now(count, contiguous, floor, what)
                break
            except MissingBlock as missing:
                await self.load_missing(missing)
                if contiguous and not missing.together:
                    # All runs before this block were too short. To look at them again might need more blocks than
                    # there is room for, and so never end.
                    floor = max(floor, missing.index << self.block_bits)
        if self.unreserved:
            try:
                await self.reserve()
            except BaseException:
                self.release(first, got)
                raise
        return first, got

    @property
    def unreserved(self) -> bool:
        """Whether the last allocations made new metadata for which the disk may turn out to have no space."""
        return bool(self._unreserved or self._unreserved_table)

    async def reserve(self) -> None:
        """Write new blocks, and the new place of the table, so that a full disk is noticed by the request that needs
        them, and not by a flush much later. Nothing on disk refers to them yet. Raises OSError."""
        image = self.image
        async with image.refcount_lock:
            image.barrier = True
            while self._unreserved:
                block = self._unreserved[-1]
                if block in self._dirty:
                    image.event("refblock_alloc_write_blocks")
                    await self._write_block(block)
                self._unreserved.remove(block)
            if self._unreserved_table and self._moving is not None:
                offset, clusters = self._moving
                image.event("reftable_grow")
                await image.file.pwrite(offset, bytes(clusters << image.header.cluster_bits))
            self._unreserved_table = False

    def _counts(self, index: int, together: bool) -> Counts | None:
        """The counts of a block in memory; None where there is no block yet."""
        block = self.blocks.get(index)
        if block is not None:
            block.used = True
            return block.counts
        if index >= len(self.table) or not self.table[index] & REFTABLE_MASK:
            return None
        raise MissingBlock(index, together)

    def _next_free(self, cluster: int) -> int:
        while True:
            index = cluster >> self.block_bits
            counts = self._counts(index, False)
            if counts is None:
                return cluster
            found = counts.next_free(cluster & (self.block_entries - 1))
            if found >= 0:
                return (index << self.block_bits) + found
            following = (index + 1) << self.block_bits
            if cluster <= self.hint < following:
                # So that a long search, which waits for blocks in between, does not begin anew every time.
                self.hint = following
            cluster = following

    def _free_run(self, cluster: int, count: int) -> int:
        at, end = cluster, cluster + count
        while at < end:
            index = at >> self.block_bits
            stop = min(end, (index + 1) << self.block_bits)
            counts = self._counts(index, True)
            if counts is None:
                at = stop
                continue
            base = index << self.block_bits
            n = counts.free_run(at - base, stop - base)
            at += n
            if at < stop:
                break
        return at - cluster

    def _missing_blocks(self, start: int, end: int) -> int:
        first, last = start >> self.block_bits, (end - 1) >> self.block_bits
        if first == last and first in self.blocks:
            return 0
        table = self.table
        return sum(1 for index in range(first, last + 1) if index >= len(table) or not table[index] & REFTABLE_MASK)

    def _run(self, at: int, count: int) -> tuple[int, int]:
        """A free run at `at` for `count` clusters and the refcount blocks that they need: (its length, blocks)."""
        want = count
        while True:
            run = self._free_run(at, want)
            blocks = self._missing_blocks(at, at + run) if run else 0
            if run < want or run - blocks >= count:
                break
            want = count + blocks
        while run > count + blocks:
            run = count + blocks
            blocks = self._missing_blocks(at, at + run)
        return run, blocks

    def _add_blocks(self, at: int, end: int) -> None:
        """Create the missing blocks for the clusters ``[at, end)``, in the first of these."""
        image = self.image
        for index in range(at >> self.block_bits, ((end - 1) >> self.block_bits) + 1):
            if self.table[index] & REFTABLE_MASK:
                continue
            offset = at << image.header.cluster_bits
            block = Block(offset, new_counts(self.order, self.block_entries))
            block.touched(0, self.block_entries)
            self._dirty.add(block)
            self._unreserved.append(block)
            self.blocks[index] = block
            self.table[index] = offset
            self._new_entries.add(index)
            image.meta.add("refcount_block", at)
            at += 1

    def _set_ones(self, start: int, end: int) -> None:
        at = start
        while at < end:
            index = at >> self.block_bits
            base = index << self.block_bits
            stop = min(end, base + self.block_entries)
            block = self.blocks[index]
            block.counts.set_ones(at - base, stop - base)
            block.touched(at - base, stop - base)
            self._dirty.add(block)
            at = stop

    def _grow_table(self, last: int) -> None:
        """Make the table long enough for block `last`, and find it a new place."""
        image = self.image
        bits = image.header.cluster_bits
        per_cluster = image.cluster_size >> 3
        entries = max(last + 2, len(self.table) * 3 // 2)
        while True:
            clusters = -(-entries // per_cluster)
            # The new table itself needs clusters and blocks behind them.
            need = last + 3 + (clusters >> self.block_bits)
            if clusters * per_cluster >= need:
                break
            entries = need
        if clusters << bits > headers.MAX_REFTABLE_BYTES:
            if last >= headers.MAX_REFTABLE_BYTES >> 3:
                raise OSError(errno.EFBIG, "The refcount table would be too large")
            clusters = headers.MAX_REFTABLE_BYTES >> bits
        old = self.table
        moving = self._moving
        self.table = array("Q", old)
        self.table.extend(array("Q", bytes(8 * (clusters * per_cluster - len(old)))))
        try:
            first, _ = self.allocate_now(clusters, contiguous=True)
        except BaseException:
            # A block has to be loaded first. What was added is all zero unless the search itself added blocks.
            if not any(self.table[len(old) :]):
                self.table = old
            raise
        if len(self.table) != clusters * per_cluster:
            # Finding the place made the table grow once more.
            self._release_now(first, clusters)
            return
        if moving is not None:
            # The place found before was never written.
            self._release_now(moving[0] >> bits, moving[1])
            image.meta.remove("refcount_table", moving[0] >> bits, moving[1])
        self._moving = (first << bits, clusters)
        self._unreserved_table = True
        image.meta.add("refcount_table", first, clusters)

    # --- releasing ---------------------------------------------------------------------------------------------------

    def release(self, first: int, count: int) -> None:
        """Give back clusters that were just allocated and that nothing refers to."""
        self._release_now(first, count)

    def _release_now(self, first: int, count: int) -> None:
        for cluster in range(first, first + count):
            block = self.blocks.get(cluster >> self.block_bits)
            if block is None:
                # It has been evicted since: the cluster leaks, which is harmless.
                continue
            index = cluster & (self.block_entries - 1)
            block.counts.set(index, 0)
            block.touched(index, index + 1)
            self._dirty.add(block)
        if first < self.hint:
            self.hint = first
        self._was_used(first + count)

    def _was_used(self, end: int) -> None:
        """Clusters below `end` were in use, and are free: what they hold is not known to be zero."""
        self.shared = -1
        end <<= self.image.cluster_bits
        if end > self.image.touched_end:
            self.image.touched_end = end

    def changed(self, block: Block, lo: int, hi: int) -> None:
        """The counts ``[lo, hi)`` of a block were changed by somebody else."""
        block.touched(lo, hi)
        self._dirty.add(block)

    def freed(self, first: int, end: int) -> None:
        """Some of the clusters ``[first, end)`` are free now."""
        if first < self.hint:
            self.hint = first
        self._was_used(end)

    def increase_now(self, cluster: int) -> bool:
        """Count one more reference to a cluster that is in use; False if the count has no room for it. Raises
        MissingBlock."""
        counts = self._counts(cluster >> self.block_bits, False)
        index = cluster & (self.block_entries - 1)
        value = 0 if counts is None else counts.get(index)
        if counts is None or not 0 < value < self.maximum:
            return False
        counts.set(index, value + 1)
        self.changed(self.blocks[cluster >> self.block_bits], index, index + 1)
        return True

    async def last_references(self, first: int, count: int) -> list[tuple[int, int]]:
        """The runs ``(first, how many)`` of those of these clusters that have one reference left. Raises OSError."""
        runs: list[tuple[int, int]] = []
        for cluster in range(first, first + count):
            if await self.get(cluster) != 1:
                continue
            if runs and sum(runs[-1]) == cluster:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            else:
                runs.append((cluster, 1))
        return runs

    def in_one_block(self, first: int, count: int) -> int:
        """How many of these clusters, from the first one on, have their counts in the same block."""
        return min(count, self.block_entries - (first & (self.block_entries - 1)))

    async def room_for(self, cluster: int) -> None:
        """Make room for the block of a cluster, if it is not in memory. Raises OSError if that takes a write, which
        fails."""
        if cluster >> self.block_bits not in self.blocks:
            await self.make_room()

    async def decrease(self, first: int, count: int) -> None:
        """Lower the counts by one, because nothing on disk refers to these clusters any more. Raises OSError; among
        clusters that are in one block (`in_one_block`) no count is lower then."""
        for cluster in range(first, first + count):
            block = await self.load(cluster >> self.block_bits)
            if block is None:
                continue
            index = cluster & (self.block_entries - 1)
            value = block.counts.get(index)
            if value == 0:
                continue
            block.counts.set(index, value - 1)
            block.touched(index, index + 1)
            self._dirty.add(block)
            if value == 1:
                self._was_used(cluster + 1)
                if cluster < self.hint:
                    self.hint = cluster

    # --- writing -----------------------------------------------------------------------------------------------------

    @property
    def dirty(self) -> bool:
        """Whether something is not on disk."""
        return bool(self._dirty or self._new_entries or self._moving)

    async def write(self) -> None:
        """Bring all counts to disk, blocks before the table entries that refer to them, and a moved table before the
        header that refers to it. Raises OSError; what was not written stays dirty."""
        image = self.image
        async with image.refcount_lock:
            if not self.dirty:
                return
            image.barrier = True
            entries, self._new_entries = self._new_entries, set()
            moving = self._moving
            try:
                for block in sorted(self._dirty, key=lambda b: b.offset):
                    image.event("refblock_update_part")
                    await self._write_block(block)
                if entries or moving:
                    await image.file.flush()
                if moving:
                    await self._move_table(moving)
                else:
                    await self._write_entries(entries)
            except BaseException:
                self._new_entries |= entries
                raise

    async def _write_block(self, block: Block) -> None:
        lo, hi = block.lo, block.hi
        per = max(1, _WRITE_ALIGN * 8 >> self.order)
        start = lo // per * per
        stop = min(-(-hi // per) * per, self.block_entries)
        data = block.counts.encode(start, stop)
        block.lo = block.hi = 0
        block.busy = True
        self._dirty.discard(block)
        try:
            await self.image.file.pwrite(block.offset + (start << self.order >> 3), data)
        except BaseException:
            block.touched(lo, hi)
            self._dirty.add(block)
            raise
        finally:
            block.busy = False

    async def _write_entries(self, entries: set[int]) -> None:
        image = self.image
        done: set[int] = set()
        on_disk = image.header.reftable_clusters << image.cluster_bits >> 3
        for index in sorted(entries):
            page = index * 8 // _WRITE_ALIGN
            if page in done:
                continue
            done.add(page)
            start = page * _WRITE_ALIGN // 8
            # Entries of blocks that were added meanwhile are not on disk yet, so they must not be in this write.
            # The table in memory may have outgrown the one on disk since this round began.
            piece = self.table[start : min(start + _WRITE_ALIGN // 8, on_disk)]
            for later in self._new_entries:
                if start <= later < start + len(piece):
                    piece[later - start] = 0
            piece.byteswap()
            image.event("refblock_alloc_hookup")
            await image.file.pwrite(image.header.reftable_offset + start * 8, piece.tobytes())

    async def _move_table(self, moving: tuple[int, int]) -> None:
        image = self.image
        header = image.header
        offset, clusters = moving
        table = array("Q", self.table[: clusters * image.cluster_size // 8])
        for later in self._new_entries:
            if later < len(table):
                table[later] = 0
        table.byteswap()
        image.event("refblock_alloc_write_table")
        await image.file.pwrite(offset, table.tobytes())
        await image.file.flush()
        async with image.header_lock:
            at, data = headers.reftable_fields(offset, clusters)
            image.event("refblock_alloc_switch_table")
            await image.file.pwrite(at, data)
            old = (header.reftable_offset, header.reftable_clusters)
            header.reftable_offset, header.reftable_clusters = offset, clusters
        if self._moving == moving:
            self._moving = None
        first = old[0] >> header.cluster_bits
        image.meta.remove("refcount_table", first, old[1])
        image.free_later(first, old[1], "other")
