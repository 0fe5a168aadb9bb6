"""Exchanging edges of the graph so that it can be taken back: what `blockdev-reopen` and snapshots are made of.

A `Change` collects new edges, removed ones and edges that lead to another node. `check` works out all permissions with
them; until `commit`, `undo` puts every list back as it was. Whoever uses it has drained the part concerned.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable

from pyqsd.block import freezing, graph_perms
from pyqsd.block import permissions as perms
from pyqsd.block.child import Child
from pyqsd.block.graph import Graph, is_below
from pyqsd.block.node import Node
from pyqsd.qapi.errors import Error

log = logging.getLogger(__name__)


class Change:
    """Edges that are being exchanged. Until `commit` the drivers are not told of anything."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []
        self._roots: list[Node] = []
        self._edges: list[Child] = []
        self._committed = False
        #: The edges that are gone; whoever commits gives their nodes to `Graph.unref`.
        self.removed: list[Child] = []

    def remove(self, child: Child) -> None:
        """Take the edge of a node away. Raises Error if it is frozen."""
        assert isinstance(child.parent, Node)
        freezing.check_droppable(child)
        self._roots += [child.parent, child.node]
        self._undo.append(_putting_back(child))
        Graph.unlink(child)
        self.removed.append(child)

    def add(self, parent: Node, name: str, node: Node, role: int) -> Child:
        """Make `node` the child `name` of `parent`. Raises Error if that would be a cycle, or cannot be."""
        if parent is node or is_below(parent, node):
            raise Error(f"Making '{node.name}' a {name} child of '{parent.name}' would create a cycle")
        if parent.active and not node.active:
            raise Error(f"Inactive '{node.name}' can't be a {name} child of active '{parent.name}'")
        self._roots += [parent, node]
        child = Child(parent, name, node, role, 0, perms.ALL)
        self._undo.append(_taking_away(child))
        Graph.link(child)
        self._edges.append(child)
        return child

    def move_parents(self, old: Node, new: Node) -> None:
        """Everybody who uses `old` uses `new` instead, but for `new` itself and what it is made of. Raises Error, and
        then some may do so already: `undo`."""
        self._roots += [old, new]
        for edge in list(old.parents):
            if edge.parent is new or (isinstance(edge.parent, Node) and is_below(edge.parent, new)):
                continue
            if edge.frozen:
                raise Error(f"Cannot change '{edge.name}' link to '{edge.node.name}'", errno.EPERM)
            self._retarget(edge, new)

    def _retarget(self, edge: Child, new: Node) -> None:
        old = edge.node
        self._undo.append(_leading_back(edge, old, new))
        old.parents.remove(edge)
        new.parents.insert(0, edge)
        edge.node = new
        self._edges.append(edge)

    def check(self) -> None:
        """Work out all permissions. Raises Error, and then they are as before; `undo` does the rest."""
        graph_perms.refresh(self._roots)

    def undo(self) -> None:
        """Put everything back, permissions included if `check` has changed them, also after `commit`."""
        for step in reversed(self._undo):
            step()
        try:
            graph_perms.refresh(self._roots)
        except Error as exc:
            # Only a file lock that was given up can be the reason: another program has it now.
            log.error("a change of the block graph was taken back, but not all of it: %s", exc.desc)
        if self._committed:
            self._tell()

    def commit(self) -> None:
        """Tell the parents: they have another child, perhaps of another size."""
        self._committed = True
        self._tell()

    def _tell(self) -> None:
        for edge in self._edges:
            parent = edge.parent
            if isinstance(parent, Node):
                parent.driver.child_changed(edge)
            edge.node.refresh_limits()
            parent.child_resized(edge)


# Each step is taken back by itself: others (exports that come and go, the end of a job) may have changed other edges of
# the same nodes since, and those stay as they are.


def _putting_back(child: Child) -> Callable[[], None]:
    parent, node = child.parent, child.node
    assert isinstance(parent, Node)
    above, below = node.parents.index(child), parent.children.index(child)
    driver = parent.driver
    was_file, was_backing = driver.file is child, driver.backing is child

    def undo() -> None:
        node.parents.insert(above, child)
        parent.children.insert(below, child)
        if was_file:
            driver.file = child
        if was_backing:
            driver.backing = child

    return undo


def _taking_away(child: Child) -> Callable[[], None]:
    parent = child.parent
    assert isinstance(parent, Node)
    driver = parent.driver
    file, backing = driver.file, driver.backing

    def undo() -> None:
        if child in parent.children:
            Graph.unlink(child)
        if driver.file is None and file in parent.children:
            driver.file = file
        if driver.backing is None and backing in parent.children:
            driver.backing = backing

    return undo


def _leading_back(edge: Child, old: Node, new: Node) -> Callable[[], None]:
    at = old.parents.index(edge)

    def undo() -> None:
        # It may be gone, or have been led elsewhere.
        if edge.node is new and edge in new.parents:
            new.parents.remove(edge)
            old.parents.insert(at, edge)
            edge.node = old

    return undo
