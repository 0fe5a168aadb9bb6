"""How an export, a job or a command uses a node: a root of the graph.

A `BlockBackend` holds permissions on its node, checks the range of requests against the size, counts what is in flight,
and holds new requests back while the graph below is drained.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pyqsd.block import graph_perms
from pyqsd.block import permissions as perms
from pyqsd.block.child import Child
from pyqsd.trace import events as trace

if TYPE_CHECKING:
    from pyqsd.block.extents import Extent
    from pyqsd.block.graph import Graph
    from pyqsd.block.node import Node


class BlockBackend:
    """A user of a node from outside the graph.

    Arguments:
        graph: the graph that the node belongs to.
        description: how messages about permission conflicts call this user, for example "an unnamed block device".
        perm, shared: bits of `pyqsd.block.permissions` that it needs, and lets others have.
    """

    #: The job that this is an edge of; None: a user by itself.
    owner: Any = None
    #: How its edge is called.
    edge_name = "root"
    #: Requests of the users of this node come to the backend's node as well, without going through it.
    passed_on_by: Node | None = None

    def __init__(self, graph: Graph, description: str, perm: int, shared: int) -> None:
        self.graph = graph
        self._description = description
        self._perm = perm
        self._shared = shared
        self.edge: Child | None = None
        #: The node is inactive: nothing is needed of it, and nothing kept from others, until it is active again.
        self.suspended = False
        #: Its permission to write is no obstacle to making the node inactive: requests are refused then.
        self.allow_inactive = False
        #: While the graph below is drained, new requests wait. Not those of a job: it is drained itself, and must come
        #: to the end of what it is at.
        self.held_back = True
        #: Called when the size of the node has changed.
        self.on_resize: Callable[[], None] | None = None
        #: Called when a drain of the graph below begins and ends.
        self.on_drain_begin: Callable[[], None] | None = None
        self.on_drain_end: Callable[[], None] | None = None
        self.in_flight = 0
        self.quiesced = 0
        self._resumed: asyncio.Event | None = None
        self._idle_waiters: list[asyncio.Future[None]] = []

    def description(self) -> str:
        """How messages call this user."""
        return self._description

    def insert(self, node: Node) -> None:
        """Start to use `node`. Raises Error and leaves everything as it was if a permission is not to be had."""
        if self.edge is not None:
            raise ValueError("this backend has a node already")
        edge = Child(self, self.edge_name, node, 0, 0, perms.ALL)
        suspended = self.allow_inactive and not node.active
        node.parents.insert(0, edge)
        try:
            graph_perms.refresh([node], {edge: (0, perms.ALL) if suspended else (self._perm, self._shared)})
        except BaseException:
            node.parents.remove(edge)
            raise
        self.edge = edge
        self.suspended = suspended
        self.graph.backends.append(self)
        self.graph.join_drains(self)
        if trace.BLK_ROOT_ATTACH.enabled:
            trace.BLK_ROOT_ATTACH(id(edge), id(self), id(node))

    def set_perms(self, perm: int, shared: int) -> None:
        """Need and share something else from now on. Raises Error and changes nothing if that is not to be had."""
        if self.edge is not None and not self.suspended:
            graph_perms.refresh([self.edge.node], {self.edge: (perm, shared)})
        self._perm, self._shared = perm, shared

    def check_suspend(self) -> None:
        """Whether the node may become inactive. Raises OSError if this user writes to it and cannot do without."""
        if self._perm & (perms.WRITE | perms.WRITE_UNCHANGED) and not self.allow_inactive:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    def suspend(self) -> None:
        """The node becomes inactive: give up all permissions."""
        if self.edge is not None and not self.suspended:
            graph_perms.refresh([self.edge.node], {self.edge: (0, perms.ALL)})
            self.suspended = True

    def restore(self) -> None:
        """The node is active again: take the permissions back. Raises Error if they are not to be had."""
        if self.suspended and self.edge is not None:
            graph_perms.refresh([self.edge.node], {self.edge: (self._perm, self._shared)})
            self.suspended = False

    def remove(self) -> None:
        """Stop using the node; no request may be in flight."""
        edge = self.edge
        if edge is None:
            return
        if trace.BLK_ROOT_DETACH.enabled:
            trace.BLK_ROOT_DETACH(id(edge), id(self), id(edge.node))
        edge.node.parents.remove(edge)
        self.edge = None
        self.graph.backends.remove(self)
        graph_perms.refresh([edge.node])
        if self._resumed is not None:
            self._resumed.set()
        self.quiesced = 0

    @property
    def node(self) -> Node:
        """The node that is used."""
        edge = self.edge
        if edge is None:
            raise OSError(errno.ENOMEDIUM, "no node")
        return edge.node

    @property
    def length(self) -> int:
        """The size in bytes."""
        return self.node.length

    @property
    def read_only(self) -> bool:
        """Whether writing is not possible: the node is read-only or WRITE was not asked for."""
        return self.node.read_only or not self._perm & perms.WRITE

    def child_resized(self, edge: Child) -> None:
        """The node has another length now."""
        if self.on_resize is not None:
            self.on_resize()

    # --- draining ----------------------------------------------------------------------------------------------------

    def quiesce(self) -> None:
        """Hold back new requests from now on."""
        if not self.held_back:
            return
        self.quiesced += 1
        if self.quiesced == 1:
            self._resumed = asyncio.Event()
            if self.on_drain_begin is not None:
                self.on_drain_begin()

    def resume(self) -> None:
        """The opposite of `quiesce`."""
        if not self.quiesced:
            return
        self.quiesced -= 1
        if not self.quiesced:
            assert self._resumed is not None
            self._resumed.set()
            if self.on_drain_end is not None:
                self.on_drain_end()

    async def wait_idle(self) -> None:
        """Wait until no request is in flight here."""
        while self.in_flight:
            waiter = asyncio.get_running_loop().create_future()
            self._idle_waiters.append(waiter)
            await waiter

    async def _begin(self) -> Node:
        while self.quiesced:
            assert self._resumed is not None
            await self._resumed.wait()
        node = self.node
        self.in_flight += 1
        return node

    def _end(self) -> None:
        self.in_flight -= 1
        if not self.in_flight and self._idle_waiters:
            waiters, self._idle_waiters = self._idle_waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

    # --- I/O ---------------------------------------------------------------------------------------------------------

    def read_now(self, offset: int, length: int, iov: list[memoryview]) -> bool:
        """Read the whole range if that takes no waiting; False otherwise, with the buffers in any state."""
        edge = self.edge
        return edge is not None and not self.quiesced and edge.node.read_now(offset, length, iov)

    def reads_as_zeroes_now(self, offset: int, length: int) -> bool:
        """Whether the whole range is known, without any waiting or I/O, to read as zeroes."""
        edge = self.edge
        return edge is not None and not self.quiesced and edge.node.reads_as_zeroes_now(offset, length)

    def write_now(self, offset: int, length: int, iov: list[memoryview]) -> bool:
        """Write the whole range if that takes no waiting; False otherwise, with nothing or part of it written."""
        edge = self.edge
        if edge is None or self.quiesced or not edge.perm & perms.WRITE:
            return False
        return edge.node.write_now(offset, length, iov)

    async def preadv(self, offset: int, length: int, iov: list[memoryview], flags: int = 0) -> None:
        """Read. Raises OSError, with EIO if the range is not inside the node."""
        # `_begin` and `_check`, written out: this is the way of every request that waits.
        while self.quiesced:
            assert self._resumed is not None
            await self._resumed.wait()
        node = self.node
        if offset < 0 or length < 0 or offset + length > node.length:
            raise OSError(errno.EIO, "Request out of range")
        self.in_flight += 1
        try:
            await node.preadv(offset, length, iov, flags)
        finally:
            self._end()

    async def pwritev(self, offset: int, length: int, iov: list[memoryview], flags: int = 0) -> None:
        """Write. Raises OSError, with EIO if the range is not inside the node, EPERM if this user may not write."""
        node = await self._begin()
        try:
            self._check_write(node, offset, length)
            await node.pwritev(offset, length, iov, flags)
        finally:
            self._end()

    async def copy_from(self, offset: int, length: int, source: Node, at: int) -> bool:
        """Write what `source` has at the offset `at`; see `Node.copy_from`."""
        node = await self._begin()
        try:
            self._check_write(node, offset, length)
            return await node.copy_from(offset, length, source, at)
        finally:
            self._end()

    async def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write `data`, also beyond the end, which grows (making an image does that); needs RESIZE. Raises OSError."""
        node = await self._begin()
        try:
            self._check_write(node, 0, 0)
            await node.pwrite(offset, data)
        finally:
            self._end()

    async def pwrite_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        """Write zeroes; see `Node.pwrite_zeroes`."""
        node = await self._begin()
        try:
            self._check_write(node, offset, length)
            await node.pwrite_zeroes(offset, length, flags)
        finally:
            self._end()

    async def pdiscard(self, offset: int, length: int) -> None:
        """Discard; see `Node.pdiscard`."""
        node = await self._begin()
        try:
            self._check_write(node, offset, length)
            await node.pdiscard(offset, length)
        finally:
            self._end()

    async def flush(self) -> None:
        """Make everything whose write has completed durable."""
        node = await self._begin()
        try:
            await node.flush()
        finally:
            self._end()

    async def block_status_above(
        self, base: Node | None, offset: int, length: int, want_zero: bool = True
    ) -> tuple[Extent, int]:
        """Block status through the backing chain; see `Node.block_status_above`."""
        node = await self._begin()
        try:
            self._check(node, offset, length)
            return await node.block_status_above(base, offset, length, want_zero)
        finally:
            self._end()

    async def truncate(
        self, length: int, *, exact: bool = False, preallocation: str = "off", zero_new: bool = False
    ) -> None:
        """Resize; this user needs the permission RESIZE."""
        node = await self._begin()
        try:
            await node.truncate(length, exact=exact, preallocation=preallocation, zero_new=zero_new)
        finally:
            self._end()

    @staticmethod
    def _check(node: Node, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > node.length:
            raise OSError(errno.EIO, "Request out of range")

    def _check_write(self, node: Node, offset: int, length: int) -> None:
        self._check(node, offset, length)
        edge = self.edge
        if edge is None or not edge.perm & perms.WRITE:
            raise OSError(errno.EPERM, "Block device is read-only")
