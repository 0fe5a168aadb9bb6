"""``blockdev-set-active``: giving an image to another program, and taking it back.

An inactive node writes nothing, and lets others write: its caches are on disk, and its file locks are given up. When it
becomes active again it reads its metadata anew, because the image may be another one by then.
"""

from __future__ import annotations

import errno
import logging
import os

from pyqsd.block import graph_perms
from pyqsd.block import permissions as perms
from pyqsd.block.backend import BlockBackend
from pyqsd.block.graph import Graph
from pyqsd.block.node import Node
from pyqsd.qapi.errors import Error, from_oserror

log = logging.getLogger(__name__)

_CHANGING = perms.WRITE | perms.WRITE_UNCHANGED


def _below(roots: list[Node]) -> list[Node]:
    """`roots` and all nodes below them, children before their parents."""
    return graph_perms.topological(roots)[::-1]


def _has_active_parent(node: Node) -> bool:
    return any(isinstance(edge.parent, Node) and edge.parent.active for edge in node.parents)


async def activate(graph: Graph, *roots: Node) -> None:
    """Make `roots` and everything below them active. Raises Error; what was made active by then stays so."""
    nodes = _below(list(roots))
    if all(node.active for node in nodes):
        return
    # The main child of an inactive node may be active; but what it knows of its file is as old.
    nodes = [node for node in nodes if not node.active or node.driver.is_protocol]
    async with graph.drained(*nodes):
        for node in nodes:
            if node.active:
                await _look_again(node)
            else:
                await _activate(node)


async def _look_again(node: Node) -> None:
    try:
        await node.driver.activate()
    except OSError as exc:
        raise from_oserror(exc, f"Could not activate node '{node.name}'") from exc
    node.reread_length()


async def _activate(node: Node) -> None:
    node.active = True
    try:
        graph_perms.refresh([node])
        await _look_again(node)
        node.refresh_limits()
        for edge in list(node.parents):
            if isinstance(edge.parent, BlockBackend):
                edge.parent.restore()
    except BaseException:
        node.active = False
        for edge in node.parents:
            if isinstance(edge.parent, BlockBackend):
                edge.parent.suspend()
        graph_perms.refresh([node])
        raise


async def inactivate(graph: Graph, node: Node) -> None:
    """Make `node` inactive, and everything below it that no other active node uses. Raises Error; what is inactive by
    then stays so."""
    if _has_active_parent(node):
        raise Error("Node has active parent node")
    async with graph.drained(*_below([node])):
        try:
            await _inactivate(node)
        except OSError as exc:
            raise from_oserror(exc, "Failed to inactivate node") from exc


async def inactivate_all(graph: Graph) -> None:
    """Make all nodes inactive. Raises Error; what is inactive by then stays so."""
    nodes = list(graph.nodes.values())
    async with graph.drained(*nodes):
        for node in nodes:
            if any(isinstance(edge.parent, Node) for edge in node.parents):
                continue
            try:
                await _inactivate(node)
            except OSError as exc:
                raise from_oserror(exc, "Failed to inactivate all nodes") from exc


async def _inactivate(node: Node) -> None:
    if not node.active:
        return
    backends = [edge.parent for edge in node.parents if isinstance(edge.parent, BlockBackend)]
    for backend in backends:
        backend.check_suspend()
    # Some nodes write to a child also while they are inactive.
    if any(edge.perm & _CHANGING and isinstance(edge.parent, Node) for edge in node.parents):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))
    try:
        # The driver's caches, and then all that the guest and the driver have written.
        await node.driver.inactivate()
        await node.flush()
    except Error as exc:
        raise OSError(exc.errno, os.strerror(exc.errno)) from exc
    for backend in backends:
        backend.suspend()
    node.active = False
    graph_perms.refresh([node])
    for child in reversed(list(node.children)):
        if not _has_active_parent(child.node):
            await _inactivate(child.node)
