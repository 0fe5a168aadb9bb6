"""The mirror: a job that makes its target the same as its source, and keeps it so until it is told to end
(``blockdev-mirror``, ``drive-mirror``); the active commit (``block-commit`` of the top layer) is one whose target is a
layer below the source.

What the target does not have yet is in a dirty bitmap of the source. A piece is copied so: its range is taken, its
bits are cleared, and only then is it looked at and read; a write that comes meanwhile sets the bits again when it has
ended, so that the piece is copied once more. Ranges being copied do not overlap, so that an older copy never follows a
newer one.

With ``copy-mode=write-blocking`` writes through the filter over the source go to both: such a write takes its range as
a piece does, and its bits are cleared after the source has it and before the target gets it. Whatever goes wrong sets
them.

The job ends in a drained section, with no bit set and the target flushed.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from enum import StrEnum
from typing import Any, Final

from pyqsd.block import freezing, op_blockers
from pyqsd.block import iov as iovs
from pyqsd.block import permissions as perms
from pyqsd.block.block_copy import CopyError, Transfer, Workers
from pyqsd.block.dirty_bitmap import default_granularity
from pyqsd.block.driver import MAY_UNMAP, ROLE_COW
from pyqsd.block.events import BlockErrorAction
from pyqsd.block.extents import ZERO
from pyqsd.block.graph import Graph
from pyqsd.block.internal_filter import insert_above, lead_away, take_away
from pyqsd.block.node import Node
from pyqsd.block.range_locks import RangeLocks
from pyqsd.block.reopen import read_only_again, set_read_only
from pyqsd.block.replace import Change
from pyqsd.jobs.block_job import BlockdevOnError, BlockJob
from pyqsd.jobs.block_job_commands import BlockJobChangeOptionsMirror, MirrorCopyMode
from pyqsd.jobs.commit_top import shared_below
from pyqsd.jobs.job import Jobs, JobStatus, JobType
from pyqsd.jobs.mirror_top import MirrorBitmap, MirrorTop, ShownBitmap
from pyqsd.qapi.errors import Error
from pyqsd.qapi.types import Struct

log = logging.getLogger(__name__)

_MOST_PIECES: Final = 16
#: The buffers of pieces under way together, unless ``buf-size`` says otherwise (up to `_MOST_BUFFER`). With more, the
#: processor's cache is of less use, and users wait longer.
_BUFFER: Final = 4 << 20
_MOST_BUFFER: Final = 64 << 20
#: Data is copied in pieces of this length, or a sixteenth of the buffer if that is more.
_CHUNK: Final = 1 << 20
#: Zeroes are looked for, and made, so far at once.
_ZEROES: Final = 1 << 30
#: Once source and target are the same, writes are collected for so long, seconds.
_COLLECT: Final = 0.1
#: What is dirty when the job is to end is copied while users wait if it is no more than this. It counts as ready with
#: that much if it was not less after so many passes.
_LAST_BYTES: Final = 4 << 20
_PATIENCE: Final = 3
#: How many answers about the target are asked for to find that it reads as zeroes.
_LOOKS: Final = 64


class SyncMode(StrEnum):
    """What is copied: everything, what the source has itself, or only what is written from now on."""

    FULL = "full"
    TOP = "top"
    NONE = "none"


class BackingMode(StrEnum):
    """What becomes of the backing chain of the target in the end: nothing, it gets that of the source, or the one that
    its image names."""

    LEAVE = "leave"
    OF_SOURCE = "of-source"
    OPEN = "open"


class MirrorOptions(Struct, kw_only=True):
    """How a mirror works. Sizes in bytes; `speed`: bytes per second, 0: no limit.

    `granularity`: 0: chosen by the target. `buf_size`: 0: the usual. `replaces`: the name of the node that the target
    takes the place of, instead of the source. `zero_target`: the target is not known to read as zeroes.
    """

    sync: SyncMode = SyncMode.FULL
    granularity: int = 0
    buf_size: int = 0
    on_source_error: BlockdevOnError = BlockdevOnError.REPORT
    on_target_error: BlockdevOnError = BlockdevOnError.REPORT
    copy_mode: MirrorCopyMode = MirrorCopyMode.BACKGROUND
    unmap: bool = True
    replaces: str | None = None
    backing: BackingMode = BackingMode.LEAVE
    zero_target: bool = True
    filter_node_name: str | None = None
    speed: int = 0
    auto_finalize: bool = True
    auto_dismiss: bool = True


async def start_mirror(
    jobs: Jobs, graph: Graph, id: str, source: Node, target: Node, options: MirrorOptions
) -> MirrorJob:
    """Begin to mirror `source` to `target`. Raises Error, and then nothing has changed."""
    return await _start(MirrorJob, jobs, graph, id, source, target, options)


async def start_active_commit(
    jobs: Jobs,
    graph: Graph,
    id: str,
    top: Node,
    base: Node,
    *,
    speed: int = 0,
    on_error: BlockdevOnError = BlockdevOnError.REPORT,
    filter_node_name: str | None = None,
    auto_finalize: bool = True,
    auto_dismiss: bool = True,
) -> MirrorJob:
    """Begin to commit `top`, which is written to meanwhile, to `base` below it, which takes its place in the end.
    Raises Error, and then nothing has changed."""
    read_only = base.read_only
    if read_only:
        await set_read_only(graph, base, False)
    options = MirrorOptions(
        sync=SyncMode.TOP,
        on_source_error=on_error,
        on_target_error=on_error,
        zero_target=False,
        filter_node_name=filter_node_name,
        speed=speed,
        auto_finalize=auto_finalize,
        auto_dismiss=auto_dismiss,
    )
    try:
        job = await _start(ActiveCommitJob, jobs, graph, id, top, base, options)
    except BaseException:
        if read_only:
            await set_read_only(graph, base, True)
        raise
    job.base_was_read_only = read_only
    return job


async def _start(
    cls: type[MirrorJob], jobs: Jobs, graph: Graph, id: str, source: Node, target: Node, options: MirrorOptions
) -> MirrorJob:
    if options.buf_size < 0:
        raise Error("Invalid parameter 'buf-size'")
    if _unfiltered(source) is _unfiltered(target):
        raise Error("Can't mirror node into itself")
    below = target in _chain(source)
    top = await insert_above(source, MirrorTop, options.filter_node_name, is_commit=below)
    try:
        job = cls(jobs, id, graph, top, target, options)
    except BaseException:
        await _take_away(top, source)
        raise
    job.start()
    return job


def _chain(node: Node) -> list[Node]:
    """`node` and all layers below it."""
    found = [node]
    while (below := found[-1].below()) is not None:
        found.append(below)
    return found


def _unfiltered(node: Node) -> Node:
    while node.driver.is_filter and (below := node.below()) is not None:
        node = below
    return node


def next_in_chain(node: Node) -> Node | None:
    """The backing file of `node`, or of what it filters."""
    edge = _unfiltered(node).driver.backing
    return None if edge is None else edge.node


def can_replace(source: Node, other: Node) -> bool:
    """Whether the content of `other` is that of `source` at any time: it is what that filters."""
    node = source
    while node is not other:
        if not node.driver.is_filter or (below := node.below()) is None:
            return False
        node = below
    return True


async def _take_away(top: Node, to: Node) -> None:
    try:
        await take_away(top, to)
    except Error as exc:
        # It does nothing but pass on what comes.
        log.error("node '%s' stays where it is: %s", top.name, exc.desc)


class MirrorJob(BlockJob):
    """One of them. `top`: the filter over the source."""

    kind = JobType.MIRROR
    can_complete = True

    def __init__(self, jobs: Jobs, id: str, graph: Graph, top: Node, target: Node, options: MirrorOptions) -> None:
        assert isinstance(top.driver, MirrorTop)
        source = self._source = top.driver.target
        self._top = top
        self._filter = top.driver
        self._target = target
        self._options = options
        #: What is there and below need not be copied.
        self._base = target if self._is_commit else next_in_chain(source) if options.sync is SyncMode.TOP else None
        granularity = options.granularity or default_granularity(target.driver.image_info().get("cluster_size") or 0)
        self._bitmap = MirrorBitmap(source.length, granularity)
        self._locks = RangeLocks()
        #: A part of a cluster that the target does not have must not be written alone: there is nothing yet that the
        #: target could take the rest from.
        self._whole_clusters = (
            not self._is_commit
            and options.sync is not SyncMode.FULL
            and target.driver.supports_backing
            and target.driver.backing is None
        )
        #: Pieces begin and end at multiples of this.
        self._unit = max(granularity, target.driver.allocation_unit()) if self._whole_clusters else granularity
        self._buffer = min(max(options.buf_size or _BUFFER, 64 << 10), _MOST_BUFFER)
        #: Bytes that are read and written at once.
        self._chunk = max(min(_CHUNK, self._buffer), self._buffer // _MOST_PIECES)
        #: Where the target reads as zeroes already, it needs none.
        self._zeroes_count = self._is_commit or options.sync is SyncMode.FULL
        #: What was found to be data when it was last looked at: it need not be looked at again.
        self._data_from = self._data_until = 0
        self._in_flight = 0
        self._error: OSError | None = None
        self._failures = 0
        self._synced = False
        self._pivot = False
        self._frozen = False
        self._copy_mode = options.copy_mode
        self.base_was_read_only = False
        #: The drained section at the end.
        self._section = AsyncExitStack()
        self._left = False
        self._total = 0
        self._counting = False
        self._replace_blocker: tuple[Node, op_blockers.Blocker] | None = None
        super().__init__(
            jobs,
            id,
            graph,
            top,
            perms.CONSISTENT_READ,
            perms.CONSISTENT_READ | perms.WRITE_UNCHANGED | perms.WRITE,
            speed=options.speed,
            auto_finalize=options.auto_finalize,
            auto_dismiss=options.auto_dismiss,
        )
        try:
            self._take_nodes()
        except BaseException:
            self.give_up()
            raise
        source.dirty_bitmaps.add(self._bitmap)
        top.dirty_bitmaps.add(ShownBitmap(self._bitmap))

    @property
    def _is_commit(self) -> bool:
        """The target is below the source."""
        return self._filter.is_commit

    def _take_nodes(self) -> None:
        source, target = self._source, self._target
        perm, shared = perms.WRITE, perms.WRITE_UNCHANGED
        if self._is_commit:
            shared |= perms.CONSISTENT_READ | perms.WRITE
            if self.kind is JobType.COMMIT and target.length < source.length:
                perm |= perms.RESIZE
        self._to = self.open_backend(target, perm, shared)
        self._transfer = Transfer(source, self._to, zero_flags=MAY_UNMAP if self._options.unmap else 0)
        self.add_node("source", source, 0, perms.WRITE_UNCHANGED | perms.WRITE | perms.CONSISTENT_READ)
        self.add_node("target", target, 0, perms.ALL)
        # Writes of users come there as well.
        self._nodes[-1][0].passed_on_by = self._top
        if self._is_commit:
            for layer in _chain(source)[1:]:
                if layer is target:
                    break
                self.add_node("intermediate node", layer, 0, shared_below(layer, target))
            freezing.freeze(self._top, target)
            self._frozen = True

    # --- progress: what is done, and what is dirty or under way ------------------------------------------------------

    @property
    def progress_total(self) -> int:
        if self._counting:
            return self.progress_current + self._in_flight + self._bitmap.count
        return self._total

    @progress_total.setter
    def progress_total(self, value: int) -> None:
        self._total = value

    def more_info(self) -> dict[str, Any]:
        return {"actively_synced": self._synced and self._bitmap.next_dirty(0) is None}

    # --- the work ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        await self._check_sizes()
        async with Workers(_MOST_PIECES, self._buffer) as self.workers:
            try:
                await self._begin()
                await self._go_on()
            finally:
                self._filter.writer = None
                await self.workers.idle()
                self._total = self.progress_total
                self._counting = False

    async def _check_sizes(self) -> None:
        source, target = self._source, self._target
        if self.kind is not JobType.COMMIT:
            if source.length != target.length:
                raise Error("Source and target image have different sizes")
        elif target.length < source.length:
            await self.grow(self._to, source.length)

    async def _begin(self) -> None:
        """Find out what is to be copied. Users' writes are marked all the time."""
        source, options = self._source, self._options
        if options.sync is not SyncMode.NONE:
            if options.zero_target and not (self._target.discard_unmap and self._target.driver.zero_flags & MAY_UNMAP):
                self._bitmap.mark(0, source.length)
            else:
                await self._mark_allocated()
        self._counting = True
        if self._copy_mode is MirrorCopyMode.WRITE_BLOCKING:
            self._filter.writer = self

    async def _mark_allocated(self) -> None:
        """Mark what the source has above the base; where it has nothing, the target is made to read as zeroes."""
        assert self.workers is not None
        source, at = self._source, 0
        while at < source.length:
            (n, _, _, _), depth = await source.block_status_above(self._base, at, source.length - at, False)
            n = n or source.length - at
            if depth:
                self._bitmap.mark(at, n)
            elif self._options.zero_target:
                for start in range(at, at + n, _ZEROES):
                    await self.workers.run(0, self._make_zero(start, min(_ZEROES, at + n - start)))
            at += n
            await self.throttle(0)
        await self.workers.idle()

    async def _make_zero(self, start: int, length: int) -> None:
        try:
            if not await self._reads_as_zeroes(start, length):
                await self._transfer.zero(start, length)
        except CopyError:
            # Then it is copied like data, and fails there if it must.
            self._bitmap.mark(start, length)

    async def _go_on(self) -> None:
        """Until it is told to end, and can."""
        while True:
            await self._synchronise()
            if not await self._flush():
                await self.sleep(_COLLECT)
                continue
            if self.status is not JobStatus.READY:
                self.ready()
            self._synced = self._filter.writer is not None or not self._source.length
            if not self._pivot and not self.soft_cancelled:
                await self.sleep(_COLLECT)
            elif await self._stop():
                return
            else:
                await self.pause_point()

    async def _stop(self) -> bool:
        """Hold back all users of the source and copy the last bit. False if that cannot be now: users go on."""
        await self._section.enter_async_context(self.graph.drained(self._source))
        done = False
        try:
            if self._bitmap.count <= _LAST_BYTES:
                await self._synchronise(held=True)
                done = self._bitmap.next_dirty(0) is None and await self._flush()
        finally:
            if not done:
                await self._section.aclose()
        return done

    async def _flush(self) -> bool:
        try:
            await self._to.flush()
        except OSError as exc:
            self._failed(False, exc)
            self._check()
            return False
        return True

    async def _synchronise(self, held: bool = False) -> None:
        """Copy until nothing is dirty, or, where users write all the time, so little that it can be left to the end.
        With `held` they do not, and it returns if anything fails."""
        workers, bitmap = self.workers, self._bitmap
        assert workers is not None
        at = passes = 0
        failures = self._failures
        while True:
            self._check()
            if held and self._failures != failures:
                await workers.idle()
                return
            dirty = bitmap.next_dirty(at)
            if dirty is not None:
                at = await self._begin_piece(dirty, held)
                continue
            if at == 0 and not workers.running:
                return
            at = 0
            passes += 1
            if workers.running:
                # They may leave something dirty.
                await workers.wait_one()
            else:
                # All that was dirty is being written to by users.
                await self._locks.wait_release()
            if held:
                continue
            if self._failures != failures:
                failures = self._failures
                # Errors are ignored, or the user has let it go on.
                await workers.idle()
                self._check()
                await self.sleep(_COLLECT)
            await self.pause_point()
            if passes > _PATIENCE and bitmap.count <= _LAST_BYTES:
                await workers.idle()
                self._check()
                return

    async def _begin_piece(self, dirty: int, held: bool) -> int:
        """Copy some of what is dirty from `dirty` on. Returns where to go on."""
        workers, bitmap, unit, size = self.workers, self._bitmap, self._unit, self._source.length
        assert workers is not None
        start = dirty - dirty % unit
        taken = self._locks.end_of_taken(start, start + unit)
        if taken:
            return -(-taken // unit) * unit
        zeroes, writes = False, bitmap.writes
        if not self._data_from <= start < self._data_until:
            zeroes, n = await self._look(start)
            if not zeroes:
                self._data_from, self._data_until = start, start + n
        if not zeroes:
            most = min(max(self._chunk // unit * unit, unit), -(-(self._data_until - start) // unit) * unit)
        elif start + n < size:
            most = n // unit * unit
        else:
            most = n
        end = min(start + most, size)
        clean = bitmap.next_zero(dirty, end)
        if clean is not None:
            end = min(-(-clean // unit) * unit, end)
        # Others may have copied it meanwhile, or have taken a part of it.
        end = self._locks.start_of_taken(start, end)
        if end <= start or (end % unit and end != size):
            return start + unit
        length = end - start
        piece = self._zero(start, length, writes) if zeroes else self._copy(start, length)
        await workers.run(0 if zeroes else min(length, self._chunk), piece)
        if not held:
            await self.throttle(length)
        return end

    async def _look(self, start: int) -> tuple[bool, int]:
        """Whether the source reads as zeroes from `start` on, and for how long; not if that is less than a piece. It
        may be otherwise by the time the piece is begun."""
        size = self._source.length
        try:
            (n, flags, _, _), _ = await self._source.block_status_above(None, start, min(_ZEROES, size - start))
        except OSError:
            # Reading it fails as well, and is told.
            return False, self._unit
        if flags & ZERO and (n >= self._unit or start + n >= size):
            return True, n
        return False, max(n, self._unit)

    # --- pieces ------------------------------------------------------------------------------------------------------

    def _take(self, start: int, length: int) -> bool:
        if not self._locks.try_take(start, start + length):
            return False
        # Before anything is looked at: what is written from now on is marked again.
        self._bitmap.clear(start, length)
        self._in_flight += length
        return True

    def _give_back(self, start: int, length: int, done: int) -> None:
        """`done` bytes have been copied, the rest is dirty."""
        if done < length:
            self._bitmap.mark(start + done, length - done)
        self._in_flight -= length
        self.progress_current += done
        self._locks.release(start, start + length)

    async def _copy(self, start: int, length: int) -> None:
        if not self._take(start, length):
            return
        done = 0
        try:
            while done < length:
                n = min(self._chunk, length - done)
                await self._transfer.copy(start + done, n)
                done += n
        except CopyError as exc:
            self._failed(exc.reading, exc.error)
        finally:
            self._give_back(start, length, done)

    async def _zero(self, start: int, length: int, writes: int) -> None:
        """Where the source was found to read as zeroes when it had been written to `writes` times."""
        if not self._take(start, length):
            return
        done = 0
        try:
            while done < length:
                n = length - done
                if self._bitmap.writes != writes:
                    (n, flags, _, _), _ = await self._source.block_status_above(None, start + done, n)
                    if not flags & ZERO:
                        break
                if not self._zeroes_count or not await self._reads_as_zeroes(start + done, n):
                    await self._transfer.zero(start + done, n)
                done += n
        except CopyError as exc:
            self._failed(exc.reading, exc.error)
        except OSError as exc:
            self._failed(True, exc)
        finally:
            # Where less than a unit is left of one, all of it is.
            whole = done if done == length else done // self._unit * self._unit
            self._give_back(start, length, whole)

    async def _reads_as_zeroes(self, start: int, length: int) -> bool:
        """Whether the target does already, as far as is easily known."""
        at, end = start, start + length
        for _ in range(_LOOKS):
            try:
                (n, flags, _, _), _ = await self._target.block_status_above(None, at, end - at)
            except OSError:
                return False
            if not n or not flags & ZERO:
                return False
            at += n
            if at >= end:
                return True
        return False

    def _failed(self, reading: bool, exc: OSError) -> None:
        self._failures += 1
        self._synced = False
        policy = self._options.on_source_error if reading else self._options.on_target_error
        action = self.error_action(policy, reading, exc.errno or errno.EIO)
        if action is BlockErrorAction.REPORT and self._error is None:
            self._error = exc
            # It is not going to be complete, so that users need not wait for it any more.
            self._filter.writer = None

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    # --- users' writes, with copy-mode=write-blocking ----------------------------------------------------------------

    async def pwritev(self, offset: int, length: int, iov: list[memoryview], flags: int) -> None:
        """A write to the source and to the target."""
        # Both must get the same bytes, whatever the user does with the buffers meanwhile.
        data = iovs.aligned_buffer(length)
        iovs.copy([data], iov)
        await self._write_both(
            offset,
            length,
            lambda: self._source.pwritev(offset, length, [data], flags),
            lambda: self._to.pwritev(offset, length, [data]),
        )

    async def pwrite_zeroes(self, offset: int, length: int, flags: int) -> None:
        """A write of zeroes to the source and to the target."""
        unmap = flags & MAY_UNMAP if self._options.unmap else 0
        await self._write_both(
            offset,
            length,
            lambda: self._source.pwrite_zeroes(offset, length, flags),
            lambda: self._to.pwrite_zeroes(offset, length, unmap),
        )

    async def _write_both(
        self,
        offset: int,
        length: int,
        to_source: Callable[[], Awaitable[None]],
        to_target: Callable[[], Awaitable[None]],
    ) -> None:
        bitmap, unit, size = self._bitmap, self._unit, self._source.length
        start, end = offset // unit * unit, min(-(-(offset + length) // unit) * unit, size)
        await self._locks.take(start, end)
        try:
            own = bitmap.expect(offset, length)
            try:
                await to_source()
            except BaseException:
                bitmap.settle(own)
                bitmap.mark(offset, length)
                raise
            bitmap.settle(own)
            if own.disturbed or not own.ended or self._filter.writer is None:
                bitmap.mark(offset, length)
                return
            await self._write_target(offset, length, start, end, to_target)
        finally:
            self._locks.release(start, end)

    async def _write_target(
        self, offset: int, length: int, start: int, end: int, to_target: Callable[[], Awaitable[None]]
    ) -> None:
        bitmap, granularity, stop = self._bitmap, self._bitmap.granularity, offset + length
        # What the write covers only in part stays as dirty, or as clean, as it is.
        low = -(-offset // granularity) * granularity
        high = stop if stop == self._source.length else stop // granularity * granularity
        all_of_it = self._whole_clusters and (start, end) != (offset, stop)
        if all_of_it:
            low, high = start, end
        if low < high:
            bitmap.clear(low, high - low)
        self._in_flight += length
        try:
            if all_of_it:
                await self._transfer.copy(start, end - start)
            else:
                await to_target()
            self.progress_current += length
        except CopyError as exc:
            bitmap.mark(start, end - start)
            self._failed(exc.reading, exc.error)
        except OSError as exc:
            bitmap.mark(offset, length)
            self._failed(False, exc)
        except BaseException:
            bitmap.mark(start, end - start)
            raise
        finally:
            self._in_flight -= length

    # --- what is asked of it -----------------------------------------------------------------------------------------

    def change(self, options: Any) -> None:
        mode = MirrorCopyMode.BACKGROUND
        if isinstance(options, BlockJobChangeOptionsMirror):
            # QSD does not mind another type, whose options have no mode.
            mode = options.copy_mode
        if mode is self._copy_mode:
            return
        if mode is MirrorCopyMode.BACKGROUND:
            raise Error(f"Change to copy mode '{mode}' is not implemented")
        self._copy_mode = mode
        if self._counting and self._error is None:
            self._filter.writer = self
        self._changed.set()

    def cancel_requested(self, force: bool) -> bool:
        return force or self.status not in (JobStatus.READY, JobStatus.STANDBY)

    def completing(self) -> None:
        if self._pivot:
            return
        node = self._node_to_replace()
        self._pivot = True
        if node is not self._source:
            blocker = op_blockers.Blocker("block device is in use by block-job-complete")
            node.op_blockers.append(blocker)
            self._replace_blocker = node, blocker

    def _node_to_replace(self) -> Node:
        name = self._options.replaces
        if name is None:
            return self._source
        node = self.graph.get(name)
        if node is None:
            raise Error(f"Node name '{name}' not found")
        return node

    # --- the end -----------------------------------------------------------------------------------------------------

    async def prepare(self) -> None:
        await self._leave(self._pivot)

    async def abort(self) -> None:
        if not self._left:
            await self._leave(False)
        if self.base_was_read_only and not self._target.read_only and self._target.opened:
            await read_only_again(self.graph, self._target)

    async def clean(self) -> None:
        await super().clean()
        await self._section.aclose()
        for node in (self._source, self._target):
            await self.graph.unref(node)

    async def _leave(self, pivot: bool) -> None:
        """Take the filter away, and with `pivot` let the target take the place of the source. Raises Error, and then
        the filter is still there."""
        graph, source, target, top = self.graph, self._source, self._target, self._top
        await self._section.enter_async_context(graph.drained(source, target))
        self._filter.writer = None
        source.dirty_bitmaps.discard(self._bitmap)
        if self._frozen:
            freezing.thaw(top, target)
            self._frozen = False
        if self._to.edge is not None:
            self.close_backend(self._to)
        self.remove_nodes()
        if self._replace_blocker is not None:
            node, blocker = self._replace_blocker
            node.op_blockers.remove(blocker)
            self._replace_blocker = None
        # Nobody asks for anything as long as the section lasts, and what is below may change.
        self._filter.stopped = True
        top.refresh_perms()
        change = Change()
        try:
            old = await self._prepare_pivot() if pivot else None
            lead_away(change, top, target if old is source else source)
            if old is not None:
                self._complete_chain(change)
                change.move_parents(old, target)
            change.check()
        except BaseException:
            change.undo()
            self._filter.stopped = False
            top.refresh_perms()
            raise
        change.commit()
        self._left = True
        for edge in change.removed:
            await graph.unref(edge.node)
        await graph.unref(top)

    async def _prepare_pivot(self) -> Node:
        """Make the target what it has to be in the place of the node that is returned. Raises Error."""
        graph, source, target = self.graph, self._source, self._target
        old = self._node_to_replace()
        if not can_replace(source, old):
            raise Error(
                f"Can no longer replace '{old.name}' by '{target.name}', because it can no longer be guaranteed that "
                "doing so would not lead to an abrupt change of visible data"
            )
        if target.read_only != old.read_only:
            await set_read_only(graph, target, old.read_only)
        node = _unfiltered(target)
        if self._options.backing is BackingMode.OPEN and node.driver.backing is None:
            known = node.driver.image_info()
            filename = known.get("backing_filename")
            if filename:
                await node.open_backing(filename, known.get("backing_filename_format"))
        return old

    def _complete_chain(self, change: Change) -> None:
        """The target gets the backing file of the source, or the source as that. Raises Error."""
        if self._options.backing is not BackingMode.OF_SOURCE:
            return
        node = _unfiltered(self._target)
        backing = self._source if self._options.sync is SyncMode.NONE else self._base
        if backing is node.driver.backing.node if node.driver.backing is not None else backing is None:
            return
        if node.driver.backing is not None:
            change.remove(node.driver.backing)
        if backing is not None:
            change.add(node, "backing", backing, ROLE_COW)


class ActiveCommitJob(MirrorJob):
    """A mirror to a layer below, which takes the place of the source in the end."""

    kind = JobType.COMMIT

    def change(self, options: Any) -> None:
        raise Error("Job type does not support change")

    def more_info(self) -> dict[str, Any]:
        return {}
