"""Internal snapshots: the QMP commands, and finding the node whose image has them."""

from __future__ import annotations

import errno
import sys
from contextlib import AsyncExitStack

from pyqsd.block import action
from pyqsd.block.action import Transaction, TransactionAction
from pyqsd.block.commands import find_root
from pyqsd.block.driver import ROLE_DATA, ROLE_FILTERED, ROLE_METADATA
from pyqsd.block.graph import Graph
from pyqsd.block.info import SnapshotInfo
from pyqsd.block.node import Node
from pyqsd.qapi.command import command
from pyqsd.qapi.errors import Error, from_oserror
from pyqsd.qapi.types import Struct


def owner(node: Node) -> Node | None:
    """The node whose image holds the snapshots of `node`: itself, or what a filter or raw passes on; None if nobody
    can."""
    while not node.driver.supports_snapshots:
        child = node.driver.file
        content = ROLE_DATA | ROLE_METADATA | ROLE_FILTERED
        if child is None or any(other.role & content for other in node.children if other is not child):
            return None
        node = child.node
    return node


def listed(node: Node) -> list[SnapshotInfo]:
    """The snapshots of `node`; none where there cannot be any."""
    found = owner(node)
    try:
        return [] if found is None else found.driver.snapshot_list()
    except OSError:
        return []


def _list(node: Node) -> list[SnapshotInfo]:
    found = owner(node)
    try:
        if found is None:
            raise OSError(errno.ENOTSUP, "")
        return found.driver.snapshot_list()
    except OSError as exc:
        raise from_oserror(exc, "Failed to get a snapshot list") from exc


class BlockdevSnapshotInternal(Struct):
    """Names a node, and the snapshot of it that is to be taken."""

    device: str
    name: str


class InternalSnapshotAction(action.Action):
    """Takes an internal snapshot of the node `device`; no request is in flight there until the end."""

    def __init__(self, graph: Graph, device: str, name: str) -> None:
        self.graph = graph
        self.device = device
        self.name = name
        self._stack = AsyncExitStack()
        self._target: Node | None = None
        self._made: SnapshotInfo | None = None

    async def prepare(self) -> None:
        device, name = self.device, self.name
        node = find_root(self.graph, device)
        if node.read_only:
            raise Error(f"Device '{device}' is read only")
        target = owner(node)
        if target is None or target.read_only or not target.active:
            raise Error(
                f"Block format '{node.driver.name}' used by device '{device}' does not support internal snapshots"
            )
        if not name:
            raise Error("Name is empty")
        if any(one.name == name for one in _list(node)):
            raise Error(f"Snapshot with name '{name}' already exists on device '{device}'")
        await self._stack.enter_async_context(self.graph.drained(target))
        try:
            await node.flush()
            self._made = await target.driver.snapshot_create(name)
        except OSError as exc:
            raise from_oserror(exc, f"Failed to create snapshot '{name}' on device '{device}'") from exc
        except Error as exc:
            raise exc.prefixed(f"Failed to create snapshot '{name}' on device '{device}': ") from exc
        self._target = target

    async def abort(self) -> None:
        target, made = self._target, self._made
        if target is None or made is None:
            return
        try:
            await target.driver.snapshot_delete(made.id, made.name)
        except (OSError, Error) as exc:
            text = exc.strerror if isinstance(exc, OSError) else exc.desc
            print(
                f"Failed to delete snapshot with id '{made.id}' and name '{made.name}' on device '{self.device}' in "
                f"abort: {text}",
                file=sys.stderr,
            )

    async def clean(self) -> None:
        await self._stack.aclose()


class BlockdevSnapshotInternalWrapper(TransactionAction, tag="blockdev-snapshot-internal-sync"):
    """See the command."""

    data: BlockdevSnapshotInternal

    def action(self, transaction: Transaction) -> action.Action:
        return InternalSnapshotAction(transaction.graph, self.data.device, self.data.name)


@command("blockdev-snapshot-internal-sync", boxed=True)
async def blockdev_snapshot_internal_sync(graph: Graph, /, options: BlockdevSnapshotInternal) -> None:
    """Take an internal snapshot of the node `device`."""
    await action.run(InternalSnapshotAction(graph, options.device, options.name))


@command("blockdev-snapshot-delete-internal-sync")
async def blockdev_snapshot_delete_internal_sync(
    graph: Graph, /, *, device: str, id: str | None = None, name: str | None = None
) -> SnapshotInfo:
    """Delete the internal snapshot with this id and name; one of them is enough."""
    node = find_root(graph, device)
    if id is None and name is None:
        raise Error("Name or id must be provided")
    found = next((one for one in _list(node) if id in (None, one.id) and name in (None, one.name)), None)
    if found is None:
        raise Error(
            f"Snapshot with id '{_or_null(id)}' and name '{_or_null(name)}' does not exist on device '{device}'"
        )
    await delete_snapshot(graph, node, found)
    return found


def _or_null(text: str | None) -> str:
    return "null" if text is None else text


async def delete_snapshot(graph: Graph, node: Node, snapshot: SnapshotInfo) -> None:
    """Delete one of the node's snapshots. Raises Error."""
    target = owner(node)
    assert target is not None
    async with graph.drained(target):
        await target.driver.snapshot_delete(snapshot.id, snapshot.name)


async def goto_snapshot(graph: Graph, node: Node, snapshot: SnapshotInfo) -> None:
    """Make the content of the node that of one of its snapshots, its size too. Raises Error."""
    target = owner(node)
    assert target is not None
    if target.dirty_bitmaps:
        raise Error("Device has active dirty bitmaps", errno.EBUSY)
    if target.read_only:
        raise Error(f"Device '{node.name}' is read only")
    try:
        async with graph.drained(target):
            await target.driver.snapshot_goto(snapshot.id, snapshot.name)
            target.content_replaced()
    except OSError as exc:
        raise from_oserror(exc, "Could not apply snapshot") from exc
