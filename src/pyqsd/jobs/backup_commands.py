"""``blockdev-backup`` and ``drive-backup``, as commands and as actions of ``transaction``."""

from __future__ import annotations

import asyncio
import errno
from contextlib import AsyncExitStack
from typing import Annotated

from msgspec import structs

from pyqsd.block import action, op_blockers
from pyqsd.block.action import Action, Transaction, TransactionAction
from pyqsd.block.cluster_copy import check_cluster_size
from pyqsd.block.dirty_bitmap import DirtyBitmap
from pyqsd.block.drive_image import NewImageMode, open_target
from pyqsd.block.driver import ROLE_COW, WRITE_COMPRESSED
from pyqsd.block.graph import Graph
from pyqsd.block.node import Node
from pyqsd.block.op_blockers import Op
from pyqsd.block.options import BlockdevDetectZeroesOptions, BlockdevDiscardOptions
from pyqsd.block.replace import Change
from pyqsd.jobs.backup import BackupJob, BitmapSyncMode, drop_filter, put_filter
from pyqsd.jobs.block_job import BlockdevOnError
from pyqsd.jobs.job import Jobs
from pyqsd.jobs.mirror import next_in_chain
from pyqsd.jobs.mirror_commands import MirrorSyncMode
from pyqsd.jobs.transaction import JobTransaction, job_transaction
from pyqsd.qapi.command import command
from pyqsd.qapi.errors import Error
from pyqsd.qapi.types import NULL, Features, Int64, Size, Struct

_INT_MAX = (1 << 31) - 1


class BackupPerf(Struct, kw_only=True):
    """How it is copied. `max_chunk`, `min_cluster_size`: bytes."""

    use_copy_range: bool | None = None
    max_workers: int | None = None
    max_chunk: Int64 | None = None
    min_cluster_size: Size | None = None


class BackupCommon(Struct, kw_only=True):
    """What both commands take. `speed`: bytes per second."""

    job_id: str | None = None
    device: str
    sync: MirrorSyncMode
    speed: int | None = None
    bitmap: str | None = None
    bitmap_mode: BitmapSyncMode | None = None
    compress: bool | None = None
    on_source_error: BlockdevOnError | None = None
    on_target_error: BlockdevOnError | None = None
    auto_finalize: bool | None = None
    auto_dismiss: bool | None = None
    filter_node_name: str | None = None
    discard_source: bool | None = None
    x_perf: Annotated[BackupPerf | None, Features("unstable")] = None


class BlockdevBackup(BackupCommon, kw_only=True):
    """`target`: the name of a node."""

    target: str


class DriveBackup(BackupCommon, kw_only=True):
    """`target`: the name of an image."""

    target: str
    format: str | None = None
    mode: NewImageMode | None = None


class BackupAction(Action):
    """``blockdev-backup``: the point in time is when it is prepared."""

    def __init__(self, transaction: JobTransaction, options: BlockdevBackup | DriveBackup) -> None:
        self._transaction = transaction
        self.options: BackupCommon = options
        self._target_name = options.target
        self._job: BackupJob | None = None
        self._stack = AsyncExitStack()

    def find_source(self) -> Node:
        """The node that is to be copied. Raises Error."""
        return self._transaction.graph.find(self.options.device)

    async def find_target(self, source: Node) -> Node:
        """The node that it is copied to. Raises Error."""
        return self._transaction.graph.find(self._target_name)

    async def prepare(self) -> None:
        graph = self._transaction.graph
        source = self.find_source()
        await self._stack.enter_async_context(graph.drained(source))
        target = await self.find_target(source)
        await self._stack.enter_async_context(graph.drained(target))
        await self._make_job(source, target)

    async def _make_job(self, source: Node, target: Node) -> None:
        options, graph = self.options, self._transaction.graph
        perf = options.x_perf or BackupPerf()
        sync, mode = options.sync, options.bitmap_mode
        bitmap, mode = _check_bitmap(source, options)
        workers = 64 if perf.max_workers is None else perf.max_workers
        chunk = perf.max_chunk or 0
        _check(source, target, bool(options.compress), workers, chunk)
        if bitmap is not None:
            if mode is not BitmapSyncMode.NEVER:
                bitmap.check()
            source.dirty_bitmaps.freeze(bitmap)
        try:
            if source.length != target.length:
                raise Error("Source and target image have different sizes")
            least = perf.min_cluster_size or 0
            check_cluster_size(least)
            top = await put_filter(
                graph,
                source,
                target,
                options.filter_node_name,
                least=least,
                discard_source=bool(options.discard_source),
            )
            try:
                past = top.driver.past
                assert past is not None
                copier = past.copier
                if chunk and chunk < copier.cluster:
                    raise Error(
                        f"Required max-chunk ({chunk}) is less than backup cluster size ({copier.cluster})",
                        errno.EINVAL,
                    )
                copier.discard_source = bool(options.discard_source)
                copier.configure(compress=bool(options.compress), offload=perf.use_copy_range is not False)
                if bitmap is not None and sync in (MirrorSyncMode.BITMAP, MirrorSyncMode.INCREMENTAL):
                    copier.replace(bitmap)
                self._job = BackupJob(
                    self._transaction.jobs,
                    options.job_id or "",
                    graph,
                    top,
                    source,
                    copying=sync is not MirrorSyncMode.NONE,
                    only_top=sync is MirrorSyncMode.TOP,
                    bitmap=bitmap,
                    bitmap_mode=mode,
                    workers=workers,
                    chunk=chunk,
                    on_source_error=options.on_source_error or BlockdevOnError.REPORT,
                    on_target_error=options.on_target_error or BlockdevOnError.REPORT,
                    speed=options.speed or 0,
                    auto_finalize=options.auto_finalize is not False,
                    auto_dismiss=options.auto_dismiss is not False,
                    group=self._transaction.group,
                )
            except BaseException:
                await drop_filter(graph, top)
                raise
        except BaseException:
            if bitmap is not None:
                source.dirty_bitmaps.reclaim(bitmap)
            raise

    async def commit(self) -> None:
        assert self._job is not None
        self._job.start()
        # It stands still until the end of the drain, and has said so before anything else is done.
        await asyncio.sleep(0)

    async def abort(self) -> None:
        assert self._job is not None
        self._job.cancel()
        await self._job.wait()

    async def clean(self) -> None:
        await self._stack.aclose()


def _check_bitmap(source: Node, options: BackupCommon) -> tuple[DirtyBitmap | None, BitmapSyncMode]:
    """The bitmap that is used, and how. Raises Error if that makes no sense."""
    sync, mode, name = options.sync, options.bitmap_mode, options.bitmap
    if sync in (MirrorSyncMode.BITMAP, MirrorSyncMode.INCREMENTAL) and name is None:
        raise Error(f"must provide a valid bitmap name for '{sync}' sync mode")
    if sync is MirrorSyncMode.INCREMENTAL:
        if mode not in (None, BitmapSyncMode.ON_SUCCESS):
            raise Error(f"Bitmap sync mode must be '{BitmapSyncMode.ON_SUCCESS}' when using sync mode '{sync}'")
        mode, sync = BitmapSyncMode.ON_SUCCESS, MirrorSyncMode.BITMAP
    if name is None:
        if mode is not None:
            raise Error("Cannot specify bitmap sync mode without a bitmap")
        return None, BitmapSyncMode.NEVER
    bitmap = source.dirty_bitmaps.get(name)
    if bitmap is None:
        raise Error(f"Bitmap '{name}' could not be found")
    if mode is None:
        raise Error("Bitmap sync mode must be given when providing a bitmap")
    bitmap.check(allow_readonly=True)
    if sync is MirrorSyncMode.NONE:
        raise Error(f"sync mode '{sync}' does not produce meaningful bitmap outputs")
    if mode is BitmapSyncMode.NEVER and sync is not MirrorSyncMode.BITMAP:
        raise Error(f"Bitmap sync mode '{mode}' has no meaningful effect when combined with sync mode '{sync}'")
    return bitmap, mode


def _check(source: Node, target: Node, compress: bool, workers: int, chunk: int) -> None:
    """Whether it can be done. Raises Error."""
    if source is target:
        raise Error("Source and target cannot be the same")
    if compress and not target.driver.write_flags & WRITE_COMPRESSED:
        raise Error("Compression is not supported for this drive ")
    op_blockers.check(source, Op.BACKUP_SOURCE)
    op_blockers.check(target, Op.BACKUP_TARGET)
    if not 1 <= workers <= _INT_MAX:
        raise Error(f"max-workers must be between 1 and {_INT_MAX}")
    if chunk < 0:
        raise Error("max-chunk must be zero (which means no limit) or positive")


class DriveBackupAction(BackupAction):
    """``drive-backup``: the target is made, or found, at a filename, and lives as long as the job."""

    def __init__(self, transaction: JobTransaction, options: DriveBackup) -> None:
        super().__init__(transaction, options)
        self._drive = options
        self._opened: Node | None = None

    async def find_target(self, source: Node) -> Node:
        drive = self._drive
        mode = drive.mode or NewImageMode.ABSOLUTE_PATHS
        backing = None
        if drive.sync is MirrorSyncMode.TOP:
            backing = next_in_chain(source)
            if backing is None:
                self.options = structs.replace(drive, sync=MirrorSyncMode.FULL)
        elif drive.sync is MirrorSyncMode.NONE:
            backing = source
        apart = drive.sync is MirrorSyncMode.NONE
        options = {
            # What is zeroed must hide what the image's own backing file has there.
            "backing": NULL if apart else None,
            "discard": BlockdevDiscardOptions.UNMAP,
            "detect_zeroes": BlockdevDetectZeroesOptions.UNMAP,
            "auto_read_only": False,
        }
        target = await open_target(source, drive.target, drive.format, mode, backing, None, options)
        self._opened = target
        if apart:
            _set_backing(target, source)
        return target

    async def clean(self) -> None:
        await super().clean()
        if self._opened is not None:
            # Only if it has come to nothing: the job has it.
            await self._transaction.graph.unref(self._opened)


def _set_backing(target: Node, source: Node) -> None:
    """What is not in the new image is still in the source. Raises Error."""
    if not target.driver.supports_backing:
        raise Error(f"Driver '{target.driver.name}' of node '{target.name}' does not support backing files")
    change = Change()
    try:
        change.add(target, "backing", source, ROLE_COW)
        change.check()
    except BaseException:
        change.undo()
        raise
    change.commit()


class BlockdevBackupWrapper(TransactionAction, tag="blockdev-backup"):
    """See the command."""

    GROUPED = True
    data: BlockdevBackup

    def action(self, transaction: Transaction) -> Action:
        return BackupAction(job_transaction(transaction), self.data)


@command("blockdev-backup", boxed=True)
async def blockdev_backup(jobs: Jobs, graph: Graph, /, options: BlockdevBackup) -> None:
    """Copy a node as it is now to another one, as a job."""
    await action.run(BackupAction(JobTransaction(graph, jobs), options))
    # It goes on, and says so, before the command returns.
    await asyncio.sleep(0)


class DriveBackupWrapper(TransactionAction, tag="drive-backup"):
    """See the command."""

    GROUPED = True
    data: DriveBackup

    def action(self, transaction: Transaction) -> Action:
        return DriveBackupAction(job_transaction(transaction), self.data)


@command("drive-backup", boxed=True, features=("deprecated",))
async def drive_backup(jobs: Jobs, graph: Graph, /, options: DriveBackup) -> None:
    """Copy a node as it is now into an image, which is made or found, as a job."""
    await action.run(DriveBackupAction(JobTransaction(graph, jobs), options))
    await asyncio.sleep(0)
