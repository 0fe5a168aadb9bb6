"""Filters that come and go with a job: nobody opens them with ``blockdev-add``.

The job inserts its filter above a node: everybody who used the node uses the filter from then on. In the end the filter
is removed again, and its parents are led to the node below, or to another one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyqsd.block import filenames
from pyqsd.block.driver import ROLE_FILTERED, ROLE_PRIMARY, Filter
from pyqsd.block.node import Node
from pyqsd.block.replace import Change


class InternalFilter(Filter):
    """Base of such filters. The filtered node is its child `child_name`; its filename is that of this node."""

    # Its name is that of the node below, whatever that is.
    names_images = True
    #: What the edge to the filtered node is called.
    child_name = "backing"

    def exact_filename(self) -> str:
        return filenames.filename(self.target)


async def insert_above(node: Node, driver: type[InternalFilter], name: str | None, **settings: Any) -> Node:
    """Make a filter over `node`, and lead all parents of `node` to it.

    Arguments:
        driver: its class.
        name: of the new node; None: one is made up.
        settings: attributes of the driver that its permissions depend on.

    Raises Error, and then nothing has changed.
    """
    graph = node.graph
    async with graph.drained(node):
        top = graph.make_node(name, driver)
        for setting, value in settings.items():
            setattr(top.driver, setting, value)
        top.job_owned = True
        top.implicit = name is None
        # It adds nothing of its own to what the node does with these.
        top.discard_unmap = True
        top.length = node.length
        change = Change()
        try:
            change.add(top, driver.child_name, node, ROLE_FILTERED | ROLE_PRIMARY)
            top.opened = True
            top.refresh_limits()
            change.move_parents(node, top)
            change.check()
        except BaseException:
            change.undo()
            top.opened = False
            del graph.nodes[top.name]
            raise
        change.commit()
    return top


def lead_away(change: Change, top: Node, to: Node) -> None:
    """In `change`: the parents of the filter `top` use the node `to` instead, and `top` lets go of what it filters.
    After the commit it is for `Graph.unref` to close `top`. Raises Error."""
    edge = top.driver.file
    assert edge is not None
    change.move_parents(top, to)
    change.remove(edge)


async def take_away(top: Node, to: Node, more: Callable[[Change], None] | None = None) -> None:
    """Whoever uses the filter `top` uses `to` instead, and `more` is changed together with that; then `top` is closed,
    and what nobody uses any more. Raises Error, and then nothing has changed."""
    graph = top.graph
    async with graph.drained(top):
        change = Change()
        try:
            lead_away(change, top, to)
            if more is not None:
                more(change)
            change.check()
        except BaseException:
            change.undo()
            raise
        change.commit()
        for edge in change.removed:
            await graph.unref(edge.node)
        await graph.unref(top)
