"""QMP commands that change the graph or a node of it."""

from __future__ import annotations

import errno
from typing import Final

from pyqsd.block import op_blockers
from pyqsd.block import permissions as perms
from pyqsd.block.backend import BlockBackend
from pyqsd.block.graph import Graph
from pyqsd.block.node import Node
from pyqsd.block.op_blockers import Op
from pyqsd.block.options import BlockdevOptions
from pyqsd.qapi.command import command
from pyqsd.qapi.errors import Error
from pyqsd.qapi.types import Uint64

#: The largest length of a node in bytes: the largest signed 64-bit number, in whole GiB.
MAX_LENGTH: Final = (1 << 63) - (1 << 30)


@command("blockdev-add", boxed=True)
async def blockdev_add(graph: Graph, /, options: BlockdevOptions) -> None:
    """Open a node."""
    await graph.add(options)


@command("blockdev-del")
async def blockdev_del(graph: Graph, /, *, node_name: str) -> None:
    """Close a node that nobody uses any more."""
    await graph.remove(node_name)


@command("blockdev-reopen")
async def blockdev_reopen(graph: Graph, /, *, options: list[BlockdevOptions]) -> None:
    """Give open nodes other options, all or nothing."""
    from pyqsd.block.reopen import reopen

    await reopen(graph, options)


@command("block_resize")
async def block_resize(graph: Graph, /, *, device: str | None = None, node_name: str | None = None, size: int) -> None:
    """Resize a node to `size` bytes. Devices do not exist here, so only `node_name` ever names something."""
    node = lookup(graph, device, node_name)
    if size < 0:
        raise Error("Parameter 'size' expects a >0 size")
    if size > MAX_LENGTH:
        raise Error(f"offset({size}) exceeds maximum({MAX_LENGTH})", errno.EIO)
    op_blockers.check(node, Op.RESIZE)
    backend = BlockBackend(graph, "an unnamed block device", perms.RESIZE, perms.ALL)
    backend.insert(node)
    try:
        async with graph.drained(node):
            await node.truncate(size)
    finally:
        backend.remove()


@command("block-set-write-threshold")
async def block_set_write_threshold(graph: Graph, /, *, node_name: str, write_threshold: Uint64) -> None:
    """Send BLOCK_WRITE_THRESHOLD once when a write goes beyond this offset in bytes; 0: never."""
    node = graph.get(node_name)
    if node is None:
        raise Error(f"Device '{node_name}' not found")
    node.write_threshold = write_threshold


def lookup(graph: Graph, device: str | None, node_name: str | None) -> Node:
    """The node that a command's `device` or `node_name` means. Raises Error."""
    node = graph.get(node_name or "")
    if node is None:
        raise Error(f"Cannot find device='{device or ''}' nor node-name='{node_name or ''}'")
    return node


def find_root(graph: Graph, name: str) -> Node:
    """The node `name`, which nobody uses but exports and such: a whole device. Raises Error."""
    node = graph.find(name)
    if any(isinstance(edge.parent, Node) or edge.parent.owner is not None for edge in node.parents):
        raise Error("Need a root block node")
    return node
