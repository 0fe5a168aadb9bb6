"""``blockdev-snapshot-sync``: a snapshot with an overlay that is opened, and made if need be, by the command."""

from __future__ import annotations

import errno
import os

from pyqsd.block import action, filenames
from pyqsd.block.action import Transaction, TransactionAction
from pyqsd.block.commands import lookup
from pyqsd.block.create import create_image
from pyqsd.block.drive_image import NewImageMode, check_not_own, options_like
from pyqsd.block.graph import Graph
from pyqsd.block.node import Node
from pyqsd.block.snapshot import SnapshotAction
from pyqsd.qapi.command import command
from pyqsd.qapi.errors import Error
from pyqsd.qapi.types import Struct


class BlockdevSnapshotSync(Struct, kw_only=True):
    """A node, the file of the image to be put over it, and the name of the node for that."""

    device: str | None = None
    node_name: str | None = None
    snapshot_file: str
    snapshot_node_name: str | None = None
    format: str = "qcow2"
    mode: NewImageMode = NewImageMode.ABSOLUTE_PATHS


class SnapshotSyncAction(SnapshotAction):
    """The new node lives as long as somebody uses it."""

    def __init__(self, graph: Graph, options: BlockdevSnapshotSync) -> None:
        super().__init__(graph, options.node_name or "", options.snapshot_node_name or "")
        self._device = options.device
        self._named = options.node_name is not None
        self._filename = options.snapshot_file
        self._format = options.format
        self._mode = options.mode
        self._opened: Node | None = None

    def _find(self) -> Node:
        return lookup(self._graph, self._device, self._node_name)

    async def _find_overlay(self, node: Node) -> Node:
        name = self._overlay_name
        if self._named and not name:
            raise Error("New overlay node-name missing")
        if name and name in self._graph.nodes:
            raise Error("New overlay node-name already in use")
        check_not_own(node, self._filename)
        try:
            if self._mode is NewImageMode.ABSOLUTE_PATHS:
                await create_image(
                    self._graph,
                    self._format,
                    self._filename,
                    node.length,
                    filenames.filename(node),
                    node.driver.name,
                )
            self._opened = await self._graph.open_unattached(
                options_like(node, self._filename, self._format, self._overlay_name)
            )
        except OSError as exc:
            number = exc.errno or errno.EIO
            raise Error(f"Could not open '{self._filename}': {os.strerror(number)}", number) from exc
        return self._opened

    async def clean(self) -> None:
        await super().clean()
        if self._opened is not None:
            await self._graph.unref(self._opened)


class BlockdevSnapshotSyncWrapper(TransactionAction, tag="blockdev-snapshot-sync"):
    """See the command."""

    data: BlockdevSnapshotSync

    def action(self, transaction: Transaction) -> action.Action:
        return SnapshotSyncAction(transaction.graph, self.data)


@command("blockdev-snapshot-sync", boxed=True)
async def blockdev_snapshot_sync(graph: Graph, /, options: BlockdevSnapshotSync) -> None:
    """Put a new node in the image `snapshot_file` over a node: everybody who uses that uses the new one from now on."""
    await action.run(SnapshotSyncAction(graph, options))
