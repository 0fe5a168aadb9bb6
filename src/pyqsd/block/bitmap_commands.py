"""QMP commands for dirty bitmaps; those that change something are actions of ``transaction`` too."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Annotated

from pyqsd.block import action
from pyqsd.block.action import Transaction, TransactionAction
from pyqsd.block.dirty_bitmap import MAX_GRANULES_SHIFT, MAX_NAME, MIN_GRANULARITY, DirtyBitmap, default_granularity
from pyqsd.block.graph import Graph
from pyqsd.block.info import BlockDirtyBitmapSha256
from pyqsd.block.node import Node
from pyqsd.qapi.command import command
from pyqsd.qapi.errors import Error
from pyqsd.qapi.types import Alternate, Struct, Uint32

log = logging.getLogger(__name__)


class BlockDirtyBitmap(Struct):
    """Names a bitmap: the node that it belongs to, and its own name."""

    node: str
    name: str


class BlockDirtyBitmapAdd(Struct, kw_only=True):
    """A new bitmap; `granularity` in bytes (the cluster size, between 4 and 64 KiB, by default)."""

    node: str
    name: str
    granularity: Uint32 | None = None
    persistent: bool | None = None
    disabled: bool | None = None


#: A bitmap of the node in question, or of any node.
BlockDirtyBitmapOrStr = Annotated[str | BlockDirtyBitmap, Alternate("BlockDirtyBitmapOrStr")]


class BlockDirtyBitmapMerge(Struct):
    """What is to be merged from where into the bitmap `target` of `node`."""

    node: str
    target: str
    bitmaps: list[BlockDirtyBitmapOrStr]


def find_bitmap(graph: Graph, node_name: str, name: str) -> tuple[Node, DirtyBitmap]:
    """The bitmap `name` of the node. Raises Error."""
    node = graph.get(node_name)
    if node is None:
        raise Error(f"Node '{node_name}' not found")
    bitmap = node.dirty_bitmaps.get(name)
    if bitmap is None:
        raise Error(f"Dirty bitmap '{name}' not found")
    return node, bitmap


class AddBitmapAction(action.Action):
    """``block-dirty-bitmap-add``."""

    def __init__(self, graph: Graph, options: BlockDirtyBitmapAdd) -> None:
        self._graph = graph
        self._options = options
        self._node: Node | None = None
        self._bitmap: DirtyBitmap | None = None

    async def prepare(self) -> None:
        options = self._options
        name, granularity = options.name, options.granularity
        node = self._node = self._graph.find(options.node)
        if not name:
            raise Error("Bitmap name cannot be empty")
        if granularity is None:
            granularity = default_granularity(node.driver.image_info().get("cluster_size") or 0)
        elif granularity < MIN_GRANULARITY or granularity & (granularity - 1):
            raise Error("Granularity must be power of 2 and at least 512")
        if node.length // granularity >> MAX_GRANULES_SHIFT:
            raise Error(f"Granularity {granularity} is too small for a node of {node.length} bytes")
        if options.persistent:
            await node.driver.check_new_bitmap(name, granularity)
        if name in node.dirty_bitmaps:
            raise Error(f"Bitmap already exists: {name}")
        if len(name.encode()) > MAX_NAME:
            raise Error(f"Bitmap name too long: {name}")
        bitmap = DirtyBitmap(
            name, node.length, granularity, persistent=bool(options.persistent), enabled=not options.disabled
        )
        node.dirty_bitmaps.add(bitmap)
        self._bitmap = bitmap

    async def abort(self) -> None:
        assert self._node is not None and self._bitmap is not None
        self._node.dirty_bitmaps.discard(self._bitmap)


class BitmapAction(action.Action):
    """Base of what changes a bitmap that is there."""

    def __init__(self, graph: Graph, options: BlockDirtyBitmap) -> None:
        self.graph = graph
        self.options = options

    def find(self, *, allow_readonly: bool = False, allow_inconsistent: bool = False) -> tuple[Node, DirtyBitmap]:
        """The bitmap, which may be changed. Raises Error."""
        node, bitmap = find_bitmap(self.graph, self.options.node, self.options.name)
        bitmap.check(allow_readonly=allow_readonly, allow_inconsistent=allow_inconsistent)
        return node, bitmap


class RemoveBitmapAction(BitmapAction):
    """``block-dirty-bitmap-remove``: from the image first, as that can fail."""

    _found: tuple[Node, DirtyBitmap]
    _restore: Callable[[], Awaitable[None]] | None = None

    async def prepare(self) -> None:
        node, bitmap = self._found = self.find(allow_inconsistent=True)
        bitmap.busy = True
        try:
            if bitmap.persistent:
                self._restore = await node.driver.remove_bitmap(bitmap.name)
        except BaseException:
            bitmap.busy = False
            raise

    async def commit(self) -> None:
        node, bitmap = self._found
        bitmap.busy = False
        node.dirty_bitmaps.discard(bitmap)

    async def abort(self) -> None:
        node, bitmap = self._found
        bitmap.busy = False
        if self._restore is not None:
            try:
                await self._restore()
            except (Error, OSError) as exc:
                # It is stored with all others in the end, unless it is one that cannot be used anyway.
                log.warning("bitmap '%s' is not in the image of node '%s' for now: %s", bitmap.name, node.name, exc)


class ClearBitmapAction(BitmapAction):
    """``block-dirty-bitmap-clear``."""

    _bitmap: DirtyBitmap
    _old: DirtyBitmap

    async def prepare(self) -> None:
        _, bitmap = self.find()
        self._bitmap = bitmap
        self._old = DirtyBitmap("", bitmap.size, bitmap.granularity)
        bitmap.exchange(self._old)

    async def abort(self) -> None:
        self._bitmap.merge(self._old)


class EnableBitmapAction(BitmapAction):
    """``block-dirty-bitmap-enable`` and ``block-dirty-bitmap-disable``."""

    _bitmap: DirtyBitmap
    _before: bool

    def __init__(self, graph: Graph, options: BlockDirtyBitmap, enabled: bool) -> None:
        super().__init__(graph, options)
        self._enabled = enabled

    async def prepare(self) -> None:
        _, bitmap = self.find(allow_readonly=True)
        self._bitmap, self._before = bitmap, bitmap.enabled
        bitmap.enabled = self._enabled

    async def abort(self) -> None:
        self._bitmap.enabled = self._before


class MergeBitmapAction(action.Action):
    """``block-dirty-bitmap-merge``."""

    _target: DirtyBitmap
    _old: DirtyBitmap

    def __init__(self, graph: Graph, options: BlockDirtyBitmapMerge) -> None:
        self._graph = graph
        self._options = options

    async def prepare(self) -> None:
        options = self._options
        owner, target = find_bitmap(self._graph, options.node, options.target)
        target.check()
        sources: list[DirtyBitmap] = []
        for reference in options.bitmaps:
            if isinstance(reference, str):
                source = owner.dirty_bitmaps.get(reference)
                if source is None:
                    raise Error(f"Dirty bitmap '{reference}' not found")
            else:
                _, source = find_bitmap(self._graph, reference.node, reference.name)
            source.check(allow_readonly=True)
            target.check_merge(source)
            sources.append(source)
        merged = target.copy()
        for source in sources:
            merged.merge(source)
        target.exchange(merged)
        self._target, self._old = target, merged

    async def abort(self) -> None:
        self._target.exchange(self._old)


class BlockDirtyBitmapAddWrapper(TransactionAction, tag="block-dirty-bitmap-add"):
    """See the command."""

    data: BlockDirtyBitmapAdd

    def action(self, transaction: Transaction) -> action.Action:
        return AddBitmapAction(transaction.graph, self.data)


class BlockDirtyBitmapRemoveWrapper(TransactionAction, tag="block-dirty-bitmap-remove"):
    """See the command."""

    data: BlockDirtyBitmap

    def action(self, transaction: Transaction) -> action.Action:
        return RemoveBitmapAction(transaction.graph, self.data)


class BlockDirtyBitmapClearWrapper(TransactionAction, tag="block-dirty-bitmap-clear"):
    """See the command."""

    data: BlockDirtyBitmap

    def action(self, transaction: Transaction) -> action.Action:
        return ClearBitmapAction(transaction.graph, self.data)


class BlockDirtyBitmapEnableWrapper(TransactionAction, tag="block-dirty-bitmap-enable"):
    """See the command."""

    data: BlockDirtyBitmap

    def action(self, transaction: Transaction) -> action.Action:
        return EnableBitmapAction(transaction.graph, self.data, True)


class BlockDirtyBitmapDisableWrapper(TransactionAction, tag="block-dirty-bitmap-disable"):
    """See the command."""

    data: BlockDirtyBitmap

    def action(self, transaction: Transaction) -> action.Action:
        return EnableBitmapAction(transaction.graph, self.data, False)


class BlockDirtyBitmapMergeWrapper(TransactionAction, tag="block-dirty-bitmap-merge"):
    """See the command."""

    data: BlockDirtyBitmapMerge

    def action(self, transaction: Transaction) -> action.Action:
        return MergeBitmapAction(transaction.graph, self.data)


@command("block-dirty-bitmap-add", boxed=True)
async def block_dirty_bitmap_add(graph: Graph, /, options: BlockDirtyBitmapAdd) -> None:
    """Start to record writes."""
    await action.run(AddBitmapAction(graph, options))


@command("block-dirty-bitmap-remove", boxed=True)
async def block_dirty_bitmap_remove(graph: Graph, /, options: BlockDirtyBitmap) -> None:
    """Forget a bitmap, also the one in the image."""
    await action.run(RemoveBitmapAction(graph, options))


@command("block-dirty-bitmap-clear", boxed=True)
async def block_dirty_bitmap_clear(graph: Graph, /, options: BlockDirtyBitmap) -> None:
    """Mark everything as clean."""
    await action.run(ClearBitmapAction(graph, options))


@command("block-dirty-bitmap-enable", boxed=True)
async def block_dirty_bitmap_enable(graph: Graph, /, options: BlockDirtyBitmap) -> None:
    """Record writes from now on."""
    await action.run(EnableBitmapAction(graph, options, True))


@command("block-dirty-bitmap-disable", boxed=True)
async def block_dirty_bitmap_disable(graph: Graph, /, options: BlockDirtyBitmap) -> None:
    """Record no more writes."""
    await action.run(EnableBitmapAction(graph, options, False))


@command("block-dirty-bitmap-merge", boxed=True)
async def block_dirty_bitmap_merge(graph: Graph, /, options: BlockDirtyBitmapMerge) -> None:
    """Mark in `target` everything that is dirty in any of `bitmaps`; all or nothing."""
    await action.run(MergeBitmapAction(graph, options))


@command("x-debug-block-dirty-bitmap-sha256", features=("unstable",))
async def x_debug_block_dirty_bitmap_sha256(graph: Graph, /, *, node: str, name: str) -> BlockDirtyBitmapSha256:
    """The digest of a bitmap's bits."""
    _, bitmap = find_bitmap(graph, node, name)
    return BlockDirtyBitmapSha256(sha256=bitmap.sha256())
