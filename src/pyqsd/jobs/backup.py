"""The backup job: a node as it is when the job begins is copied to another one, while its users write to it.

A ``copy-before-write`` filter over the source copies what is about to be overwritten; the job copies everything else.
Both take what they copy out of the same bitmap (`pyqsd.block.cluster_copy`).

Offsets and lengths are bytes.
"""

from __future__ import annotations

import errno
from enum import StrEnum
from typing import Final

from pyqsd.block import permissions as perms
from pyqsd.block.block_copy import CopyError, Workers
from pyqsd.block.cluster_copy import AHEAD, CHUNK
from pyqsd.block.dirty_bitmap import DirtyBitmap
from pyqsd.block.events import BlockErrorAction
from pyqsd.block.graph import Graph
from pyqsd.block.node import Node
from pyqsd.block.replace import Change
from pyqsd.jobs.block_job import BlockdevOnError, BlockJob
from pyqsd.jobs.job import JobGroup, Jobs, JobType
from pyqsd.qapi.errors import Error

#: Bytes that are on their way at most, unless one piece is larger.
_MOST_BYTES: Final = 32 << 20
#: Tries again after an error that is ignored: at first at once, then after so many seconds, doubled every time.
_FIRST_WAIT: Final = 0.001
_LONGEST_WAIT: Final = 1.0


class BitmapSyncMode(StrEnum):
    """When a bitmap that a job uses becomes a record of what was written since."""

    ON_SUCCESS = "on-success"
    NEVER = "never"
    ALWAYS = "always"


class BackupJob(BlockJob):
    """Copies the source of `filter`, a ``copy-before-write`` node, to its target.

    Arguments:
        copying: False: only what is about to be overwritten is copied, until the job is cancelled.
        only_top: only what is in the source itself.
        bitmap, bitmap_mode: a bitmap of `bitmap_node` that is frozen, and what becomes of it; None: no bitmap.
        workers: pieces that are on their way at most.
        chunk: the largest piece of data, 0: what seems good.

    The rest as for `BlockJob`. Raises Error, and then there is no such job.
    """

    kind = JobType.BACKUP

    def __init__(
        self,
        jobs: Jobs,
        id: str | None,
        graph: Graph,
        filter: Node,
        source: Node,
        *,
        copying: bool = True,
        only_top: bool = False,
        bitmap: DirtyBitmap | None = None,
        bitmap_mode: BitmapSyncMode = BitmapSyncMode.NEVER,
        workers: int = 64,
        chunk: int = 0,
        on_source_error: BlockdevOnError = BlockdevOnError.REPORT,
        on_target_error: BlockdevOnError = BlockdevOnError.REPORT,
        speed: int = 0,
        auto_finalize: bool = True,
        auto_dismiss: bool = True,
        group: JobGroup | None = None,
    ) -> None:
        super().__init__(
            jobs,
            id,
            graph,
            filter,
            0,
            perms.ALL,
            speed=speed,
            auto_finalize=auto_finalize,
            auto_dismiss=auto_dismiss,
            group=group,
        )
        past = filter.driver.past
        assert past is not None
        self._filter = filter
        self._copier = past.copier
        self._bitmap_node = source
        self._bitmap = bitmap
        self._bitmap_mode = bitmap_mode
        self._copying = copying
        self._only_top = only_top
        self._most_workers = workers
        self._chunk = chunk or CHUNK
        self._on_error = {True: on_source_error, False: on_target_error}
        self._wait = 0.0
        self.add_node("target", past.target.node, 0, perms.ALL)
        self._copier.on_copied = self._copied
        self._copier.on_skipped = self._skipped
        self._skipped()

    def _copied(self, length: int) -> None:
        self._wait = 0.0
        self.advance(length)

    def _skipped(self) -> None:
        self.expect(self._copier.left)

    # --- the work ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        if self._only_top:
            at = 0
            while at < self._copier.to_copy.size:
                at = await self._copier.skip_unallocated(at)
                await self.throttle(0)
            self._skipped()
        while not self._copying:
            await self.sleep(3600)
        done = False
        while not done:
            try:
                await self._copy()
                if not self._copier.left:
                    await self._flush()
                    done = True
            except CopyError as exc:
                await self._failed(exc)

    async def _flush(self) -> None:
        """The target is on the disk before anybody is told that it is complete, and before the bitmap that says what it
        lacks is cleared. (QSD leaves that to whoever closes it, who will not hear of an error.) Raises CopyError."""
        past = self._filter.driver.past
        assert past is not None
        try:
            await past.target.node.flush()
        except OSError as exc:
            raise CopyError(False, exc) from exc

    async def _copy(self) -> None:
        """Once through all that is to be copied. Raises CopyError."""
        copier = self._copier
        at = 0
        async with Workers(self._most_workers, max(_MOST_BYTES, self._chunk)) as workers:
            self.workers = workers
            while (found := await copier.next_piece(at, self._chunk, self._most_zero)) is not None:
                piece, zero = found
                at = piece.end
                length = piece.end - piece.start
                try:
                    await workers.run(length if not zero else 0, copier.do(piece, zero))
                except BaseException:
                    # It was not begun.
                    copier.put_back(piece)
                    raise
                await self.throttle(length)
        # What others have taken may come back if they fail.
        await copier.pieces.wait_for_all()
        await self.pause_point()

    @property
    def _most_zero(self) -> int:
        """Bytes of zeroes that are written at once; they count for the speed as much as others."""
        return min(self._chunk, CHUNK) if self.speed else AHEAD

    async def _failed(self, failure: CopyError) -> None:
        """A request failed. Raises OSError if that is the end of it."""
        error = failure.error
        number = error.errno or errno.EIO
        if self.error_action(self._on_error[failure.reading], failure.reading, number) is BlockErrorAction.REPORT:
            raise error
        await self.pause_point()
        if self._wait:
            # What fails again and again is not tried as fast as it fails.
            await self.sleep(self._wait)
        self._wait = min(max(2 * self._wait, _FIRST_WAIT), _LONGEST_WAIT)

    # --- its end -----------------------------------------------------------------------------------------------------

    async def commit(self) -> None:
        self._release_bitmap(True)

    async def abort(self) -> None:
        self._release_bitmap(False)

    def _release_bitmap(self, success: bool) -> None:
        bitmap, self._bitmap = self._bitmap, None
        if bitmap is None:
            return
        bitmaps = self._bitmap_node.dirty_bitmaps
        mode = self._bitmap_mode
        if mode is BitmapSyncMode.ALWAYS or (success and mode is BitmapSyncMode.ON_SUCCESS):
            bitmap = bitmaps.abdicate(bitmap)
            if not success:
                # What was not copied is still to be copied by the next one.
                bitmap.merge(self._copier.to_copy)
        else:
            bitmaps.reclaim(bitmap)

    async def clean(self) -> None:
        self._copier.on_copied = self._copier.on_skipped = None
        # The filter is closed, and the target if nobody else uses it, once nobody holds them.
        self.remove_nodes()
        await drop_filter(self.graph, self._filter)
        await super().clean()


async def put_filter(
    graph: Graph, source: Node, target: Node, name: str | None, *, least: int, discard_source: bool
) -> Node:
    """Put a ``copy-before-write`` node called `name` over `source`, in whose place everybody uses it from now on; the
    graph around `source` is drained. Raises Error, and then nothing has changed."""
    from pyqsd.drivers.filters.copy_before_write import Options

    options = Options(node_name=name, file=source.name, target=target.name, min_cluster_size=least)
    try:
        top = await graph.open_unattached(options)
    except Error as exc:
        raise exc.prefixed("Could not create node: ") from exc
    top.job_owned = True
    change = Change()
    try:
        top.driver.discard_source = discard_source  # type: ignore[attr-defined]
        change.move_parents(source, top)
        change.check()
    except BaseException:
        change.undo()
        await graph.unref(top)
        raise
    change.commit()
    return top


async def drop_filter(graph: Graph, top: Node) -> None:
    """Take the filter away again."""
    child = top.driver.file
    assert child is not None
    async with graph.drained(top):
        change = Change()
        change.move_parents(top, child.node)
        try:
            change.check()
        except Error:
            change.undo()
            raise
        change.commit()
    await graph.unref(top)
