"""An edge of the graph: how a parent uses a node."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyqsd.block.backend import BlockBackend
    from pyqsd.block.node import Node


class Child:
    """The edge `parent` → `node`, with the permissions that the parent holds and shares on it."""

    __slots__ = ("frozen", "name", "node", "parent", "perm", "role", "shared")

    def __init__(self, parent: Node | BlockBackend, name: str, node: Node, role: int, perm: int, shared: int) -> None:
        self.parent = parent
        self.name = name
        self.node = node
        self.role = role
        self.perm = perm
        self.shared = shared
        #: A job relies on where it leads; see `pyqsd.block.freezing`.
        self.frozen = False
