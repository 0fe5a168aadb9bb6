"""QMP commands for dirty bitmaps."""

from __future__ import annotations

from typing import Annotated

from pyqsd.block.dirty_bitmap import MAX_NAME, MIN_GRANULARITY, DirtyBitmap, default_granularity
from pyqsd.block.graph import Graph
from pyqsd.block.info import BlockDirtyBitmapSha256
from pyqsd.block.node import Node
from pyqsd.qapi.command import command
from pyqsd.qapi.errors import Error
from pyqsd.qapi.types import Alternate, Struct, Uint32


class BlockDirtyBitmap(Struct):
    """Names a bitmap: the node that it belongs to, and its own name."""

    node: str
    name: str


#: A bitmap of the node in question, or of any node.
BlockDirtyBitmapOrStr = Annotated[str | BlockDirtyBitmap, Alternate("BlockDirtyBitmapOrStr")]


def find_bitmap(graph: Graph, node_name: str, name: str) -> tuple[Node, DirtyBitmap]:
    """The bitmap `name` of the node. Raises Error."""
    node = graph.get(node_name)
    if node is None:
        raise Error(f"Node '{node_name}' not found")
    bitmap = node.dirty_bitmaps.get(name)
    if bitmap is None:
        raise Error(f"Dirty bitmap '{name}' not found")
    return node, bitmap


@command("block-dirty-bitmap-add")
async def block_dirty_bitmap_add(
    graph: Graph,
    /,
    *,
    node: str,
    name: str,
    granularity: Uint32 | None = None,
    persistent: bool | None = None,
    disabled: bool | None = None,
) -> None:
    """Start to record writes; `granularity` in bytes (the cluster size, between 4 and 64 KiB, by default)."""
    target = graph.find(node)
    if not name:
        raise Error("Bitmap name cannot be empty")
    if granularity is None:
        granularity = default_granularity(target.driver.image_info().get("cluster_size") or 0)
    elif granularity < MIN_GRANULARITY or granularity & (granularity - 1):
        raise Error("Granularity must be power of 2 and at least 512")
    if persistent:
        await target.driver.check_new_bitmap(name, granularity)
    if name in target.dirty_bitmaps:
        raise Error(f"Bitmap already exists: {name}")
    if len(name.encode()) > MAX_NAME:
        raise Error(f"Bitmap name too long: {name}")
    target.dirty_bitmaps.add(
        DirtyBitmap(name, target.length, granularity, persistent=bool(persistent), enabled=not disabled)
    )


@command("block-dirty-bitmap-remove")
async def block_dirty_bitmap_remove(graph: Graph, /, *, node: str, name: str) -> None:
    """Forget a bitmap, also the one in the image."""
    owner, bitmap = find_bitmap(graph, node, name)
    bitmap.check(allow_inconsistent=True)
    if bitmap.persistent:
        await owner.driver.remove_bitmap(name)
    owner.dirty_bitmaps.pop(name, None)


@command("block-dirty-bitmap-clear")
async def block_dirty_bitmap_clear(graph: Graph, /, *, node: str, name: str) -> None:
    """Mark everything as clean."""
    _, bitmap = find_bitmap(graph, node, name)
    bitmap.check()
    bitmap.clear()


@command("block-dirty-bitmap-enable")
async def block_dirty_bitmap_enable(graph: Graph, /, *, node: str, name: str) -> None:
    """Record writes from now on."""
    _, bitmap = find_bitmap(graph, node, name)
    bitmap.check(allow_readonly=True)
    bitmap.enabled = True


@command("block-dirty-bitmap-disable")
async def block_dirty_bitmap_disable(graph: Graph, /, *, node: str, name: str) -> None:
    """Record no more writes."""
    _, bitmap = find_bitmap(graph, node, name)
    bitmap.check(allow_readonly=True)
    bitmap.enabled = False


@command("block-dirty-bitmap-merge")
async def block_dirty_bitmap_merge(
    graph: Graph, /, *, node: str, target: str, bitmaps: list[BlockDirtyBitmapOrStr]
) -> None:
    """Mark in `target` everything that is dirty in any of `bitmaps`; all or nothing."""
    owner, into = find_bitmap(graph, node, target)
    into.check()
    sources: list[DirtyBitmap] = []
    for reference in bitmaps:
        if isinstance(reference, str):
            source = owner.dirty_bitmaps.get(reference)
            if source is None:
                raise Error(f"Dirty bitmap '{reference}' not found")
        else:
            _, source = find_bitmap(graph, reference.node, reference.name)
        source.check(allow_readonly=True)
        into.check_merge(source)
        sources.append(source)
    for source in sources:
        into.merge(source)


@command("x-debug-block-dirty-bitmap-sha256", features=("unstable",))
async def x_debug_block_dirty_bitmap_sha256(graph: Graph, /, *, node: str, name: str) -> BlockDirtyBitmapSha256:
    """The digest of a bitmap's bits."""
    _, bitmap = find_bitmap(graph, node, name)
    return BlockDirtyBitmapSha256(sha256=bitmap.sha256())
