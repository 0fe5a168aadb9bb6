"""The QMP commands that start a mirror: ``blockdev-mirror`` to a node, ``drive-mirror`` to an image at a filename."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from pyqsd.block import op_blockers
from pyqsd.block.drive_image import NewImageMode, open_target
from pyqsd.block.graph import Graph
from pyqsd.block.node import Node
from pyqsd.block.op_blockers import Op
from pyqsd.jobs.block_job import BlockdevOnError
from pyqsd.jobs.block_job_commands import MirrorCopyMode
from pyqsd.jobs.job import Jobs
from pyqsd.jobs.mirror import BackingMode, MirrorOptions, SyncMode, can_replace, next_in_chain, start_mirror
from pyqsd.qapi.command import command
from pyqsd.qapi.errors import Error
from pyqsd.qapi.types import Struct, Uint32

_LEAST_GRANULARITY: Final = 512
_MOST_GRANULARITY: Final = 64 << 20


class MirrorSyncMode(StrEnum):
    """What of the source is copied. Mirrors know only the first three."""

    TOP = "top"
    FULL = "full"
    NONE = "none"
    INCREMENTAL = "incremental"
    BITMAP = "bitmap"


def find_root(graph: Graph, name: str) -> Node:
    """The node `name`, which no node and no job uses. Raises Error."""
    node = graph.get(name)
    if node is None:
        raise Error(f"Cannot find device='{name}' nor node-name='{name}'")
    if any(isinstance(edge.parent, Node) or edge.parent.owner is not None for edge in node.parents):
        raise Error("Need a root block node")
    return node


@command("blockdev-mirror")
async def blockdev_mirror(
    jobs: Jobs,
    graph: Graph,
    /,
    *,
    job_id: str | None = None,
    device: str,
    target: str,
    replaces: str | None = None,
    sync: MirrorSyncMode,
    speed: int = 0,
    granularity: Uint32 = 0,
    buf_size: int = 0,
    on_source_error: BlockdevOnError = BlockdevOnError.REPORT,
    on_target_error: BlockdevOnError = BlockdevOnError.REPORT,
    filter_node_name: str | None = None,
    copy_mode: MirrorCopyMode = MirrorCopyMode.BACKGROUND,
    auto_finalize: bool = True,
    auto_dismiss: bool = True,
) -> None:
    """Make the node `target` the same as the node `device`, and keep it so."""
    source = find_root(graph, device)
    to = graph.get(target)
    if to is None:
        raise Error(f"Cannot find device='{target}' nor node-name='{target}'")
    options = MirrorOptions(
        granularity=granularity,
        buf_size=buf_size,
        on_source_error=on_source_error,
        on_target_error=on_target_error,
        copy_mode=copy_mode,
        replaces=replaces,
        filter_node_name=filter_node_name,
        speed=speed,
        auto_finalize=auto_finalize,
        auto_dismiss=auto_dismiss,
    )
    await _mirror(jobs, graph, job_id, source, to, sync, options)


class DriveMirror(Struct, kw_only=True):
    """The arguments of ``drive-mirror``."""

    job_id: str | None = None
    device: str
    target: str
    format: str | None = None
    node_name: str | None = None
    replaces: str | None = None
    sync: MirrorSyncMode
    mode: NewImageMode = NewImageMode.ABSOLUTE_PATHS
    speed: int = 0
    granularity: Uint32 = 0
    buf_size: int = 0
    on_source_error: BlockdevOnError = BlockdevOnError.REPORT
    on_target_error: BlockdevOnError = BlockdevOnError.REPORT
    unmap: bool = True
    copy_mode: MirrorCopyMode = MirrorCopyMode.BACKGROUND
    auto_finalize: bool = True
    auto_dismiss: bool = True


@command("drive-mirror", boxed=True)
async def drive_mirror(jobs: Jobs, graph: Graph, /, options: DriveMirror) -> None:
    """Make the image `target` the same as the node `device`, and keep it so."""
    source = find_root(graph, options.device)
    op_blockers.check(source, Op.MIRROR_SOURCE)
    if options.replaces is not None and options.node_name is None:
        raise Error("a node-name must be provided when replacing a named node of the graph")
    backing = {MirrorSyncMode.TOP: next_in_chain(source), MirrorSyncMode.NONE: source}.get(options.sync)
    new = options.mode is NewImageMode.ABSOLUTE_PATHS
    target = await open_target(source, options.target, options.format, options.mode, backing, options.node_name)
    try:
        how = MirrorOptions(
            granularity=options.granularity,
            buf_size=options.buf_size,
            on_source_error=options.on_source_error,
            on_target_error=options.on_target_error,
            copy_mode=options.copy_mode,
            unmap=options.unmap,
            replaces=options.replaces,
            backing=BackingMode.OF_SOURCE if new else BackingMode.OPEN,
            # Only files are made, and these are zeroes.
            zero_target=not new,
            speed=options.speed,
            auto_finalize=options.auto_finalize,
            auto_dismiss=options.auto_dismiss,
        )
        await _mirror(jobs, graph, options.job_id, source, target, options.sync, how)
    finally:
        # Only if it has come to nothing: the job has it.
        await graph.unref(target)


async def _mirror(
    jobs: Jobs,
    graph: Graph,
    job_id: str | None,
    source: Node,
    target: Node,
    sync: MirrorSyncMode,
    options: MirrorOptions,
) -> None:
    granularity = options.granularity
    if granularity and not _LEAST_GRANULARITY <= granularity <= _MOST_GRANULARITY:
        raise Error("Parameter 'granularity' expects a value in range [512B, 64MB]")
    if granularity & (granularity - 1):
        raise Error("Parameter 'granularity' expects a power of 2")
    op_blockers.check(source, Op.MIRROR_SOURCE)
    op_blockers.check(target, Op.MIRROR_TARGET)
    if options.replaces is not None:
        _check_replaceable(graph, source, options.replaces)
    if sync in (MirrorSyncMode.INCREMENTAL, MirrorSyncMode.BITMAP):
        raise Error(f"Sync mode '{sync}' not supported")
    options.sync = SyncMode(sync)
    if options.sync is SyncMode.TOP and next_in_chain(source) is None:
        options.sync = SyncMode.FULL
    options.zero_target = options.zero_target and sync is MirrorSyncMode.FULL
    await start_mirror(jobs, graph, job_id or "", source, target, options)


def _check_replaceable(graph: Graph, source: Node, name: str) -> None:
    node = graph.get(name)
    if node is None:
        raise Error(f"Failed to find node with node-name='{name}'")
    op_blockers.check(node, Op.REPLACE)
    if not can_replace(source, node):
        raise Error(
            f"Cannot replace '{name}' by a node mirrored from '{source.name}', because it cannot be guaranteed that "
            "doing so would not lead to an abrupt change of visible data"
        )
    if node.length != source.length:
        raise Error("cannot replace image with a mirror image of different size")
