"""Copying clusters from one node to another while somebody writes to the first: who has copied what.

A bitmap says which clusters are still to be copied; whoever copies some takes them out of it first. So no cluster is
copied twice, a writer that needs one copied waits only for that one, and what failed is to be copied again.

Offsets and lengths are bytes.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from typing import Final

from pyqsd.block.block_copy import CopyError, Transfer
from pyqsd.block.child import Child
from pyqsd.block.dirty_bitmap import DirtyBitmap
from pyqsd.block.driver import WRITE_COMPRESSED
from pyqsd.block.extents import ALLOCATED, ZERO
from pyqsd.block.node import Node
from pyqsd.block.pieces import Piece, Pieces
from pyqsd.qapi.errors import Error

log = logging.getLogger(__name__)

_DEFAULT_CLUSTER: Final = 64 << 10
_INT64_MAX: Final = (1 << 63) - 1
#: Bytes that are read and written at once.
CHUNK: Final = 1 << 20
#: How far one looks for zeroes at once.
AHEAD: Final = 1 << 32


def check_cluster_size(least: int) -> None:
    """Raises Error if clusters of `least` bytes cannot be wanted."""
    if least > _INT64_MAX:
        raise Error(f"min-cluster-size too large: {least} > {_INT64_MAX}")


def natural_cluster(target: Node, least: int) -> int:
    """Bytes that are copied to `target` together: whole clusters of it, so that none of them has to be filled up from
    what is below it, and at least 64 KiB. Raises Error if `least`, which somebody wants instead, cannot be."""
    check_cluster_size(least)
    if least & (least - 1):
        raise Error("min-cluster-size needs to be a power of 2")
    known = target.driver.image_info()
    if "dirty_flag" not in known and target.below() is None:
        log.warning(
            "The target block device doesn't provide information about the block size and it doesn't have a backing "
            "file. The (default) block size of %d bytes is used. If the actual block size of the target exceeds this "
            "value, the backup may be unusable",
            _DEFAULT_CLUSTER,
        )
    return max(_DEFAULT_CLUSTER, known.get("cluster_size") or 0)


class ClusterCopy:
    """What is still to be copied from the child `source` of `node` to its child `target`, and copying it.

    Arguments:
        least: the clusters are at least so large.
        bitmap: only what is dirty in it is to be copied; None: everything.

    Raises Error.
    """

    def __init__(self, node: Node, source: Child, target: Child, least: int, bitmap: DirtyBitmap | None) -> None:
        self.source = source
        self.target = target
        #: What is worth copying by itself.
        self._unit = natural_cluster(target.node, least)
        self.cluster = max(self._unit, least)
        self.to_copy = node.dirty_bitmaps.add_anonymous(source.node.length, self.cluster, enabled=False)
        if bitmap is None:
            self.to_copy.mark(0, source.node.length)
        else:
            try:
                bitmap.check(allow_readonly=True)
                self.to_copy.merge(bitmap)
            except Error as exc:
                raise exc.prefixed(f"Failed to merge bitmap '{bitmap.name}' to internal copy-bitmap: ") from exc
        #: What is never copied, although it is part of the past: others do not need it.
        self.left_out = DirtyBitmap("", source.node.length, self.cluster, enabled=False)
        #: Where `next_piece` knows that everything is still to be copied.
        self._known = (0, 0)
        #: What is being copied at the moment.
        self.pieces = Pieces()
        #: Give back the space of what was copied, at the source.
        self.discard_source = False
        #: Called with the number of bytes, whole clusters counted, whenever some have been copied.
        self.on_copied: Callable[[int], None] | None = None
        #: Called when some are no longer to be copied.
        self.on_skipped: Callable[[], None] | None = None
        self._compress = False
        self._offload = True
        self.children_changed()

    def children_changed(self) -> None:
        """The source or the target is another node now."""
        flags = WRITE_COMPRESSED if self._compress else 0
        self._transfer = Transfer(
            self.source.node, self.target.node, write_flags=flags, zero_flags=0, offload=self._offload
        )

    def configure(self, *, compress: bool, offload: bool) -> None:
        """From now on compress everything that is copied, and let the kernel copy where it can."""
        self._compress, self._offload = compress, offload
        self.children_changed()

    def replace(self, bitmap: DirtyBitmap) -> None:
        """Only what is dirty in `bitmap` is to be copied. Raises Error if its size is another."""
        self.to_copy.clear()
        self.to_copy.merge(bitmap)
        self._known = (0, 0)
        self.left_out.mark(0, self.left_out.size)
        for start, length in self.to_copy.areas():
            self.left_out.clear(start, length)

    async def skip_unallocated(self, start: int) -> int:
        """Of what is still to be copied from `start` on, skip the first clusters that are not in the source itself, but
        below it. Returns where to go on. Raises OSError."""
        area = self.to_copy.next_dirty_area(start, None, AHEAD)
        if area is None:
            return self.to_copy.size
        at, end = area[0], area[0] + area[1]
        n, flags, _, _ = await self.source.node.block_status(at, end - at, False)
        if flags & ALLOCATED or not n:
            # The cluster that it ends in is allocated, too.
            return self.aligned(at, at + max(n, 1))[1]
        stop = self.source.node.length if at + n >= self.source.node.length else (at + n) // self.cluster * self.cluster
        if stop <= at:
            return self.aligned(at, at + 1)[1]
        self.to_copy.clear(at, stop - at)
        self.left_out.mark(at, stop - at)
        self._known = (0, 0)
        return stop

    def aligned(self, start: int, end: int) -> tuple[int, int]:
        """The range, widened to whole clusters."""
        return start // self.cluster * self.cluster, -(-end // self.cluster) * self.cluster

    def is_settled(self, start: int, end: int) -> bool:
        """Whether nothing of the range is still to be copied, or being copied."""
        return self.to_copy.next_dirty(start, end) is None and self.pieces.touching(start, end) is None

    async def copy(self, start: int, end: int) -> None:
        """Copy whatever is still to be copied of ``[start, end)``, whole clusters, and wait for others who copy some of
        it. Raises CopyError."""
        while True:
            area = self.to_copy.next_dirty_area(start, end)
            if area is not None:
                first = area[0]
                length, zero = await self._extent(first, first + area[1], CHUNK)
                # Others may have taken it meanwhile.
                area = self.to_copy.next_dirty_area(first, first + length)
                if area is not None and area[0] == first:
                    await self.do(self.take(first, area[1]), zero)
                continue
            piece = self.pieces.touching(start, end)
            if piece is None:
                return
            await self.pieces.wait(piece)

    async def next_piece(self, start: int, most: int, most_zero: int = AHEAD) -> tuple[Piece, bool] | None:
        """Take the first piece at or after `start` that is still to be copied, of at most `most` bytes of data, or of
        `most_zero` bytes that read as zeroes: whoever calls this passes it to `do`, together with whether it reads as
        zeroes, or to `put_back`. None: there is none."""
        while True:
            first, end = self._known
            if first <= start < end:
                first = start
            else:
                area = self.to_copy.next_dirty_area(start, None, AHEAD)
                if area is None:
                    return None
                first, end = self._known = area[0], area[0] + area[1]
            length, zero = await self._extent(first, end, most)
            if zero:
                length = min(length, max(most_zero // self.cluster, 1) * self.cluster)
            # Others may have taken some of it meanwhile.
            begin, end = self._known
            if begin <= first < end:
                return self.take(first, min(length, end - first)), zero

    async def _extent(self, start: int, end: int, most: int) -> tuple[int, bool]:
        """How the range begins: for how many bytes (whole clusters unless it ends before, and of data at most `most`),
        and whether all of these read as zeroes."""
        try:
            (length, flags, _, _), _ = await self.source.node.block_status_above(None, start, end - start)
        except OSError:
            # To be met again when it is read.
            length, flags = 0, 0
        if flags & ZERO:
            zeroes = end - start if start + length >= end else length // self.cluster * self.cluster
            if zeroes:
                return zeroes, True
        whole = max(-(-length // self.cluster), 1) * self.cluster
        return min(whole, max(most // self.cluster, 1) * self.cluster, end - start), False

    def take(self, start: int, length: int) -> Piece:
        """Whole clusters that are to be copied are copied by the caller: he passes the piece to `do`."""
        self.to_copy.clear(start, length)
        first, end = self._known
        if first <= start < end:
            self._known = (start + length, end) if start == first else (first, start)
        elif start < end and first < start + length:
            self._known = (0, 0)
        return self.pieces.begin(start, start + length)

    def put_back(self, piece: Piece) -> None:
        """What was taken is not going to be copied."""
        self.to_copy.mark(piece.start, piece.end - piece.start)
        self.pieces.finish(piece)

    async def do(self, piece: Piece, zero: bool) -> None:
        """Copy what was taken; if that fails, all of it is to be copied again. Raises CopyError."""
        start, end = piece.start, piece.end
        try:
            # What is beyond the end of a node that was made smaller is gone.
            stop = min(end, self.source.node.length)
            if stop > self.target.node.length:
                raise CopyError(False, OSError(errno.EIO, "Beyond the end of the target"))
            if start < stop and zero:
                await self._transfer.zero(start, stop - start)
            elif start < stop:
                await self._copy_data(start, stop)
            if self.discard_source:
                await self._discard_source(start, stop)
        except BaseException:
            self.to_copy.mark(start, end - start)
            raise
        finally:
            self.pieces.finish(piece)
        if self.on_copied is not None:
            first, last = self.aligned(start, end)
            self.on_copied(last - first)

    async def _copy_data(self, start: int, end: int) -> None:
        # Large clusters do not need large buffers.
        step = max(CHUNK, self._unit)
        for at in range(start, end, step):
            await self._transfer.copy(at, min(step, end - at))

    async def _discard_source(self, start: int, end: int) -> None:
        try:
            await self.source.node.pdiscard(start, end - start)
        except OSError as exc:
            log.warning("node '%s': discarding what was copied: %s", self.source.node.name, exc)

    def skip(self, start: int, length: int) -> None:
        """These clusters need not be copied."""
        self.to_copy.clear(start, length)
        self._known = (0, 0)
        if self.on_skipped is not None:
            self.on_skipped()

    @property
    def left(self) -> int:
        """Bytes that are still to be copied, or being copied; whole clusters counted."""
        return self.to_copy.count + sum(last - first for first, last in map(self._whole, self.pieces))

    def _whole(self, piece: Piece) -> tuple[int, int]:
        return self.aligned(piece.start, piece.end)
