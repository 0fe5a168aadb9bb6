"""``blockdev-snapshot``: a new overlay takes the place of a node for all its users.

The node becomes the overlay's backing file and read-only; what belongs to it, like its dirty bitmaps, stays with it.
"""

from __future__ import annotations

from contextlib import AsyncExitStack

from pyqsd.block import action, graph_perms, op_blockers
from pyqsd.block import permissions as perms
from pyqsd.block.action import Transaction, TransactionAction
from pyqsd.block.driver import ROLE_COW
from pyqsd.block.graph import Graph
from pyqsd.block.node import Node
from pyqsd.block.op_blockers import Op
from pyqsd.block.reopen import read_only_again
from pyqsd.block.replace import Change
from pyqsd.qapi.command import command
from pyqsd.qapi.errors import Error
from pyqsd.qapi.types import Struct


class BlockdevSnapshot(Struct):
    """Names a node, and the one that is to be put over it."""

    node: str
    overlay: str


class SnapshotAction(action.Action):
    """``blockdev-snapshot``: `overlay` is a node that exists already."""

    def __init__(self, graph: Graph, node: str, overlay: str) -> None:
        self._graph = graph
        self._node_name = node
        self._overlay_name = overlay
        self._node: Node | None = None
        self._overlay: Node | None = None
        self._change: Change | None = None
        self._stack = AsyncExitStack()

    def _find(self) -> Node:
        return self._graph.find(self._node_name)

    async def _find_overlay(self, node: Node) -> Node:
        return self._graph.find(self._overlay_name)

    async def prepare(self) -> None:
        graph = self._graph
        node = self._node = self._find()
        await self._stack.enter_async_context(graph.drained(node))
        op_blockers.check(node, Op.EXTERNAL_SNAPSHOT)
        if not node.read_only:
            try:
                await node.flush()
            except OSError as exc:
                raise Error("An IO error has occurred", exc.errno or 0) from exc
        overlay = self._overlay = await self._find_overlay(node)
        if graph_perms.cumulative(overlay)[0] & perms.CONSISTENT_READ:
            # Somebody relies on what it contains now; who only writes does not.
            raise Error("The overlay is already in use")
        if overlay.driver.is_filter:
            raise Error("Filters cannot be used as overlays")
        if overlay.driver.backing is not None:
            raise Error("The overlay already has a backing image")
        if not overlay.driver.supports_backing:
            raise Error("The overlay does not support backing images")
        change = Change()
        try:
            change.add(overlay, "backing", node, ROLE_COW)
            change.move_parents(node, overlay)
            change.check()
        except BaseException:
            change.undo()
            raise
        change.commit()
        self._change = change

    async def commit(self) -> None:
        assert self._node is not None
        await read_only_again(self._graph, self._node)

    async def abort(self) -> None:
        assert self._change is not None
        self._change.undo()

    async def clean(self) -> None:
        await self._stack.aclose()


class BlockdevSnapshotWrapper(TransactionAction, tag="blockdev-snapshot"):
    """See the command."""

    data: BlockdevSnapshot

    def action(self, transaction: Transaction) -> action.Action:
        return SnapshotAction(transaction.graph, self.data.node, self.data.overlay)


@command("blockdev-snapshot", boxed=True, features=("allow-write-only-overlay",))
async def blockdev_snapshot(graph: Graph, /, options: BlockdevSnapshot) -> None:
    """Put the node `overlay` over `node`: everybody who uses `node` uses `overlay` from now on."""
    await action.run(SnapshotAction(graph, options.node, options.overlay))
