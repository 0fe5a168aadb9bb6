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
        self._kept: set[Node] = set()
        self._roots: list[Node] = []
        self._edges: list[Child] = []
        self._committed = False
        #: The edges that are gone; whoever commits gives their nodes to `Graph.unref`.
        self.removed: list[Child] = []

    def _keep(self, *nodes: Node) -> None:
        for node in nodes:
            self._roots.append(node)
            if node not in self._kept:
                self._kept.add(node)
                self._undo.append(_restorer(node))

    def remove(self, child: Child) -> None:
        """Take the edge of a node away. Raises Error if it is frozen."""
        assert isinstance(child.parent, Node)
        freezing.check_droppable(child)
        self._keep(child.parent, child.node)
        Graph.unlink(child)
        self.removed.append(child)

    def add(self, parent: Node, name: str, node: Node, role: int) -> Child:
        """Make `node` the child `name` of `parent`. Raises Error if that would be a cycle, or cannot be."""
        if parent is node or is_below(parent, node):
            raise Error(f"Making '{node.name}' a {name} child of '{parent.name}' would create a cycle")
        if parent.active and not node.active:
            raise Error(f"Inactive '{node.name}' can't be a {name} child of active '{parent.name}'")
        self._keep(parent, node)
        child = Child(parent, name, node, role, 0, perms.ALL)
        Graph.link(child)
        self._edges.append(child)
        return child

    def move_parents(self, old: Node, new: Node) -> None:
        """Everybody who uses `old` uses `new` instead, but for `new` itself and what it is made of. Raises Error, and
        then some may do so already: `undo`."""
        self._keep(old, new)
        for edge in list(old.parents):
            if edge.parent is new or (isinstance(edge.parent, Node) and is_below(edge.parent, new)):
                continue
            if edge.frozen:
                raise Error(f"Cannot change '{edge.name}' link to '{edge.node.name}'", errno.EPERM)
            self._retarget(edge, new)

    def _retarget(self, edge: Child, new: Node) -> None:
        old = edge.node
        self._undo.append(lambda: setattr(edge, "node", old))
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


def _restorer(node: Node) -> Callable[[], None]:
    children, parents, driver = list(node.children), list(node.parents), node.driver
    file, backing = driver.file, driver.backing

    def restore() -> None:
        node.children[:], node.parents[:] = children, parents
        driver.file, driver.backing = file, backing

    return restore
