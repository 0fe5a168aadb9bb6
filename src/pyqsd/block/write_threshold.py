"""The write threshold of a node: one event when a write goes beyond an offset, so that thin storage can be grown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyqsd.block.events import BlockWriteThreshold

if TYPE_CHECKING:
    from pyqsd.block.node import Node


def exceeded(node: Node, offset: int, length: int) -> None:
    """A write of `length` bytes at `offset` ends beyond ``node.write_threshold``: say so, once, and disarm it."""
    threshold = node.write_threshold
    node.write_threshold = 0
    node.graph.events.emit(
        BlockWriteThreshold(node_name=node.name, amount_exceeded=offset + length - threshold, write_threshold=threshold)
    )
