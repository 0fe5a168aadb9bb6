"""Freezing a part of a backing chain: no edge in it may lead elsewhere while a job relies on it.

A frozen edge (`Child.frozen`) is refused by `Change`, with QSD's words; everything else may still happen to its nodes.
The job thaws its part before it changes the chain itself.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

from pyqsd.block.child import Child
from pyqsd.block.node import Node
from pyqsd.qapi.errors import Error


def edges(top: Node, base: Node | None) -> Iterator[Child]:
    """The edges from `top` down to `base`, or to the end of the chain."""
    node = top
    while node is not base:
        edge = node.edge_below()
        if edge is None:
            return
        yield edge
        node = edge.node


def check_not_frozen(top: Node, base: Node | None) -> None:
    """Whether the chain from `top` to `base` may be changed. Raises Error."""
    for edge in edges(top, base):
        if edge.frozen:
            assert isinstance(edge.parent, Node)
            raise Error(
                f"Cannot change '{edge.name}' link from '{edge.parent.name}' to '{edge.node.name}'", errno.EPERM
            )


def freeze(top: Node, base: Node | None) -> None:
    """Freeze the edges from `top` to `base`. Raises Error and changes nothing if one is frozen already, or leads to a
    node that must be free to go."""
    check_not_frozen(top, base)
    for edge in edges(top, base):
        if edge.node.driver.never_freeze:
            raise Error(f"Cannot freeze '{edge.name}' link to '{edge.node.name}'", errno.EPERM)
    for edge in edges(top, base):
        edge.frozen = True


def thaw(top: Node, base: Node | None) -> None:
    """The opposite of `freeze`."""
    for edge in edges(top, base):
        edge.frozen = False


def check_droppable(edge: Child) -> None:
    """Whether `edge` may be removed. Raises Error, also if a node that nobody else uses would be closed then although
    edges below it are frozen."""
    assert isinstance(edge.parent, Node)
    if edge.frozen:
        raise Error(
            f"Cannot change frozen '{edge.name}' link from '{edge.parent.name}' to '{edge.node.name}'", errno.EPERM
        )
    rest = [edge]
    for gone in rest:
        node = gone.node
        if node.monitor_owned or any(other not in rest for other in node.parents):
            continue
        for child in node.children:
            if child.frozen:
                raise Error(
                    f"Cannot change frozen '{child.name}' link from '{node.name}' to '{child.node.name}'", errno.EPERM
                )
            rest.append(child)
